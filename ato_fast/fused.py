"""Layers put together with what follows them while a model runs, its code untouched.

The traced graph says what alone reads a layer's output (`GroupLayout.followers`). Where such a
layer is called, `Fused` returns what its follower will, and where the follower is called with that
tensor, it is already done:

* a norm with a gate, then an activation: `masked_bn_act` of the norm's input;
* a convolution, then a norm without a gate: one convolution with the norm's constants in its
  weights, which takes the norm's passes over the activations away, forward and backward.

In between the tensor is not what the model thinks it is, so nobody else may use it. That is checked
on every call. Of functions that torch shows to modes, none but the follower may get the tensor, and
it once; none at all may get what the layer is made of, which might change it or ask for its
gradient. Others (an `autograd.Function`, TorchScript, compiled code) are found in the autograd
graph: the loss has to come from what the follower returned, and not from the tensor before, which
nobody may keep. `Fused.unfit` names the layers where it is otherwise; whoever evaluates the model
then does so again without them (`gates.py`). What would not be found is a use beside the follower's
that the trace did not have, without a gradient and hidden from modes: values read through
TorchScript or DLPack, say.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .masked import KERNEL_DTYPES, masked_bn_act

CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})
METADATA = frozenset(
    {
        Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.ndim.__get__,
        Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__,
        Tensor.requires_grad.__get__, Tensor.is_cuda.__get__,
    }
)  # fmt: skip
"""Questions about a tensor that need none of its values."""


class Norm(NamedTuple):
    """A batch norm of evaluation, as it will be called."""

    statistics: tuple[Tensor, Tensor]
    """Running mean and variance."""
    affine: tuple[Tensor, Tensor | None]
    """Weight and bias, as the model will hand them over."""
    eps: float

    def called(
        self, input, running_mean, running_var, weight=None, bias=None, training=False,
        momentum=0.1, eps=1e-5,
    ) -> bool:  # fmt: skip
        """Whether a call of `torch.nn.functional.batch_norm` is of this norm."""
        mine, given = (*self.statistics, *self.affine), (running_mean, running_var, weight, bias)
        same = all(a is b for a, b in zip(mine, given, strict=True))
        return same and not training and eps == self.eps


class Gated(NamedTuple):
    """A norm with a gate, and the activation after it."""

    name: str
    """Of the weight."""
    norm: Norm
    parts: tuple[Tensor | None, ...]
    """Further tensors that it is made of."""
    activation: str
    """One of `masked.ACTIVATIONS`."""
    constants: tuple[Tensor, Tensor, Tensor]
    """Gate, scale and shift of `masked_bn_act`; float32, or float64 if the model is."""


class Folded(NamedTuple):
    """A convolution, and the norm without a gate after it."""

    name: str
    """Of the weight."""
    norm: Norm
    parts: tuple[Tensor | None, ...]
    """Further tensors that it is made of."""
    given: tuple[Tensor, Tensor | None]
    """Weight and bias, as the model will hand them over."""
    folded: tuple[Tensor, Tensor]
    """The same with the norm in them."""


class _Early:
    """A tensor that a layer returned with its follower already done."""

    def __init__(self, layer: Gated | Folded, result: Tensor, tensor: Tensor) -> None:
        self.layer = layer
        self.result: Tensor | None = result
        self.nodes = tensor.grad_fn, result.grad_fn
        self.n_followed = 0
        self.inplace = False


class Fused(TorchFunctionMode):
    """Puts layers and their followers together; see the module's text.

    Args:
        layers: those to put together.
    """

    def __init__(self, layers: Iterable[Gated | Folded]) -> None:
        super().__init__()
        self._layers: dict[int, Gated | Folded] = {}
        self._parts: dict[int, set[str]] = {}
        for layer in layers:
            given = layer.given if isinstance(layer, Folded) else layer.norm.affine
            self._layers[id(given[0])] = layer
            for part in (*given, *layer.norm.statistics, *layer.norm.affine, *layer.parts):
                if part is not None:
                    self._parts.setdefault(id(part), set()).add(layer.name)
        self._noted: set[str] = set()
        self._all: list[_Early] = []
        # By id, of the tensors that are still alive.
        self._early: dict[int, tuple[_Early, weakref.ref]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What compiled code does with these tensors is seen in the graph.
        if func in METADATA or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if self._early:
            early, _ = self._early.get(id(args[0]), (None, None)) if args else (None, None)
            if early is not None and _follows(early.layer, func, args, kwargs):
                return self._follow(early, func, args, kwargs)
            found = map(self._early.get, _ids((args, kwargs)))
            self._noted.update(entry[0].layer.name for entry in found if entry)
        result = None
        if func is F.batch_norm:
            result = self._norm(*args, **kwargs)
        elif func in CONVOLUTIONS:
            result = self._convolution(func, *args, **kwargs)
        else:
            self._note_parts(_ids((args, kwargs)))
        return func(*args, **kwargs) if result is None else result

    def unfit(self, value: Tensor) -> set[str]:
        """Names of layers that are not used as their graph says.

        Args:
            value: the loss, computed with the model.
        """
        if self._early:
            # What is garbage in a cycle is kept by nobody.
            gc.collect()
        self._noted.update(early.layer.name for early, _ in self._early.values())
        reached = _reached(value)
        for early in self._all:
            before, after = early.nodes
            kept = early.inplace or before not in reached
            if early.n_followed != 1 or not kept or after not in reached:
                self._noted.add(early.layer.name)
        self.close()
        return self._noted

    def close(self) -> None:
        """Let go of the tensors and of the graph."""
        self._early.clear()
        self._all.clear()

    def _note_parts(self, ids: Iterable[int]) -> None:
        for key in ids:
            self._noted |= self._parts.get(key, set())

    def _norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False,
        momentum=0.1, eps=1e-5,
    ) -> Tensor | None:  # fmt: skip
        if training:
            # It changes statistics that constants were made of.
            self._note_parts(map(id, (running_mean, running_var)))
        layer, x = self._layers.get(id(weight)), input
        if not isinstance(layer, Gated) or not layer.norm.called(
            x, running_mean, running_var, weight, bias, training, momentum, eps
        ):
            return None
        gate, *affine = layer.constants
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        fits = x.dim() > 1 and x.shape[1] == len(gate) and wide == gate.dtype
        if not fits or not _plain(x) or x.dtype not in (*KERNEL_DTYPES, torch.float64):
            return None
        return self._return(layer, masked_bn_act(x, gate, *affine, layer.activation))

    def _convolution(self, func, input, weight, bias=None, *args, **kwargs) -> Tensor | None:
        layer = self._layers.get(id(weight))
        # Where nothing before it has a gate, the graph would not show who uses it.
        if not isinstance(layer, Folded) or layer.given[1] is not bias or not _plain(input):
            return None
        if not input.requires_grad:
            return None
        return self._return(layer, func(input, *layer.folded, *args, **kwargs))

    def _return(self, layer: Gated | Folded, result: Tensor) -> Tensor:
        tensor = result.view_as(result)
        early, key = _Early(layer, result, tensor), id(tensor)

        def forget(_: weakref.ref) -> None:
            early.result = None
            self._early.pop(key, None)

        self._early[key] = early, weakref.ref(tensor, forget)
        self._all.append(early)
        return tensor

    def _follow(self, early: _Early, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        early.n_followed += 1
        if not torch.is_grad_enabled():
            self._noted.add(early.layer.name)
        if func is not F.batch_norm and ACTIVATIONS[func](*args[1:], **kwargs)[1]:
            # From here on the tensor is what the model thinks it is.
            early.inplace = True
            del self._early[id(args[0])]
            return args[0]
        return early.result


def _reached(value: Tensor) -> set:
    """The nodes of the autograd graph that a tensor comes from."""
    left = [] if value.grad_fn is None else [value.grad_fn]
    found = set(left)
    while left:
        for node, _ in left.pop().next_functions:
            if node is not None and node not in found:
                found.add(node)
                left.append(node)
    return found


def _follows(layer: Gated | Folded, func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call is of the layer's follower."""
    if isinstance(layer, Folded):
        return func is F.batch_norm and layer.norm.called(*args, **kwargs)
    return func in ACTIVATIONS and ACTIVATIONS[func](*args[1:], **kwargs)[0] == layer.activation


