"""The tracer's last word: cut the model at random and compare, before anything is trained.

An exported graph does not say whether a size in it is computed or hard-coded, and a forward pass
may depend on a width in ways no operation shows (``x / x.shape[1] ** 0.5``). So every layout is
tried on copies of the model: first for its shapes alone, on the meta device, where a failure
points at a module; then in numbers, where dropped groups are zeroed in one copy and cut from
another, and both must give the same output.
"""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .constants import Constants
from .graph import shrink_graph
from .groups import Gate, GroupLayout
from .probe import (
    FullPrecision,
    alternating_masks,
    difference,
    in_dtype,
    nested_masks,
    randomise,
)
from .shrink import duplicate, shrink, zero_
from .standin import StandIn, examples, run

TOLERANCE = {torch.float64: 2e-6, torch.float32: 3e-5, None: 3e-2}
"""Of the largest output. Models that compute some part in float32 whatever they are given stay
below 1e-6, in float32 throughout below 1e-5, on the networks tried. None: the model's own, where it
runs in neither (bfloat16 with explicit casts)."""
CLEAR = 1e-6
"""Of the largest output, in single precision: rounding there is smaller yet, so that what is asked
of double precision holds too and need not be run."""

ATTEMPTS = 60
"""Sets of attributes that are tried for one kind of gate."""
ROUNDS = 3
"""Of masks and random values that a cheap network is tried with; others with one."""
CHEAP = 2**27
"""Multiply-adds of a forward pass that takes some hundredths of a second."""
WIDE = 16
"""Channels of a gate from which fewer than half of them are still several."""


@dataclass
class Verdict:
    """Gates that do not shrink, and attributes of modules that let others shrink, by gate name."""

    refused: list[Gate] = field(default_factory=list)
    attributes: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.refused and not self.attributes


@dataclass(frozen=True)
class _Failure:
    """What a forward pass raised, in which model, after how many calls of torch functions."""

    error: Exception
    model: nn.Module
    calls: int


class Trial:
    """Tries layouts of one model on copies of it.

    Args:
        dense: stands in for the model.
    """

    def __init__(self, dense: StandIn) -> None:
        self.dense = dense
        self.model = dense.model
        self.dtype = dense.dtype

    def __call__(self, layout: GroupLayout) -> Verdict:
        """What is wrong with ``layout``: first its shapes, then its numbers."""
        if not layout.gates:
            return Verdict()
        if layout.as_graph:
            # A graph has its precision written into it.
            self.dtype = torch.float32
        else:
            verdict = self._shapes(layout)
            if not verdict.clean:
                return verdict
        return Verdict(self._search(layout, list(layout.gates)))

    def _try(
        self, layout: GroupLayout, gates: list[Gate], alternate: bool = False
    ) -> _Failure | None:
        """The first failure of a model that lost channels of ``gates``."""
        masks = list(nested_masks(layout, gates))[::2]
        if alternate and any(gate.n < 4 for gate in gates):
            # Nested masks leave small gates at one channel all together.
            masks += alternating_masks(layout, gates)
        template = self.dense.copy()
        for mask in masks:
            for training, numbers in self.dense.constants.items():
                small = shrink(template, layout, mask)
                constants = Constants(self.dense.originals, numbers)
                error = self.dense.fails(small, constants, training)
                if error is not None:
                    return _Failure(error, small, constants.calls)
        return None

    def _shapes(self, layout: GroupLayout) -> Verdict:
        """Families of gates whose cut makes a shape impossible."""
        verdict = Verdict()
        left = list(layout.gates)
        while left:
            failure = self._try(layout, left, alternate=True)
            if failure is None:
                break
            where, suspects = _near(failure, left)
            families: dict[str, list[Gate]] = {}
            for gate in suspects:
                families.setdefault(_family(gate), []).append(gate)
            alone = {f: gs for f, gs in families.items() if self._try(layout, gs[:1])}
            for family in alone or families:
                members = [g for g in left if _family(g) == family]
                found = self._attributes(layout, members[0], where) if family in alone else None
                if found is None:
                    verdict.refused += members
                for gate in members if found is not None else ():
                    verdict.attributes[gate.name] = _translated(members[0], gate, found)
                left = [g for g in left if _family(g) != family]
        return verdict

    def _attributes(
        self, layout: GroupLayout, gate: Gate, where: str
    ) -> tuple[tuple[str, int], ...] | None:
        """Integers that modules keep and that have to follow the width of ``gate``.

        ``where`` is the module that failed.
        """
        if gate.attributes:
            return None
        known = _candidates(self.model, gate, where)
        reached = self._reach(layout, gate, {})
        # Best first: the sets of attributes with which the forward pass gets furthest are added to.
        waiting = [(reached, frozenset())]
        seen = {frozenset()}
        while waiting and len(seen) <= ATTEMPTS:
            reached, chosen = waiting.pop(max(range(len(waiting)), key=lambda k: waiting[k][0]))
            for name in known:
                more = chosen | {name}
                if more in seen:
                    continue
                seen.add(more)
                attributes = {n: per for n, per in known.items() if n in more}
                further = self._reach(layout, gate, attributes)
                if further is None:
                    if self._exact(*_with(layout, gate, attributes)):
                        return tuple(attributes.items())
                elif further > reached:
                    waiting.append((further, more))
        return None

    def _reach(self, layout: GroupLayout, gate: Gate, attributes: dict[str, int]) -> int | None:
        """Calls until the forward pass without channels of ``gate`` fails; None if it does not."""
        failure = self._try(*_with(layout, gate, attributes))
        return None if failure is None else failure.calls

    def _exact(self, layout: GroupLayout, gates: list[Gate]) -> bool:
        """Whether a model that lost channels of ``gates`` is the zeroed one."""
        # By chance one gate may hide what is wrong with another: values that no ReLU lets through.
        work = layout.macs() * examples((self.dense.args, self.dense.kwargs))
        return all(self._once(layout, gates, k) for k in range(ROUNDS if work <= CHEAP else 1))

    def _once(self, layout: GroupLayout, gates: list[Gate], seed: int) -> bool:
        # Masks are nested, so each is compared at the width of the one before.
        some, one = _steps(layout, gates, seed)
        twin = duplicate(self.model).to("cpu")
        twin = twin if self.dtype is None else twin.float()
        randomise(twin, layout, seed)
        zero_(twin, layout, some)
        if not self._equal(twin, twin, layout, some, TOLERANCE[torch.float32]):
            return False
        zero_(twin, layout, one)
        return self._equal(_small(twin, layout, some), twin, layout, one, CLEAR)

    def _equal(
        self, wide: nn.Module, model: nn.Module, layout: GroupLayout, mask: Tensor, clear: float
    ) -> bool:
        """Whether ``model`` without the dropped groups is ``wide``: single precision says so below
        ``clear``, double precision decides where the model takes it."""
        try:
            small = _small(model, layout, mask)
        except Exception:
            return False
        if self.dtype is torch.float64:
            if self._error(wide, small, torch.float32) <= clear:
                return True
        return self._error(wide, small, self.dtype) <= TOLERANCE[self.dtype]

    def _error(self, wide: nn.Module, small: nn.Module, dtype: torch.dtype | None) -> float:
        """Relative difference of two models' outputs; inf where ``small`` does not run."""
        args, kwargs = self.dense.args, self.dense.kwargs
        if dtype is not None:
            args, kwargs = in_dtype((args, kwargs), dtype)
            wide, small = wide.to(dtype), small.to(dtype)
        with FullPrecision():
            expected = run(wide, args, kwargs)
            try:
                # A graph that fails prints its code.
                with redirect_stderr(io.StringIO()):
                    return difference(expected, run(small, args, kwargs))
            except Exception:
                return float("inf")

    def _search(self, layout: GroupLayout, gates: list[Gate]) -> list[Gate]:
        """The smallest parts of ``gates`` that fail; all of them where they fail only together."""
        if self._exact(layout, gates):
            return []
        if len(gates) == 1:
            return gates
        gates = sorted(gates, key=_family)
        half = len(gates) // 2
        found = self._search(layout, gates[:half]) + self._search(layout, gates[half:])
        return found or gates


