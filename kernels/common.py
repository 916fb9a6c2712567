"""What the Triton kernels share: elements of one or two buffers, places of channels, device tables.

Two buffers (fp32 and bf16 parameters of one model) are a pair ``(near, far)`` of pointers; a
segment says which holds its elements. ``far`` is None where there is one buffer only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 8
"""Most channels in a row of ``blocks`` (`ato_fast.plan`): a warp each."""
MAX_REGISTERS = 128
"""Two blocks of 256 threads per multiprocessor. Without the limit ptxas spills to fit three."""
OPTIONS = {"num_warps": CHANNELS, "enable_fp_fusion": False}
"""How to compile: no FMA where the source has none, so that every backend rounds alike."""
if torch.version.hip is None:
    OPTIONS["maxnreg"] = MAX_REGISTERS
FAR = tl.constexpr(1 << 20)
"""Elements between pieces from which on a load stays within one: others span up to 1024 pieces."""
DTYPES = (torch.float32, torch.bfloat16)
MAX_TABLES = 16
"""Device tables kept: with `zero_grad(set_to_none=True)` addresses alternate between few sets."""


@triton.jit
def only_if(flag, inside):
    """``inside`` where the scalar integer ``flag`` is not 0, else nowhere."""
    # Spread before the comparison: the interpreter spreads a scalar truth value as an integer.
    return inside & (tl.full(inside.shape, flag, tl.int64) != 0)


@triton.jit
def load_fp32(pointers, buffer, base, distance, inside):
    """Elements of the buffer at ``base + distance``, in fp32; 0 outside."""
    near_ptr, far_ptr = pointers
    if far_ptr is None:
        x = tl.load(near_ptr + base + distance, mask=inside, other=0.0).to(tl.float32)
    else:
        in_near, in_far = only_if(1 - buffer, inside), only_if(buffer, inside)
        near = tl.load(near_ptr + base + distance, mask=in_near, other=0.0).to(tl.float32)
        far = tl.load(far_ptr + base + distance, mask=in_far, other=0.0).to(tl.float32)
        x = tl.where(buffer == 0, near, far)
    return x


@triton.jit
def store_rounded(pointers, buffer, base, distance, value, inside):
    """Write fp32 ``value`` in the buffer's dtype, rounded to nearest even."""
    near_ptr, far_ptr = pointers
    near = _rounded(value, near_ptr.dtype.element_ty)
    if far_ptr is None:
        tl.store(near_ptr + base + distance, near, mask=inside)
    else:
        far = _rounded(value, far_ptr.dtype.element_ty)
        tl.store(near_ptr + base + distance, near, mask=only_if(1 - buffer, inside))
        tl.store(far_ptr + base + distance, far, mask=only_if(buffer, inside))


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        # By hand as in csrc/group_step.h: Triton's interpreter truncates.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(value == value, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value


@triton.jit
def load_gradient(pointers, address, buffer, base, distance, inside):
    """Elements of the gradient at ``address``, of its parameter's dtype, in fp32; 0 outside."""
    near_ptr, far_ptr = pointers
    near_grad_ptr = address.to(tl.pointer_type(near_ptr.dtype.element_ty))
    if far_ptr is None:
        g = load_fp32((near_grad_ptr, None), buffer, base, distance, inside)
    else:
        far_grad_ptr = address.to(tl.pointer_type(far_ptr.dtype.element_ty))
        g = load_fp32((near_grad_ptr, far_grad_ptr), buffer, base, distance, inside)
    return g


@triton.jit
def select_buffer(pointers, buffer):
    """The pointer of the pair that ``buffer`` names; both have one dtype."""
    selected_ptr, far_ptr = pointers
    if far_ptr is not None:
        if buffer != 0:
            selected_ptr = far_ptr
    return selected_ptr


