"""Masked forward of the unmodified model, with gradients for the mask only.

Published: the feature map after the activation is multiplied channel by channel by the mask. Here
the tensor that feeds the activation is scaled instead, through the last affine before it (the
norm's weight and bias, or the producing layer's rows where there is no norm). For a positively
homogeneous activation, ``f(w a) = w f(a)`` for ``w >= 0`` (ReLU, leaky ReLU, PReLU, identity), both
are equal in value and gradient, and no activation-sized tensor is read, written or saved for it.

At ``w = 0`` exactly ReLU has no slope, so a dropped group would get no gradient and could never
come back. A mask that needs a gradient is therefore lifted from 0 to a power of two below the
rounding error of the dtype (`_FLOOR`), where the gradient is the published one. Scaling by a power
of two is exact. (In float16 the lift is 2**-12, for want of exponents; it is chosen where autocast
to float16 is on *around* the call, so enter autocast there and not inside the function that is
evaluated.)

Other activations (ReLU6, SiLU, GELU): the gate acts *before* the activation. Value and gradient at
``w = 1`` and the value at ``w = 0`` need only ``f(0) = 0``; in between the two differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from .groups import GroupLayout

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

    Raises:
        ValueError: a gate that no slice carries, or a gated tensor that is no parameter of the
            model.
    """

    def __init__(self, model: nn.Module, layout: GroupLayout) -> None:
        self.model = model
        self.layout = layout
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
        flat = np.concatenate([groups for _, groups in entries])
        self._index = torch.from_numpy(flat)

    def tensors(self, mask: Tensor) -> dict[str, Tensor]:
        """Every parameter of the model, detached, the gated ones scaled by ``mask``.

        Args:
            mask: ``[n_groups]`` on the model's device, values in [0, 1].
        """
        self._index = self._index.to(mask.device)
        factors = torch.cat([mask, mask.new_ones(1)]).index_select(0, self._index)
        factors = factors.split(self._sizes)
        tensors = {name: p.detach() for name, p in self.model.named_parameters()}
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
        if mask.requires_grad:
            mask = mask + (mask.clamp_min(_floor(first)) - mask).detach()
        tensors = {f"model.{name}": t for name, t in self.tensors(mask).items()}
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            return functional_call(_Closure(self.model, fn), tensors, ())
        finally:
            for module, training in modes:
                module.training = training


def _floor(parameter: Tensor) -> float:
    """The smallest gate of a mask under differentiation, for the dtype activations will have."""
    dtype, device = parameter.dtype, parameter.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _FLOOR.get(dtype, _FLOOR[torch.float32])
