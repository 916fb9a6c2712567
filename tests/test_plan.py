"""The work tables cover every element once and put it where it belongs."""

import numpy as np
import pytest
import torch

from ato_fast.plan import Axis, build_plan
from samples import VARIANTS, every_layout, layout_of

CPU = torch.device("cpu")


def _elements(segment, channel):
    _, _, _, start, _, inner, outer, stride = segment
    pieces = start + channel * inner + np.arange(outer)[:, None] * stride + np.arange(inner)
    return pieces.ravel()


def _optimizer():
    model = every_layout()
    return VARIANTS[-1](model, layout_of(model))


def _expected_owner(optimizer):
    """Group of every element of the buffer by brute force: -1 in none, -2 padding."""
    flat, layout = optimizer.flat, optimizer.layout
    owner = torch.full((flat.buffers[0].numel(),), -2, dtype=torch.int64)
    for index, name in enumerate(flat.names):
        view = flat.view([owner], index)
        view.fill_(-1)
        for gate in layout.gates:
            for part in gate.slices:
                if part.tensor == name and part.in_group:
                    for channel, group in enumerate(part.channels):
                        if group >= 0:
                            view.select(part.dim, channel).fill_(int(group + gate.offset))
    return owner.numpy()


@pytest.mark.parametrize("limit", [1, 7, 64, 1 << 14])
def test_every_element_once_in_its_group(limit):
    optimizer = _optimizer()
    flat = optimizer.flat
    plan = build_plan(flat.table, flat.axes, flat.group_hyper, flat.device, limit, limit, unit=100)
    segments, bundles, units, blocks = (
        t.numpy() for t in (plan.segments, plan.bundles, plan.units, plan.blocks)
    )
    owner = np.full(flat.buffers[0].numel(), -2)
    seen = []
    largest = 0
    for begin, end, group, n, row in bundles:
        assert group >= 0 or n == end - begin == 1
        size = 0
        for segment in segments[begin:end]:
            for channel in range(n):
                elements = _elements(segment, channel)
                owner[elements] = group + channel if group >= 0 else -1
                seen.append(elements)
                size += len(elements)
        if n > 1 or group < 0:
            largest = max(largest, size)
        assert group < 0 or (flat.group_hyper[group : group + n] == row).all()
    np.testing.assert_array_equal(owner, _expected_owner(optimizer))
    covered = np.concatenate(seen)
    assert len(covered) == len(np.unique(covered)) == flat.table[:, 2].sum()
    # One piece of a strided run in no group is never cut; there is none beyond 63 elements.
    assert largest <= max(limit, 63)
    assert bundles[0, 0] == 0 and (bundles[1:, 0] == bundles[:-1, 1]).all()
    assert bundles[-1, 1] == len(segments)
    tensors = flat.table[segments[:, 0]]
    np.testing.assert_array_equal(segments[:, 3] - segments[:, 4], tensors[:, 1])
    np.testing.assert_array_equal(segments[:, 1:3], tensors[:, [0, 3]])
    assert units[0] == 0 and units[-1] == len(bundles) and (np.diff(units) > 0).all()
    _check_blocks(segments, bundles, blocks)


def _check_blocks(segments, bundles, blocks):
    sizes = [(segments[b:e, 5] * segments[b:e, 6]).sum() for b, e, *_ in bundles]
    channels = [(b, c) for b, first, n in blocks for c in range(first, first + n)]
    assert sorted(channels) == [(b, c) for b in range(len(bundles)) for c in range(bundles[b, 3])]
    longest = [sizes[b] for b, _, _ in blocks]
    assert longest == sorted(longest, reverse=True)
    for b, _, n in blocks:
        assert 1 <= n <= 8 and (n == 1 or (sizes[b] <= 256 and bundles[b, 2] >= 0))


def test_neighbouring_rows_share_a_bundle():
    """512 depthwise rows of 9 elements and their norm: one bundle, whatever the mask will be."""
    table = np.array([[0, 0, 9 * 512, 0], [0, 4608, 512, 0]])
    axes = [Axis(0, 9, 1, np.arange(512)), Axis(1, 1, 1, np.arange(512))]
    plan = build_plan(table, axes, np.zeros(512, dtype=np.int64), CPU)
    assert plan.bundles.tolist() == [[0, 2, 0, 512, 0]]
    assert plan.segments[:, 5].tolist() == [9, 1]
    assert len(plan.blocks) == 512 // 8 and len(plan.units) == 2


@pytest.mark.parametrize(
    "other",
    [
        np.arange(4)[::-1].copy(),  # runs the other way
        np.array([0, 1, 1, 2]),  # other lengths, one group without
        np.array([0, -1, 1, 2]),  # a gap
    ],
)
def test_groups_whose_rows_do_not_follow_each_other_stand_alone(other):
    table = np.array([[0, 0, 12, 0], [0, 16, 4, 0]])
    axes = [Axis(0, 3, 1, np.arange(4)), Axis(1, 1, 1, other)]
    plan = build_plan(table, axes, np.zeros(4, dtype=np.int64), CPU)
    owned = plan.bundles[plan.bundles[:, 2] >= 0]
    assert owned[:, 3].sum() == 4 and len(owned) > 1
    for begin, end, group, n, _ in owned.tolist():
        for segment in plan.segments[begin:end].numpy():
            groups = np.repeat(np.arange(4), 3) if segment[0] == 0 else other
            for channel in range(n):
                places = _elements(segment, channel) - table[segment[0], 1]
                assert (groups[places] == group + channel).all()


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


def test_groups_of_different_lr_share_no_bundle():
    table = np.array([[0, 0, 12, 0]])
    plan = build_plan(table, [Axis(0, 3, 1, np.arange(4))], np.array([1, 1, 0, 1]), CPU)
    assert plan.bundles[:, 2:].tolist() == [[0, 2, 1], [2, 1, 0], [3, 1, 1]]


def test_no_groups_and_no_parameters():
    plan = build_plan(np.empty((0, 4), dtype=np.int64), [], np.empty(0, dtype=np.int64), CPU)
    assert plan.segments.shape == (0, 8) and plan.bundles.shape == (0, 5)
    assert plan.blocks.shape == (0, 3) and plan.units.tolist() == [0]
