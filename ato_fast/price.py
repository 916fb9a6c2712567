"""What a mask costs, in the form that `fill` and `exchange` search in."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .groups import Gate, GroupLayout


class Price(Protocol):
    """Cost of the whole network under a mask; it never falls as more groups are kept.

    It is a function of sizes to which every gate adds its part:
    ``of_sizes(base + sum_g parts(gate g))``.
    """

    @property
    def base(self) -> Tensor:
        """The sizes without any gate, float64 ``[n_sizes]``."""

    def parts(self, gate: Gate, order: np.ndarray, widths: list[int]) -> Tensor:
        """What ``gate`` adds where it keeps the first ``widths[i]`` of its groups ``order``.

        Float64 ``[n_widths, n_sizes]``; ``order`` are places in the flat mask.
        """

    def of_sizes(self, sizes: Tensor) -> Tensor:
        """Costs ``[...]`` for sizes ``[..., n_sizes]``."""

    def of(self, mask: Tensor) -> float:
        """Cost under a bool mask ``[n_groups]``."""

    def slope(self, mask: Tensor) -> Tensor:
        """Float64 ``[n_groups]``; its sum over some groups is never above what adding them to
        ``mask`` costs, now or once more is kept."""


class Counted:
    """The `Price` in MACs or parameters: a whole number.

    Args:
        layout: its gates and counts.
        kind: ``"macs"`` or ``"params"``.
    """

    def __init__(self, layout: GroupLayout, kind: str) -> None:
        self._products = layout.cost.products(kind)
        self._products.to(torch.device("cpu"))
        self._count = getattr(layout, kind)

    @property
    def base(self) -> Tensor:
        """See `Price`."""
        return self._products.base

    def parts(self, gate: Gate, order: np.ndarray, widths: list[int]) -> Tensor:
        """See `Price`."""
        grown = self._products.weight[:, torch.from_numpy(order)].cumsum(dim=1)
        return grown[:, torch.tensor(widths) - 1].T

    def of_sizes(self, sizes: Tensor) -> Tensor:
        """See `Price`."""
        return self._products.of_sizes(sizes).round()

    def of(self, mask: Tensor) -> int:
        """See `Price`."""
        return self._count(mask)

    def slope(self, mask: Tensor) -> Tensor:
        """Partial derivatives: costs are products of kept sizes with positive coefficients."""
        soft = mask.to(torch.float64).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._count(soft), soft)
        return gradient
