"""The channel layout of a model as plain data: gates, slices and what could not be pruned.

Nothing here knows `torch.nn`. `trace.py` makes a `GroupLayout` from a model; every other module
reads it.

Vocabulary:

* **gate**: one space of ``n`` channels that live or die together across layers;
* **group** (zero-invariant group, ZIG): one channel of one gate, i.e. one entry of the mask;
* **mask**: one flat vector over all groups, gate by gate; 1 keeps the group, 0 drops it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

ROLES = ("row", "affine", "stat", "input")


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one tensor that belongs to one gate.

    Args:
        tensor: dotted name in ``model.state_dict()``.
        dim: dimension of the tensor that carries the channels.
        channels: int64 array ``[tensor.shape[dim]]``; entry = channel of the gate, -1 = not in it.
        role: ``row`` (produces the channel: conv/linear rows and their bias), ``affine`` (norm
            weight/bias), ``stat`` (running mean/variance), ``input`` (columns that consume it).
            ``row`` and ``affine`` together are the zero-invariant group: they are normed and
            projected. ``stat`` and ``input`` are only cut when shrinking.
        gated: multiplying these entries by a gate value w >= 0 multiplies the channel's
            pre-activation by w. True for the last affine before a consumer, or for the producing
            rows where no affine follows.
    """

    tensor: str
    dim: int
    channels: np.ndarray
    role: str
    gated: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: expected one of {ROLES}, got {self.role!r}")

    @property
    def in_group(self) -> bool:
        """Whether the slice is part of the zero-invariant group (normed and projected)."""
        return self.role in ("row", "affine")


@dataclass(frozen=True, eq=False)
class Gate:
    """``n`` channels that live or die together; ``offset`` is their place in the flat mask."""

    name: str
    n: int
    slices: tuple[Slice, ...]
    offset: int
    residual: bool = False
    """A residual add couples the channels of several producers (offered in scope ``all`` only)."""
    attributes: tuple[tuple[str, int], ...] = ()
    """Sizes that modules keep for themselves, such as ``("blocks.0.attn.num_heads", 1)``: dotted
    path and what one channel counts there."""

    @property
    def span(self) -> slice:
        """Where this gate's channels lie in the flat mask."""
        return slice(self.offset, self.offset + self.n)


@dataclass(frozen=True)
class Unprunable:
    """A parameter whose channels are in no gate, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class MacTerm:
    """``coef * prod(kept(tensor, dim) for tensor, dim in dims)`` multiply-adds per example.

    ``out_per_channel`` is the number of output elements per output channel of the operation
    (H*W of a convolution), which the published FLOP count needs.
    """

    name: str
    coef: int | float
    dims: tuple[tuple[str, int], ...]
    out_per_channel: int = 1


class Coverage(NamedTuple):
    """Shares of the whole model's MACs and parameters, in [0, 1]."""

    macs: float
    params: float


