"""Nearer to a target than whole blocks of groups came: other widths for two to four gates at once.

With ``round_to`` above 1 a greedy choice may stop well below a target that other widths reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from .fill import allowed
from .groups import GroupLayout
from .price import Price

NEAR = 0.005
"""Share of the target that may stay unused."""

MOST_GATES = 4
"""Gates whose widths are changed at once."""

MOST_TRIALS, LEAST_TRIALS = 200_000, 100
"""Combinations of widths tried before a gap is accepted, and what a set of gates counts at least.
Where nothing comes near that takes seconds on networks of more than a hundred gates."""


def exchange(
    layout: GroupLayout, price: Price, target: float, scores: np.ndarray, mask: Tensor
) -> Tensor:
    """``mask``, or one whose cost lies between it and ``target``.

    Gates swap blocks until the cost is `NEAR` the target: every combination of widths of two gates
    is tried, then of three, then of four. Of the combinations that come near, the one that changes
    the fewest groups is taken; where none does, the nearest one, and so on from there.

    Args:
        price: of a mask.
        target: largest cost allowed; that of ``mask`` is not above it.
        scores: ``[n_groups]``; a gate gives up its lowest and takes in its highest, never one
            of -inf.
        mask: bool ``[n_groups]``, every gate at one of ``layout.widths``.
    """
    if price.of(mask) >= (1 - NEAR) * target:
        return mask
    widths = _Widths(layout, price, scores, mask)
    if widths.all_widest():
        return mask
    together = min(2, len(layout.gates))
    while together <= min(MOST_GATES, len(layout.gates)):
        if widths.cost() >= (1 - NEAR) * target:
            break
        if not widths.improve(together, target):
            together += 1
    return widths.mask()


@dataclass
class _Widths:
    """One width per gate, and what it costs.

    ``at[g]`` is the place of gate g's width among ``widths[g]``; with it the gate keeps the first
    groups of ``order[g]`` and adds ``sizes[g][at[g]]`` to the sizes of ``price``.
    """

    layout: GroupLayout
    price: Price
    scores: np.ndarray
    start: Tensor

    def __post_init__(self) -> None:
        keep = self.start.numpy()
        self.left = MOST_TRIALS
        self.order, self.widths, self.sizes, self.at = [], [], [], []
        for gate in self.layout.gates:
            order = np.lexsort((-self.scores[gate.span], ~keep[gate.span])) + gate.offset
            widths = allowed(self.layout, gate, self.scores)
            self.order.append(order)
            self.widths.append(np.asarray(widths))
            self.sizes.append(self.price.parts(gate, order, widths))
            self.at.append(widths.index(int(keep[gate.span].sum())))

    def all_widest(self) -> bool:
        return all(at == len(w) - 1 for at, w in zip(self.at, self.widths, strict=True))

    def cost(self) -> float:
        return self.price.of_sizes(self.total()).item()

    def total(self) -> Tensor:
        return self.price.base + sum(
            sizes[at] for sizes, at in zip(self.sizes, self.at, strict=True)
        )

    def mask(self) -> Tensor:
        mask = torch.zeros(self.layout.n_groups, dtype=torch.bool)
        for order, widths, at in zip(self.order, self.widths, self.at, strict=True):
            mask[torch.from_numpy(order[: widths[at]])] = True
        return mask

    def improve(self, together: int, target: float) -> bool:
        """Change ``together`` gates; False where nothing comes nearer to the target."""
        best = None
        key = (False, self.cost(), 0)
        total = self.total()
        for chosen in self.subsets(together):
            rest = total - sum(self.sizes[g][self.at[g]] for g in chosen)
            grid = np.indices([len(self.widths[g]) for g in chosen]).reshape(together, -1)
            sizes = rest + sum(
                self.sizes[g][torch.from_numpy(index)]
                for g, index in zip(chosen, grid, strict=True)
            )
            costs = self.price.of_sizes(sizes).numpy()
            moved = sum(
                np.abs(self.widths[g][index] - self.widths[g][self.at[g]])
                for g, index in zip(chosen, grid, strict=True)
            )
            near = (costs <= target) & (costs >= (1 - NEAR) * target)
            if near.any():
                pick = int(np.where(near, moved, np.iinfo(np.int64).max).argmin())
                found = (True, -int(moved[pick]), float(costs[pick]))
            else:
                pick = int(np.where(costs <= target, costs, -1).argmax())
                found = (False, float(costs[pick]), -int(moved[pick]))
            if found > key:
                best, key = (chosen, grid[:, pick]), found
        if best is None:
            return False
        for gate, index in zip(*best, strict=True):
            self.at[gate] = int(index)
        return True

    def subsets(self, together: int) -> Iterator[tuple[int, ...]]:
        """Gates to change together, as far as the trials left allow."""
        able = [g for g, widths in enumerate(self.widths) if len(widths) > 1]
        for chosen in combinations(able, together):
            trials = math.prod(len(self.widths[g]) for g in chosen)
            trials = max(LEAST_TRIALS, trials)
            if trials <= self.left:
                self.left -= trials
                yield chosen