def _steps(layout: GroupLayout, gates: list[Gate], seed: int) -> tuple[Tensor, Tensor]:
    """Masks that drop some channels of ``gates``, and all but one of each."""
    most, some, one = nested_masks(layout, gates, seed)
    for gate in gates:
        if gate.n < WIDE:
            some[gate.span] = most[gate.span]
    return some, one


def _with(
    layout: GroupLayout, gate: Gate, attributes: dict[str, int]
) -> tuple[GroupLayout, list[Gate]]:
    """``layout`` with other attributes for ``gate``, and that gate."""
    other = replace(gate, attributes=tuple(attributes.items()))
    return replace(layout, gates=tuple(other if g is gate else g for g in layout.gates)), [other]


def _small(model: nn.Module, layout: GroupLayout, mask) -> nn.Module:
    return shrink_graph(model, layout, mask) if layout.as_graph else shrink(model, layout, mask)


def _family(gate: Gate) -> str:
    """Gates of repeated blocks differ in numbers only."""
    return re.sub(r"\d+", "#", " ".join([gate.name, *(s.tensor for s in gate.slices)]))


def _near(failure: _Failure, gates: list[Gate]) -> tuple[str, list[Gate]]:
    """The module that failed, and the gates with tensors in it, or else in the one around it."""
    names = {id(module): name for name, module in failure.model.named_modules()}
    place, trace = "", failure.error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        place = names.get(id(module), place)
        trace = trace.tb_next
    around = place
    while around:
        found = [g for g in gates if any(s.tensor.startswith(around + ".") for s in g.slices)]
        if found:
            return place, found
        around = around.rpartition(".")[0]
    return place, gates


def _candidates(model: nn.Module, gate: Gate, where: str) -> dict[str, int]:
    """Integer attributes, of modules around the gate's tensors and of the one that failed, that may
    count its channels, and what one channel counts there."""
    largest = max(int((s.channels >= 0).sum()) for s in gate.slices)
    owners = dict.fromkeys(s.tensor.rpartition(".")[0] for s in gate.slices)
    around = dict.fromkeys(o.rpartition(".")[0] for o in owners)
    found = {}
    for path in dict.fromkeys([*around, *owners, where]):
        module = model.get_submodule(path)
        # Layers of torch follow their weights by themselves.
        weights = list(module.parameters(recurse=False))
        if type(module).__module__.startswith("torch.nn.") and weights:
            continue
        for name, value in vars(module).items():
            if type(value) is int and 1 < value <= largest and value % gate.n == 0:
                found[f"{path}.{name}" if path else name] = value // gate.n
    return found


def _translated(source: Gate, target: Gate, attributes: tuple[tuple[str, int], ...]):
    """``attributes`` of one gate of a family for another: its numbers replaced."""
    old = [re.findall(r"\d+", s.tensor) for s in source.slices]
    new = [re.findall(r"\d+", s.tensor) for s in target.slices]
    result = []
    for path, per_channel in attributes:
        numbers = re.findall(r"\d+", path)
        ours = next((b for a, b in zip(old, new, strict=True) if a[: len(numbers)] == numbers), [])
        numbers = iter(ours[: len(numbers)] or numbers)
        result.append((re.sub(r"\d+", lambda _, n=numbers: next(n), path), per_channel))
    return tuple(result)
