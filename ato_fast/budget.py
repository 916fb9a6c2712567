"""What the small network may cost, and the one deterministic mask that meets it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .exchange import exchange
from .fill import Fill, allowed, blocks_of
from .groups import GroupLayout
from .latency import LatencyTable
from .measured import Measured, Verified
from .price import Counted, Price

if TYPE_CHECKING:
    from torch import nn

KINDS = ("macs", "params")
"""What is counted. (The other two kinds of a `Budget` are measured.)"""

TIMED = ("latency", "latency_ms")


@dataclass(frozen=True)
class Budget:
    """Upper limit for the whole small network; give exactly one of the first four.

    Args:
        macs: multiply-adds per example: a float in (0, 1) is a fraction of the dense network's, an
            int above 1 an absolute count.
        params: number of parameters, likewise.
        latency: measured latency of one forward pass in eval mode, on the model's device, as a
            fraction in (0, 1) of the dense network's.
        latency_ms: the same in milliseconds.
        example: what the latency is measured with: positional arguments of one forward call, in
            the batch size, memory format and dtype that matters. Default: the run's example inputs.
        table: measured before with the same layout, device and example: a `LatencyTable` or the
            path of one.

    Raises:
        ValueError: none or several limits given, a value out of range, or ``example`` or ``table``
            without a latency.
    """

    macs: float | int | None = None
    params: float | int | None = None
    latency: float | None = None
    latency_ms: float | None = None
    example: tuple[Any, ...] | None = field(default=None, repr=False, compare=False)
    table: LatencyTable | str | Path | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS + TIMED if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                "Budget: expected exactly one of macs=, params=, latency= and latency_ms=, "
                f"got {given or 'none'}"
            )
        value, kind = self.value, self.kind
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind in KINDS:
            expected = "a fraction in (0, 1) or an int > 1"
            ok = number and (value > 1 if isinstance(value, int) else 0 < value < 1)
        elif kind == "latency":
            expected, ok = "a fraction in (0, 1)", number and 0 < value < 1
        else:
            expected, ok = "milliseconds above 0", number and 0 < value < float("inf")
        if not ok:
            raise ValueError(f"Budget({kind}=...): expected {expected}, got {value!r}")
        for name in ("example", "table"):
            if getattr(self, name) is not None and kind in KINDS:
                raise ValueError(f"Budget: {name}= is for a latency, but {kind}= was given")
        if self.example is not None and not isinstance(self.example, tuple):
            raise ValueError(
                "Budget: example: expected a tuple of positional arguments such as (x,), "
                f"got {type(self.example).__name__}"
            )
        # What was measured; no field, so that equal budgets stay equal.
        object.__setattr__(self, "_measured", Measured(self.table))

    @property
    def kind(self) -> str:
        """``"macs"``, ``"params"``, ``"latency"`` or ``"latency_ms"``."""
        return next(kind for kind in KINDS + TIMED if getattr(self, kind) is not None)

    @property
    def value(self) -> float | int:
        """The number given."""
        return getattr(self, self.kind)

    @property
    def timed(self) -> bool:
        """Whether it limits a measured latency, so that `prepare` has to come before the rest."""
        return self.kind in TIMED

    @property
    def unit(self) -> str:
        """Of costs and targets."""
        return "ms" if self.timed else self.kind

    def prepare(
        self, model: nn.Module, layout: GroupLayout, example: tuple[Any, ...] | None = None
    ) -> None:
        """Measure what `cost`, `check` and `freeze` need; nothing to do for MACs and parameters.

        Once per layout, device and example; it takes the time of some hundred forward passes. The
        model is left as it is: mode, gradients, buffers, random generators.

        Args:
            model: dense, on its device.
            layout: its gates.
            example: used where the budget has no example of its own.

        Raises:
            ValueError: no example; a device other than CPU and CUDA; a table of another layout,
                device or example.
        """
        if not self.timed:
            return
        example = self.example if self.example is not None else example
        if example is None:
            raise ValueError(f"Budget({self.kind}=...): example: expected inputs, got None")
        self._measured.prepare(model, layout, tuple(example))

    def table_of(self, layout: GroupLayout) -> LatencyTable:
        """The table of a latency budget, to keep and give to other budgets as ``table=``.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        return self._measured.entry(layout).table

    def price(self, layout: GroupLayout) -> Price:
        """What masks cost, in this budget's unit: MACs, parameters or milliseconds."""
        return self._measured.entry(layout).price if self.timed else Counted(layout, self.kind)

    def cost(self, layout: GroupLayout, mask: Tensor | None = None) -> float | Tensor:
        """Cost of the whole network under ``mask`` in this budget's unit.

        Args:
            layout: its gates.
            mask: ``[n_groups]``; ``None`` keeps everything.

        Returns:
            As `GroupLayout.macs`: a number, or for floating masks a 0-dim float64 tensor on the
            mask's device, differentiable. A latency is an estimate in milliseconds.
        """
        if not self.timed:
            return getattr(layout, self.kind)(mask)
        price = self._measured.entry(layout).price
        if mask is None:
            return price.dense_ms
        mask = torch.as_tensor(mask)
        return price(mask) if mask.is_floating_point() else price.of(mask)

    def target(self, layout: GroupLayout) -> float:
        """Largest cost the small network may have; an int but for latencies."""
        if self.kind == "latency_ms":
            return float(self.value)
        if isinstance(self.value, int):
            return self.value
        target = self.value * self.cost(layout)
        return target if self.timed else int(target)

    def check(self, layout: GroupLayout) -> None:
        """Raise unless some mask meets the budget and the dense network does not.

        Raises:
            ValueError: below the floor (every gate at the smallest of its ``layout.widths``), which
                it names; not below the dense network; a layout without gates.
            RuntimeError: a latency budget that was not prepared.
        """
        if not layout.gates:
            raise ValueError("layout: no gate, so nothing can be pruned; see layout.unprunable")
        target, dense = self.target(layout), self.cost(layout)
        name, show = f"budget {self.kind}={self.value}", self._shown
        if target >= dense:
            raise ValueError(
                f"{name}: {show(target)} is not below the dense network's {show(dense)}, so there "
                "is nothing to prune"
            )
        lowest = self.price(layout).of(_cheapest(layout, self.price(layout)))
        if lowest > target:
            steps = f" in multiples of {layout.round_to}" if layout.round_to > 1 else ""
            raise ValueError(
                f"{name}: {show(target)} is out of reach; with {layout.min_channels} channel(s) "
                f"per gate{steps} the floor is {show(lowest)} {self.unit} ({lowest / dense:.1%} of "
                f"the dense network's {show(dense)})"
            )

    def freeze(
        self, layout: GroupLayout, logits: Tensor | np.ndarray, *, measured: bool = False
    ) -> Tensor:
        """The mask that keeps the best groups the budget allows.

        Every gate keeps one of its ``layout.widths``. It starts from the smallest, with its best
        groups; the others wait in blocks that lead from one width to the next, best groups first
        (with ``round_to`` 1 a block is one group). Blocks are kept in descending order of their
        mean logit as long as the cost stays within the target, which is what bisecting a common
        offset of all logits finds; then single blocks that still fit are added in the same order.
        Blocks of several groups may leave a gap: `exchange` looks for widths that leave less.
        The cost is never above the target. Ties go to the lower index. All of it is deterministic.

        A latency is an estimate, until ``measured=True`` measures it: the small network and the
        dense one side by side, and again for a corrected estimate, up to `measured.MOST_ROUNDS`
        times, until the target is met by measurement. `report` says how it went.

        Args:
            layout: its gates.
            logits: ``[n_groups]``, higher is more worth keeping; a group of -inf is never kept, and
                widths that would need it are none.
            measured: verify a latency by measurement; nothing else for MACs and parameters.

        Returns:
            Bool CPU tensor ``[n_groups]``, True keeps.

        Raises:
            ValueError: logits of the wrong size or NaN, a budget out of reach, or a gate with fewer
                groups above -inf than its smallest width.
            RuntimeError: a latency budget that was not prepared.
        """
        scores = torch.as_tensor(logits).detach().to("cpu", torch.float64).numpy()
        if scores.shape != (layout.n_groups,):
            raise ValueError(
                f"logits: expected shape ({layout.n_groups},), one entry per group, "
                f"got {scores.shape}"
            )
        if np.isnan(scores).any():
            raise ValueError(f"logits: {int(np.isnan(scores).sum())} of {scores.size} are NaN")
        target, price = self.target(layout), self.price(layout)
        start = _smallest(layout, scores, scores)
        if price.of(start) > target:
            # Groups of one gate may differ in cost: the best ones are too dear, the cheapest fit.
            self.check(layout)
            start = _cheapest(layout, price, scores)
            if price.of(start) > target:
                raise ValueError(
                    f"budget {self.kind}={self.value}: {self._shown(target)} is out of reach of "
                    "the groups with a logit above -inf; their floor is "
                    f"{self._shown(price.of(start))} {self.unit}"
                )
        blocks = blocks_of(layout, scores, start)

        def nearest(target: float) -> Tensor:
            mask = Fill(layout, price, target, blocks).best(start)
            if layout.round_to > 1:
                nearer = exchange(layout, price, target, scores, mask)
                # Sums in another order may differ by a rounding error.
                mask = nearer if price.of(nearer) <= target else mask
            return mask

        if measured and self.timed:
            return self._measured.verify(layout, target, price.of(start), nearest)
        return nearest(target)

    def achieved(self, layout: GroupLayout, mask: Tensor) -> float:
        """What ``mask`` costs: counted, or measured where `freeze` measured it, else estimated."""
        if self.timed:
            verified = self._verified(layout, mask)
            if verified is not None:
                return verified.measured_ms
        return self.cost(layout, mask.bool())

    def report(self, layout: GroupLayout, mask: Tensor) -> dict[str, Any] | None:
        """What was measured, as plain data; None for MACs and parameters.

        ``device``, ``example``, ``torch``, ``dense_ms``, ``table_seconds``; from the freeze on
        ``target_ms``, ``estimate_ms``, ``measured_ms``, ``met``, ``rounds`` and ``seconds`` of
        ``mask``, as in `measured.Verified`.
        """
        if not self.timed:
            return None
        table, verified = self.table_of(layout), self._verified(layout, mask)
        content = {
            "device": table.device,
            "example": list(table.example),
            "torch": table.torch,
            "dense_ms": table.dense_ms,
            "table_seconds": table.seconds,
        }
        if verified is not None:
            content |= {k: v for k, v in verified.state().items() if k != "mask"}
            content["met"] = verified.met
        return content

    def state(self, layout: GroupLayout) -> dict[str, Any] | None:
        """What was measured of ``layout``, for a checkpoint: plain data and one tensor, or None.

        A run that is continued with it goes on with the same numbers.
        """
        return self._measured.state(layout) if self.timed else None

    def load_state(self, state: dict[str, Any] | None, layout: GroupLayout) -> None:
        """Restore what `state` gave, before or after `prepare` (which then measures nothing).

        Raises:
            ValueError: the state of another kind of budget, layout, device or example.
        """
        if (state is not None) != self.timed:
            raise ValueError(f"state: not that of a budget with {self.kind}=")
        if self.timed:
            self._measured.load_state(state, layout)

    def _verified(self, layout: GroupLayout, mask: Tensor) -> Verified | None:
        verified = self._measured.entry(layout).verified
        same = verified is not None and torch.equal(verified.mask, mask.cpu().bool())
        return verified if same else None

    def _shown(self, cost: float) -> str:
        return f"{cost:.4g}" if self.timed else str(cost)


