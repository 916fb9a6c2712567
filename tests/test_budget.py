"""Budgets: arguments, floors, and the deterministic mask that meets them."""

import itertools
import time

import numpy as np
import pytest
import torch
import torchvision

from ato_fast.budget import Budget, paper_ratio
from ato_fast.groups import Gate, GroupLayout, Slice
from ato_fast.trace import trace
from ato_fast.train.models import build
from nets import chain_layout


@pytest.fixture(scope="module")
def resnets():
    """Layouts by name and scope, traced once."""
    x = torch.randn(2, 3, 32, 32)
    return {
        (name, scope): trace(build(name, 10, 3, (32, 32)), (x,), scope=scope)
        for name in ("resnet20", "resnet56")
        for scope in ("inner", "all")
    }


@pytest.fixture(scope="module")
def resnet50():
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    model = model.to_empty(device="cpu")
    return trace(model, (torch.zeros(2, 3, 224, 224),))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"macs": 0.5, "params": 0.5},
        {"macs": 0.0},
        {"macs": 1.0},
        {"macs": 1},
        {"macs": -3},
        {"params": True},
        {"macs": float("nan")},
        {"macs": 2e9},
        {"macs": "half"},
    ],
    ids=str,
)
def test_bad_budget(arguments):
    with pytest.raises(ValueError, match="Budget"):
        Budget(**arguments)


def test_target():
    layout = chain_layout()
    assert Budget(macs=0.5).target(layout) == layout.macs() // 2
    assert Budget(params=0.25).target(layout) == layout.params() // 4
    assert Budget(params=700).target(layout) == 700
    assert (Budget(macs=0.5).kind, Budget(params=700).kind) == ("macs", "params")


def test_check_names_the_floor():
    layout = chain_layout()
    mask = torch.zeros(layout.n_groups, dtype=torch.bool)
    for gate in layout.gates:
        mask[gate.offset : gate.offset + 2] = True
    floor = layout.macs(mask)
    layout = layout.tightened(min_channels=2)
    with pytest.raises(ValueError, match=rf"out of reach; with 2 channel.*floor is {floor} macs"):
        Budget(macs=floor - 1).check(layout)
    Budget(macs=floor).check(layout)
    assert Budget(macs=floor).freeze(layout, torch.zeros(26)).sum() == 6


def test_check_refuses_a_budget_above_the_dense_network():
    layout = chain_layout()
    with pytest.raises(ValueError, match="nothing to prune"):
        Budget(macs=layout.macs()).check(layout)
    with pytest.raises(ValueError, match="no gate"):
        empty = GroupLayout((), (), layout.shapes, layout.parameters, layout.mac_terms)
        Budget(macs=0.5).check(empty)


def logits_like(kind, layout, generator):
    n = layout.n_groups
    if kind == "normal":
        return torch.randn(n, generator=generator)
    if kind == "saturated":
        return torch.randn(n, generator=generator).sign() * 20
    if kind == "equal":
        return torch.zeros(n)
    if kind == "one gate last":
        logits = torch.randn(n, generator=generator)
        logits[
            layout.gates[int(torch.randint(len(layout.gates), (), generator=generator))].span
        ] = -9
        return logits
    return torch.linspace(-1, 1, n)


@pytest.mark.parametrize("kind", ["normal", "saturated", "equal", "one gate last", "sorted"])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_never_above_the_target_and_no_gate_empty(kind, unit):
    generator = torch.Generator().manual_seed(hash((kind, unit)) % 1000)
    for trial in range(40):
        widths = torch.randint(1, 20, (4,), generator=generator).tolist()
        min_channels = 1 + trial % 3
        layout = chain_layout(tuple(widths), (64, 16, 16, 4)).tightened(min_channels)
        dense = getattr(layout, unit)()
        budget = Budget(**{unit: 0.2 + 0.7 * trial / 40})
        try:
            budget.check(layout)
        except ValueError as error:
            assert "floor" in str(error)
            continue
        mask = budget.freeze(layout, logits_like(kind, layout, generator))
        cost, target = getattr(layout, unit)(mask), budget.target(layout)
        assert cost <= target < dense
        for gate in layout.gates:
            assert mask[gate.span].sum() >= min(min_channels, gate.n)
        # As near as single channels allow: adding any one more group exceeds the target.
        for group in torch.nonzero(~mask).flatten().tolist():
            more = mask.clone()
            more[group] = True
            assert getattr(layout, unit)(more) > target


