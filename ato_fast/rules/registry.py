"""The rule registry: what each operation does to channels.

A rule is called as ``rule(labels, shapes, *args, **kwargs)`` with the operation's own arguments,
tensors replaced by `Value`; ``shapes`` are its output shapes. It returns the output `Value`, or a
list of them. An operation without a rule blocks every channel it reads: unprunable with a reason,
never a guess.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch

from ..labels import Labels, Value

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
BUILT_IN: set[str] = set()

# Their rules run even where no channel arrives: operations whose multiply-adds are counted, and
# those that make copies.
UNLABELLED = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm "
    "mv addmm baddbmm einsum bilinear scaled_dot_product_attention lstm gru rnn_tanh rnn_relu "
    "expand broadcast_to".split()
)


class InputError(ValueError):
    """The example inputs do not fit; the message says how."""


def rule(*names: str, replace: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: teach the tracer what an operation does to channels.

    Args:
        names: ATen operations by their bare name (``"relu"``; overload and in-place mark left
            out), others with their namespace (``"mylib::scaled_relu"``).
        replace: take the place of a rule given before.

    The decorated function gets ``(labels, shapes, *args, **kwargs)``: the `Labels` of this trace,
    the output shapes, and the operation's own arguments with a `Value` for every tensor. It returns
    the output's `Value`: ``x`` itself where channels stay where they are and zero stays zero,
    ``x.without_pins("why")`` where zero does not; ``labels.block_value(x, "why")`` refuses. A wrong
    rule costs gates, not correctness: every layout is checked on a copy of the model.

    Raises:
        ValueError: no such operation, or it already has a rule: one of the library's own, or
            another without ``replace=True``.
    """
    for name in names if BUILT_IN else ():
        if name in BUILT_IN:
            raise ValueError(f"rule: {name!r} already has a rule of the library's own")
        if name in RULES and not replace:
            raise ValueError(f"rule: {name!r} already has a rule; replace=True replaces it")
        _check_operation(name)

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _check_operation(name: str) -> None:
    """Raise ValueError unless graphs can hold an operation of this name."""
    namespace, _, bare = name.rpartition("::")
    known = getattr(torch.ops, namespace or "aten")
    in_place = bare.endswith("_") and hasattr(known, bare[:-1])
    if namespace != "aten" and not in_place and hasattr(known, bare):
        return
    if namespace not in ("", "aten"):
        hint = "register or import it before its rule"
    else:
        bare = bare.removeprefix("aten.").partition(".")[0].removesuffix("_")
        names = [x for x in dir(known) if not x.endswith("_")]
        close = [bare] if bare in names else difflib.get_close_matches(bare, names, 3)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?" if close else "ATen has none like it"
        )
    raise ValueError(f"rule: no operation is called {name!r}; {hint}")


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