def _plain(x: Any) -> bool:
    """Whether gradients of ``x`` are taken, and as autograd takes them.

    Not in a function transform, nor where saved tensors are packed: activation checkpointing does
    so, and calls the norm again in the backward pass, which modes do not reach.
    """
    return (
        type(x) is Tensor
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and forward_ad.unpack_dual(x).tangent is None
    )


def _ids(tree: Any) -> Iterable[int]:
    """Ids of everything in nested tuples, lists and dicts."""
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from _ids(item)
    elif isinstance(tree, dict):
        yield from _ids(list(tree.values()))
    else:
        yield id(tree)


def _named(name: str, always_inplace: bool = False) -> Callable:
    return lambda inplace=False: (name, inplace or always_inplace)


def _hardtanh(min_val=-1.0, max_val=1.0, inplace=False):
    return ("relu6" if (min_val, max_val) == (0, 6) else None), inplace


def _gelu(approximate="none"):
    return ("gelu" if approximate == "none" else None), False


ACTIVATIONS: Mapping[Callable, Callable] = {
    F.relu: _named("relu"),
    torch.relu: _named("relu"),
    Tensor.relu: _named("relu"),
    torch.relu_: _named("relu", always_inplace=True),
    Tensor.relu_: _named("relu", always_inplace=True),
    F.relu6: _named("relu6"),
    F.hardtanh: _hardtanh,
    F.silu: _named("silu"),
    F.hardswish: _named("hardswish"),
    F.gelu: _gelu,
}
"""By function: what its arguments after the input say, as a name of `masked_bn_act` (None: another
activation) and whether the input becomes the result."""
