"""Latency budgets: targets, floors, the measured freeze, states. The clock is a fake but once."""

import copy
import json

import numpy as np
import pytest
import torch
from timed import (
    FIXED_MS,
    X,
    chain,
    conv_ms,
    fake_clock,
    first,
    layout_of,
    prepared,
    random_logits,
    random_table,
)

import ato_fast as ato
from ato_fast import measured, stopwatch
from ato_fast.budget import Budget
from ato_fast.latency import LatencyTable
from ato_fast.train.recipe import Recipe
from ato_fast.train.settings import Settings, fingerprint
from nets import chain_layout
from runs import EXAMPLE, Net, new_run, one_thread, train


@pytest.fixture(autouse=True)
def single():
    with one_thread():
        yield


@pytest.fixture
def clock(monkeypatch):
    return fake_clock(monkeypatch)


@pytest.mark.parametrize(
    "arguments",
    [
        {"latency": 1.0},
        {"latency": 2},
        {"latency": 0},
        {"latency": True},
        {"latency": "fast"},
        {"latency": float("nan")},
        {"latency_ms": 0.0},
        {"latency_ms": -1},
        {"latency_ms": float("inf")},
        {"latency_ms": True},
        {"latency": 0.5, "latency_ms": 3.0},
        {"latency": 0.5, "macs": 0.5},
        {"macs": 0.5, "example": X},
        {"params": 0.5, "table": "table.json"},
        {"latency": 0.5, "example": X[0]},
    ],
    ids=str,
)
def test_bad_budget(arguments):
    with pytest.raises(ValueError, match="Budget"):
        Budget(**arguments)


def test_a_gate_at_one_width_only(clock):
    """Nothing can be saved at a gate that is smaller than the rounding."""
    model = chain(3, 24, 4, 3)
    layout = layout_of((24, 4, 3)).tightened(round_to=8)
    budget, _ = prepared(model, layout, latency=0.8)
    table = budget.table_of(layout)
    assert table.widths[1] == (4,) and table.saved[1] == (0.0,)
    mask = budget.freeze(layout, random_logits(layout))
    assert mask[layout.gates[1].span].all() and budget.cost(layout, mask) <= budget.target(layout)


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_the_frozen_mask_meets_the_estimate(round_to):
    """Allowed widths, never above the target, pinned groups out, and no width is left that fits."""
    rng = np.random.default_rng(round_to)
    n_frozen = 0
    for seed in range(30):
        layout = chain_layout(tuple(rng.integers(20, 60, 3).tolist())).tightened(round_to=round_to)
        budget = Budget(latency=float(rng.uniform(0.3, 0.9)), table=random_table(layout, seed))
        budget.load_state({"table": random_table(layout, seed).state(), "verified": None}, layout)
        logits = rng.standard_normal(layout.n_groups)
        logits[rng.random(layout.n_groups) < 0.3] = -np.inf
        target = budget.target(layout)
        try:
            mask = budget.freeze(layout, logits)
        except ValueError as error:
            assert "out of reach" in str(error)
            continue
        n_frozen += 1
        assert torch.equal(mask, budget.freeze(layout, logits))
        assert (logits[mask] > -np.inf).all() and budget.cost(layout, mask) <= target
        kept = [int(mask[gate.span].sum()) for gate in layout.gates]
        for i, gate in enumerate(layout.gates):
            n_left = int((logits[gate.span] > -np.inf).sum())
            assert kept[i] in layout.widths(gate)
            wider = [w for w in layout.widths(gate) if kept[i] < w <= n_left]
            if wider:
                more = first(layout, *kept[:i], wider[0], *kept[i + 1 :])
                assert budget.cost(layout, more) > target
    assert n_frozen >= 10


def test_targets_and_floors(clock):
    model = chain(3, 40, 60, 8)
    dense = conv_ms(model)
    budget, layout = prepared(model)
    assert (budget.kind, budget.value, budget.unit) == ("latency", 0.6, "ms")
    assert budget.cost(layout) == dense and budget.target(layout) == 0.6 * dense
    budget.check(layout)
    table = budget.table_of(layout)
    least = FIXED_MS + (3 * 9 + 9 + 9) / 1e3
    assert table.dense_ms * table.ratio[-1] == pytest.approx(least)
    absolute, _ = prepared(model, layout, latency=None, latency_ms=least - 0.1)
    assert absolute.kind == "latency_ms" and absolute.target(layout) == least - 0.1
    with pytest.raises(
        ValueError, match=rf"latency_ms=.* is out of reach.*the floor is {least:.4g} ms \(2.*% of"
    ):
        absolute.check(layout)
    with pytest.raises(ValueError, match="out of reach"):
        absolute.freeze(layout, torch.zeros(layout.n_groups))
    slow, _ = prepared(model, layout, latency=None, latency_ms=2 * dense)
    with pytest.raises(ValueError, match="not below the dense network's .*nothing to prune"):
        slow.check(layout)


