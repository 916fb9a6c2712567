"""Work tables of a step: where the groups lie in the flat buffers, in the order kernels walk them.

A `Plan` is plain int64 tables, built once per set of flat buffers with numpy; the mask is no part
of it, kernels read it per group.

* ``segments [n_segments, 8]``: ``tensor, buffer, hyper, start, grad_start, inner, outer, stride``.
* ``bundles [n_bundles, 5]``: ``segment_begin, segment_end, group_begin, n, hyper``: ``n``
  neighbouring groups, or elements in no group (``group_begin = -1, n = 1``). Channel ``c`` of a
  bundle owns, in each of its segments, ``outer`` pieces of ``inner`` contiguous elements at
  ``start + c * inner``, ``stride`` apart, of the flat buffer; the same from ``grad_start`` in the
  gradient. Bundles stand in memory order; ``hyper`` is the row whose lr the thresholds use.
* ``units [n_units + 1]``: bounds within ``bundles`` of pieces of about equal size, for threads.
* ``blocks [n_blocks, 3]``: ``bundle, first channel, n channels``, the longest first: the work of
  one thread block. Several channels share one only where each is short.

A bundle keeps neighbouring rows together: kept ones are updated in one sweep however the mask
alternates, and the tables have a few thousand rows where groups have tens of thousands of pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SEGMENT_COLUMNS = ("tensor", "buffer", "hyper", "start", "grad_start", "inner", "outer", "stride")
BUNDLE_COLUMNS = ("segment_begin", "segment_end", "group_begin", "n", "hyper")
BLOCK_COLUMNS = ("bundle", "first", "n")
TENSOR_COLUMNS = ("buffer", "offset", "numel", "hyper")

MAX_FREE = 1 << 12
"""Most elements of a bundle in no group: a thread block's work (112 KiB of AdamW traffic)."""
MAX_BUNDLE = 1 << 16
"""Most elements of a bundle of several groups: 1 MiB of fp32 streams, about a core's L2 cache."""
UNIT = 1 << 16
"""Elements per unit: about 2 MiB of AdamW traffic, so that the shared counter costs nothing."""
WARP_CHANNEL = 256
"""Most elements of a channel that one warp handles beside others: 8 per lane."""
WARPS = 8


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
    """Tables on the parameters' device; see the module docstring."""

    segments: torch.Tensor
    bundles: torch.Tensor
    units: torch.Tensor
    blocks: torch.Tensor


