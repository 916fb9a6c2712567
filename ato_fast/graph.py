"""A shrunk model as a graph: for forwards whose Python insists on a size.

The exported graph names every size as a constant, so each that counts channels can be replaced by
the number that is kept, whatever expression of the model's Python it came from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .capture import mode
from .groups import GroupLayout
from .labels import Value
from .probe import FullPrecision, difference, mapped, tensors
from .shrink import cut_tensors, duplicate, groups_left, named_tensors, replace_tensor, zero_

TOLERANCE = 1e-3
"""Of the largest output, in whatever precision and on whatever device the model is."""


@dataclass(frozen=True, eq=False)
class Traced:
    """What `trace` knows of the graph: its labelled values, and the group of every atom.

    Operations go by name, those of a region by the region's path and theirs; ``dead`` are those
    that nothing reads.
    """

    program: torch.export.ExportedProgram
    values: dict[str, object]
    arguments: dict[str, tuple]
    dead: frozenset[str]
    group_of: np.ndarray


class _Sizes:
    """Sizes after shrinking."""

    def __init__(self, traced: Traced, keep: np.ndarray) -> None:
        self.traced = traced
        self.keep = keep

    def alive(self, atoms: np.ndarray) -> np.ndarray:
        """Which entries stay, bool."""
        groups = np.where(atoms >= 0, self.traced.group_of[atoms], -1)
        return (groups < 0) | self.keep[groups]

    def kept(self, value: Value, dim: int) -> int:
        """Size of one dimension."""
        atoms = value.atoms[dim]
        return value.shape[dim] if atoms is None else int(self.alive(atoms).sum())

    def shape(self, value: Value) -> list[int]:
        """Size of every dimension."""
        return [self.kept(value, d) for d in range(len(value.shape))]


def _reshape(sizes: _Sizes, result: Value, args: list, inputs: tuple) -> list:
    return [args[0], sizes.shape(result), *args[2:]]


def _unflatten(sizes: _Sizes, result: Value, args: list, inputs: tuple) -> list:
    rank = len(result.shape) - len(args[2]) + 1
    first = args[1] % rank
    return [*args[:2], sizes.shape(result)[first : first + len(args[2])]]


def _split(sizes: _Sizes, result: list[Value], args: list, inputs: tuple) -> list:
    dim = args[2] if len(args) > 2 else 0
    return [args[0], [sizes.kept(part, dim) for part in result], dim]


def _slice(sizes: _Sizes, result: Value, args: list, inputs: tuple) -> list:
    dim, start, end = [*args[1:], *(0, None, None)[len(args) - 1 :]][:3]
    atoms = inputs[0].atoms[dim % len(inputs[0].shape)]
    if atoms is None:
        return args
    n = len(atoms)
    if len(args) > 4 and args[4] > 1:
        return [*args[:3], int(sizes.alive(atoms).sum()), args[4]]
    start = 0 if start is None else max(start + n if start < 0 else start, 0)
    before = int(sizes.alive(atoms[:start]).sum())
    return [args[0], dim, before, before + sizes.kept(result, dim), *args[4:]]


def _narrow(sizes: _Sizes, result: Value, args: list, inputs: tuple) -> list:
    sliced = _slice(sizes, result, [args[0], args[1], args[2], args[2] + args[3]], inputs)
    return [args[0], args[1], sliced[2], sliced[3] - sliced[2]]


def _grouped(place: int, tensor: int, dim: int) -> Callable:
    """Argument ``place`` counts groups of the channels of argument ``tensor`` along ``dim``."""

    def edit(sizes: _Sizes, result: Value, args: list, inputs: tuple) -> list:
        if len(args) <= place or args[place] == 1:
            return args
        atoms, groups = inputs[tensor].atoms[dim], args[place]
        if atoms is None:
            return args
        left = groups_left(np.flatnonzero(sizes.alive(atoms)), len(atoms) // groups, groups)
        return [*args[:place], left, *args[place + 1 :]]

    return edit


# What of an operation's arguments counts channels.
EDITS: dict[str, Callable] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _reshape),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    **dict.fromkeys(("unsafe_split", "unsafe_chunk"), _split),
    "slice": _slice,
    "narrow": _narrow,
    **{f"conv{n}d": _grouped(6, 1, 0) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _grouped(6, 1, 0) for n in (1, 2, 3)},
    "group_norm": _grouped(1, 0, 1),
    "channel_shuffle": _grouped(1, 0, 1),
}


def shrink_graph(model: nn.Module, layout: GroupLayout, mask) -> torch.fx.GraphModule:
    """The exported graph of ``model``, in evaluation mode, without the dropped groups.

    See `shrink` with ``as_graph=True``.
    """
    traced: Traced | None = layout.traced
    if traced is None:
        raise ValueError("layout: as_graph needs a layout that trace made in this process")
    kept = layout.kept_indices(mask)
    sizes = _Sizes(traced, layout.check_keep(mask).numpy())
    module = traced.program.module()
    for name, part in list(module.named_children()):
        if isinstance(part, torch.fx.GraphModule):
            # Every module made of the program has the same regions.
            setattr(module, name, copy.deepcopy(part))
    dense = dict(named_tensors(model))
    smaller = cut_tensors(dense, kept)
    copies: dict[int, torch.Tensor] = {}
    for name, _ in list(named_tensors(module)):
        if name in dense:
            old = dense[name]
            if id(old) not in copies:
                new = smaller.get(id(old))
                copies[id(old)] = _copy(old) if new is None else new
            replace_tensor(module, name, copies[id(old)])
    for path, part in module.named_modules():
        if isinstance(part, torch.fx.GraphModule):
            _edit(part, f"{path}." if path else "", sizes)
    return module


def _edit(part: torch.fx.GraphModule, path: str, sizes: _Sizes) -> None:
    """Put the sizes after shrinking in a graph, which is the whole one or a region of it."""
    traced = sizes.traced
    for node in reversed(part.graph.nodes):
        key = path + node.name
        if key in traced.dead:
            part.graph.erase_node(node)
        if node.op != "call_function" or key not in traced.arguments or key in traced.dead:
            continue
        name = getattr(node.target, "_opname", "").removesuffix("_")
        if name in EDITS:
            args = [*node.args, *node.kwargs.values()]
            args = EDITS[name](sizes, traced.values[key], args, traced.arguments[key])
            node.args, node.kwargs = tuple(args), {}
            if EDITS[name] is _split:
                # Parts that were equal may differ now.
                node.target = torch.ops.aten.split_with_sizes.default
    part.recompile()


def check_graph(
    small: torch.fx.GraphModule, model: nn.Module, layout: GroupLayout, mask, traced: Traced
) -> None:
    """Raise ValueError unless ``small`` computes what ``model`` with zeroed groups does."""
    zeroed = duplicate(model)
    zero_(zeroed, layout, mask)
    device = next(model.parameters()).device
    args, kwargs = mapped(traced.program.example_inputs, lambda x: x.to(device))
    with torch.no_grad(), mode(zeroed, training=False), FullPrecision(device.type):
        expected = list(tensors(zeroed(*args, **kwargs)))
        try:
            error = difference(expected, list(tensors(small(*args, **kwargs))))
        except Exception as reason:
            raise ValueError(f"as_graph: the shrunk graph does not run: {reason}") from reason
    if not error <= TOLERANCE:
        raise ValueError(
            f"as_graph: the shrunk graph gives another output than the model, relative error "
            f"{error:.1e}; trace with as_graph=True, which refuses the gates that cause it"
        )


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
    return tensor.detach().clone()


def values_of(args: Sequence) -> tuple:
    """The values among an operation's arguments, at their places."""
    return tuple(a if isinstance(a, Value) else None for a in args)
