"""The whole run: phases, exact zeros, resume, and every way it refuses to go on."""

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ato_fast as ato
import ato_fast.methods.pull as pull_module
from ato_fast.methods.search import GAMMA
from runs import (
    ADAMW,
    EXAMPLE,
    HELD,
    PAPER,
    SCHEDULE,
    SGD,
    TRAIN,
    WHOLE,
    Net,
    new_run,
    train,
)


@pytest.fixture(scope="module")
def layout():
    return ato.trace(Net(), EXAMPLE)


def dropped_norms(run):
    return run.optimizer.group_norms()[~run.mask]


def test_phases_happen_at_the_stated_steps(layout, monkeypatch):
    run = new_run(layout, schedule=WHOLE)
    steps = WHOLE.steps
    assert (steps.controller_start, steps.projection_start, steps.freeze, steps.zero_by) == (
        4, 8, 20, 28,
    )  # fmt: skip
    events = []
    set_mask, search_step = run.optimizer.set_mask, run.search.step
    monkeypatch.setattr(
        run.optimizer,
        "set_mask",
        lambda *a, **k: (events.append(("mask", run._step)), set_mask(*a, **k))[1],
    )
    monkeypatch.setattr(
        run.search,
        "step",
        lambda *a: (events.append(("controller", run._step - 1)), search_step(*a))[1],
    )
    phases = []
    for _ in range(40):
        phases.append(run.phase)
        assert run.frozen == (run._step > steps.freeze)
        train(run, 1)
    expected = ["warmup"] * 4 + ["search"] * 4 + ["project"] * 12 + ["zeroing"] * 8
    assert phases == expected + ["finetune"] * 12
    controller = [step for kind, step in events if kind == "controller"]
    expected = [step for step in range(40) for _ in range(SCHEDULE.controller_due(step))]
    assert controller == expected
    assert (controller[0], controller[-1], len(controller)) == (4, 19, 60)
    # One mask per epoch of projection, the frozen one, and its last strength.
    assert [step for kind, step in events if kind == "mask"] == [8, 12, 16, 20, 28]
    assert run.epoch == 10
    assert [entry["phase"] for entry in run.history] == phases[3::4]


def test_before_the_search_it_is_ordinary_training(layout):
    run = train(new_run(layout), SCHEDULE.steps.controller_start)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for step in range(SCHEDULE.steps.controller_start):
        torch.manual_seed(step)
        x, y = (part[12 * step : 12 * (step + 1)] for part in TRAIN)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert run.mask.all()
    assert run.history[0]["controller_steps"] == 0


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("projection", [ato.Prox(), ato.HalfSpace()], ids=["prox", "halfspace"])
def test_exact_zero_from_the_end_of_the_ramp(layout, optimizer, projection):
    run = new_run(layout, schedule=WHOLE, optimizer=partial(optimizer, projection=projection))
    train(run, WHOLE.steps.zero_by)
    assert (~run.mask).sum() > 0
    mask = run.mask.clone()
    assert run.phase == "finetune"
    train(run, 1)
    for _ in range(11):
        assert run.optimizer.n_zero() == (~mask).sum()
        assert (dropped_norms(run) == 0).all()
        train(run, 1)
    assert torch.equal(run.mask, mask)
    assert (run.optimizer.group_norms()[mask] > 0).all()


def test_exact_zero_also_between_two_looks_at_the_norms(layout, monkeypatch):
    monkeypatch.setattr(pull_module, "REFRESHES", 3)
    run = train(new_run(layout, schedule=WHOLE), WHOLE.steps.freeze)
    looks = []
    norms = run.optimizer.group_norms
    monkeypatch.setattr(run.optimizer, "group_norms", lambda: (looks.append(run._step), norms())[1])
    train(run, WHOLE.steps.zero_by - WHOLE.steps.freeze + 1)
    assert sorted(set(looks)) == [20, 22, 24, 26, 27, 28]
    assert (norms()[~run.mask] == 0).all()


def test_the_ramp_is_gradual(layout):
    run = train(new_run(layout, schedule=WHOLE), WHOLE.steps.freeze)
    train(run, 1)
    norms = [dropped_norms(run).sum().item()]
    for _ in range(WHOLE.steps.zero_by - WHOLE.steps.freeze - 1):
        train(run, 1)
        norms.append(dropped_norms(run).sum().item())
    # Eight equal steps would be 1/8 of the start each; gradients push back and forth a little.
    assert norms[-1] < 0.02 * norms[0]
    drops = -np.diff(norms) / norms[0]
    assert (drops > 0.05).all() and (drops < 0.25).all()


def test_pull_before_the_freeze_is_gentle(layout):
    """A group dropped all the way loses about `pull` of its norm, on top of what training does."""
    run = new_run(layout)
    drop = torch.zeros(30, dtype=torch.bool)
    drop[::3] = True
    run.search.draw = lambda: ~drop
    train(run, SCHEDULE.steps.projection_start)
    before = run.optimizer.group_norms()[drop]
    train(run, SCHEDULE.steps.freeze - SCHEDULE.steps.projection_start)
    lost = 1 - run.optimizer.group_norms()[drop] / before
    free = new_run(layout, schedule=ato.Schedule(**{**SCHEDULE.state(), "pull": 0.0}))
    train(free, SCHEDULE.steps.freeze)
    without = 1 - free.optimizer.group_norms()[drop] / before
    assert 0.2 < (lost - without).median() < 0.6


