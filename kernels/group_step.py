"""Triton kernel of ``ato_fast::group_step_``: one optimizer step and its projection, fused.

With x an element before the step and z after the optimizer's update (SGD, momentum, Nesterov, Adam
or AdamW as torch.optim; see coefficients.py), a dropped group becomes ``scale * z - pull * x``:

* prox (ATO, arXiv 2403.14729, section 3): ``scale = max(0, 1 - t / sqrt(sum(z^2) + 1e-8))``;
* half-space (OTO, arXiv 2107.07467): ``pull = t / (norm(x) + 1e-8)``, then ``scale = 0`` iff
  ``z . x - pull * norm(x)^2 < eps * norm(x)^2``, else 1;
* DHSPG (OTOv2, arXiv 2303.06862): chooses t between the pull that makes the norm fall and the one
  up to which the step still descends, then as half-space;

with ``t = lr * strength + threshold``. At scale 0 the group and its states become exactly 0, and a
group that was zero stays so. The arithmetic is that of csrc/group_step.h, operation by operation.

* params: one or two flat buffers, fp32 and bf16, computed in fp32 and rounded once when written;
  first, second: fp32 buffers like them, or none; step fp32 ``[n_tensors]``.
* grads: one per row of ``tensors``, of the parameter's dtype and memory order; empty where missing.
* segments int64 ``[n_segments, 8]``, bundles int64 ``[n_bundles, 5]``, blocks int64
  ``[n_blocks, 3]``: see `ato_fast.plan`; one program per row of ``blocks``.
* mask bool, strength and threshold fp32 ``[n_groups]``; lr, grad_scale and found_inf: fp32 scalars
  on the device. Nothing is read back to the host.

Bytes per kept fp32 element, each stream read and written once: SGD 12, momentum 20, Adam and AdamW
28; with bf16 parameters 6, 14 and 22. A dropped group is read twice, the second time mostly from
the caches, or only written the second time if it becomes zero. Of a group that is zero 4 bytes are
read and 4, 8 or 12 written.

Deterministic: a group belongs to one program, which adds its segments in order and its lanes in one
fixed tree, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ato_fast.backend import register_triton
from ato_fast.reference import SGD as SGD_CODE

from .coefficients import STRIDE, launch_coefficients, learning_rate
from .common import (
    CHANNELS,
    OPTIONS,
    block_size,
    channel_sum,
    check_params,
    check_scalar,
    device_tables,
    elements,
    gradient_addresses,
    load_fp32,
    load_gradient,
    only_if,
    places,
    pointer_pair,
    select_buffer,
    store_rounded,
)

# Rules: one per set of states that is read and written.
SGD = tl.constexpr(0)
MOMENTUM = tl.constexpr(1)
ADAM = tl.constexpr(2)
# Values of the op's `projection`; 2 is the half-space.
NO_PROJECTION = tl.constexpr(0)
PROX = tl.constexpr(1)
DHSPG = tl.constexpr(3)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _updated(x, g, m, v, c, RULE: tl.constexpr):
    """New x, m and v of an element, and what moved x, decoupled decay aside.

    ``c`` are the coefficients of its tensor.
    """
    unscale, l2, decay, keep1, add1, keep2, add2, rate, correction, eps, direct, through = c
    g = g * unscale + l2 * x
    if RULE == SGD:
        u = rate * g
        z = x - u
    else:
        m = keep1 * m + add1 * g
        if RULE == MOMENTUM:
            u = rate * tl.where(through != 0.0, direct * g + through * m, g)
            z = x - u
        else:
            v = keep2 * v + add2 * g * g
            u = rate * tl.div_rn(m, tl.sqrt_rn(v) * correction + eps)
            z = decay * x - u
    return z, m, v, u


@triton.jit
def _sweep(
    params, first, second, tables, channel, place, visited, projected, dead, scale, pull,
    RULE: tl.constexpr, PROJECTION: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Walk the ``visited`` channels, to add up their sums or to write them.

    Of these ``[ROWS]`` the ``projected`` become ``scale * z - pull * x``, the ``dead`` 0.
    Returns the lanes' sums xx, zz, zx, xu and uu, as far as the projection needs them.
    """
    bundle_ptr, segments_ptr, coefficients_ptr, addresses_ptr = tables
    visited, projected = visited[None, :, None], projected[None, :, None]
    dead, scale, pull = dead[None, :, None], scale[None, :, None], pull[None, :, None]
    xx = tl.full(place[1].shape, 0.0, tl.float64)
    zz = tl.full(place[1].shape, 0.0, tl.float64)
    zx = tl.full(place[1].shape, 0.0, tl.float64)
    xu = tl.full(place[1].shape, 0.0, tl.float64)
    uu = tl.full(place[1].shape, 0.0, tl.float64)
    # Not `for`: the interpreter of triton 3.6 cannot take loaded bounds with numpy 2.4.
    k = tl.load(bundle_ptr)
    end = tl.load(bundle_ptr + 1)
    while k < end:
        segment_ptr = segments_ptr + k * 8
        tensor = tl.load(segment_ptr)
        buffer = tl.load(segment_ptr + 1)
        start = tl.load(segment_ptr + 3)
        grad_start = tl.load(segment_ptr + 4)
        inner = tl.load(segment_ptr + 5)
        outer = tl.load(segment_ptr + 6)
        stride = tl.load(segment_ptr + 7)
        c_ptr = coefficients_ptr + tensor * STRIDE
        through = tl.load(c_ptr + 11)
        c = (
            tl.load(c_ptr), tl.load(c_ptr + 1), tl.load(c_ptr + 2), tl.load(c_ptr + 3),
            tl.load(c_ptr + 4), tl.load(c_ptr + 5), tl.load(c_ptr + 6), tl.load(c_ptr + 7),
            tl.load(c_ptr + 8), tl.load(c_ptr + 9), tl.load(c_ptr + 10), through,
        )  # fmt: skip
        # A missing gradient: neither update nor decay, z is x.
        address = tl.load(addresses_ptr + tensor)
        has_state = address
        if RULE == MOMENTUM:
            has_state = tl.where(through != 0.0, address, 0)
        if RULE != SGD:
            first_ptr = select_buffer(first, buffer)
        if RULE == ADAM:
            second_ptr = select_buffer(second, buffer)
        shift = channel * inner
        begin = tl.cast(0, tl.int64)
        while begin < inner * outer:
            base, distance, inside, reach = elements(begin, place, inner, outer, stride)
            inside &= visited
            at, grad_at = start + shift + base, grad_start + shift + base
            # What becomes zero needs no reading.
            alive = inside & ~dead
            moves = only_if(address, alive)
            keeps_state = only_if(has_state, alive)
            x = load_fp32(params, buffer, at, distance, alive)
            g = load_gradient(params, address, buffer, grad_at, distance, moves)
            m = tl.full(place[1].shape, 0.0, tl.float32)
            v = tl.full(place[1].shape, 0.0, tl.float32)
            if RULE != SGD:
                m = tl.load(first_ptr + at + distance, mask=keeps_state, other=0.0)
            if RULE == ADAM:
                v = tl.load(second_ptr + at + distance, mask=keeps_state, other=0.0)
            z, m, v, u = _updated(x, g, m, v, c, RULE)
            z = tl.where(moves, z, x)
            if WRITE:
                if PROJECTION != NO_PROJECTION:
                    value = scale * z
                    if PROJECTION != PROX:
                        value = tl.where(pull == 0.0, value, value - pull * x)
                    z = tl.where(projected, tl.where(dead, 0.0, value), z)
                written = moves | (inside & projected)
                store_rounded(params, buffer, at, distance, z, written)
                written = keeps_state | (inside & dead)
                if RULE != SGD:
                    m = tl.where(dead, 0.0, m)
                    tl.store(first_ptr + at + distance, m, mask=written)
                if RULE == ADAM:
                    v = tl.where(dead, 0.0, v)
                    tl.store(second_ptr + at + distance, v, mask=written)
            else:
                before, after = x.to(tl.float64), z.to(tl.float64)
                xx = tl.fma(before, before, xx)
                if PROJECTION == PROX:
                    zz = tl.fma(after, after, zz)
                else:
                    zx = tl.fma(after, before, zx)
                if PROJECTION == DHSPG:
                    u = tl.where(moves, u, 0.0).to(tl.float64)
                    xu = tl.fma(before, u, xu)
                    uu = tl.fma(u, u, uu)
            begin += reach
        k += 1
    return xx, zz, zx, xu, uu


