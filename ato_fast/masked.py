"""``ato_fast::masked_bn_act``: batch norm of evaluation, activation and gate in one pass.

    y = gate[c] * act(x * scale[c] + shift[c])

Published: the mask of Auto-Train-Once (arXiv 2403.14729) multiplies the feature map after the
activation. ``scale`` and ``shift`` are the norm's affine with its running statistics folded in:
``gamma / sqrt(var + eps)`` and ``beta - mean * scale``; they are constants here. Backward, with
``z = x * scale + shift``:

    dx = dy * gate * act'(z) * scale,     dgate[c] = sum over c of dy * act(z)

Forward reads x and writes y; backward reads x and dy and writes dx. Nothing but x is kept for it.
So fp32 moves 8 bytes per element forward and 12 backward.

Kernels see x as ``[outer, C, inner]``, its memory: channels_last and ``[N, C]`` have inner 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import backend

ACTIVATIONS = ("identity", "relu", "relu6", "hardswish", "silu", "gelu")
"""By code. ``gelu`` is the exact one, with erf."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels take as x; they compute in fp32. The reference takes float64 too, in float64."""
FORWARD, BACKWARD = "masked_bn_act_kernel", "masked_bn_act_backward_kernel"

_CHANNELS = "Tensor gate, Tensor scale, Tensor shift"
SCHEMAS = {
    "masked_bn_act": f"(Tensor x, {_CHANNELS}, int activation) -> Tensor",
    "masked_bn_act_backward": f"(Tensor grad, Tensor x, {_CHANNELS}, int activation) -> "
    "(Tensor, Tensor)",
    FORWARD: f"(Tensor x, {_CHANNELS}, int inner, int activation) -> Tensor",
    BACKWARD: f"(Tensor grad, Tensor x, {_CHANNELS}, int inner, int activation) -> "
    "(Tensor, Tensor)",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"ato_fast::{_name}", _schema)


def masked_bn_act(
    x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, activation: str = "relu"
) -> Tensor:
    """``gate[c] * act(x * scale[c] + shift[c])``, differentiable in x and gate.

    Args:
        x: ``[N, C, *spatial]``, fp32, bf16, fp16 or float64, contiguous or channels_last (anything
            else is copied first). Computed in fp32, rounded once.
        gate, scale, shift: ``[C]`` on x's device, fp32 (float64 with x float64).
        activation: one of `ACTIVATIONS`.

    Returns:
        y like x, in x's memory format.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown activation, a scale or
            shift that requires a gradient.
        BackendError: a forced backend cannot serve x.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if x.dim() < 2:
        raise ValueError(f"x: expected [N, C, *spatial], got shape {tuple(x.shape)}")
    if x.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    for name, value in (("gate", gate), ("scale", scale), ("shift", shift)):
        if value.shape != x.shape[1:2] or value.dtype != _wide(x) or value.device != x.device:
            raise ValueError(
                f"{name}: expected [{x.shape[1]}] of {_wide(x)} on {x.device}, "
                f"got {list(value.shape)} of {value.dtype} on {value.device}"
            )
    if any(forward_ad.unpack_dual(t).tangent is not None for t in (x, gate)):
        raise ValueError("x and gate: expected no forward-mode tangents, which are not offered")
    _refuse_gradients(scale.requires_grad, shift.requires_grad, torch.is_grad_enabled())
    return torch.ops.ato_fast.masked_bn_act(x, gate, scale, shift, ACTIVATIONS.index(activation))


def affines(
    norms: Sequence[tuple[Any, Tensor, Tensor, Tensor | None, Tensor | None, float]],
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Norms of evaluation as ``x * scale + shift``, all of them in a few operations.

    Args:
        norms: key, running mean, running variance, weight, bias, eps.

    Yields:
        Key, scale, shift; fp32, or float64 if the statistics are.
    """
    if not norms:
        return
    keys, means, variances, weights, biases, eps = zip(*norms, strict=True)
    sizes = [len(mean) for mean in means]
    double = any(mean.dtype == torch.float64 for mean in means)
    wide = torch.float64 if double else torch.float32
    mean, variance = torch.cat(means).to(wide), torch.cat(variances).to(wide)
    if len(set(eps)) == 1:
        scale = torch.rsqrt(variance + eps[0])
    else:
        scale = torch.rsqrt(
            variance
            + torch.cat(
                [m.new_full(m.shape, e, dtype=wide) for m, e in zip(means, eps, strict=True)]
            )
        )
    both = zip(means, weights, strict=True)
    scale = scale * torch.cat([torch.ones_like(m) if w is None else w for m, w in both])
    both = zip(means, biases, strict=True)
    shift = torch.cat([torch.zeros_like(m) if b is None else b for m, b in both]) - mean * scale
    yield from zip(keys, scale.split(sizes), shift.split(sizes), strict=True)


