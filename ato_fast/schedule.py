"""The phases of a run as data: when the controller and the projection start, freeze and finish.

======== ================================================================================
phase    what happens
======== ================================================================================
warmup   ordinary training
search   the controller learns; the mask is redrawn once per epoch
project  as search, and the groups the mask drops are pulled towards zero
zeroing  the mask is frozen; dropped groups are driven to exact zero
finetune dropped groups are exactly zero (``fidelity="paper"``: still pulled, with large strength)
======== ================================================================================

All boundaries are given as fractions of the run and resolved to optimizer steps. Groups that are
exactly zero are cut out of the network while it trains, in stages, from ``shrink_start`` on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

PHASES = ("warmup", "search", "project", "zeroing", "finetune")
CONTROLLER_INTERVAL = 20  # model steps per controller step in the reference code


@dataclass(frozen=True)
class Boundaries:
    """First optimizer step (from 0) of each phase; ``end`` is the number of steps of the run."""

    controller_start: int
    projection_start: int
    strong_start: int
    controller_drop: int
    shrink_start: int
    freeze: int
    zero_by: int
    end: int


@dataclass(frozen=True)
class Schedule:
    """When things happen.

    Args:
        epochs, steps_per_epoch: length of the run.
        controller_start, projection_start, freeze, zero_by: fractions of the run, in this order.
            From ``zero_by`` on every dropped group is exactly zero.
        shrink_start: from here on groups are driven to exact zero and cut, the least wanted first,
            in stages that end at ``zero_by``; ``None``: the freeze. Before the freeze, where the
            mask may still change, what is cut is gone all the same. (``fidelity="paper"`` cuts
            from the freeze on what its strengths have driven to zero.)
        shrink_every: fraction of the run from one cut to the next; 0 cuts at the end only, so that
            training costs what dense training costs.
        controller_drop: when the controller's learning rate is divided by 10; ``None``: at 97.6 %
            of the way from the start of the run to the freeze (epoch 122 of 125, as published).
        controller_interval: model steps per controller step. ``None``: the published 20, or less
            where the run is so short that the search would take fewer than ``controller_steps``;
            in very short runs several follow one model step.
        controller_steps: how many controller steps a search needs to settle.
        pull: share of its norm a group loses if the mask drops it from ``projection_start`` to the
            freeze. Gentle, because the mask may still change.
        strengths: the published strengths, before and from ``strong_start`` on. Read by
            ``fidelity="paper"`` only.
        strong_start: see ``strengths``; ``None``: at the freeze.

    Raises:
        ValueError: an argument out of range, or boundaries out of order or on the same step.
    """

    epochs: int
    steps_per_epoch: int
    controller_start: float = 0.1
    projection_start: float = 0.2
    freeze: float = 0.5
    zero_by: float = 0.65
    shrink_start: float | None = None
    shrink_every: float = 0.05
    controller_drop: float | None = None
    controller_interval: int | None = None
    controller_steps: int = 200
    pull: float = 0.5
    strengths: tuple[float, float] = (10.0, 1000.0)
    strong_start: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "controller_steps"):
            _check_count(name, getattr(self, name))
        if self.controller_interval is not None:
            _check_count("controller_interval", self.controller_interval)
        for name in (
            "controller_start",
            "projection_start",
            "freeze",
            "zero_by",
            "shrink_start",
            "shrink_every",
            "controller_drop",
            "strong_start",
        ):
            value = getattr(self, name)
            if value is None and name in ("controller_drop", "strong_start", "shrink_start"):
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a fraction of the run in [0, 1], got {value!r}")
        if not 0 <= self.pull < 1:
            raise ValueError(f"pull: expected a share in [0, 1), got {self.pull}")
        if len(self.strengths) != 2 or min(self.strengths) < 0:
            raise ValueError(f"strengths: expected two numbers >= 0, got {self.strengths}")
        order = ("controller_start", "projection_start", "freeze", "zero_by")
        for name, later in pairwise(order):
            step, later_step = getattr(self.steps, name), getattr(self.steps, later)
            # The pull may start with the controller; the other phases need a step of their own.
            room = 0 if later == "projection_start" else 1
            if later_step < step + room:
                raise ValueError(
                    f"{later}: expected after {name} (step {step} of {self.steps.end}), "
                    f"got step {later_step}; move the fractions apart or train for longer"
                )
        steps = self.steps
        if not steps.projection_start <= steps.shrink_start <= steps.freeze:
            raise ValueError(
                f"shrink_start: expected from projection_start to freeze (steps "
                f"{steps.projection_start} to {steps.freeze} of {steps.end}), got step "
                f"{steps.shrink_start}"
            )
        if self.steps.zero_by >= self.steps.end:
            raise ValueError(
                f"zero_by: expected before the end of the run (step {self.steps.end}), got step "
                f"{self.steps.zero_by}; no step would be left with the dropped groups at zero"
            )

    @cached_property
    def steps(self) -> Boundaries:
        """The boundaries in optimizer steps."""
        end = self.epochs * self.steps_per_epoch

        def at(fraction: float) -> int:
            return round(fraction * end)

        freeze = at(self.freeze)
        drop = 0.976 * freeze if self.controller_drop is None else at(self.controller_drop)
        return Boundaries(
            controller_start=at(self.controller_start),
            projection_start=at(self.projection_start),
            strong_start=freeze if self.strong_start is None else at(self.strong_start),
            controller_drop=round(drop),
            shrink_start=freeze if self.shrink_start is None else at(self.shrink_start),
            freeze=freeze,
            zero_by=at(self.zero_by),
            end=end,
        )

    @property
    def n_controller_steps(self) -> int:
        """How many controller steps the whole search takes."""
        window = self.steps.freeze - self.steps.controller_start
        if self.controller_interval is not None:
            return window // self.controller_interval
        return max(self.controller_steps, window // CONTROLLER_INTERVAL)

    def controller_due(self, step: int) -> int:
        """How many controller steps follow optimizer step ``step`` (from 0)."""
        start, window = self.steps.controller_start, self.steps.freeze - self.steps.controller_start
        done = step - start
        if not 0 <= done < window:
            return 0
        if self.controller_interval is not None:
            return int((done + 1) % self.controller_interval == 0)
        n = self.n_controller_steps
        return (done + 1) * n // window - done * n // window

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Steps before which the network is cut, ascending; empty without ``shrink_every``.

        The stages from ``shrink_start`` to ``zero_by``, as even as steps allow; the freeze, for
        what is at zero by then; and every ``shrink_every`` after it, for what was late.
        """
        steps = self.steps
        every = max(1, round(self.shrink_every * steps.end))
        if not self.shrink_every:
            return ()
        span = steps.zero_by - steps.shrink_start
        n = -(-span // every)
        stages = {steps.shrink_start + round(i * span / n) for i in range(1, n + 1)}
        late = range(steps.zero_by + every, steps.end, every)
        return tuple(sorted(stages | {steps.freeze} | set(late)))

    def deadline(self, step: int) -> int:
        """The step by which groups that are due now are zero: the next cut, at most ``zero_by``."""
        later = (cut for cut in self.cuts if cut > step)
        return min(next(later, self.steps.zero_by), self.steps.zero_by)

    def phase(self, step: int) -> str:
        """Name of the phase that optimizer step ``step`` (from 0) belongs to, one of `PHASES`."""
        steps = self.steps
        starts = (steps.controller_start, steps.projection_start, steps.freeze, steps.zero_by)
        return PHASES[sum(step >= start for start in starts)]

    def state(self) -> dict:
        """The arguments as plain numbers and lists, for checkpoints and reports."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def paper(cls, epochs: int, steps_per_epoch: int, **changes) -> Schedule:
        """The published schedule, scaled to ``epochs``.

        With E = 245: controller from epoch 25, projection from 50, strength 10 before epoch
        H = (E - 5) // 2 = 120 and 1000 from there on, freeze at H + 5 = 125, one controller step
        every 20 model steps, its learning rate divided by 10 at epoch 122. In a short run every 20
        steps are too few for the controller to reach its budget: ``controller_interval=None``
        adapts them. Under ``fidelity="default"`` groups are cut from the start of the projection
        on, the last of them 10 epochs after the freeze.

        Args:
            changes: any other argument of `Schedule`.

        Raises:
            ValueError: fewer than 8 epochs, too few for the published phases.
        """
        _check_count("epochs", epochs)
        if epochs < 8:
            raise ValueError(f"epochs: the published schedule needs at least 8, got {epochs}")
        half = (epochs - 5) // 2
        freeze = half + 5
        published = {
            "controller_start": round(epochs * 25 / 245) / epochs,
            "projection_start": round(epochs * 50 / 245) / epochs,
            "strong_start": half / epochs,
            "freeze": freeze / epochs,
            "shrink_start": round(epochs * 50 / 245) / epochs,
            "zero_by": (freeze + min(epochs - freeze - 1, max(1, round(epochs * 10 / 245))))
            / epochs,
            "controller_drop": int(0.98 * (epochs - 5) / 2 + 5) / epochs,
            "controller_interval": CONTROLLER_INTERVAL,
        }
        return cls(epochs, steps_per_epoch, **{**published, **changes})

    @classmethod
    def fast(cls, epochs: int, steps_per_epoch: int, **changes) -> Schedule:
        """Cuts from 6 % of the run on and is done at 25 %: most of it runs on the small network."""
        early = {
            "controller_start": 0.02,
            "projection_start": 0.06,
            "shrink_start": 0.06,
            "freeze": 0.2,
            "zero_by": 0.25,
            "shrink_every": 0.04,
        }
        return cls(epochs, steps_per_epoch, **{**early, **changes})


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