@triton.jit
def places(n, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """How the lanes ``[BLOCK // 32 // CHANNELS, CHANNELS, 32]`` of a program cover n channels.

    One channel per index of the middle axis, so that a warp works on one of them; all lanes end to
    end where n is 1. Returns the lanes' places for the functions below, the channel per middle
    index, and whether there is one.
    """
    ROUNDS: tl.constexpr = BLOCK // 32 // CHANNELS
    row = tl.arange(0, CHANNELS)
    alone = (n == 1).to(tl.int32)
    channel = row * (1 - alone)
    length = 32 * ROUNDS * (1 + alone * (CHANNELS - 1))
    across = row[None, :, None] * (32 * alone)
    rounds = tl.arange(0, ROUNDS)[:, None, None] * (32 + alone * (CHANNELS - 1) * 32)
    lane = tl.arange(0, 32)[None, None, :] + across + rounds
    place = (channel[None, :, None], lane, length, alone)
    return place, channel, row < tl.where(n == 1, CHANNELS, n)


@triton.jit
def elements(begin, place, inner, outer, stride):
    """The elements from ``begin`` on of every channel in a segment, as many as the lanes can take.

    Returns where they lie, a base and the lanes' distances from it; which lanes have one; and how
    many they are. Distances are 32-bit: where pieces are far apart, lanes stay within one.
    """
    channel, lane, length, _ = place
    reach = tl.minimum(inner * outer - begin, length)
    base = begin
    distance = channel * inner.to(tl.int32) + lane
    if outer > 1:
        # The piece of `begin`, and how many more a lane is ahead, without 64-bit divisions: cut off
        # what no lane reaches.
        piece = begin // inner
        left = inner * (piece + 1) - begin
        if stride >= FAR:
            reach = tl.minimum(reach, left)
        within = tl.minimum(inner, length)
        further = ((within - tl.minimum(left, within)).to(tl.int32) + lane) // within.to(tl.int32)
        base += piece * (stride - inner)
        distance += further * (stride - inner).to(tl.int32)
    return base, distance, lane < reach.to(tl.int32), reach


@triton.jit
def channel_sum(values, place):
    """Sum per channel of a value per lane; the order depends on nothing but the shape."""
    rows = tl.sum(tl.sum(values, axis=2), axis=0)
    return tl.where(place[3] == 1, tl.sum(rows, axis=0), rows)


def block_size(params: Sequence[Tensor]) -> int:
    """Elements per load: of every stream 4 per thread, or of each of two buffers 2.

    A row of a 3x3 convolution on 64 channels has 576 elements, on 512 channels 4608.
    """
    return 1024 // len(params)


def pointer_pair(buffers: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """One or two buffers, or none, as kernel arguments."""
    return (*buffers, None, None)[:2]


def check_params(params: Sequence[Tensor]) -> None:
    """One fp32 or bf16 buffer, or one of each.

    Raises:
        ValueError: anything else.
    """
    dtypes = [buffer.dtype for buffer in params]
    if len(set(dtypes)) != len(dtypes) or not set(dtypes) <= set(DTYPES):
        names = ", ".join(map(str, dtypes))
        raise ValueError(
            f"params: expected at most one float32 and one bfloat16 buffer, got {names}"
        )


def check_scalar(name: str, value: Tensor, device: torch.device) -> None:
    """A value that kernels read on the device.

    Raises:
        ValueError: another dtype than fp32, another device, or not one element.
    """
    if value.dtype != torch.float32 or value.device != device or value.numel() != 1:
        raise ValueError(
            f"{name}: expected one float32 element on {device}, "
            f"got {value.numel()} of {value.dtype} on {value.device}"
        )


def gradient_addresses(
    grads: Sequence[Tensor], tensors: Sequence[Sequence[int]], params: Sequence[Tensor]
) -> tuple[int, ...]:
    """Address of every gradient, 0 where missing.

    Raises:
        ValueError: another dtype, device or size than the parameter's.
    """
    dtypes, device = [buffer.dtype for buffer in params], params[0].device
    addresses = []
    for index, (grad, (buffer, _, numel, _)) in enumerate(zip(grads, tensors, strict=True)):
        n = grad.numel()
        if n not in (0, numel):
            raise ValueError(f"grads[{index}]: expected {numel} elements or none, got {n}")
        if n and (grad.dtype != dtypes[buffer] or grad.device != device):
            raise ValueError(
                f"grads[{index}]: expected {dtypes[buffer]} on {device}, "
                f"got {grad.dtype} on {grad.device}"
            )
        addresses.append(grad.data_ptr() if n else 0)
    return tuple(addresses)


_captured: list[tuple[Tensor, ...]] = []
"""Tables of captured graphs: a replay copies and reads them again."""


def device_tables(
    integers: Sequence[tuple[int, ...]], floats: Sequence[tuple[float, ...]], device: torch.device
) -> list[Tensor]:
    """The tuples as int64 and float64 tensors on the device, copied only if one changed.

    On an accelerator the copy is asynchronous and ordered before what the current stream runs next.
    """
    stream = 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            host = _host_table(integers, floats)
            table = host.to(device, non_blocking=True)
            _captured.append((host, table))
            return _parts(table, integers, floats)
    table = _device_table(tuple(integers), tuple(floats), device, stream)
    return _parts(table, integers, floats)


@lru_cache(maxsize=MAX_TABLES)
def _device_table(
    integers: tuple[tuple[int, ...], ...],
    floats: tuple[tuple[float, ...], ...],
    device: torch.device,
    stream: int,
) -> Tensor:
    # `stream` is part of the key: on another one the copy might not have happened yet.
    host = _host_table(integers, floats)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host


def _padded(length: int) -> int:
    # Parts on 16-byte boundaries: Triton compiles one more kernel for every other alignment.
    return length + length % 2


def _host_table(integers: Sequence[tuple[int, ...]], floats: Sequence[tuple[float, ...]]) -> Tensor:
    table = np.zeros(sum(_padded(len(part)) for part in (*integers, *floats)), dtype=np.int64)
    begin = 0
    for part, dtype in [*((p, np.int64) for p in integers), *((p, np.float64) for p in floats)]:
        table[begin : begin + len(part)].view(dtype)[:] = part
        begin += _padded(len(part))
    return torch.from_numpy(table)


def _parts(
    table: Tensor, integers: Sequence[tuple[int, ...]], floats: Sequence[tuple[float, ...]]
) -> list[Tensor]:
    parts = table.split([_padded(len(part)) for part in (*integers, *floats)])
    return [*parts[: len(integers)], *(p.view(torch.float64) for p in parts[len(integers) :])]
