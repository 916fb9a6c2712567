"""Every convolutional network of the zoo, cut to half its channels at random, as a file.

``python -m benchmarks.exports --json FILE --markdown docs/export.md`` writes each as ONNX and as
torch.export's archive with `ato_fast.export`, which reads both back and compares them. Where that
fails, the dense network is exported in the same way: a failure that both share is not the cut's.
``--only 'timm:*'`` runs some, ``--show FILE`` runs none and prints a file written before. The
exit status is 1 if a shrunk network fails where the dense one does not.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ato_fast as ato
from ato_fast.export import LIMITS, Exported, ExportError
from ato_fast.train import machine

from .exactness import one_line, randomise
from .run import write
from .zoo import SECONDS, OutOfTime, parser, time_limit, version
from .zoo_models import CASES, Case

FORMATS = ("onnx", "torch-export")
HEADING = "## Every convolutional network of the zoo"
"""Of the Markdown file, what follows this line is written anew, and what precedes it stays."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a network fails that should not, 2 for wrong usage."""
    made = parser("exports", __doc__)
    options = made.parse_args(argv)
    if options.show:
        content = json.loads(options.show.read_text())
    else:
        chosen = [
            case
            for case in CASES
            if case.kind == "cnn" and any(fnmatch.fnmatchcase(case.name, g) for g in options.only)
        ]
        if not chosen:
            made.error(f"--only: no convolutional network matches {options.only}")
        content = run(chosen, options, sys.argv[1:] if argv is None else argv)
    text = markdown(content)
    if options.markdown:
        before = options.markdown.read_text() if options.markdown.exists() else ""
        options.markdown.write_text(before.partition(HEADING)[0] + text)
    print(text)
    return 1 if any(row["status"] == "failed" for row in content["networks"]) else 0