def floor(layout: GroupLayout, kind: str) -> int:
    """Smallest cost of any mask that keeps to ``layout.widths``; ``kind`` one of `KINDS`."""
    if not layout.gates:
        return getattr(layout, kind)()
    price = Counted(layout, kind)
    return price.of(_cheapest(layout, price))


def paper_ratio(ratio: float, total: float, gated: float) -> float:
    """Published conversion of a whole-model ratio q to the gated part's: ``(t q - (t - F)) / F``.

    Args:
        ratio: q, remaining share of the whole model's cost.
        total: t, cost of the whole dense model.
        gated: F, cost of its gated part, in the same unit.

    Raises:
        ValueError: the part that cannot be pruned alone exceeds the budget.
    """
    converted = (total * ratio - (total - gated)) / gated
    if converted <= 0:
        raise ValueError(
            f"ratio {ratio}: out of reach; the part outside the gates alone is "
            f"{(total - gated) / total:.1%} of the model"
        )
    return converted


def _smallest(layout: GroupLayout, scores: np.ndarray, worth: np.ndarray) -> Tensor:
    """Mask of every gate at its smallest width, with the groups that have the highest ``worth``.

    Both ``[n_groups]``; a group whose score is -inf is never kept.
    """
    worth = np.where(scores > -np.inf, worth, -np.inf)
    mask = torch.zeros(layout.n_groups, dtype=torch.bool)
    for gate in layout.gates:
        best = np.argsort(-worth[gate.span], kind="stable")[: allowed(layout, gate, scores)[0]]
        mask[torch.from_numpy(best + gate.offset)] = True
    return mask


def _cheapest(layout: GroupLayout, price: Price, scores: np.ndarray | None = None) -> Tensor:
    """Mask of every gate at its smallest width, with its cheapest groups."""
    dense = torch.ones(layout.n_groups, dtype=torch.bool)
    scores = np.zeros(layout.n_groups) if scores is None else scores
    return _smallest(layout, scores, -price.slope(dense).numpy())
