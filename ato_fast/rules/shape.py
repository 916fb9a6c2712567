"""Shape and place: pooling, padding, reshapes, permutations, concatenations, reductions."""

from __future__ import annotations

import math

import numpy as np

from ..labels import NO_PIN, Labels, Value
from .registry import Rule, only_dim, rule

# Each channel (dimension 1) is pooled or resized by itself.
PER_CHANNEL = {
    **dict.fromkeys(("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"), 1),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"), 2),
    **dict.fromkeys(("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d"), 3),
    **dict.fromkeys(("upsample_nearest1d", "upsample_linear1d"), 1),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), 2),
    **dict.fromkeys(("upsample_nearest3d", "upsample_trilinear3d"), 3),
}


def _channel_pool(spatial: int) -> Rule:
    def pool(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
        dim = len(x.shape) - spatial - 1
        x = only_dim(labels, x, dim, "pooling")
        return Value(out[0], x.atoms, x.pins, x.lost)

    return pool


for _name, _spatial in PER_CHANNEL.items():
    rule(_name)(_channel_pool(_spatial))


@rule("max_pool2d_with_indices", "adaptive_max_pool2d")
def _pool_with_indices(labels: Labels, out, x: Value, *args, **kwargs) -> list[Value]:
    return [_channel_pool(2)(labels, out[:1], x), Value.plain(out[1])]


@rule("pad", "constant_pad_nd")
def _pad(labels: Labels, out, x: Value, pad, mode="constant", value=None) -> Value:
    if not isinstance(mode, str):
        mode, value = "constant", mode
    n_padded = len(pad) // 2
    for d in x.labelled:
        from_end = len(x.shape) - 1 - d
        if from_end < n_padded and (pad[2 * from_end] or pad[2 * from_end + 1]):
            labels.block(x.atoms[d], "padding adds channels at a fixed place")
            x = x.with_dim(d, None, None)
    result = Value(out[0], x.atoms, x.pins, x.lost)
    if mode == "constant" and value:
        return result.without_pins(f"padding with {value}")
    return result


@rule("cat", "concat", "concatenate")
def _cat(labels: Labels, out, values, dim=0) -> Value:
    values = [v for v in values if v.shape != (0,)]
    rank = len(out[0])
    dim %= rank
    result = Value.plain(out[0])
    for d in range(rank):
        if all(v.atoms[d] is None for v in values):
            continue
        atoms = [np.full(v.shape[d], -1) if v.atoms[d] is None else v.atoms[d] for v in values]
        pins = [np.full(v.shape[d], NO_PIN) if v.pins[d] is None else v.pins[d] for v in values]
        if d == dim:
            result = result.with_dim(d, np.concatenate(atoms), np.concatenate(pins))
            continue
        all_pins = pins[0]
        for other, other_pins in zip(atoms[1:], pins[1:], strict=True):
            labels.join(atoms[0], other, "concatenated with channels that are fixed")
            all_pins = labels.both_pins(all_pins, other_pins)
        result = result.with_dim(d, atoms[0], all_pins)
    lost = next((v.lost for v in values if v.lost), "")
    return Value(result.shape, result.atoms, result.pins, lost)


def _segments(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of old and new dimensions with equal products, from left to right."""
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        olds, news = [], []
        left = right = 1
        if i < len(old):
            olds.append(i)
            left *= old[i]
            i += 1
        if j < len(new):
            news.append(j)
            right *= new[j]
            j += 1
        while left != right:
            if left < right:
                olds.append(i)
                left *= old[i]
                i += 1
            else:
                news.append(j)
                right *= new[j]
                j += 1
        runs.append((olds, news))
    return runs


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze")
def _reshape(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
    result = Value(out[0], (None,) * len(out[0]), (None,) * len(out[0]), x.lost)
    if math.prod(x.shape) == 0:
        labels.block_value(x, "reshapes an empty tensor")
        return result
    for olds, news in _segments(x.shape, out[0]):
        marked = [d for d in olds if x.atoms[d] is not None]
        if not marked:
            continue
        if len(marked) > 1 or not news:
            for d in marked:
                labels.block(x.atoms[d], "reshape merges two kinds of channels")
            continue
        source = marked[0]
        sizes = [x.shape[d] for d in olds]
        spread = [1] * len(olds)
        spread[olds.index(source)] = -1
        atoms = np.broadcast_to(x.atoms[source].reshape(spread), sizes)
        pins = np.broadcast_to(x.pins[source].reshape(spread), sizes)
        # The surviving channels end up in the size left open, or else, as a guess that the check
        # on the finished layout confirms or refutes, in the largest.
        left_open = [d for d in news if d in _open_dims(out[0], args)]
        target = left_open[0] if left_open else max(news, key=lambda d: out[0][d])
        place = news.index(target)
        shape = [out[0][d] for d in news]
        atoms = np.moveaxis(atoms.reshape(shape), place, -1).reshape(-1, shape[place])
        pins = np.moveaxis(pins.reshape(shape), place, -1).reshape(-1, shape[place])
        all_pins = pins[0]
        for other, other_pins in zip(atoms[1:], pins[1:], strict=True):
            labels.join(atoms[0], other, "reshape lines it up with fixed channels")
            all_pins = labels.both_pins(all_pins, other_pins)
        result = result.with_dim(target, atoms[0].copy(), all_pins.copy())
    return result


def _open_dims(shape: tuple[int, ...], args: tuple) -> list[int]:
    """Dimensions whose size a reshape's arguments leave open as -1."""
    sizes = next((a for a in args if isinstance(a, list | tuple)), ())
    first = args[0] % len(shape) if args and isinstance(args[0], int) else 0
    return [first + i for i, size in enumerate(sizes) if size == -1]


@rule("permute")
def _permute(labels: Labels, out, x: Value, dims) -> Value:
    return x.reshaped(out[0], tuple(d % len(x.shape) for d in dims))


@rule("transpose", "swapaxes")
def _transpose(labels: Labels, out, x: Value, a: int, b: int) -> Value:
    dims = list(range(len(x.shape)))
    dims[a], dims[b] = dims[b], dims[a]
    return x.reshaped(out[0], tuple(dims))


@rule("mean", "sum", "amax", "amin")
def _reduce(labels: Labels, out, x: Value, dim=None, keepdim=False, **kwargs) -> Value:
    rank = len(x.shape)
    if dim is None or dim == []:
        dim = list(range(rank))
    gone = {d % rank for d in ([dim] if isinstance(dim, int) else dim)}
    for d in gone & set(x.labelled):
        labels.block(x.atoms[d], "reduced over its channels")
    kept = [None if d in gone else d for d in range(rank) if keepdim or d not in gone]
    return x.reshaped(out[0], tuple(kept))
