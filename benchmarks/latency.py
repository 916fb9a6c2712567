"""How well the latency of masks is predicted, and what the measured freeze makes of it.

``python -m benchmarks.latency --json FILE`` measures the table of every network, freezes random
masks at several targets by the estimate alone, and measures them; then by `measured=True`, and
measures the result once more. ``--show FILE`` runs none and prints a file written before.

A prediction's error is predicted over measured latency, less one. Beside it stand the two simpler
predictions: the sum of the gates' savings, and the share of multiply-adds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import ato_fast as ato
from ato_fast.latency import LatencyTable
from ato_fast.report import table
from ato_fast.stopwatch import Stopwatch
from ato_fast.train import machine

from .run import write

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9)
SCHEMA = 1


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for wrong usage."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME")
    made.add_argument("--size", type=int, default=64, help="pixels a side")
    made.add_argument("--batch", type=int, default=8)
    made.add_argument("--scope", choices=("inner", "all"), default="inner")
    made.add_argument("--round-to", type=int, default=1)
    made.add_argument("--masks", type=int, default=2, help="masks per target")
    made.add_argument("--threads", type=int, help="default: all torch would use")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.add_argument("--show", type=Path, metavar="FILE")
    options = made.parse_args(argv)
    if options.show:
        print(tables(json.loads(options.show.read_text())))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "command": ["python", "-m", "benchmarks.latency", *(argv or sys.argv[1:])],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.machine(device) | {"load_before": os.getloadavg()[0]},
        "versions": machine.versions(),
        "commit": os.environ.get("ATO_FAST_COMMIT") or machine.commit(),
        "size": options.size,
        "batch": options.batch,
        "scope": options.scope,
        "round_to": options.round_to,
        "networks": [],
    }
    for name in options.networks:
        content["networks"].append(measure(name, options, device))
        if options.json:
            write(options.json, content)
        print(f"{name}: done", file=sys.stderr)
    print(tables(content))
    return 0


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The record of one network."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).to(device)
    example = (torch.randn(options.batch, 3, options.size, options.size, device=device),)
    layout = ato.trace(model, example, scope=options.scope, round_to=options.round_to)
    first = ato.Budget(latency=0.5, example=example)
    first.prepare(model, layout)
    measured = first.table_of(layout)
    watch = Stopwatch(model, layout, example)
    predicted, frozen = [], []
    for number, target in enumerate(TARGETS):
        budget = ato.Budget(latency=target, example=example, table=measured)
        budget.prepare(model, layout)
        try:
            budget.check(layout)
        except ValueError:
            continue
        for seed in range(options.masks):
            mask = budget.freeze(layout, logits_of(layout, 10 * number + seed))
            _, ratio = watch.compare(mask)
            predicted.append(
                {
                    "target": target,
                    "measured": ratio,
                    "estimate": budget.cost(layout, mask) / measured.dense_ms,
                    "sum": 1 - summed(layout, measured, mask),
                    "macs": layout.macs(mask) / layout.macs(),
                }
            )
        mask = budget.freeze(layout, logits_of(layout, 10 * number), measured=True)
        report = budget.report(layout, mask)
        _, again = watch.compare(mask)
        frozen.append(
            {
                "target": target,
                "measured": report["measured_ms"] / measured.dense_ms,
                "again": again,
                "met": report["met"],
                "rounds": report["rounds"],
                "seconds": report["seconds"],
                "macs": layout.macs(mask) / layout.macs(),
            }
        )
    return {
        "network": name,
        "n_gates": len(layout.gates),
        "table": measured.state(),
        "floor": measured.ratio[-1],
        "predicted": predicted,
        "frozen": frozen,
    }


def logits_of(layout: ato.GroupLayout, seed: int) -> torch.Tensor:
    """Random logits with an offset per gate, so that gates keep different shares."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layout.n_groups, generator=generator)
    for gate in layout.gates:
        logits[gate.span] += torch.randn((), generator=generator)
    return logits


def summed(layout: ato.GroupLayout, measured: LatencyTable, mask: torch.Tensor) -> float:
    """Sum of what every gate saves alone."""
    return sum(
        float(np.interp(int(mask[gate.span].sum()), widths, saved))
        for gate, widths, saved in zip(layout.gates, measured.widths, measured.saved, strict=True)
    )


def errors(record: dict[str, Any], prediction: str) -> str:
    """Mean and largest absolute error of a prediction, in percent of the measured latency."""
    rows = record["predicted"]
    off = [abs(row[prediction] / row["measured"] - 1) for row in rows]
    return f"{np.mean(off):.1%} ({max(off):.1%})" if off else "-"


def tables(content: dict[str, Any]) -> str:
    """What was found, as text."""
    here, side = content["machine"], content["size"]
    lines = [
        f"{here['device']} ({here['processor']}), {here['threads']} thread(s), torch "
        f"{content['versions']['torch']}; {content['batch']}x3x{side}x{side}, scope "
        f"{content['scope']}, round_to {content['round_to']}; commit "
        f"{(content['commit'] or 'unknown')[:18]}",
        "",
        table(
            ["network", "gates", "dense", "table", "floor", "estimate off", "sum off", "MACs off"],
            [
                [
                    record["network"],
                    str(record["n_gates"]),
                    f"{record['table']['dense_ms']:.1f} ms",
                    f"{record['table']['seconds']:.0f} s",
                    f"{record['floor']:.1%}",
                    *(errors(record, prediction) for prediction in ("estimate", "sum", "macs")),
                ]
                for record in content["networks"]
            ],
        ),
        "",
        table(
            ["network", "target", "estimate alone", "measured freeze", "again", "rounds", "MACs"],
            [
                [
                    record["network"],
                    f"{row['target']:.0%}",
                    f"{row['rounds'][0]['measured_ms'] / record['table']['dense_ms']:.1%}",
                    f"{row['measured']:.1%}" + ("" if row["met"] else " (missed)"),
                    f"{row['again']:.1%}",
                    f"{len(row['rounds'])}, {row['seconds']:.0f} s",
                    f"{row['macs']:.0%}",
                ]
                for record in content["networks"]
                for row in record["frozen"]
            ],
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
