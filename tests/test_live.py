"""A run whose network gets smaller while it trains."""

import copy
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_two_ranks
from torch.optim.swa_utils import AveragedModel

import ato_fast as ato
import ato_fast.methods.live as live_module
import ato_fast.stopwatch as stopwatch
from ato_fast.methods.live import stage_mask
from runs import ADAMW, EXAMPLE, HELD, PAPER, SCHEDULE, SGD, TRAIN, Net, accuracy, new_run, train

# Groups are cut before the freeze too: in stages from step 8 on.
EARLY = ato.Schedule(**{**SCHEDULE.state(), "shrink_start": 0.2, "shrink_every": 0.1})


@pytest.fixture(scope="module")
def layout():
    return ato.trace(Net(), EXAMPLE)


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_when_the_network_is_cut():
    steps = SCHEDULE.steps
    assert (steps.shrink_start, steps.freeze, steps.zero_by, steps.end) == (20, 20, 28, 40)
    assert SCHEDULE.cuts == (20, 22, 24, 26, 28, 30, 32, 34, 36, 38)
    assert EARLY.cuts == (12, 16, 20, 24, 28, 32, 36)
    assert ato.Schedule(**{**SCHEDULE.state(), "shrink_every": 0.0}).cuts == ()
    assert [EARLY.deadline(step) for step in (8, 11, 12, 27, 28, 39)] == [12, 12, 16, 28, 28, 28]
    # The last stage ends at zero_by however long a stage is.
    assert 28 in ato.Schedule(**{**SCHEDULE.state(), "shrink_every": 0.5}).cuts
    for start in (0.1, 0.6):
        with pytest.raises(ValueError, match="shrink_start: expected from projection_start to fre"):
            ato.Schedule(10, 4, shrink_start=start)
    with pytest.raises(ValueError, match="shrink_every: expected a fraction"):
        ato.Schedule(10, 4, shrink_every=-0.1)


@pytest.mark.parametrize("schedule", [SCHEDULE, EARLY], ids=["from the freeze", "before it"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["SGD", "AdamW"])
def test_the_network_gets_smaller_while_it_trains(layout, schedule, optimizer):
    run = new_run(layout, schedule=schedule, optimizer=optimizer)
    model, held = run.model, run.optimizer
    parameters = list(model.parameters())
    sizes = [n_parameters(model)]
    for step in range(schedule.steps.zero_by + 1):
        train(run, 1)
        sizes.append(n_parameters(model))
        if sizes[-1] < sizes[-2]:
            assert step in schedule.cuts
    assert run.model is model and run.optimizer is held
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    # Nothing that the frozen mask drops is left, and all that it keeps is.
    assert torch.equal(run.live.alive, run.mask) and not run.mask.all()
    assert sizes[-1] == layout.params(run.mask) == run.live.layout.params()
    assert len(set(sizes)) >= 4
    assert [cut["params"] for cut in run.cuts] == sorted(set(sizes), reverse=True)[1:]
    assert layout.macs(run.mask) <= run.budget.target(layout)
    before = [p.detach().clone() for p in parameters]
    train(run, 40 - run._step)
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    result = run.finish(accuracy)
    assert n_parameters(result.model) == sizes[-1]
    assert result.report["equality_rel_err"] <= 1e-5
    assert result.report["n_unfinished"] == 0
    assert result.report["small"]["params"] == sizes[-1]
    assert json.loads(json.dumps(result.report))["cuts"] == result.report["cuts"]


def test_the_small_network_is_saved_as_a_cut_of_the_dense_one(layout, tmp_path):
    result = train(new_run(layout, schedule=EARLY), 40).finish()
    ato.save(result.model, tmp_path)
    loaded = ato.load(tmp_path, Net)
    assert torch.equal(loaded.eval()(HELD[0]), result.model.eval()(HELD[0]))


def test_what_is_gone_stays_gone_and_the_budget_is_met(layout):
    run = train(new_run(layout, schedule=EARLY), 17)
    gone = ~run.live.alive
    assert gone.any() and not run.frozen
    assert run.search.kept_logits().shape == (30,)
    assert torch.equal(run.search.kept_logits() == -math.inf, gone)
    with torch.no_grad():
        # The controller changes its mind completely.
        run.controller.heads.neg_()
        run.controller.heads[gone] *= 100
    assert not run.search.draw()[gone].any()
    train(run, 4)
    assert run.frozen and not run.mask[gone].any()
    assert layout.macs(run.mask) <= run.budget.target(layout)
    assert run.live.alive[run.mask].all()


def test_the_controller_sees_the_network_as_it_is(layout):
    """With its removed groups pinned to 0 it computes what it did when they were still there."""
    run = train(new_run(layout, schedule=EARLY), 17)
    whole = copy.deepcopy(new_run(layout).model)
    alive = run.live.alive
    whole_layout = ato.trace(whole, EXAMPLE)
    kept = whole_layout.kept_indices(alive)
    ato.zero_(whole, whole_layout, alive)
    tensors = dict(run.live.network.state_dict())
    for name, tensor in whole.state_dict().items():
        target = tensor
        index = [torch.arange(n) for n in tensor.shape]
        for (other, dim), rows in kept.items():
            if other == name:
                index[dim] = torch.from_numpy(rows)
        if tensor.dim():
            target[torch.meshgrid(*index, indexing="ij")] = tensors[name]
    mask = torch.rand(30, generator=torch.Generator().manual_seed(0)) * alive
    expected = ato.gates.Gates(whole, whole_layout)(mask, lambda model: model(HELD[0]))
    actual = run.search.gates(mask[alive], lambda model: model(HELD[0]))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("round_to", [1, 2, 4])
def test_every_network_on_the_way_has_allowed_widths(layout, round_to):
    run = new_run(layout, schedule=EARLY, round_to=round_to)
    for _ in range(40):
        train(run, 1)
        for gate, now in zip(run.layout.gates, run.live.layout.gates, strict=True):
            assert now.n in run.layout.widths(gate)
    assert run.cuts and run.live.layout.macs() == run.layout.macs(run.mask)


def test_stages_are_nested_and_end_in_the_final_mask(layout):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1))
    final = ato.Budget(macs=0.4).freeze(layout, logits)
    before = torch.ones(30, dtype=torch.bool)
    for progress in (0.0, 0.2, 0.5, 0.9, 1.0):
        mask = stage_mask(layout, final, logits, progress)
        assert mask[final].all() and before[mask].all()
        before = mask
        if progress == 0:
            assert mask.all()
    assert torch.equal(mask, final)
    half = stage_mask(layout, final, logits, 0.5)
    for gate in layout.gates:
        n, least = gate.n, int(final[gate.span].sum())
        assert int(half[gate.span].sum()) == math.ceil((n + least) / 2)
        kept, gone = logits[gate.span][half[gate.span]], logits[gate.span][~half[gate.span]]
        assert gone.numel() == 0 or kept.min() > gone.max()


