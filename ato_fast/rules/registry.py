"""The rule registry: what each ATen operation does to channels.

A rule is called as ``rule(labels, shapes, *args, **kwargs)`` with the operation's own arguments,
tensors replaced by `Value`; ``shapes`` are its output shapes. It returns the output `Value`, or a
list of them. An operation without a rule blocks every channel it reads: unprunable with a reason,
never a guess.

To teach the tracer an operation, add one function decorated with `rule` to the module it fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..labels import Labels, Value

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}

# Operations that own parameters: their rules run even where no channel arrives.
WITH_WEIGHTS = frozenset(
    "conv1d conv2d conv3d linear batch_norm layer_norm group_norm instance_norm prelu "
    "_prelu_kernel".split()
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations, named without namespace, overload and in-place mark."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"rule: {name!r} already has a rule")
            RULES[name] = function
        return function

    return register


def unknown(labels: Labels, name: str, inputs: list[Value], shapes: list[tuple[int, ...]]):
    """Block every channel that an operation without a rule reads."""
    for value in inputs:
        labels.block_value(value, f"{name} is not known to keep channels apart")
    return [Value.plain(shape) for shape in shapes]


def only_dim(labels: Labels, value: Value, dim: int, what: str) -> Value:
    """``value`` with channels along ``dim`` alone; channels elsewhere are blocked."""
    for d in value.labelled:
        if d != dim:
            labels.block(value.atoms[d], f"{what} mixes this dimension")
            value = value.with_dim(d, None, None)
    return value
