"""Masked forward of the unmodified model, with gradients for the mask only.

Published: the feature map after the activation is multiplied channel by channel by the mask. Two
routes to that, neither of which reads, writes or saves an activation for it:

* **Fused** (with ``fused=True``), where a batch norm with a gate runs, in evaluation:
  `masked_bn_act` computes norm, activation and gate in one pass, and norms without a gate go into
  the weights of the convolution before them (`deferred.py` says how that is found out while the
  model runs). The gate is where it is published, for every activation that op knows; for others it
  is before the activation.
* **Affine**, everywhere else (no batch norm, compiled models, no gradient wanted): the tensor that
  feeds the activation is scaled through the last affine before it, the norm's weight and bias or
  the producing layer's rows. For a positively homogeneous activation, ``f(w a) = w f(a)`` for
  ``w >= 0`` (ReLU, leaky ReLU, PReLU, identity), this is equal in value and gradient. For others
  (ReLU6, SiLU, GELU) the gate acts *before* the activation: the values at ``w = 1`` and
  ``w = 0`` need only ``f(0) = 0``; in between, and in the gradient, the two differ.

Both scale the same tensors, so a norm the fused route does not see gets the affine one.

At ``w = 0`` exactly ReLU has no slope, so on the affine route a dropped group would get no gradient
and could never come back. A mask that needs a gradient is therefore lifted there from 0 to a power
of two below the rounding error of the dtype (`_FLOOR`), where the gradient is the published one.
Scaling by a power of two is exact. (In float16 the lift is 2**-12, for want of exponents; it is
chosen where autocast to float16 is on *around* the call, so enter autocast there and not inside the
function that is evaluated.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from .deferred import Fusion, Site, computed
from .groups import GroupLayout
from .masked import affines

_FLOOR = {
    torch.float64: 2.0**-60,
    torch.float32: 2.0**-30,
    torch.bfloat16: 2.0**-30,
    # The smallest normal number is 2**-14: below, activations of dropped groups lose their sign.
    torch.float16: 2.0**-12,
}


class _Closure(nn.Module):
    """``fn(model)`` as a module, so that `functional_call` can swap the tensors of ``model``."""

    def __init__(self, model: nn.Module, fn: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model = model
        self._fn = (fn,)

    def forward(self) -> Any:
        return self._fn[0](self.model)


class Gates:
    """Evaluates functions of a model under a mask, leaving the model as it was.

    Args:
        model: the model of the layout.
        layout: its slices with ``gated=True`` say what a mask entry scales.
        fused: whether norms with a gate may take the fused route. Off by default: it takes
            operations apart while the model runs, and a model whose own `autograd.Function` runs a
            convolution or a norm (a reentrant checkpoint, an in-place function) can get wrong
            gradients from it without an error.

    Raises:
        ValueError: a gate that no slice carries, or a gated tensor that is no parameter of the
            model.
    """

    def __init__(self, model: nn.Module, layout: GroupLayout, *, fused: bool = False) -> None:
        self.model = model
        self.layout = layout
        self.fused = fused
        bare = [g.name for g in layout.gates if not any(s.gated for s in g.slices)]
        if bare:
            raise ValueError(f"layout: no slice is gated for gate {', '.join(bare)}")
        index: dict[tuple[str, int], np.ndarray] = {}
        for gate in layout.gates:
            for part in gate.slices:
                if part.gated:
                    # Entry n_groups stands for the constant 1.
                    unset = np.full(len(part.channels), layout.n_groups, dtype=np.int64)
                    groups = index.setdefault((part.tensor, part.dim), unset)
                    member = part.channels >= 0
                    groups[member] = part.channels[member] + gate.offset
        known = dict(model.named_parameters())
        unknown = sorted({tensor for tensor, _ in index} - known.keys())
        if unknown:
            raise ValueError(f"layout: gated tensors that are no parameter: {', '.join(unknown)}")
        # Vectors (norm weights, biases) first: they are scaled together in one product.
        entries = sorted(index.items(), key=lambda item: known[item[0][0]].dim() > 1)
        self._vectors = [t for (t, _), _ in entries if known[t].dim() == 1]
        self._rows = [(t, d) for (t, d), _ in entries if known[t].dim() > 1]
        self._sizes = [len(groups) for _, groups in entries]
        # Equal for vectors whose entries belong to the same groups, as a norm's weight and bias.
        seen: dict[bytes, int] = {}
        self._kinds = [seen.setdefault(groups.tobytes(), len(seen)) for _, groups in entries][
            : len(self._vectors)
        ]
        flat = np.concatenate([groups for _, groups in entries])
        self._index = torch.from_numpy(flat)
        self._norms = [
            (prefix, module)
            for prefix, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]

    def _factors(self, mask: Tensor) -> Tensor:
        """The mask's entry for every entry of the gated tensors, one after the other."""
        self._index = self._index.to(mask.device)
        return torch.cat([mask, mask.new_ones(1)]).index_select(0, self._index)

    def _scaled(self, plain: dict[str, Tensor], all_factors: Tensor) -> dict[str, Tensor]:
        """Every parameter, the gated ones times their factors."""
        factors, tensors = all_factors.split(self._sizes), dict(plain)
        if self._vectors:
            n = len(self._vectors)
            vectors = torch.cat([tensors[name] for name in self._vectors])
            scaled = vectors * torch.cat(factors[:n]).to(vectors.dtype)
            for name, vector in zip(self._vectors, scaled.split(self._sizes[:n]), strict=True):
                tensors[name] = vector.to(tensors[name].dtype)
        for (name, dim), factor in zip(self._rows, factors[len(self._vectors) :], strict=True):
            shape = [1] * tensors[name].dim()
            shape[dim] = -1
            tensors[name] = tensors[name] * factor.to(tensors[name].dtype).view(shape)
        return tensors

    def _fusion(
        self, plain: dict[str, Tensor], tensors: dict[str, Tensor], factors: Tensor, lifted: Tensor
    ) -> Fusion:
        """What the fused route has to know of gated vectors and of norms."""
        gates = zip(factors.split(self._sizes), lifted.split(self._sizes), strict=True)
        sites = {
            id(tensors[name]): Site(plain[name], *gate, kind)
            for name, gate, kind in zip(self._vectors, gates, self._kinds, strict=False)
        }
        norms = []
        for prefix, module in self._norms:
            names = [f"{prefix}.{name}" for name in ("weight", "bias")]
            statistics = (module.running_mean, module.running_var)
            given = (*statistics, *map(tensors.get, names))
            key = (*map(id, given), module.eps)
            norms.append((key, *statistics, *map(plain.get, names), module.eps))
        return Fusion(sites, {key: affine for key, *affine in affines(norms)})

    def __call__(self, mask: Tensor, fn: Callable[[nn.Module], Any]) -> Any:
        """``fn(model)`` with the model masked and in eval mode.

        Differentiable with respect to ``mask`` only: parameters are detached, no ``.grad`` is
        touched, running statistics stay as they are, and the training flag of every submodule is
        what it was, also if ``fn`` raises.

        Args:
            mask: ``[n_groups]``, bool or float in [0, 1].
            fn: gets the model, returns anything.

        Raises:
            ValueError: a mask of the wrong size.
        """
        if tuple(mask.shape) != (self.layout.n_groups,):
            raise ValueError(
                f"mask: expected shape ({self.layout.n_groups},), one entry per group, "
                f"got {tuple(mask.shape)}"
            )
        first = next(self.model.parameters())
        mask = mask.to(first.device)
        if not mask.is_floating_point():
            mask = mask.to(first.dtype)
        factors = self._factors(mask)
        differentiable = mask.requires_grad and torch.is_grad_enabled()
        lifted = factors
        if differentiable:
            lifted = factors + (factors.clamp_min(_floor(first)) - factors).detach()
        plain = {name: p.detach() for name, p in self.model.named_parameters()}
        tensors = self._scaled(plain, lifted)
        modes = [(module, module.training) for module in self.model.modules()]
        fusion = contextlib.nullcontext()
        if self.fused and differentiable and not any(_compiled(module) for module, _ in modes):
            fusion = self._fusion(plain, tensors, factors, lifted)
        swapped = {f"model.{name}": t for name, t in tensors.items()}
        try:
            self.model.eval()
            with fusion:
                result = functional_call(_Closure(self.model, fn), swapped, ())
            return computed(result)
        finally:
            for module, training in modes:
                module.training = training


def _compiled(module: nn.Module) -> bool:
    """Whether torch.compile replaced the module's calls."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _floor(parameter: Tensor) -> float:
    """The smallest gate of a mask under differentiation, for the dtype activations will have."""
    dtype, device = parameter.dtype, parameter.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _FLOOR.get(dtype, _FLOOR[torch.float32])
