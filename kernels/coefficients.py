"""Triton kernel behind ``ato_fast::group_step_`` that turns hyperparameters into coefficients.

With g the stored gradient of an element x, m and v its states:
``g' = unscale * g + l2 * x``, ``m = keep1 * m + add1 * g'``, ``v = keep2 * v + add2 * g'^2``, then

* SGD ``z = x - rate * g'``, with momentum ``z = x - rate * (direct * g' + through * m)``,
* Adam, AdamW ``z = decay * x - rate * m / (sqrt(v) * correction + eps)``: torch.optim's update with
  its bias corrections in ``rate`` and ``correction``.

The same as ``coefficients`` in csrc/group_step.h, in float64 until stored.

* hyper float64 ``[n_rows * 6]`` (`ato_fast.reference.HYPER_COLUMNS`); rates int64 ``[n_rows]``,
  address of the fp32 lr on the device or 0, or None; grad_scale, found_inf: fp32 scalars or None.
* rows, addresses int64 ``[n_tensors]``: row of ``hyper``; address of the gradient, 0 if missing.
* step fp32 ``[n_tensors]``: updates done, advanced where one is due.
* coefficients fp32 ``[n_tensors, 16]``: written, in the order of `COLUMNS`.

64 bytes written per tensor, one lane per tensor, no reductions: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = (
    "unscale", "l2", "decay", "keep1", "add1", "keep2", "add2",
    "rate", "correction", "eps", "direct", "through",
)  # fmt: skip
STRIDE = tl.constexpr(16)
"""Floats per tensor: `COLUMNS` and four that are not used, half a cache line."""
BLOCK = 128
"""Tensors per program; a ResNet-50 has 161."""
NUM_WARPS = 4

SGD = tl.constexpr(0)
ADAMW = tl.constexpr(2)


@triton.jit
def learning_rate(hyper_ptr, rates_ptr, row):
    """The lr of a row of ``hyper``, float64: the tensor at its address in ``rates``, if any."""
    lr = tl.load(hyper_ptr + row * 6)
    if rates_ptr is not None:
        address = tl.load(rates_ptr + row)
        given = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
        lr = tl.where(address != 0, given.to(tl.float64), lr)
    return lr


@triton.jit
def _coefficients_kernel(
    step_ptr, coefficients_ptr, addresses_ptr, rows_ptr, rates_ptr, hyper_ptr,
    grad_scale_ptr, found_inf_ptr, n_tensors, OPTIMIZER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n_tensors
    row = tl.load(rows_ptr + i, mask=inside, other=0)
    address = tl.load(addresses_ptr + i, mask=inside, other=0)
    step = tl.load(step_ptr + i, mask=inside, other=0.0)
    lr = learning_rate(hyper_ptr, rates_ptr, row)
    weight_decay = tl.load(hyper_ptr + row * 6 + 1)
    beta1 = tl.load(hyper_ptr + row * 6 + 2)
    beta2 = tl.load(hyper_ptr + row * 6 + 3)
    eps = tl.load(hyper_ptr + row * 6 + 4)
    nesterov = tl.load(hyper_ptr + row * 6 + 5) != 0.0
    zero = tl.zeros([BLOCK], dtype=tl.float64)
    one = zero + 1.0
    unscale = one
    if grad_scale_ptr is not None:
        unscale = one / tl.load(grad_scale_ptr).to(tl.float64)
    l2, decay = weight_decay, one
    if OPTIMIZER == ADAMW:
        l2, decay = zero, one - lr * weight_decay
    advances = address != 0
    if found_inf_ptr is not None:
        advances = advances & (zero + tl.load(found_inf_ptr) == 0.0)
    if OPTIMIZER == SGD:
        # torch's momentum buffer starts as the gradient itself.
        keep1 = tl.where(step == 0.0, zero, beta1)
        add1 = tl.where(step == 0.0, one, one - beta2)
        keep2, add2, rate, correction = zero, zero, lr, one
        direct = tl.where(nesterov, one, zero)
        # Without momentum 0, as with it never: the mark of such rows.
        through = tl.where(nesterov | (beta1 == 0.0), beta1, one)
        advances = advances & (beta1 != 0.0)
    else:
        count = step.to(tl.float64) + 1.0
        keep1, add1, keep2, add2 = beta1, one - beta1, beta2, one - beta2
        rate = lr / (one - tl.exp(tl.log(beta1) * count))
        correction = one / tl.sqrt(one - tl.exp(tl.log(beta2) * count))
        direct, through = zero, zero

    out_ptr = coefficients_ptr + i * STRIDE
    tl.store(out_ptr, unscale.to(tl.float32), mask=inside)
    tl.store(out_ptr + 1, l2.to(tl.float32), mask=inside)
    tl.store(out_ptr + 2, decay.to(tl.float32), mask=inside)
    tl.store(out_ptr + 3, keep1.to(tl.float32), mask=inside)
    tl.store(out_ptr + 4, add1.to(tl.float32), mask=inside)
    tl.store(out_ptr + 5, keep2.to(tl.float32), mask=inside)
    tl.store(out_ptr + 6, add2.to(tl.float32), mask=inside)
    tl.store(out_ptr + 7, rate.to(tl.float32), mask=inside)
    tl.store(out_ptr + 8, correction.to(tl.float32), mask=inside)
    tl.store(out_ptr + 9, eps.to(tl.float32), mask=inside)
    tl.store(out_ptr + 10, direct.to(tl.float32), mask=inside)
    tl.store(out_ptr + 11, through.to(tl.float32), mask=inside)
    # Nobody reads the count after this, so it may advance before the elements do.
    tl.store(step_ptr + i, step + 1.0, mask=advances)


def launch_coefficients(
    step: Tensor,
    addresses: Tensor,
    rows: Tensor,
    rates: Tensor | None,
    hyper: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    optimizer: int,
) -> Tensor:
    """Advance ``step`` and return the coefficients; arguments as in the module text."""
    n = len(step)
    coefficients = torch.empty(n, STRIDE.value, dtype=torch.float32, device=step.device)
    _coefficients_kernel[(triton.cdiv(n, BLOCK),)](
        step, coefficients, addresses, rows, rates, hyper, grad_scale, found_inf, n,
        OPTIMIZER=optimizer, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return coefficients
