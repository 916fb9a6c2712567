"""Samples of masked_bn_act and gate_mask, and their checks on the backend that is forced."""

from __future__ import annotations

import torch
from torch import Tensor

from ato_fast import backend, masked, noise
from ato_fast.masked import (
    ACTIVATIONS,
    masked_bn_act,
    masked_bn_act_backward_ref,
    masked_bn_act_ref,
)
from numerics import assert_as_accurate, assert_same_bits

SHAPES = {
    "empty-batch": (0, 3, 2, 2),
    "empty-map": (2, 3, 0, 2),
    "one": (1, 1, 1, 1),
    "points": (127, 5),
    "short-rows": (3, 128, 3, 3),
    "rows": (2, 5, 12, 43),
    "1d": (3, 129, 7),
    "3d": (2, 3, 3, 5, 4),
    "channels_last": (4, 37, 5, 3),
    "channels_last-wide": (3, 130, 2, 2),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def padded(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random numbers inside a buffer of NaN, and the buffer."""
    n = torch.Size(shape).numel()
    buffer = torch.full((n + 37,), float("nan"), dtype=dtype, device=device)
    if last:
        order = (shape[0], *shape[2:], shape[1])
        view = buffer[19 : 19 + n].view(order).movedim(-1, 1)
    else:
        view = buffer[19 : 19 + n].view(shape)
    view.copy_(torch.randn(shape).mul_(2))
    return view, buffer


def channels(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, of them some 0 and 1, scales and shifts."""
    gate = torch.rand(n)
    gate[::3] = 0
    gate[1::5] = 1
    return gate, torch.rand(n) + 0.5, torch.randn(n)


def check(name: str, dtype: torch.dtype, activation: str, served: str, device: str = "cpu") -> None:
    """Output and gradients: as accurate as the reference, memory format kept, padding untouched."""
    torch.manual_seed(0)
    shape, last = SHAPES[name], name.startswith("channels_last")
    x, x_buffer = padded(shape, dtype, last, device)
    grad, grad_buffer = padded(shape, dtype, last, device)
    before = x_buffer.clone(), grad_buffer.clone()
    gate, scale, shift = (t.to(device) for t in channels(shape[1]))
    assert backend.serving(masked.FORWARD, x.device, [dtype]) == served
    assert backend.serving(masked.BACKWARD, x.device, [dtype]) == served
    leaf, gates = x.detach().requires_grad_(), gate.clone().requires_grad_()
    y = masked_bn_act(leaf, gates, scale, shift, activation)
    got = (y.detach(), *torch.autograd.grad(y, (leaf, gates), grad))
    assert y.stride() == x.stride() and got[1].stride() == x.stride()

    code = ACTIVATIONS.index(activation)

    def reference(cast):
        args = tuple(cast(t) for t in (x, gate, scale, shift))
        back = masked_bn_act_backward_ref(cast(grad), *args, 1, code)
        return (masked_bn_act_ref(*args, 1, code), *back)

    same, oracle = reference(lambda t: t), reference(torch.Tensor.double)
    for what, mine, theirs, exact in zip(("y", "dx", "dgate"), got, same, oracle, strict=True):
        assert_as_accurate(mine, theirs, exact, f"{name} {activation} {what}")
    assert (got[0][:, gate == 0] == 0).all() and (got[1][:, gate == 0] == 0).all()
    for buffer, copy in zip((x_buffer, grad_buffer), before, strict=True):
        assert_same_bits(buffer, copy)


COUNTERS = ((0, 0), (1, 1), (2**64 - 1, 2**63 + 5), (-3, 7), (12_345_678_901_234, 2**40 + 1))
WIDTHS = (3, 64, 130, 1, 17)


def check_uniform(served: str, device: str = "cpu") -> None:
    """The bits of the reference, from numbers and from a state, for sizes around a block's."""
    for seed, draw in COUNTERS:
        for n in (0, 1, 3, 4, 129, 1001):
            like = torch.empty(n, device=device)
            assert backend.serving(noise.UNIFORM, like.device, [torch.float32]) == served
            state = torch.tensor([noise.signed(seed), noise.signed(draw)], device=device)
            expected = noise.uniform_ref(like.cpu(), *map(noise.signed, (seed, draw)), None)
            assert_same_bits(noise.uniform(like, seed, draw).cpu(), expected)
            assert_same_bits(noise.uniform(like, 99, 99, state).cpu(), expected)


def check_gate_mask(hard: bool, served: str, device: str = "cpu") -> None:
    """Values and gradients as accurate as the reference; the same bits of noise."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, *WIDTHS], device=device).cumsum(0)
    features, heads = torch.randn(5, 40).relu().to(device), torch.randn(sum(WIDTHS), 40).to(device)
    grads = torch.randn(2, sum(WIDTHS)).to(device)
    assert backend.serving(noise.FORWARD, heads.device, [torch.float32]) == served
    leaves = features.clone().requires_grad_(), heads.clone().requires_grad_()
    logits, numbers, mask = noise.gate_mask(
        *leaves, bounds, 3, 9, base=0.5, temperature=0.4, hard=hard
    )
    assert not numbers.requires_grad
    assert_same_bits(numbers, noise.uniform_ref(numbers, 3, 9, None))
    got = (logits, mask, *torch.autograd.grad((logits, mask), leaves, tuple(grads)))

    def reference(cast):
        args = (cast(features), cast(heads), bounds)
        logits, numbers, mask = noise.gate_mask_ref(*args, 3, 9, None, 0.5, 0.4, hard)
        # The noise's own rounding is not at stake.
        back = noise.gate_mask_backward_ref(*map(cast, grads), *args, logits, numbers, 0.4)
        return (logits, mask, *back)

    same, oracle = reference(lambda t: t), reference(torch.Tensor.double)
    for index, (mine, theirs, exact) in enumerate(zip(got, same, oracle, strict=True)):
        assert_as_accurate(mine.detach(), theirs, exact, str(index))
    if hard:
        assert set(mask.tolist()) == {0.0, 1.0}


def interpreted() -> None:
    """What test_masked_triton.py runs in the interpreter."""
    for name in SHAPES:
        for dtype in DTYPES:
            for activation in ("relu", "gelu"):
                check(name, dtype, activation, "triton")
    for activation in ACTIVATIONS:
        check("rows", torch.float32, activation, "triton")
        check("channels_last", torch.bfloat16, activation, "triton")
    check_uniform("triton")
    for hard in (True, False):
        check_gate_mask(hard, "triton")