def check_widths(min_channels: int, round_to: int) -> None:
    """Raise ValueError unless both are ints >= 1."""
    for name, value in (("min_channels", min_channels), ("round_to", round_to)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")


@dataclass(frozen=True, eq=False)
class GroupLayout:
    """Gates and groups of one model, with everything left out and the reason for it.

    Args:
        gates: in forward order; ``gates[k].offset`` are consecutive.
        unprunable: parameters in no group.
        shapes: shape of every tensor of ``model.state_dict()``.
        parameters: names of the tensors that are parameters (the rest are buffers).
        mac_terms: multiply-adds of the whole model as products of kept channel counts.
        scope: ``inner`` or ``all``.
        as_graph: some gates shrink only as a graph (``shrink(..., as_graph=True)``).
        followers: what alone reads a layer's output. By the weight of a batch norm, an activation
            (its name in `masked.ACTIVATIONS`); by a convolution's, the weight of a batch norm.
        traced: what shrinking as a graph needs, in the process that traced; None elsewhere.
        min_channels, round_to: what `widths` allows whoever chooses a mask: at least so many
            channels of every gate, and a multiple.

    Raises:
        ValueError: gates, channel maps and shapes disagree; ``min_channels`` or ``round_to`` is no
            int >= 1.
    """

    gates: tuple[Gate, ...]
    unprunable: tuple[Unprunable, ...]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    mac_terms: tuple[MacTerm, ...]
    scope: str = "inner"
    model_name: str = "model"
    as_graph: bool = False
    followers: Mapping[str, str] = field(default_factory=dict, repr=False)
    traced: object = field(default=None, repr=False)
    min_channels: int = 1
    round_to: int = 1
    slices_of: Mapping[tuple[str, int], tuple[tuple[Gate, Slice], ...]] = field(
        init=False, repr=False
    )
    _groups_of: dict[tuple[str, int], np.ndarray] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        check_widths(self.min_channels, self.round_to)
        offset = 0
        table: dict[tuple[str, int], list[tuple[Gate, Slice]]] = {}
        for gate in self.gates:
            if gate.offset != offset:
                raise ValueError(f"gate {gate.name}: expected offset {offset}, got {gate.offset}")
            offset += gate.n
            for part in gate.slices:
                if part.tensor not in self.shapes:
                    raise ValueError(f"gate {gate.name}: unknown tensor {part.tensor!r}")
                expected = self.shapes[part.tensor][part.dim]
                if len(part.channels) != expected:
                    raise ValueError(
                        f"gate {gate.name}, {part.tensor} dim {part.dim}: expected a channel map "
                        f"of length {expected}, got {len(part.channels)}"
                    )
                table.setdefault((part.tensor, part.dim), []).append((gate, part))
        object.__setattr__(self, "slices_of", {k: tuple(v) for k, v in table.items()})

    @property
    def n_groups(self) -> int:
        """Number of groups = length of the mask."""
        return sum(gate.n for gate in self.gates)

    def gate(self, name: str) -> Gate:
        """The gate called ``name``; KeyError lists the names there are."""
        for gate in self.gates:
            if gate.name == name:
                return gate
        raise KeyError(f"no gate {name!r}; gates: {', '.join(g.name for g in self.gates)}")

    def groups_of(self, tensor: str, dim: int) -> np.ndarray:
        """Flat group index per entry of ``tensor`` along ``dim``; -1 = in no gate.

        Returns an int64 array ``[shape[dim]]``, read-only.
        """
        known = self._groups_of.get((tensor, dim))
        if known is not None:
            return known
        groups = np.full(self.shapes[tensor][dim], -1, dtype=np.int64)
        for gate, part in self.slices_of.get((tensor, dim), ()):
            member = part.channels >= 0
            groups[member] = part.channels[member] + gate.offset
        groups.flags.writeable = False
        self._groups_of[tensor, dim] = groups
        return groups

    def widths(self, gate: Gate) -> list[int]:
        """Numbers of channels that a mask may keep of ``gate``, ascending; the last is ``gate.n``.

        The smallest width that is at least ``min_channels`` and gives every layer that produces the
        channels a multiple of ``round_to`` rows, and the multiples of it above. (A channel is one
        row, but a head of an attention is as many as it is wide.) The full width is always allowed,
        and the only one for gates of fewer channels.
        """
        rows = {int((s.channels >= 0).sum()) // gate.n for s in gate.slices if s.in_group} or {1}
        step = math.lcm(*(self.round_to // math.gcd(self.round_to, n) for n in rows))
        least = -(-self.min_channels // step) * step
        return [*range(least, gate.n, step), gate.n]

    def tightened(self, min_channels: int = 1, round_to: int = 1) -> GroupLayout:
        """This layout with stricter `widths`: the larger minimum, multiples of both roundings.

        Raises:
            ValueError: an argument is no int >= 1.
        """
        check_widths(min_channels, round_to)
        least = max(self.min_channels, min_channels)
        multiple = math.lcm(self.round_to, round_to)
        if (least, multiple) == (self.min_channels, self.round_to):
            return self
        return replace(self, min_channels=least, round_to=multiple)

    def check_mask(self, mask: torch.Tensor | np.ndarray, name: str = "mask") -> torch.Tensor:
        """``mask`` as a tensor ``[n_groups]``.

        Raises:
            TypeError: nothing that a tensor can be made of.
            ValueError: not one entry per group, or a value outside [0, 1].
        """
        try:
            mask = torch.as_tensor(mask)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name}: expected a tensor or array, got {type(mask).__name__} {mask!r}"
            ) from error
        if tuple(mask.shape) != (self.n_groups,):
            raise ValueError(
                f"{name}: expected shape ({self.n_groups},), one entry per group, "
                f"got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool and mask.numel():
            values = mask.detach()
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise ValueError(f"{name}: expected values in [0, 1], got others or NaN")
        return mask

    def check_keep(self, mask: torch.Tensor | np.ndarray, name: str = "mask") -> torch.Tensor:
        """``mask`` as a bool tensor on CPU that keeps at least one channel of every gate.

        Raises:
            ValueError: wrong size, a value that is neither 0 nor 1, or a gate left empty.
        """
        mask = self.check_mask(mask, name).detach().cpu()
        if mask.dtype != torch.bool:
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise ValueError(f"{name}: expected only 0 (drop) and 1 (keep)")
            mask = mask.bool()
        for gate in self.gates:
            if not bool(mask[gate.span].any()):
                raise ValueError(
                    f"{name}: it drops all {gate.n} channels of gate {gate.name}; "
                    "keep at least one channel of every gate"
                )
        return mask

    def kept_indices(self, mask: torch.Tensor | np.ndarray) -> dict[tuple[str, int], np.ndarray]:
        """Indices to keep per (tensor, dim) that loses any, for a mask that empties no gate."""
        keep = self.check_keep(mask).numpy()
        kept = {}
        for tensor, dim in self.slices_of:
            groups = self.groups_of(tensor, dim)
            alive = (groups < 0) | keep[groups]
            if not alive.all():
                kept[tensor, dim] = np.flatnonzero(alive)
        return kept

    def shrunk(self, mask: torch.Tensor | np.ndarray) -> GroupLayout:
        """The layout of the model that `shrink` makes of this one's: the kept groups, in order.

        Raises:
            ValueError: as `check_keep`.
        """
        keep = self.check_keep(mask).numpy()
        kept = self.kept_indices(keep)
        gates: list[Gate] = []
        offset = 0
        for gate in self.gates:
            # The last entry is for channels in no gate, -1.
            new_index = np.full(gate.n + 1, -1, dtype=np.int64)
            alive = keep[gate.span]
            new_index[:-1][alive] = np.arange(alive.sum())
            slices = tuple(
                replace(
                    part,
                    channels=new_index[part.channels][
                        kept.get((part.tensor, part.dim), slice(None))
                    ],
                )
                for part in gate.slices
            )
            gates.append(replace(gate, n=int(alive.sum()), slices=slices, offset=offset))
            offset += gates[-1].n
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        for (tensor, dim), indices in kept.items():
            shapes[tensor][dim] = len(indices)
        return replace(
            self,
            gates=tuple(gates),
            shapes={name: tuple(shape) for name, shape in shapes.items()},
            traced=None,
        )

    @cached_property
    def cost(self):
        """The `Cost` of this layout: MACs and parameters as functions of the mask."""
        from .cost import Cost

        return Cost(self)

    def macs(self, mask=None):
        """Multiply-adds of the whole model per example (one multiply-add = 1).

        Returns an int, or a 0-dim float64 tensor (differentiable) if ``mask`` is a floating tensor.
        """
        return self.cost.macs(mask)

    def params(self, mask=None):
        """Number of parameters of the whole model; return type as `macs`."""
        return self.cost.params(mask)

    def coverage(self) -> Coverage:
        """How much of the model gates can make smaller: shares of MACs and parameters in [0, 1].

        ``macs``: of the operations with at least one dimension in a gate. ``params``: of the
        parameters (entries, not tensors) whose index lies in a gate along some dimension.
        """
        from .cost import coverage

        return coverage(self)

    def verify(self, model, example_inputs: tuple, kwargs: dict | None = None, seed: int = 0):
        """Try this layout: cut at random, compare outputs and input gradients.

        Three nested masks of all gates (most channels, half of them, one each) are applied to a
        copy of ``model`` on the CPU, in float64 where it runs in it, with random norms: zeroed
        there, cut from another copy. Outputs have to agree to 1e-5 of the largest one, gradients of
        a fixed random weighting of the outputs to 1e-4: with respect to every floating input, or,
        where there is none (tokens), to the parameters that lose nothing. Where they do not, every
        gate is tried alone.

        Args:
            model: the module this layout was traced from; left as it is.
            example_inputs: positional arguments of one forward call.
            kwargs: keyword arguments of the forward call.
            seed: of the masks.

        Returns:
            A `Verification`: ``ok``, the errors, and the gates that fail with their slices;
            ``str()`` is a readable account.

        Raises:
            TypeError, ValueError: bad arguments, or a layout of another model.
        """
        from .verify import verify

        return verify(self, model, example_inputs, kwargs, seed)

    @cached_property
    def sha256(self) -> str:
        """Digest of gates and channel maps: equal iff two layouts describe the same groups."""
        digest = hashlib.sha256()
        for gate in self.gates:
            digest.update(json.dumps([gate.name, gate.n]).encode())
            for part in gate.slices:
                digest.update(json.dumps([part.tensor, part.dim, part.role, part.gated]).encode())
                digest.update(np.ascontiguousarray(part.channels, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Gate]:
        return iter(self.gates)

    def __str__(self) -> str:
        from .report import layout_table

        return layout_table(self)
