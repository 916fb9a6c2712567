"""Work tables of a step: which elements of the flat buffers are updated only, which projected.

A `Plan` is plain int64 tables, built with numpy when the mask changes and read by every kernel:

* ``chunks [n_chunks, 8]``: ``tensor, buffer, hyper, start, grad_start, inner, outer, stride``.
  A chunk is ``outer`` pieces of ``inner`` contiguous elements, ``stride`` apart, the first at
  ``start`` in its flat buffer and at ``grad_start`` in its gradient; all of one tensor. The first
  ``n_slots`` chunks belong to dropped groups, group by group (a kernel's partial sums are slots of
  the same number, so their order is fixed); the rest need no projection.
* ``items [n_items, 4]``: ``chunk_begin, chunk_end, group, hyper`` of every dropped group, by group.
* ``work``: all of it in memory order (items without chunks left out) for kernels whose threads walk
  the buffers: an item's index, or ``~index`` of a chunk that needs no projection.
* ``units [n_units + 1]``: bounds within ``work`` of pieces of about equal size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

CHUNK_COLUMNS = ("tensor", "buffer", "hyper", "start", "grad_start", "inner", "outer", "stride")
TENSOR_COLUMNS = ("buffer", "offset", "numel", "hyper")
ITEM_COLUMNS = ("chunk_begin", "chunk_end", "group", "hyper")

MAX_CHUNK = 1 << 14
"""Most elements of one chunk where it can be split (a whole row of ResNet-50 is at most 4608)."""
UNIT = 1 << 15
"""Elements per unit: about 1 MiB of AdamW traffic, so that the shared counter costs nothing."""


@dataclass(frozen=True)
class Axis:
    """How the channels of one tensor lie in memory.

    Args:
        tensor: row of the tensor table.
        inner: contiguous elements per channel and piece.
        outer: pieces per channel.
        groups: int64 ``[n_channels]``, flat group index or -1.
    """

    tensor: int
    inner: int
    outer: int
    groups: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Tables of one mask on the parameters' device; see the module docstring."""

    chunks: torch.Tensor
    items: torch.Tensor
    work: torch.Tensor
    units: torch.Tensor
    n_slots: int
    n_projected: int


def build_plan(
    tensors: np.ndarray,
    axes: list[Axis],
    group_hyper: np.ndarray,
    dropped: np.ndarray,
    device: torch.device,
    max_chunk: int = MAX_CHUNK,
    unit: int = UNIT,
) -> Plan:
    """The plan that projects the groups where ``dropped`` holds and updates everything.

    Args:
        tensors: int64 ``[n_tensors, 4]`` (`TENSOR_COLUMNS`).
        axes: at most one per tensor; tensors without one need no projection.
        group_hyper: int64 ``[n_groups]``, hyperparameter row whose lr the group's threshold uses.
        dropped: bool ``[n_groups]``.
        device: where the tables go.
        max_chunk: split longer chunks.
        unit: elements per unit.
    """
    axis_of = {axis.tensor: axis for axis in axes}
    parts = []
    for index in range(len(tensors)):
        axis = axis_of.get(index)
        numel = int(tensors[index, 2])
        if axis is None or numel == 0:
            groups, inner, outer = np.full(1, -1, dtype=np.int64), numel, 1
        else:
            member = (axis.groups >= 0) & dropped[axis.groups]
            groups, inner, outer = np.where(member, axis.groups, -1), axis.inner, axis.outer
        if numel:
            parts.append(_runs(index, groups, inner, outer))
    runs = np.concatenate(parts) if parts else np.empty((0, 6), dtype=np.int64)
    runs = _split(runs, max_chunk)

    tensor, start, inner, outer, stride, group = runs.T
    size = inner * outer
    buffer, offset, hyper = tensors[tensor, 0], tensors[tensor, 1], tensors[tensor, 3]
    # Place in the concatenation of all buffers: memory order for the walk over them.
    ends = np.zeros(int(tensors[:, 0].max(initial=0)) + 1, dtype=np.int64)
    np.maximum.at(ends, tensors[:, 0], tensors[:, 1] + tensors[:, 2])
    place = (np.cumsum(ends) - ends)[buffer] + offset + start

    order = np.lexsort((place, np.where(group < 0, np.iinfo(np.int64).max, group)))
    columns = (tensor, buffer, hyper, offset + start, start, inner, outer, stride)
    chunks = np.stack(columns, axis=1)[order]
    group, size, place = group[order], size[order], place[order]
    n_slots = int((group >= 0).sum())

    dropped_groups = np.flatnonzero(dropped)
    bounds = np.searchsorted(group[:n_slots], np.stack([dropped_groups, dropped_groups + 1]))
    items = np.stack([bounds[0], bounds[1], dropped_groups, group_hyper[dropped_groups]], axis=1)

    sums = np.concatenate([[0], np.cumsum(size[:n_slots])])
    filled = np.flatnonzero(bounds[1] > bounds[0])
    free = np.arange(n_slots, len(chunks))
    work = np.concatenate([filled, ~free])
    work_place = np.concatenate([place[bounds[0][filled]], place[free]])
    work_size = np.concatenate([(sums[bounds[1]] - sums[bounds[0]])[filled], size[free]])
    order = np.argsort(work_place, kind="stable")
    work, work_size = work[order], work_size[order]
    number = (np.cumsum(work_size) - work_size) // unit
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    units = np.append(starts, len(work))

    def table(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

    return Plan(table(chunks), table(items), table(work), table(units), n_slots, int(sums[-1]))


def _runs(tensor: int, groups: np.ndarray, inner: int, outer: int) -> np.ndarray:
    """Merge neighbouring channels of one label.

    Returns int64 ``[n_runs, 6]``: tensor, start in it, inner, outer, stride, group. Touching
    channels of one dropped group merge too.
    """
    first = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    length = np.diff(first, append=len(groups)) * inner
    stride = len(groups) * inner
    runs = np.empty((len(first), 6), dtype=np.int64)
    runs[:, 0] = tensor
    runs[:, 1] = first * inner
    runs[:, 2] = length
    runs[:, 3] = outer
    runs[:, 4] = stride
    runs[:, 5] = groups[first]
    # Pieces that touch are one piece.
    whole = length == stride
    runs[whole, 2] *= outer
    runs[whole, 3] = 1
    return runs


def _split(runs: np.ndarray, limit: int) -> np.ndarray:
    """Cut runs of more than ``limit`` elements: contiguous ones anywhere, others between pieces."""
    _, _, inner, outer, stride, _ = runs.T
    single = outer == 1
    per_part = np.where(single, limit, np.maximum(limit // np.maximum(inner, 1), 1))
    extent = np.where(single, inner, outer)
    parts = -(-extent // per_part)
    source = np.repeat(np.arange(len(runs)), parts)
    begin = (np.arange(len(source)) - np.repeat(np.cumsum(parts) - parts, parts)) * per_part[source]
    taken = np.minimum(per_part[source], extent[source] - begin)
    cut = runs[source]
    one = single[source]
    cut[:, 1] += begin * np.where(one, 1, stride[source])
    cut[:, 2] = np.where(one, taken, cut[:, 2])
    cut[:, 3] = np.where(one, 1, taken)
    return cut