def _refuse_gradients(scale: bool, shift: bool, enabled: bool = True) -> None:
    for name, wanted in (("scale", scale), ("shift", shift)):
        if wanted and enabled:
            raise ValueError(
                f"{name}: expected a constant (batch norm in evaluation, folded), got a tensor "
                "that requires a gradient; masked_bn_act has gradients for x and gate only"
            )


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dense(x: Tensor) -> tuple[Tensor, int]:
    """x, copied if its memory is neither contiguous nor channels_last, and elements per channel."""
    if not x.is_contiguous():
        if x.movedim(1, -1).is_contiguous():
            return x, 1
        x = x.contiguous()
    return x, max(math.prod(x.shape[2:]), 1)


def _forward(x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, activation: int) -> Tensor:
    x, inner = _dense(x)
    run = backend.implementation(FORWARD, x.device, [x.dtype])
    return run(x, gate.contiguous(), scale.contiguous(), shift.contiguous(), inner, activation)


def _backward(
    grad: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, activation: int
) -> tuple[Tensor, Tensor]:
    x, inner = _dense(x)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    run = backend.implementation(BACKWARD, x.device, [x.dtype])
    return run(
        grad, x, gate.contiguous(), scale.contiguous(), shift.contiguous(), inner, activation
    )


def _forward_fake(x, gate, scale, shift, activation):
    return torch.empty_like(_dense(x)[0])


def _backward_fake(grad, x, gate, scale, shift, activation):
    return torch.empty_like(_dense(x)[0]), torch.empty_like(gate.contiguous())


def _setup(ctx, inputs, output) -> None:
    x, gate, scale, shift, ctx.activation = inputs
    _refuse_gradients(*ctx.needs_input_grad[2:4])
    ctx.save_for_backward(x, gate, scale, shift)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, dgate = torch.ops.ato_fast.masked_bn_act_backward(grad, *ctx.saved_tensors, ctx.activation)
    return dx, dgate, None, None, None


def _setup_backward(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx, of_dx: Tensor | None, of_dgate: Tensor | None):
    """Gradients of gradients, through the formulas; of any order."""
    saved, again = ctx.saved_tensors, torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that what is differentiated again keeps its history.
        variables = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
                     for t in saved[:3]]  # fmt: skip
        results = masked_bn_act_backward_ref(*variables, *saved[3:], 0, ctx.activation)
        given = [(r, g) for r, g in zip(results, (of_dx, of_dgate), strict=True) if g is not None]
        outputs, slopes = zip(*given, strict=True)
        gradients = torch.autograd.grad(
            outputs, variables, slopes, create_graph=again, materialize_grads=True
        )
    return *gradients, None, None, None


_EXPLICIT = "CompositeExplicitAutograd"
torch.library.impl("ato_fast::masked_bn_act", _EXPLICIT)(_forward)
torch.library.impl("ato_fast::masked_bn_act_backward", _EXPLICIT)(_backward)
torch.library.register_fake("ato_fast::masked_bn_act")(_forward_fake)
torch.library.register_fake("ato_fast::masked_bn_act_backward")(_backward_fake)
torch.library.register_autograd("ato_fast::masked_bn_act", _gradients, setup_context=_setup)
torch.library.register_autograd(
    "ato_fast::masked_bn_act_backward", _second_gradients, setup_context=_setup_backward
)


def activated(z: Tensor, activation: int) -> Tensor:
    """``act(z)`` by code."""
    functions = (lambda z: z, F.relu, F.relu6, F.hardswish, F.silu, F.gelu)
    return functions[activation](z)


def _slope(z: Tensor, activation: int) -> Tensor:
    """``act'(z)`` by code; at kinks as torch has it."""
    name = ACTIVATIONS[activation]
    one = torch.ones_like(z)
    if name == "relu":
        return one.masked_fill(z <= 0, 0)
    if name == "relu6":
        return one.masked_fill((z <= 0) | (z >= 6), 0)
    if name == "hardswish":
        return torch.where(z < 3, z / 3 + 0.5, one).masked_fill(z <= -3, 0)
    if name == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if name == "gelu":
        normal = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return normal + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return one


def _per_channel(x: Tensor, *values: Tensor) -> list[Tensor]:
    return [value.view(1, -1, *[1] * (x.dim() - 2)) for value in values]


def masked_bn_act_ref(
    x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, inner: int, activation: int
) -> Tensor:
    """The forward formula; ``inner`` follows from x."""
    gate, scale, shift = _per_channel(x, gate, scale, shift)
    y = gate * activated(x.to(_wide(x)) * scale + shift, activation)
    return torch.empty_like(x).copy_(y)


def masked_bn_act_backward_ref(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    inner: int,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The backward formulas: dx like x, dgate like gate."""
    gate, scale, shift = _per_channel(x, gate, scale, shift)
    z = x.to(_wide(x)) * scale + shift
    grad = grad.to(_wide(x))
    dx = grad * gate * _slope(z, activation) * scale
    dgate = (grad * activated(z, activation)).transpose(0, 1).flatten(1).sum(1)
    return torch.empty_like(x).copy_(dx), dgate


backend.register_op(FORWARD, masked_bn_act_ref, KERNEL_DTYPES)
backend.register_op(BACKWARD, masked_bn_act_backward_ref, KERNEL_DTYPES)
