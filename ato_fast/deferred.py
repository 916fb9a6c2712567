"""Convolution, batch norm and activation put together while a model runs, its code untouched.

Inside a `Fusion`, a convolution and a batch norm of evaluation return a `Deferred`: a tensor that
is not computed yet. What is called next decides how it is:

* batch norm with a gate, then an activation `masked_bn_act` knows: one pass, the gate *after* the
  activation, as published;
* batch norm with a gate, then anything else: the same with the identity;
* convolution, then batch norm without a gate: one convolution with the norm's constants in its
  weights, which takes the norm's passes over the activations away, forward and backward;
* anything else: as the model says.

A call that is not one of these computes what is pending first, so operations run in the order the
model calls them, and every tensor a hook, an operator or a method gets is the real one. Code that
torch does not show to modes (an `autograd.Function`) gets the right values and gradients through
`_Link`; compiled functions are left alone.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .masked import affines, masked_bn_act

CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})
METADATA = frozenset(
    {
        Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.ndim.__get__,
        Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__,
        Tensor.requires_grad.__get__, Tensor.is_cuda.__get__,
    }
)  # fmt: skip
"""Questions about a tensor that need none of its values."""


class Site(NamedTuple):
    """A gated vector of a batch norm: its weight or its bias."""

    plain: Tensor
    """As the model has it."""
    gate: Tensor
    """The mask, one entry per channel."""
    lifted: Tensor
    """The same for a gate before the activation (`gates.py`)."""
    groups: int
    """Equal for two vectors if all their entries belong to the same groups."""


class _Pending:
    """What a `Deferred` stands for."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.value: Tensor | None = None
        self.owner: Callable[[], Tensor | None] = lambda: None
        self.grad = torch.is_grad_enabled()
        self.autocast = _autocast(device.type)

    def result(self) -> Tensor:
        """The tensor itself, as if computed where it was deferred."""
        if self.value is None:
            self.value = self.run(self.compute)
        return self.value

    def run(self, compute: Callable[..., Tensor], *args: Any) -> Tensor:
        """Call with the modes of the moment of deferral."""
        kind, dtype, enabled = self.autocast
        if self.grad == torch.is_grad_enabled() and self.autocast == _autocast(kind):
            return compute(*args)
        with (
            torch.set_grad_enabled(self.grad),
            torch.autocast(kind, dtype=dtype, enabled=enabled),
        ):
            return compute(*args)

    def compute(self) -> Tensor:
        raise NotImplementedError


def _autocast(kind: str) -> tuple[str, torch.dtype, bool]:
    """Device type, dtype, and whether it is on."""
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


class _Convolution(_Pending):
    """``function(x, weight, bias, stride, padding, dilation, groups)``."""

    def __init__(self, function: Callable, x: Tensor, weight: Tensor, bias: Tensor | None,
                 *options: Any) -> None:  # fmt: skip
        super().__init__(x.device)
        self.function, self.x, self.weight, self.bias = function, x, weight, bias
        self.options = options
        self.shape = self._shape()
        _, dtype, enabled = self.autocast
        self.dtype = dtype if enabled and x.dtype != torch.float64 else x.dtype

    def compute(self) -> Tensor:
        return self.function(self.x, self.weight, self.bias, *self.options)

    def folded(self, scale: Tensor, shift: Tensor) -> Tensor:
        """The convolution, then ``* scale + shift`` per channel."""
        weight = self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1))
        bias = shift if self.bias is None else self.bias * scale + shift
        dtype = self.weight.dtype
        return self.function(self.x, weight.to(dtype), bias.to(dtype), *self.options)

    def _shape(self) -> tuple[int, ...]:
        stride, padding, dilation, _ = self.options
        sizes, kernel = self.x.shape[2:], self.weight.shape[2:]
        out = tuple(sizes)
        if padding != "same":
            n = len(sizes)
            padding = _each(0 if padding == "valid" else padding, n)
            steps = zip(sizes, kernel, _each(stride, n), padding, _each(dilation, n), strict=True)
            out = tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in steps)
        return (self.x.shape[0], self.weight.shape[0], *out)


class _Norm(_Pending):
    """Batch norm with running statistics, and perhaps a gate."""

    def __init__(self, source: Tensor | _Convolution, affine: tuple[Tensor, Tensor],
                 site: Site | None, plain: Callable[[Tensor], Tensor]) -> None:  # fmt: skip
        super().__init__(source.device)
        self.source, self.affine, self.site, self.plain = source, affine, site, plain
        self.shape, self.dtype = source.shape, source.dtype

    @property
    def x(self) -> Tensor:
        """The input."""
        return self.source if isinstance(self.source, Tensor) else self.source.result()

    def compute(self) -> Tensor:
        if self.site is not None:
            return self.activated("identity", self.site.lifted)
        source = self.source
        # Somebody who still holds the convolution's own result may want it; and where the weights
        # are more than the activations, two passes over the weights cost more than they save.
        if (
            isinstance(source, _Convolution)
            and source.value is None
            and source.owner() is None
            and source.weight.numel() <= math.prod(source.shape)
        ):
            return source.folded(*self.affine)
        return self.plain(self.x)

    def activated(self, activation: str, gate: Tensor) -> Tensor:
        """``gate`` times the activation of the norm."""
        x = self.x
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale, shift = self.affine
        return masked_bn_act(x, gate.to(dtype), scale.to(dtype), shift.to(dtype), activation)


