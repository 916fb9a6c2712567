"""The tracer's last word: cut the model at random and compare, before anything is trained.

An exported graph does not say whether a size in it is computed or hard-coded, and a forward pass
may depend on a width in ways no operation shows (``x / x.shape[1] ** 0.5``). So every layout is
tried on copies of the model: first for its shapes alone, on the meta device, where a failure
points at a module; then in numbers, where dropped groups are zeroed in one copy and cut from
another, and both must give the same output.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from . import multihead
from .capture import TraceError, mode
from .groups import Gate, GroupLayout
from .probe import (
    cpu_inputs,
    difference,
    in_dtype,
    mapped,
    nested_masks,
    on_cpu,
    randomise,
    tensors,
)
from .shrink import named_tensors, shrink, zero_

TOLERANCE = {torch.float64: 2e-6, torch.float32: 3e-5}
"""Of the largest output. Models that compute some part in float32 whatever they are given stay
below 1e-6, in float32 throughout below 1e-5, on the networks tried."""


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
    """Tries layouts of one model on copies of it; the model is left as it is.

    Raises:
        TraceError: the model cannot be copied.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.model = model
        self.args, self.kwargs = cpu_inputs(args), cpu_inputs(kwargs)
        self.inputs = mapped((self.args, self.kwargs), lambda x: x.to("meta"))
        self.device = "meta"
        dense = _Constants()
        if self._fails(self.stand_in(), dense) is not None:
            # Some forwards need values: a tensor turned into a number, a table outside buffers.
            self.device, self.inputs = "cpu", (self.args, self.kwargs)
            dense = _Constants()
            error = self._fails(self.stand_in(), dense)
            if error is not None:
                raise TraceError(
                    f"model: a copy of {type(model).__name__} does not run on the CPU with the "
                    f"example inputs: {type(error).__name__}: {error}"
                ) from error
        self.constants = dense.seen
        # Rounding hides less in double precision, but some forwards insist on a precision.
        self.dtype = torch.float32 if self._insists() else torch.float64

    def _insists(self) -> bool:
        twin = self.stand_in().double()
        args, kwargs = in_dtype(self.inputs, torch.float64)
        try:
            with torch.device(self.device):
                _run(twin, args, kwargs)
        except Exception:
            return True
        return False

    def stand_in(self) -> nn.Module:
        """A fresh copy of the model: without values, if it runs without."""
        memo: dict[int, Tensor] = {}
        if self.device == "meta":
            for _, tensor in named_tensors(self.model):
                empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = empty
        try:
            twin = copy.deepcopy(self.model, memo)
        except RuntimeError as error:
            raise TraceError(
                f"model: {type(self.model).__name__} cannot be copied, which shrinking needs: "
                f"{error} (torch.nn.utils.weight_norm is such; use "
                "torch.nn.utils.parametrizations.weight_norm)"
            ) from error
        for module in twin.modules():
            if type(module) is nn.MultiheadAttention:
                multihead.convert(module)
        return twin if self.device == "meta" else on_cpu(twin)

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
        return Verdict(self._numbers(layout))

    def _fails(self, model: nn.Module, constants: _Constants) -> Exception | None:
        args, kwargs = self.inputs
        try:
            with torch.device(self.device), constants:
                _run(model, args, kwargs)
        except Exception as error:
            return error
        return None

    def _try(self, layout: GroupLayout, gates: Iterable[Gate]) -> _Failure | None:
        """The first failure of ``gates`` cut on the meta device."""
        for mask in list(nested_masks(layout, gates))[::2]:
            small, constants = shrink(self.stand_in(), layout, mask), _Constants(self.constants)
            error = self._fails(small, constants)
            if error is not None:
                return _Failure(error, small, constants.calls)
        return None

    def _shapes(self, layout: GroupLayout) -> Verdict:
        """Families of gates whose cut makes a shape impossible."""
        verdict = Verdict()
        left = list(layout.gates)
        while left:
            failure = self._try(layout, left)
            if failure is None:
                break
            suspects = _near(failure.error, failure.model, left)
            families: dict[str, list[Gate]] = {}
            for gate in suspects:
                families.setdefault(_family(gate), []).append(gate)
            alone = {f: gs for f, gs in families.items() if self._try(layout, gs[:1])}
            for family in alone or families:
                members = [g for g in left if _family(g) == family]
                found = self._attributes(layout, members[0]) if family in alone else None
                if found is None:
                    verdict.refused += members
                for gate in members if found is not None else ():
                    verdict.attributes[gate.name] = _translated(members[0], gate, found)
                left = [g for g in left if _family(g) != family]
        return verdict

    def _attributes(self, layout: GroupLayout, gate: Gate) -> tuple[tuple[str, int], ...] | None:
        """Integers that modules keep and that have to follow the width of ``gate``."""
        if gate.attributes:
            return None
        left = dict(_candidates(self.model, gate))
        chosen: dict[str, int] = {}
        reached = self._reach(layout, gate, chosen)
        # Greedily: the attribute that lets the forward pass get furthest, until it gets through.
        while left and reached is not None:
            tries = {name: self._reach(layout, gate, {**chosen, name: left[name]}) for name in left}
            best = max(tries, key=lambda name: inf if tries[name] is None else tries[name])
            if tries[best] is not None and tries[best] <= reached:
                return None
            reached = tries[best]
            chosen[best] = left.pop(best)
        return tuple(chosen.items()) if reached is None else None

    def _reach(self, layout: GroupLayout, gate: Gate, attributes: dict[str, int]) -> int | None:
        """Calls until the forward pass without channels of ``gate`` fails; None if it does not."""
        with_sizes = replace(gate, attributes=tuple(attributes.items()))
        gates = tuple(with_sizes if g is gate else g for g in layout.gates)
        failure = self._try(replace(layout, gates=gates), [with_sizes])
        return None if failure is None else failure.calls

    def _numbers(self, layout: GroupLayout) -> list[Gate]:
        """Gates of ``layout`` that do not shrink exactly, alone or together."""
        twin = self._twin(layout)
        previous = None
        for mask in nested_masks(layout, layout.gates):
            # Masks are nested, so each is compared at the width of the one before.
            zero_(twin, layout, mask)
            wide = twin if previous is None else _small(twin, layout, previous)
            if not self._equal(wide, twin, layout, mask):
                return self._search(layout, list(layout.gates))
            previous = mask
        return []

    def _twin(self, layout: GroupLayout) -> nn.Module:
        twin = on_cpu(copy.deepcopy(self.model)).to(self.dtype)
        randomise(twin, layout)
        return twin

    def _equal(self, wide: nn.Module, model: nn.Module, layout: GroupLayout, mask: Tensor) -> bool:
        args, kwargs = in_dtype((self.args, self.kwargs), self.dtype)
        expected = _run(wide, args, kwargs)
        try:
            got = _run(_small(model, layout, mask), args, kwargs)
        except Exception:
            return False
        return difference(expected, got) <= TOLERANCE[self.dtype]

    def _search(self, layout: GroupLayout, gates: list[Gate]) -> list[Gate]:
        """The smallest parts of ``gates`` that fail; all of them where they fail only together."""
        for mask in nested_masks(layout, gates):
            twin = self._twin(layout)
            zero_(twin, layout, mask)
            if not self._equal(twin, twin, layout, mask):
                break
        else:
            return []
        if len(gates) == 1:
            return gates
        gates = sorted(gates, key=_family)
        half = len(gates) // 2
        found = self._search(layout, gates[:half]) + self._search(layout, gates[half:])
        return found or gates