@triton.jit
def _count_nonzero(params, tables, channel, place, visited):
    """Elements other than 0 per channel; NaN counts."""
    bundle_ptr, segments_ptr, _, _ = tables
    count = tl.full(place[1].shape, 0, tl.int32)
    k = tl.load(bundle_ptr)
    end = tl.load(bundle_ptr + 1)
    while k < end:
        segment_ptr = segments_ptr + k * 8
        buffer = tl.load(segment_ptr + 1)
        inner = tl.load(segment_ptr + 5)
        outer = tl.load(segment_ptr + 6)
        stride = tl.load(segment_ptr + 7)
        shift = tl.load(segment_ptr + 3) + channel * inner
        begin = tl.cast(0, tl.int64)
        while begin < inner * outer:
            base, distance, inside, reach = elements(begin, place, inner, outer, stride)
            x = load_fp32(params, buffer, shift + base, distance, inside & visited[None, :, None])
            count += (x != 0.0).to(tl.int32)
            begin += reach
        k += 1
    return channel_sum(count, place)


@triton.jit
def _larger(a, b):
    """fmax: a NaN yields to the other."""
    return tl.where((a >= b) | (b != b), a, b)


@triton.jit
def _smaller(a, b):
    return tl.where((a <= b) | (b != b), a, b)


