"""Projections of the groups a mask drops, as plain data the step op understands.

A new projection is one dataclass here, one branch in `reference.py` and one in each kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Prox:
    """Proximal step of the group lasso (Auto-Train-Once, arXiv 2403.14729, the default there).

    A dropped group z with threshold t becomes ``z * max(0, 1 - t / sqrt(sum(z^2) + 1e-8))``.
    The published 1e-8 puts a floor of 1e-4 under the norm: a threshold below 1e-4 shrinks a group
    for ever without reaching zero.
    """

    code: ClassVar[int] = 1
    name: ClassVar[str] = "prox"

    @property
    def args(self) -> tuple[float, ...]:
        """Constants the step op takes."""
        return ()


@dataclass(frozen=True)
class HalfSpace:
    """Half-space projection with OTO's trial step (arXiv 2107.07467).

    With x the group before the step, z after the optimizer's update and t the threshold:
    ``z <- z - t * x / (norm(x) + 1e-8)``, then zero iff ``z . x < eps * norm(x)^2``.

    Args:
        eps: how much of its own direction a group must keep, in [0, 1).
    """

    eps: float = 0.0
    code: ClassVar[int] = 2
    name: ClassVar[str] = "half_space"

    def __post_init__(self) -> None:
        if not isinstance(self.eps, (int, float)) or not 0.0 <= self.eps < 1.0:
            raise ValueError(f"eps: expected a number in [0, 1), got {self.eps!r}")
        if not math.isfinite(self.eps):
            raise ValueError(f"eps: expected a finite number, got {self.eps!r}")

    @property
    def args(self) -> tuple[float, ...]:
        """Constants the step op takes."""
        return (float(self.eps),)


Projection = Prox | HalfSpace
"""Any projection; `None` stands for no projection at all."""


def check_projection(projection: object) -> Projection | None:
    """``projection`` itself.

    Raises:
        TypeError: neither a projection nor None.
    """
    if projection is None or isinstance(projection, (Prox, HalfSpace)):
        return projection
    hint = " (an instance is needed: call it)" if isinstance(projection, type) else ""
    raise TypeError(f"projection: expected Prox(), HalfSpace() or None, got {projection!r}{hint}")