def test_matches_a_brute_force_walk():
    generator = torch.Generator().manual_seed(5)
    layout = chain_layout()
    for share in (0.3, 0.5, 0.8):
        budget = Budget(macs=share)
        logits = torch.randn(layout.n_groups, generator=generator)
        expected = torch.zeros(layout.n_groups, dtype=torch.bool)
        for gate in layout.gates:
            expected[gate.offset + int(logits[gate.span].argmax())] = True
        order = [g for g in logits.argsort(descending=True).tolist() if not expected[g]]
        for group in order:
            expected[group] = True
            if layout.macs(expected) > budget.target(layout):
                expected[group] = False
        assert torch.equal(budget.freeze(layout, logits), expected)


def test_keeps_the_highest_logits_up_to_one_threshold():
    """Without the fill-in, the mask is `logit + offset >= 0` for some offset."""
    layout = chain_layout((30, 30, 30), (4, 4, 4))
    logits = torch.randn(90, generator=torch.Generator().manual_seed(1))
    mask = Budget(macs=0.5).freeze(layout, logits)
    threshold = logits[~mask].max()
    above = logits > threshold
    assert mask[above].all()
    assert layout.macs(mask) - layout.macs(above) <= 2 * 30 * 9 * 4 * 3


def test_ties_go_to_the_lower_index_and_repeats_agree():
    layout = chain_layout((10, 10), (4, 4))
    budget = Budget(params=0.5)
    mask = budget.freeze(layout, torch.zeros(20))
    first = mask[:10].to(torch.int8)
    assert (first.diff() <= 0).all()
    logits = torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(0)).float()
    repeats = [budget.freeze(layout, logits) for _ in range(3)]
    assert all(torch.equal(repeats[0], other) for other in repeats)
    assert torch.equal(repeats[0], budget.freeze(layout, logits.numpy().astype(np.float64)))


def test_bad_logits():
    layout = chain_layout()
    with pytest.raises(ValueError, match=r"logits: expected shape \(26,\)"):
        Budget(macs=0.5).freeze(layout, torch.zeros(25))
    logits = torch.zeros(26)
    logits[3] = float("nan")
    with pytest.raises(ValueError, match="1 of 26 are NaN"):
        Budget(macs=0.5).freeze(layout, logits)


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("pinned_frac", [0.0, 0.2])
def test_within_half_a_percent(resnets, name, scope, pinned_frac):
    layout = resnets[name, scope]
    generator = torch.Generator().manual_seed(0)
    for share in (0.4, 0.5, 0.7):
        for unit in ("macs", "params"):
            budget = Budget(**{unit: share})
            for _ in range(5):
                logits = torch.randn(layout.n_groups, generator=generator)
                pinned = torch.rand(layout.n_groups, generator=generator) < pinned_frac
                mask = budget.freeze(layout, logits.masked_fill(pinned, -torch.inf))
                assert not mask[pinned].any()
                cost = budget.cost(layout, mask)
                if mask[~pinned].all():
                    continue
                assert 0.995 * budget.target(layout) <= cost <= budget.target(layout)


