"""What a whole run costs in dense steps, from what each of its steps costs.

Between two cuts nothing changes, so a run is a handful of stretches. Costs are measured at a few
sizes of the network and interpolated linearly in MACs between them; all are ratios to the dense
step of the same round, and so is the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ato_fast import Schedule

from . import timing


@dataclass(frozen=True)
class Stretch:
    """Steps ``first`` to ``last`` (exclusive), all of the same cost."""

    first: int
    last: int
    projecting: bool
    progress: float
    """Share of the way from the dense to the small network that cuts have gone, in [0, 1]."""
    n_controller: int
    """Controller steps among them."""


def progress_at(schedule: Schedule, step: int) -> float:
    """Share of the way to the small network that is cut before optimizer step ``step``."""
    steps = schedule.steps
    done = [cut for cut in schedule.cuts if cut <= step]
    span = steps.zero_by - steps.shrink_start
    return min(1.0, (done[-1] - steps.shrink_start) / span) if done else 0.0


def stretches(schedule: Schedule) -> list[Stretch]:
    """The run, split where the projection starts and where the network gets smaller."""
    starts = {0, schedule.steps.projection_start, schedule.steps.end}
    starts |= {c for c in schedule.cuts if progress_at(schedule, c) > progress_at(schedule, c - 1)}
    return [
        Stretch(
            first,
            last,
            first >= schedule.steps.projection_start,
            progress_at(schedule, first),
            sum(map(schedule.controller_due, range(first, last))),
        )
        for first, last in pairwise(sorted(starts))
    ]


def n_redraws(schedule: Schedule) -> int:
    """How often the mask changes: at each epoch of the search, and at the freeze."""
    steps, per_epoch = schedule.steps, schedule.steps_per_epoch
    return -(-steps.freeze // per_epoch) - -(-steps.controller_start // per_epoch) + 1


@dataclass(frozen=True)
class Costs:
    """What was measured, in dense steps, and at which sizes of the network.

    Args:
        macs: share of the MACs at each size, from 1 down, ``[n_sizes]``.
        plain: a step of the dense network without a mask, one entry per round, ``[rounds]``.
        projecting: a step with a mask, ``[n_sizes, rounds]``.
        controller: a controller step, ``[n_sizes, rounds]``.
        redraw: a new mask.
        cut: what a cut from each size to the next costs, ``[n_sizes - 1]``.
        idle_cut: what looking for something to cut costs.
        finish: the end of a run.
    """

    macs: np.ndarray
    plain: np.ndarray
    projecting: np.ndarray
    controller: np.ndarray
    redraw: float
    cut: np.ndarray
    idle_cut: float
    finish: float

    def between(self, values: np.ndarray, macs: float) -> np.ndarray:
        """``values`` (one row per size, or fewer from the dense one on) at a size in between."""
        known = self.macs[: len(values)][::-1]
        columns = values.reshape(len(values), -1)[::-1].T
        return np.array([np.interp(macs, known, column) for column in columns])


def integrate(
    schedule: Schedule, costs: Costs, macs_at: Callable[[float], float]
) -> dict[str, Any]:
    """The run's wall-clock over that of as many dense steps, with the parts it is made of.

    Args:
        schedule: of the run.
        costs: of its steps.
        macs_at: share of the MACs of the network that has gone a share of the way.

    Returns:
        Plain data: ``ratio`` and, of every part, ``share`` in the run's own time, as spreads over
        the rounds; counts of steps, cuts and masks; ``mean_macs_frac``, of the networks stepped.
    """
    end = schedule.steps.end
    parts = stretches(schedule)
    macs = [macs_at(part.progress) for part in parts]
    ratios = [
        costs.between(costs.projecting, size) if part.projecting else costs.plain
        for part, size in zip(parts, macs, strict=True)
    ]
    steps = [(p.last - p.first) * r for p, r in zip(parts, ratios, strict=True)]
    controller = sum(
        p.n_controller * costs.between(costs.controller, size)
        for p, size in zip(parts, macs, strict=True)
    )
    before = [progress_at(schedule, cut - 1) for cut in schedule.cuts]
    grows = [progress_at(schedule, cut) > p for cut, p in zip(schedule.cuts, before, strict=True)]
    cutting = costs.finish + sum(
        costs.between(costs.cut, macs_at(p))[0] if done else costs.idle_cut
        for p, done in zip(before, grows, strict=True)
    )
    redrawing = n_redraws(schedule) * costs.redraw
    total = sum(steps) + controller + cutting + redrawing
    n_controller = sum(p.n_controller for p in parts)
    return {
        "steps": end,
        "ratio": timing.spread(total / end),
        "mean_macs_frac": sum((p.last - p.first) * m for p, m in zip(parts, macs, strict=True))
        / end,
        "stretches": [
            {
                "first": p.first, "last": p.last, "projecting": p.projecting, "macs_frac": size,
                "interpolated": bool(p.projecting and np.abs(costs.macs - size).min() > 1e-9),
                "controller_steps": p.n_controller, "step_over_dense": timing.spread(r),
                "share": timing.spread(s / total),
            }
            for p, size, r, s in zip(parts, macs, ratios, steps, strict=True)
        ],
        "controller": {
            "steps": n_controller, "share": timing.spread(controller / total),
            "step_over_dense": timing.spread(controller / max(1, n_controller)),
        },
        "cutting": {
            "cuts": sum(grows), "idle_cuts": len(grows) - sum(grows),
            "share": timing.spread(cutting / total),
        },
        "redrawing": {"masks": n_redraws(schedule), "share": timing.spread(redrawing / total)},
    }  # fmt: skip
