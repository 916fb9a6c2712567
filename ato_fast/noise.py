"""Counter-based noise, and the controller's heads in one op.

Noise: Philox4x32-10 (Salmon et al., SC'11). Uniform number i of a draw comes from word ``i % 4`` of
the block with counter ``(i // 4, draw)``, 64 bits each, low words first, and key ``seed``; of its
32 bits the upper 23 count:

    u = ((bits >> 9) + 1/2) / 2^23,     0 < u < 1

which fp32 holds exactly. So the same seed and draw give the same numbers on every rank, device and
backend, and the whole state of the noise is two integers.

``ato_fast::gate_mask``: for every group i of gate g (sections 4 of the paper's method)

    logit_i = base + <heads_i, features_g>,    noise_i = -log(-log(u_i)),
    soft_i = sigmoid((logit_i + noise_i) / temperature),    hard_i = 1[logit_i + noise_i >= 0]

The mask is soft, or hard with the gradient of soft (straight-through). ``features`` fp32 ``[L,
H]``, ``heads`` fp32 ``[G, H]``, ``bounds`` int64 ``[L + 1]``: gate g has the groups from
``bounds[g]`` to ``bounds[g + 1]``. ``state``: None, or int64 ``[2]`` on the device, seed and draw,
which replaces the two numbers (a captured CUDA graph reads it anew).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
UNIFORM, FORWARD, BACKWARD = "uniform_kernel", "gate_mask_kernel", "gate_mask_backward_kernel"

_COUNTER = "int seed, int draw, Tensor? state"
_HEADS = "Tensor features, Tensor heads, Tensor bounds"
_FORWARD = f"({_HEADS}, {_COUNTER}, float base, float temperature, bool hard) -> "
_BACKWARD = (
    f"(Tensor grad_logits, Tensor grad_mask, {_HEADS}, Tensor logits, Tensor uniform, "
    "float temperature) -> (Tensor, Tensor)"
)
SCHEMAS = {
    UNIFORM: f"(Tensor like, {_COUNTER}) -> Tensor",
    "gate_mask": f"{_FORWARD}(Tensor, Tensor, Tensor)",
    "gate_mask_backward": _BACKWARD,
    FORWARD: f"{_FORWARD}(Tensor, Tensor, Tensor)",
    BACKWARD: _BACKWARD,
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"ato_fast::{_name}", _schema)


def signed(value: int) -> int:
    """The int64 with the lowest 64 bits of ``value``."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def uniform(like: Tensor, seed: int, draw: int, state: Tensor | None = None) -> Tensor:
    """Uniform numbers in (0, 1), fp32 of the shape and on the device of ``like``.

    Args:
        seed, draw: any integers; their lowest 64 bits count.
        state: as in the module's text.

    Raises:
        ValueError: a state of another shape, dtype or device.
    """
    like = like.detach().to(torch.float32).contiguous()
    _check_state(state, like)
    run = backend.implementation(UNIFORM, like.device, [torch.float32])
    return run(like, signed(seed), signed(draw), state)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers of uniform ones."""
    return -torch.log(-torch.log(uniform))


def gate_mask(
    features: Tensor,
    heads: Tensor,
    bounds: Tensor,
    seed: int,
    draw: int,
    *,
    base: float,
    temperature: float,
    hard: bool,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, uniform numbers and mask, fp32 ``[G]`` each; arguments as in the module's text.

    Logits and mask are differentiable in features and heads.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        BackendError: a forced backend cannot serve them.
    """
    if features.dim() != 2 or heads.dim() != 2 or features.shape[1] != heads.shape[1]:
        raise ValueError(
            "features and heads: expected [L, H] and [G, H], got "
            f"{list(features.shape)} and {list(heads.shape)}"
        )
    if bounds.shape != (len(features) + 1,) or bounds.dtype != torch.int64:
        raise ValueError(
            f"bounds: expected int64 [{len(features) + 1}], got {bounds.dtype} {list(bounds.shape)}"
        )
    for name, value in (("features", features), ("heads", heads)):
        if value.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32, got {value.dtype}")
    if not features.device == heads.device == bounds.device:
        raise ValueError(
            "features, heads and bounds: expected one device, got "
            f"{features.device}, {heads.device} and {bounds.device}"
        )
    _check_state(state, heads)
    return torch.ops.ato_fast.gate_mask(
        features, heads, bounds, signed(seed), signed(draw), state, base, temperature, hard
    )


def _check_state(state: Tensor | None, like: Tensor) -> None:
    if state is None:
        return
    if state.shape != (2,) or state.dtype != torch.int64 or state.device != like.device:
        raise ValueError(
            f"state: expected int64 [2] on {like.device}, "
            f"got {state.dtype} {list(state.shape)} on {state.device}"
        )


