"""Latency of a network as a function of the mask, from measured tables.

Cutting gate ``g`` to ``k`` channels, and nothing else, makes a forward pass ``r_g(k)`` times as
long as the dense network's: ``saved_g(k) = 1 - r_g(k)`` is measured at a few widths.
Savings do not add up. A layer between two gates that keep the shares a and b costs ``a b`` of
itself, so cutting both saves ``1 - a b = (1 - a) + (1 - b) - (1 - a)(1 - b)``: less than the sum. A
second measured curve, falling and at 1 for nothing saved, takes the sum to the whole network's::

    latency(mask) = dense_ms * whole(sum_g saved_g(k_g)),    k_g = sum of gate g's mask entries

Both curves are piecewise linear. `stopwatch` measures them, `Budget` reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .groups import Gate, GroupLayout

FORMAT = "ato-fast latency table"
VERSION = 1
LEAST_FALL = 1e-3
"""Slope of the whole network's curve at least, as a share of its mean slope, so that noise leaves
the controller no flat place."""


def layout_digest(layout: GroupLayout) -> str:
    """Digest of everything of a layout that decides a network's latency."""
    shapes = {name: list(shape) for name, shape in layout.shapes.items()}
    terms = [[term.coef, [list(key) for key in term.dims]] for term in layout.mac_terms]
    content = json.dumps([layout.sha256, shapes, terms], sort_keys=True, default=float)
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class LatencyTable:
    """What was measured of one network on one device; plain data.

    Args:
        layout: `layout_digest`.
        device: name of the device; of a CPU with the number of threads.
        example: shape and dtype of every tensor of the example inputs: ``8x3x64x64 float32``.
        torch: its version.
        dense_ms: median milliseconds of the dense network's forward pass.
        gates: names, in the layout's order.
        widths: per gate, ascending: numbers of channels measured, and the full one.
        saved: per gate and width, share of the dense latency saved by cutting this gate to it: from
            some number down to 0 at the full width, never rising.
        total: sums of savings at which the whole network was measured, ascending from 0.
        ratio: its latency there over the dense one's, falling from 1.
        n_forwards: forward passes that were timed.
        seconds: that measuring took.

    Raises:
        ValueError: lists of different lengths, or curves that are not monotone.
    """

    layout: str
    device: str
    example: tuple[str, ...]
    torch: str
    dense_ms: float
    gates: tuple[str, ...]
    widths: tuple[tuple[int, ...], ...]
    saved: tuple[tuple[float, ...], ...]
    total: tuple[float, ...]
    ratio: tuple[float, ...]
    n_forwards: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        same = len(self.gates) == len(self.widths) == len(self.saved)
        curves = list(zip(self.widths, self.saved, strict=True)) if same else []
        ok = (
            same
            and self.dense_ms > 0
            and all(
                len(widths) == len(saved) > 0 == saved[-1] and _falls(widths, saved)
                for widths, saved in curves
            )
            and len(self.total) == len(self.ratio) > 0 == self.total[0]
            and _falls(self.total, self.ratio)
            and self.ratio[0] == 1 >= self.ratio[-1] > 0
        )
        if not ok:
            raise ValueError("latency table: damaged, its curves are not monotone and complete")

    def covers(self, layout: GroupLayout) -> bool:
        """Whether every gate of the same layout was measured down to its smallest width."""
        return all(
            widths[0] <= layout.widths(gate)[0]
            for gate, widths in zip(layout.gates, self.widths, strict=True)
        )

    def check(self, layout: GroupLayout, device: str, example: Sequence[str]) -> None:
        """Raise ValueError unless the table is of this layout, device and example."""
        if self.layout != layout_digest(layout):
            raise ValueError(
                f"latency table: it belongs to another layout ({len(self.gates)} gates; this one "
                f"has {len(layout.gates)}): another model, input size or scope"
            )
        if not self.covers(layout):
            raise ValueError(
                "latency table: measured with a larger min_channels or round_to than the layout's "
                f"{layout.min_channels} and {layout.round_to}; measure again: leave table= out"
            )
        for what, theirs, mine in (
            ("device", self.device, device),
            ("example", ", ".join(self.example), ", ".join(example)),
        ):
            if theirs != mine:
                raise ValueError(
                    f"latency table: measured with {what} {theirs!r}, this is {mine!r}; "
                    "measure again: leave table= out"
                )

    def state(self) -> dict[str, Any]:
        """As numbers, strings, lists and dicts."""
        return json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}))

    @staticmethod
    def from_state(state: Any) -> LatencyTable:
        """The table that `state` gave.

        Raises:
            ValueError: something else, or of another version.
        """
        names = {field.name for field in fields(LatencyTable)}
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(
                f"latency table: expected what LatencyTable.state() gives, got {state!r}"
            )
        if state.get("version") != VERSION or not names <= state.keys():
            raise ValueError(
                f"latency table: expected version {VERSION}, got {state.get('version')!r}"
            )
        try:
            return LatencyTable(**{name: _tuples(state[name]) for name in names})
        except TypeError as error:
            raise ValueError(f"latency table: damaged: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.state(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            OSError: no such file.
            ValueError: something else is in it.
        """
        try:
            state = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        try:
            return LatencyTable.from_state(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


class Timed:
    """The `Price` in milliseconds, estimated from a table.

    Outside of what was measured, for soft masks only: below its smallest width a gate's curve goes
    on as a straight line to 0 channels, and the whole network's, from its last value, falls to half
    of it where no gate keeps anything.

    Args:
        layout: its gates.
        table: of this layout.
    """

    base = torch.zeros(1, dtype=torch.float64)

    def __init__(self, layout: GroupLayout, table: LatencyTable) -> None:
        self.dense_ms = table.dense_ms
        self._n_groups = layout.n_groups
        self._index_of = {gate.offset: i for i, gate in enumerate(layout.gates)}
        curves = [_to_zero(w, s) for w, s in zip(table.widths, table.saved, strict=True)]
        n_points = max(len(widths) for widths, _ in curves)
        # Rows are filled up with widths that no gate has.
        fill = [np.arange(1, 1 + n_points - len(widths)) for widths, _ in curves]
        self._widths = _matrix(
            [np.r_[w, w[-1] + f] for (w, _), f in zip(curves, fill, strict=True)]
        )
        self._saved = _matrix([np.r_[s, 0.0 * f] for (_, s), f in zip(curves, fill, strict=True)])
        total, ratio = list(table.total), list(table.ratio)
        everything = sum(saved[0] for _, saved in curves)
        if everything > total[-1]:
            total.append(everything)
            ratio.append(ratio[-1] / 2)
        self._total, self._ratio = _matrix([total]), _matrix([ratio])
        # Row g lists the groups of gate g; n_groups stands for one that is never kept.
        index = np.full((len(layout.gates), max(g.n for g in layout.gates)), layout.n_groups)
        for row, gate in zip(index, layout.gates, strict=True):
            row[: gate.n] = np.arange(gate.offset, gate.offset + gate.n)
        self._groups = torch.from_numpy(index)

    def __call__(self, mask: Tensor) -> Tensor:
        """Milliseconds under a mask ``[n_groups]``, float64 0-dim on its device, differentiable."""
        if tuple(mask.shape) != (self._n_groups,):
            raise ValueError(
                f"mask: expected shape ({self._n_groups},), one entry per group, "
                f"got {tuple(mask.shape)}"
            )
        if self._groups.device != mask.device:
            for name in ("_groups", "_widths", "_saved", "_total", "_ratio"):
                setattr(self, name, getattr(self, name).to(mask.device))
        mask = mask.to(torch.float64)
        kept = torch.cat([mask, mask.new_zeros(1)])[self._groups].sum(dim=1, keepdim=True)
        saved = _interpolate(self._widths, self._saved, kept)  # [n_gates, 1]
        return self._ms(saved.sum())

    def _ms(self, total: Tensor) -> Tensor:
        """Milliseconds for sums of savings ``[...]``."""
        flat = total.reshape(1, -1)
        ratio = (
            _interpolate(self._total, self._ratio, flat)
            if self._total.numel() > 1
            else 1 + 0 * flat
        )
        return self.dense_ms * ratio.reshape(total.shape)

    def parts(self, gate: Gate, order: np.ndarray, widths: list[int]) -> Tensor:
        """See `Price`; which groups are kept makes no difference."""
        row = self._index_of[gate.offset]
        kept = torch.tensor([widths], dtype=torch.float64)
        one = slice(row, row + 1)
        return _interpolate(self._widths[one].cpu(), self._saved[one].cpu(), kept).T

    def of_sizes(self, sizes: Tensor) -> Tensor:
        """See `Price`."""
        return self._ms(sizes[..., 0].to(self._total.device)).cpu()

    def of(self, mask: Tensor) -> float:
        """See `Price`."""
        return self(mask).item()

    def slope(self, mask: Tensor) -> Tensor:
        """See `Price`: curves may be flat anywhere; all that is known is that they never fall."""
        return torch.zeros(len(mask), dtype=torch.float64)


def falling(values: Sequence[float]) -> list[float]:
    """The nearest sequence, in least squares, that never rises (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        size = 1
        while pools and pools[-1][0] < value:
            mean, n = pools.pop()
            value, size = (mean * n + value * size) / (n + size), n + size
        pools.append((value, size))
    return [value for value, size in pools for _ in range(size)]


def whole_curve(
    totals: Sequence[float], ratios: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The whole network's curve through measured points, in any order, made monotone.

    Returns:
        ``total`` and ``ratio`` of `LatencyTable`.
    """
    at: dict[float, list[float]] = {}
    for total, ratio in zip(totals, ratios, strict=True):
        if total > 0:
            at.setdefault(total, []).append(min(ratio, 1.0))
    total = sorted(at)
    # A mean of few, so that points in the same place count as one.
    ratio = falling([1.0, *(sum(at[t]) / len(at[t]) for t in total)])
    total = [0.0, *total]
    ratio[0] = 1.0
    for i in range(1, len(total)):
        least = LEAST_FALL * (1 - ratio[-1] + 1e-3) * (total[i] - total[i - 1]) / total[-1]
        ratio[i] = max(min(ratio[i], ratio[i - 1] - least), ratio[i - 1] / 1e3)
    return tuple(total), tuple(ratio)


def _interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Row by row, the straight lines through ``(x[i, j], y[i, j])`` at ``at[i, :]``.

    ``x`` ascends in every row; beyond its ends the outer lines go on. Differentiable in ``at``.
    """
    right = torch.searchsorted(x, at.detach().contiguous()).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, right - 1), x.gather(1, right)
    y0, y1 = y.gather(1, right - 1), y.gather(1, right)
    return y0 + (at - x0) * ((y1 - y0) / (x1 - x0))


def _to_zero(widths: Sequence[int], saved: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A gate's curve with a point at 0 channels, on the line through the first two."""
    slope = (saved[0] - saved[1]) / (widths[1] - widths[0]) if len(widths) > 1 else 0.0
    return np.r_[0.0, widths], np.r_[saved[0] + slope * widths[0], saved]


def _matrix(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.from_numpy(np.asarray(rows, dtype=np.float64))


def _falls(x: Sequence[float], y: Sequence[float]) -> bool:
    return bool(np.all(np.diff(x) > 0) and np.all(np.diff(y) <= 0))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
