"""Pooling, padding, resizing, joining, cutting up and summing."""

from __future__ import annotations

import numpy as np

from ..labels import NO_PIN, Labels, Value
from .elementwise import pairwise
from .registry import Rule, drop, only_dim, rule, unknown

# Each channel (the dimension before so many spatial ones) is pooled or resized by itself.
PER_CHANNEL = {
    **dict.fromkeys(("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"), 1),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "lp_pool2d"), 2),
    **dict.fromkeys(("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d"), 3),
    **dict.fromkeys(("upsample_nearest1d", "upsample_linear1d", "reflection_pad1d"), 1),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), 2),
    **dict.fromkeys(("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d"), 2),
    **dict.fromkeys(("_upsample_nearest_exact2d", "reflection_pad2d", "replication_pad2d"), 2),
    **dict.fromkeys(("upsample_nearest3d", "upsample_trilinear3d", "replication_pad3d"), 3),
    **dict.fromkeys(("grid_sampler",), 2),
}
# A dimension cut into at most so many equal parts is taken to be cut so at every width.
MAX_PARTS = 16


def _channel_pool(spatial: int) -> Rule:
    def pool(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
        for value in args:
            if isinstance(value, Value):
                labels.block_value(value, "gives the places to sample")
        dim = len(x.shape) - spatial - 1
        x = only_dim(labels, x, dim, "pooling")
        return Value(out[0], x.atoms, x.pins, x.lost)

    return pool


for _name, _spatial in PER_CHANNEL.items():
    rule(_name)(_channel_pool(_spatial))


@rule("max_pool2d_with_indices", "adaptive_max_pool2d")
def _pool_with_indices(labels: Labels, out, x: Value, *args, **kwargs) -> list[Value]:
    return [_channel_pool(2)(labels, out[:1], x), *(Value.plain(shape) for shape in out[1:])]


@rule("pad", "constant_pad_nd")
def _pad(labels: Labels, out, x: Value, pad, mode="constant", value=None) -> Value:
    if not isinstance(mode, str):
        mode, value = "constant", mode
    padded = {len(x.shape) - 1 - k // 2 for k, n in enumerate(pad) if n}
    for d in sorted(padded & set(x.labelled)):
        k = 2 * (len(x.shape) - 1 - d)
        if mode != "constant" or pad[k] < 0 or pad[k + 1] < 0:
            x = drop(labels, x, [d], "padding moves or cuts channels")
            continue
        ends = (pad[k], pad[k + 1])
        x = x.with_dim(d, np.pad(x.atoms[d], ends, constant_values=-1),
                       np.pad(x.pins[d], ends, constant_values=NO_PIN))  # fmt: skip
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
        for v in values:
            if not v.data and v.pins[d] is not None:
                labels.own(v.pins[d], "row")
        if d == dim:
            result = result.with_dim(d, np.concatenate(atoms), np.concatenate(pins))
            continue
        for other in atoms[1:]:
            labels.join(atoms[0], other, "concatenated with channels that are fixed")
        result = result.with_dim(d, atoms[0], labels.all_pins(np.stack(pins)))
    lost = next((v.lost for v in values if v.lost), "")
    return Value(result.shape, result.atoms, result.pins, lost)


@rule("stack")
def _stack(labels: Labels, out, values, dim=0) -> Value:
    dim %= len(out[0])
    dims = [d - (d > dim) if d != dim else None for d in range(len(out[0]))]
    shape = [1 if d == dim else n for d, n in enumerate(out[0])]
    return _cat(labels, out, [v.reshaped(shape, dims) for v in values], dim)


def _parts(labels: Labels, x: Value, dim: int, n: int) -> tuple[np.ndarray | None, ...]:
    """Atoms and pins that ``n`` equal parts of ``dim`` have in common: they are cut alike."""
    atoms, pins = labels.split(x.atoms[dim], x.pins[dim], (n, x.shape[dim] // n))
    labels.block(atoms[0], "these channels are cut into parts, which shrink alike")
    return atoms[1], pins[1]


def _cut(labels: Labels, out, x: Value, dim: int, starts: list[int]) -> list[Value]:
    """Consecutive parts along ``dim`` that begin at ``starts``."""
    dim %= len(x.shape)
    dims = range(len(x.shape))
    results = [x.reshaped(shape, dims) for shape in out]
    if x.atoms[dim] is None:
        return results
    lengths = {shape[dim] for shape in out}
    if len(lengths) == 1 and 1 < len(out) and sum(s[dim] for s in out) == x.shape[dim]:
        atoms, pins = _parts(labels, x, dim, len(out))
        return [r.with_dim(dim, atoms, pins) for r in results]
    ends = [start + shape[dim] for start, shape in zip(starts, out, strict=True)]
    return [
        r.with_dim(dim, x.atoms[dim][a:b], x.pins[dim][a:b])
        for r, a, b in zip(results, starts, ends, strict=True)
    ]


@rule("chunk", "split", "split_with_sizes", "tensor_split", "split_copy", "unsafe_chunk",
      "unsafe_split")  # fmt: skip
def _split(labels: Labels, out, x: Value, parts, dim=0) -> list[Value]:
    sizes = [shape[dim % len(x.shape)] for shape in out]
    if isinstance(parts, int) and len(set(sizes)) > 1 and not labels.as_graph:
        # The parts of another width would begin elsewhere. (A list of sizes would not fit at all.)
        x = drop(labels, x, [d for d in x.labelled if d == dim % len(x.shape)],
                 "cut into unequal parts")  # fmt: skip
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return _cut(labels, out, x, dim, starts)


@rule("slice", "narrow")
def _slice(labels: Labels, out, x: Value, dim=0, start=None, end=None, step=1) -> Value:
    dim %= len(x.shape)
    result = x.reshaped(out[0], range(len(x.shape)))
    n, kept = x.shape[dim], out[0][dim]
    if x.atoms[dim] is None or kept == n:
        return result
    start = 0 if start is None else max(start + n if start < 0 else start, 0)
    equal = kept and step == 1 and n % kept == 0 and start % kept == 0
    if equal and kept > 1 and n // kept <= MAX_PARTS:
        return result.with_dim(dim, *_parts(labels, x, dim, n // kept))
    if step > 1:
        # Every step-th: whole runs of them go, or none.
        if n % step or start >= step or kept != n // step or kept < 2:
            return drop(labels, x, [dim], "strided over these channels").reshaped(
                out[0], range(len(x.shape))
            )
        atoms, pins = labels.split(x.atoms[dim], x.pins[dim], (kept, step))
        labels.block(atoms[1], "strided over these channels")
        return result.with_dim(dim, atoms[0], pins[0])
    stop = start + kept
    if not labels.as_graph:
        # Bounds in Python stay where they are: what lies before them can not go.
        counted = n if stop < n else start
        labels.block(x.atoms[dim][: min(counted, stop)], "cut out at a fixed place")
    return result.with_dim(dim, x.atoms[dim][start:stop], x.pins[dim][start:stop])


@rule("select")
def _select(labels: Labels, out, x: Value, dim: int, index: int) -> Value:
    dim %= len(x.shape)
    labels.block(x.atoms[dim], "one of these is selected by its number")
    return x.reshaped(out[0], [d for d in range(len(x.shape)) if d != dim])


@rule("unbind")
def _unbind(labels: Labels, out, x: Value, dim: int = 0) -> list[Value]:
    return [_select(labels, [shape], x, dim, 0) for shape in out]


@rule("index")
def _index(labels: Labels, out, x: Value, indices) -> Value:
    for value in indices:
        if value is not None:
            labels.block_value(value, "used as an index")
    rank = len(x.shape)
    indices = [*indices, *[None] * (rank - len(indices))]
    at = [d for d in range(rank) if indices[d] is not None]
    x = drop(labels, x, [d for d in at if x.atoms[d] is not None], "picked by index")
    inserted = len(np.broadcast_shapes(*(indices[d].shape for d in at)))
    together = at == list(range(at[0], at[-1] + 1))
    kept = [d for d in range(rank) if d not in at]
    before = [d for d in kept if d < at[0]] if together else []
    dims = [*before, *[None] * inserted, *(d for d in kept if d not in before)]
    if len(dims) != len(out[0]):
        return unknown(labels, "indexing with a mask", [x], out)[0]
    return x.reshaped(out[0], dims)


@rule("index_select")
def _index_select(labels: Labels, out, x: Value, dim: int, index: Value) -> Value:
    dim %= len(x.shape)
    if x.atoms[dim] is not None:
        x = drop(labels, x, [dim], "picked by index")
    labels.block_value(index, "used as an index")
    return x.reshaped(out[0], range(len(x.shape)))


@rule("roll")
def _roll(labels: Labels, out, x: Value, shifts, dims=()) -> Value:
    dims = [dims] if isinstance(dims, int) else dims
    rolled = {d % len(x.shape) for d in dims} or set(range(len(x.shape)))
    return drop(labels, x, sorted(rolled & set(x.labelled)), "rolled along these channels")


@rule("flip")
def _flip(labels: Labels, out, x: Value, dims) -> Value:
    for d in {d % len(x.shape) for d in dims} & set(x.labelled):
        x = x.with_dim(d, x.atoms[d][::-1], x.pins[d][::-1])
    return x


@rule("tril", "triu")
def _triangle(labels: Labels, out, x: Value, *args) -> Value:
    rank = len(x.shape)
    return drop(labels, x, [d for d in x.labelled if d >= rank - 2], "cut to a triangle")


def _reduced(x: Value, shape, dim, keepdim: bool) -> tuple[Value, list[int]]:
    """``x`` without ``dim``, and the labelled dimensions among those that went."""
    rank = len(x.shape)
    if dim is None or dim == []:
        dim = list(range(rank))
    gone = {d % rank for d in ([dim] if isinstance(dim, int) else dim)}
    kept = [None if d in gone else d for d in range(rank) if keepdim or d not in gone]
    return x.reshaped(shape, kept), sorted(gone & set(x.labelled))


@rule("sum")
def _sum(labels: Labels, out, x: Value, dim=None, keepdim=False, **kwargs) -> Value:
    result, gone = _reduced(x, out[0], dim, keepdim)
    for d in gone:
        labels.consume(x.atoms[d], x.pins[d], "a sum", x.lost)
        labels.own(None if x.data else x.pins[d], "row")
    return result


@rule("mean")
def _mean(labels: Labels, out, x: Value, dim=None, keepdim=False, **kwargs) -> Value:
    result, gone = _reduced(x, out[0], dim, keepdim)
    for d in gone:
        labels.block(x.atoms[d], "a mean counts these channels")
    return result


@rule("glu")
def _glu(labels: Labels, out, x: Value, dim: int = -1) -> Value:
    a, b = _cut(labels, [out[0], out[0]], x, dim, [0, out[0][dim]])
    gate = b.without_pins("sigmoid(0) is not 0")
    return pairwise(labels, out, a, gate, "multiplying", product=True)
