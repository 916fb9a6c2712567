"""Triton kernels of the controller's noise and heads; formulas as in `ato_fast.noise`.

* features fp32 ``[L, H]``, heads fp32 ``[G, H]``, bounds int64 ``[L + 1]``; logits, uniform, mask
  and their gradients fp32 ``[G]``; state int64 ``[2]`` or None.

Forward reads ``heads`` once, backward reads it once and writes a gradient of its size. A gate's
gradient is summed by one program in the order of its groups: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import register_triton
from ..noise import BACKWARD, FORWARD, UNIFORM

BLOCK = 256
"""Numbers per program of the noise alone."""
ROWS = 8
"""Groups per step of a program: 8 KiB of heads of the published width 256."""
NUM_WARPS = 4


@triton.jit
def _uniform(index, seed, draw, state_ptr):
    """Uniform number ``index`` (int64) of a draw; fp32."""
    if state_ptr is not None:
        seed = tl.load(state_ptr)
        draw = tl.load(state_ptr + 1)
    block = index // 4
    a = block.to(tl.uint32)
    b = (block >> 32).to(tl.uint32)
    c = tl.zeros_like(a) + draw.to(tl.int64).to(tl.uint32)
    d = tl.zeros_like(a) + (draw.to(tl.int64) >> 32).to(tl.uint32)
    first = tl.zeros_like(a) + seed.to(tl.int64).to(tl.uint32)
    second = tl.zeros_like(a) + (seed.to(tl.int64) >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        low = a.to(tl.uint64) * 0xD2511F53
        high = c.to(tl.uint64) * 0xCD9E8D57
        a = (high >> 32).to(tl.uint32) ^ b ^ first
        b = high.to(tl.uint32)
        c = (low >> 32).to(tl.uint32) ^ d ^ second
        d = low.to(tl.uint32)
        first = first + tl.full(first.shape, 0x9E3779B9, tl.uint32)
        second = second + tl.full(second.shape, 0xBB67AE85, tl.uint32)
    word = index % 4
    bits = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    return ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def _gumbel(uniform):
    return -tl.log(-tl.log(uniform))


@triton.jit
def _sigmoid(x):
    below = 1.0 + tl.exp(-x)
    return tl.div_rn(tl.full(below.shape, 1.0, tl.float32), below)


@triton.jit(do_not_specialize=["seed", "draw"])
def _uniform_kernel(out_ptr, seed, draw, state_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, _uniform(i, seed, draw, state_ptr), mask=i < n)


@triton.jit(do_not_specialize=["seed", "draw"])
def _gate_mask_kernel(
    features_ptr, heads_ptr, bounds_ptr, seed, draw, state_ptr, logits_ptr, uniform_ptr, mask_ptr,
    base, temperature, n_gates, n_groups, width,
    HARD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < n_groups
    gate = tl.zeros([ROWS], dtype=tl.int64)
    bound = 1
    while bound < n_gates:
        gate += (i >= tl.load(bounds_ptr + bound)).to(tl.int64)
        bound += 1
    column = tl.arange(0, WIDTH)[None, :]
    there = inside[:, None] & (column < width)
    head = tl.load(heads_ptr + i[:, None] * width + column, mask=there, other=0.0)
    feature = tl.load(features_ptr + gate[:, None] * width + column, mask=there, other=0.0)
    logit = tl.sum(head * feature, axis=1) + base
    uniform = _uniform(i, seed, draw, state_ptr)
    noisy = logit + _gumbel(uniform)
    if HARD:
        mask = tl.where(noisy >= 0.0, 1.0, tl.where(noisy < 0.0, 0.0, noisy))
    else:
        mask = _sigmoid(noisy / temperature)
    tl.store(logits_ptr + i, logit, mask=inside)
    tl.store(uniform_ptr + i, uniform, mask=inside)
    tl.store(mask_ptr + i, mask, mask=inside)


@triton.jit
def _gate_mask_backward_kernel(
    grad_logits_ptr, grad_mask_ptr, features_ptr, heads_ptr, bounds_ptr, logits_ptr, uniform_ptr,
    d_features_ptr, d_heads_ptr, temperature, width, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    gate = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds_ptr + gate)
    end = tl.load(bounds_ptr + gate + 1)
    column = tl.arange(0, WIDTH)
    present = column < width
    feature = tl.load(features_ptr + gate * width + column, mask=present, other=0.0)
    total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    while begin < end:
        i = begin + tl.arange(0, ROWS)
        inside = i < end
        noisy = tl.load(logits_ptr + i, mask=inside, other=0.0) + _gumbel(
            tl.load(uniform_ptr + i, mask=inside, other=0.5)
        )
        soft = _sigmoid(noisy / temperature)
        grad = tl.load(grad_mask_ptr + i, mask=inside, other=0.0)
        grad = grad * soft * (1.0 - soft) / temperature
        grad += tl.load(grad_logits_ptr + i, mask=inside, other=0.0)
        at = i[:, None] * width + column[None, :]
        there = inside[:, None] & present[None, :]
        total += grad[:, None] * tl.load(heads_ptr + at, mask=there, other=0.0)
        tl.store(d_heads_ptr + at, grad[:, None] * feature[None, :], mask=there)
        begin += ROWS
    tl.store(d_features_ptr + gate * width + column, tl.sum(total, axis=0), mask=present)


def uniform_triton(like: Tensor, seed: int, draw: int, state: Tensor | None) -> Tensor:
    """Launch the noise; arguments as `ato_fast.noise.uniform_ref`."""
    out = torch.empty_like(like)
    if out.numel():
        with torch.cuda.device_of(like):
            _uniform_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                out, seed, draw, state, out.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return out


def gate_mask_triton(
    features: Tensor,
    heads: Tensor,
    bounds: Tensor,
    seed: int,
    draw: int,
    state: Tensor | None,
    base: float,
    temperature: float,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the heads; arguments as `ato_fast.noise.gate_mask_ref`."""
    n_groups, width = heads.shape
    logits, uniform, mask = (heads.new_empty(n_groups) for _ in range(3))
    with torch.cuda.device_of(heads):
        _gate_mask_kernel[(triton.cdiv(n_groups, ROWS),)](
            features, heads, bounds, seed, draw, state, logits, uniform, mask, base, temperature,
            len(features), n_groups, width, HARD=hard, ROWS=ROWS,
            WIDTH=triton.next_power_of_2(width), num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return logits, uniform, mask


def gate_mask_backward_triton(
    grad_logits: Tensor,
    grad_mask: Tensor,
    features: Tensor,
    heads: Tensor,
    bounds: Tensor,
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Launch the heads' gradient; arguments as `ato_fast.noise.gate_mask_backward_ref`."""
    d_features, d_heads = torch.empty_like(features), torch.empty_like(heads)
    width = heads.shape[1]
    with torch.cuda.device_of(heads):
        _gate_mask_backward_kernel[(len(features),)](
            grad_logits, grad_mask, features, heads, bounds, logits, uniform, d_features, d_heads,
            temperature, width, ROWS=ROWS, WIDTH=triton.next_power_of_2(width),
            num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return d_features, d_heads


register_triton(UNIFORM, uniform_triton)
register_triton(FORWARD, gate_mask_triton)
register_triton(BACKWARD, gate_mask_backward_triton)
