"""Element by element: activations and arithmetic."""

from __future__ import annotations

import math

import numpy as np

from ..labels import NO_PIN, Labels, Value
from .registry import Rule, only_dim, rule, unknown

# f(0) = 0, element by element: a zero channel stays zero.
KEEPS_ZERO = (
    "abs alias celu clone contiguous detach dropout elu erf expm1 feature_dropout gelu hardshrink "
    "hardswish leaky_relu lift_fresh_copy log1p mish neg negative relu relu6 round selu sign silu "
    "sin sinh softshrink softsign square tan tanh tanhshrink to trunc type_as _to_copy"
).split()

# Element by element, but f(0) != 0.
LOSES_ZERO = (
    "cos cosh exp hardsigmoid log log10 log2 log_sigmoid logit reciprocal rsqrt sigmoid softplus"
).split()


@rule(*KEEPS_ZERO)
def _keeps_zero(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
    return Value(out[0], x.atoms, x.pins, x.lost)


def _loses_zero(name: str) -> Rule:
    def lose(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
        return x.without_pins(f"{name}(0) is not 0")

    return lose


for _name in LOSES_ZERO:
    rule(_name)(_loses_zero(_name))


@rule("hardtanh", "clamp", "clip")
def _hardtanh(labels: Labels, out, x: Value, low=None, high=None, **kwargs) -> Value:
    low = kwargs.get("min_val", kwargs.get("min", low))
    high = kwargs.get("max_val", kwargs.get("max", high))
    if isinstance(low, Value) or isinstance(high, Value):
        labels.block_value(x, "clamp with tensor bounds is not known to keep channels apart")
        return Value.plain(out[0])
    if (low is None or low <= 0) and (high is None or high >= 0):
        return x
    return x.without_pins(f"clamp to [{low}, {high}] moves 0")


@rule("clamp_min", "clamp_max")
def _clamp_one(labels: Labels, out, x: Value, bound) -> Value:
    keeps = not isinstance(bound, Value) and bound == 0
    return x if keeps else x.without_pins(f"clamp at {bound} may move 0")


@rule("prelu", "_prelu_kernel")
def _prelu(labels: Labels, out, x: Value, weight: Value) -> Value:
    x = only_dim(labels, x, 1, "PReLU")
    if math.prod(weight.shape) > 1 and x.atoms[1] is not None:
        if labels.weight(weight) is None:
            labels.block(x.atoms[1], "PReLU with a slope computed in the forward pass")
        else:
            labels.attach(weight.tensor, 0, x.atoms[1], "affine")
    return x


@rule("pow")
def _pow(labels: Labels, out, x, exponent) -> Value:
    if isinstance(x, Value) and not isinstance(exponent, Value) and exponent > 0:
        return x
    inputs = [v for v in (x, exponent) if isinstance(v, Value)]
    return unknown(labels, "pow with this exponent", inputs, out)[0]


@rule("new_empty", "new_zeros", "new_ones", "new_full")
def _new(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
    return Value.plain(out[0])


def _aligned(value: Value, rank: int) -> Value:
    """``value`` with leading dimensions of size 1 up to ``rank``, as broadcasting does."""
    missing = rank - len(value.shape)
    dims = (None,) * missing + tuple(range(len(value.shape)))
    return value.reshaped((1,) * missing + value.shape, dims)


def _elementwise(labels: Labels, out, a: Value, b: Value, name: str, product: bool) -> Value:
    rank = len(out[0])
    a, b = _aligned(a, rank), _aligned(b, rank)
    result = Value.plain(out[0])
    lost = a.lost or b.lost
    for d in range(rank):
        x, y = a.atoms[d], b.atoms[d]
        if x is None and y is None:
            continue
        if x is not None and y is not None and len(x) == len(y):
            labels.join(x, y, f"{name} with channels that are fixed", residual=not product)
            if product:
                pins = np.where(a.pins[d] >= 0, a.pins[d], b.pins[d])
            else:
                pins = labels.both_pins(a.pins[d], b.pins[d])
            result = result.with_dim(d, x, pins)
            continue
        for value, other in ((a, b), (b, a)):
            atoms = value.atoms[d]
            if atoms is None:
                continue
            if other.shape[d] == 1 and out[0][d] == len(atoms):
                if product:
                    pins = value.pins[d]
                else:
                    pins = np.full_like(value.pins[d], NO_PIN)
                    lost = lost or f"{name} a value that is not zero with the group"
                result = result.with_dim(d, atoms, pins)
            else:
                why = "broadcast over other channels" if len(atoms) == 1 else "whose size is fixed"
                labels.block(atoms, f"{name} a tensor {why}")
    return Value(result.shape, result.atoms, result.pins, lost)


@rule("add", "sub", "rsub")
def _add(labels: Labels, out, a, b, *args, **kwargs) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return _elementwise(labels, out, a, b, "adding", product=False)
    value, constant = (a, b) if isinstance(a, Value) else (b, a)
    return value if constant == 0 else value.without_pins(f"adding {constant}")


@rule("mul", "multiply")
def _mul(labels: Labels, out, a, b) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return _elementwise(labels, out, a, b, "multiplying", product=True)
    return a if isinstance(a, Value) else b


@rule("div", "true_divide")
def _div(labels: Labels, out, a, b, **kwargs) -> Value:
    if not isinstance(a, Value) or (isinstance(b, Value) and b.labelled):
        inputs = [v for v in (a, b) if isinstance(v, Value)]
        return unknown(labels, "dividing by a channel", inputs, out)[0]
    if isinstance(b, Value):
        return _elementwise(labels, out, a, b, "dividing", product=True)
    if kwargs.get("rounding_mode") is not None or b == 0:
        return a.without_pins("this division does not keep 0")
    return a
