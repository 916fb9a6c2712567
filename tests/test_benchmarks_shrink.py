"""The suites ``shrink`` and ``end2end``: masks, checks, and that a run is what is integrated."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import ato_fast as ato
import runs
from ato_fast import backend
from benchmarks import end2end, integral, run, shrinking, timing, training
from benchmarks.contenders import Red

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    with runs.one_thread():
        yield


@pytest.fixture(autouse=True)
def own_backend_variable(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "auto")


@pytest.fixture(scope="module")
def tiny():
    return training.Setting("tiny", CPU)


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("choose", shrinking.MASKS.values(), ids=shrinking.MASKS)
def test_the_masks_meet_the_budget_at_allowed_widths(tiny, choose, round_to):
    layout = tiny.layout("inner", round_to)
    mask = choose(layout)
    assert layout.macs(mask) <= training.MACS * layout.macs()
    for gate in layout.gates:
        assert int(mask[gate.span].sum()) in layout.widths(gate)


def test_the_uniform_mask_is_the_largest_and_takes_the_same_share_of_every_gate(tiny):
    layout = tiny.layout("inner", 1)
    mask = training.uniform_mask(layout)
    shares = [float(mask[gate.span].float().mean()) for gate in layout.gates]
    least = min(gate.n for gate in layout.gates)
    assert max(shares) - min(shares) < 1 / least
    wider = mask.clone()
    for gate in layout.gates:
        wider[gate.offset : gate.offset + int(mask[gate.span].sum()) + 1] = True
    assert layout.macs(wider) > training.MACS * layout.macs()
    with pytest.raises(ValueError, match="out of reach"):
        training.uniform_mask(tiny.layout("inner", 16))


def test_drawn_logits_differ_between_gates_and_are_the_same_every_time(tiny):
    layout = tiny.layout("inner", 1)
    logits = training.drawn_logits(layout)
    assert torch.equal(logits, training.drawn_logits(layout))
    kept = training.shares_of(layout, training.drawn_mask(layout))
    assert kept["least_kept_frac"] < kept["most_kept_frac"] and kept["macs_frac"] <= training.MACS


@pytest.mark.parametrize("fault", ["other weights", "nothing cut"])
def test_a_cut_that_is_wrong_is_red(tiny, monkeypatch, fault):
    layout = tiny.layout("inner", 1)

    def wrong(model, *_, **__):
        if fault == "other weights":
            model.head.weight.data.mul_(1.01)

    monkeypatch.setattr(ato, "shrink_", wrong)
    expected = {"other weights": "cutting changed the network", "nothing cut": "parameters left"}
    with pytest.raises(Red, match=expected[fault]):
        shrinking._check_cut(tiny, layout, training.drawn_mask(layout), "none", None)


def test_every_network_is_compiled_however_many_there_are(monkeypatch):
    """torch.compile gives up at the ninth version of a function."""
    setting = training.Setting("tiny", CPU, compiled=True)
    compiled, ran = torch.compile, []
    backend = lambda graph, _: lambda *args: ran.append(1) or graph(*args)  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, backend=backend, **k))
    for channels in range(1, 10):
        setting.inference(torch.nn.Conv2d(3, channels, 1))()
    assert len(ran) == 9


SCHEDULES = {
    "default": ato.Schedule(10, 7),
    "paper": ato.Schedule.paper(20, 7),
    "fast": ato.Schedule.fast(40, 5),
    "whole": ato.Schedule(10, 7, shrink_every=0.0),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_stretches_are_the_whole_run(schedule):
    parts = integral.stretches(schedule)
    assert parts[0].first == 0 and parts[-1].last == schedule.steps.end
    assert all(a.last == b.first and a.progress <= b.progress for a, b in pairwise(parts))
    assert sum(part.n_controller for part in parts) == schedule.n_controller_steps
    assert parts[0].progress == 0 and not parts[0].projecting and parts[-1].projecting
    assert parts[-1].progress == (1.0 if schedule.cuts else 0.0)


@pytest.mark.parametrize(
    "changes", [{}, {"shrink_every": 0.1, "freeze": 0.3}, {"shrink_every": 0.0}], ids=str
)
def test_a_real_run_goes_through_these_stretches(monkeypatch, changes):
    """Size of the network, projection, controller steps and masks, at every step of a run."""
    schedule = ato.Schedule(**{**runs.SCHEDULE.state(), **changes})
    layout = ato.trace(runs.Net(), runs.EXAMPLE)
    real = runs.new_run(layout, schedule=schedule)
    counted = {"step": 0, "draw": 0}
    for name in counted:
        method = getattr(real.search, name)

        def counting(*args, name=name, method=method):
            counted[name] += 1
            return method(*args)

        monkeypatch.setattr(real.search, name, counting)
    seen = []
    for step in range(schedule.steps.end):
        before = counted["step"]
        if step == schedule.steps.freeze:
            logits = real.search.kept_logits()
        runs.train(real, 1)
        projecting = not bool(real.optimizer.mask.all()) or step >= schedule.steps.zero_by
        seen.append((real.live.layout.macs(), projecting, counted["step"] - before))
    sizes = end2end.Sizes(layout, real.mask, logits)
    for part in integral.stretches(schedule):
        macs = round(sizes.macs_at(part.progress) * layout.macs())
        stretch = seen[part.first : part.last]
        assert {m for m, *_ in stretch} == {macs}
        assert sum(n for *_, n in stretch) == part.n_controller
        assert part.projecting or not any(projecting for _, projecting, _ in stretch)
    assert counted["draw"] + 1 == integral.n_redraws(schedule)
    cuts = sum(bool(cut["groups"]) for cut in real.cuts)
    assert cuts == sum(a.progress < b.progress for a, b in pairwise(integral.stretches(schedule)))


def costs(**changes):
    """One dense step for each step, whatever its size; nothing else costs anything."""
    free = {
        "macs": np.array([1.0, 0.6, 0.45]), "plain": np.ones(2), "projecting": np.ones((3, 2)),
        "controller": np.zeros((3, 2)), "redraw": 0.0, "cut": np.zeros(2), "idle_cut": 0.0,
        "finish": 0.0,
    }  # fmt: skip
    return integral.Costs(**{**free, **changes})


def macs_at(progress):
    return 1 - 0.55 * progress


def test_the_integral_of_costs_known():
    schedule = SCHEDULES["default"]
    end, parts = schedule.steps.end, integral.stretches(schedule)
    cuts = sum(a.progress < b.progress for a, b in pairwise(parts))

    def ratio(**changes):
        return integral.integrate(schedule, costs(**changes), macs_at)["ratio"]["median"]

    assert ratio() == 1
    macs = np.array([[1.0] * 2, [0.6] * 2, [0.45] * 2])
    found = integral.integrate(schedule, costs(projecting=macs), macs_at)
    assert found["ratio"]["median"] == pytest.approx(found["mean_macs_frac"])
    mean = sum((p.last - p.first) * macs_at(p.progress) for p in parts) / end
    assert found["mean_macs_frac"] == pytest.approx(mean) and mean < 0.8
    assert [part["macs_frac"] for part in found["stretches"]] == [
        pytest.approx(macs_at(part.progress)) for part in parts
    ]
    extra = ratio(controller=np.full((3, 2), 0.5)) - 1
    assert extra == pytest.approx(0.5 * schedule.n_controller_steps / end)
    assert ratio(redraw=2.0) - 1 == pytest.approx(2 * integral.n_redraws(schedule) / end)
    assert ratio(cut=np.full(2, 3.0)) - 1 == pytest.approx(3 * cuts / end)
    idle = len(schedule.cuts) - cuts
    assert ratio(idle_cut=0.25, finish=4.0) - 1 == pytest.approx((0.25 * idle + 4) / end)


def test_the_spread_of_the_integral_is_that_of_its_rounds():
    found = integral.integrate(
        SCHEDULES["whole"],
        costs(plain=np.array([1.0, 2.0]), projecting=np.array([[1.0, 2.0]] * 3)),
        macs_at,
    )
    assert found["ratio"] == timing.spread([1.0, 2.0])
    assert sum(part["share"]["median"] for part in found["stretches"]) == pytest.approx(1)


def test_groups_that_reach_zero_are_red(tiny, monkeypatch):
    layout = tiny.layout("inner", 8)
    logits = training.drawn_logits(layout)
    sizes = end2end.Sizes(layout, training.drawn_mask(layout), logits)
    trainee = end2end.Trainee(tiny, sizes, 0.0, "sgd")
    trainee.step()
    trainee.check()
    monkeypatch.setattr(end2end, "PULL", 2.0)
    trainee = end2end.Trainee(tiny, sizes, 0.0, "sgd")
    trainee.step()
    with pytest.raises(Red, match="expected no group at zero"):
        trainee.check()


def test_both_suites_end_to_end(tmp_path, capsys):
    path = tmp_path / "a.json"
    argv = ["--suite", "shrink", "end2end", "--quick", "--rounds", "2", "--scopes", "inner",
            "--real-steps", "5", "--stages", "1", "--json", str(path)]  # fmt: skip
    assert run.main(argv) == 0
    printed = capsys.readouterr().out
    suites = json.loads(path.read_text())["suites"]
    assert all(suite["red"] == suite["skipped"] == [] for suite in suites.values())
    cut, speed = suites["shrink"]["rows"]
    assert cut["contenders"][shrinking.OURS]["median_ms"] > 0 and max(cut["check"].values()) <= 1e-6
    assert set(speed["small"]) == {"drawn/1", "uniform/1", "drawn/8", "uniform/8"}
    for entry in speed["small"].values():
        assert entry["macs_frac"] <= training.MACS
        for what in shrinking.WHATS:
            ratio = entry[f"{what}_over_dense"]
            assert 0 < ratio["p20"] <= ratio["median"] <= ratio["p80"]
    measured, *whole, real = suites["end2end"]["rows"]
    assert [size["progress"] for size in measured["sizes"]] == [0, 0.5, 1]
    assert [row["schedule"] for row in whole] == ["Schedule.paper(245)", "Schedule(90)"]
    for row in whole:
        parts = [row[name]["share"]["median"] for name in ("controller", "cutting", "redrawing")]
        parts += [part["share"]["median"] for part in row["stretches"]]
        assert all(part >= 0 for part in parts) and row["ratio"]["median"] > 0
        assert f"{row['schedule']}, scope inner: {row['ratio']['median']:.3f} (" in printed
    assert real["real"]["mean_macs_frac"] == pytest.approx(real["integral"]["mean_macs_frac"])
    assert real["real"]["cuts"] == real["integral"]["cutting"]["cuts"]
    assert real["integral"]["steps"] == 5 * end2end.REAL_EPOCHS
    assert f"a real run of {real['integral']['steps']} steps" in printed
    assert run.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_no_new_block_is_started_when_the_time_is_over(capsys):
    assert run.main(["--suite", "shrink", "end2end", "--quick", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.count("the 0 s of --seconds were over") == 5