def test_frozen_mask_meets_the_budget_and_never_changes(layout):
    for budget in (ato.Budget(macs=0.5), ato.Budget(params=0.4), ato.Budget(macs=12_000)):
        run = train(new_run(layout, budget=budget), 21)
        assert run.frozen
        frozen = run.mask.clone()
        assert torch.equal(frozen, run.search.frozen_mask())
        assert budget.cost(layout, frozen) <= budget.target(layout)
        train(run, 19)
        assert torch.equal(run.mask, frozen)


def test_min_channels(layout):
    run = new_run(layout, min_channels=5, budget=ato.Budget(macs=0.45))
    train(run, 40)
    assert all(run.mask[gate.span].sum() >= 5 for gate in layout.gates)
    assert all(min(entry["kept"]) >= 5 for entry in run.history)


def test_history(layout):
    run = train(new_run(layout), 40)
    assert [entry["epoch"] for entry in run.history] == list(range(1, 11))
    for entry in run.history:
        assert len(entry["kept"]) == 3
    last = run.history[-1]
    assert last["kept"] == [int(run.mask[gate.span].sum()) for gate in layout.gates]
    assert (last["macs"], last["params"]) == (layout.macs(run.mask), layout.params(run.mask))
    searched = run.history[2]
    assert searched["controller_steps"] == 15
    assert searched["controller_objective"] == pytest.approx(
        searched["controller_task_loss"] + GAMMA * searched["controller_resource_loss"], rel=1e-5
    )
    assert json.dumps(run.history)


def loader():
    """Shuffled controller data without a generator of its own."""
    return DataLoader(TensorDataset(*HELD), batch_size=5, shuffle=True)


@pytest.mark.parametrize("k", [2, 5, 10, 19, 20, 23, 30])
@pytest.mark.parametrize("fidelity", ["default", "paper"])
def test_resume_is_bit_exact(layout, tmp_path, k, fidelity):
    schedule = SCHEDULE if fidelity == "default" else PAPER
    optimizer = SGD if k % 2 else ADAMW
    arguments = {"fidelity": fidelity, "schedule": schedule, "optimizer": optimizer}
    whole = train(new_run(layout, controller_data=loader(), **arguments), 2 * k)

    first = train(new_run(layout, controller_data=loader(), **arguments), k)
    torch.save({"model": first.model.state_dict(), "run": first.state_dict()}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    second = new_run(layout, model_seed=99, seed=0, controller_data=loader(), **arguments)
    second.load_state_dict(state["run"])
    second.model.load_state_dict(state["model"])
    assert second._step == k
    train(second, k)

    assert torch.equal(second.mask, whole.mask)
    assert (second.frozen, second.phase) == (whole.frozen, whole.phase)
    assert second.history == whole.history
    for (name, ours), theirs in zip(
        second.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(
        second.controller.parameters(), whole.controller.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_state_is_a_copy(layout):
    run = train(new_run(layout), 22)
    state = run.state_dict()
    kept = copy.deepcopy(state)
    train(run, 6)

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    assert same(state, kept)


def test_seconds_carry_over(layout):
    run = train(new_run(layout), 24)
    before = run.seconds
    assert before["controller"] > 0 and before["projection"] > 0
    resumed = new_run(layout)
    resumed.load_state_dict(run.state_dict())
    assert resumed.seconds == before
    x, y = (part[:12] for part in TRAIN)
    F.cross_entropy(resumed.model(x), y).backward()
    resumed.step()
    assert resumed.seconds["projection"] > before["projection"]


def test_state_of_another_run_is_refused(layout):
    state = train(new_run(layout), 3).state_dict()
    with pytest.raises(ValueError, match=r"its schedule\.\w+ is"):
        new_run(layout, schedule=PAPER).load_state_dict(state)
    with pytest.raises(ValueError, match="its fidelity is default, this run's is paper"):
        new_run(layout, fidelity="paper").load_state_dict(state)
    for name, value, words in (
        ("budget", ato.Budget(macs=0.4), r"its budget is \['macs', 0.5\]"),
        ("seed", 5, "its seed is 0, this run's is 5"),
        ("min_channels", 2, "its min_channels is 1, this run's is 2"),
        ("optimizer", ADAMW, "its optimizer is SGD, this run's is AdamW"),
    ):
        with pytest.raises(ValueError, match=words):
            new_run(layout, **{name: value}).load_state_dict(state)
    for nothing in ({}, None, "state"):
        with pytest.raises(ValueError, match="state: expected an ATO run's, of version 2"):
            new_run(layout).load_state_dict(nothing)
    other = ato.trace(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.rand(2, 4),)
    )
    with pytest.raises(ValueError, match="it belongs to another layout"):
        state_of_other = {**state, "layout": other.sha256}
        new_run(layout).load_state_dict(state_of_other)


def test_equal_seeds_equal_runs_and_other_seeds_differ(layout):
    first, second = (train(new_run(layout, seed=3), 30) for _ in range(2))
    assert torch.equal(first.mask, second.mask)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = train(new_run(layout, seed=4), 30)
    assert not torch.equal(first.controller.heads, other.controller.heads)


def test_budget_is_checked_before_the_optimizer_exists(layout):
    def never(model, layout):
        raise AssertionError("the optimizer was built")

    with pytest.raises(ValueError, match="out of reach.*floor is"):
        new_run(layout, optimizer=never, budget=ato.Budget(macs=0.001))
    with pytest.raises(ValueError, match="fidelity: expected one of"):
        new_run(layout, optimizer=never, fidelity="exact")


def test_controller_data_is_asked_for_at_the_first_step(layout):
    run = new_run(layout, controller_data=None)
    with pytest.raises(ValueError, match="controller_data: None.*ato.hold_out"):
        run.step()
    run.controller_data = [HELD]
    train(run, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_controller_loss_is_named(layout, value):
    run = new_run(layout, controller_loss=lambda model, batch: model(batch[0]).sum() * value)
    with pytest.raises(FloatingPointError, match="controller step: the task loss is (nan|-?inf)"):
        train(run, 5)
    assert run.model.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controller_loss": "x"}, "controller_loss: expected a function .* got 'x'"),
        ({"controller_data": 3}, "controller_data: expected an iterable of batches, got 3"),
    ],
)
def test_wrong_controller_arguments_are_named_at_once(layout, changes, message):
    with pytest.raises(TypeError, match=message):
        new_run(layout, **changes)


def test_models_without_parameters_and_scalers_that_are_none(layout):
    with pytest.raises(ValueError, match="model: Sequential has no parameters"):
        ato.ATO(torch.nn.Sequential(), (HELD[0],), optimizer=ato.SGD, budget=ato.Budget(macs=0.5),
                schedule=SCHEDULE)  # fmt: skip
    with pytest.raises(TypeError, match="scaler: expected a torch.amp.GradScaler, got int"):
        new_run(layout).step(3)


def test_controller_loss_must_be_a_scalar(layout):
    run = new_run(layout, controller_loss=lambda model, batch: model(batch[0]))
    with pytest.raises(RuntimeError, match=r"controller_loss.*expected a scalar.*\(12, 3\)"):
        train(run, 5)


def test_bad_parameters_are_named_at_the_end_of_the_epoch(layout):
    run = train(new_run(layout), 2)
    with torch.no_grad():
        run.model.body[4].bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="is not finite after epoch 1"):
        train(run, 2)
    fresh = new_run(layout)
    with torch.no_grad():
        fresh.model.body[4].bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="parameter body.4.bias is not finite"):
        fresh.check_finite()