class _Constants(TorchFunctionMode):
    """The numbers a forward pass computes with, call by call; they must not follow the width.

    Args:
        expected: the numbers of the dense model; the first call with others raises ValueError.
    """

    ARITHMETIC = frozenset("add sub mul div truediv pow multiply divide true_divide".split())

    def __init__(self, expected: list | None = None) -> None:
        super().__init__()
        self.expected = expected
        self.seen: list = []
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Compare the numbers of a call, then make it."""
        self.calls += 1
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        plain = name.removeprefix("r").removeprefix("i")
        counts = (int, float) if plain in self.ARITHMETIC else float
        numbers = [x for x in (*args, *kwargs.values())
                   if isinstance(x, counts) and not isinstance(x, bool)]  # fmt: skip
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            numbers.append(args[0].shape[-1] if args else kwargs["query"].shape[-1])
        if numbers:
            if self.expected is not None:
                place = len(self.seen)
                if place >= len(self.expected) or self.expected[place] != (name, numbers):
                    raise ValueError(f"{name} with {numbers}, a number that follows the width")
            self.seen.append((name, numbers))
        return func(*args, **kwargs)


def _small(model: nn.Module, layout: GroupLayout, mask) -> nn.Module:
    return shrink(model, layout, mask, as_graph=layout.as_graph)


def _family(gate: Gate) -> str:
    """Gates of repeated blocks differ in numbers only."""
    return re.sub(r"\d+", "#", " ".join([gate.name, *(s.tensor for s in gate.slices)]))


def _near(error: Exception, model: nn.Module, gates: list[Gate]) -> list[Gate]:
    """Gates with tensors in the module that raised ``error``, or else in the one around it."""
    names = {id(module): name for name, module in model.named_modules()}
    where, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        where = names.get(id(module), where)
        trace = trace.tb_next
    while where:
        found = [g for g in gates if any(s.tensor.startswith(where + ".") for s in g.slices)]
        if found:
            return found
        where = where.rpartition(".")[0]
    return gates


def _candidates(model: nn.Module, gate: Gate) -> tuple[tuple[str, int], ...]:
    """Integer attributes, of modules around the gate's tensors, that may count its channels."""
    sizes = {int((s.channels >= 0).sum()) for s in gate.slices}
    per_channel = {gate.n: 1, **{n: n // gate.n for n in sizes if n % gate.n == 0}}
    owners = dict.fromkeys(s.tensor.rpartition(".")[0] for s in gate.slices)
    around = dict.fromkeys(o.rpartition(".")[0] for o in owners)
    found = {}
    for path in (*around, *owners):
        module = model.get_submodule(path)
        if type(module).__module__.startswith("torch.nn."):
            continue
        for name, value in vars(module).items():
            if type(value) is int and value > 1 and value in per_channel:
                found[f"{path}.{name}" if path else name] = per_channel[value]
    return tuple(found.items())


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


def _run(model: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Output tensors in eval mode, with the same random numbers every time."""
    evaluating = nullcontext() if isinstance(model, fx.GraphModule) else mode(model, training=False)
    with evaluating, torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(tensors(model(*args, **kwargs)))
