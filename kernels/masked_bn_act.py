"""Triton kernels behind ``ato_fast::masked_bn_act``: ``y = gate * act(x * scale + shift)``.

Formulas and semantics as in `ato_fast.masked`; computed in fp32, cast at the store.

* x, grad, y, dx: fp32, bf16 or fp16, as they lie in memory: ``[outer, C, inner]`` with inner > 1
  (channel = row modulo C), or ``[outer, C]`` (channel = column; `LAST`).
* gate, scale, shift fp32 ``[C]``; partial float64 ``[splits, C]``: sums of ``grad * act(z)``.

Forward moves 8 bytes per fp32 element, backward 12. Sums are taken in one order that depends on
the shape alone: within a program tile by tile, then over the splits by one torch sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import register_triton
from ..masked import BACKWARD, FORWARD
from .common import load_fp32, store_rounded

TILE = 2048
"""Elements per step of a program: 8 per thread, two 16-byte loads of fp32."""
COLUMNS = 512
"""Most elements of a tile along memory, which leaves it at least 4 rows."""
STEPS = 16
"""Tiles a program sums up: partial sums then are less than 0.1 % of the traffic."""
NUM_WARPS = 8

RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
HARDSWISH = tl.constexpr(3)
SILU = tl.constexpr(4)
GELU = tl.constexpr(5)


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    """``act(z)`` and ``act'(z)``; comparisons are false for NaN, which stays NaN."""
    slope = tl.full(z.shape, 1.0, tl.float32)
    value = z
    if ACTIVATION == RELU:
        value = tl.where(z <= 0.0, 0.0, z)
        slope = tl.where(z <= 0.0, 0.0, slope)
    elif ACTIVATION == RELU6:
        value = tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))
        slope = tl.where((z <= 0.0) | (z >= 6.0), 0.0, slope)
    elif ACTIVATION == HARDSWISH:
        up = z + 3.0
        value = z * tl.where(up <= 0.0, 0.0, tl.where(up >= 6.0, 6.0, up))
        value = tl.div_rn(value, tl.full(z.shape, 6.0, tl.float32))
        slope = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, slope, z / 3.0 + 0.5))
    elif ACTIVATION == SILU:
        below = 1.0 + tl.exp(-z)
        value = tl.div_rn(z, below)
        s = tl.div_rn(tl.full(z.shape, 1.0, tl.float32), below)
        slope = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == GELU:
        normal = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * normal
        slope = normal + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    return value, slope


@triton.jit
def _affine(gate_ptr, scale_ptr, shift_ptr, channel, inside):
    """Gate, scale and shift of channels."""
    gate = tl.load(gate_ptr + channel, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=inside, other=0.0)
    return gate, scale, shift


@triton.jit
def _forward_kernel(
    x_ptr, gate_ptr, scale_ptr, shift_ptr, y_ptr, n_rows, n_columns, channels,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(n_columns, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // across * ROWS + tl.arange(0, ROWS)
    column = pid % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    if LAST:
        gate, scale, shift = _affine(gate_ptr, scale_ptr, shift_ptr, column, column < n_columns)
        gate, scale, shift = gate[None, :], scale[None, :], shift[None, :]
    else:
        gate, scale, shift = _affine(gate_ptr, scale_ptr, shift_ptr, row % channels, row < n_rows)
        gate, scale, shift = gate[:, None], scale[:, None], shift[:, None]
    at = row[:, None] * n_columns + column[None, :]
    z = load_fp32((x_ptr, None), 0, 0, at, inside) * scale + shift
    value, _ = _activated(z, ACTIVATION)
    store_rounded((y_ptr, None), 0, 0, at, gate * value, inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, gate_ptr, scale_ptr, shift_ptr, dx_ptr, partial_ptr,
    outer, channels, inner, STEPS: tl.constexpr,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = COLUMNS if LAST else ROWS
    blocks = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0).to(tl.int64)
    split = pid // blocks
    channel = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    gate, scale, shift = _affine(gate_ptr, scale_ptr, shift_ptr, channel, present)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    if LAST:
        gate, scale, shift = gate[None, :], scale[None, :], shift[None, :]
        there = present[None, :]
    else:
        gate, scale, shift = gate[:, None], scale[:, None], shift[:, None]
        there = present[:, None]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float64)
    # Tiles of a channel block: rows after rows, or one example after the other, column by column.
    across = tl.cdiv(inner, COLUMNS)
    n_tiles = tl.cdiv(outer, ROWS) if LAST else outer * across
    tile = split * STEPS
    end = tl.minimum(tile + STEPS, n_tiles)
    while tile < end:
        if LAST:
            example = tile * ROWS + row
            at = example * channels + channel[None, :]
            inside = (example < outer) & there
        else:
            place = tile % across * COLUMNS + column
            at = (tile // across * channels + channel[:, None]) * inner + place
            inside = (place < inner) & there
        z = load_fp32((x_ptr, None), 0, 0, at, inside) * scale + shift
        grad = load_fp32((grad_ptr, None), 0, 0, at, inside)
        value, slope = _activated(z, ACTIVATION)
        store_rounded((dx_ptr, None), 0, 0, at, grad * gate * slope * scale, inside)
        total += tl.where(inside, grad.to(tl.float64) * value.to(tl.float64), 0.0)
        tile += 1
    out_ptr = partial_ptr + split * channels + channel
    tl.store(out_ptr, tl.sum(total, axis=0 if LAST else 1), mask=present)


def _tile(n_columns: int) -> tuple[int, int]:
    columns = min(triton.next_power_of_2(n_columns), COLUMNS)
    return TILE // columns, columns


def masked_bn_act_triton(
    x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, inner: int, activation: int
) -> Tensor:
    """Launch the forward kernel; arguments as `ato_fast.masked.masked_bn_act_ref`."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    last = inner == 1
    n_columns = len(gate) if last else inner
    n_rows = x.numel() // n_columns
    rows, columns = _tile(n_columns)
    grid = (triton.cdiv(n_rows, rows) * triton.cdiv(n_columns, columns),)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x, gate, scale, shift, y, n_rows, n_columns, len(gate), ACTIVATION=activation,
            LAST=last, ROWS=rows, COLUMNS=columns, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def masked_bn_act_backward_triton(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    inner: int,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; arguments as `ato_fast.masked.masked_bn_act_backward_ref`."""
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(gate)
    last, channels = inner == 1, len(gate)
    outer = x.numel() // (channels * inner)
    rows, columns = _tile(channels if last else inner)
    n_tiles = triton.cdiv(outer, rows) if last else outer * triton.cdiv(inner, columns)
    splits = triton.cdiv(n_tiles, STEPS)
    partial = torch.empty(splits, channels, dtype=torch.float64, device=x.device)
    grid = (splits * triton.cdiv(channels, columns if last else rows),)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            grad, x, gate, scale, shift, dx, partial, outer, channels, inner, STEPS=STEPS,
            ACTIVATION=activation, LAST=last, ROWS=rows, COLUMNS=columns, num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return dx, partial.sum(0).to(torch.float32)


register_triton(FORWARD, masked_bn_act_triton)
register_triton(BACKWARD, masked_bn_act_backward_triton)
