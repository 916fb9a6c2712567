"""What the small network may cost, and the one deterministic mask that meets it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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

    def check(self, layout: GroupLayout, min_channels: int = 1) -> None:
        """Raise unless some mask meets the budget and the dense network does not.

        Raises:
            ValueError: below the floor (every gate at ``min_channels``), which it names; not below
                the dense network; a layout without gates.
        """
        _check_min_channels(min_channels)
        if not layout.gates:
            raise ValueError("layout: no gate, so nothing can be pruned; see layout.unprunable")
        target, dense = self.target(layout), self.cost(layout)
        if target >= dense:
            raise ValueError(
                f"budget {self.kind}={self.value}: {target} is not below the dense network's "
                f"{dense}, so there is nothing to prune"
            )
        floor = self.cost(layout, _cheapest(self, layout, min_channels))
        if floor > target:
            raise ValueError(
                f"budget {self.kind}={self.value}: {target} is out of reach; with "
                f"{min_channels} channel(s) per gate the floor is {floor} {self.kind} "
                f"({floor / dense:.1%} of the dense network's {dense})"
            )

    def freeze(
        self, layout: GroupLayout, logits: Tensor | np.ndarray, min_channels: int = 1
    ) -> Tensor:
        """The mask that keeps the best groups the budget allows; deterministic.

        Every gate keeps its ``min_channels`` best groups. The others are kept in descending order
        of logit as long as the cost stays within the target, which is what bisecting a common
        offset of all logits finds; then single groups that still fit are added in the same order,
        so that the cost is as near to the target as single channels allow, and never above it. Ties
        go to the lower index.

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
        _check_min_channels(min_channels)
        target = self.target(layout)
        order = np.argsort(-scores, kind="stable")
        mask = _best_per_gate(layout, order, min_channels)
        if self.cost(layout, mask) > target:
            # Groups of one gate may differ in cost: the best ones are too dear, the cheapest fit.
            self.check(layout, min_channels)
            mask = _cheapest(self, layout, min_channels)
        order = torch.from_numpy(order[~mask.numpy()[order]])

        def kept(k: int) -> Tensor:
            trial = mask.clone()
            trial[order[:k]] = True
            return trial

        fits, too_many = 0, len(order) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.cost(layout, kept(middle)) <= target:
                fits = middle
            else:
                too_many = middle
        mask = kept(fits)
        self._fill(layout, mask, order[fits:], target)
        return mask

    def _fill(self, layout: GroupLayout, mask: Tensor, order: Tensor, target: int) -> None:
        """Add the groups of ``order`` that still fit to ``mask``, in place.

        Costs are products of kept sizes with positive coefficients, so what a group adds only grows
        as others are kept, and its partial derivative is a lower bound of what it adds. One
        gradient therefore rules out, for good, all groups that cannot fit any more. Groups of one
        gate with the same derivative count as equal, so that one of them is tried for all.
        """
        if not len(order):
            return
        bound = _derivative(self, layout, mask)[order]
        cost = self.cost(layout, mask)
        gate_of = np.repeat(np.arange(len(layout.gates)), [gate.n for gate in layout.gates])
        gates = gate_of[order.numpy()].tolist()
        too_dear = set()
        for group, gate, least in zip(order.tolist(), gates, bound.tolist(), strict=True):
            if cost + least > target + 0.5 or (gate, least) in too_dear:
                continue
            mask[group] = True
            grown = self.cost(layout, mask)
            if grown <= target:
                cost = grown
            else:
                mask[group] = False
                too_dear.add((gate, least))


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


def _check_min_channels(min_channels: int) -> None:
    if isinstance(min_channels, bool) or not isinstance(min_channels, int) or min_channels < 1:
        raise ValueError(f"min_channels: expected an int >= 1, got {min_channels!r}")


def _derivative(budget: Budget, layout: GroupLayout, mask: Tensor) -> Tensor:
    """Partial derivative of the cost by each mask entry, float64 ``[n_groups]``."""
    soft = mask.to(torch.float64).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(budget.cost(layout, soft), soft)
    return gradient


def _best_per_gate(layout: GroupLayout, order: np.ndarray, min_channels: int) -> Tensor:
    """Mask of the first ``min_channels`` groups of every gate in ``order``."""
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    mask = torch.zeros(layout.n_groups, dtype=torch.bool)
    for gate in layout.gates:
        best = np.argsort(rank[gate.span])[:min_channels]
        mask[torch.from_numpy(best + gate.offset)] = True
    return mask


def _cheapest(budget: Budget, layout: GroupLayout, min_channels: int) -> Tensor:
    """Mask of the ``min_channels`` cheapest groups of every gate."""
    dense = torch.ones(layout.n_groups, dtype=torch.bool)
    gradient = _derivative(budget, layout, dense).numpy()
    return _best_per_gate(layout, np.argsort(gradient, kind="stable"), min_channels)
