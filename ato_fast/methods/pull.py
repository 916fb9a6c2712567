"""How strongly dropped groups are pulled to zero: a time to zero, or the published strength."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..groups import GroupLayout
from ..schedule import Schedule
from .live import stage_mask

REFRESHES = 50
"""How often the ramp looks at the groups' norms again; between two looks it is a straight line."""


class Pull:
    """Thresholds of the projection under ``fidelity="default"``.

    A dropped group that is *due* has lost its whole norm by the next cut; after the freeze the
    others have by ``zero_by``, and before it they lose the share ``schedule.pull`` of their norm.
    """

    def __init__(self, schedule: Schedule, layout: GroupLayout) -> None:
        self.schedule = schedule
        self.layout = layout
        self.due = torch.zeros(layout.n_groups, dtype=torch.bool)
        """Bool CPU, one entry per traced group: at zero by the next cut."""

    def choose(self, step: int, mask: Tensor, final: Callable[[], Tensor], logits: Tensor) -> None:
        """Say which groups are due from ``step`` on.

        Args:
            mask: what the projection may drop, bool CPU ``[n_groups]``.
            final: gives the mask that a freeze now would set.
            logits: ``[n_groups]``; the least wanted are due first.
        """
        steps = self.schedule.steps
        if step < steps.shrink_start:
            return
        span = steps.zero_by - steps.shrink_start
        progress = (self.schedule.deadline(step) - steps.shrink_start) / span
        if progress >= 1 and step >= steps.freeze:
            self.due = ~mask
        else:
            self.due = ~mask & ~stage_mask(self.layout, final(), logits, min(1.0, progress))

    def refresh(self, step: int) -> bool:
        """Whether thresholds are due to be computed again, apart from new masks and cuts."""
        steps = self.schedule.steps
        if not steps.shrink_start <= step <= steps.zero_by:
            return False
        every = max(1, (steps.zero_by - steps.shrink_start) // REFRESHES)
        return (step - steps.shrink_start) % every == 0 or step + 1 == self.schedule.deadline(step)

    def thresholds(self, step: int, norms: Tensor, due: Tensor) -> Tensor:
        """Norm that each group loses from ``step`` on, per step, if it is dropped.

        Args:
            norms: of the groups that are left, on the device.
            due: which of them are due, on the device.
        """
        steps = self.schedule.steps
        if step >= steps.zero_by:
            return torch.full_like(norms, math.inf)
        if step >= steps.freeze:
            others = norms / (steps.zero_by - step)
        else:
            n_steps = max(1, steps.freeze - steps.projection_start)
            others = norms * (self.schedule.pull / n_steps)
        return torch.where(due, norms / max(1, self.schedule.deadline(step) - step), others)


def published_share(layout: GroupLayout, mask: Tensor) -> Tensor:
    """Published weight per group: dropped groups of its gate over all dropped groups, on the CPU.

    Source: the reference code of ATO (CVPR 2024).
    """
    dropped = ~mask
    n_dropped = max(1, int(dropped.sum()))
    weights = torch.zeros(layout.n_groups)
    for gate in layout.gates:
        weights[gate.span] = float(dropped[gate.span].sum()) / n_dropped
    return weights
