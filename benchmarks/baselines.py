"""Projections as one would write them in plain PyTorch, layer by layer, after the optimizer's step.

Both compute the proximal step of Auto-Train-Once (arXiv 2403.14729): channel c of gate l, dropped
by the mask, with the norm nu over its rows in all of the gate's tensors,

    x <- x / nu * max(0, nu - lr * lam * n_l / N),     nu = sqrt(sum(x^2) + 1e-8)

where n_l of the N dropped groups are in gate l.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ato_fast import GroupLayout

NORM_EPS = 1e-8


class LayerProjection:
    """What both have in common: per gate its tensors, channels first, and the mask's part.

    Raises:
        ValueError: a channel map other than one row per channel in order.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], layout: GroupLayout) -> None:
        self._gates: list[tuple[slice, list[Tensor]]] = []
        for gate in layout.gates:
            members = []
            for part in gate.slices:
                if not part.in_group:
                    continue
                if not np.array_equal(part.channels, np.arange(gate.n)):
                    raise ValueError(f"gate {gate.name}, {part.tensor}: rows are not its channels")
                members.append(params[part.tensor].detach().movedim(part.dim, 0))
            self._gates.append((gate.span, members))
        self._work: list[tuple[Tensor, float, list[Tensor]]] = []

    def set_mask(self, keep: Tensor, lam: float) -> None:
        """``keep``: bool ``[n_groups]``, False drops; ``lam``: the published strength."""
        n_dropped = max(int((~keep).sum()), 1)
        self._work = []
        for span, members in self._gates:
            if not members:
                continue
            dropped = ~keep[span]
            share = int(dropped.sum()) / n_dropped
            self._work.append((dropped.to(members[0].device), lam * share, members))


class GatherProjection(LayerProjection):
    """As published: dropped rows are picked by a boolean mask, scaled and put back.

    On CUDA every boolean index waits for the device, as in the published code.
    """

    @torch.no_grad()
    def project(self, lr: float) -> None:
        """Shrink the dropped groups of every gate by ``lr * lam * n_l / N``."""
        for dropped, lam, members in self._work:
            if lam == 0:
                continue
            rows = [member[dropped] for member in members]
            norm = (sum(map(_squares, rows)) + NORM_EPS).sqrt()
            scale = (norm - lr * lam).clamp(min=0) / norm
            for member, picked in zip(members, rows, strict=True):
                factor = scale.view(-1, *[1] * (picked.dim() - 1))
                member[dropped] = (picked * factor).to(member.dtype)


class ScaleProjection(LayerProjection):
    """Whole tensors times one factor per channel, 1 for the kept ones: never waits for the GPU."""

    @torch.no_grad()
    def project(self, lr: float) -> None:
        """Shrink the dropped groups of every gate by ``lr * lam * n_l / N``."""
        for dropped, lam, members in self._work:
            if lam == 0:
                continue
            norm = (sum(map(_squares, members)) + NORM_EPS).sqrt()
            scale = torch.where(dropped, (norm - lr * lam).clamp(min=0) / norm, 1)
            for member in members:
                member.mul_(scale.view(-1, *[1] * (member.dim() - 1)))


def _squares(rows: Tensor) -> Tensor:
    """Sum of squares per row, float32."""
    squares = rows.float().square()
    return squares.sum(tuple(range(1, rows.dim()))) if rows.dim() > 1 else squares
