"""Parameter lists of known networks with their groups.

A case has the names, shapes and groups of a torchvision model. Its layout comes from `ato.trace`
where torchvision is installed, and else from ``layouts/NAME.json``, which hold the same. A bare
module with parameters of those names and shapes stands in for the network: a step sees no more.

``python -m benchmarks.cases --write`` traces all and writes the files; without ``--write`` it says
whether they still say what tracing finds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ato_fast as ato
from ato_fast import Gate, GroupLayout, Slice

FOLDER = Path(__file__).parent / "layouts"


@dataclass(frozen=True)
class Spec:
    """How to trace a case: torchvision's name of it and the side of a square image."""

    torchvision: str
    pixels: int


SPECS = {
    "resnet50": Spec("resnet50", 64),
    "mobilenet_v2": Spec("mobilenet_v2", 64),
    "vit_b_16": Spec("vit_b_16", 224),
    "convnext_large": Spec("convnext_large", 64),
}


@dataclass(frozen=True, eq=False)
class Case:
    """Names and shapes of a model's parameters, its groups, and where they come from."""

    name: str
    layout: GroupLayout
    source: str
    """``traced`` or ``stored``."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        return {name: tuple(self.layout.shapes[name]) for name in self.layout.parameters}

    @property
    def n_params(self) -> int:
        """Elements of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class Tiny(nn.Module):
    """A few layers of every kind a benchmark meets, for trying the machinery."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.depth = nn.Sequential(
            nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU()
        )
        self.wide = nn.Sequential(nn.Conv2d(12, 40, 3, bias=False), nn.BatchNorm2d(40), nn.ReLU())
        self.hidden = nn.Linear(40, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, 3, H, W] to [B, 5]."""
        x = self.wide(self.depth(self.stem(x))).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


NAMES = (*SPECS, "tiny")


def load(name: str, source: str = "auto") -> Case:
    """A case by name.

    Args:
        source: ``traced``, ``stored``, or ``auto``: traced where torchvision is installed.

    Raises:
        KeyError: no such case.
        RuntimeError: tracing was asked for without torchvision, or it disagrees with the file.
    """
    if name == "tiny":
        return Case(name, ato.trace(Tiny(), (torch.zeros(2, 3, 8, 8),)), "traced")
    if name not in SPECS:
        raise KeyError(f"no case {name!r}; cases: {', '.join(NAMES)}")
    if source == "stored" or (source == "auto" and not _has_torchvision()):
        return Case(name, read_layout(name), "stored")
    layout, stored = trace(name), read_layout(name)
    if (layout.sha256, layout.followers) != (stored.sha256, stored.followers):
        raise RuntimeError(
            f"{name}: tracing finds other groups than {FOLDER / name}.json says; if that is meant, "
            "run python -m benchmarks.cases --write"
        )
    return Case(name, layout, "traced")


def _has_torchvision() -> bool:
    try:
        import torchvision.models  # noqa: F401
    except (ImportError, RuntimeError):
        # RuntimeError: a torchvision made for another torch.
        return False
    return True


def network(name: str) -> nn.Module:
    """The network of a case with random weights, on the CPU.

    Raises:
        KeyError: no such case.
        RuntimeError: torchvision is missing.
    """
    if name == "tiny":
        return Tiny()
    if name not in SPECS:
        raise KeyError(f"no case {name!r}; cases: {', '.join(NAMES)}")
    if not _has_torchvision():
        raise RuntimeError(f"{name}: it needs torchvision, which is missing or does not load")
    from torchvision import models

    return getattr(models, SPECS[name].torchvision)(weights=None)


def trace(name: str) -> GroupLayout:
    """Layout of torchvision's model, scope ``inner``, without attention heads: the per-layer
    projection that is compared with knows channels that are one row.

    Raises:
        RuntimeError: torchvision is missing.
    """
    spec, model = SPECS[name], network(name).eval()
    heads = [n for n, m in model.named_modules() if isinstance(m, torch.nn.MultiheadAttention)]
    x = torch.zeros(2, 3, spec.pixels, spec.pixels)
    return ato.trace(model, (x,), scope="inner", ignore=heads)


def read_layout(name: str) -> GroupLayout:
    """The stored layout: parameters and groups only, without costs and reasons."""
    return layout_from_json(json.loads((FOLDER / f"{name}.json").read_text()))


def layout_to_json(layout: GroupLayout) -> dict:
    """Plain data; a channel map is written as runs ``[first, step, length]``."""
    return {
        "model_name": layout.model_name,
        "scope": layout.scope,
        "parameters": {name: list(layout.shapes[name]) for name in layout.parameters},
        "buffers": {
            name: list(shape)
            for name, shape in layout.shapes.items()
            if name not in set(layout.parameters)
        },
        "gates": [
            {
                "name": gate.name,
                "n": gate.n,
                "residual": gate.residual,
                "slices": [
                    [s.tensor, s.dim, s.role, bool(s.gated), _runs(s.channels)] for s in gate.slices
                ],
            }
            for gate in layout.gates
        ],
        "followers": dict(layout.followers),
    }


