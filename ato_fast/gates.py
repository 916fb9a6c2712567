"""Masked forward of the unmodified model, with gradients for the mask only.

Published: the feature map after the activation is multiplied channel by channel by the mask. Two
routes to that, neither of which reads, writes or saves an activation for it:

* **Fused**, in `Gates.value_and_grad`, where the traced graph has a gated batch norm whose output
  one activation reads: `masked_bn_act` computes norm, activation and gate in one pass, and norms
  without a gate go into the weights of the convolution before them (`fused.py`). The gate is where
  it is published, for every activation that op knows.
* **Affine**, everywhere else (another activation, no batch norm, models with hooks or compiled
  parts): the tensor that feeds the activation is scaled through the last affine before it, the
  norm's weight and bias or the producing layer's rows. For a positively homogeneous activation,
  ``f(w a) = w f(a)`` for ``w >= 0`` (ReLU, leaky ReLU, PReLU, identity), this is equal in value and
  gradient. For others (ReLU6, SiLU, GELU) the gate acts *before* the activation: the values at
  ``w = 1`` and ``w = 0`` need only ``f(0) = 0``; in between, and in the gradient, the two differ.

At ``w = 0`` exactly ReLU has no slope, so on the affine route a dropped group would get no gradient
and could never come back. A mask that needs a gradient is therefore lifted there from 0 to a power
of two below the rounding error of the dtype (`_FLOOR`), where the gradient is the published one.
Scaling by a power of two is exact. (In float16 the lift is 2**-12, for want of exponents; it is
chosen where autocast to float16 is on *around* the call, so enter autocast there and not inside the
function that is evaluated.)
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from .fused import Folded, Fused, Gated, Norm
from .groups import GroupLayout
from .masked import ACTIVATIONS, affines

_FLOOR = {
    torch.float64: 2.0**-60,
    torch.float32: 2.0**-30,
    torch.bfloat16: 2.0**-30,
    # The smallest normal number is 2**-14: below, activations of dropped groups lose their sign.
    torch.float16: 2.0**-12,
}

FAILED = "the masked model failed, and not with its norms and activations apart, as it stays now:"


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
        layout: its slices with ``gated=True`` say what a mask entry scales, its ``followers``
            which layers may take the fused route.

    Raises:
        ValueError: no gate, one that no slice carries, or a gated tensor that is no parameter.
    """

    def __init__(self, model: nn.Module, layout: GroupLayout) -> None:
        self.model = model
        self.layout = layout
        if not layout.gates:
            raise ValueError("layout: expected at least one gate, got none")
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
        self._index = torch.from_numpy(np.concatenate([groups for _, groups in entries]))
        self._fusable: dict[str, tuple[str, _BatchNorm, str, str]] = {}
        """By the weight of a layer: its follower, as in ``layout.followers``, and the norm of the
        two with the names of its weight and bias."""
        for weight, follower in layout.followers.items():
            affine = weight if follower in ACTIVATIONS else follower
            if _is_fusable(model, weight, follower, index):
                norm = model.get_submodule(_owner(affine))
                self._fusable[weight] = follower, norm, affine, _bias(affine)
        self.unfit: set[str] = set()
        """Those of them that were found not to be used as their graph says."""
        # Of folded weights; fresh memory costs more than what is written to it.
        self._memory: dict[str, Tensor] = {}

    def flags(self) -> list[float]:
        """For all layers that could be fused, in a fixed order: 1 if it is `unfit`, else 0."""
        return [float(name in self.unfit) for name in sorted(self._fusable)]

    def take_flags(self, flags: Sequence[float]) -> None:
        """Add the layers whose flag is not 0 to `unfit`."""
        found = zip(sorted(self._fusable), flags, strict=True)
        self.unfit.update(name for name, flag in found if flag)

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

    def _layers(
        self,
        names: Sequence[str],
        own: dict[str, Tensor],
        plain: dict[str, Tensor],
        tensors: dict[str, Tensor],
        factors: Tensor,
        memory: dict[str, Tensor],
    ) -> Iterator[Gated | Folded]:
        gates = dict(zip(self._vectors, factors.split(self._sizes), strict=False))
        norms = []
        for name in names:
            follower, norm, weight, bias = self._fusable[name]
            statistics = norm.running_mean, norm.running_var
            called = Norm(statistics, (tensors[weight], tensors.get(bias)), norm.eps)
            parts = own[weight], own.get(bias), own[name], own.get(_bias(name))
            key = name, follower, called, parts
            norms.append((key, *statistics, plain[weight], plain.get(bias), norm.eps))
        for (name, follower, called, parts), scale, shift in affines(norms):
            if name in gates:
                constants = gates[name].to(scale.dtype), scale, shift
                yield Gated(name, called, parts, follower, constants)
                continue
            weight, bias = plain[name], plain.get(_bias(name))
            shift = shift if bias is None else bias * scale + shift
            folded = memory.get(name)
            if folded is None or folded.device != weight.device or folded.dtype != weight.dtype:
                folded = memory[name] = torch.empty_like(weight)
            torch.mul(weight, scale.view(-1, *[1] * (weight.dim() - 1)), out=folded)
            yield Folded(name, called, parts, (weight, bias), (folded, shift.to(weight.dtype)))

    def _checked(self, mask: Tensor) -> Tensor:
        """The mask as floats on the model's device."""
        if tuple(mask.shape) != (self.layout.n_groups,):
            raise ValueError(
                f"mask: expected shape ({self.layout.n_groups},), one entry per group, "
                f"got {tuple(mask.shape)}"
            )
        first = next(self.model.parameters())
        mask = mask.to(first.device)
        return mask if mask.is_floating_point() else mask.to(first.dtype)

    def _lifted(self, factors: Tensor) -> Tensor:
        """The same with a slope where they are 0."""
        floor = _floor(next(self.model.parameters()))
        return factors + (factors.clamp_min(floor) - factors).detach()

    def _evaluate(self, tensors: dict[str, Tensor], fn: Callable[[nn.Module], Any]) -> Any:
        """``fn(model)`` with these parameters, in eval mode."""
        modes = [(module, module.training) for module in self.model.modules()]
        swapped = {f"model.{name}": tensors[first] for name, first in _names(self.model)}
        try:
            self.model.eval()
            # It would find tied tensors itself, but not put them back in a module of two names.
            return functional_call(_Closure(self.model, fn), swapped, (), tie_weights=False)
        finally:
            for module, training in modes:
                module.training = training

    def __call__(self, mask: Tensor, fn: Callable[[nn.Module], Any]) -> Any:
        """``fn(model)`` with the model masked and in eval mode, by the affine route.

        Differentiable with respect to ``mask`` only: parameters are detached, no ``.grad`` is
        touched, running statistics stay as they are, and the training flag of every submodule is
        what it was, also if ``fn`` raises. A backward pass after the call must not run parts of the
        model again (activation checkpointing does): it would find it without its mask. Use
        `value_and_grad` there.

        Args:
            mask: ``[n_groups]``, bool or float in [0, 1].
            fn: gets the model, returns anything.

        Raises:
            ValueError: a mask of the wrong size.
        """
        mask = self._checked(mask)
        factors = self._factors(mask)
        if mask.requires_grad and torch.is_grad_enabled():
            factors = self._lifted(factors)
        plain = {name: p.detach() for name, p in self.model.named_parameters()}
        return self._evaluate(self._scaled(plain, factors), fn)

    def value_and_grad(
        self, mask: Tensor, fn: Callable[[nn.Module], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``fn(model)`` as `__call__` has it, and its gradient with respect to the mask.

        By the fused route where that is possible. Where a model is found not to do what its graph
        says, or fails, ``fn`` is called again, with random numbers (torch, NumPy, Python) and
        attributes of modules as before, and that part of the model is `unfit` from then on.

        Args:
            mask: ``[n_groups]``, bool or float in [0, 1].
            fn: gets the model, returns a scalar tensor that depends on it.

        Returns:
            The value, detached, and the gradient, ``[n_groups]`` in the mask's dtype (the model's
            for a bool mask) on the model's device.

        Raises:
            ValueError: a mask of the wrong size, no scalar that depends on it, or inference mode.
        """
        mask = self._checked(mask).detach()
        if torch.is_inference_mode_enabled():
            raise ValueError("value_and_grad: there are no gradients under torch.inference_mode")
        while True:
            # Sorted: the same in every process.
            names = sorted(self._fusable.keys() - self.unfit) if not _watched(self.model) else []
            restore = _state(self.model, mask.device) if names else None
            failure = ""
            try:
                unfit, *outcome = self._attempt(mask, fn, names)
            except Exception as error:
                if not names:
                    raise
                failure = f"{type(error).__name__}: {error}"
            if failure:
                # Its own error comes again. (Not in the handler, which keeps tensors alive.)
                restore()
                _, *outcome = self._attempt(mask, fn, [])
                unfit = names
                warnings.warn(f"{FAILED} {failure}", stacklevel=2)
            self.unfit.update(unfit)
            if outcome:
                return tuple(outcome)
            restore()

    def _attempt(
        self, mask: Tensor, fn: Callable[[nn.Module], Tensor], names: Sequence[str]
    ) -> tuple[set[str], Tensor, Tensor] | tuple[set[str]]:
        """Value and gradient, with layers of these names fused; or those of them that are unfit."""
        (memory, self._memory), fused = (self._memory, {}), None
        try:
            with torch.enable_grad():
                leaf = mask.clone().requires_grad_()
                factors = self._lifted(self._factors(leaf))
                own = dict(self.model.named_parameters())
                plain = {name: parameter.detach() for name, parameter in own.items()}
                tensors = self._scaled(plain, factors)
                layers = self._layers(names, own, plain, tensors, factors, memory)
                fused = Fused(layers) if names else None

                def run(model: nn.Module) -> tuple:
                    value = _loss(fn(model))
                    unfit = fused.unfit(value) if fused else set()
                    if unfit:
                        return (unfit,)
                    # Here, while the model is masked: checkpointing runs parts of it again.
                    return unfit, value.detach(), _gradient(value, leaf)

                with fused or nullcontext():
                    return self._evaluate(tensors, run)
        finally:
            self._memory = memory
            if fused:
                fused.close()


def _loss(value: Any) -> Tensor:
    """``value``, checked."""
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"loss: expected a scalar tensor, got {got}")
    return value


def _gradient(value: Tensor, mask: Tensor) -> Tensor:
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, mask, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "loss: expected one with a gradient for the mask, got one that does not depend on it: "
            "under torch.no_grad or checkpoint(use_reentrant=True), detached, or without the model"
        )
    return gradient


def _names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """A name for every place that holds a parameter, and the parameter's first name."""
    first: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{name}" if prefix else name
                yield name, first.setdefault(id(parameter), name)


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _bias(weight: str) -> str:
    return f"{_owner(weight)}.bias"


def _is_fusable(
    model: nn.Module, weight: str, follower: str, index: dict[tuple[str, int], np.ndarray]
) -> bool:
    """Whether a gate scales a norm as a whole, or neither a convolution nor the norm after it."""
    gated = {tensor: groups for (tensor, _), groups in index.items()}
    folds = follower not in ACTIVATIONS
    known = dict(model.named_parameters())
    if weight not in known or (folds and follower not in known):
        return False
    norm = model.get_submodule(_owner(follower if folds else weight))
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return False
    if folds:
        return gated.keys().isdisjoint({weight, _bias(weight), follower, _bias(follower)})
    if weight not in gated or norm.bias is None:
        return weight in gated
    return np.array_equal(gated[weight], gated.get(_bias(weight)))


def _watched(model: nn.Module) -> bool:
    """Whether somebody may look between a norm and its activation, or replaces their calls."""
    return _has_any_global_hook() or any(
        hasattr(m, "_orig_mod")
        or getattr(m, "_compiled_call_impl", None) is not None
        or m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        for m in model.modules()
    )


def _state(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Restores the generators of Python, NumPy and torch, and which attributes modules have."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    attributes = [(module, dict(vars(module))) for module in model.modules()]

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)

    return restore


def _floor(parameter: Tensor) -> float:
    """The smallest gate of a mask under differentiation, for the dtype activations will have."""
    dtype, device = parameter.dtype, parameter.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _FLOOR.get(dtype, _FLOOR[torch.float32])