@triton.jit
def _decide(sums, place, threshold, constants_ptr, PROJECTION: tl.constexpr):
    """Scale and pull per channel. Written so that NaN stays in the group."""
    xx = channel_sum(sums[0], place)
    if PROJECTION == PROX:
        length = tl.sqrt(channel_sum(sums[1], place) + 1e-8)
        scale = tl.where(threshold >= length, 0.0, 1.0 - threshold / length)
        pull = tl.zeros_like(xx)
    else:
        zx = channel_sum(sums[2], place)
        hard = threshold == INFINITY
        norm = tl.sqrt(xx)
        eps = tl.load(constants_ptr)
        if PROJECTION == DHSPG:
            xu, uu = channel_sum(sums[3], place), channel_sum(sums[4], place)
            low = -xu / norm
            high = -uu * norm / xu
            amplified = tl.load(constants_ptr + 1) * low
            capped = tl.load(constants_ptr + 2) * threshold
            wanted = _smaller(_larger(amplified, threshold), capped)
            wanted = tl.where(wanted >= high, 0.5 * (low + high), wanted)
            threshold = tl.where(xu < 0.0, wanted, threshold)
        pull = tl.where(hard, 0.0, threshold / (norm + 1e-8))
        lost = (zx - pull * xx < eps * xx) | (hard & (zx == zx))
        scale = tl.where(lost, 0.0, tl.full(xx.shape, 1.0, tl.float64))
    return tl.where(xx == 0.0, 0.0, scale), pull


