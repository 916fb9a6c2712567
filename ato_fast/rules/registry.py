"""The rule registry: what each operation does to channels.

A rule is called as ``rule(labels, shapes, *args, **kwargs)`` with the operation's own arguments,
tensors replaced by `Value`; ``shapes`` are its output shapes. It returns the output `Value`, or a
list of them. An operation without a rule blocks every channel it reads: unprunable with a reason,
never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..labels import Labels, Value

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
BUILT_IN: set[str] = set()

# Operations whose multiply-adds are counted: their rules run even where no channel arrives.
CONTRACTIONS = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm "
    "mv addmm baddbmm einsum bilinear scaled_dot_product_attention lstm gru rnn_tanh "
    "rnn_relu".split()
)


class InputError(ValueError):
    """The example inputs do not fit; the message says how."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: teach the tracer what an operation does to channels.

    Args:
        names: ATen operations by their bare name (``"relu"``; overload and in-place mark left
            out), others with their namespace (``"mylib::scaled_relu"``).

    The decorated function gets ``(labels, shapes, *args, **kwargs)``: the `Labels` of this trace,
    the output shapes, and the operation's own arguments with a `Value` for every tensor. It returns
    the output's `Value`: ``x`` itself where channels stay where they are and zero stays zero,
    ``x.without_pins("why")`` where zero does not; ``labels.block_value(x, "why")`` refuses. A wrong
    rule costs gates, not correctness: every layout is checked on a copy of the model.

    Raises:
        ValueError: an operation already has a rule of the library's own.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in BUILT_IN:
                raise ValueError(f"rule: {name!r} already has a rule")
            RULES[name] = function
        return function

    return register


def unknown(labels: Labels, name: str, inputs: list[Value], shapes: list[tuple[int, ...]]):
    """Block every channel that an operation without a rule reads."""
    reason = f"{name} is not known to keep channels apart (ato.rule teaches it)"
    for value in inputs:
        labels.block_value(value, reason)
    return [Value.plain(shape) for shape in shapes]


def only_dim(labels: Labels, value: Value, dim: int, what: str) -> Value:
    """``value`` with channels along ``dim`` alone; channels elsewhere are blocked."""
    return drop(labels, value, [d for d in value.labelled if d != dim], f"{what} mixes this "
                "dimension")  # fmt: skip


def drop(labels: Labels, value: Value, dims, reason: str) -> Value:
    """``value`` without channels along ``dims``: they are blocked."""
    for d in dims:
        labels.block(value.atoms[d], reason)
        value = value.with_dim(d, None, None)
    return value
