"""The fused step: every optimizer x projection x backend against the float64 oracle."""

import math

import pytest
import torch

from ato_fast import DHSPG, HalfSpace, Prox, backend, ops
from ato_fast.reference import group_step_ref
from numerics import assert_all_as_accurate, assert_same_bits
from samples import (
    BACKENDS,
    PROJECTIONS,
    VARIANTS,
    by_name,
    every_layout,
    layout_of,
    random_mask,
    set_grads,
    snapshot,
    twin,
)

STEPS = 25


def run(variant, projection, dtype=torch.float32, steps=STEPS, device="cpu", strength=0.4):
    """Train an `EveryLayout` on fixed gradients; half the groups are dropped after 5 steps."""
    model = every_layout(dtype).to(device)
    layout = layout_of(model)
    optimizer = variant(model, layout, projection=projection)
    lam = strength * (1 + torch.arange(layout.n_groups) % 7)
    for step in range(steps):
        if step == 5:
            optimizer.set_mask(random_mask(layout), lam, threshold=0.01)
        set_grads(model, step)
        if step == 7:
            model.heads.weight.grad = None
        optimizer.step()
    return model, optimizer


# The reference is the measure here; its own formulas are tested against plain ones further down.
@pytest.mark.parametrize("served", BACKENDS[1:], indirect=True)
@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
@pytest.mark.parametrize("variant", VARIANTS, ids=by_name)
def test_follows_the_float64_oracle(variant, projection, served, monkeypatch):
    model, optimizer = run(variant, projection, device=served)
    got = {key: value.cpu() for key, value in snapshot(model, optimizer).items()}
    monkeypatch.setenv(backend.VARIABLE, "reference")
    same = snapshot(*run(variant, projection))
    oracle = snapshot(*run(variant, projection, torch.float64))
    counts = [key for key in got if key.endswith(":step")]
    for key in counts:
        assert got.pop(key) == same.pop(key) == oracle.pop(key)
    assert_all_as_accurate(got, same, oracle)
    if projection is not None:
        assert 0 < int(optimizer.n_zero()) < int((~optimizer.mask).sum())


@pytest.mark.parametrize("variant", VARIANTS, ids=by_name)
def test_kept_groups_have_the_bits_of_an_unprojected_run(variant, served):
    plain, _ = run(variant, None, device=served)
    for projection in (Prox(), HalfSpace(), DHSPG()):
        model, optimizer = run(variant, projection, device=served)
        layout = optimizer.layout
        for (name, got), (_, expected) in zip(
            model.named_parameters(), plain.named_parameters(), strict=True
        ):
            for dim in range(got.dim()):
                groups = torch.tensor(layout.groups_of(name, dim))
                if name == "last.weight" and dim == 1:  # input columns are not projected
                    continue
                if bool((groups >= 0).any()):
                    kept = (groups < 0) | optimizer.mask[groups]
                    got, expected = (
                        got[(slice(None),) * dim + (kept,)],
                        expected[(slice(None),) * dim + (kept,)],
                    )
            assert_same_bits(got.detach().cpu(), expected.detach().cpu(), name)


@pytest.mark.parametrize("projection", PROJECTIONS[1:], ids=by_name)
@pytest.mark.parametrize("variant", VARIANTS, ids=by_name)
def test_zero_is_exact_absorbing_and_clears_the_state(variant, projection, served):
    model = every_layout().to(served)
    layout = layout_of(model)
    optimizer = variant(model, layout, projection=projection)
    mask = random_mask(layout)
    for step in range(3):
        set_grads(model, step)
        optimizer.step()
    optimizer.set_mask(mask, threshold=math.inf)
    set_grads(model, 3)
    optimizer.step()
    assert int(optimizer.n_zero()) == int((~mask).sum())
    optimizer.set_strength(threshold=0.0)
    for step in range(4, 8):
        set_grads(model, step, scale=100.0)
        optimizer.step()
        assert int(optimizer.n_zero()) == int((~mask).sum())
    for name, param in model.named_parameters():
        for dim in range(param.dim()):
            if name == "last.weight" and dim == 1:
                continue
            groups = torch.tensor(layout.groups_of(name, dim))
            dropped = (groups >= 0) & ~mask[groups]
            for value in [param, *optimizer.state[param].values()]:
                if value.dim() == param.dim():
                    rows = value.detach().movedim(dim, 0)[dropped.to(value.device)]
                    assert not rows.any(), name


def test_missing_gradients_leave_the_value_to_the_projection(served):
    model = every_layout().to(served)
    layout = layout_of(model)
    optimizer = VARIANTS[-1](model, layout)
    optimizer.set_mask(random_mask(layout), threshold=0.25)
    norms = optimizer.group_norms()
    before = snapshot(model)
    optimizer.step()
    after = optimizer.group_norms()
    dropped = ~optimizer.mask.to(norms.device)
    torch.testing.assert_close(after[dropped], (norms[dropped] - 0.25).clamp(min=0))
    torch.testing.assert_close(after[~dropped], norms[~dropped], rtol=0, atol=0)
    assert_same_bits(model.free.weight.detach(), before["free.weight"])
    for param in model.parameters():
        assert optimizer.state[param]["step"] == 0


@pytest.mark.parametrize("variant", VARIANTS, ids=by_name)
def test_found_inf_changes_nothing(variant, served):
    model = every_layout().to(served)
    layout = layout_of(model)
    optimizer = variant(model, layout)
    set_grads(model, 0)
    optimizer.step()
    optimizer.set_mask(random_mask(layout), threshold=0.5)
    before = snapshot(model, optimizer)
    set_grads(model, 1)
    model.conv.weight.grad[0] = float("nan")
    optimizer.found_inf = torch.ones(1, device=served)
    optimizer.step()
    for name, value in snapshot(model, optimizer).items():
        assert_same_bits(value, before[name], name)


