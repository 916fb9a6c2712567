"""Suite ``masked``: the controller's step, its parts, and the kernel it rests on.

* ``step``: controller, masked forward, cross-entropy, backward to the controller's parameters and
  its optimizer step. *published* gates feature maps and runs all of backward; *ours* is what a run
  does (`ato_fast.gates.Gates.value_and_grad`); *affine* scales weights everywhere (``Gates()``).
  All three use our controller.
* ``controller``: the same without the model: what the search itself costs (GRU included).
* ``kernel``: `masked_bn_act` forward and backward against batch norm, activation and product in
  eager PyTorch and under `torch.compile`, and against copies of the bytes it must move.

Contenders are checked before they are timed. On CUDA times are those of eager calls on an idle GPU,
launches included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ato_fast import backend, masked
from ato_fast.controller import Controller
from ato_fast.gates import Gates
from ato_fast.report import table as text_table

from . import cases, contenders, timing
from .baselines import FeatureGates
from .contenders import Red

DEFAULT_CASES = ["resnet50", "mobilenet_v2"]
DEFAULT_ROUNDS = {"cpu": 10, "cuda": 20}
BLOCKS = ["step", "controller", "kernel"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = {"cpu": 16, "cuda": 128}
PIXELS = {"cpu": 128, "cuda": 224}
KERNELS = {"cpu": ((16, 256, 28, 28), (16, 512, 7, 7)),
           "cuda": ((128, 64, 56, 56), (128, 256, 14, 14), (128, 512, 7, 7))}  # fmt: skip
"""Feature maps of ResNet-50 at 224 pixels; on the CPU with one of MobileNetV2's size."""
ACTIVATIONS = ("relu", "relu6", "silu")
OUTPUT_ERROR, GRADIENT_ERROR = 1e-5, 1e-3
"""Relative to the largest output, and to the gradient's norm; fp32."""


class Missing(RuntimeError):
    """A package that the network comes from."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite alone; it shares --batch and --pixels (default: 128, on CUDA 224)."""
    group = parser.add_argument_group("masked")
    group.add_argument("--masked-blocks", nargs="+", choices=BLOCKS, default=BLOCKS)


def run(options: argparse.Namespace, save: Callable[[dict], None]) -> dict[str, Any]:
    """Rows of every block, case, dtype and shape."""
    result: dict[str, Any] = {"rows": [], "red": [], "skipped": []}
    device = torch.device(options.device)
    names = options.cases or DEFAULT_CASES
    work: list[tuple[dict, Callable[[], dict]]] = []
    for name in names:
        for block, measure in (("step", _step), ("controller", _controller)):
            if block in options.masked_blocks:
                where = {"block": block, "case": name, "dtype": "fp32"}
                work.append((where, lambda n=name, m=measure: m(n, device, options)))
    if "kernel" in options.masked_blocks:
        for dtype in _dtypes(options):
            for shape in KERNELS[options.device][-1 if options.quick else 0 :]:
                for activation in ACTIVATIONS[: 1 if options.quick else None]:
                    where = {"block": "kernel", "case": "x".join(map(str, shape)),
                             "activation": activation, "dtype": dtype}  # fmt: skip
                    arguments = (shape, activation, DTYPES[dtype], device, options)
                    work.append((where, lambda a=arguments: _kernel(*a)))
    for where, measure in work:
        late = options.out_of_time()
        if late:
            result["skipped"].append({**where, "reason": late})
            continue
        options.progress(" ".join(map(str, where.values())))
        try:
            result["rows"].append({**where, **measure()})
        except Missing as failure:
            result["skipped"].append({**where, "reason": str(failure)})
        except Exception as failure:
            result["red"].append({**where, "reason": contenders.reason_of(failure)})
        save(result)
    return result


def _dtypes(options: argparse.Namespace) -> list[str]:
    return options.dtypes or (["fp32", "bf16"] if options.device == "cuda" else ["fp32"])


def _clock(device: torch.device) -> Callable:
    return timing.DeviceClock(device, idle=True) if device.type == "cuda" else timing.HostClock()


