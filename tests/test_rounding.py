"""round_to and min_channels: every chosen width is allowed, and the budget is still met."""

import itertools
import time

import numpy as np
import pytest
import torch

import ato_fast as ato
from ato_fast.budget import Budget, floor
from ato_fast.methods.search import Search
from ato_fast.train.models import build
from nets import chain_layout
from runs import EXAMPLE, PAPER, Net, new_run, train


def widths_of(layout, mask):
    return [int(mask[gate.span].sum()) for gate in layout.gates]


def assert_allowed(layout, mask):
    for gate, width in zip(layout.gates, widths_of(layout, mask), strict=True):
        assert width == gate.n or (
            width % layout.round_to == 0 and width >= min(layout.min_channels, gate.n)
        )
        assert width in layout.widths(gate)


def cost_of(widths, unit):
    """Cost of `chain_layout(..., (64, 16, 16, 4))` at these widths, by hand."""
    channels, sizes = [3, *widths, 5], (64, 16, 16, 4)
    return sum(
        9 * a * b * (sizes[min(i, 3)] if unit == "macs" else 1)
        for i, (a, b) in enumerate(itertools.pairwise(channels))
    )


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("round_to", [1, 2, 4, 8, 16])
def test_near_the_target_wherever_some_widths_are(unit, round_to):
    """Against all combinations of widths: what is reachable to 0.5 % is reached, never exceeded."""
    rng = np.random.default_rng(round_to)
    n_reachable = 0
    for trial in range(40):
        widths = tuple(int(n) for n in rng.integers(3, 12 * round_to + 3, 3))
        layout = chain_layout(widths, (64, 16, 16, 4)).tightened(int(rng.integers(1, 6)), round_to)
        budget = Budget(**{unit: float(rng.uniform(0.2, 0.95))})
        target = budget.target(layout)
        costs = [
            cost_of(combination, unit)
            for combination in itertools.product(*(layout.widths(g) for g in layout.gates))
        ]
        assert floor(layout, unit) == min(costs)
        if min(costs) > target:
            with pytest.raises(ValueError, match=f"the floor is {min(costs)} {unit}"):
                budget.check(layout)
            with pytest.raises(ValueError, match=f"the floor is {min(costs)} {unit}"):
                budget.freeze(layout, torch.zeros(layout.n_groups))
            continue
        logits = torch.randn(layout.n_groups, generator=torch.Generator().manual_seed(trial))
        mask = budget.freeze(layout, logits)
        assert_allowed(layout, mask)
        assert budget.cost(layout, mask) == cost_of(widths_of(layout, mask), unit) <= target
        if round_to == 1:
            continue
        if max(cost for cost in costs if cost <= target) >= 0.995 * target:
            n_reachable += 1
            assert budget.cost(layout, mask) >= 0.995 * target
    assert n_reachable >= 10 or round_to == 1


@pytest.mark.parametrize("round_to", [2, 3, 8])
def test_every_gate_keeps_its_best_channels(round_to):
    layout = chain_layout((30, 20, 10), (64, 16, 16, 4)).tightened(round_to=round_to)
    logits = torch.randn(60, generator=torch.Generator().manual_seed(round_to))
    mask = Budget(macs=0.5).freeze(layout, logits)
    for gate in layout.gates:
        kept, scores = mask[gate.span], logits[gate.span]
        assert kept.all() or scores[kept].min() > scores[~kept].max()


@pytest.mark.parametrize("infinite", [False, True])
def test_ties_and_infinite_logits(infinite):
    """Half of the channels must stay and half go, if the budget lets them."""
    logits = torch.where(torch.arange(60) % 2 == 0, 1.0, -1.0) * (float("inf") if infinite else 1)
    layout = chain_layout((30, 20, 10), (64, 16, 16, 4)).tightened(round_to=4)
    with np.errstate(all="raise"):
        masks = [Budget(params=0.4).freeze(layout, logits) for _ in range(2)]
    assert torch.equal(*masks)
    assert_allowed(layout, masks[0])


@pytest.mark.parametrize(
    ("name", "size", "scope", "round_to"),
    [("resnet20", 32, "all", 4), ("resnet56", 32, "inner", 8), ("resnet50", 224, "inner", 32)],
)
def test_real_networks_quickly_and_near(name, size, scope, round_to):
    model = build(name, 10, 3, (size, size))
    layout = ato.trace(model, (torch.zeros(2, 3, size, size),), scope=scope, round_to=round_to)
    generator = torch.Generator().manual_seed(0)
    for budget in (Budget(macs=0.5), Budget(params=0.4), Budget(macs=0.7)):
        start = time.perf_counter()
        mask = budget.freeze(layout, torch.randn(layout.n_groups, generator=generator))
        assert time.perf_counter() - start < 2
        assert_allowed(layout, mask)
        target = budget.target(layout)
        assert 0.995 * target <= budget.cost(layout, mask) <= target


def test_a_run_ends_at_allowed_widths():
    layout = ato.trace(Net(), EXAMPLE)
    budget = Budget(macs=0.6)
    run = train(new_run(layout, min_channels=3, round_to=4, budget=budget), 40)
    assert (run.layout.min_channels, run.layout.round_to) == (3, 4)
    assert_allowed(run.layout, run.mask)
    result = run.finish()
    assert result.report["budget"]["met"]
    sizes = [m.out_channels for m in result.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sizes == widths_of(run.layout, run.mask)


def test_the_layouts_own_widths_hold_too():
    layout = ato.trace(Net(), EXAMPLE, round_to=4)
    run = new_run(layout, round_to=2, min_channels=5, budget=Budget(macs=0.9))
    assert (run.layout.min_channels, run.layout.round_to) == (5, 4)


def test_unreachable_with_this_rounding_fails_before_training():
    layout = ato.trace(Net(), EXAMPLE)
    new_run(layout, budget=Budget(macs=0.3))
    with pytest.raises(ValueError, match="in multiples of 8 the floor is"):
        new_run(layout, budget=Budget(macs=0.3), round_to=8)


def test_a_run_of_another_rounding_is_not_continued():
    layout = ato.trace(Net(), EXAMPLE)
    state = train(new_run(layout), 3).state_dict()
    with pytest.raises(ValueError, match="its round_to is 1, this run's is 2"):
        new_run(layout, round_to=2).load_state_dict(state)


def test_published_draws_take_the_nearest_width():
    layout = ato.trace(Net(), EXAMPLE, round_to=4)
    search = Search(Net(), layout, Budget(macs=0.5), fidelity="paper")
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(30, dtype=torch.bool)
    mask[:5] = True
    mask[8:14] = True
    result = search._to_width(mask, logits)
    assert widths_of(layout, result) == [4, 8, 4]
    worst = logits[:5].argmin()
    assert torch.equal(
        result[:8].nonzero().flatten(), mask.index_fill(0, worst, False)[:8].nonzero().flatten()
    )
    assert result[8:14].all()
    assert torch.equal(
        torch.sort(logits[20:].topk(4).indices).values, result[20:].nonzero().flatten()
    )
    run = train(new_run(layout, fidelity="paper", schedule=PAPER), PAPER.steps.freeze + 1)
    assert_allowed(run.layout, run.mask)