@pytest.mark.parametrize("variant", VARIANTS, ids=by_name)
def test_grad_scale_divides_and_never_writes_gradients(variant, served):
    model = every_layout().to(served)
    other = twin(model)
    layout = layout_of(model)
    scaled, plain = variant(model, layout), variant(other, layout)
    scaled.grad_scale = torch.full((1,), 1024.0, device=served)
    scaled.found_inf = torch.zeros(1, device=served)
    for step in range(3):
        set_grads(model, step, scale=1024.0)
        set_grads(other, step)
        kept = [p.grad.clone() for p in model.parameters()]
        scaled.step()
        plain.step()
        for param, grad in zip(model.parameters(), kept, strict=True):
            assert_same_bits(param.grad, grad)
    for (name, got), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(got.detach(), expected.detach(), name)


def test_nan_gradients_without_a_scaler_are_not_hidden(served):
    model = every_layout().to(served)
    layout = layout_of(model)
    for projection in (Prox(), HalfSpace(), DHSPG()):
        optimizer = VARIANTS[-1](model, layout, projection=projection)
        optimizer.set_mask(torch.zeros(layout.n_groups), threshold=0.1)
        set_grads(model, 0)
        model.odd.weight.grad[3, 5] = float("nan")
        optimizer.step()
        assert model.odd.weight[3].isnan().any()


@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
def test_bits_do_not_depend_on_the_number_of_threads(projection, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(snapshot(*run(VARIANTS[-1], projection, steps=9)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert_same_bits(other[name], value, name)


def test_reruns_have_the_same_bits(served):
    first, second = (snapshot(*run(VARIANTS[-1], Prox(), steps=9, device=served)) for _ in "ab")
    for name, value in first.items():
        assert_same_bits(second[name], value, name)


def _padded(tensor, fill):
    """A copy of a flat tensor inside a larger buffer of ``fill``, and that buffer."""
    outer = torch.full((tensor.numel() + 37,), fill, dtype=tensor.dtype, device=tensor.device)
    inner = outer[16 : 16 + tensor.numel()]
    inner.copy_(tensor)
    return inner, outer


@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
@pytest.mark.parametrize("variant", VARIANTS, ids=by_name)
def test_padding_comes_back_untouched(variant, projection, served):
    model = every_layout().to(served)
    layout = layout_of(model)
    optimizer = variant(model, layout, projection=projection)
    optimizer.set_mask(random_mask(layout), threshold=1.5)
    set_grads(model, 0)
    arguments = list(optimizer.op_arguments())
    table = optimizer.flat.table
    used = torch.zeros(optimizer.flat.buffers[0].numel(), dtype=torch.bool)
    for _, offset, numel, _ in table.tolist():
        used[offset : offset + numel] = True
    assert (table[:, 1] * 4 % 64 == 0).all() and not used.all()
    guards = []
    for place in (0, 1, 2):
        padded = []
        for buffer in arguments[place]:
            buffer[~used] = float("nan")
            inner, outer = _padded(buffer, float("nan"))
            padded.append(inner)
            guards.append(
                (outer, torch.cat([torch.zeros(16).bool(), used, torch.zeros(21).bool()]))
            )
        arguments[place] = padded
    grads = [_padded(g.as_strided((g.numel(),), (1,)), float("nan"))[0] for g in arguments[5]]
    arguments[3], arguments[5] = arguments[3].clone(), grads
    ops.group_step_(*arguments)
    optimizer.step()
    for (outer, mine), buffers in zip(
        guards, [*optimizer.flat.buffers, *optimizer._first, *optimizer._second], strict=True
    ):
        mine = mine.to(outer.device)
        assert outer[~mine].isnan().all()
        assert_same_bits(outer[mine], buffers[used.to(outer.device)])


def test_a_weight_changed_before_backward_raises(served):
    model = every_layout().to(served)
    optimizer = VARIANTS[-1](model, layout_of(model))
    x = torch.randn(2, 127, device=served, requires_grad=True)
    loss = model.odd(x).square().sum()
    set_grads(model, 0)
    versions = [p._version for p in model.parameters()]
    states = [s["exp_avg"]._version for s in optimizer.state.values()]
    optimizer.step()
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    assert all(
        s["exp_avg"]._version > v for s, v in zip(optimizer.state.values(), states, strict=True)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _op_arguments(projection):
    model = every_layout()
    optimizer = VARIANTS[-1](model, layout_of(model), projection=projection)
    optimizer.set_mask(random_mask(optimizer.layout), threshold=0.5)
    set_grads(model, 0)
    return optimizer.op_arguments()


@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
def test_opcheck_of_the_cpu_kernel(projection):
    assert backend.extension("_C").loaded
    torch.library.opcheck(torch.ops.ato_fast.group_step_.default, _op_arguments(projection))


@pytest.fixture(scope="module")
def reference_op():
    """The reference registered under its own name: the CPU kernel hides it in the real op."""
    library = torch.library.Library("ato_fast_reference", "DEF")
    library.define("group_step_" + ops.SCHEMAS["group_step_"])
    library.impl("group_step_", group_step_ref, "CompositeExplicitAutograd")
    torch.library.register_fake("ato_fast_reference::group_step_", lambda *args: None, lib=library)
    yield torch.ops.ato_fast_reference.group_step_.default
    library._destroy()


@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
def test_opcheck_of_the_reference(projection, reference_op):
    torch.library.opcheck(reference_op, _op_arguments(projection))