@pytest.mark.parametrize("k", [17, 18, 22, 29])
def test_resume_is_bit_exact_after_cuts(layout, k):
    arguments = {"schedule": EARLY, "optimizer": SGD if k % 2 else ADAMW}
    whole = train(new_run(layout, **arguments), 40)
    first = train(new_run(layout, **arguments), k)
    assert not first.live.alive.all()
    model, state = copy.deepcopy(first.model.state_dict()), first.state_dict()
    second = new_run(layout, model_seed=99, **arguments)
    second.load_state_dict(state)
    second.model.load_state_dict(model)
    train(second, 40 - k)
    assert torch.equal(second.mask, whole.mask) and second.history == whole.history
    assert second.cuts == whole.cuts
    for (name, ours), theirs in zip(
        second.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_state_is_not_loaded_into_a_run_that_lost_more(layout):
    early = train(new_run(layout, schedule=EARLY), 10).state_dict()
    later = train(new_run(layout, schedule=EARLY), 30)
    with pytest.raises(ValueError, match="groups that were cut out of this run already"):
        later.load_state_dict(early)


def test_averages_are_cut_along(layout):
    run = new_run(layout, schedule=EARLY)
    average = AveragedModel(run.model)
    run.live.ema.append(average)
    for _ in range(40):
        train(run, 1)
        average.update_parameters(run.model)
    assert n_parameters(average.module) == n_parameters(run.model) == layout.params(run.mask)
    average.module.eval()(HELD[0])
    average = AveragedModel(Net())
    given = new_run(layout, schedule=EARLY, ema=average)
    train(given, 40)
    assert n_parameters(average.module) == layout.params(given.mask)


def test_accuracy_before_and_after_every_cut_is_in_the_report(layout):
    seen = []

    def evaluate(model):
        seen.append(n_parameters(model))
        assert model is run.model
        return accuracy(model)

    run = new_run(layout, schedule=EARLY, evaluate=evaluate)
    train(run, 29)
    assert run.model.training and run.cuts
    smaller = [cut for cut in run.cuts if cut["groups"]]
    for cut in smaller:
        assert 0 <= cut["accuracy_before"] <= 1 and 0 <= cut["accuracy_after"] <= 1
        assert cut["step"] in EARLY.cuts and cut["epoch"] == cut["step"] / 4
        assert cut["equality_rel_err"] <= 1e-5
    assert sorted(set(seen), reverse=True)[-1] == smaller[-1]["params"]
    assert run.seconds["evaluate"] > 0 and run.seconds["cutting"] > 0
    without = train(new_run(layout, schedule=EARLY), 29)
    assert all(cut["accuracy_before"] is None for cut in without.cuts)


def test_groups_that_are_late_are_set_to_zero_and_counted(layout):
    run = train(new_run(layout), 21)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += 0.01
    due = int((run._pull.due & ~run.mask).sum())
    train(run, 2)
    last = run.cuts[-1]
    assert last["step"] == 22 and last["n_unfinished"] == last["groups"] == due > 0
    # What is set to zero is small beside the groups that stay.
    assert 0 < last["unfinished_norm"] < 0.5 * run.optimizer.group_norms().median()


def test_published_fidelity_cuts_from_the_freeze_on(layout):
    strong = ato.Schedule(**{**PAPER.state(), "strengths": (1e4, 1e6)})
    run = new_run(layout, fidelity="paper", schedule=strong)
    train(run, strong.steps.freeze)
    assert run.live.alive.all() and not run.cuts
    train(run, 1)
    assert not run.live.alive.all()
    assert torch.equal(run.live.alive, run.mask)
    train(run, 48 - run._step)
    assert run.finish().report["small"]["params"] == layout.params(run.mask)


def test_a_difference_stops_the_cut(layout, monkeypatch):
    run = train(new_run(layout), 22)
    before = n_parameters(run.model)

    def broken(model, layout, mask):
        small = ato.shrink(model, layout, mask)
        with torch.no_grad():
            small.fc.bias += 1
        return small

    monkeypatch.setattr(live_module, "shrink", broken)
    with pytest.raises(RuntimeError, match="differs from the one with them by .* nothing was cut"):
        train(run, 1)
    assert n_parameters(run.model) == before == run.live.layout.params()


def test_a_wrapper_learns_of_the_cuts(layout, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(Net())
        run = ato.ATO(
            wrapped, EXAMPLE, optimizer=SGD, budget=ato.Budget(macs=0.5), schedule=EARLY,
            controller_data=[HELD],
        )  # fmt: skip
        train(run, 40)
        assert run.model is wrapped
        result = run.finish()
        assert n_parameters(result.model) == n_parameters(wrapped) < layout.params()
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_agree_on_masks_and_weights_or_fail_loudly():
    run_on_two_ranks("ddp_run.py")


def test_a_compiled_model_is_cut_and_goes_on(layout):
    torch.manual_seed(0)
    compiled = torch.compile(Net(), backend="eager")
    run = ato.ATO(
        compiled, EXAMPLE, optimizer=SGD, budget=ato.Budget(macs=0.5), schedule=SCHEDULE,
        controller_data=[HELD],
    )  # fmt: skip
    train(run, 32)
    assert run.model is compiled and n_parameters(compiled) == layout.params(run.mask)


def test_a_scheduler_made_before_goes_on(layout):
    run = new_run(layout, schedule=EARLY, optimizer=partial(ato.SGD, lr=0.1, momentum=0.9))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, T_max=40)
    for i in range(40):
        x, y = (part[12 * (i % 4) : 12 * (i % 4 + 1)] for part in TRAIN)
        F.cross_entropy(run.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.step()
        scheduler.step()
        run.zero_grad()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert run.finish().report["budget"]["met"]


def test_a_latency_budget_is_measured_at_the_freeze_and_resumes(layout, monkeypatch):
    # A clock on which a network takes 1 us per parameter.
    monkeypatch.setattr(stopwatch, "sample_ms", lambda net, *_: n_parameters(net) / 1000)
    monkeypatch.setattr(stopwatch, "SECONDS", 0.1)
    monkeypatch.setattr(stopwatch, "COMPARE_SECONDS", 0.1)
    budget = ato.Budget(latency=0.5, example=EXAMPLE)
    run = new_run(layout, budget=budget, schedule=EARLY)
    train(run, 21)
    assert run.frozen
    again = new_run(layout, budget=ato.Budget(latency=0.5, example=EXAMPLE), schedule=EARLY)
    state = run.state_dict()
    again.load_state_dict(state)
    again.model.load_state_dict(run.model.state_dict())
    train(run, 19)
    train(again, 19)
    for one in (run, again):
        report = one.finish().report["budget"]
        assert report["kind"] == "latency"
        assert report["achieved"] == report["measured"]["measured_ms"] <= report["target"]
        assert report["met"] and report["achieved"] > 0.9 * report["target"]
    assert torch.equal(run.mask, again.mask)