def layout_from_json(data: Mapping) -> GroupLayout:
    """Inverse of `layout_to_json`."""
    gates, offset = [], 0
    for gate in data["gates"]:
        slices = tuple(
            Slice(tensor, dim, _from_runs(runs), role, gated)
            for tensor, dim, role, gated, runs in gate["slices"]
        )
        gates.append(Gate(gate["name"], gate["n"], slices, offset, gate["residual"]))
        offset += gate["n"]
    shapes = {**data["parameters"], **data["buffers"]}
    return GroupLayout(
        gates=tuple(gates),
        unprunable=(),
        shapes={name: tuple(shape) for name, shape in shapes.items()},
        parameters=tuple(data["parameters"]),
        mac_terms=(),
        scope=data["scope"],
        model_name=data["model_name"],
        followers=data["followers"],
    )


def _runs(channels: np.ndarray) -> list[list[int]]:
    values = [int(c) for c in channels]
    runs: list[list[int]] = []
    for value in values:
        if runs:
            first, step, length = runs[-1]
            if length == 1:
                runs[-1] = [first, value - first, 2]
                continue
            if value == first + step * length:
                runs[-1][2] += 1
                continue
        runs.append([value, 0, 1])
    return runs


def _from_runs(runs: list[list[int]]) -> np.ndarray:
    parts = [first + step * np.arange(length) for first, step, length in runs]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


def shrunk(case: Case, channels: int = 4) -> Case:
    """The same tensors and gates with ``channels`` entries where groups lie and 1 elsewhere.

    Every tensor has at most 8 elements, so a step over it costs little but its overhead.
    """
    gated = {
        (part.tensor, part.dim) for gate in case.layout.gates for part in gate.slices
        if part.in_group
    }  # fmt: skip
    shapes = {
        name: tuple(channels if (name, dim) in gated else 1 for dim in range(len(shape)))
        for name, shape in case.shapes.items()
    }
    gates = tuple(
        Gate(
            gate.name,
            channels,
            tuple(
                Slice(part.tensor, part.dim, np.arange(channels), part.role, part.gated)
                for part in gate.slices
                if part.in_group
            ),
            channels * index,
        )
        for index, gate in enumerate(case.layout.gates)
    )
    layout = GroupLayout(gates, (), shapes, case.layout.parameters, ())
    return Case(f"{case.name}-overhead", layout, case.source)


@dataclass(frozen=True, eq=False)
class Values:
    """Start of every contender: a parameter and a gradient per name, in the memory format asked."""

    params: dict[str, Tensor]
    grads: dict[str, Tensor]


def values(
    case: Case, device: torch.device, dtype: torch.dtype, channels_last: bool = False, seed: int = 0
) -> Values:
    """Random parameters of the usual size (weights 1/sqrt(fan in), norms near 1) and gradients."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...], scale: float, shift: float = 0.0) -> Tensor:
        value = torch.randn(shape, generator=generator, device=device)
        value = value.mul_(scale).add_(shift).to(dtype)
        if channels_last and len(shape) == 4:
            return value.contiguous(memory_format=torch.channels_last)
        return value

    params, grads = {}, {}
    for name, shape in case.shapes.items():
        if len(shape) > 1:
            params[name] = normal(shape, 1 / math.sqrt(max(math.prod(shape[1:]), 1)))
        else:
            params[name] = normal(shape, 0.1, float(name.endswith("weight")))
        grads[name] = normal(shape, 0.1)
    return Values(params, grads)


def bare_model(start: Values) -> nn.Module:
    """Modules that hold copies of the parameters under their dotted names, each with a gradient."""
    root = nn.Module()
    for name, value in start.params.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        param = nn.Parameter(value.clone())
        param.grad = start.grads[name].clone()
        module.register_parameter(leaf, param)
    return root


def restore(model: nn.Module, start: Values) -> None:
    """Write parameters and gradients back in place; addresses stay."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(start.params[name])
            param.grad.copy_(start.grads[name])


def fill_groups(
    layout: GroupLayout, keep: Tensor, tensors_of: Callable[[str], list[Tensor]], value: float = 0.0
) -> None:
    """Set the dropped groups' entries of the tensors belonging to each parameter to ``value``."""
    with torch.no_grad():
        for (name, dim), parts in layout.slices_of.items():
            if not any(part.in_group for _, part in parts):
                continue
            groups = torch.tensor(layout.groups_of(name, dim))
            at = torch.nonzero((groups >= 0) & ~keep[groups]).flatten()
            for tensor in tensors_of(name) if len(at) else ():
                tensor.index_fill_(dim, at.to(tensor.device), value)


def main(argv: list[str] | None = None) -> int:
    """Check the stored layouts against tracing, or write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*SPECS, []], help="default: all")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)
    stale = []
    for name in options.names or SPECS:
        layout = trace(name)
        path = FOLDER / f"{name}.json"
        text = json.dumps(layout_to_json(layout), separators=(",", ":")) + "\n"
        if options.write:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(name)
        print(f"{name}: {layout.n_groups} groups, {'STALE' if name in stale else 'as stored'}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