def test_a_scaled_loss_trains_alike_and_bad_gradients_skip_the_step(layout):
    plain, scaled = new_run(layout), new_run(layout)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = TRAIN
    for step in range(3):
        torch.manual_seed(step)
        F.cross_entropy(plain.model(x), y).backward()
        plain.step()
        plain.zero_grad()
        torch.manual_seed(step)
        scaler.scale(F.cross_entropy(scaled.model(x), y)).backward()
        scaled.step(scaler)
        scaler.update()
        scaled.zero_grad()
    for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    before = [p.detach().clone() for p in scaled.model.parameters()]
    scaled.optimizer.set_mask(torch.arange(layout.n_groups) % 2 == 0, threshold=math.inf)
    (scaler.scale(F.cross_entropy(scaled.model(x), y)) * math.inf).backward()
    scaled.step(scaler)
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": torch.optim.AdamW}, r"optimizer: expected a callable \(model, layout\)"),
        ({"optimizer": partial(torch.optim.AdamW, lr=1e-3)}, "expected a callable"),
        ({"optimizer": torch.optim.SGD(Net().parameters())}, "optimizer: expected a callable"),
        ({"optimizer": lambda m, _: torch.optim.SGD(m.parameters())}, "that projects groups"),
        ({"budget": 0.5}, "budget: expected an ato.Budget, got 0.5"),
        ({"schedule": 10}, "schedule: expected an ato.Schedule, got 10"),
    ],
)
def test_arguments_of_the_wrong_kind(layout, changes, words):
    with pytest.raises(TypeError, match=words):
        new_run(layout, **changes)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (HELD[0], r"a torch.float32 tensor of shape \(24, 2, 6, 6\)"),
        ((HELD[0], HELD[1] + 9), "tuple of a torch.float32 tensor.*out of bounds"),
        ({"x": 1}, "dict with 'x'"),
    ],
)
def test_a_batch_the_loss_cannot_take_is_described(layout, batch, words):
    run = new_run(layout, controller_data=[batch])
    with pytest.raises(RuntimeError, match=f"controller_loss failed on a batch of .*{words}"):
        train(run, 12)
