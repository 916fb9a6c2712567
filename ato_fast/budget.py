"""What the small network may cost, and the one deterministic mask that meets it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .exchange import exchange
from .fill import Fill, blocks_of, derivative
from .groups import GroupLayout

KINDS = ("macs", "params")


@dataclass(frozen=True)
class Budget:
    """Upper limit for the whole small network; give exactly one of the two.

    Args:
        macs: multiply-adds per example: a float in (0, 1) is a fraction of the dense network's, an
            int above 1 an absolute count.
        params: number of parameters, likewise.

    Raises:
        ValueError: none or both given, or a value out of range.
    """

    macs: float | int | None = None
    params: float | int | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"Budget: expected exactly one of macs= and params=, got {given or 'none'}"
            )
        value = self.value
        ok = (
            not isinstance(value, bool)
            and isinstance(value, (int, float))
            and (value > 1 if isinstance(value, int) else 0 < value < 1)
        )
        if not ok:
            raise ValueError(
                f"Budget({self.kind}=...): expected a fraction in (0, 1) or an int > 1, "
                f"got {value!r}"
            )

    @property
    def kind(self) -> str:
        """``"macs"`` or ``"params"``."""
        return "macs" if self.macs is not None else "params"

    @property
    def value(self) -> float | int:
        """The number given."""
        return self.macs if self.macs is not None else self.params

    def cost(self, layout: GroupLayout, mask: Tensor | None = None) -> int | Tensor:
        """Cost of the whole network under ``mask`` in this budget's unit, as `GroupLayout.macs`."""
        return getattr(layout, self.kind)(mask)

    def target(self, layout: GroupLayout) -> int:
        """Largest cost the small network may have."""
        if isinstance(self.value, int):
            return self.value
        return int(self.value * self.cost(layout))

    def check(self, layout: GroupLayout) -> None:
        """Raise unless some mask meets the budget and the dense network does not.

        Raises:
            ValueError: below the floor (every gate at the smallest of its ``layout.widths``), which
                it names; not below the dense network; a layout without gates.
        """
        if not layout.gates:
            raise ValueError("layout: no gate, so nothing can be pruned; see layout.unprunable")
        target, dense = self.target(layout), self.cost(layout)
        if target >= dense:
            raise ValueError(
                f"budget {self.kind}={self.value}: {target} is not below the dense network's "
                f"{dense}, so there is nothing to prune"
            )
        lowest = floor(layout, self.kind)
        if lowest > target:
            steps = f" in multiples of {layout.round_to}" if layout.round_to > 1 else ""
            raise ValueError(
                f"budget {self.kind}={self.value}: {target} is out of reach; with "
                f"{layout.min_channels} channel(s) per gate{steps} the floor is {lowest} "
                f"{self.kind} ({lowest / dense:.1%} of the dense network's {dense})"
            )

    def freeze(self, layout: GroupLayout, logits: Tensor | np.ndarray) -> Tensor:
        """The mask that keeps the best groups the budget allows; deterministic.

        Every gate keeps one of its ``layout.widths``. It starts from the smallest, with its best
        groups; the others wait in blocks that lead from one width to the next, best groups first
        (with ``round_to`` 1 a block is one group). Blocks are kept in descending order of their
        mean logit as long as the cost stays within the target, which is what bisecting a common
        offset of all logits finds; then single blocks that still fit are added in the same order.
        Blocks of several groups may leave a gap: `exchange` looks for widths that leave less.
        The cost is never above the target. Ties go to the lower index.

        Args:
            logits: ``[n_groups]``, higher is more worth keeping.

        Returns:
            Bool CPU tensor ``[n_groups]``, True keeps.

        Raises:
            ValueError: logits of the wrong size or NaN, or a budget out of reach.
        """
        scores = torch.as_tensor(logits).detach().to("cpu", torch.float64).numpy()
        if scores.shape != (layout.n_groups,):
            raise ValueError(
                f"logits: expected shape ({layout.n_groups},), one entry per group, "
                f"got {scores.shape}"
            )
        if np.isnan(scores).any():
            raise ValueError(f"logits: {int(np.isnan(scores).sum())} of {scores.size} are NaN")
        target = self.target(layout)
        mask = _smallest(layout, np.argsort(-scores, kind="stable"))
        if self.cost(layout, mask) > target:
            # Groups of one gate may differ in cost: the best ones are too dear, the cheapest fit.
            self.check(layout)
            mask = _cheapest(layout, self.kind)
        mask = Fill(layout, self.kind, target, blocks_of(layout, scores, mask)).best(mask)
        if layout.round_to > 1:
            mask = exchange(layout, self.kind, target, scores, mask)
        return mask


def floor(layout: GroupLayout, kind: str) -> int:
    """Smallest cost of any mask that keeps to ``layout.widths``; ``kind`` as `Budget.kind`."""
    return getattr(layout, kind)(_cheapest(layout, kind) if layout.gates else None)


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


def _smallest(layout: GroupLayout, order: np.ndarray) -> Tensor:
    """Mask of every gate at its smallest width: the groups of it that come first in ``order``."""
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    mask = torch.zeros(layout.n_groups, dtype=torch.bool)
    for gate in layout.gates:
        best = np.argsort(rank[gate.span])[: layout.widths(gate)[0]]
        mask[torch.from_numpy(best + gate.offset)] = True
    return mask


def _cheapest(layout: GroupLayout, kind: str) -> Tensor:
    """Mask of every gate at its smallest width, with its cheapest groups."""
    dense = torch.ones(layout.n_groups, dtype=torch.bool)
    gradient = derivative(layout, kind, dense).numpy()
    return _smallest(layout, np.argsort(gradient, kind="stable"))