def _forward(features, heads, bounds, seed, draw, state, base, temperature, hard):
    run = backend.implementation(FORWARD, heads.device, [features.dtype, heads.dtype])
    return run(
        features.contiguous(), heads.contiguous(), bounds, seed, draw, state, base, temperature,
        hard,
    )  # fmt: skip


def _backward(grad_logits, grad_mask, features, heads, bounds, logits, uniform, temperature):
    run = backend.implementation(BACKWARD, heads.device, [features.dtype, heads.dtype])
    return run(
        grad_logits.contiguous(), grad_mask.contiguous(), features.contiguous(),
        heads.contiguous(), bounds, logits, uniform, temperature,
    )  # fmt: skip


def _forward_fake(features, heads, *_):
    return tuple(heads.new_empty(len(heads)) for _ in range(3))


def _backward_fake(grad_logits, grad_mask, features, heads, *_):
    return features.new_empty(features.shape), heads.new_empty(heads.shape)


def _setup(ctx, inputs, output) -> None:
    features, heads, bounds, *_, ctx.temperature, _ = inputs
    logits, uniform, _ = output
    ctx.mark_non_differentiable(uniform)
    ctx.save_for_backward(features, heads, bounds, logits, uniform)


def _gradients(ctx, grad_logits: Tensor, _: Tensor, grad_mask: Tensor) -> tuple:
    grads = torch.ops.ato_fast.gate_mask_backward(
        grad_logits, grad_mask, *ctx.saved_tensors, ctx.temperature
    )
    return (*grads, *[None] * 7)


_EXPLICIT = "CompositeExplicitAutograd"
torch.library.impl("ato_fast::gate_mask", _EXPLICIT)(_forward)
torch.library.impl("ato_fast::gate_mask_backward", _EXPLICIT)(_backward)
torch.library.register_fake("ato_fast::gate_mask")(_forward_fake)
torch.library.register_fake("ato_fast::gate_mask_backward")(_backward_fake)
torch.library.register_autograd("ato_fast::gate_mask", _gradients, setup_context=_setup)


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 in int64 arithmetic.

    Args:
        counter: int64 ``[n, 4]``, words of 32 bits.
        key: two words.

    Returns:
        int64 ``[n, 4]``, words of 32 bits.
    """
    a, b, c, d = counter.unbind(1)
    first, second = key
    for _ in range(ROUNDS):
        # Products wrap around in int64; the mask takes the high word's own bits.
        low, high = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            (high >> 32 & WORD) ^ b ^ first,
            high & WORD,
            (low >> 32 & WORD) ^ d ^ second,
            low & WORD,
        )
        first, second = (first + WEYL[0]) & WORD, (second + WEYL[1]) & WORD
    return torch.stack([a, b, c, d], dim=1)


def uniform_ref(like: Tensor, seed: int, draw: int, state: Tensor | None) -> Tensor:
    """The uniform numbers; see the module's text. A state is read on the host."""
    if state is not None:
        seed, draw = state.tolist()
    block = torch.arange((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    words = [block & WORD, block >> 32, *(torch.full_like(block, w) for w in _words(draw))]
    bits = philox(torch.stack(words, dim=1), _words(seed)).flatten()[: like.numel()]
    return (((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23).view(like.shape)


def _words(value: int) -> tuple[int, int]:
    return value & WORD, value >> 32 & WORD


def gate_mask_ref(
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
    """Logits, uniform numbers and mask; on an accelerator the sizes of the gates are waited for."""
    gate_of = _gate_of(bounds)
    logits = (heads * features.index_select(0, gate_of)).sum(1) + base
    numbers = uniform_ref(heads[:, 0], seed, draw, state)
    noisy = logits + gumbel(numbers).to(logits.dtype)
    # NaN stays NaN, so that it is noticed.
    rounded = torch.where(noisy.isnan(), noisy, (noisy >= 0).to(logits.dtype))
    mask = rounded if hard else torch.sigmoid(noisy / temperature)
    return logits, numbers.to(logits.dtype), mask


def gate_mask_backward_ref(
    grad_logits: Tensor,
    grad_mask: Tensor,
    features: Tensor,
    heads: Tensor,
    bounds: Tensor,
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of features and heads."""
    gate_of = _gate_of(bounds)
    soft = torch.sigmoid((logits + gumbel(uniform)) / temperature)
    grad = (grad_logits + grad_mask * soft * (1 - soft) / temperature)[:, None]
    d_features = torch.zeros_like(features).index_add_(0, gate_of, grad * heads)
    return d_features, grad * features.index_select(0, gate_of)


def _gate_of(bounds: Tensor) -> Tensor:
    return torch.repeat_interleave(bounds.diff())


for _op, _reference in (
    (UNIFORM, uniform_ref),
    (FORWARD, gate_mask_ref),
    (BACKWARD, gate_mask_backward_ref),
):
    backend.register_op(_op, _reference, (torch.float32,))
