"""``ato_fast::bi_gru``: a bidirectional GRU over one sequence, in one call.

For every step of a direction, with the state ``h`` of the step before it (0 at first), as
torch.nn.GRU has it:

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr),    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),    h' = n + z * (h - n)

``source`` ``[L, inputs]``; ``weights`` as ``nn.GRU(inputs, H, bidirectional=True).parameters()``
gives them: weight_ih ``[3H, inputs]``, weight_hh ``[3H, H]``, bias_ih and bias_hh ``[3H]`` of the
forward, then of the backward direction; rows of r, z and n. Output: states ``[L, 2H]`` and, for
backward, ``r, z, n, W_hn h + b_hn`` of each direction, ``[2, L, 4H]``.

The sequence is short and its steps are small, so torch's operator by operator GRU is mostly calls
on the CPU. On CUDA the controller keeps nn.GRU, which is one call of cuDNN there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""The weights of a direction, in their order."""
FORWARD, BACKWARD = "bi_gru_kernel", "bi_gru_backward_kernel"

# One argument per weight: autograd takes lists apart and puts them together again in Python.
_WEIGHTS = ", ".join(f"Tensor {name}{way}" for way in ("", "_reverse") for name in NAMES)
_BACKWARD = (
    "(Tensor grad, Tensor source, Tensor[] weights, Tensor states, Tensor saved) -> Tensor[]"
)
SCHEMAS = {
    "bi_gru": f"(Tensor source, {_WEIGHTS}) -> (Tensor, Tensor)",
    "bi_gru_backward": _BACKWARD,
    FORWARD: "(Tensor source, Tensor[] weights) -> (Tensor, Tensor)",
    BACKWARD: _BACKWARD,
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"ato_fast::{_name}", _schema)


def bi_gru(source: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """States ``[L, 2H]`` of both directions, differentiable in the weights.

    Args:
        source, weights: as in the module's text, fp32 or float64, on one device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a source that requires a gradient.
        BackendError: a forced backend cannot serve them.
    """
    if source.dim() != 2 or not source.numel():
        raise ValueError(f"source: expected [L, inputs], both >= 1, got {list(source.shape)}")
    if source.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"source: expected float32 or float64, got {source.dtype}")
    if len(weights) != 2 * len(NAMES):
        raise ValueError(f"weights: expected {2 * len(NAMES)} tensors, got {len(weights)}")
    hidden = weights[1].shape[-1] if weights[1].dim() else 0
    shapes = ([3 * hidden, source.shape[1]], [3 * hidden, hidden], [3 * hidden], [3 * hidden])
    # The one that says the hidden size first.
    for index in (1, 0, *range(2, len(weights))):
        weight, at = weights[index], index % len(NAMES)
        if (
            not hidden
            or list(weight.shape) != shapes[at]
            or weight.dtype != source.dtype
            or weight.device != source.device
        ):
            raise ValueError(
                f"weights[{index}]: expected {NAMES[at]} {shapes[at]} of {source.dtype} on "
                f"{source.device}, got {list(weight.shape)} of {weight.dtype} on {weight.device}"
            )
    _refuse_gradient(source.requires_grad and torch.is_grad_enabled())
    return torch.ops.ato_fast.bi_gru(source, *weights)[0]


def _refuse_gradient(wanted: bool) -> None:
    if wanted:
        raise ValueError(
            "source: expected a constant, got a tensor that requires a gradient; bi_gru has "
            "gradients for its weights only"
        )


def _forward(source, *weights):
    run = backend.implementation(FORWARD, source.device, [source.dtype])
    return run(source.contiguous(), [weight.contiguous() for weight in weights])


def _backward(grad, source, weights, states, saved):
    run = backend.implementation(BACKWARD, source.device, [source.dtype])
    weights = [weight.contiguous() for weight in weights]
    return run(grad.contiguous(), source.contiguous(), weights, states, saved)


