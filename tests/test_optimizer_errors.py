"""What the optimizers refuse: moved parameters, bad arguments, layouts, masks and states."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from ato_fast import SGD, AdamW, HalfSpace, Prox, backend
from ato_fast.groups import Gate, GroupLayout, Slice
from numerics import assert_same_bits
from samples import (
    VARIANTS,
    Adam,
    every_layout,
    layout_of,
    set_grads,
    snapshot,
)

REAL = [variant for variant in VARIANTS if variant.make is not Adam]


def make(variant, dtype=torch.float32, **more):
    model = every_layout(dtype)
    return model, variant(model, layout_of(model), **more)


def moved(model):
    model.double()


def replaced(model):
    model.conv.weight = nn.Parameter(model.conv.weight.detach().clone())


def assigned(model):
    model.load_state_dict(every_layout(seed=3).state_dict(), assign=True)


def rehomed(model):
    SGD(model, layout_of(model))


@pytest.mark.parametrize("change", [moved, replaced, assigned, rehomed])
def test_parameters_moved_behind_our_back_raise(change):
    model, ours = make(REAL[0])
    set_grads(model, 0)
    change(model)
    with pytest.raises(RuntimeError, match="no longer"):
        ours.step()


def test_sparse_gradients_raise():
    model = nn.Embedding(5, 3, sparse=True)
    shapes = {"weight": (5, 3)}
    ours = SGD(model, GroupLayout((), (), shapes, ("weight",), ()))
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="weight.grad: expected a dense gradient"):
        ours.step()


@pytest.mark.parametrize(
    ("make_one", "arguments", "message"),
    [
        (SGD, {"lr": -1.0}, "lr: expected a finite number >= 0, got -1.0"),
        (SGD, {"lr": math.nan}, "lr: expected a finite number"),
        (SGD, {"lr": "1"}, "lr: expected a finite number >= 0, got '1'"),
        (SGD, {"lr": torch.ones(2)}, "lr: expected a floating tensor with one element"),
        (SGD, {"momentum": -0.1}, "momentum: expected a finite number >= 0"),
        (SGD, {"weight_decay": math.inf}, "weight_decay: expected a finite number"),
        (SGD, {"dampening": None}, "dampening: expected a finite number"),
        (SGD, {"nesterov": True}, "nesterov: expected momentum > 0 and dampening = 0"),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
        (AdamW, {"betas": (0.9, 1.0)}, r"betas\[1\]: expected a finite number >= 0 and < 1"),
        (AdamW, {"betas": 0.9}, "betas: expected two numbers"),
        (AdamW, {"eps": -1e-8}, "eps: expected a finite number >= 0"),
        (AdamW, {"weight_decay": True}, "weight_decay: expected a finite number"),
    ],
)
def test_bad_hyperparameters(make_one, arguments, message):
    model = every_layout()
    with pytest.raises(ValueError, match=message):
        make_one(model, layout_of(model), **arguments)


def test_bad_projections_models_and_layouts():
    model = every_layout()
    layout = layout_of(model)
    for projection in (Prox, "prox", 1):
        with pytest.raises(TypeError, match="projection: expected"):
            SGD(model, layout, projection=projection)
    for eps in (-0.1, 1.0, math.nan, "0"):
        with pytest.raises(ValueError, match="eps: expected a number"):
            HalfSpace(eps)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        SGD([1], layout)
    with pytest.raises(TypeError, match="layout: expected a GroupLayout"):
        SGD(model, None)
    with pytest.raises(ValueError, match="needs parameter 'conv.weight', which this model"):
        SGD(nn.Linear(3, 3), layout)
    other = every_layout()
    other.odd = nn.Linear(127, 130)
    with pytest.raises(ValueError, match=r"odd.weight: expected shape \(129, 127\)"):
        SGD(other, layout)


def test_bad_parameter_groups():
    model = every_layout()
    layout = layout_of(model)
    with pytest.raises(ValueError, match="not a parameter of this model"):
        SGD(model, layout, params=[{"params": [nn.Parameter(torch.ones(3))]}])
    ours = SGD(model, layout)
    with pytest.raises(RuntimeError, match="add_param_group"):
        ours.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    whole = nn.Parameter(torch.ones(6))
    overlapping = nn.ParameterDict({"a": whole, "b": nn.Parameter(whole.data[:3])})
    empty = GroupLayout((), (), {}, (), ())
    with pytest.raises(ValueError, match="overlap in memory"):
        SGD(overlapping, empty)
    with pytest.raises(ValueError, match="expected a dense tensor with data"):
        SGD(nn.Linear(2, 2, device="meta"), empty)


def test_two_gates_may_not_claim_one_entry():
    model = nn.Linear(3, 4)
    shapes = {"weight": (4, 3), "bias": (4,)}
    first = Gate("a", 4, (Slice("weight", 0, np.arange(4), "row"),), 0)
    same = Gate("b", 4, (Slice("weight", 0, np.arange(4), "row"),), 4)
    across = Gate("b", 3, (Slice("weight", 1, np.arange(3), "row"),), 4)
    for gate, message in ((same, "entry 0 belongs to groups 0 and 4"), (across, "dimensions 0 an")):
        with pytest.raises(ValueError, match=message):
            SGD(model, GroupLayout((first, gate), (), shapes, ("weight", "bias"), ()))


def test_bad_masks_and_strengths():
    model, ours = make(REAL[0])
    n = ours.layout.n_groups
    before = ours.mask, ours._strength.clone()
    for mask, message in (
        (torch.ones(n + 1), "mask: expected shape"),
        (torch.full((n,), 0.5), "mask: expected only 0"),
        (torch.full((n,), 2.0), "mask: expected values in"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.set_mask(mask, 1.0)
    for name in ("strength", "threshold"):
        for value in (-1.0, math.nan, torch.ones(n + 1), -torch.ones(n), "1", True):
            with pytest.raises(ValueError, match=f"{name}: expected"):
                ours.set_strength(**{name: value})
            with pytest.raises(ValueError, match=f"{name}: expected"):
                ours.set_mask(torch.zeros(n), **{name: value})
    assert torch.equal(ours.mask, before[0]) and torch.equal(ours._strength, before[1])


def test_bad_state_dicts_change_nothing():
    model, ours = make(REAL[-1])
    set_grads(model, 0)
    ours.step()
    good = copy.deepcopy(ours.state_dict())
    before = snapshot(model, ours)

    def broken(change):
        state = copy.deepcopy(good)
        change(state)
        return state

    cases = [
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "1 parameter group"),
        (lambda s: s["param_groups"][0]["params"].pop(), "group 0: expected"),
        (lambda s: s["state"][2].update(exp_avg=torch.ones(3)), "conv.weight, exp_avg: expected"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad: expected False"),
        (lambda s: s["param_groups"][0].update(maximize=True), "maximize: expected False"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr: expected"),
        (lambda s: s["ato"].update(layout="0" * 64), "another layout"),
        (lambda s: s["ato"].update(mask=torch.ones(3)), "state_dict: mask: expected shape"),
        (lambda s: s["ato"].update(strength=-1.0), "state_dict: strength: expected"),
        (lambda s: s["ato"].pop("threshold"), "'ato' entry lacks threshold"),
        (lambda s: s["param_groups"][0].pop("eps"), "param_groups lack eps"),
        (lambda s: s["param_groups"][0].update(decoupled_weight_decay=False), "got Adam's"),
        (lambda s: s.pop("state"), "'state' is missing"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(broken(change))
        for name, value in snapshot(model, ours).items():
            assert_same_bits(value, before[name], name)


def test_copies_and_pickles_are_refused():
    _, optimizer = make(REAL[-1])
    for function in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="AdamW cannot be copied or pickled"):
            function(optimizer)


def test_a_model_without_parameters_steps():
    empty = nn.ReLU()
    layout = GroupLayout((), (), {}, (), ())
    with pytest.raises(ValueError, match="empty parameter list"):
        SGD(empty, layout)
    model = nn.Module()
    model.p = nn.Parameter(torch.empty(0))
    SGD(model, GroupLayout((), (), {"p": (0,)}, ("p",), ())).step()


def test_a_wrapped_model_is_refused_as_trace_refuses_it():
    model = every_layout()
    with pytest.raises(TypeError, match="wrapped in OptimizedModule; pass model._orig_mod"):
        SGD(torch.compile(model, backend="eager"), layout_of(model))


def test_param_groups_cannot_come_or_go():
    model = every_layout()
    odd = [model.odd.weight, model.odd.bias]
    rest = [p for p in model.parameters() if all(p is not q for q in odd)]
    optimizer = AdamW(model, layout_of(model), params=[{"params": odd}, {"params": rest}])
    del optimizer.param_groups[0]
    before = model.odd.weight.detach().clone()
    with pytest.raises(RuntimeError, match="param_groups: expected the 2 groups"):
        optimizer.step()
    assert torch.equal(model.odd.weight, before)


def test_an_unknown_backend_is_refused_when_the_optimizer_is_made(monkeypatch):
    model = every_layout()
    monkeypatch.setenv(backend.VARIABLE, "tirton")
    with pytest.raises(backend.BackendError, match="got 'tirton'"):
        AdamW(model, layout_of(model))


@pytest.mark.parametrize("value", [1e39, -1.0, float("nan")])
def test_a_bad_threshold_leaves_strength_and_mask_alone(value):
    model = every_layout()
    layout = layout_of(model)
    optimizer = AdamW(model, layout)
    with pytest.raises(ValueError, match="threshold: expected"):
        optimizer.set_mask(torch.zeros(layout.n_groups), 2.0, threshold=value)
    assert optimizer.mask.all() and not optimizer._strength.any()