def test_nothing_works_before_it_was_measured():
    layout = chain_layout()
    budget = Budget(latency=0.5)
    for call in (budget.check, budget.cost, budget.target, budget.state, budget.table_of):
        with pytest.raises(RuntimeError, match="call budget.prepare"):
            call(layout)
    with pytest.raises(ValueError, match="example: expected inputs, got None"):
        budget.prepare(Net(), layout)
    counted = Budget(macs=0.5)
    counted.prepare(None, layout)
    mask = torch.ones(26, dtype=torch.bool)
    assert counted.state(layout) is None and counted.report(layout, mask) is None
    assert counted.achieved(layout, mask) == layout.macs()
    assert torch.equal(*(counted.freeze(layout, torch.arange(26), measured=m) for m in (0, 1)))


def test_measured_once_per_layout_device_and_example(clock):
    model = chain(3, 20, 30, 8)
    budget, layout = prepared(model)
    table = budget.table_of(layout)
    clock(None)
    budget.prepare(model, layout)
    again = ato.trace(model, X)
    budget.prepare(model, again)
    assert budget.table_of(again) is table
    unbound = Budget(latency=0.5)
    clock(conv_ms)
    unbound.prepare(model, layout, X)
    unbound.prepare(model, layout, (torch.zeros(4, 3, 6, 6),))
    assert unbound.table_of(layout).example == ("4x3x6x6 float32",)


def test_the_freeze_is_corrected_by_measurement(clock):
    """A clock by which small networks save less than the estimate says."""
    model = chain(3, 80, 120, 100, 8)
    budget, layout = prepared(model, latency=0.5)
    dense = conv_ms(model)

    def slower(network, *_):
        return dense * (conv_ms(network) / dense) ** 0.7

    clock(slower)
    logits = random_logits(layout)
    estimated = budget.freeze(layout, logits)
    assert slower(ato.shrink(model, layout, estimated)) > 1.1 * budget.target(layout)
    mask = budget.freeze(layout, logits, measured=True)
    took = slower(ato.shrink(model, layout, mask))
    assert (1 - measured.NEAR) * budget.target(layout) <= took <= budget.target(layout)
    assert budget.achieved(layout, mask) == pytest.approx(took)
    assert budget.achieved(layout, estimated) == budget.cost(layout, estimated)
    report = budget.report(layout, mask)
    assert json.loads(json.dumps(report)) == report
    assert report["met"] and report["measured_ms"] == pytest.approx(took)
    assert 2 <= len(report["rounds"]) <= measured.MOST_ROUNDS
    assert report["rounds"][0]["measured_ms"] > report["target_ms"] == budget.target(layout)
    assert "met" not in budget.report(layout, estimated)


def test_an_estimate_on_the_slow_side_is_corrected_too(clock):
    model = chain(3, 80, 120, 100, 8)
    budget, layout = prepared(model, latency=0.6)
    dense = conv_ms(model)
    clock(lambda network, *_: dense * (conv_ms(network) / dense) ** 1.5)
    mask = budget.freeze(layout, random_logits(layout), measured=True)
    report = budget.report(layout, mask)
    assert report["rounds"][0]["measured_ms"] < 0.9 * report["target_ms"]
    assert (1 - measured.NEAR) * report["target_ms"] <= report["measured_ms"]
    assert report["met"]


def test_a_target_that_no_mask_meets_is_said(clock):
    model = chain(3, 80, 120, 100, 8)
    budget, layout = prepared(model, latency=0.5)
    clock(lambda network, *_: 10 + conv_ms(network) / 1e3)
    with pytest.warns(UserWarning, match="no mask of 4 measured was at or below"):
        mask = budget.freeze(layout, random_logits(layout), measured=True)
    report = budget.report(layout, mask)
    assert not report["met"] and len(report["rounds"]) == measured.MOST_ROUNDS
    assert report["measured_ms"] == min(r["measured_ms"] for r in report["rounds"])


def test_the_freeze_measures_the_dense_network_after_the_model_was_cut(clock):
    model = chain(3, 40, 60, 8)
    budget, layout = prepared(model)
    dense = conv_ms(model)
    cut = first(layout, 30, 50, 8)
    optimizer = ato.SGD(model, layout, lr=0.1)
    ato.zero_(model, layout, cut)
    ato.shrink_(model, layout, cut, optimizer)
    logits = random_logits(layout).masked_fill(~cut, -torch.inf)
    mask = budget.freeze(layout, logits, measured=True)
    report = budget.report(layout, mask)
    assert report["rounds"][0]["dense_now_ms"] == dense and report["met"]
    assert not mask[~cut].any()


