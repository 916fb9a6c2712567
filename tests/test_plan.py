"""The work tables cover every element once and put it where it belongs."""

import numpy as np
import pytest
import torch

from ato_fast.plan import Axis, build_plan
from samples import VARIANTS, every_layout, layout_of, random_mask


def _elements(chunk):
    _, _, _, start, _, inner, outer, stride = chunk
    return (start + np.arange(outer)[:, None] * stride + np.arange(inner)).ravel()


def _optimizer():
    model = every_layout()
    return VARIANTS[-1](model, layout_of(model))


def _expected_owner(optimizer, dropped):
    """Group of every element of the buffer by brute force: -1 updated only, -2 padding."""
    flat, layout = optimizer.flat, optimizer.layout
    owner = torch.full((flat.buffers[0].numel(),), -2, dtype=torch.int64)
    for index, name in enumerate(flat.names):
        view = flat.view([owner], index)
        view.fill_(-1)
        for gate in layout.gates:
            for part in gate.slices:
                if part.tensor == name and part.in_group:
                    for channel, group in enumerate(part.channels):
                        if group >= 0 and dropped[group + gate.offset]:
                            view.select(part.dim, channel).fill_(int(group + gate.offset))
    return owner.numpy()


@pytest.mark.parametrize("max_chunk", [1, 7, 64, 1 << 14])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_every_element_once_in_its_group(keep, max_chunk):
    optimizer = _optimizer()
    flat = optimizer.flat
    dropped = ~random_mask(optimizer.layout, keep=keep).numpy()
    plan = build_plan(
        flat.table, flat._axes, flat.group_hyper, dropped, flat.device, max_chunk, unit=100
    )
    chunks, items, work, units = (
        t.numpy() for t in (plan.chunks, plan.items, plan.work, plan.units)
    )
    owner = np.full(flat.buffers[0].numel(), -2)
    for begin, end, group, _ in items:
        for chunk in chunks[begin:end]:
            owner[_elements(chunk)] = group
    for chunk in chunks[plan.n_slots :]:
        owner[_elements(chunk)] = -1
    np.testing.assert_array_equal(owner, _expected_owner(optimizer, dropped))
    size = chunks[:, 5] * chunks[:, 6]
    covered = np.concatenate([_elements(chunk) for chunk in chunks])
    assert len(covered) == len(np.unique(covered)) == size.sum() == flat.table[:, 2].sum()
    assert plan.n_projected == size[: plan.n_slots].sum()
    # One piece of a strided run is never cut; the longest is a whole row of `up.weight`, 7 * 9.
    assert size.max() <= max(max_chunk, 63)
    assert (items[:, 2] == np.flatnonzero(dropped)).all()
    tensors = flat.table[chunks[:, 0]]
    np.testing.assert_array_equal(chunks[:, 3] - chunks[:, 4], tensors[:, 1])
    assert units[0] == 0 and units[-1] == len(work) and (np.diff(units) > 0).all()
    filled = np.flatnonzero(items[:, 1] > items[:, 0])
    assert sorted(work[work >= 0]) == filled.tolist()
    assert sorted(~work[work < 0]) == list(range(plan.n_slots, len(chunks)))


def test_runs_without_projection_merge_across_rows():
    """A depthwise weight of 9 elements per row is one chunk where nothing is dropped."""
    table = np.array([[0, 0, 9 * 512, 0]])
    axis = Axis(0, 9, 1, np.arange(512))
    dropped = np.zeros(512, dtype=bool)
    arguments = (np.zeros(512, dtype=np.int64), dropped, torch.device("cpu"))
    assert len(build_plan(table, [axis], *arguments).chunks) == 1
    dropped[100] = dropped[101] = True
    assert build_plan(table, [axis], *arguments).chunks[:, 5].tolist() == [9, 9, 900, 9 * 410]


def test_a_group_takes_the_lr_of_its_first_row():
    model = every_layout()
    layout = layout_of(model)
    norm = {model.norm.weight, model.norm.bias}
    rest = [p for p in model.parameters() if p not in norm]
    optimizer = VARIANTS[-1](
        model, layout, params=[{"params": list(norm), "lr": 9.0}, {"params": rest, "lr": 0.5}]
    )
    assert (optimizer.flat.group_hyper[layout.gate("coupled").span] == 1).all()
    for index, name in enumerate(optimizer.flat.names):
        assert optimizer.flat.table[index, 3] == (0 if name.startswith("norm") else 1)


def test_no_groups_and_no_parameters():
    plan = build_plan(
        np.empty((0, 4), dtype=np.int64),
        [],
        np.empty(0, dtype=np.int64),
        np.empty(0, dtype=bool),
        torch.device("cpu"),
    )
    assert plan.n_slots == plan.n_projected == len(plan.chunks) == len(plan.work) == 0
    assert plan.units.tolist() == [0]
