"""Element by element: activations and arithmetic."""

from __future__ import annotations

import math

import numpy as np

from ..labels import FIXED, NO_PIN, Labels, Value
from .registry import Rule, only_dim, rule, unknown

# f(0) = 0, element by element: a zero channel stays zero.
KEEPS_ZERO = (
    "abs alias asinh atan celu clone contiguous detach dropout elu erf expm1 "
    "feature_dropout gelu hardshrink hardswish leaky_relu lift_fresh lift_fresh_copy log1p mish "
    "neg negative relu relu6 round rrelu selu sign silu sin sinh softshrink "
    "softsign square tan tanh tanhshrink to trunc type_as zeros_like _to_copy nan_to_num"
).split()

# Element by element, but f(0) != 0.
LOSES_ZERO = (
    "acos cos cosh exp hardsigmoid log log10 log2 log_sigmoid logit ones_like reciprocal rsqrt "
    "sigmoid softplus"
).split()

# Element by element: masks and noise, which nothing is known to be zero in.
NO_ZERO = (
    "bitwise_and bitwise_not bitwise_or eq ge gt isfinite isinf isnan le logical_and logical_not "
    "logical_or logical_xor lt ne rand_like randn_like"
).split()


@rule(*KEEPS_ZERO, "native_dropout")
def _keeps_zero(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
    return Value(out[0], x.atoms, x.pins, x.lost)


def _loses_zero(name: str) -> Rule:
    def lose(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
        if args and isinstance(args[0], Value):
            x = pairwise(labels, out, x, args[0], "comparing", product=False)
        return x.without_pins(f"{name}(0) is not 0" if name in LOSES_ZERO else f"{name} of it")

    return lose


for _name in LOSES_ZERO + NO_ZERO:
    rule(_name)(_loses_zero(_name))


@rule("sqrt")
def _sqrt(labels: Labels, out, x: Value) -> Value:
    return x.without_pins("sqrt has no gradient at 0")


@rule("full_like")
def _full_like(labels: Labels, out, x: Value, value, **kwargs) -> Value:
    return x if value == 0 else x.without_pins(f"filled with {value}")


@rule("fill", "zero")
def _fill(labels: Labels, out, x: Value, value=0) -> Value:
    return x if not isinstance(value, Value) and value == 0 else x.without_pins("filled")


@rule("hardtanh", "clamp", "clip")
def _hardtanh(labels: Labels, out, x: Value, low=None, high=None, **kwargs) -> Value:
    low = kwargs.get("min_val", kwargs.get("min", low))
    high = kwargs.get("max_val", kwargs.get("max", high))
    bounds = [v for v in (low, high) if isinstance(v, Value)]
    if any(math.prod(v.shape) > 1 for v in bounds):
        return unknown(labels, "clamp with tensor bounds", [x, *bounds], out)[0]
    if bounds:
        return x.without_pins("clamp to computed bounds may move 0")
    if (low is None or low <= 0) and (high is None or high >= 0):
        return x
    return x.without_pins(f"clamp to [{low}, {high}] moves 0")


@rule("clamp_min")
def _clamp_min(labels: Labels, out, x: Value, bound) -> Value:
    return _hardtanh(labels, out, x, bound, None)


@rule("clamp_max")
def _clamp_max(labels: Labels, out, x: Value, bound) -> Value:
    return _hardtanh(labels, out, x, None, bound)


@rule("threshold")
def _threshold(labels: Labels, out, x: Value, bound, value) -> Value:
    keeps = bound < 0 or value == 0
    return x if keeps else x.without_pins(f"threshold at {bound} turns 0 into {value}")


@rule("alpha_dropout", "feature_alpha_dropout")
def _alpha_dropout(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
    return x.without_pins("alpha dropout writes other values in training")


@rule("prelu", "_prelu_kernel")
def _prelu(labels: Labels, out, x: Value, weight: Value) -> Value:
    if math.prod(weight.shape) == 1:
        return x
    x = only_dim(labels, x, 1, "PReLU")
    labels.join(x.atoms[1], weight.atoms[0], FIXED)
    if x.atoms[1] is not None:
        labels.own(weight.pins[0], "affine")
    return x


@rule("pow")
def _pow(labels: Labels, out, x, exponent) -> Value:
    if isinstance(x, Value) and not isinstance(exponent, Value):
        return x if exponent >= 1 else x.without_pins(f"x ** {exponent} at 0")
    inputs = [v for v in (x, exponent) if isinstance(v, Value)]
    return unknown(labels, "pow with this exponent", inputs, out)[0]


@rule("new_empty", "new_zeros", "new_ones", "new_full", "size", "numel", "stride")
def _new(labels: Labels, out, x: Value, *args, **kwargs) -> list[Value]:
    return [Value.plain(shape) for shape in out]


def _aligned(value: Value, rank: int) -> Value:
    """``value`` with leading dimensions of size 1 up to ``rank``, as broadcasting does."""
    missing = rank - len(value.shape)
    dims = (None,) * missing + tuple(range(len(value.shape)))
    return value.reshaped((1,) * missing + value.shape, dims)


def pairwise(labels: Labels, out, a: Value, b: Value, name: str, product: bool) -> Value:
    """``a op b`` with broadcasting; zero where both are (a sum) or where either is (a product)."""
    rank = len(out[0])
    a, b = _aligned(a, rank), _aligned(b, rank)
    result = Value.plain(out[0])
    lost = a.lost or b.lost
    for d in range(rank):
        x, y = a.atoms[d], b.atoms[d]
        if x is None and y is None:
            continue
        if x is not None and y is not None:
            # What is never zero with its channels, such as a mask, is no other branch.
            zero = all((v.pins[d] >= 0).any() for v in (a, b))
            labels.join(x, y, f"{name} with channels that are fixed",
                        residual=not product and a.data and b.data and zero)  # fmt: skip
            for value in (a, b):
                if not value.data:
                    labels.own(value.pins[d], "affine")
            p, q = a.pins[d], b.pins[d]
            if product:
                first, second = (p, q) if a.data or not b.data else (q, p)
                pins = np.where(first >= 0, first, second)
            else:
                pins = labels.both_pins(p, q)
            result = result.with_dim(d, x, pins)
            continue
        value, other = (a, b) if y is None else (b, a)
        atoms = value.atoms[d]
        if other.shape[d] == 1:
            pins = value.pins[d]
            if not product:
                pins = np.full_like(pins, NO_PIN)
                lost = lost or f"{name} a value that is not zero with the group"
            elif not value.data:
                labels.own(pins, "affine")
            result = result.with_dim(d, atoms, pins)
        else:
            labels.block(atoms, f"{name} a tensor whose channels stay")
    return Value(result.shape, result.atoms, result.pins, lost)


@rule("add", "sub", "rsub", "subtract")
def _add(labels: Labels, out, a, b, *args, **kwargs) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return pairwise(labels, out, a, b, "adding", product=False)
    value, constant = (a, b) if isinstance(a, Value) else (b, a)
    return value if constant == 0 else value.without_pins(f"adding {constant}")


@rule("maximum", "minimum", "fmax", "fmin", "lerp")
def _extreme(labels: Labels, out, a: Value, b: Value, *args, **kwargs) -> Value:
    result = pairwise(labels, out, a, b, "comparing", product=False)
    if args and isinstance(args[0], Value):
        result = pairwise(labels, out, result, args[0], "mixing", product=True)
    return result


@rule("mul", "multiply")
def _mul(labels: Labels, out, a, b) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return pairwise(labels, out, a, b, "multiplying", product=True)
    return a if isinstance(a, Value) else b


@rule("addcmul", "addcdiv")
def _addcmul(labels: Labels, out, x: Value, a: Value, b: Value, **kwargs) -> Value:
    shape = np.broadcast_shapes(a.shape, b.shape)
    return _add(labels, out, x, pairwise(labels, [shape], a, b, "multiplying", product=True))


@rule("div", "true_divide", "divide")
def _div(labels: Labels, out, a, b, **kwargs) -> Value:
    if isinstance(b, Value):
        for d in b.labelled:
            # A dropped channel would be divided by zero.
            zero = b.pins[d] >= 0
            labels.block(b.atoms[d][zero], "divided by a value that is zero with the group")
    if not isinstance(a, Value):
        return b.without_pins("1/x does not keep 0")
    if isinstance(b, Value):
        b = b.without_pins(b.lost or "divided by it")
        result = pairwise(labels, out, a, b, "dividing", product=True)
        return result
    if kwargs.get("rounding_mode") is not None or b == 0:
        return a.without_pins("this division does not keep 0")
    return a


@rule("where")
def _where(labels: Labels, out, condition: Value, a=None, b=None) -> list[Value]:
    values = [v for v in (a, b) if isinstance(v, Value)]
    if not values:
        return unknown(labels, "where without a tensor to choose", [condition], out)
    if len(values) == 2:
        result = pairwise(labels, out, a, b, "choosing from", product=False)
    else:
        constant = b if values[0] is a else a
        result = values[0] if constant == 0 else values[0].without_pins(f"choosing {constant}")
    return [_mask(labels, out, result, condition)]


@rule("masked_fill")
def _masked_fill(labels: Labels, out, x: Value, mask: Value, value) -> Value:
    result = _mask(labels, out, x, mask)
    zero = not isinstance(value, Value) and value == 0
    return result if zero else result.without_pins("masked_fill writes other values")


def _mask(labels: Labels, out, x: Value, mask: Value) -> Value:
    mask = mask.without_pins("a mask")
    return pairwise(labels, out, x, mask, "masking", product=True)
