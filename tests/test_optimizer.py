"""`SGD` and `AdamW` as torch.optim.Optimizers: trajectories, state, scaler, schedulers, errors."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from ato_fast import SGD, AdamW, HalfSpace, Prox, backend
from ato_fast.groups import Gate, GroupLayout, Slice
from numerics import assert_all_as_accurate, assert_same_bits
from samples import (
    VARIANTS,
    Adam,
    by_name,
    every_layout,
    layout_of,
    random_mask,
    set_grads,
    snapshot,
    twin,
)

TORCH = {SGD: torch.optim.SGD, AdamW: torch.optim.AdamW, Adam: torch.optim.Adam}
REAL = [variant for variant in VARIANTS if variant.make is not Adam]


@pytest.fixture(params=["reference", "cpu"])
def served(request, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, request.param)
    return request.param


def make(variant, dtype=torch.float32, **more):
    model = every_layout(dtype)
    return model, variant(model, layout_of(model), **more)


def torch_twin(variant, model):
    other = twin(model)
    return other, TORCH[variant.make](other.parameters(), foreach=False, **variant.hyper)


@pytest.mark.parametrize("variant", VARIANTS, ids=by_name)
def test_without_projection_100_steps_follow_torch(variant, served, monkeypatch):
    model, ours = make(variant)
    same, theirs = torch_twin(variant, model)
    wide, oracle = torch_twin(variant, twin(model, torch.float64))
    for step in range(100):
        for each in (model, same, wide):
            set_grads(each, step)
        for optimizer in (ours, theirs, oracle):
            optimizer.step()
    assert_all_as_accurate(snapshot(model), snapshot(same), snapshot(wide))
    # The float64 path that serves as oracle elsewhere agrees with torch's in float64.
    monkeypatch.setenv(backend.VARIABLE, "reference")
    checked, reference = make(variant, torch.float64)
    for step in range(100):
        set_grads(checked, step)
        reference.step()
    for (name, got), expected in zip(checked.named_parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=name)


def test_changing_momentum_follows_torch(served):
    """OneCycleLR moves momentum; a buffer that starts late starts as torch's does."""
    model, ours = make(REAL[0])
    other, theirs = torch_twin(REAL[0], model)
    for step in range(9):
        for optimizer in (ours, theirs):
            group = optimizer.param_groups[0]
            group["momentum"] = (0.0, 0.9, 0.5)[step // 3]
            group["dampening"] = 0.2
        for each in (model, other):
            set_grads(each, step)
        ours.step()
        theirs.step()
    for (name, got), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_parameter_groups_follow_torch(served):
    model, _ = make(REAL[-1])
    other = twin(model)

    def groups(m):
        norm = [m.norm.weight, m.norm.bias]
        rest = [p for p in m.parameters() if all(p is not q for q in norm)]
        return [{"params": rest}, {"params": norm, "weight_decay": 0.0, "lr": 0.1}]

    ours = AdamW(model, layout_of(model), lr=0.01, params=groups(model))
    theirs = torch.optim.AdamW(groups(other), lr=0.01)
    for step in range(20):
        set_grads(model, step)
        set_grads(other, step)
        ours.step()
        theirs.step()
    for (name, got), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("variant", REAL, ids=by_name)
@pytest.mark.parametrize("projection", [Prox(), HalfSpace()], ids=by_name)
def test_resume_is_bit_exact(variant, projection, served):
    model, ours = make(variant, projection=projection)

    def train(m, optimizer, steps):
        for step in steps:
            if step == 3:
                optimizer.set_mask(random_mask(optimizer.layout), 2.0, threshold=0.01)
            set_grads(m, step)
            optimizer.step()

    train(model, ours, range(8))
    stored = io.BytesIO()
    torch.save((model.state_dict(), ours.state_dict()), stored)
    train(model, ours, range(8, 16))
    stored.seek(0)
    weights, state = torch.load(stored, weights_only=True)
    resumed = every_layout(seed=5)
    again = variant(resumed, layout_of(resumed), projection=projection)
    buffers = [b.data_ptr() for b in again.flat.buffers + again._first + again._second]
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    assert buffers == [b.data_ptr() for b in again.flat.buffers + again._first + again._second]
    assert torch.equal(again.mask, ours.mask)
    train(resumed, again, range(8, 16))
    expected = snapshot(model, ours)
    for name, value in snapshot(resumed, again).items():
        assert_same_bits(value, expected[name], name)


@pytest.mark.parametrize("variant", REAL, ids=by_name)
def test_state_moves_to_torch_and_back(variant, served):
    model, ours = make(variant)
    other, theirs = torch_twin(variant, model)

    def compare():
        for (name, got), expected in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6, msg=name)

    def train(steps):
        for step in steps:
            set_grads(model, step)
            set_grads(other, step)
            ours.step()
            theirs.step()

    set_grads(model, 0)
    ours.step()
    other.load_state_dict(model.state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(range(1, 6))
    compare()
    _, fresh = make(variant)
    other_model = every_layout(seed=9)
    fresh = variant(other_model, layout_of(other_model))
    other_model.load_state_dict(other.state_dict())
    fresh.load_state_dict(copy.deepcopy(theirs.state_dict()))
    model, ours = other_model, fresh
    train(range(6, 12))
    compare()


def test_parameters_never_updated_have_no_state_as_in_torch():
    model, ours = make(REAL[-1])
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    ours.step()
    state = ours.state_dict()["state"]
    assert set(state) == {ours.flat.names.index("conv.weight")}
    assert state[next(iter(state))].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_grad_scaler_skips_and_scales():
    model, ours = make(REAL[-1])
    other, theirs = torch_twin(REAL[-1], model)
    ours.set_mask(random_mask(ours.layout), threshold=0.0)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3) for _ in "ab"]
    for step in range(8):
        for each, optimizer, scaler in zip((model, other), (ours, theirs), scalers, strict=True):
            optimizer.zero_grad()
            loss = sum((p * (i + 1)).square().sum() for i, p in enumerate(each.parameters()))
            scaler.scale(loss).backward()
            if step == 4:
                each.odd.weight.grad[0, 0] = float("inf")
            if step == 6:
                scaler.unscale_(optimizer)
            before = snapshot(each)
            scaler.step(optimizer)
            scaler.update()
            changed = any(not torch.equal(v, before[k]) for k, v in snapshot(each).items())
            assert changed == (step != 4)
    assert scalers[0].get_scale() == scalers[1].get_scale()
    for (name, got), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_closure_and_schedulers_and_tensor_lr(served):
    model, ours = make(REAL[-1])
    same, theirs = torch_twin(REAL[-1], model)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9) for o in (ours, theirs)]
    for _ in range(8):
        for each, optimizer, schedule in zip((model, same), (ours, theirs), schedules, strict=True):

            def closure(m=each, o=optimizer):
                o.zero_grad()
                loss = sum((p * (i + 1)).square().sum() for i, p in enumerate(m.parameters()))
                loss.backward()
                return loss

            assert torch.is_tensor(optimizer.step(closure))
            schedule.step()
    for (name, got), expected in zip(model.named_parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)
    number, in_tensor = (make(REAL[-1]) for _ in "ab")
    in_tensor[1].param_groups[0]["lr"] = torch.tensor(0.02, dtype=torch.float64)
    for each, optimizer in (number, in_tensor):
        optimizer.set_mask(random_mask(optimizer.layout), 3.0)
        set_grads(each, 0)
        optimizer.step()
    expected = snapshot(number[0])
    for name, value in snapshot(in_tensor[0]).items():
        assert_same_bits(value, expected[name], name)