class _Link(torch.autograd.Function):
    """Makes a `Deferred` a result of its sources, for whoever uses it unseen."""

    @staticmethod
    def forward(ctx, pending, *sources):
        ctx.pending, ctx.sources = pending, sources
        return Deferred(pending)

    @staticmethod
    def backward(ctx, grad):
        wanted = [source for source in ctx.sources if source.requires_grad]
        found = iter(
            torch.autograd.grad(
                ctx.pending.result(), wanted, grad, retain_graph=True, allow_unused=True
            )
        )
        return None, *(next(found) if s.requires_grad else None for s in ctx.sources)


class Deferred(Tensor):
    """A tensor that is computed when its values are asked for."""

    pending: _Pending

    @staticmethod
    def __new__(cls, pending):
        """Shape, dtype and device of what is pending; no memory."""
        made = Tensor._make_wrapper_subclass(
            cls, pending.shape, dtype=pending.dtype, device=pending.device
        )
        made.pending = pending
        return made

    def dim(self) -> int:
        """As any tensor's; norms ask for it on every call."""
        return len(self.pending.shape)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Outside a `Fusion`, or from it: with the values."""
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*computed(args), **computed(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Below autograd, for whoever went past `__torch_function__`."""
        return func(*_raw(args), **_raw(kwargs or {}))


def computed(value: Any) -> Any:
    """``value`` with every `Deferred` in nested tuples, lists and dicts replaced by its result."""
    return _mapped(value, lambda tensor: tensor.pending.result())


def _raw(value: Any) -> Any:
    # Not `result`: what is computed below autograd has no gradient, so it must not be kept.
    return _mapped(value, lambda tensor: tensor.pending.run(tensor.pending.compute).detach())


def _mapped(value: Any, of: Callable[[Deferred], Tensor]) -> Any:
    if isinstance(value, Deferred):
        return of(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, of) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, of) for key, item in value.items()}
    return value


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


class Fusion(TorchFunctionMode):
    """Puts operations together as the module's text says.

    Args:
        sites: by ``id`` of the tensor that the model is given in place of a gated weight or bias
            of a norm. The caller keeps these tensors alive.
        affines: scale and shift of norms, by the ids of mean, variance, weight and bias as the
            model is given them, and eps. Others are computed when they are met.
    """

    def __init__(
        self, sites: Mapping[int, Site], affines: Mapping[tuple, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.sites, self.affines = sites, affines
        self._latest: Callable[[], Deferred | None] = lambda: None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Defer a call, or compute what is pending and make it."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func in METADATA:
            return func(*args, **kwargs)
        if func is F.batch_norm:
            made = self._norm(*args, **kwargs)
        elif func in ACTIVATIONS and Deferred in types:
            made = self._activation(func, *args, **kwargs)
        else:
            made = None
        if made is not None:
            return made
        self.flush()
        if Deferred in types:
            args, kwargs = computed(args), computed(kwargs)
        if func in CONVOLUTIONS:
            made = self._convolution(func, *args, **kwargs)
        return func(*args, **kwargs) if made is None else made

    def __exit__(self, *exception):
        """Compute what is still pending, with the tensors of this call."""
        super().__exit__(*exception)
        if exception[0] is None:
            self.flush()

    def flush(self) -> None:
        """Compute what is pending and can still be asked for."""
        latest = self._latest()
        if latest is not None:
            latest.pending.result()
        self._latest = lambda: None

    def _defer(self, pending: _Pending, *sources: Tensor | None) -> Tensor:
        made = _Link.apply(pending, *(s for s in sources if s is not None))
        pending.owner = self._latest = weakref.ref(made)
        return made

    def _convolution(
        self, func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
    ):
        if input.dim() != weight.dim():
            return None
        made = _Convolution(func, input, weight, bias, stride, padding, dilation, groups)
        if min(made.shape[1:]) < 1:
            # Not for us to complain.
            return None
        return self._defer(made, input, weight, bias)

    def _norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False,
        momentum=0.1, eps=1e-5,
    ):  # fmt: skip
        pending = input.pending if isinstance(input, Deferred) else None
        waits = isinstance(pending, _Convolution) and pending.value is None
        if not (waits and self._latest() is input):
            self.flush()
            waits = False
        of_weight, of_bias = self.sites.get(id(weight)), self.sites.get(id(bias))
        gated = of_weight is not None and (
            bias is None or (of_bias is not None and of_bias.groups == of_weight.groups)
        )
        learns = any(t is not None and t.requires_grad for t in (weight, bias)) and not gated
        if training or running_mean is None or running_var is None or learns:
            return None
        if not (gated or waits):
            return None
        source = pending if waits else computed(input)
        affine = self.affines.get((id(running_mean), id(running_var), id(weight), id(bias), eps))
        if affine is None:
            given = (of_weight.plain, of_bias and of_bias.plain) if gated else (weight, bias)
            ((_, *affine),) = affines([(None, running_mean, running_var, *given, eps)])
        made = _Norm(
            source,
            affine,
            of_weight if gated else None,
            lambda x: F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps),
        )
        inputs = (source,) if not waits else (pending.x, pending.weight, pending.bias)
        return self._defer(made, *inputs, of_weight.lifted if gated else None)

    def _activation(self, func, input, *args, **kwargs):
        pending = input.pending if isinstance(input, Deferred) else None
        if not isinstance(pending, _Norm) or pending.site is None or pending.value is not None:
            return None
        name, inplace = ACTIVATIONS[func](*args, **kwargs)
        if name is None or self._latest() is not input:
            return None
        made = pending.run(pending.activated, name, pending.site.gate)
        if inplace:
            pending.value = made
        self._latest = lambda: None
        return made


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
