"""Suite ``trace``: seconds to find the gates of a model, and how they grow with its depth.

``trace`` against ``torch.export`` alone in the same run, which it cannot go below; on networks of
torchvision at 224 px, batch 1, and on chains of convolution, batch norm and ReLU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

import ato_fast as ato
from ato_fast.report import table as text_table

from . import timing

NETWORKS = ("resnet50", "vit_b_16", "convnext_tiny")
DEPTHS = (50, 200, 1000)
ROUNDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This suite has no options of its own."""


def chain(depth: int) -> nn.Module:
    """``depth`` layers of 8 channels, each a convolution, a batch norm and a ReLU."""
    layers = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(depth - 1):
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 10))


def run(options: argparse.Namespace, save: Callable[[dict], None]) -> dict[str, Any]:
    """One row per network: seconds of both, median and spread, and their ratio."""
    result: dict[str, Any] = {"rows": [], "red": []}
    rounds = 1 if options.quick else ROUNDS
    depths = (5, 10) if options.quick else DEPTHS
    networks = () if options.quick else NETWORKS
    cases = [
        *((n, lambda n=n: torchvision.models.get_model(n, weights=None), 224) for n in networks),
        *((f"chain of {d}", lambda d=d: chain(d), 8) for d in depths),
    ]
    for name, build, size in cases:
        options.progress(name)
        torch.manual_seed(0)
        model, x = build().eval(), torch.randn(1, 3, size, size)
        samples: dict[str, list[float]] = {"trace": [], "export": []}
        nodes = gates = 0
        # A thousand layers take most of a minute.
        n = rounds if size > 8 else 1
        for round_number in range(n + 1):
            begin = time.perf_counter()
            with torch.no_grad():
                program = torch.export.export(model, (x,), strict=False)
            middle = time.perf_counter()
            layout = ato.trace(model, (x,))
            end = time.perf_counter()
            nodes = sum(node.op == "call_function" for node in program.graph.nodes)
            gates = len(layout.gates)
            # The first round pays for imports and caches.
            if round_number:
                samples["trace"].append(end - middle)
                samples["export"].append(middle - begin)
        row = {"case": name, "nodes": nodes, "gates": gates, "rounds": n}
        for key, values in samples.items():
            row |= {f"{key}_{k}_s": v for k, v in timing.spread(values).items()}
        result["rows"].append(row | {"masked": "0"})
        save(result)
    return result


def table(result: dict[str, Any], masked: list[str] | None = None) -> str:
    """Seconds of `trace`, milliseconds per operation, and the share that is export."""
    body = [
        [
            row["case"], str(row["nodes"]), str(row["gates"]),
            f"{row['trace_median_s']:.2f} ({row['trace_p20_s']:.2f} to {row['trace_p80_s']:.2f})",
            f"{row['export_median_s']:.2f}",
            f"{1e3 * row['trace_median_s'] / row['nodes']:.1f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    header = ["trace", "operations", "gates", "seconds", "export alone", "ms per operation"]
    return text_table(header, body, left=1)
