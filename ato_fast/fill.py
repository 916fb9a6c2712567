"""Filling a budget with blocks of groups: as near to the target as they allow, never above it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .groups import GroupLayout

LARGEST = 1e30
"""Infinite logits count as this, so that every block has a mean."""


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
        scores: float64 ``[n_groups]``, higher is more worth keeping; no NaN.
        mask: bool ``[n_groups]``.
    """
    scores = np.clip(scores, -LARGEST, LARGEST)
    pieces, means, gate_of, last = [], [], [], []
    for index, gate in enumerate(layout.gates):
        waiting = gate.offset + np.argsort(-scores[gate.span], kind="stable")
        waiting = waiting[~mask.numpy()[waiting]]
        sizes = np.diff(layout.widths(gate))
        if not len(sizes):
            continue
        starts = np.cumsum(sizes) - sizes
        mean = np.add.reduceat(scores[waiting], starts) / sizes
        # Equal means may differ by rounding; a gate's blocks must stay in order.
        means.append(np.minimum.accumulate(mean))
        pieces += np.split(waiting, starts[1:])
        gate_of += [index] * len(sizes)
        last += [False] * (len(sizes) - 1) + [bool(sizes[-1] < layout.round_to)]
    order = np.argsort(-np.concatenate([np.empty(0), *means]), kind="stable").tolist()
    pieces = [pieces[b] for b in order]
    return Blocks(
        groups=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *pieces])),
        start=np.cumsum([0, *(len(piece) for piece in pieces)]).tolist(),
        gate=[gate_of[b] for b in order],
        last=[last[b] for b in order],
    )


def derivative(layout: GroupLayout, kind: str, mask: Tensor) -> Tensor:
    """Partial derivative of the cost by each mask entry, float64 ``[n_groups]``."""
    soft = mask.to(torch.float64).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(getattr(layout, kind)(soft), soft)
    return gradient


@dataclass(frozen=True)
class Fill:
    """Adds ``blocks`` to masks of ``layout`` up to a cost of ``target`` (``kind``: its unit)."""

    layout: GroupLayout
    kind: str
    target: int
    blocks: Blocks

    def cost(self, mask: Tensor) -> int:
        """Cost of the whole network under ``mask``."""
        return getattr(self.layout, self.kind)(mask)

    def best(self, mask: Tensor) -> Tensor:
        """``mask`` with the blocks added that `Budget.freeze` keeps."""
        fits, too_many = 0, len(self.blocks) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.cost(self.first(mask, middle)) <= self.target:
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

        Costs are products of kept sizes with positive coefficients, so what a block adds only grows
        as others are kept, and its groups' partial derivatives sum to a lower bound of what it
        adds. One gradient therefore rules out, for good, all blocks that cannot fit any more.
        Blocks of one gate with the same bound count as equal, so that one of them is tried for all.
        """
        blocks, gates = self.blocks, self.layout.gates
        if not len(blocks):
            return
        cost = self.cost(mask)
        slope = derivative(self.layout, self.kind, mask)[blocks.groups].numpy()
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
            grown = self.cost(mask)
            if grown <= self.target:
                cost = grown
            else:
                mask[groups] = False
                too_dear.add((gate, bound))
