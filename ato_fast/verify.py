"""`GroupLayout.verify`: does every gate of a layout shrink exactly, outputs and gradients?"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .capture import check_plain, mode
from .groups import Gate, GroupLayout
from .probe import (
    FullPrecision,
    cpu_inputs,
    difference,
    in_dtype,
    nested_masks,
    on_cpu,
    randomise,
    tensors,
)
from .shrink import duplicate, named_tensors, shrink, zero_

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Failure:
    """A gate that does not shrink exactly.

    Args:
        gate: its name.
        slices: (tensor, dim, role) of what was cut.
        output_error, gradient_error: largest difference over the largest value; inf for other
            shapes or a forward pass that raised.
        message: what was raised, if anything.
    """

    gate: str
    slices: tuple[tuple[str, int, str], ...]
    output_error: float
    gradient_error: float
    message: str = ""

    def __str__(self) -> str:
        text = f"{self.gate}: output {self.output_error:.1e}, gradient {self.gradient_error:.1e}"
        if self.message:
            text += f", {self.message}"
        cut = "".join(f"\n    {t} dim {d} ({role})" for t, d, role in self.slices)
        return text + cut


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        output_error, gradient_error: the largest over all masks, with all gates cut together;
            relative to the largest value.
        n_masks: masks tried.
        failures: gates that fail alone, or all gates where they fail only together.
    """

    output_error: float
    gradient_error: float
    n_masks: int
    failures: tuple[Failure, ...]

    @property
    def ok(self) -> bool:
        """Whether every gate shrinks exactly."""
        return not self.failures

    def __str__(self) -> str:
        errors = f"output {self.output_error:.1e}, gradient {self.gradient_error:.1e}"
        if self.ok:
            return f"every gate shrinks exactly: {errors} over {self.n_masks} masks"
        lines = [f"{len(self.failures)} gates do not shrink exactly ({errors}):"]
        return "\n".join([*lines, *(f"  {failure}" for failure in self.failures)])


def verify(
    layout: GroupLayout,
    model: nn.Module,
    example_inputs: tuple,
    kwargs: dict | None = None,
    seed: int = 0,
) -> Verification:
    """See `GroupLayout.verify`."""
    if not isinstance(example_inputs, tuple | list):
        raise TypeError(
            f"example_inputs: expected a tuple of forward arguments such as (x,), "
            f"got {type(example_inputs).__name__}"
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise TypeError(f"kwargs: expected a dict, got {type(kwargs).__name__}")
    check_plain(model)
    args = tuple(example_inputs)
    if layout.as_graph and layout.traced is not None:
        expected = _shapes(layout.traced.program.example_inputs)
        if _shapes((args, kwargs or {})) != expected:
            raise ValueError(
                f"example_inputs: a graph takes the shapes it was traced with alone, "
                f"expected {expected}, got {_shapes((args, kwargs or {}))}"
            )
    bench = _Bench(layout, model, cpu_inputs(args), cpu_inputs(kwargs or {}))
    errors = [bench.errors(mask) for mask in nested_masks(layout, layout.gates, seed)]
    output = max((e[0] for e in errors), default=0.0)
    gradient = max((e[1] for e in errors), default=0.0)
    failures: list[Failure] = []
    if output > OUTPUT_TOLERANCE or gradient > GRADIENT_TOLERANCE:
        alone = [bench.failure(gate, seed) for gate in layout.gates]
        failures = [failure for failure in alone if failure is not None]
        if not failures:
            failures = [_failure(g, output, gradient, "fails only together with others")
                        for g in layout.gates]  # fmt: skip
    return Verification(output, gradient, len(errors), tuple(failures))


def _failure(gate: Gate, output: float, gradient: float, message: str) -> Failure:
    cut = tuple((s.tensor, s.dim, s.role) for s in gate.slices)
    return Failure(gate.name, cut, output, gradient, message)


def _shapes(tree) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors(tree)) or "none"


def first_line(error: Exception) -> str:
    """Type and first line of what was raised."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"


class _Bench:
    """Compares masked and shrunk copies of one model."""

    def __init__(self, layout: GroupLayout, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.layout, self.args, self.kwargs = layout, args, kwargs
        self.model = on_cpu(duplicate(model))
        randomise(self.model, layout)
        self.message = ""
        self.whole = []
        if not self._runs_in_double():
            try:
                self.run(self.model)
            except Exception as error:
                raise ValueError(
                    f"example_inputs: {type(model).__name__} does not run with tensors of shape "
                    f"{_shapes((args, kwargs))}: {first_line(error)}"
                ) from error
        # Token inputs have no gradient; parameters that nothing is cut from have.
        cut = {s.tensor for gate in layout.gates for s in gate.slices}
        self.whole = [n for n, _ in self.model.named_parameters() if n not in cut]
        # A gradient that is zero but for rounding says nothing.
        gradients = self.run(self.model)[1]
        self.floor = 1e-6 * max((float(g.abs().max()) for g in gradients if g.numel()), default=0.0)

    def _runs_in_double(self) -> bool:
        """Go on in float64 where the model runs in it: in float32 a gradient turns at every ReLU
        that rounding puts on the other side of zero. A graph has its precision written into it."""
        if self.layout.as_graph:
            return False
        single = self.model, self.args, self.kwargs
        try:
            self.model = duplicate(self.model).double()
            self.args, self.kwargs = in_dtype((self.args, self.kwargs), torch.float64)
            self.run(self.model)
        except Exception:
            self.model, self.args, self.kwargs = single
            return False
        return True

    def errors(self, mask: Tensor) -> tuple[float, float]:
        """Relative errors of outputs and gradients under ``mask``."""
        masked = duplicate(self.model)
        zero_(masked, self.layout, mask)
        expected = self.run(masked)
        self.message = ""
        try:
            got = self.run(shrink(masked, self.layout, mask, as_graph=self.layout.as_graph))
        except Exception as error:
            self.message = first_line(error)
            return float("inf"), float("inf")
        return difference(expected[0], got[0]), difference(expected[1], got[1], self.floor)

    def failure(self, gate: Gate, seed: int) -> Failure | None:
        """How ``gate`` fails if it is the only one that is cut."""
        for mask in nested_masks(self.layout, [gate], seed):
            output, gradient = self.errors(mask)
            if output > OUTPUT_TOLERANCE or gradient > GRADIENT_TOLERANCE:
                return _failure(gate, output, gradient, self.message)
        return None

    def run(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and gradients of a fixed weighted sum of them."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        points = [x.requires_grad_() for x in tensors((args, kwargs)) if x.is_floating_point()]
        if not points:
            named = dict(named_tensors(model))
            points = [named[name].requires_grad_() for name in self.whole]
        graph = isinstance(model, torch.fx.GraphModule)
        with torch.random.fork_rng(devices=[]), FullPrecision():
            torch.manual_seed(0)
            if graph:
                outputs = list(tensors(model(*args, **kwargs)))
            else:
                with mode(model, training=False):
                    outputs = list(tensors(model(*args, **kwargs)))
        generator = torch.Generator().manual_seed(0)
        total = sum(
            (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum()
            for y in outputs
            if y.is_floating_point() and y.requires_grad
        )
        gradients: list[Tensor] = []
        if points and isinstance(total, Tensor):
            found = torch.autograd.grad(total, points, allow_unused=True)
            gradients = [g for g in found if g is not None]
        return [y.detach() for y in outputs], gradients