def test_memory_layouts_survive_and_gradients_of_other_layouts_are_copied(served):
    plain = every_layout()
    strides = [p.stride() for p in plain.parameters()]
    model, ours = make(REAL[-1])
    assert [p.stride() for p in model.parameters()] == strides
    assert model.last.weight.is_contiguous(memory_format=torch.channels_last)
    other, theirs = torch_twin(REAL[-1], model)
    set_grads(model, 0)
    set_grads(other, 0)
    wrong = model.last.weight.grad.contiguous()
    assert wrong.stride() != model.last.weight.stride()
    model.last.weight.grad = wrong
    kept = wrong.clone()
    ours.step()
    theirs.step()
    assert torch.equal(wrong, kept)
    for (name, got), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)
    for name, param in model.named_parameters():
        assert param.data_ptr() % 64 == 0 or param.numel() == 0, name
        assert ours.state[param]["exp_avg"].stride() == param.stride()


def test_the_model_still_forwards_saves_and_copies():
    model, ours = make(REAL[-1])
    before = twin(model)
    assert torch.equal(model.odd(torch.ones(1, 127)), before.odd(torch.ones(1, 127)))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.conv.weight.zero_()
    assert model.conv.weight.any()
    model.load_state_dict(before.state_dict())
    set_grads(model, 0)
    ours.step()


def tied_model():
    model = nn.Module()
    model.a = nn.Linear(4, 6)
    model.b = nn.Linear(4, 6)
    model.b.weight = model.a.weight
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    rows = np.arange(6)
    names = ("a.weight", "a.bias", "b.weight", "b.bias")
    slices = tuple(Slice(name, 0, rows, "row") for name in names)
    return model, GroupLayout((Gate("g", 6, slices, 0),), (), shapes, names, ())


