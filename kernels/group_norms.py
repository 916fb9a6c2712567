"""Triton kernel of ``ato_fast::group_norms``: sums over the elements of every group.

Per group ``sum(x^2)``, and with gradients ``sum(g^2)`` and ``sum(x * g)``.

* params: one or two flat buffers, fp32 and bf16; grads: one per row of ``tensors``, of the
  parameter's dtype and memory order, or empty where missing (counts as zero).
* segments int64 ``[n_segments, 8]``, bundles int64 ``[n_bundles, 5]``, blocks int64
  ``[n_blocks, 3]``: see `ato_fast.plan`.
* Returns float64 ``[n_groups, 1 or 3]``; 0 for groups without parameters.

Reads 4 bytes per fp32 element of a group (8 with gradients), half of that for bf16; writes 8 bytes
per group and column. The program of a block adds its segments in order and its lanes in one fixed
tree, in float64: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ato_fast.backend import register_triton

from .common import (
    CHANNELS,
    OPTIONS,
    block_size,
    channel_sum,
    check_params,
    device_tables,
    elements,
    gradient_addresses,
    load_fp32,
    load_gradient,
    only_if,
    places,
    pointer_pair,
)


@triton.jit
def _group_norms_kernel(
    near_ptr, far_ptr, addresses_ptr, segments_ptr, bundles_ptr, blocks_ptr, out_ptr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block_ptr = blocks_ptr + tl.program_id(0).to(tl.int64) * 3
    bundle_ptr = bundles_ptr + tl.load(block_ptr) * 5
    group_begin = tl.load(bundle_ptr + 2)
    if group_begin >= 0:
        first = tl.load(block_ptr + 1)
        place, channel, visited = places(tl.load(block_ptr + 2), CHANNELS, BLOCK)
        params = (near_ptr, far_ptr)
        xx = tl.full(place[1].shape, 0.0, tl.float64)
        gg = tl.full(place[1].shape, 0.0, tl.float64)
        xg = tl.full(place[1].shape, 0.0, tl.float64)
        # Not `for`: the interpreter of triton 3.6 cannot take loaded bounds with numpy 2.4.
        k = tl.load(bundle_ptr)
        end = tl.load(bundle_ptr + 1)
        while k < end:
            segment_ptr = segments_ptr + k * 8
            buffer = tl.load(segment_ptr + 1)
            start = tl.load(segment_ptr + 3)
            grad_start = tl.load(segment_ptr + 4)
            inner = tl.load(segment_ptr + 5)
            outer = tl.load(segment_ptr + 6)
            stride = tl.load(segment_ptr + 7)
            shift = first * inner
            begin = tl.cast(0, tl.int64)
            while begin < inner * outer:
                base, distance, inside, reach = elements(begin, place, inner, outer, stride)
                base += shift
                inside &= visited[None, :, None]
                x = load_fp32(params, buffer, start + base, distance, inside).to(tl.float64)
                xx = tl.fma(x, x, xx)
                if addresses_ptr is not None:
                    address = tl.load(addresses_ptr + tl.load(segment_ptr))
                    has_grad = only_if(address, inside)
                    g = load_gradient(
                        params, address, buffer, grad_start + base, distance, has_grad
                    ).to(tl.float64)
                    gg = tl.fma(g, g, gg)
                    xg = tl.fma(x, g, xg)
                begin += reach
            k += 1
        group = group_begin + first + channel
        if addresses_ptr is None:
            tl.store(out_ptr + group, channel_sum(xx, place), mask=visited)
        else:
            tl.store(out_ptr + group * 3, channel_sum(xx, place), mask=visited)
            tl.store(out_ptr + group * 3 + 1, channel_sum(gg, place), mask=visited)
            tl.store(out_ptr + group * 3 + 2, channel_sum(xg, place), mask=visited)


def group_norms_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    tensors: Tensor,
    segments: Tensor,
    bundles: Tensor,
    blocks: Tensor,
    n_groups: int,
) -> Tensor:
    """Launch the kernel; arguments and result as `ato_fast.ops.group_norms`.

    Raises:
        ValueError: buffers other than fp32 and bf16, or a gradient of another dtype, device or size
            than its parameter.
    """
    check_params(params)
    device = params[0].device
    out = torch.zeros(n_groups, 3 if grads else 1, dtype=torch.float64, device=device)
    if not len(blocks):
        return out
    with torch.cuda.device_of(params[0]):
        addresses = None
        if grads:
            found = gradient_addresses(grads, tensors.tolist(), params)
            (addresses,) = device_tables([found], [], device)
        _group_norms_kernel[(len(blocks),)](
            *pointer_pair(params), addresses, segments, bundles, blocks, out,
            CHANNELS=CHANNELS, BLOCK=block_size(params), **OPTIONS,
        )  # fmt: skip
    return out


register_triton("group_norms", group_norms_triton)
