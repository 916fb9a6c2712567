"""Projections of the groups a mask drops, as plain data the step op understands.

A new projection is one dataclass here, one branch in `reference.py` and one in each kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max


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
        _number("eps", self.eps, 0.0, 1.0, "in [0, 1)")

    @property
    def args(self) -> tuple[float, ...]:
        """Constants the step op takes."""
        return (float(self.eps),)


@dataclass(frozen=True)
class DHSPG:
    """Dual half-space projected gradient (OTOv2, arXiv 2303.06862).

    With x the group before the step, z after the optimizer's update and u what it moved x by
    (``x - z``, decoupled weight decay aside), the threshold t becomes, where the update would make
    the group grow (``x . u < 0``): ``clip(amplify * low, t, cap * t)`` with
    ``low = -(x . u) / norm(x)``, the least that makes the norm fall; or the middle of low and
    ``high = -norm(u)^2 * norm(x) / (x . u)``, if it exceeds high, up to which the step still
    descends. Then as `HalfSpace`. Where ``cap * t < low`` the cap wins and the group may grow.

    Args:
        eps: how much of its own direction a group must keep, in [0, 1).
        amplify: factor over low, > 0; published: 2 with SGD, 20 with Adam and AdamW.
        cap: factor over t, >= 1; published: 10 with SGD, 1000 with Adam and AdamW.
    """

    eps: float = 0.0
    amplify: float = 2.0
    cap: float = 10.0
    code: ClassVar[int] = 3
    name: ClassVar[str] = "dhspg"

    def __post_init__(self) -> None:
        _number("eps", self.eps, 0.0, 1.0, "in [0, 1)")
        _number("amplify", self.amplify, math.ulp(0.0), math.inf, "> 0")
        _number("cap", self.cap, 1.0, math.inf, ">= 1")

    @property
    def args(self) -> tuple[float, ...]:
        """Constants the step op takes."""
        return (float(self.eps), float(self.amplify), float(self.cap))


Projection = Prox | HalfSpace | DHSPG
"""Any projection; `None` stands for no projection at all."""


def check_projection(projection: object) -> Projection | None:
    """``projection`` itself.

    Raises:
        TypeError: neither a projection nor None.
    """
    if projection is None or isinstance(projection, Projection):
        return projection
    hint = " (an instance is needed: call it)" if isinstance(projection, type) else ""
    raise TypeError(
        f"projection: expected Prox(), HalfSpace(), DHSPG() or None, got {projection!r}{hint}"
    )


def check_strength(value: object, like: Tensor, name: str) -> float | Tensor:
    """``value`` as a number >= 0 or a tensor of ``like``'s shape ``[n_groups]``; inf is allowed.

    Raises:
        ValueError: another shape, a negative number or NaN, a number beyond float32. Values of a
            tensor on an accelerator are not read back.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor) and value.dim() > 0:
        if value.shape != like.shape:
            raise ValueError(
                f"{name}: expected one number or shape {tuple(like.shape)}, "
                f"got {tuple(value.shape)}"
            )
        value = value.detach()
        if value.device.type == "cpu" and not bool((value >= 0).all()):
            raise ValueError(f"{name}: expected values >= 0, got a negative one or NaN")
        return value
    if isinstance(value, Tensor):
        value = value.detach()
        if value.device.type != "cpu":
            return value.expand(like.shape)
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name}: expected a number >= 0 or a tensor, got {value!r}")
    if FLOAT32_MAX < value < math.inf:
        raise ValueError(f"{name}: expected inf or a number that float32 holds, got {value!r}")
    return float(value)


def _number(name: str, value: object, low: float, high: float, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise ValueError(f"{name}: expected a number {expected}, got {value!r}")
