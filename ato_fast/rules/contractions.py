"""Sums of products: convolutions, linear layers, matrix products, einsum, embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..labels import Labels, Value
from .elementwise import pairwise
from .registry import InputError, only_dim, rule, unknown


def contract(
    labels: Labels, name: str, operands: Sequence[tuple[Value, Sequence]], out_axes: Sequence,
    shape: Sequence[int], weight: Value | None = None,
) -> Value:  # fmt: skip
    """A product of ``operands``, each a value with a name per dimension, summed over the names that
    ``out_axes`` lacks. Sizes of 1 broadcast. Zero wherever a factor is; what a sum reads has to be
    zero with its group. ``weight`` is the parameter whose layer this is, if any."""
    lost = "; ".join(dict.fromkeys(v.lost for v, _ in operands if v.lost))
    result = Value.plain(shape, lost=lost)
    who = (weight and weight.tensor) or name
    for axis in dict.fromkeys(a for _, axes in operands for a in axes):
        sides = [(v, list(axes).index(axis)) for v, axes in operands if axis in axes]
        marked = [(v, d) for v, d in sides if v.atoms[d] is not None]
        if not marked:
            continue
        value, dim = marked[0]
        atoms = value.atoms[dim]
        if any(v.atoms[d] is None and v.shape[d] > 1 for v, d in sides):
            for v, d in marked:
                labels.block(v.atoms[d], f"{who} reads it together with a size that is fixed")
            continue
        for v, d in marked[1:]:
            labels.join(atoms, v.atoms[d], f"{who} reads fixed channels too")
        if axis in out_axes:
            # The weight's own rows first: they are what the layer adds to the group.
            proofs = sorted(marked, key=lambda side: side[0].data)
        else:
            # A weight's own columns prove nothing: what it reads has to be zero.
            proofs = [side for side in marked if side[0].data] or marked
        pins = proofs[0][0].pins[proofs[0][1]]
        for v, d in proofs[1:]:
            pins = np.where(pins >= 0, pins, v.pins[d])
        for v, d in proofs:
            if not v.data:
                labels.own(v.pins[d], "row")
        if axis in out_axes:
            result = result.with_dim(list(out_axes).index(axis), atoms, pins)
        else:
            labels.consume(atoms, pins, who, lost)
    if weight is None or weight.tensor is None:
        _count(labels, name, operands, out_axes)
    return result


def _count(labels: Labels, name: str, operands: Sequence, out_axes: Sequence) -> None:
    """Multiply-adds of a product of two, then of the result and the third, and so on."""
    left = list(operands[0][1])
    for k, (_, axes) in enumerate(operands[1:], 2):
        involved = list(dict.fromkeys([*left, *axes]))
        coef, sizes = 1, []
        for axis in involved:
            sides = [(v, list(names).index(axis)) for v, names in operands if axis in names]
            marked = [v.atoms[d] for v, d in sides if v.atoms[d] is not None]
            if marked:
                sizes.append(marked[0])
            else:
                coef *= max(v.shape[d] for v, d in sides)
        labels.count(name, coef, sizes)
        needed = {a for _, names in operands[k:] for a in names} | set(out_axes)
        left = [axis for axis in involved if axis in needed]


def _plus_bias(labels: Labels, out, x: Value, bias: Value | None, dim: int) -> Value:
    """``x`` plus a bias along ``dim``, which belongs to the rows it is added to."""
    if bias is None:
        return x
    rank = len(x.shape)
    dims = [0 if d == dim % rank else None for d in range(rank)]
    shape = [x.shape[d] if dims[d] == 0 else 1 for d in range(rank)]
    result = pairwise(labels, out, x, bias.reshaped(shape, dims), "adding a bias to", product=False)
    if x.atoms[dim] is not None:
        labels.own(bias.pins[0], "row")
    return result


@rule("linear")
def _linear(labels: Labels, out, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if weight.tensor is not None:
        labels.count_weight(weight, math.prod(out[0][:-1]))
    lead = list(range(len(x.shape) - 1))
    operands = ((x, [*lead, "i"]), (weight, ["o", "i"]))
    result = contract(labels, "linear", operands, [*lead, "o"], out[0], weight)
    return _plus_bias(labels, out, result, bias, -1)


@rule("conv1d", "conv2d", "conv3d")
def _conv(
    labels: Labels, out, x: Value, weight: Value, bias=None, stride=1, padding=0, dilation=1,
    groups=1,
) -> Value:  # fmt: skip
    result = _convolve(labels, out, x, weight, groups, False, math.prod(out[0][2:]))
    return _plus_bias(labels, out, result, bias, 1)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    labels: Labels, out, x: Value, weight: Value, bias=None, stride=1, padding=0,
    output_padding=0, groups=1, dilation=1,
) -> Value:  # fmt: skip
    result = _convolve(labels, out, x, weight, groups, True, math.prod(x.shape[2:]))
    return _plus_bias(labels, out, result, bias, 1)


def _convolve(
    labels: Labels, out, x: Value, weight: Value, groups: int, transposed: bool, positions: int
) -> Value:
    """Convolution without bias; weight ``[out, in/groups, ...]``, transposed ``[in, out/groups]``.

    A grouped convolution folds its channels into (group, place in the group): either whole groups
    go, or the same places of every group.
    """
    if len(x.shape) < len(weight.shape):
        raise InputError(
            "example_inputs: expected a batch, as the first dimension; a convolution got "
            f"an input without one (its output has shape {out[0]})"
        )
    whole = x = only_dim(labels, x, 1, "convolution")
    shape = weight.shape
    if weight.tensor is not None:
        labels.count_weight(weight, x.shape[0] * positions)
    x = x.reshaped((*x.shape[:2], positions * math.prod(shape[2:])), (0, 1, None))
    kernel = weight.reshaped(shape[:2], (0, 1))
    name = "conv_transpose" if transposed else "conv"
    if groups == 1:
        axes = ["i", "o"] if transposed else ["o", "i"]
        operands = ((x, ["b", "i", "p"]), (kernel, axes))
        return contract(labels, name, operands, ["b", "o", "p"], out[0], weight)

    rows, columns = shape[0] // groups, shape[1]
    place_in, place_out = (rows, columns) if transposed else (columns, rows)
    order = (0, 1) if groups >= columns else (1, 0)

    def grid(value: Value, dim: int, places: int) -> tuple[list, list, list]:
        if value.atoms[dim] is None:
            return [groups, places], [None, None], [None, None]
        atoms, pins = labels.split(value.atoms[dim], value.pins[dim], (groups, places), order)
        return [groups, places], atoms, pins

    sizes, atoms, pins = grid(x, 1, place_in)
    read = Value((x.shape[0], *sizes, x.shape[2]), (None, *atoms, None), (None, *pins, None),
                 x.lost, data=x.data)  # fmt: skip
    sizes, atoms, pins = grid(kernel, 0, rows)
    filters = Value((*sizes, columns), (*atoms, kernel.atoms[1]), (*pins, kernel.pins[1]),
                    kernel.lost, data=kernel.data)  # fmt: skip
    inner = ["i", "o"] if transposed else ["o", "i"]
    made = contract(labels, name, ((read, ["b", "g", "i", "p"]), (filters, ["g", *inner])),
                    ["b", "g", "o", "p"], (x.shape[0], groups, place_out, 1), weight)  # fmt: skip
    if whole.atoms[1] is not None:
        # Whole groups need no zero input, the rows are in the group; but what is read still has
        # to be gated where the published method gates it.
        live = (whole.atoms[1] >= 0) & (whole.pins[1] >= 0)
        labels.consumed.append((whole.atoms[1][live], whole.pins[1][live]))
    result = Value.plain(out[0], lost=made.lost)
    if not transposed:
        if kernel.atoms[0] is None:
            return result
        labels.own(kernel.pins[0], "row")
        return result.with_dim(1, kernel.atoms[0], kernel.pins[0])
    channels, pins = labels.merge(made.atoms[1:3], made.pins[1:3], (groups, place_out), order)
    return result if channels is None else result.with_dim(1, channels, pins)


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(labels: Labels, out, a: Value, b: Value) -> Value:
    rank = max(len(a.shape), len(b.shape), 2) - 2
    lead = [f"b{k}" for k in range(rank)]
    axes_a = [*lead[rank - len(a.shape) + 2 :], "m", "k"] if len(a.shape) > 1 else ["k"]
    axes_b = [*lead[rank - len(b.shape) + 2 :], "k", "n"] if len(b.shape) > 1 else ["k"]
    axes = [x for x in (*lead, "m", "n") if x in axes_a or x in axes_b]
    return contract(labels, "matmul", ((a, axes_a), (b, axes_b)), axes, out[0])


@rule("addmm", "baddbmm", "addmv", "addbmm")
def _addmm(labels: Labels, out, bias: Value, a: Value, b: Value, **kwargs) -> Value:
    result = _matmul(labels, out, a, b)
    return pairwise(labels, out, result, bias, "adding", product=False)


@rule("einsum")
def _einsum(labels: Labels, out, equation: str, operands: Sequence[Value], path=None) -> Value:
    equation = equation.replace(" ", "")
    terms, arrow, result = equation.partition("->")
    terms = terms.split(",")
    if not arrow:
        letters = sorted(set("".join(terms)) - {"."})
        result = "." * 3 * ("." in equation) + "".join(x for x in letters if equation.count(x) == 1)

    def axes(term: str, rank: int) -> list:
        before, dots, after = term.partition("...")
        n = rank - len(before) - len(after)
        return [*before, *range(-n if dots else 0, 0), *after]

    named = [(v, axes(t, len(v.shape))) for v, t in zip(operands, terms, strict=True)]
    if any(len(set(names)) != len(names) for _, names in named):
        return unknown(labels, "einsum with a repeated index", list(operands), out)[0]
    return contract(labels, "einsum", named, axes(result, len(out[0])), out[0])


@rule("embedding")
def _embedding(labels: Labels, out, weight: Value, indices: Value, *args, **kwargs) -> Value:
    labels.block(weight.atoms[0], "embedding rows are looked up by index")
    labels.block_value(indices, "used as an index")
    labels.own(weight.pins[1], "row")
    result = Value.plain(out[0], lost=weight.lost)
    return result.with_dim(-1 % len(out[0]), weight.atoms[1], weight.pins[1])


@rule("bilinear")
def _bilinear(labels: Labels, out, a: Value, b: Value, weight: Value, bias=None) -> Value:
    lead = list(range(len(a.shape) - 1))
    operands = ((a, [*lead, "i"]), (b, [*lead, "j"]), (weight, ["o", "i", "j"]))
    result = contract(labels, "bilinear", operands, [*lead, "o"], out[0])
    return _plus_bias(labels, out, result, bias, -1)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(labels: Labels, out, *args, **kwargs) -> list[Value]:
    def block(tree) -> None:
        for item in tree:
            if isinstance(item, Value):
                labels.block_value(item, "a recurrent layer feeds these channels back to itself")
            elif isinstance(item, list | tuple):
                block(item)

    block(args)
    # Every weight matrix is used once a step of the sequence.
    matrices = [v for item in args if isinstance(item, list | tuple) for v in item
                if isinstance(v, Value) and v.tensor is not None and len(v.shape) == 2]  # fmt: skip
    steps = math.prod(args[0].shape[:-1])
    labels.count("recurrent", steps * sum(math.prod(v.shape) for v in matrices), ())
    return [Value.plain(shape) for shape in out]
