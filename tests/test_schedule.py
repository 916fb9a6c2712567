"""Phases as data."""

from itertools import pairwise

import pytest

from ato_fast.schedule import PHASES, Schedule


def test_published_epochs():
    schedule = Schedule.paper(245, 2503)
    steps = schedule.steps
    assert steps.controller_start == 25 * 2503
    assert steps.projection_start == 50 * 2503
    assert steps.strong_start == 120 * 2503
    assert steps.freeze == 125 * 2503
    assert steps.controller_drop == 122 * 2503
    assert steps.end == 245 * 2503
    assert schedule.strengths == (10.0, 1000.0)
    assert schedule.controller_interval == 20


@pytest.mark.parametrize("epochs", [8, 9, 30, 90, 100, 245, 300, 305])
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 125])
def test_published_phases_fall_on_epochs(epochs, steps_per_epoch):
    steps = Schedule.paper(epochs, steps_per_epoch).steps
    half = (epochs - 5) // 2
    assert steps.strong_start == half * steps_per_epoch
    assert steps.freeze == (half + 5) * steps_per_epoch
    assert steps.controller_start % steps_per_epoch == 0
    assert steps.projection_start % steps_per_epoch == 0


def test_published_schedule_needs_epochs():
    with pytest.raises(ValueError, match="needs at least 8, got 7"):
        Schedule.paper(7, 100)


def test_default_and_fast_resolve_to_steps():
    steps = Schedule(90, 100, freeze=0.5, zero_by=0.6).steps
    assert (steps.freeze, steps.zero_by, steps.end) == (4500, 5400, 9000)
    assert steps.strong_start == steps.freeze
    assert Schedule.fast(100, 10).steps.freeze == 200
    assert Schedule.fast(100, 10, freeze=0.21).steps.freeze == 210
    with pytest.raises(AttributeError):
        Schedule(90, 100).freeze = 0.1


def test_phase_of_every_step():
    schedule = Schedule(10, 10, controller_start=0.1, projection_start=0.2, freeze=0.5, zero_by=0.7)
    starts = [0, 10, 20, 50, 70]
    for step in range(100):
        assert schedule.phase(step) == PHASES[sum(step >= s for s in starts) - 1]
    assert schedule.phase(10_000) == "finetune"


@pytest.mark.parametrize(
    ("window", "n_steps"),
    [(100_000, 5_000), (6_000, 300), (3_000, 300), (301, 300), (300, 300), (299, 300), (100, 300)],
)
def test_controller_steps_adapt_to_short_runs(window, n_steps):
    schedule = Schedule(
        4,
        window,
        controller_start=0.25,
        projection_start=0.25,
        freeze=0.5,
        zero_by=0.75,
        controller_steps=300,
    )
    start, freeze = schedule.steps.controller_start, schedule.steps.freeze
    due = [schedule.controller_due(step) for step in range(schedule.steps.end)]
    assert freeze - start == window
    assert schedule.n_controller_steps == n_steps == sum(due)
    assert sum(due[:start]) == sum(due[freeze:]) == 0
    # Evenly spread.
    assert {window // n_steps, -(-window // n_steps)} >= {
        b - a for a, b in pairwise([s for s, d in enumerate(due) for _ in range(d)])
    }
    assert max(due) - min(due[start:freeze]) <= 1


def test_given_interval_is_kept():
    schedule = Schedule(2, 50, controller_interval=7)
    due = [step for step in range(100) if schedule.controller_due(step)]
    assert due == [16, 23, 30, 37, 44]
    assert schedule.n_controller_steps == 5


def test_published_interval():
    schedule = Schedule.paper(245, 2503)
    due = [step for step in range(70_000) if schedule.controller_due(step)]
    assert due == [25 * 2503 + 19 + 20 * i for i in range(len(due))]
    assert len(due) == (70_000 - 25 * 2503) // 20
    short = Schedule.paper(30, 21, controller_interval=None)
    assert short.n_controller_steps == short.controller_steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze": 1.5}, "freeze: expected a fraction of the run"),
        ({"controller_start": -0.1}, "controller_start: expected a fraction"),
        ({"projection_start": 0.05}, "projection_start: expected after controller_start"),
        ({"freeze": 0.2}, "freeze: expected after projection_start"),
        ({"zero_by": 0.5}, "zero_by: expected after freeze .step 500 of 1000., got step 500"),
        ({"zero_by": 1.0}, "zero_by: expected before the end of the run .step 1000."),
        ({"epochs": 0}, "epochs: expected an int >= 1, got 0"),
        ({"steps_per_epoch": 2.5}, "steps_per_epoch: expected an int >= 1, got 2.5"),
        ({"controller_interval": 0}, "controller_interval: expected an int >= 1"),
        ({"controller_steps": True}, "controller_steps: expected an int >= 1"),
        ({"pull": 1.0}, "pull: expected a share"),
        ({"strengths": (-1.0, 2.0)}, "strengths: expected two numbers"),
        ({"epochs": 1, "steps_per_epoch": 2}, "move the fractions apart or train for longer"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"epochs": 10, "steps_per_epoch": 100, **arguments})


def test_state_is_plain():
    state = Schedule.paper(245, 10).state()
    assert state["strengths"] == [10.0, 1000.0]
    assert Schedule(**{**state, "strengths": tuple(state["strengths"])}) == Schedule.paper(245, 10)
