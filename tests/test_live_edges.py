"""Cuts in the middle of training where something unusual is going on."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from cuts import SGD, loss_of, plain, step
from torch import nn

import ato_fast as ato
from nets import random_mask
from runs import ADAMW, EXAMPLE, HELD, SCHEDULE, TRAIN, Net, accuracy, new_run, train

EARLY = ato.Schedule(**{**SCHEDULE.state(), "shrink_start": 0.2, "shrink_every": 0.1})


@pytest.fixture(scope="module")
def layout():
    return ato.trace(Net(), EXAMPLE)


class Remembers(Net):
    """Keeps its last features, with their graph."""

    def forward(self, x):
        self.features = self.body(x)
        return self.fc(self.features.mean((2, 3)))


class Holds:
    """Something that cannot be copied."""

    def __init__(self):
        self.lock, self.calls = threading.Lock(), 0

    def hook(self, module, inputs, output):
        self.calls += 1


def test_a_model_that_keeps_activations_and_hooks_that_hold_anything():
    torch.manual_seed(0)
    model = Remembers()
    holds = Holds()
    model.body.register_forward_hook(holds.hook)
    run = ato.ATO(
        model, EXAMPLE, optimizer=ADAMW, budget=ato.Budget(macs=0.5), schedule=SCHEDULE,
        controller_data=[HELD],
    )  # fmt: skip
    train(run, 40)
    assert run.cuts and holds.calls >= 40
    run.finish()


def test_a_run_stopped_in_the_middle_of_a_cut_is_resumed(layout):
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return accuracy(model)

    run = new_run(layout, schedule=EARLY, evaluate=evaluate)
    with pytest.raises(KeyboardInterrupt):
        train(run, 40)
    assert not run.live.alive.all()
    assert sum(cut["groups"] for cut in run.cuts) == int((~run.live.alive).sum())
    assert run.cuts[-1]["accuracy_after"] is None
    again = new_run(layout, schedule=EARLY)
    again.load_state_dict(run.state_dict())
    again.model.load_state_dict(run.model.state_dict())
    train(again, 40 - again._step)
    assert again.finish().report["budget"]["met"]
    run.evaluate = None
    run.zero_grad()
    train(run, 40 - run._step)
    assert torch.equal(run.mask, again.mask)


def test_accuracy_is_asked_for_only_where_something_is_cut(layout):
    calls = []
    run = new_run(layout, schedule=EARLY, evaluate=lambda m: (calls.append(1), accuracy(m))[1])
    train(run, 40)
    assert len(calls) == 2 * len(run.cuts) < 2 * len(EARLY.cuts)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_cut_inside_autocast(layout, dtype):
    model, x = plain()
    layout = ato.trace(model, (x[:2],))
    mask = random_mask(layout)
    optimizer = SGD(model, layout)
    with torch.autocast("cpu", dtype):
        loss_of(model, x).backward()
        before = model.eval()(x)
        ato.zero_(model, layout, mask)
        zeroed = model(x)
        assert not torch.equal(before, zeroed)
        ato.shrink_(model, layout, mask, optimizer=optimizer)
        assert (model(x) - zeroed).abs().max() <= 3e-2 * zeroed.abs().max()


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapper", "in place"])
def test_a_compiled_model_stays_compiled_however_often_it_is_cut(in_place):
    model, x = plain()
    layout = ato.trace(model, (x[:2],))
    optimizer = SGD(model, layout)
    compilations = []

    def backend(graph, inputs):
        compilations.append(1)
        return graph

    called = model if in_place else torch.compile(model, backend=backend)
    if in_place:
        model.compile(backend=backend)
    for _ in range(layout.gates[1].n - 2):
        n = len(compilations)
        step(called, optimizer, x)
        assert len(compilations) > n
        mask = torch.ones(layout.n_groups, dtype=torch.bool)
        mask[layout.gates[1].offset] = False
        ato.zero_(model, layout, mask)
        layout = ato.shrink_(called, layout, mask, optimizer=optimizer)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"evaluate": 0.5},
            TypeError,
            "evaluate: expected a function that gets the model, got 0.5",
        ),
        ({"ema": 3}, TypeError, "ema: expected a torch.nn.Module or a list of them, got int"),
        ({"ema": ["model"]}, TypeError, "ema: expected torch.nn.Modules, got a str"),
        ({"ema": nn.Linear(2, 2)}, ValueError, "ema: layout: not this model's"),
    ],
)
def test_what_would_fail_at_the_first_cut_fails_at_once(layout, changes, error, words):
    with pytest.raises(error, match=words):
        new_run(layout, **changes)


@pytest.mark.parametrize("value", ["0.1", None, True, math.nan])
def test_schedules_of_the_wrong_kind(value):
    with pytest.raises(ValueError, match="shrink_every: expected a fraction of the run"):
        ato.Schedule(10, 4, shrink_every=value)


def test_a_state_with_other_parameter_groups_cuts_nothing(layout):
    state = train(new_run(layout), 30).state_dict()
    other = new_run(
        layout,
        optimizer=lambda model, layout: ato.SGD(
            model, layout, lr=0.05, momentum=0.9,
            params=[{"params": model.body.parameters()}, {"params": model.fc.parameters()}],
        ),
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected 2 parameter group"):
        other.load_state_dict(state)
    assert other.live.alive.all()


def test_a_scaler_that_skips_the_step_before_a_cut(layout):
    run = train(new_run(layout), 21)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = (part[:12] for part in TRAIN)
    due = int((run._pull.due & ~run.mask).sum())
    (scaler.scale(F.cross_entropy(run.model(x), y)) * math.inf).backward()
    run.step(scaler)
    scaler.update()
    run.zero_grad()
    assert not run.cuts
    train(run, 1)
    (cut,) = run.cuts
    assert cut["step"] == 22 and cut["n_unfinished"] == cut["groups"] == due > 0


def refused(model, error, match, layout, mask, **arguments):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        ato.shrink_(model, layout, mask, **arguments)
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor), name


class TestNothingIsHalfCut:
    @pytest.fixture
    def made(self):
        model, x = plain()
        layout = ato.trace(model, (x[:2],))
        mask = random_mask(layout)
        ato.zero_(model, layout, mask)
        return model, x, layout, mask

    def test_the_optimizer_of_a_twin(self, made):
        model, _, layout, mask = made
        twins = SGD(copy.deepcopy(model), layout)
        refused(model, ValueError, "another model's parameters", layout, mask, optimizer=twins)
        assert twins.layout is layout

    def test_arguments_in_the_wrong_order(self, made):
        model, _, layout, mask = made
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got GroupLayout"):
            ato.shrink_(layout, model, mask)

    def test_the_same_average_twice(self, made):
        model, _, layout, mask = made
        average = copy.deepcopy(model)
        ato.shrink_(model, layout, mask, ema=[average, average])
        sizes = [[p.shape for p in m.parameters()] for m in (model, average)]
        assert sizes[0] == sizes[1]

    def test_a_sparse_gradient(self, made):
        model, _, layout, mask = made
        weight = model.head.weight
        weight.grad = torch.zeros_like(weight).to_sparse()
        refused(model, ValueError, "head.weight.grad: expected a dense gradient", layout, mask)

    def test_lbfgs(self, made):
        model, x, layout, mask = made
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        optimizer.step(closure)
        ato.zero_(model, layout, mask)
        refused(model, ValueError, "LBFGS cannot be cut", layout, mask, optimizer=optimizer)
