"""What the tracer makes of every network of the zoo, and whether every cut is exact.

``python -m benchmarks.zoo --json FILE --markdown docs/zoo.md`` traces each case of `zoo_models`,
cuts it by random masks and compares it with the zeroed network (`exactness`). A case that fails is
recorded and the run goes on; the exit status is 1 if any did.

``--only 'timm:*'`` runs some, ``--show FILE`` runs none and prints a file written before.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ato_fast as ato
from ato_fast.train import machine

from . import zoo_report
from .exactness import (
    CHANGE,
    GRADIENT_LIMIT,
    OUTPUT_LIMIT,
    compare,
    one_line,
    random_mask,
    randomise,
)
from .run import write
from .zoo_models import CASES, Case

SCHEMA = 1
MASKS = 3
SECONDS = 600.0


class OutOfTime(BaseException):
    """A case takes too long; no `Exception`, which what is interrupted might take for an answer."""


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """What the commands that go through the zoo have in common."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--only", nargs="+", default=["*"], metavar="GLOB")
    made.add_argument("--seconds", type=float, default=SECONDS, metavar="N", help="for one network")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.add_argument("--markdown", type=Path, metavar="FILE")
    made.add_argument("--show", type=Path, metavar="FILE")
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a case crashed or was not exact, 2 for wrong usage."""
    made = parser("zoo", __doc__)
    made.add_argument("--scope", choices=["all", "inner"], default="all")
    made.add_argument("--masks", type=int, default=MASKS, metavar="N")
    options = made.parse_args(argv)
    if options.show:
        content = json.loads(options.show.read_text())
    else:
        chosen = [c for c in CASES if any(fnmatch.fnmatchcase(c.name, g) for g in options.only)]
        if not chosen:
            made.error(f"--only: no case matches {options.only}")
        if options.masks < 1:
            made.error(f"--masks: expected a number >= 1, got {options.masks}")
        content = run(chosen, options, argv)
    text = zoo_report.markdown(content)
    if options.markdown:
        options.markdown.write_text(text)
    print(text)
    return 1 if any(row["status"] in ("crash", "wrong") for row in content["cases"]) else 0


def run(cases: list[Case], options: argparse.Namespace, argv: list[str] | None) -> dict[str, Any]:
    """Measure the cases one by one; the JSON file is complete up to the last one at any time."""
    begin = time.monotonic()
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "command": ["python", "-m", "benchmarks.zoo", *(sys.argv[1:] if argv is None else argv)],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.machine(torch.device("cpu")),
        "versions": {**machine.versions(), **{p: version(p) for p in ("timm", "transformers")}},
        "commit": machine.commit(),
        "scope": options.scope,
        "masks": options.masks,
        "limits": {"output": OUTPUT_LIMIT, "gradient": GRADIENT_LIMIT},
        "complete": False,
        "wall_s": 0.0,
        "cases": [],
    }
    # Export's warning about caches that timm's attention layers keep.
    warnings.filterwarnings("ignore", "The tensor attribute")
    for number, case in enumerate(cases, 1):
        row = measure(case, options.scope, options.masks, options.seconds)
        content["cases"].append(row)
        content["wall_s"] = round(time.monotonic() - begin, 1)
        content["complete"] = number == len(cases)
        if options.json:
            write(options.json, content)
        print(
            f"[{content['wall_s']:7.1f} s] {number}/{len(cases)} {zoo_report.one_line(row)}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        gc.collect()
    return content


def version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure(
    case: Case, scope: str, n_masks: int = MASKS, seconds: float = SECONDS
) -> dict[str, Any]:
    """One row: what was traced, what is within reach, and the worst errors; the same as a graph
    (``graph_...``) for a network below its goal.

    ``status`` is ``exact``; ``none``: traced, and no gate offered; ``wrong``: a cut is not exact;
    ``crash``: an exception, whose message is in ``reason``, or more than ``seconds``; ``skipped``.
    """
    begin = time.monotonic()
    row: dict[str, Any] = {"name": case.name, "kind": case.kind, "status": "skipped"}
    row["reason"] = case.missing() or ""
    if row["reason"]:
        return row
    try:
        with time_limit(seconds):
            _measure(case, scope, n_masks, row)
    except (Exception, OutOfTime) as error:
        row |= {"status": "crash", "reason": one_line(error)}
    row["wall_s"] = round(time.monotonic() - begin, 2)
    return row


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread after ``seconds``, where the system has timers."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number, frame) -> None:
        raise OutOfTime(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _measure(case: Case, scope: str, n_masks: int, row: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.inputs()
    with torch.no_grad():
        program = torch.export.export(model, inputs, strict=False)
    row["nodes"] = sum(node.op == "call_function" for node in program.graph.nodes)
    del program
    begin = time.monotonic()
    layout = ato.trace(model, inputs, scope=scope)
    row["trace_s"] = round(time.monotonic() - begin, 2)
    row["gates"], row["groups"] = len(layout.gates), layout.n_groups
    row["macs"], row["params"] = layout.macs(), layout.params()
    row["macs_frac"], row["params_frac"] = layout.coverage()
    row["n_unprunable"], row["n_parameters"] = len(layout.unprunable), len(layout.parameters)
    row["reasons"] = reasons(layout)
    row["status"] = "exact" if layout.gates else "none"
    graph = None
    if scope == "all" and row["macs_frac"] < zoo_report.GOALS.get(case.kind, 0.0):
        graph = ato.trace(model, inputs, scope=scope, as_graph=True)
        row["graph_macs_frac"] = graph.coverage().macs
    randomise(model)
    if graph is not None and graph.gates:
        errors, reason = _compare(model, inputs, graph, n_masks)
        row |= {f"graph_{key}": value for key, value in errors.items()}
        if reason:
            row |= {"status": "wrong", "reason": f"as a graph: {reason}"}
    if layout.gates:
        errors, reason = _compare(model, inputs, layout, n_masks)
        row |= errors
        if reason:
            row |= {"status": "wrong", "reason": reason}


def _compare(
    model: torch.nn.Module, inputs: tuple, layout: ato.GroupLayout, n_masks: int
) -> tuple[dict[str, float], str]:
    """The worst errors over random masks, and what is wrong, in words."""
    found = [compare(model, inputs, layout, random_mask(layout, seed)) for seed in range(n_masks)]
    errors = {
        "output_error": max(e.output for e in found),
        "output_error_float64": max(e.output_float64 for e in found),
        "gradient_error": max(e.gradient for e in found),
        "change": min(e.change for e in found),
    }
    problems = [e.problem for e in found if e.problem]
    if not problems and errors["change"] < CHANGE:
        problems = [
            f"a mask changes the output by {errors['change']:.1e} only, which shows nothing"
        ]
    if not problems and not all(e.slope for e in found):
        problems = ["no gradient comes through the zeroed model, which shows nothing"]
    if not problems and not all(e.exact for e in found):
        problems = ["not the same function"]
    return errors, problems[0] if problems else ""


def reasons(layout: ato.GroupLayout, most: int = 4) -> list[list[Any]]:
    """Why parameters are left out: ``[reason, elements, first tensor]``, most elements first."""
    count: Counter[str] = Counter()
    first: dict[str, str] = {}
    for entry in layout.unprunable:
        count[entry.reason] += torch.Size(layout.shapes[entry.tensor]).numel()
        first.setdefault(entry.reason, entry.tensor)
    return [[reason, n, first[reason]] for reason, n in count.most_common(most)]


if __name__ == "__main__":
    sys.exit(main())