def _forward_fake(source, *weights):
    n_steps, hidden = len(source), weights[1].shape[1]
    return source.new_empty(n_steps, 2 * hidden), source.new_empty(2, n_steps, 4 * hidden)


def _backward_fake(grad, source, weights, states, saved):
    return [weight.new_empty(weight.shape) for weight in weights]


def _setup(ctx, inputs, output) -> None:
    source, *weights = inputs
    _refuse_gradient(ctx.needs_input_grad[0])
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(source, *weights, *output)


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple:
    source, *weights, states, saved = ctx.saved_tensors
    return None, *torch.ops.ato_fast.bi_gru_backward(grad, source, weights, states, saved)


def _no_second_order(ctx, *grads: Tensor) -> None:
    raise RuntimeError(
        "bi_gru: gradients of its gradients are not offered (create_graph=True was used and "
        "differentiated again)"
    )


_EXPLICIT = "CompositeExplicitAutograd"
torch.library.impl("ato_fast::bi_gru", _EXPLICIT)(_forward)
torch.library.impl("ato_fast::bi_gru_backward", _EXPLICIT)(_backward)
torch.library.register_fake("ato_fast::bi_gru")(_forward_fake)
torch.library.register_fake("ato_fast::bi_gru_backward")(_backward_fake)
torch.library.register_autograd("ato_fast::bi_gru", _gradients, setup_context=_setup)
torch.library.register_autograd("ato_fast::bi_gru_backward", _no_second_order)


def bi_gru_ref(source: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The formulas of the module's text, step by step."""
    states, saved = [], []
    for reverse in (False, True):
        weight_ih, weight_hh, bias_ih, bias_hh = weights[4:] if reverse else weights[:4]
        state = source.new_zeros(weight_hh.shape[1])
        rows = []
        for x in (source.flip(0) if reverse else source) @ weight_ih.T + bias_ih:
            hidden = weight_hh @ state + bias_hh
            (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3), hidden.chunk(3)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            n = torch.tanh(x_n + r * h_n)
            state = n + z * (state - n)
            rows.append(torch.cat([r, z, n, h_n, state]))
        kept, half = torch.stack(rows[::-1] if reverse else rows).tensor_split([4 * len(state)], 1)
        states.append(half)
        saved.append(kept)
    return torch.cat(states, 1), torch.stack(saved)


def bi_gru_backward_ref(
    grad: Tensor, source: Tensor, weights: Sequence[Tensor], states: Tensor, saved: Tensor
) -> list[Tensor]:
    """Gradients of the weights, in their order."""
    found = []
    for reverse, slope, out, kept in zip(
        (False, True), grad.chunk(2, 1), states.chunk(2, 1), saved, strict=True
    ):
        weight_hh = weights[5 if reverse else 1]
        before = torch.zeros_like(out)
        before[slice(0, -1) if reverse else slice(1, None)] = out[1:] if reverse else out[:-1]
        carried = torch.zeros_like(out[0])
        rows = [carried] * len(out)
        for t in range(len(out)) if reverse else reversed(range(len(out))):
            r, z, n, h_n = kept[t].chunk(4)
            d_state = slope[t] + carried
            d_n = d_state * (1 - z) * (1 - n * n)
            d_r = d_n * h_n * r * (1 - r)
            d_z = d_state * (before[t] - n) * z * (1 - z)
            carried = d_state * z + torch.cat([d_r, d_z, d_n * r]) @ weight_hh
            rows[t] = torch.cat([d_r, d_z, d_n, d_n * r])
        d_r, d_z, d_n, d_hn = torch.stack(rows).chunk(4, 1)
        inner, outer = torch.cat([d_r, d_z, d_n], 1), torch.cat([d_r, d_z, d_hn], 1)
        found += [inner.T @ source, outer.T @ before, inner.sum(0), outer.sum(0)]
    return found


backend.register_op(FORWARD, bi_gru_ref, (torch.float32,))
backend.register_op(BACKWARD, bi_gru_backward_ref, (torch.float32,))