def run(cases: list[Case], options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Export the networks one by one; the JSON file is complete up to the last at any time."""
    begin = time.monotonic()
    packages = ("timm", "onnx", "onnxscript", "onnxruntime")
    content: dict[str, Any] = {
        "command": ["python", "-m", "benchmarks.exports", *arguments],
        "machine": machine.machine(torch.device("cpu")),
        "versions": machine.versions() | {name: version(name) for name in packages},
        "commit": machine.commit(),
        "limits": {name: LIMITS[name] for name in FORMATS},
        "complete": False,
        "networks": [],
    }
    # Export's warning about caches that timm's attention layers keep.
    warnings.filterwarnings("ignore", "The tensor attribute")
    for case in cases:
        row = measure(case, options.seconds)
        content["networks"].append(row)
        content["wall_s"] = round(time.monotonic() - begin, 1)
        content["complete"] = row["name"] == cases[-1].name
        if options.json:
            write(options.json, content)
        print(f"[{content['wall_s']:7.1f} s] {_line(row)}", file=sys.stderr, flush=True)
        gc.collect()
    return content


def measure(case: Case, seconds: float = SECONDS) -> dict[str, Any]:
    """One row: what is left of the network, and how each format went.

    ``status`` is ``ok``; ``dense``: a format fails for the dense network too; ``failed``; or
    ``skipped``.
    """
    row: dict[str, Any] = {"name": case.name, "status": "skipped", "reason": case.missing() or ""}
    if row["reason"]:
        return row
    try:
        with time_limit(seconds):
            torch.manual_seed(0)
            model, inputs = case.build().eval(), case.inputs()
            layout = ato.trace(model, inputs, scope="all")
            mask = half(layout)
            small = ato.shrink(randomise(model), layout, mask)
            row["gates"], row["macs_frac"] = len(layout.gates), layout.macs(mask) / layout.macs()
            row["params"] = layout.params(mask)
            row["formats"] = {name: attempt(name, small, model, inputs) for name in FORMATS}
    except (Exception, OutOfTime) as error:
        return row | {"status": "failed", "reason": one_line(error)}
    found = [entry["status"] for entry in row["formats"].values()]
    row["status"] = next((s for s in ("failed", "dense") if s in found), "ok")
    return row


def half(layout: ato.GroupLayout, seed: int = 0) -> torch.Tensor:
    """A random mask that keeps half of every gate's channels, rounded up."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(layout.n_groups, dtype=torch.bool)
    for gate in layout.gates:
        order = torch.randperm(gate.n, generator=generator)
        mask[gate.offset + order[: gate.n // 2]] = False
    return mask


def attempt(form: str, small: nn.Module, dense: nn.Module, inputs: tuple) -> dict[str, Any]:
    """Export for any batch size, else for that of ``inputs`` alone; what fails, dense as well.

    ``status`` is ``ok``; ``dense``: what failed fails for ``dense`` in the same words, numbers
    aside; ``failed``: it does not.
    """
    entry: dict[str, Any] = {"status": "ok", "reason": "", "dense_reason": ""}
    for dynamic in (True, False):
        result = _export(small, inputs, form, dynamic)
        if isinstance(result, Exported):
            sizes = {"rel_err": result.rel_err, "size_bytes": result.size_bytes}
            return entry | sizes | {"dynamic_batch": dynamic, "opset": result.opset}
        whole = _export(dense, inputs, form, dynamic)
        same = isinstance(whole, str) and _words(whole) == _words(result)
        if not same or not entry["reason"]:
            entry |= {"reason": result, "dense_reason": whole if isinstance(whole, str) else ""}
        if not same:
            return entry | {"status": "failed"}
        entry["status"] = "dense"
    return entry


def _export(model: nn.Module, inputs: tuple, form: str, dynamic_batch: bool) -> Exported | str:
    """What was exported, or why it could not be."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return ato.export(
                model, inputs, Path(folder) / "model", form, dynamic_batch=dynamic_batch
            )
        except ExportError as error:
            return str(error).replace(f"{folder}{os.sep}", "")


def _words(reason: str) -> str:
    return re.sub(r"\d+", "", reason)


def _line(row: dict[str, Any]) -> str:
    parts = [row["name"], row["status"], row["reason"]]
    for name, entry in row.get("formats", {}).items():
        parts.append(f"{name} {_verdict(entry)} {entry['reason']}".strip())
    return ", ".join(part for part in parts if part)


def _verdict(entry: dict[str, Any]) -> str:
    if "rel_err" not in entry:
        return "**failed**" if entry["status"] == "failed" else "no, nor dense"
    return f"{entry['rel_err']:.1e}"


def markdown(content: dict[str, Any]) -> str:
    """What all of it says, then one row per network."""
    rows = content["networks"]
    ran = [row for row in rows if row["status"] != "skipped"]
    machine_, limits = content["machine"], content["limits"]
    versions = ", ".join(f"{name} {v}" for name, v in content["versions"].items() if v)
    lines = [HEADING, ""]
    if not content["complete"]:
        lines += ["**INCOMPLETE: the run did not come to its end.**", ""]
    lines += [_summary(name, ran) for name in limits]
    lines += [
        f"- {len(rows) - len(ran)} skipped.",
        "",
        "Each network of the [zoo](zoo.md) is built with random weights, traced in scope `all`, "
        "loses a random half of every gate's channels, and is exported. The error is the largest "
        "difference of any output between the file that was read back and the shrunk network, of "
        "the output's largest value, over batches of 2, 3 and 1; limits: "
        + ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
        + ".",
        "",
        f"`{' '.join(content['command'])}` took {content['wall_s'] / 60:.0f} minutes on "
        f"{machine_['processor']}, {machine_['threads']} thread(s); {versions}; "
        f"commit {(content['commit'] or 'unknown')[:18]}.",
        *_failures(rows),
        "",
        "| network | gates | MACs left | parameters | ONNX | error | archive | error | batch |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [_cells(row) for row in rows]
    return "\n".join(lines) + "\n"


def _summary(name: str, ran: list[dict[str, Any]]) -> str:
    entries = [row.get("formats", {}).get(name, {"status": "failed"}) for row in ran]
    good = [entry for entry in entries if "rel_err" in entry]
    n_any = sum(entry["dynamic_batch"] for entry in good)
    n_failed = sum(entry["status"] == "failed" for entry in entries)
    worst = max((entry["rel_err"] for entry in good), default=0.0)
    return (
        f"- {name}: {len(good)} of {len(ran)} exported, read back and equal (largest error "
        f"{worst:.1e}), {n_any} of them for any batch size; {len(ran) - len(good) - n_failed} "
        f"that cannot be had dense either; {n_failed} failed."
    )


def _failures(rows: list[dict[str, Any]]) -> list[str]:
    """A table of every reason, with what the dense network's export says."""
    found = [
        (row["name"], name, entry["reason"], entry["dense_reason"])
        for row in rows
        for name, entry in row.get("formats", {}).items()
        if entry["reason"]
    ]
    found += [(row["name"], row["status"], row["reason"], "") for row in rows if row["reason"]]
    if not found:
        return []
    lines = ["", "| network | format | shrunk | dense |", "| --- | --- | --- | --- |"]
    for name, form, reason, dense in found:
        both = "the same" if dense == reason else dense or "exported"
        lines.append(f"| `{name}` | {form} | {reason} | {both} |".replace("\n", " "))
    return lines


def _cells(row: dict[str, Any]) -> str:
    cells = [f"`{row['name']}`"]
    if "formats" not in row:
        return "| " + " | ".join([*cells, *["-"] * 7, row["status"]]) + " |"
    cells += [str(row["gates"]), f"{row['macs_frac']:.0%}", f"{row['params'] / 1e6:.2f} M"]
    batches = set()
    for entry in row["formats"].values():
        size = f"{entry['size_bytes'] / 2**20:.2f} MiB" if "size_bytes" in entry else "-"
        cells += [size, _verdict(entry)]
        batches |= {entry["dynamic_batch"]} if "dynamic_batch" in entry else set()
    names = {True: "any", False: "fixed"}
    cells.append(" / ".join(names[b] for b in sorted(batches, reverse=True)) or "-")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