def _summary(samples: dict[str, list[float]]) -> dict[str, dict]:
    """Times and what ours takes of them."""
    against = timing.ratios(samples, "ours")
    found: dict[str, dict] = {}
    for name, values in samples.items():
        found[name] = {f"{key}_ms": value for key, value in timing.spread(values).items()}
        if name in against:
            found[name]["ours_over_this"] = against[name]
    return found


def _step(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    case = cases.load(name, options.layouts)
    batch = options.batch or (2 if options.quick else BATCH[device.type])
    pixels = options.pixels or (32 if options.quick else PIXELS[device.type])
    layout_of = {"channels_last": torch.channels_last}.get(
        options.memory_format, torch.contiguous_format
    )
    try:
        model = cases.network(name).to(device, memory_format=layout_of)
    except RuntimeError as failure:
        raise Missing(str(failure)) from failure
    for module in model.modules():
        # As after training: statistics and weights that are not 0 and 1.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(batch, 3, pixels, pixels, device=device).to(memory_format=layout_of)
    y = torch.randint(5, (batch,), device=device)
    feature, gates = FeatureGates(model, case.layout), Gates(model, case.layout)
    routes = {
        "published": lambda mask, task: task(feature(mask, x)).backward(),
        "affine": lambda mask, task: gates(mask, lambda m: task(m(x))).backward(),
        "ours": lambda mask, task: mask.backward(
            gates.value_and_grad(mask, lambda m: task(m(x)))[1]
        ),
    }
    _check(routes, case.layout.n_groups, y, relu6="mobilenet" in name)
    feature.clear()
    widths = [gate.n for gate in case.layout.gates]

    def stepper(route: Callable) -> Callable[[], object]:
        controller = Controller(widths, device=device)
        optimizer = controller.optimizer()

        def step() -> None:
            optimizer.zero_grad()
            route(controller.sample(), lambda output: F.cross_entropy(output, y))
            optimizer.step()
            feature.clear()

        return step

    clock = _clock(device)
    steps = {key: stepper(route) for key, route in routes.items()}
    samplers = {key: (lambda step=step: clock(step)) for key, step in steps.items()}
    samples = timing.interleave(samplers, options.rounds)
    return {
        "batch": batch, "pixels": pixels, "memory_format": options.memory_format,
        "layout": case.source, "rounds": options.rounds,
        "served": backend.serving(masked.FORWARD, device, [torch.float32]),
        "contenders": _summary(samples), **_memory(routes, case.layout.n_groups, y, device),
    }  # fmt: skip


def _check(routes: dict[str, Callable], n_groups: int, y: Tensor, relu6: bool) -> None:
    """Every route gives the published output and gradient of the mask.

    At no mask entry of 0, where max pooling has ties and a subgradient is a matter of taste.

    Raises:
        Red: one does not.
    """
    results = {}
    soft = torch.linspace(0.1, 1, 7, device=y.device).repeat(n_groups // 7 + 1)[:n_groups]
    for name, route in routes.items():
        mask, outputs = soft.clone().requires_grad_(), []

        def task(output: Tensor, outputs=outputs) -> Tensor:
            outputs.append(output.detach())
            return F.cross_entropy(output, y)

        route(mask, task)
        results[name] = (outputs[-1], mask.grad)
    output, gradient = results["published"]
    for name, (mine, slope) in results.items():
        off = float((mine - output).abs().max() / output.abs().max())
        bent = float((slope - gradient).norm() / gradient.norm())
        if relu6 and name == "affine":
            # Its gates are before activations that are not homogeneous: equal at 0 and 1 only.
            continue
        if not (off <= OUTPUT_ERROR and bent <= GRADIENT_ERROR):
            raise Red(f"{name}: output off by {off:.1e}, gradient by {bent:.1e}")


def _memory(
    routes: dict[str, Callable], n_groups: int, y: Tensor, device: torch.device
) -> dict[str, Any]:
    """Peak of a forward and backward, on CUDA."""
    if device.type != "cuda":
        return {}
    peaks = {}
    for name, route in routes.items():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        mask = torch.ones(n_groups, device=device, requires_grad=True)
        route(mask, lambda output: F.cross_entropy(output, y))
        peaks[name] = torch.cuda.max_memory_allocated(device) - before
    return {"peak_bytes": peaks}


def _controller(name: str, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the search's own part of a step, model forward and backward left out."""
    case = cases.load(name, options.layouts)
    controller = Controller([gate.n for gate in case.layout.gates], device=device)
    optimizer = controller.optimizer()
    slope = torch.randn(controller.n_groups, device=device)

    def gru() -> None:
        controller.gru(controller.source)[0].sum().backward()

    def ours() -> None:
        optimizer.zero_grad()
        controller.sample().backward(slope)
        optimizer.step()

    clock = _clock(device)
    samples = timing.interleave(
        {"ours": lambda: clock(ours), "gru": lambda: clock(gru)}, max(options.rounds, 20)
    )
    return {"n_groups": controller.n_groups, "rounds": options.rounds,
            "contenders": _summary(samples)}  # fmt: skip


def _kernel(
    shape: tuple[int, ...],
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, dtype=dtype)
    if options.memory_format == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    x.requires_grad_()
    gate = torch.rand(shape[1], device=device, requires_grad=True)
    weight, bias = torch.rand(shape[1], device=device) + 0.5, torch.randn(shape[1], device=device)
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    code = masked.ACTIVATIONS.index(activation)

    def ours(x: Tensor) -> Tensor:
        return masked.masked_bn_act(x, gate, weight, bias, activation)

    def eager(x: Tensor) -> Tensor:
        y = F.batch_norm(x, mean, var, weight.to(x.dtype), bias.to(x.dtype), False, 0.0, 0.0)
        return masked.activated(y, code) * gate.to(x.dtype).view(1, -1, 1, 1)

    routes = {"ours": ours, "eager": eager}
    if not options.quick and activation == ACTIVATIONS[0]:
        compiled = torch.compile(eager)
        try:
            with timing.at_most(120):
                torch.autograd.grad(compiled(x), (x, gate), grad)
            routes["compile"] = compiled
        except Exception as failure:
            options.progress(f"compile left out: {contenders.reason_of(failure)}")
    expected = torch.autograd.grad(eager(x), (x, gate), grad)
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    for mine, theirs in zip(torch.autograd.grad(ours(x), (x, gate), grad), expected, strict=True):
        off = float((mine - theirs).float().norm() / theirs.float().norm())
        if not off <= bound:
            raise Red(f"ours: a gradient is off by {off:.1e}")
    # Reads x and writes y; reads x and its gradient and writes another.
    n_bytes = 5 * x.numel() * x.element_size()
    source = torch.empty(n_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = _clock(device)
    samplers = {
        name: (lambda route=route: clock(lambda: torch.autograd.grad(route(x), (x, gate), grad)))
        for name, route in routes.items()
    }
    samplers["copy"] = lambda: clock(lambda: target.copy_(source))
    found = _summary(timing.interleave(samplers, options.rounds))
    for entry in found.values():
        entry["gb_per_s"] = n_bytes / entry["median_ms"] / 1e6
    return {"rounds": options.rounds, "memory_format": options.memory_format,
            "served": backend.serving(masked.FORWARD, device, [dtype]),
            "contenders": found}  # fmt: skip


def table(result: dict[str, Any], masked: list[str] | None = None) -> str:
    """Milliseconds, and what ours takes of every other's."""
    lines, body = [], []
    for row in result["rows"]:
        about = [row["block"], row["case"], row.get("activation", ""), row["dtype"]]
        for name, entry in row["contenders"].items():
            share = ""
            if "ours_over_this" in entry:
                share = "{median:.2f} ({p20:.2f} to {p80:.2f})".format(**entry["ours_over_this"])
            body.append([*about, name, f"{entry['median_ms']:.2f}", share])
            about = ["", "", "", ""]
    if body:
        header = ["masked", "case", "activation", "dtype", "contender", "ms", "ours / this"]
        lines.append(text_table(header, body, left=5))
    for kind in ("red", "skipped"):
        for entry in result[kind]:
            what = " ".join(str(v) for k, v in entry.items() if k != "reason")
            lines.append(f"{kind.upper()} {what}: {entry['reason']}")
    return "\n".join(lines)
