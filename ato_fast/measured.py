"""What a latency budget has measured: tables before training, the mask at the freeze."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .groups import GroupLayout
from .latency import LatencyTable, Timed, layout_digest

if TYPE_CHECKING:
    from torch import nn

    from .stopwatch import Stopwatch

MOST_ROUNDS = 4
"""Masks measured at the freeze."""

NEAR = 0.02
"""Share of the target latency that may stay unused; about what two measurements differ by."""


@dataclass(frozen=True)
class Verified:
    """A mask whose latency was measured.

    ``measured_ms`` is its share of the dense network's latency, both measured side by side, times
    the table's ``dense_ms``. ``rounds`` lists every mask tried: ``aim_ms`` (the estimate asked
    for), ``estimate_ms`` (of the mask found), ``measured_ms``, and ``dense_now_ms`` (of the dense
    network during that round).
    """

    mask: Tensor
    target_ms: float
    estimate_ms: float
    measured_ms: float
    rounds: tuple[dict[str, float], ...]
    seconds: float

    @property
    def met(self) -> bool:
        """Whether the measured latency is at or below the target."""
        return self.measured_ms <= self.target_ms

    def state(self) -> dict[str, Any]:
        """As numbers, lists, dicts and the mask."""
        return {**vars(self), "rounds": [dict(entry) for entry in self.rounds]}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Verified:
        """What `state` gave."""
        mask = state["mask"].to("cpu", torch.bool)
        return Verified(**{**state, "mask": mask, "rounds": tuple(map(dict, state["rounds"]))})


@dataclass
class Entry:
    """What is known of one layout; ``stopwatch`` from `Measured.prepare` on."""

    table: LatencyTable
    price: Timed
    stopwatch: Stopwatch | None = None
    verified: Verified | None = None


class Measured:
    """Tables and verified masks by layout.

    Args:
        given: a table, or the path of one, to use instead of measuring.

    Raises:
        OSError, ValueError: no table there.
    """

    def __init__(self, given: LatencyTable | str | Path | None) -> None:
        self._given = LatencyTable.load(given) if isinstance(given, (str, Path)) else given
        self._entries: dict[str, Entry] = {}
        self._of_layout: WeakKeyDictionary[GroupLayout, Entry] = WeakKeyDictionary()

    def prepare(self, model: nn.Module, layout: GroupLayout, example: tuple[Any, ...]) -> None:
        """Measure, unless a table is there. See `Budget.prepare`."""
        from .stopwatch import Stopwatch, described, device_name

        known = self._find(layout)
        if known is not None and known.stopwatch is not None:
            place = (device_name(next(model.parameters()).device), described(example))
            if place == (known.table.device, known.table.example):
                return
            known = None
        stopwatch = Stopwatch(model, layout, example)
        table = self._given if known is None else known.table
        if table is None:
            table = stopwatch.table()
        else:
            table.check(layout, stopwatch.device_name, stopwatch.example)
        self._keep(layout, table, stopwatch, None if known is None else known.verified)

    def entry(self, layout: GroupLayout) -> Entry:
        """What is known of ``layout``.

        Raises:
            RuntimeError: nothing.
        """
        known = self._find(layout)
        if known is None:
            raise RuntimeError(
                "budget: nothing was measured for this layout yet; call "
                "budget.prepare(model, layout, example_inputs) first"
            )
        return known

    def verify(
        self,
        layout: GroupLayout,
        target_ms: float,
        floor_ms: float,
        plan: Callable[[float], Tensor],
    ) -> Tensor:
        """The mask whose measured latency comes nearest to the target without exceeding it.

        The estimate asked for is corrected by what was measured, at most `MOST_ROUNDS` times. Where
        no mask is fast enough the fastest is taken, with a warning.

        Args:
            layout: prepared.
            target_ms: what the mask may take.
            floor_ms: estimate below which there is no mask.
            plan: an estimate in milliseconds -> the mask that comes nearest to it from below.

        Raises:
            RuntimeError: a state was loaded, but `prepare` was not called.
        """
        entry, start = self.entry(layout), time.perf_counter()
        if entry.stopwatch is None:
            raise RuntimeError("budget: call budget.prepare(model, layout) before it is frozen")
        dense_ms = entry.table.dense_ms
        tried: list[tuple[Tensor, dict[str, float]]] = []
        aim = target_ms
        for _ in range(MOST_ROUNDS):
            aim = min(max(aim, floor_ms), dense_ms)
            mask = plan(aim)
            if any(torch.equal(mask, other) for other, _ in tried):
                break
            now_ms, ratio = entry.stopwatch.compare(mask)
            record = {
                "aim_ms": aim,
                "estimate_ms": entry.price.of(mask),
                "measured_ms": ratio * dense_ms,
                "dense_now_ms": now_ms,
            }
            tried.append((mask, record))
            if (1 - NEAR) * target_ms <= record["measured_ms"] <= target_ms:
                break
            aim = _next_aim([record for _, record in tried], target_ms)
        fitting = [t for t in tried if t[1]["measured_ms"] <= target_ms]
        if fitting:
            mask, chosen = max(fitting, key=lambda t: t[1]["measured_ms"])
        else:
            mask, chosen = min(tried, key=lambda t: t[1]["measured_ms"])
            warnings.warn(
                f"budget: no mask of {len(tried)} measured was at or below {target_ms:.4g} ms; the "
                f"fastest took {chosen['measured_ms']:.4g} ms",
                stacklevel=3,
            )
        entry.verified = Verified(
            mask=mask.clone(),
            target_ms=target_ms,
            estimate_ms=chosen["estimate_ms"],
            measured_ms=chosen["measured_ms"],
            rounds=tuple(record for _, record in tried),
            seconds=time.perf_counter() - start,
        )
        return mask

    def state(self, layout: GroupLayout) -> dict[str, Any]:
        """Table and verified mask of ``layout``, as plain data and one tensor."""
        entry = self.entry(layout)
        verified = None if entry.verified is None else entry.verified.state()
        return {"table": entry.table.state(), "verified": verified}

    def load_state(self, state: dict[str, Any], layout: GroupLayout) -> None:
        """Restore what `state` gave; in place of what was measured since."""
        if not isinstance(state, dict) or "table" not in state:
            raise ValueError("state: expected what Budget.state() of a latency budget gives")
        table = LatencyTable.from_state(state["table"])
        known = self._find(layout)
        stopwatch = None if known is None else known.stopwatch
        if stopwatch is not None:
            table.check(layout, stopwatch.device_name, stopwatch.example)
        else:
            table.check(layout, table.device, table.example)
        verified = state["verified"]
        verified = None if verified is None else Verified.from_state(verified)
        self._keep(layout, table, stopwatch, verified)

    def _find(self, layout: GroupLayout) -> Entry | None:
        entry = self._of_layout.get(layout)
        if entry is None:
            entry = self._entries.get(layout_digest(layout))
            if entry is None or not entry.table.covers(layout):
                return None
            self._of_layout[layout] = entry
        return entry

    def _keep(
        self,
        layout: GroupLayout,
        table: LatencyTable,
        stopwatch: Stopwatch | None,
        verified: Verified | None,
    ) -> None:
        entry = Entry(table, Timed(layout, table), stopwatch, verified)
        self._entries[layout_digest(layout)] = entry
        self._of_layout.clear()
        self._of_layout[layout] = entry


def _next_aim(records: list[dict[str, float]], target_ms: float) -> float:
    """The estimate that should be measured just below the target.

    By the power law through the two measurements nearest to the target, or in proportion to the
    only one; clearly below every estimate that was measured too slow, whatever noise says. The more
    masks were too slow, the more it stays below the target, but always near.
    """
    slow = [r["estimate_ms"] for r in records if r["measured_ms"] > target_ms]
    goal = math.log(target_ms * (1 - NEAR * (1 - 0.5 ** max(1, len(slow)))))
    points = [(math.log(r["measured_ms"]), math.log(r["estimate_ms"])) for r in records]
    (measured, estimate), *others = sorted(points, key=lambda point: abs(point[0] - goal))
    slope = 1.0
    if others and others[0][0] != measured:
        slope = (others[0][1] - estimate) / (others[0][0] - measured)
    # Two measurements that hardly differ say nothing about the slope.
    slope = min(max(slope, 0.5), 2.0)
    aim = math.exp(estimate + slope * (goal - measured))
    return min([aim, *((1 - NEAR) * estimate for estimate in slow)])