def test_resnet50_is_quick_and_near(resnet50):
    assert resnet50.n_groups >= 7552
    logits = torch.randn(resnet50.n_groups, generator=torch.Generator().manual_seed(0))
    for budget in (Budget(macs=0.45), Budget(params=0.4), Budget(macs=1_500_000_000)):
        start = time.perf_counter()
        mask = budget.freeze(resnet50, logits)
        assert time.perf_counter() - start < 2
        cost = budget.cost(resnet50, mask)
        assert 0.999 * budget.target(resnet50) <= cost <= budget.target(resnet50)


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_pinned_groups_stay_out(unit, round_to):
    """A logit of -inf: never kept; what the other groups can reach of the target is reached."""
    rng = np.random.default_rng(round_to)
    n_met = 0
    for _ in range(60):
        widths = tuple(int(n) for n in rng.integers(30, 70, 3))
        layout = chain_layout(widths, (64, 16, 16, 4)).tightened(int(rng.integers(1, 6)), round_to)
        logits = rng.standard_normal(layout.n_groups)
        logits[rng.random(layout.n_groups) < rng.uniform(0, 0.8)] = -np.inf
        logits[rng.random(layout.n_groups) < 0.1] = np.inf
        free = np.isfinite(logits) | (logits > 0)
        choices = [
            [w for w in layout.widths(gate) if w <= free[gate.span].sum()] for gate in layout.gates
        ]
        budget = Budget(**{unit: float(rng.uniform(0.05, 0.9))})
        target = budget.target(layout)
        if not all(choices):
            short = next(
                g.name for g, widths in zip(layout.gates, choices, strict=True) if not widths
            )
            with pytest.raises(ValueError, match=rf"logits: gate {short} must keep at least"):
                budget.freeze(layout, logits)
            continue
        if budget.cost(layout, first(layout, [c[0] for c in choices])) > target:
            with pytest.raises(ValueError, match="out of reach"):
                budget.freeze(layout, logits)
            continue
        mask = budget.freeze(layout, logits)
        assert free[mask].all()
        kept = [int(mask[gate.span].sum()) for gate in layout.gates]
        assert all(n in widths for n, widths in zip(kept, choices, strict=True))
        cost = budget.cost(layout, mask)
        assert cost <= target
        costs = (budget.cost(layout, first(layout, c)) for c in itertools.product(*choices))
        widest = budget.cost(layout, first(layout, [c[-1] for c in choices]))
        if widest <= target:
            assert cost == widest
        elif round_to == 1:
            n_met += 1
            waiting = (torch.from_numpy(free) & ~mask).nonzero().flatten()
            grown = [mask.index_fill(0, group, True) for group in waiting]
            assert all(budget.cost(layout, other) > target for other in grown)
        elif any(0.995 * target <= c <= target for c in costs):
            n_met += 1
            assert cost >= 0.995 * target
    assert n_met >= 5


def first(layout, widths):
    """Mask of the first so many groups of every gate."""
    mask = torch.zeros(layout.n_groups, dtype=torch.bool)
    for gate, width in zip(layout.gates, widths, strict=True):
        mask[gate.offset : gate.offset + width] = True
    return mask


def test_pinned_groups_that_are_the_cheap_ones():
    """Groups of one gate differ in cost; the cheap ones alone would reach the target."""
    layout = uneven_layout()
    budget = Budget(params=140)
    assert budget.freeze(layout, torch.arange(8.0)).sum() >= 1
    pinned = torch.arange(8.0)
    pinned[:4] = -torch.inf
    with pytest.raises(ValueError, match="140 is out of reach of the groups with a logit above"):
        budget.freeze(layout, pinned)


def uneven_layout():
    """One gate of 8 channels, of which a second consumer reads the last 4."""
    rows = Slice("a.weight", 0, np.arange(8), "row", gated=True)
    columns = Slice("b.weight", 1, np.arange(8), "input")
    more = Slice("c.weight", 1, np.arange(8)[4:], "input")
    return GroupLayout(
        gates=(Gate("a", 8, (rows, columns, more), 0),),
        unprunable=(),
        shapes={"a.weight": (8, 3), "b.weight": (100, 8), "c.weight": (100, 4)},
        parameters=("a.weight", "b.weight", "c.weight"),
        mac_terms=(),
    )


def test_published_conversion():
    total, gated = 4.12283e9, 3.63588e9
    assert paper_ratio(0.288, total, gated) == pytest.approx(0.193, abs=5e-4)
    assert paper_ratio(1.0, total, gated) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="out of reach; the part outside the gates alone is 11.8%"):
        paper_ratio(0.1, total, gated)
