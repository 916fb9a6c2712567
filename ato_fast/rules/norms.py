"""Normalisations: which of them keep channels apart, and what makes their output zero."""

from __future__ import annotations

import numpy as np

from ..labels import Labels, Value
from .elementwise import pairwise
from .registry import Rule, drop, only_dim, rule, unknown


def _affine(
    labels: Labels, x: Value, weight: Value | None, bias: Value | None, dim: int, name: str,
    keeps_zero: bool,
) -> Value:  # fmt: skip
    """Scale and shift channel by channel along ``dim``, after a norm of each channel by itself."""
    atoms = x.atoms[dim]
    parts = [v for v in (weight, bias) if v is not None]
    for part in parts:
        labels.join(atoms, part.atoms[0], f"{name} over channels that are fixed")
    if atoms is None:
        return x
    if not parts:
        return x if keeps_zero else x.without_pins(f"{name} without affine shifts 0")
    pins = labels.all_pins(np.stack([v.pins[0] for v in parts]))
    labels.own(pins, "affine")
    lost = next((v.lost for v in parts if v.lost), x.lost)
    if weight is None and not keeps_zero:
        return x.without_pins(f"{name} without weight shifts 0")
    return x.with_dim(dim, atoms, pins, lost)


@rule("batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit")
def _batch_norm(
    labels: Labels, out, x: Value, weight=None, bias=None, mean=None, var=None, *args, **kwargs
) -> list[Value]:
    x = only_dim(labels, x, 1, "batch norm")
    for part in (mean, var):
        if part is not None:
            labels.join(x.atoms[1], part.atoms[0], "batch norm over channels that are fixed")
            if part.tensor is not None and part.labelled:
                labels.role((part.tensor, 0), "stat")
    # Without running statistics the mean of a zero channel is zero, and so is its output.
    result = _affine(labels, x, weight, bias, 1, "batch norm", keeps_zero=mean is None)
    return [result, *(Value.plain(shape) for shape in out[1:])]


@rule("instance_norm")
def _instance_norm(
    labels: Labels, out, x: Value, weight=None, bias=None, mean=None, var=None, *args, **kwargs
) -> Value:
    return _batch_norm(labels, out, x, weight, bias, mean, var)[0]


@rule("rms_norm", "_fused_rms_norm")
def _rms_norm(labels: Labels, out, x: Value, shape, weight=None, eps=None) -> list[Value]:
    return _layer_norm(labels, out, x, shape, weight)


@rule("layer_norm", "native_layer_norm")
def _layer_norm(labels: Labels, out, x: Value, shape, weight=None, bias=None, *args) -> list[Value]:
    over = "LayerNorm normalises over this dimension"
    for part in (weight, bias):
        if part is not None:
            labels.block_value(part, over)
    first = len(x.shape) - len(shape)
    x = drop(labels, x, [d for d in x.labelled if d >= first], over)
    if bias is not None and isinstance(bias, Value):
        x = x.without_pins("LayerNorm shifts 0")
    return [x, *(Value.plain(s) for s in out[1:])]


@rule("group_norm")
def _group_norm(
    labels: Labels, out, x: Value, groups: int, weight=None, bias=None, *args, **kwargs
) -> Value:
    mixes = "GroupNorm normalises over the channels of a group together"
    x = only_dim(labels, x, 1, "group norm")
    atoms, size = x.atoms[1], x.shape[1] // groups
    if groups == 1 or atoms is None:
        for part in (x, weight, bias):
            if part is not None:
                labels.block_value(part, mixes if groups == 1 else "norm over fixed channels")
        return Value.plain(out[0])
    if size > 1:
        # Whole groups of the norm go, or none: they become one channel.
        labels.join(atoms, np.repeat(atoms.reshape(groups, size)[:, 0], size), mixes)
    return _affine(labels, x, weight, bias, 1, "group norm", keeps_zero=True)


@rule("linalg_vector_norm", "norm")
def _vector_norm(labels: Labels, out, x: Value, order=2, dim=None, keepdim=False, **kwargs):
    rank = len(x.shape)
    if isinstance(order, int | float) and order <= 0:
        return unknown(labels, f"a norm of order {order}", [x], out)[0]
    dims = range(rank) if dim is None or dim == [] else ([dim] if isinstance(dim, int) else dim)
    gone = {d % rank for d in dims}
    for d in gone & set(x.labelled):
        labels.consume(x.atoms[d], x.pins[d], "a norm", x.lost)
        labels.own(x.pins[d] if not x.data else None, "row")
    kept = [None if d in gone else d for d in range(rank) if keepdim or d not in gone]
    return x.reshaped(out[0], kept)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin")
def _softmax(labels: Labels, out, x: Value, dim: int, *args, **kwargs) -> Value:
    dim %= len(x.shape)
    if x.atoms[dim] is not None:
        x = drop(labels, x, [dim], "softmax normalises over this dimension")
    return x.without_pins("softmax(0) is not 0")


# Operations along dimensions that keep the channels of the others apart: where the dimension stands
# among the arguments after the tensor, and what it is if it is left out (None: all of them).
ALONG = {
    **dict.fromkeys(("amax", "amin", "max", "min", "argmax", "argmin", "any", "all"), (0, None)),
    **dict.fromkeys(("prod", "var", "std", "var_mean", "std_mean"), (0, None)),
    **dict.fromkeys(("median", "count_nonzero"), (0, None)),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp", "logsumexp"), (0, -1)),
    **dict.fromkeys(("sort", "argsort", "mode"), (0, -1)),
    **dict.fromkeys(("topk", "kthvalue"), (1, -1)),
}
# Of these, zero for zeros.
_ZERO_FOR_ZEROS = frozenset("amax amin max min any prod var std cumsum cumprod median mode".split())


def _along(name: str, place: int, default: int | None) -> Rule:
    def run(labels: Labels, out, x: Value, *args, **kwargs) -> list[Value]:
        if args and isinstance(args[0], Value):
            return [pairwise(labels, out, x, args[0], "comparing", product=False)]
        rank = len(x.shape)
        where = args[place] if len(args) > place else kwargs.get("dim", default)
        if where is None or isinstance(where, bool):
            where = list(range(rank))
        dims = {d % rank for d in ([where] if isinstance(where, int) else where)}
        x = drop(labels, x, sorted(dims & set(x.labelled)), f"{name} runs over this dimension")
        results = []
        for number, shape in enumerate(out):
            same = len(shape) == rank
            kept = [d for d in range(rank) if same or d not in dims]
            result = x.reshaped(shape, kept)
            if number or name not in _ZERO_FOR_ZEROS:
                result = result.without_pins(f"{name} does not keep zero")
            results.append(result)
        return results

    return run


for _name, (_place, _default) in ALONG.items():
    rule(_name)(_along(_name, _place, _default))
