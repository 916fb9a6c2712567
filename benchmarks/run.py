"""Run benchmark suites, write JSON, print a table.

``python -m benchmarks.run --suite step --device cpu --json FILE`` checks every contender before it
times it; a block whose check fails is not timed and the exit status is 1. ``--show FILE...`` prints
the tables of files written before.

A suite is a module with ``add_arguments(parser)``, ``run(options, save)`` and
``table(result, masked)``, possibly ``DEFAULT_ROUNDS`` per device, and one line in `SUITES`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ato_fast import backend
from ato_fast.train import machine

from . import cases

SUITES = {
    "step": "benchmarks.step",
    "overhead": "benchmarks.overhead",
    "trace": "benchmarks.tracing",
    "masked": "benchmarks.masked",
    "shrink": "benchmarks.shrinking",
    "end2end": "benchmarks.end2end",
}
SCHEMA = 1
ROUNDS = {"cpu": 30, "cuda": 50}
QUICK_ROUNDS = 3


def parser() -> argparse.ArgumentParser:
    """Options common to all suites, then each suite's own."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--suite", nargs="+", choices=SUITES, default=["step"])
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="print these, run none")
    made.add_argument("--show-masked", nargs="+", metavar="SHARE", help="only these rows")
    made.add_argument("--cases", nargs="+", choices=cases.NAMES, default=None)
    made.add_argument("--optimizers", nargs="+", choices=["adamw", "sgd"],
                      default=["adamw", "sgd"])  # fmt: skip
    made.add_argument("--backends", nargs="+", choices=backend.NAMES, default=None,
                      help=f"ours on each (default: {backend.VARIABLE} or auto)")  # fmt: skip
    made.add_argument("--layouts", choices=["auto", "traced", "stored"], default="auto",
                      help="auto: traced where torchvision is installed")  # fmt: skip
    made.add_argument("--memory-format", choices=["contiguous", "channels_last"],
                      default="contiguous")  # fmt: skip
    made.add_argument("--rounds", type=int, metavar="N",
                      help="default: 30, on CUDA 50; fewer where a call is long")  # fmt: skip
    made.add_argument("--threads", type=int, metavar="N", help="default: all torch would use")
    made.add_argument("--seconds", type=float, metavar="N", help="start no new block after N s")
    made.add_argument("--quick", action="store_true",
                      help="try the machinery: case tiny, 3 rounds, no compiler")  # fmt: skip
    for name in SUITES:
        suite(name).add_arguments(made)
    return made


def suite(name: str) -> Any:
    """The module of a suite."""
    return importlib.import_module(SUITES[name])


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a check was red, 2 for wrong usage or a missing device."""
    made = parser()
    options = made.parse_args(argv)
    if options.show:
        for path in options.show:
            print(show(json.loads(path.read_text()), options.show_masked))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    if options.rounds is not None and options.rounds < 1:
        made.error(f"--rounds: expected a number >= 1, got {options.rounds}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.cases = options.cases or ["tiny"]
        options.compile_cases = []
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else None)
    content = header(options, argv)
    begin = time.monotonic()

    def out_of_time() -> str | None:
        if options.seconds is None or time.monotonic() - begin < options.seconds:
            return None
        return f"the {options.seconds:g} s of --seconds were over"

    options.out_of_time = out_of_time
    options.progress = lambda text: print(
        f"[{time.monotonic() - begin:6.1f} s] {text}", file=sys.stderr, flush=True
    )

    def save(name: str, result: dict) -> None:
        content["suites"][name] = result
        content["wall_s"] = round(time.monotonic() - begin, 1)
        if options.json:
            write(options.json, content)

    for name in options.suite:
        default = getattr(suite(name), "DEFAULT_ROUNDS", ROUNDS)
        options.rounds = rounds or default[options.device]
        save(name, suite(name).run(options, lambda result, name=name: save(name, result)))
    content["complete"] = True
    if options.json:
        write(options.json, content)
    print(show(content, options.show_masked))
    return 1 if any(result["red"] for result in content["suites"].values()) else 0


def header(options: argparse.Namespace, argv: list[str] | None) -> dict[str, Any]:
    """Where, with what and how the figures came about."""
    return {
        "schema": SCHEMA,
        "command": ["python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": where(torch.device(options.device)),
        "versions": machine.versions(),
        # A copy without .git can be told.
        "commit": os.environ.get("ATO_FAST_COMMIT") or machine.commit(),
        "complete": False,
        "wall_s": 0.0,
        "suites": {},
    }


def where(device: torch.device) -> dict[str, Any]:
    """The machine, the thread counts and, on CUDA, the GPU."""
    found: dict[str, Any] = dict(machine.machine(device))
    found["interop_threads"] = torch.get_num_interop_threads()
    found["affinity"] = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    found["load_before"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    names = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_PROC_BIND", backend.VARIABLE)
    found["environment"] = {name: os.environ.get(name) for name in names}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }
    return found


def write(path: Path, content: dict) -> None:
    """Replace the file in one go: a killed run leaves the last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def show(content: dict[str, Any], masked: list[str] | None = None) -> str:
    """Everything a file says, as text."""
    here, versions = content["machine"], content["versions"]
    lines = [
        f"{here['device']}; {here['processor']}, {here['cores']} cores, {here['threads']} threads, "
        f"load {here['load_before'] or 0:.1f}; torch {versions['torch']}, "
        f"triton {versions['triton']}, commit {(content['commit'] or 'unknown')[:18]}"
    ]
    if not content["complete"]:
        lines.append("INCOMPLETE: the run did not come to its end")
    for name, result in content["suites"].items():
        lines += ["", suite(name).table(result, masked)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
