"""Is the small network the function that the zeroed one is? Outputs and gradients, measured.

Outputs are compared in float32, which is what the promise is about. Gradients are compared in
float64: in float32 rounding now and then turns a ReLU on in one network that is off in the other,
which changes a gradient by far more than its own rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import ato_fast as ato
from ato_fast.probe import FullPrecision

OUTPUT_LIMIT = 1e-5
GRADIENT_LIMIT = 1e-4
CHANGE = 1e-3
"""A mask that changes the output by less, of its largest value, has shown nothing."""
NEARLY_ZERO = 1e-3
"""Below it, parameters are an initialisation that hides what lies behind them (LayerScale)."""


@dataclass(frozen=True)
class Errors:
    """What one mask showed; errors are relative to the zeroed network's largest value.

    Args:
        output: largest error of any output, float32.
        output_float64: the same in float64, which tells rounding from a wrong function.
        gradient: largest error of the gradient of any floating input, float64; of one surviving
            parameter where no input is floating.
        change: how far the zeroed network's output is from the dense one's.
        slope: largest gradient in the zeroed network; 0 means that the gradients show nothing.
        problem: in words, what else is wrong; empty if nothing is.
    """

    output: float
    output_float64: float
    gradient: float
    change: float
    slope: float
    problem: str = ""

    @property
    def exact(self) -> bool:
        """Within both limits, and nothing else wrong."""
        return not self.problem and self.output <= OUTPUT_LIMIT and self.gradient <= GRADIENT_LIMIT


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters as after training, in place: none constant or nearly zero; batch norms likewise.

    A fresh norm's weight of one and bias of zero, a zero-initialised last norm or a LayerScale of
    1e-6 would hide what a wrong cut does.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(tensor.shape, generator=generator).to(tensor) * (high - low) + low

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor) * std

    for parameter in model.parameters():
        if not parameter.numel():
            continue
        first = parameter.flatten()[0]
        if parameter.abs().max() < NEARLY_ZERO:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(normal(parameter, min(0.3, fan_in**-0.5)))
        elif bool((parameter == first).all()):
            parameter.copy_(first * uniform(parameter, 0.5, 1.5))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(normal(module.running_mean, 0.3))
            module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
    return model


def random_mask(layout: ato.GroupLayout, seed: int, gates=None) -> Tensor:
    """Drop a random share of the channels, at least one, of every gate (or of these gates).

    At least a quarter stays, so that signals come through deep networks.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(layout.n_groups, dtype=torch.bool)
    for gate in layout.gates if gates is None else gates:
        share = 0.25 + 0.75 * float(torch.rand((), generator=generator))
        n_kept = max(min(round(share * gate.n), gate.n - 1), 1)
        dropped = torch.randperm(gate.n, generator=generator)[n_kept:]
        mask[gate.offset + dropped] = False
    return mask


def single_mask(layout: ato.GroupLayout, seed: int) -> Tensor:
    """Keep one random channel of every gate."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(layout.n_groups, dtype=torch.bool)
    for gate in layout.gates:
        mask[gate.offset + int(torch.randint(gate.n, (), generator=generator))] = True
    return mask


def compare(model: nn.Module, inputs: tuple, layout: ato.GroupLayout, mask: Tensor) -> Errors:
    """Cut ``model`` by ``mask`` and compare it with a copy that is zeroed instead.

    Args:
        model: in eval mode, on the CPU, float32; left as it is.
        inputs: arguments of one forward call.
        layout: its gates.
        mask: ``[n_groups]``, 1 keep, 0 drop.
    """
    zeroed = copy.deepcopy(model)
    ato.zero_(_forgetful(zeroed), layout, mask)
    with torch.no_grad():
        dense, expected = outputs(model(*inputs)), outputs(zeroed(*inputs))
        try:
            small = ato.shrink(model, layout, mask, as_graph=layout.as_graph)
            got = outputs(_forgetful(small)(*inputs))
        except Exception as error:
            return Errors(*[float("inf")] * 4, 0.0, f"the shrunk model fails: {one_line(error)}")
    output, change = relative_error(expected, got), relative_error(dense, expected)
    counted, there = layout.params(mask), sum(p.numel() for p in small.parameters())
    kept = layout.kept_indices(mask)
    doubled = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    name, expected, slopes = _backward(_forgetful(zeroed.double()), doubled)
    got, small_slopes = run_backward(_forgetful(small.double()), doubled, name)
    for (tensor, dim), indices in kept.items():
        if tensor == name:
            slopes = [slopes[0].index_select(dim, torch.as_tensor(indices))]
    output_float64 = relative_error(expected, got)
    gradient = relative_error(slopes, small_slopes)
    problem = ""
    if counted != there:
        problem = f"layout.params(mask) says {counted}, the small model has {there}"
    slope = max(float(s.abs().max()) for s in slopes)
    return Errors(output, output_float64, gradient, change, slope, problem)


def _forgetful(model: nn.Module) -> nn.Module:
    """In eval mode, without tables of an earlier evaluation (timm's attention biases keep one)."""
    return model if isinstance(model, fx.GraphModule) else model.train().eval()


def run_backward(
    model: nn.Module, inputs: tuple, parameter: str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the floating inputs or of one parameter.

    The gradients are of the outputs' sum with fixed random weights.
    """
    points = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    wanted = [x for x in points if x.requires_grad]
    if parameter is not None:
        wanted = [model.get_parameter(parameter)]
    # A graph insists on the precision it was captured in.
    with FullPrecision():
        found = outputs(model(*points))
    generator = torch.Generator().manual_seed(0)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in found)
    slopes = torch.autograd.grad(loss, wanted, allow_unused=True)
    return (
        [y.detach() for y in found],
        [torch.zeros_like(x) if s is None else s for x, s in zip(wanted, slopes, strict=True)],
    )


def _backward(model: nn.Module, inputs: tuple) -> tuple[str | None, list[Tensor], list[Tensor]]:
    """`run_backward` of the inputs, or of the first parameter with a gradient, and its name."""
    if any(x.is_floating_point() for x in inputs):
        return None, *run_backward(model, inputs, None)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found, slopes = run_backward(model, inputs, name)
            if slopes[0].any():
                return name, found, slopes
    raise ValueError("no gradient reaches any parameter")


def relative_error(expected: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference of any tensor, of that tensor's largest expected value.

    Infinite where shapes differ or a value is not finite, which would hide any difference.
    """
    if [x.shape for x in expected] != [x.shape for x in got]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return float("inf")
        a, b = a.double(), b.double()
        if not torch.equal(a, b):
            difference, scale = float((a - b).abs().max()), float(a.abs().max())
            worst = max(worst, difference / scale if scale else float("inf"))
    return worst


def outputs(tree) -> list[Tensor]:
    """The floating tensors of nested tuples, lists and dicts, in order."""
    return list(_floating(tree))


def _floating(tree) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
        return
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return
    for item in tree:
        yield from _floating(item)


def one_line(error: BaseException, length: int = 300) -> str:
    """Type and first line of an exception."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."