def test_tied_parameters_are_handled_once(served):
    model, layout = tied_model()
    ours = SGD(model, layout, lr=0.1)
    assert len(ours.flat.params) == 3
    rows = torch.cat([model.a.weight, model.a.bias[:, None], model.b.bias[:, None]], dim=1)
    torch.testing.assert_close(ours.group_norms(), rows.detach().norm(dim=1))
    ours.set_mask([0, 1, 1, 0, 1, 1], threshold=math.inf)
    ours.step()
    assert model.b.weight is model.a.weight
    assert not model.a.weight[[0, 3]].any() and model.a.weight[[1, 2, 4, 5]].all()


def test_frozen_parameters_are_projected_but_never_updated(served):
    model = every_layout()
    model.conv.weight.requires_grad_(False)
    ours = SGD(model, layout_of(model), lr=0.1)
    before = model.conv.weight.detach().clone()
    set_grads(model, 0)
    model.conv.weight.grad = None
    ours.step()
    assert_same_bits(model.conv.weight.detach(), before)
    mask = torch.ones(ours.layout.n_groups)
    mask[2] = 0
    ours.set_mask(mask, threshold=math.inf)
    ours.step()
    assert not model.conv.weight[2].any() and model.conv.weight[3].all()
    assert all(param is not model.conv.weight for param in ours.state)


def test_group_norms_and_n_zero(served):
    model, ours = make(REAL[0])
    layout = ours.layout
    expected = torch.zeros(layout.n_groups, dtype=torch.float64)
    tensors = model.state_dict()
    for gate in layout.gates:
        for part in gate.slices:
            if part.in_group:
                rows = tensors[part.tensor].double().movedim(part.dim, 0)
                for channel, group in enumerate(part.channels):
                    if group >= 0:
                        expected[gate.offset + group] += (rows[channel] ** 2).sum()
    torch.testing.assert_close(ours.group_norms(), expected.sqrt().float())
    # Groups without any parameter are zero already.
    assert int(ours.n_zero()) == 0
    ours.set_mask(torch.zeros(layout.n_groups))
    assert int(ours.n_zero()) == layout.gate("bare").n


def test_set_mask_keeps_strength_and_set_strength_works_in_place(served):
    model, ours = make(REAL[0])
    n = ours.layout.n_groups
    ours.set_mask(torch.zeros(n), 2.0, threshold=torch.full((n,), 0.5))
    tables = ("_mask", "_strength", "_threshold", "_scratch")
    addresses = [getattr(ours, name).data_ptr() for name in tables]
    ours.set_strength(3.0)
    assert (ours._strength == 3.0).all() and (ours._threshold == 0.5).all()
    ours.set_mask(torch.zeros(n, dtype=torch.int64))
    assert not ours._mask.any()
    ours.set_mask(None)
    assert ours.mask.all() and ours._mask.all()
    assert addresses == [getattr(ours, name).data_ptr() for name in tables]  # a captured graph's


def test_a_state_dict_loads_any_number_of_times_even_the_own_live_one(served):
    model, ours = make(REAL[-1])
    for step in range(3):
        set_grads(model, step)
        ours.step()
    before = snapshot(model, ours)
    saved = copy.deepcopy(ours.state_dict())
    for state in (ours.state_dict(), saved, saved, ours.state_dict()):
        ours.load_state_dict(state)
        for name, value in snapshot(model, ours).items():
            assert_same_bits(value, before[name], name)


@pytest.mark.parametrize("back", [False, True])
def test_adams_state_is_not_adamws(back):
    pair = [cls(m := every_layout(), layout_of(m)) for cls in (Adam, AdamW)]
    source, target = reversed(pair) if back else pair
    for param in source.flat.params:
        param.grad = torch.ones_like(param)
    source.step()
    with pytest.raises(ValueError, match="coupled weight decay"):
        target.load_state_dict(source.state_dict())
    assert not any(target._step_counts)


@pytest.mark.parametrize("spoil", [lambda e: e.pop("exp_avg_sq"), lambda e: e.update(exp_avg="x")])
def test_a_spoilt_entry_changes_nothing(spoil):
    model = every_layout()
    ours = AdamW(model, layout_of(model), lr=0.5)
    set_grads(model, 0)
    ours.step()
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0]["lr"] = 0.1
    spoil(next(entry for entry in saved["state"].values() if entry["exp_avg"].numel()))
    with pytest.raises(ValueError, match="state_dict"):
        ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 0.5 and ours._step_counts.max() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_lr_may_be_a_tensor_of_any_floating_dtype(dtype, served):
    results = []
    for lr in (torch.tensor(0.25, dtype=dtype), 0.25):
        model = every_layout()
        ours = AdamW(model, layout_of(model), lr=lr)
        set_grads(model, 0)
        ours.step()
        results.append(model.odd.weight.detach())
    torch.testing.assert_close(*results)
