"""Layers that own parameters: convolutions, linear layers, norms."""

from __future__ import annotations

import numpy as np

from ..labels import COMPUTED, Labels, Value
from .registry import only_dim, rule


def _produce(labels: Labels, weight: Value, bias: Value | None, dim: int, n: int):
    """Atoms and pins of what a weight's rows produce; None, None if weight or bias is computed."""
    names = [labels.weight(v) for v in (weight, bias) if v is not None]
    if None in names:
        for value in (weight, bias):
            if value is not None and value.tensor is not None:
                reason = "its layer's weight or bias is computed in the forward pass"
                labels.blocked_tensors.setdefault(value.tensor, reason)
        return None, None
    atoms = labels.rows(names[0], dim, n)
    for name in names[1:]:
        labels.attach(name, 0, atoms, "row")
    tensors = frozenset((name, dim if i == 0 else 0) for i, name in enumerate(names))
    return atoms, np.full(n, labels.pin(tensors), dtype=np.int64)


@rule("conv1d", "conv2d", "conv3d")
def _conv(
    labels: Labels, out, x: Value, weight: Value, bias=None, stride=1, padding=0, dilation=1,
    groups=1,
) -> Value:  # fmt: skip
    channel = len(x.shape) - len(weight.shape) + 1
    x = only_dim(labels, x, channel, "convolution")
    n_out, per_group = weight.shape[0], weight.shape[1]
    if groups == 1:
        labels.consume(x, channel, labels.weight(weight), 1)
        atoms, pins = _produce(labels, weight, bias, 0, n_out)
    else:
        atoms, pins = _produce(labels, weight, bias, 0, n_out)
        source = x.atoms[channel]
        if atoms is None:
            labels.block(source, COMPUTED)
        elif groups >= per_group:
            _whole_groups(labels, x, channel, weight, atoms, groups)
        else:
            _within_groups(labels, x, channel, weight, atoms, groups)
    if atoms is None:
        return Value.plain(out[0])
    return Value.channels(out[0], channel, atoms, pins)


def _whole_groups(
    labels: Labels, x: Value, channel: int, weight: Value, rows: np.ndarray, groups: int
) -> None:
    """Depthwise, and grouped with many groups: a convolution group is one channel.

    Its inputs, its outputs and its weights go together.
    """
    first = np.repeat(rows.reshape(groups, -1)[:, 0], len(rows) // groups)
    labels.join(rows, first, "")
    source, pins = x.atoms[channel], x.pins[channel]
    if source is None:
        labels.block(rows, f"{weight.tensor} is a grouped convolution over fixed channels")
        return
    labels.join(
        source,
        np.repeat(rows.reshape(groups, -1)[:, 0], len(source) // groups),
        f"{weight.tensor} is a grouped convolution, partly over fixed channels",
    )
    # The convolution's own rows are in the group, so a zero group needs no zero input; what it
    # reads still has to be gated where the published method gates it.
    live = (source >= 0) & (pins >= 0)
    labels.consumed.append((source[live], pins[live]))


def _within_groups(
    labels: Labels, x: Value, channel: int, weight: Value, rows: np.ndarray, groups: int
) -> None:
    """Few, wide groups: every group loses the same positions, of its inputs and of its outputs."""
    labels.join(np.tile(rows.reshape(groups, -1)[0], groups), rows, "")
    source, pins = x.atoms[channel], x.pins[channel]
    if source is None:
        fixed = np.full(weight.shape[1], -1, dtype=np.int64)
        labels.attach(weight.tensor, 1, fixed, "input")
        return
    per_group = source.reshape(groups, -1)
    labels.join(np.tile(per_group[0], groups), source, f"{weight.tensor} reads fixed channels too")
    folded = per_group[0]
    folded_pins = pins.reshape(groups, -1)[0]
    for others in pins.reshape(groups, -1)[1:]:
        folded_pins = labels.both_pins(folded_pins, others)
    view = Value.channels((len(folded),), 0, folded, folded_pins, x.lost)
    labels.consume(view, 0, weight.tensor, 1)


@rule("linear")
def _linear(labels: Labels, out, x: Value, weight: Value, bias: Value | None = None) -> Value:
    last = len(x.shape) - 1
    x = only_dim(labels, x, last, "a linear layer over another dimension")
    labels.consume(x, last, labels.weight(weight), 1)
    result = Value.plain(out[0])
    atoms, pins = _produce(labels, weight, bias, 0, weight.shape[0])
    return result.with_dim(last, atoms, pins)


@rule("batch_norm")
def _batch_norm(
    labels: Labels, out, x: Value, weight=None, bias=None, mean=None, var=None, *args, **kwargs
) -> Value:
    x = only_dim(labels, x, 1, "batch norm")
    atoms = x.atoms[1]
    parts = [v for v in (weight, bias, mean, var) if v is not None]
    if any(v.tensor is None for v in parts):
        labels.block(atoms, "batch norm with weights computed in the forward pass")
        atoms = None
    if atoms is None:
        atoms = np.full(x.shape[1], -1, dtype=np.int64)
    for part, role in ((weight, "affine"), (bias, "affine"), (mean, "stat"), (var, "stat")):
        if part is not None and part.tensor is not None:
            labels.attach(part.tensor, 0, atoms, role)
    if x.atoms[1] is None or not (atoms >= 0).any():
        return Value.plain(out[0])
    if weight is None:
        return x.without_pins("batch norm without affine shifts 0")
    tensors = frozenset((v.tensor, 0) for v in (weight, bias) if v is not None)
    return x.with_dim(1, atoms, np.full(len(atoms), labels.pin(tensors), dtype=np.int64))


@rule("layer_norm")
def _layer_norm(labels: Labels, out, x: Value, shape, weight=None, bias=None, *args) -> Value:
    for part in (weight, bias):
        if part is not None and part.tensor is not None:
            labels.blocked_tensors[part.tensor] = "LayerNorm normalises over this dimension"
    for d in x.labelled:
        if d >= len(x.shape) - len(shape):
            labels.block(x.atoms[d], "LayerNorm normalises over this dimension")
            x = x.with_dim(d, None, None)
    return x.without_pins("LayerNorm shifts 0")


@rule("group_norm", "instance_norm")
def _group_norm(labels: Labels, out, x: Value, *args, **kwargs) -> Value:
    for value in (x, *args):
        if isinstance(value, Value):
            labels.block_value(value, "its normalisation mixes or shifts these channels")
    return Value.plain(out[0])
