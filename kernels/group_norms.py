"""Triton kernel of ``ato_fast::group_norms``: sums over the elements of every group.

Per item i (one group): ``sum(x^2)``, and with gradients ``sum(g^2)`` and ``sum(x * g)``.

* params: one flat fp32 buffer ``[numel]``; grads: one fp32 tensor per row of ``tensors``, in the
  parameter's memory order, or empty where missing (counts as zero).
* chunks int64 ``[n_chunks, 8]``, items int64 ``[n_items, 4]``: see `ato_fast.plan`.
* Returns float64 ``[n_items, 1 or 3]``.

Reads 4 bytes per element (8 with gradients), writes 8 bytes per item and column. One program per
item adds its chunks in order and its lanes in one fixed tree, in float64: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ato_fast.backend import register_triton

BLOCK = 1024
"""Elements per load: a row of a 3x3 convolution on 64 channels is 576, on 512 channels 4608."""
NUM_WARPS = 4


@triton.jit
def _group_norms_kernel(
    params_ptr, grad_table_ptr, chunks_ptr, items_ptr, out_ptr,
    WITH_GRADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    first = tl.load(items_ptr + item * 4)
    last = tl.load(items_ptr + item * 4 + 1)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    xx = tl.zeros([BLOCK], dtype=tl.float64)
    gg = tl.zeros([BLOCK], dtype=tl.float64)
    xg = tl.zeros([BLOCK], dtype=tl.float64)
    for k in range(first, last):
        row_ptr = chunks_ptr + k * 8
        start = tl.load(row_ptr + 3)
        inner = tl.load(row_ptr + 5)
        n = inner * tl.load(row_ptr + 6)
        stride = tl.load(row_ptr + 7)
        if WITH_GRADS:
            address = tl.load(grad_table_ptr + tl.load(row_ptr))
            grad_ptr = address.to(tl.pointer_type(tl.float32)) + tl.load(row_ptr + 4)
            # A missing gradient has address 0 and no elements.
            n_grad = tl.where(address != 0, n, 0)
        for begin in range(0, n, BLOCK):
            i = begin + lane
            shift = i // inner * stride + i % inner
            x = tl.load(params_ptr + start + shift, mask=i < n, other=0.0).to(tl.float64)
            xx += x * x
            if WITH_GRADS:
                g = tl.load(grad_ptr + shift, mask=i < n_grad, other=0.0).to(tl.float64)
                gg += g * g
                xg += x * g
    if WITH_GRADS:
        tl.store(out_ptr + item * 3, tl.sum(xx))
        tl.store(out_ptr + item * 3 + 1, tl.sum(gg))
        tl.store(out_ptr + item * 3 + 2, tl.sum(xg))
    else:
        tl.store(out_ptr + item, tl.sum(xx))


def group_norms_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    tensors: Tensor,
    chunks: Tensor,
    items: Tensor,
    n_slots: int,
    n_projected: int,
) -> Tensor:
    """Launch the kernel; arguments and result as `ato_fast.ops.group_norms`.

    Raises:
        ValueError: more than one buffer, or a gradient that is not fp32 on the buffer's device.
    """
    if len(params) != 1:
        raise ValueError(f"params: expected one float32 buffer, got {len(params)}")
    buffer = params[0]
    for index, (grad, row) in enumerate(zip(grads, tensors.tolist(), strict=bool(grads))):
        if grad.dtype != torch.float32 or grad.device != buffer.device:
            raise ValueError(
                f"grads[{index}]: expected float32 on {buffer.device}, "
                f"got {grad.dtype} on {grad.device}"
            )
        if grad.numel() not in (0, row[2]):
            raise ValueError(
                f"grads[{index}]: expected {row[2]} elements or none, got {grad.numel()}"
            )
    out = torch.empty(len(items), 3 if grads else 1, dtype=torch.float64, device=buffer.device)
    if not len(items):
        return out
    addresses = [grad.data_ptr() if grad.numel() else 0 for grad in grads] or [0]
    table = torch.tensor(addresses, dtype=torch.int64, device=buffer.device)
    with torch.cuda.device_of(buffer):
        _group_norms_kernel[(len(items),)](
            buffer, table, chunks, items, out,
            WITH_GRADS=bool(grads), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


register_triton("group_norms", group_norms_triton)
