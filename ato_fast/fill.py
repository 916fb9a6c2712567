"""Filling a budget with blocks of groups: as near to the target as they allow, never above it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .groups import Gate, GroupLayout
from .price import Price

LARGEST = 1e30
"""Larger logits count as this, so that every block has a mean."""


def allowed(layout: GroupLayout, gate: Gate, scores: np.ndarray) -> list[int]:
    """Those of ``layout.widths(gate)`` that its groups with a score above -inf can fill.

    Args:
        scores: ``[n_groups]``; -inf: never kept.

    Raises:
        ValueError: none of them, naming the gate.
    """
    widths = layout.widths(gate)
    n_left = int((scores[gate.span] > -np.inf).sum())
    if n_left < widths[0]:
        raise ValueError(
            f"logits: gate {gate.name} must keep at least {widths[0]} of its {gate.n} channels, "
            f"but only {n_left} have a logit above -inf"
        )
    return [width for width in widths if width <= n_left]


@dataclass(frozen=True)
class Blocks:
    """Groups to be kept or dropped together, in the order in which they are worth keeping.

    Block ``b`` is ``groups[start[b] : start[b + 1]]``, all of gate ``gate[b]``. Any blocks of a
    gate make one of its widths, except that its ``last`` one, which has fewer groups, needs all
    others.
    """

    groups: Tensor
    start: list[int]
    gate: list[int]
    last: list[bool]

    def __len__(self) -> int:
        return len(self.gate)

    def of(self, block: int) -> Tensor:
        """The groups of one block."""
        return self.groups[self.start[block] : self.start[block + 1]]


def blocks_of(layout: GroupLayout, scores: np.ndarray, mask: Tensor) -> Blocks:
    """What may be added to ``mask``, where every gate is at its smallest width.

    Args:
        scores: float64 ``[n_groups]``, higher is more worth keeping, -inf is never kept; no NaN.
        mask: bool ``[n_groups]``.
    """
    finite = np.clip(scores, -LARGEST, LARGEST)
    pieces, means, gate_of, last = [], [], [], []
    for index, gate in enumerate(layout.gates):
        waiting = gate.offset + np.argsort(-scores[gate.span], kind="stable")
        waiting = waiting[~mask.numpy()[waiting]]
        sizes = np.diff(allowed(layout, gate, scores))
        if not len(sizes):
            continue
        starts = np.cumsum(sizes) - sizes
        waiting = waiting[: sizes.sum()]
        mean = np.add.reduceat(finite[waiting], starts) / sizes
        # Equal means may differ by rounding; a gate's blocks must stay in order.
        means.append(np.minimum.accumulate(mean))
        pieces += np.split(waiting, starts[1:])
        gate_of += [index] * len(sizes)
        last += [False] * (len(sizes) - 1) + [bool(sizes[-1] < sizes[0])]
    order = np.argsort(-np.concatenate([np.empty(0), *means]), kind="stable").tolist()
    pieces = [pieces[b] for b in order]
    return Blocks(
        groups=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *pieces])),
        start=np.cumsum([0, *(len(piece) for piece in pieces)]).tolist(),
        gate=[gate_of[b] for b in order],
        last=[last[b] for b in order],
    )


@dataclass(frozen=True)
class Fill:
    """Adds ``blocks`` to masks of ``layout`` up to a cost of ``target`` (in ``price``'s unit)."""

    layout: GroupLayout
    price: Price
    target: float
    blocks: Blocks

    def best(self, mask: Tensor) -> Tensor:
        """``mask`` with the blocks added that `Budget.freeze` keeps."""
        fits, too_many = 0, len(self.blocks) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.price.of(self.first(mask, middle)) <= self.target:
                fits = middle
            else:
                too_many = middle
        mask = self.first(mask, fits)
        self.add(mask)
        return mask

    def first(self, mask: Tensor, n: int) -> Tensor:
        """``mask`` with the first ``n`` blocks."""
        mask = mask.clone()
        mask[self.blocks.groups[: self.blocks.start[n]]] = True
        return mask

    def add(self, mask: Tensor) -> None:
        """Add the blocks that still fit to ``mask``, in place and in order.

        The price's slopes are lower bounds that hold for good, so they rule out all blocks that
        cannot fit any more. Blocks of one gate with the same bound count as equal, so that one of
        them is tried for all.
        """
        blocks, gates = self.blocks, self.layout.gates
        if not len(blocks):
            return
        cost = self.price.of(mask)
        slope = self.price.slope(mask)[blocks.groups].numpy()
        bounds = np.add.reduceat(slope, blocks.start[:-1])
        too_dear = set()
        for block in np.flatnonzero(cost + bounds <= self.target + 0.5).tolist():
            groups, gate, bound = blocks.of(block), blocks.gate[block], float(bounds[block])
            if cost + bound > self.target + 0.5 or (gate, bound) in too_dear:
                continue
            if bool(mask[groups[0]]):
                continue
            if blocks.last[block] and int((~mask[gates[gate].span]).sum()) != len(groups):
                continue
            mask[groups] = True
            grown = self.price.of(mask)
            if grown <= self.target:
                cost = grown
            else:
                mask[groups] = False
                too_dear.add((gate, bound))
