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
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from . import multihead
from .capture import TraceError, mode, same_in_training
from .constants import Constants, SharedError
from .graph import shrink_graph
from .groups import Gate, GroupLayout
from .probe import (
    alternating_masks,
    cpu_inputs,
    difference,
    in_dtype,
    mapped,
    nested_masks,
    on_cpu,
    randomise,
    tensors,
)
from .shrink import duplicate, named_tensors, shrink, zero_

TOLERANCE = {torch.float64: 2e-6, torch.float32: 3e-5, None: 3e-2}
"""Of the largest output. Models that compute some part in float32 whatever they are given stay
below 1e-6, in float32 throughout below 1e-5, on the networks tried. None: the model's own, where it
runs in neither (bfloat16 with explicit casts)."""


ATTEMPTS = 60
"""Sets of attributes that are tried for one kind of gate."""


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
        self.originals = frozenset(id(tensor) for _, tensor in named_tensors(model))
        self.args, self.kwargs = cpu_inputs(args), cpu_inputs(kwargs)
        self.inputs = mapped((self.args, self.kwargs), lambda x: x.to("meta"))
        self.device = "meta"
        # The numbers of the dense forward pass, in evaluation and where it matters in training.
        self.constants: dict[bool, list] = {}
        self.outputs: dict[bool, list] = {}
        error = self._learn(training=False)
        if error is not None:
            error = self._with_values(training=False)
        if error is not None:
            raise TraceError(
                f"model: a copy of {type(model).__name__} does not run on the CPU with the "
                f"example inputs: {type(error).__name__}: {error}"
            ) from error
        # Rounding hides less in double precision, but some forwards insist on theirs.
        self.dtype = next((d for d in (torch.float64, torch.float32) if self._takes(d)), None)

    def _learn(self, training: bool) -> Exception | None:
        """Record the numbers of the dense model; why it does not run, if it does not."""
        record = Constants(self.originals)
        error = self._fails(self.stand_in(), record, training)
        if isinstance(error, SharedError):
            raise TraceError(f"model: {error}")
        if error is None:
            self.constants[training] = record.seen
            self.outputs[training] = record.outputs
        return error

    def differs_in_training(self) -> bool:
        """Whether training does other things than evaluation; if so, it is tried as well."""
        if self.device == "meta" and same_in_training(self.stand_in(), *self.inputs):
            return False
        if self._learn(training=True) is not None and self.device == "meta":
            self._with_values(training=False)
            self._learn(training=True)
        return True

    def _with_values(self, training: bool) -> Exception | None:
        """Go on with values: some forwards turn a tensor into a number, or keep tables outside
        buffers."""
        self.device, self.inputs = "cpu", (self.args, self.kwargs)
        return self._learn(training)

    def _takes(self, dtype: torch.dtype) -> bool:
        args, kwargs = in_dtype(self.inputs, dtype)
        try:
            with torch.device(self.device):
                _run(self.stand_in().to(dtype), args, kwargs)
        except Exception:
            return False
        return True

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
            twin = duplicate(self.model, memo)
        except Exception as error:
            raise TraceError(
                f"model: {type(self.model).__name__} cannot be copied, which shrinking needs: "
                f"{type(error).__name__}: {error}"
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

    def _fails(self, model: nn.Module, constants: Constants, training: bool) -> Exception | None:
        args, kwargs = self.inputs
        try:
            with torch.device(self.device), constants:
                constants.outputs = [x.shape for x in _run(model, args, kwargs, training)]
            if self.outputs.get(training, constants.outputs) != constants.outputs:
                raise ValueError("outputs of other shapes")
        except Exception as error:
            return error
        return None

    def _try(
        self, layout: GroupLayout, gates: list[Gate], alternate: bool = False
    ) -> _Failure | None:
        """The first failure of a model that lost channels of ``gates``."""
        masks = list(nested_masks(layout, gates))[::2]
        if alternate and any(gate.n < 4 for gate in gates):
            # Nested masks leave small gates at one channel all together.
            masks += alternating_masks(layout, gates)
        template = self.stand_in()
        for mask in masks:
            for training, numbers in self.constants.items():
                small = shrink(template, layout, mask)
                constants = Constants(self.originals, numbers)
                error = self._fails(small, constants, training)
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

    def _numbers(self, layout: GroupLayout) -> list[Gate]:
        """Gates of ``layout`` that do not shrink exactly, alone or together."""
        # Masks are nested, so each is compared at the width of the one before. The dense width,
        # which costs most, is run in single precision.
        coarse = torch.float32 if self.dtype is torch.float64 else self.dtype
        some, one = list(nested_masks(layout, layout.gates))[::2]
        twin = self._twin(layout, coarse)
        zero_(twin, layout, some)
        if self._equal(twin, twin, layout, some, coarse):
            zero_(twin, layout, one)
            if self._equal(_small(twin, layout, some), twin, layout, one, self.dtype):
                return []
        return self._search(layout, list(layout.gates))

    def _twin(self, layout: GroupLayout, dtype: torch.dtype | None) -> nn.Module:
        twin = duplicate(self.model).to("cpu")
        twin = twin if dtype is None else twin.to(dtype)
        randomise(twin, layout)
        return twin

    def _equal(
        self, wide: nn.Module, model: nn.Module, layout: GroupLayout, mask: Tensor,
        dtype: torch.dtype | None,
    ) -> bool:  # fmt: skip
        args, kwargs = self.args, self.kwargs
        if dtype is not None:
            args, kwargs = in_dtype((args, kwargs), dtype)
            wide = wide.to(dtype)
        expected = _run(wide, args, kwargs)
        try:
            small = _small(model, layout, mask)
            # A graph that fails prints its code.
            with redirect_stderr(io.StringIO()):
                got = _run(small if dtype is None else small.to(dtype), args, kwargs)
        except Exception:
            return False
        return difference(expected, got) <= TOLERANCE[dtype]

    def _exact(self, layout: GroupLayout, gates: list[Gate]) -> bool:
        """Whether a model that lost channels of ``gates`` alone is the zeroed one."""
        for mask in nested_masks(layout, gates):
            twin = self._twin(layout, self.dtype)
            zero_(twin, layout, mask)
            if not self._equal(twin, twin, layout, mask, self.dtype):
                return False
        return True

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


def _run(model: nn.Module, args: tuple, kwargs: dict, training: bool = False) -> list[Tensor]:
    """Output tensors in eval mode, with the same random numbers every time."""
    chosen = nullcontext() if isinstance(model, fx.GraphModule) else mode(model, training)
    with chosen, torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(tensors(model(*args, **kwargs)))
