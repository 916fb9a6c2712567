"""The search for a mask: draws, convergence, what it leaves alone, the published variant."""

import copy

import pytest
import torch
import torch.nn.functional as F

import ato_fast as ato
from ato_fast.controller import LIKELY
from ato_fast.methods.search import Search
from runs import EXAMPLE, HELD, PAPER, STEPS_PER_EPOCH, TRAIN, Net, new_run, train


@pytest.fixture(scope="module")
def layout():
    return ato.trace(Net(), EXAMPLE)


def new_search(layout, **changes):
    torch.manual_seed(0)
    return Search(Net(), layout, ato.Budget(macs=0.5), **changes)


def test_unconverged_controller_drops_nothing(layout):
    assert new_search(layout).draw().all()


def test_draw_drops_what_is_unlikely_but_never_what_a_freeze_would_keep(layout):
    search = new_search(layout)
    logits = torch.linspace(3, -3, 30)
    search.controller.logits = lambda: logits
    keep = search.draw()
    assert torch.equal(keep, (logits >= LIKELY) | search.frozen_mask())
    assert not keep.all()
    # Everything overshot: exactly the frozen mask, at the budget rather than far below it.
    search.controller.logits = lambda: logits - 50
    assert torch.equal(search.draw(), search.frozen_mask())
    assert torch.equal(search.draw(), search.draw())


def test_controller_converges_to_the_budget(layout):
    run = new_run(layout, schedule=ato.Schedule(10, STEPS_PER_EPOCH, freeze=0.6, zero_by=0.8))
    train(run, 24)
    logits = run.controller.logits().detach()
    ratio = layout.macs(logits >= LIKELY) / layout.macs()
    assert abs(ratio - 0.5) < 0.1


def test_one_draw_by_default_and_two_as_published(layout, monkeypatch):
    seen = []
    for fidelity, n_draws in (("default", 1), ("paper", 2)):
        search = new_search(layout, fidelity=fidelity)
        noise = search.controller.noise
        draws, masks = [], []
        monkeypatch.setattr(
            search.controller, "noise", lambda n=noise, d=draws: (d.append(n()), d[-1])[1]
        )
        evaluate, cost = search.gates.value_and_grad, search._cost
        search.gates.value_and_grad = lambda mask, fn, m=masks, e=evaluate: (
            m.append(mask.detach()),
            e(mask, fn),
        )[1]
        search._cost = lambda layout, mask, m=masks, c=cost: (
            m.append(mask.detach()),
            c(layout, mask),
        )[1]
        search.step([HELD], lambda m, b: F.cross_entropy(m(b[0]), b[1]), 1e-3)
        assert len(draws) == n_draws
        seen.append(masks)
    (task, resource), (soft, hard) = seen
    assert torch.equal(task, resource)
    assert set(task.tolist()) <= {0.0, 1.0}
    assert ((soft > 0) & (soft < 1)).any()
    assert set(hard.tolist()) <= {0.0, 1.0}


def test_controller_leaves_the_model_alone(layout):
    run = train(new_run(layout), 10)
    x, y = TRAIN
    F.cross_entropy(run.model(x), y).backward()
    run.model.body[1].eval()
    modes = [m.training for m in run.model.modules()]
    state = copy.deepcopy(run.model.state_dict())
    grads = [p.grad.clone() for p in run.model.parameters()]
    before = [p.detach().clone() for p in run.controller.parameters()]
    random = torch.get_rng_state()
    run.search.step(run.controller_data, run.controller_loss, 1e-3)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in run.model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in run.model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(run.model.parameters(), grads, strict=True))
    assert any(
        not torch.equal(p, b) for p, b in zip(run.controller.parameters(), before, strict=True)
    )


def test_controller_learning_rate_drops(layout):
    schedule = ato.Schedule(10, STEPS_PER_EPOCH, controller_drop=0.4, controller_interval=1)
    run = new_run(layout, schedule=schedule)
    rates = {}
    step = run.search.step
    run.search.step = lambda data, loss, lr: (
        rates.update({run._step - 1: lr}),
        step(data, loss, lr),
    )
    train(run, 20)
    assert rates == {t: 1e-3 if t < 16 else 1e-4 for t in range(4, 20)}


def test_paper_strength_is_shared_out_by_dropped_groups(layout, monkeypatch):
    schedule = ato.Schedule(**{**PAPER.state(), "shrink_every": 0.0})
    run = new_run(layout, fidelity="paper", schedule=schedule)
    calls = {}
    for name in ("set_mask", "set_strength"):
        original = getattr(run.optimizer, name)

        def spy(*args, name=name, original=original, **kwargs):
            calls.setdefault(run._step, (name, args[-1]))
            return original(*args, **kwargs)

        monkeypatch.setattr(run.optimizer, name, spy)
    drop = torch.zeros(30, dtype=torch.bool)
    drop[:2] = drop[8:14] = True
    run.search.draw = lambda: ~drop
    train(run, 48)
    steps = PAPER.steps
    assert (steps.projection_start, steps.strong_start, steps.freeze) == (8, 12, 32)
    weak, strong = calls[8][1], calls[12][1]
    assert weak[0] == pytest.approx(10 * 2 / 8)
    assert weak[8] == pytest.approx(10 * 6 / 8)
    assert (weak[20:] == 0).all()
    torch.testing.assert_close(strong, 100 * weak)
    assert max(calls) == steps.freeze
    assert torch.equal(run.mask, ~drop)


def test_paper_frozen_mask_is_the_last_random_draw(layout):
    run = new_run(layout, fidelity="paper", schedule=PAPER)
    train(run, PAPER.steps.freeze)
    last = run.mask.clone()
    controller = copy.deepcopy(run.controller.state_dict())
    train(run, 1)
    assert run.frozen and torch.equal(run.mask, last)
    assert torch.equal(run.state_dict()["mask"], last)
    assert run.controller.state_dict().keys() == controller.keys()
    draws = {tuple(run.search.draw().tolist()) for _ in range(8)}
    assert len(draws) > 1


def test_paper_counts_multiply_adds_only(layout):
    with pytest.raises(ValueError, match="expected Budget.macs"):
        new_run(layout, fidelity="paper", budget=ato.Budget(params=0.5))