def build_plan(
    tensors: np.ndarray,
    axes: list[Axis],
    group_hyper: np.ndarray,
    device: torch.device,
    max_free: int = MAX_FREE,
    max_bundle: int = MAX_BUNDLE,
    unit: int = UNIT,
) -> Plan:
    """The tables of these tensors; every element is in exactly one bundle.

    Args:
        tensors: int64 ``[n_tensors, 4]`` (`TENSOR_COLUMNS`).
        axes: at most one per tensor; tensors without one are in no group.
        group_hyper: int64 ``[n_groups]``, hyperparameter row whose lr the group's threshold uses.
        device: where the tables go.
        max_free, max_bundle, unit: sizes in elements, see the constants.
    """
    axis_of = {axis.tensor: axis for axis in axes}
    parts = []
    for index in range(len(tensors)):
        numel = int(tensors[index, 2])
        axis = axis_of.get(index) or Axis(index, numel, 1, np.full(1, -1, dtype=np.int64))
        if numel:
            parts.append(_runs(axis))
    runs = np.concatenate(parts) if parts else np.empty((0, 6), dtype=np.int64)
    free = _split(runs[runs[:, 5] < 0], max_free)
    owned = runs[runs[:, 5] >= 0]
    owned = owned[np.lexsort((owned[:, 1], owned[:, 0], owned[:, 5]))]
    heads, n_channels, segment_counts = _bundled(owned, group_hyper, max_bundle)

    # One row of `runs` per segment: those of each bundle's first group, then the free ones.
    counts = np.concatenate([segment_counts, np.ones(len(free), dtype=np.int64)])
    rows = np.concatenate([owned[_ranges(heads, segment_counts)], free])
    n = np.concatenate([n_channels, np.ones(len(free), dtype=np.int64)])
    first = np.cumsum(counts) - counts
    group = rows[first, 5] if len(counts) else first

    tensor, start, inner, outer, stride, _ = rows.T
    buffer, offset, hyper = tensors[tensor, 0], tensors[tensor, 1], tensors[tensor, 3]
    # Place in the concatenation of all buffers: memory order for the walk over them.
    ends = np.zeros(int(tensors[:, 0].max(initial=0)) + 1, dtype=np.int64)
    np.maximum.at(ends, tensors[:, 0], tensors[:, 1] + tensors[:, 2])
    place = (np.cumsum(ends) - ends)[buffer] + offset + start
    columns = (tensor, buffer, hyper, offset + start, start, inner, outer, stride)
    order = np.argsort(place[first], kind="stable")
    segments = np.stack(columns, axis=1)[_ranges(first[order], counts[order])]
    counts, n, group = counts[order], n[order], group[order]
    ends = np.cumsum(counts)
    sizes = np.add.reduceat(segments[:, 5] * segments[:, 6], ends - counts) if len(ends) else ends
    padded = np.append(group_hyper, 0)
    bundles = np.stack([ends - counts, ends, group, n, padded[group]], axis=1)

    before = np.cumsum(sizes * n) - sizes * n
    units = np.append(np.flatnonzero(np.diff(before // unit, prepend=-1)), len(bundles))
    return Plan(
        *(
            torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64)).to(device)
            for table in (segments, bundles, units, _blocks(n, sizes, group))
        )
    )


def _runs(axis: Axis) -> np.ndarray:
    """Merge neighbouring entries of one group (or none) of a tensor.

    Returns int64 ``[n_runs, 6]``: tensor, start in it, inner, outer, stride, group.
    """
    groups, inner, outer = axis.groups, axis.inner, axis.outer
    first = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    length = np.diff(first, append=len(groups)) * inner
    stride = len(groups) * inner
    runs = np.empty((len(first), 6), dtype=np.int64)
    runs[:, 0] = axis.tensor
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


def _bundled(
    owned: np.ndarray, group_hyper: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First run, number of groups and runs per group of every bundle.

    ``owned`` is sorted by group, tensor and start. Neighbouring groups share a bundle where each
    piece of one directly follows the same piece of the other, if one lr serves both.
    """
    if not len(owned):
        empty = np.empty(0, dtype=np.int64)
        return empty, empty, empty
    begins = np.flatnonzero(np.diff(owned[:, 5], prepend=-1))
    counts = np.diff(begins, append=len(owned))
    sizes = np.add.reduceat(owned[:, 2] * owned[:, 3], begins)
    group = owned[begins, 5]

    # Whether a group continues the one before it: each of its runs against the run as far back as
    # a group has runs.
    back = np.arange(len(owned)) - np.repeat(counts, counts)
    before = owned[np.maximum(back, 0)]
    same = (before[:, [0, 2, 3, 4]] == owned[:, [0, 2, 3, 4]]).all(axis=1)
    follows = before[:, 1] + before[:, 2] == owned[:, 1]
    continues = np.logical_and.reduceat(same & follows & (back >= 0), begins)
    continues[0] = False
    continues[1:] &= (counts[1:] == counts[:-1]) & (np.diff(group) == 1)
    continues[1:] &= np.diff(group_hyper[group]) == 0

    chain = np.flatnonzero(~continues)
    position = np.arange(len(begins)) - np.repeat(chain, np.diff(chain, append=len(begins)))
    at_most = np.maximum(limit // sizes, 1)
    head = np.flatnonzero(position % at_most == 0)
    return begins[head], np.diff(head, append=len(begins)), counts[head]


def _blocks(n: np.ndarray, sizes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Thread blocks of bundles with ``n`` channels of ``sizes`` elements, longest first."""
    per_block = np.where((group >= 0) & (sizes <= WARP_CHANNEL), WARPS, 1)
    counts = -(-n // per_block)
    bundle = np.repeat(np.arange(len(n)), counts)
    first = _ranges(np.zeros(len(n), dtype=np.int64), counts) * per_block[bundle]
    taken = np.minimum(per_block[bundle], n[bundle] - first)
    order = np.argsort(-sizes[bundle], kind="stable")
    return np.stack([bundle, first, taken], axis=1)[order]


def _ranges(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``begin, begin + 1, ...`` of ``count`` each, end to end."""
    shift = begins - (np.cumsum(counts) - counts)
    return np.arange(counts.sum()) + np.repeat(shift, counts)


def _split(runs: np.ndarray, limit: int) -> np.ndarray:
    """Cut runs of more than ``limit`` elements: contiguous ones anywhere, others between pieces."""
    _, _, inner, outer, stride, _ = runs.T
    single = outer == 1
    per_part = np.where(single, limit, np.maximum(limit // np.maximum(inner, 1), 1))
    extent = np.where(single, inner, outer)
    parts = -(-extent // per_part)
    source = np.repeat(np.arange(len(runs)), parts)
    begin = _ranges(np.zeros(len(runs), dtype=np.int64), parts) * per_part[source]
    taken = np.minimum(per_part[source], extent[source] - begin)
    cut = runs[source]
    one = single[source]
    cut[:, 1] += begin * np.where(one, 1, stride[source])
    cut[:, 2] = np.where(one, taken, cut[:, 2])
    cut[:, 3] = np.where(one, 1, taken)
    return cut