def test_a_continued_run_goes_on_with_the_same_numbers(clock):
    model = chain(3, 40, 60, 8)
    budget, layout = prepared(model)
    logits = random_logits(layout)
    mask = budget.freeze(layout, logits, measured=True)
    state = copy.deepcopy(budget.state(layout))
    soft = random_logits(layout, 1).sigmoid()
    expected = budget.cost(layout, soft), budget.target(layout), budget.report(layout, mask)
    noise = np.random.default_rng(0)
    clock(lambda network, *_: conv_ms(network) * noise.lognormal(0, 0.1))
    late, _ = prepared(model, layout)
    assert late.cost(layout, soft) != expected[0]
    early = Budget(latency=0.6, example=X)
    for other in (early, late):
        other.load_state(state, layout)
        clock(None)
        other.prepare(model, layout)
        got = other.cost(layout, soft), other.target(layout), other.report(layout, mask)
        assert got == expected
        assert torch.equal(other.freeze(layout, logits), budget.freeze(layout, logits))
    with pytest.raises(ValueError, match="state: not that of a budget with macs="):
        Budget(macs=0.5).load_state(state, layout)
    with pytest.raises(ValueError, match="state: not that of a budget with latency="):
        early.load_state(None, layout)
    with pytest.raises(ValueError, match="state: expected what"):
        early.load_state({}, layout)
    with pytest.raises(ValueError, match="another layout"):
        early.load_state(state, chain_layout())


def test_a_table_serves_coarser_widths_but_not_finer_ones(clock):
    model = chain(3, 40, 60, 8)
    fine = layout_of((40, 60, 8))
    coarse = fine.tightened(round_to=8)
    budget, _ = prepared(model, fine)
    table = budget.table_of(fine)
    assert budget.table_of(coarse) is table
    other, _ = prepared(model, coarse)
    with pytest.raises(RuntimeError, match="nothing was measured for this layout"):
        other.check(fine)
    with pytest.raises(ValueError, match="a larger min_channels or round_to than the layout's 1 "):
        prepared(model, fine, table=other.table_of(coarse))
    other.prepare(model, fine)
    assert other.table_of(fine) == LatencyTable(
        **{**vars(table), "seconds": other.table_of(fine).seconds}
    )


def test_unbound_state_of_another_device_is_refused_when_the_model_comes(clock):
    model = chain(3, 20, 30, 8)
    budget, layout = prepared(model)
    state = budget.state(layout)
    state["table"]["device"] = "NVIDIA H100"
    other = Budget(latency=0.6, example=X)
    other.load_state(state, layout)
    with pytest.raises(ValueError, match="device 'NVIDIA H100', this is"):
        other.prepare(model, layout)


def test_a_run_with_a_latency_budget(clock):
    layout = ato.trace(Net(), EXAMPLE)
    budget = Budget(latency=0.7)
    budget.prepare(Net(), layout, EXAMPLE)
    run = train(new_run(layout, budget=budget), 40)
    result = run.finish()
    assert result.report["budget"]["met"]
    assert conv_ms(result.model) < conv_ms(Net())


def test_real_clock_half_the_channels_are_faster(monkeypatch):
    """Half of all widths is a quarter of the work, so well below the dense network's time."""
    monkeypatch.setattr(stopwatch, "SECONDS", 1.0)
    monkeypatch.setattr(stopwatch, "COMPARE_SECONDS", 0.3)
    model = chain(3, 128, 128, 128, 128)
    x = (torch.randn(2, 3, 20, 20),)
    layout = ato.trace(model, x)
    budget = Budget(latency=0.6, example=x)
    budget.prepare(model, layout)
    budget.check(layout)
    half = first(layout, 64, 64, 64, 64)
    _, ratio = budget._measured.entry(layout).stopwatch.compare(half)
    assert ratio < 0.75 and budget.cost(layout, half) < 0.75 * budget.cost(layout)
    mask = budget.freeze(layout, random_logits(layout), measured=True)
    report = budget.report(layout, mask)
    assert report["measured_ms"] < 0.75 * report["dense_ms"]
    assert ato.shrink(model, layout, mask)(*x).shape == (2, 3)


def test_what_a_checkpoint_says_of_the_budget():
    """Plain data; a count's looks as it did before there were latencies."""
    for budget, expected in (
        (Budget(macs=0.5), {"macs": 0.5, "params": None}),
        (Budget(latency=0.6, example=X), {"macs": None, "params": None, "latency": 0.6}),
        (Budget(latency_ms=3), {"macs": None, "params": None, "latency_ms": 3}),
    ):
        settings = Settings(data="digits", model="resnet20", budget=budget)
        recipe = Recipe(epochs=1, batch_size=8, optimizer="sgd", lr=0.1, weight_decay=0.0)
        said = json.loads(json.dumps(fingerprint(settings, recipe)))
        assert said["budget"] == expected
