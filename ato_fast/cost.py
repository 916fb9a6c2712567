"""Multiply-adds and parameters of the whole model as closed-form functions of the mask.

Every count is a sum of products of *kept sizes*: a convolution costs
``S * kept(weight, 0) * kept(weight, 1) * kH * kW`` multiply-adds, a tensor holds
``prod_d kept(tensor, d)`` parameters, and a kept size is a constant plus a weighted sum of mask
entries. The masks' products are therefore exact for 0/1 masks and differentiable for soft ones.

Unit: MACs, one multiply-add = 1. Source of ``counting="paper"``: ATO (CVPR 2024) reference code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from .groups import Coverage

if TYPE_CHECKING:
    from .groups import GroupLayout, MacTerm

COUNTINGS = ("model", "paper")


class Products:
    """``sum_t coef_t * prod_{f in factors_t} size_f(mask)``, at most two varying sizes a term.

    The sizes are ``base + weight @ mask``, float64 ``[1 + n_sizes]``; the first is the constant 1.
    """

    def __init__(
        self, layout: GroupLayout, terms: list[tuple[float, list[tuple[str, int]]]]
    ) -> None:
        sizes: dict[tuple[str, int], int] = {}
        weights: list[np.ndarray] = []
        bases: list[int] = []
        known: dict[bytes, int] = {}

        def size_index(tensor: str, dim: int) -> int:
            key = (tensor, dim)
            if key not in sizes:
                groups = layout.groups_of(tensor, dim)
                weight = np.bincount(groups[groups >= 0], minlength=layout.n_groups)
                base = int((groups < 0).sum())
                signature = np.int64(base).tobytes() + weight.tobytes()
                if signature not in known:
                    known[signature] = len(bases)
                    weights.append(weight.astype(np.float64))
                    bases.append(base)
                sizes[key] = known[signature]
            return sizes[key]

        constant = 0
        coefs, lists = [], []
        for coef, dims in terms:
            varying = []
            for tensor, dim in dims:
                if (tensor, dim) in layout.slices_of:
                    varying.append(size_index(tensor, dim))
                else:
                    coef *= layout.shapes[tensor][dim]
            if varying:
                coefs.append(coef)
                lists.append(varying)
            else:
                constant += coef
        width = max((len(x) for x in lists), default=0)
        # Size 0 is the constant 1, the neutral factor of terms with fewer varying sizes.
        table = np.zeros((len(lists), width), dtype=np.int64)
        for row, varying in zip(table, lists, strict=True):
            row[: len(varying)] = np.asarray(varying) + 1
        self.constant = constant
        self.base = torch.tensor([1, *bases], dtype=torch.float64)
        self.weight = torch.zeros(len(bases) + 1, layout.n_groups, dtype=torch.float64)
        if weights:
            self.weight[1:] = torch.from_numpy(np.stack(weights))
        self.coef = torch.tensor(coefs, dtype=torch.float64)
        self.table = torch.from_numpy(table)

    def to(self, device: torch.device) -> None:
        """Move the tables, in place."""
        if self.base.device != device:
            for name in ("base", "weight", "coef", "table"):
                setattr(self, name, getattr(self, name).to(device))

    def of_sizes(self, sizes: torch.Tensor) -> torch.Tensor:
        """Totals ``[...]`` for kept sizes ``[..., 1 + n_sizes]``, the first of which is 1."""
        return self.constant + (sizes[..., self.table].prod(dim=-1) * self.coef).sum(-1)

    def __call__(self, mask: torch.Tensor) -> torch.Tensor:
        """Total for a mask ``[n_groups]``, 0-dim float64."""
        self.to(mask.device)
        return self.of_sizes(self.base + self.weight @ mask.to(torch.float64))


class Cost:
    """MACs and parameters of a layout under a mask.

    Args:
        layout: gates and the model's multiply-add terms.
        counting: ``"model"``: multiply-adds of the whole model. ``"paper"``: what ATO publishes,
            the operations that touch a gate, plus 3 per output element of each for its
            batch norm and ReLU.

    Raises:
        ValueError: unknown ``counting``.
    """

    def __init__(self, layout: GroupLayout, counting: str = "model") -> None:
        if counting not in COUNTINGS:
            raise ValueError(f"counting: expected one of {COUNTINGS}, got {counting!r}")
        self.layout = layout
        self.counting = counting
        terms: list[tuple[float, list[tuple[str, int]]]] = []
        for term in layout.mac_terms:
            gated = any(key in layout.slices_of for key in term.dims)
            if counting == "model" or gated:
                terms.append((term.coef, list(term.dims)))
            if counting == "paper" and gated:
                terms.append((3 * term.out_per_channel, [term.dims[0]]))
        self._macs = Products(layout, terms)
        self._params = Products(
            layout,
            [
                (1, [(name, dim) for dim in range(len(layout.shapes[name]))])
                for name in layout.parameters
            ],
        )

    def products(self, kind: str) -> Products:
        """The closed form of ``"macs"`` or ``"params"``."""
        return {"macs": self._macs, "params": self._params}[kind]

    def _count(self, products: Products, mask) -> int | torch.Tensor:
        if mask is None:
            mask = torch.ones(self.layout.n_groups, dtype=torch.bool)
        mask = torch.as_tensor(mask)
        if tuple(mask.shape) != (self.layout.n_groups,):
            raise ValueError(
                f"mask: expected shape ({self.layout.n_groups},), one entry per group, "
                f"got {tuple(mask.shape)}"
            )
        total = products(mask)
        return total if mask.is_floating_point() else round(total.item())

    def macs(self, mask: torch.Tensor | np.ndarray | None = None) -> int | torch.Tensor:
        """Multiply-adds per example.

        Args:
            mask: ``[n_groups]``; ``None`` keeps everything.

        Returns:
            An int for ``None``, bool and integer masks; a 0-dim float64 tensor on the mask's
            device, differentiable, for floating ones.
        """
        return self._count(self._macs, mask)

    def params(self, mask: torch.Tensor | np.ndarray | None = None) -> int | torch.Tensor:
        """Number of parameters; arguments and return type as `macs`."""
        return self._count(self._params, mask)


def dense_macs(layout: GroupLayout, term: MacTerm) -> int:
    """Multiply-adds of one term with every channel kept."""
    return term.coef * math.prod(layout.shapes[tensor][dim] for tensor, dim in term.dims)


def gated_entries(layout: GroupLayout, tensor: str) -> int:
    """Number of entries of ``tensor`` whose index lies in a gate along some dimension."""
    shape = layout.shapes[tensor]
    outside = math.prod(int((layout.groups_of(tensor, dim) < 0).sum()) for dim in range(len(shape)))
    return math.prod(shape) - outside


def coverage(layout: GroupLayout) -> Coverage:
    """See `GroupLayout.coverage`."""
    in_gate = {key for key in layout.slices_of if (layout.groups_of(*key) >= 0).any()}
    reached = total = 0
    for term in layout.mac_terms:
        macs = dense_macs(layout, term)
        total += macs
        reached += macs * any(key in in_gate for key in term.dims)
    entries = sum(gated_entries(layout, name) for name in layout.parameters)
    size = sum(math.prod(layout.shapes[name]) for name in layout.parameters)
    return Coverage(reached / max(total, 1), entries / max(size, 1))
