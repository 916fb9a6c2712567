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
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from .capture import TraceError, mode
from .groups import Gate, GroupLayout
from .shrink import named_tensors, shrink, zero_

TOLERANCE = 1e-4
"""Of the largest output, in float32 on the CPU; rounding stays below 1e-5 on the networks tried."""


@dataclass
class Verdict:
    """Gates that do not shrink, and attributes of modules that let others shrink, by gate name."""

    refused: list[Gate] = field(default_factory=list)
    attributes: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.refused and not self.attributes


class Trial:
    """Tries layouts of one model on copies of it; the model is left as it is.

    Raises:
        TraceError: the model cannot be copied.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.model = model
        self.args, self.kwargs = cpu_inputs(args), cpu_inputs(kwargs)
        self.shapes_only = _meta_twin(model)
        self.meta_args = _to_meta((self.args, self.kwargs))
        # Some forwards need values: a tensor turned into a number, a table kept outside buffers.
        self.has_meta = self._fails(_meta_twin(model)) is None

    def __call__(self, layout: GroupLayout) -> Verdict:
        """What is wrong with ``layout``: first its shapes, then its numbers."""
        if not layout.gates:
            return Verdict()
        if self.has_meta and not layout.as_graph:
            verdict = self._shapes(layout)
            if not verdict.clean:
                return verdict
        return Verdict(self._numbers(layout))

    def _fails(self, model: nn.Module) -> Exception | None:
        args, kwargs = self.meta_args
        try:
            with torch.device("meta"):
                _run(model, args, kwargs)
        except Exception as error:
            return error
        return None

    def _try(
        self, layout: GroupLayout, gates: Iterable[Gate]
    ) -> tuple[Exception, nn.Module] | None:
        """The first failure of ``gates`` cut on the meta device, and the module that was run."""
        for mask in list(nested_masks(layout, gates))[::2]:
            small = shrink(self.shapes_only, layout, mask)
            error = self._fails(small)
            if error is not None:
                return error, small
        return None

    def _shapes(self, layout: GroupLayout) -> Verdict:
        """Families of gates whose cut makes a shape impossible."""
        verdict = Verdict()
        left = list(layout.gates)
        while left:
            failure = self._try(layout, left)
            if failure is None:
                break
            suspects = _near(*failure, left)
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
        known = _candidates(self.model, gate)
        heads = tuple(entry for entry in known if entry[1] == 1)
        for chosen in dict.fromkeys((known, heads, *((entry,) for entry in known[:4]))):
            if not chosen:
                continue
            with_sizes = replace(gate, attributes=chosen)
            gates = tuple(with_sizes if g is gate else g for g in layout.gates)
            if self._try(replace(layout, gates=gates), [with_sizes]) is None:
                return chosen
        return None

    def _numbers(self, layout: GroupLayout) -> list[Gate]:
        """Gates of ``layout`` that do not shrink exactly, alone or together."""
        try:
            twin = self._twin(layout)
        except RuntimeError as error:
            raise _cannot_copy(self.model, error) from error
        previous = None
        for mask in nested_masks(layout, layout.gates):
            # Masks are nested, so each is compared at the width of the one before.
            zero_(twin, layout, mask)
            wide = twin if previous is None else _small(twin, layout, previous)
            try:
                expected = _run(wide, self.args, self.kwargs)
            except Exception as error:
                raise TraceError(
                    f"model: a copy of {type(self.model).__name__} does not run on the CPU with "
                    f"the example inputs: {type(error).__name__}: {error}"
                ) from error
            if not self._equal(expected, twin, layout, mask):
                return self._search(layout, list(layout.gates))
            previous = mask
        return []

    def _twin(self, layout: GroupLayout) -> nn.Module:
        twin = copy.deepcopy(self.model).to("cpu")
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters()):
            twin = twin.float()
        randomise(twin, layout)
        return twin

    def _equal(self, expected: list[Tensor], model: nn.Module, layout: GroupLayout, mask) -> bool:
        try:
            got = _run(_small(model, layout, mask), self.args, self.kwargs)
        except Exception:
            return False
        return difference(expected, got) <= TOLERANCE

    def _search(self, layout: GroupLayout, gates: list[Gate]) -> list[Gate]:
        """The smallest parts of ``gates`` that fail; all of them where they fail only together."""
        for mask in nested_masks(layout, gates):
            twin = self._twin(layout)
            zero_(twin, layout, mask)
            if not self._equal(_run(twin, self.args, self.kwargs), twin, layout, mask):
                break
        else:
            return []
        if len(gates) == 1:
            return gates
        gates = sorted(gates, key=_family)
        half = len(gates) // 2
        found = self._search(layout, gates[:half]) + self._search(layout, gates[half:])
        return found or gates


def _small(model: nn.Module, layout: GroupLayout, mask) -> nn.Module:
    return shrink(model, layout, mask, as_graph=layout.as_graph)


def _cannot_copy(model: nn.Module, error: Exception) -> TraceError:
    return TraceError(
        f"model: {type(model).__name__} cannot be copied, which shrinking needs: {error} "
        "(torch.nn.utils.weight_norm is such; use torch.nn.utils.parametrizations.weight_norm)"
    )


def _meta_twin(model: nn.Module) -> nn.Module:
    """A copy without values."""
    memo: dict[int, Tensor] = {}
    for _, tensor in named_tensors(model):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    try:
        return copy.deepcopy(model, memo)
    except RuntimeError as error:
        raise _cannot_copy(model, error) from error


def _to_meta(tree):
    if isinstance(tree, Tensor):
        return tree.to("meta")
    if isinstance(tree, dict):
        return {key: _to_meta(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_to_meta(value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_to_meta(value) for value in tree)
    return tree


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


def nested_masks(
    layout: GroupLayout, gates: Iterable[Gate], seed: int = 0
) -> Iterator[Tensor]:
    """Masks that drop channels of ``gates`` only, each part of the one before: most of the channels
    kept, some of them, a single one."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.ones(layout.n_groups, dtype=torch.bool) for _ in range(3)]
    for gate in gates:
        order = gate.offset + torch.randperm(gate.n, generator=generator)
        share = 0.5 + 0.4 * float(torch.rand((), generator=generator))
        n = min(max(int(share * gate.n), 1), gate.n - 1)
        for mask in masks:
            mask[order[n:]] = False
            n = max(n // 2, 1) if mask is masks[0] else 1
    yield from masks


def _run(model: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Output tensors in eval mode, with the same random numbers every time."""
    evaluating = nullcontext() if isinstance(model, fx.GraphModule) else mode(model, training=False)
    with evaluating, torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(tensors(model(*args, **kwargs)))


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of the same tensor; inf if shapes or
    places that are not finite differ."""
    if len(expected) != len(got):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return float("inf")
        finite = torch.isfinite(a)
        a, b = a[finite].double(), b[finite].double()
        if a.numel() and (error := float((a - b).abs().max())):
            worst = max(worst, error / max(float(a.abs().max()), 1e-300))
    return worst


def randomise(model: nn.Module, layout: GroupLayout) -> None:
    """Values as after training, so that nothing hides: norms' weights and statistics random, and
    so is every parameter that holds one value throughout (zero gammas, layer scales)."""
    generator = torch.Generator().manual_seed(0)
    stats = {s.tensor for gate in layout.gates for s in gate.slices if s.role == "stat"}
    affine = {s.tensor for gate in layout.gates for s in gate.slices if s.role == "affine"}
    seen = set()
    for name, tensor in named_tensors(model):
        if id(tensor) in seen or not tensor.is_floating_point() or not tensor.numel():
            continue
        seen.add(id(tensor))
        flat = tensor.detach().reshape(-1)
        parameter = isinstance(tensor, nn.Parameter)
        constant = parameter and tensor.numel() > 1 and bool((flat == flat[0]).all())
        noise = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        with torch.no_grad():
            if name in stats and not parameter:
                # Statistics, not tables: what only ever is positive stays so.
                tensor.mul_(0.5 + noise).add_(0.1 * noise)
            elif name in affine or constant:
                tensor.add_(noise - 0.5)


def tensors(tree) -> Iterator[Tensor]:
    """All tensors of nested containers; objects with attributes count as their ``__dict__``."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors(value)
    elif hasattr(tree, "__dict__"):
        yield from tensors(vars(tree))


def cpu_inputs(tree):
    """Inputs to compare networks on: on the CPU, at least float32, and with something to see.

    A floating tensor of one value throughout, such as ``torch.zeros`` to give a shape, becomes
    noise in [0, 1).
    """
    if isinstance(tree, Tensor):
        if not tree.is_floating_point():
            return tree.detach().cpu()
        x = tree.detach().to("cpu", torch.promote_types(tree.dtype, torch.float32))
        if x.numel() > 1 and bool((x == x.flatten()[0]).all()):
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype)
            x = torch.empty_like(x).copy_(noise)
        return x
    if isinstance(tree, dict):
        return {key: cpu_inputs(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(cpu_inputs(value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(cpu_inputs(value) for value in tree)
    return tree