@triton.jit
def _group_step_kernel(
    param_near_ptr, param_far_ptr, first_near_ptr, first_far_ptr, second_near_ptr, second_far_ptr,
    segments_ptr, bundles_ptr, blocks_ptr, coefficients_ptr, addresses_ptr,
    mask_ptr, strength_ptr, threshold_ptr, hyper_ptr, rates_ptr, constants_ptr, found_inf_ptr,
    RULE: tl.constexpr, PROJECTION: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block_ptr = blocks_ptr + tl.program_id(0).to(tl.int64) * 3
    bundle_ptr = bundles_ptr + tl.load(block_ptr) * 5
    n = tl.load(block_ptr + 2)
    if found_inf_ptr is not None:
        n = tl.where(tl.load(found_inf_ptr) == 0.0, n, 0)
    if n > 0:
        params = (param_near_ptr, param_far_ptr)
        first = (first_near_ptr, first_far_ptr)
        second = (second_near_ptr, second_far_ptr)
        tables = (bundle_ptr, segments_ptr, coefficients_ptr, addresses_ptr)
        channel = tl.load(block_ptr + 1)
        place, row, visited = places(n, CHANNELS, BLOCK)
        projected = row < 0
        dead = row < 0
        scale = tl.full([CHANNELS], 1.0, tl.float32)
        pull = tl.full([CHANNELS], 0.0, tl.float32)
        if PROJECTION != NO_PROJECTION:
            group = tl.load(bundle_ptr + 2) + channel + row
            owned = visited & (group >= 0)
            projected = tl.load(mask_ptr + group, mask=owned, other=1) == 0
            if tl.max(projected.to(tl.int32), axis=0) != 0:
                # Zero is absorbing: such groups need neither gradient nor states.
                alive = projected & (_count_nonzero(params, tables, channel, place, projected) > 0)
                dead = projected
                if tl.max(alive.to(tl.int32), axis=0) != 0:
                    sums = _sweep(
                        params, first, second, tables, channel, place, alive, projected, row < 0,
                        scale, pull, RULE, PROJECTION, False,
                    )  # fmt: skip
                    lr = learning_rate(hyper_ptr, rates_ptr, tl.load(bundle_ptr + 4))
                    strength = tl.load(strength_ptr + group, mask=alive, other=0.0).to(tl.float64)
                    fixed = tl.load(threshold_ptr + group, mask=alive, other=0.0).to(tl.float64)
                    threshold = tl.where(strength == INFINITY, strength, lr * strength) + fixed
                    wide_scale, wide_pull = _decide(
                        sums, place, threshold, constants_ptr, PROJECTION
                    )
                    scale, pull = wide_scale.to(tl.float32), wide_pull.to(tl.float32)
                    # Of a zero group all sums are 0, its scale too.
                    dead = projected & (wide_scale == 0.0)
        _sweep(
            params, first, second, tables, channel, place, visited, projected, dead, scale, pull,
            RULE, PROJECTION, True,
        )  # fmt: skip


def group_step_triton(
    params: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: Tensor,
    scratch: Tensor,
    grads: Sequence[Tensor],
    tensors: Tensor,
    segments: Tensor,
    bundles: Tensor,
    units: Tensor,
    blocks: Tensor,
    mask: Tensor,
    strength: Tensor,
    threshold: Tensor,
    hyper: Sequence[float],
    lr: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    optimizer: int,
    projection: int,
    projection_args: Sequence[float],
) -> None:
    """Launch the kernels; arguments as `ato_fast.ops.group_step_`. ``scratch`` is not used.

    Raises:
        ValueError: buffers other than fp32 and bf16, a gradient of another dtype, device or size
            than its parameter, or an lr, grad_scale or found_inf that is no fp32 scalar there.
    """
    if not params or not len(tensors):
        return
    check_params(params)
    device = params[0].device
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if value is not None:
            check_scalar(name, value, device)
    for index, value in enumerate(lr):
        if value.numel():
            check_scalar(f"lr[{index}]", value, device)
    rows = tensors.tolist()
    found = gradient_addresses(grads, rows, params)
    rule = ADAM.value if optimizer != SGD_CODE else MOMENTUM.value if first else SGD.value
    with torch.cuda.device_of(params[0]):
        addresses, row_of, rates, hyper_table, constants = device_tables(
            [
                found,
                tuple(row[3] for row in rows),
                tuple(value.data_ptr() if value.numel() else 0 for value in lr),
            ],
            [tuple(hyper), tuple(projection_args)],
            device,
        )
        rates = rates if lr else None
        coefficients = launch_coefficients(
            step, addresses, row_of, rates, hyper_table, grad_scale, found_inf, optimizer
        )
        if not len(blocks):
            return
        _group_step_kernel[(len(blocks),)](
            *pointer_pair(params),
            *pointer_pair(first),
            *pointer_pair(second if rule == ADAM.value else ()),
            segments, bundles, blocks, coefficients, addresses,
            mask.view(torch.uint8), strength, threshold, hyper_table, rates, constants, found_inf,
            RULE=rule, PROJECTION=projection, CHANNELS=CHANNELS,
            BLOCK=block_size(params), **OPTIONS,
        )  # fmt: skip


register_triton("group_step_", group_step_triton)
