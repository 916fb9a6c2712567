"""Reshapes and permutations: where channels are afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..labels import NO_PIN, Labels, Value
from .registry import drop, rule


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of old and new dimensions with equal products, from left to right; sizes above 1."""
    olds = [d for d, n in enumerate(old) if n > 1]
    news = [d for d, n in enumerate(new) if n > 1]
    runs = []
    i = j = 0
    while i < len(olds) or j < len(news):
        run = ([], [])
        left = right = 1
        while not run[0] or not run[1] or left != right:
            if left <= right and not (run[0] and left == right):
                run[0].append(olds[i])
                left *= old[olds[i]]
                i += 1
            else:
                run[1].append(news[j])
                right *= new[news[j]]
                j += 1
        runs.append(run)
    return runs


def reshape(labels: Labels, x: Value, shape: Sequence[int], order: Sequence[int] | None = None):
    """``x`` with another shape; ``order`` prefers axes where a dimension is split."""
    result = Value.plain(shape, lost=x.lost, data=x.data)
    if math.prod(x.shape) == 0:
        labels.block_value(x, "reshapes an empty tensor")
        return result
    for olds, news in _runs(x.shape, shape):
        atoms, pins = [x.atoms[d] for d in olds], [x.pins[d] for d in olds]
        if all(a is None for a in atoms):
            continue
        whole, whole_pins = atoms[0], pins[0]
        if len(olds) > 1:
            whole, whole_pins = labels.merge(atoms, pins, [x.shape[d] for d in olds])
        if len(news) == 1:
            result = result.with_dim(news[0], whole, whole_pins)
            continue
        parts = labels.split(whole, whole_pins, [shape[d] for d in news], order)
        for d, part, part_pins in zip(news, *parts, strict=True):
            result = result.with_dim(d, part, part_pins)
    return result


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze",
      "view_as", "reshape_as")  # fmt: skip
def _reshape(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
    return reshape(labels, x, out[0])


@rule("permute")
def _permute(labels: Labels, out, x: Value, dims) -> Value:
    return x.reshaped(out[0], [d % len(x.shape) for d in dims])


@rule("transpose", "swapaxes", "swapdims")
def _transpose(labels: Labels, out, x: Value, a: int, b: int) -> Value:
    dims = list(range(len(x.shape)))
    dims[a], dims[b] = dims[b], dims[a]
    return x.reshaped(out[0], dims)


@rule("t", "numpy_T", "mT", "adjoint")
def _turn(labels: Labels, out, x: Value) -> Value:
    rank = len(x.shape)
    return x if rank < 2 else _transpose(labels, out, x, rank - 2, rank - 1)


@rule("movedim", "moveaxis")
def _movedim(labels: Labels, out, x: Value, source, target) -> Value:
    rank = len(x.shape)
    source = [d % rank for d in ([source] if isinstance(source, int) else source)]
    target = [d % rank for d in ([target] if isinstance(target, int) else target)]
    rest = iter(d for d in range(rank) if d not in source)
    dims = [source[target.index(d)] if d in target else next(rest) for d in range(rank)]
    return x.reshaped(out[0], dims)


@rule("expand", "expand_as", "broadcast_to")
def _expand(labels: Labels, out, x: Value, other=None, *args, **kwargs) -> Value:
    missing = len(out[0]) - len(x.shape)
    dims = [None] * missing + list(range(len(x.shape)))
    result = x.reshaped(out[0], dims)
    if not x.labelled and not isinstance(other, Value):
        # A mask, say: as many copies as what they line up with, the batch aside.
        for d, n in enumerate(out[0]):
            if d and n > 1 and (d < missing or x.shape[d - missing] == 1):
                result = result.with_dim(d, labels.fresh(n), np.full(n, NO_PIN))
        return replace(result, lost="copies of one value")
    if isinstance(other, Value):
        for d in other.labelled:
            if result.atoms[d] is None:
                result = result.with_dim(d, other.atoms[d], np.full(out[0][d], NO_PIN))
                result = Value(result.shape, result.atoms, result.pins,
                               result.lost or "expanded over these channels")  # fmt: skip
    return result


@rule("repeat", "tile")
def _repeat(labels: Labels, out, x: Value, *repeats) -> Value:
    rank = len(out[0])
    result = x.reshaped(out[0], [None] * (rank - len(x.shape)) + list(range(len(x.shape))))
    for d in result.labelled:
        atoms = result.atoms[d]
        times = out[0][d] // len(atoms)
        result = result.with_dim(d, np.tile(atoms, times), np.tile(result.pins[d], times))
    return result


@rule("repeat_interleave")
def _repeat_interleave(labels: Labels, out, x: Value, repeats, dim=None, **kwargs) -> Value:
    if isinstance(repeats, Value) or dim is None:
        labels.block_value(x, "repeat_interleave with computed counts")
        return Value.plain(out[0])
    dim %= len(x.shape)
    result = x.reshaped(out[0], range(len(x.shape)))
    if x.atoms[dim] is None:
        return result
    return result.with_dim(dim, np.repeat(x.atoms[dim], repeats), np.repeat(x.pins[dim], repeats))


def _around_channels(labels: Labels, out, x: Value) -> tuple[Value, int]:
    """The result of moving pixels between dimension ``c`` and the two after it, but for ``c``."""
    c = len(x.shape) - 3
    x = drop(labels, x, [d for d in x.labelled if d > c], "a pixel shuffle mixes this dimension")
    return x.reshaped(out[0], [d if d < c else None for d in range(len(out[0]))]), c


@rule("pixel_shuffle")
def _pixel_shuffle(labels: Labels, out, x: Value, factor: int) -> Value:
    result, c = _around_channels(labels, out, x)
    if x.atoms[c] is None:
        return result
    atoms, pins = labels.split(x.atoms[c], x.pins[c], (x.shape[c] // factor**2, factor**2))
    labels.block(atoms[1], "these channels are pixels of one channel after pixel_shuffle")
    return result if atoms[0] is None else result.with_dim(c, atoms[0], pins[0])


@rule("pixel_unshuffle")
def _pixel_unshuffle(labels: Labels, out, x: Value, factor: int) -> Value:
    result, c = _around_channels(labels, out, x)
    if x.atoms[c] is None:
        return result
    times = factor**2
    return result.with_dim(c, np.repeat(x.atoms[c], times), np.repeat(x.pins[c], times))


@rule("channel_shuffle")
def _channel_shuffle(labels: Labels, out, x: Value, groups: int) -> Value:
    folded = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    y = reshape(labels, x, folded, order=(1, 0))
    turned = [0, 2, 1, *range(3, len(folded))]
    return reshape(labels, y.reshaped([folded[d] for d in turned], turned), out[0])
