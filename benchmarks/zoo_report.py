"""The zoo's results as Markdown."""

from __future__ import annotations

import math
from typing import Any

GOALS = {"cnn": 0.9, "transformer": 0.6}
"""Share of the multiply-adds within reach of a gate, in scope ``all``; other kinds have none."""
WORDS = {
    "exact": "exact",
    "none": "no gates",
    "wrong": "**wrong**",
    "crash": "**crash**",
    "skipped": "skipped",
}


def one_line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    parts = [row["name"], row["status"]]
    if "gates" in row:
        parts.append(f"{row['gates']} gates, {row['macs_frac']:.1%} of MACs")
    if "output_error" in row:
        parts.append(f"errors {_error(row['output_error'])} {_error(row['gradient_error'])}")
    if row["reason"]:
        parts.append(row["reason"])
    return ", ".join(parts)


def markdown(content: dict[str, Any]) -> str:
    """Summary, what misses its goal and why, and one row per network."""
    rows = content["cases"]
    by = {status: [r for r in rows if r["status"] == status] for status in WORDS}
    n_run = len(rows) - len(by["skipped"])
    limits = content["limits"]
    lines = ["# The zoo: what is traced, what is within reach, and whether the cut is exact", ""]
    if not content["complete"]:
        lines += ["**INCOMPLETE: the run did not come to its end.**", ""]
    lines += [
        f"{n_run} networks, scope `{content['scope']}`: {n_run - len(by['crash'])} traced, "
        f"{len(by['exact'])} exact, {len(by['none'])} without a gate, {len(by['wrong'])} wrong, "
        f"{len(by['crash'])} crashed; {len(by['skipped'])} skipped.",
        "",
        *_goals(content),
        "",
        f"Exact: over {content['masks']} random masks, which drop up to three quarters of "
        "every gate at once, the shrunk network's outputs (float32) differ from the zeroed one's "
        f"by at most {limits['output']:g} of the largest, and the gradients of its inputs "
        f"(float64; of one surviving parameter where the inputs are tokens) by at most "
        f"{limits['gradient']:g}. The networks are traced as built; for the comparison constant "
        "and nearly zero parameters and batch-norm statistics are random, which an initial "
        "LayerScale or a zero-initialised norm would otherwise hide.",
        "",
        "MACs and parameters: the share that a gate can make smaller. As graph: the share of MACs "
        "with `as_graph=True`, for networks below their goal, verified like the rest. Left out: "
        "parameter tensors in no gate, of all.",
        "",
        f"`{' '.join(content['command'])}` took {content['wall_s'] / 60:.0f} minutes on "
        f"{content['machine']['processor']}, {content['machine']['threads']} thread(s); "
        + ", ".join(f"{name} {v}" for name, v in content["versions"].items() if v)
        + f"; commit {(content['commit'] or 'unknown')[:18]}.",
    ]
    lines += _failures(by)
    lines += _misses(content)
    lines += ["", "## All networks", ""]
    header = ["network", "kind", "trace s", "nodes", "gates", "groups", "MACs", "as graph",
              "parameters", "left out", "output error", "gradient error", "result"]  # fmt: skip
    lines += _table(header, [_cells(row) for row in rows], left=2)
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [f"`{row['name']}`", row["kind"]]
    cells.append(f"{row['trace_s']:.1f}" if "trace_s" in row else "")
    cells += [str(row.get(key, "")) for key in ("nodes", "gates", "groups")]
    shares = ("macs_frac", "graph_macs_frac", "params_frac")
    cells += [f"{row[key]:.1%}" if key in row else "" for key in shares]
    cells.append(f"{row['n_unprunable']}/{row['n_parameters']}" if "gates" in row else "")
    cells += [_error(row.get(key)) for key in ("output_error", "gradient_error")]
    return [*cells, WORDS[row["status"]]]


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if math.isfinite(value) else "inf"


def _goals(content: dict[str, Any]) -> list[str]:
    if content["scope"] != "all":
        return ["The goals of coverage are for scope `all`."]
    lines = []
    for kind, goal in GOALS.items():
        traced = [r for r in content["cases"] if r["kind"] == kind and r["status"] != "skipped"]
        missed = [r for r in traced if r.get("macs_frac", 0.0) < goal]
        names = ", ".join(f"`{r['name']}` {_percent(r)}" for r in missed)
        text = (
            f"- {kind}: {len(traced) - len(missed)} of {len(traced)} have at least {goal:.0%} of "
            "their MACs within reach" + (f"; not {names}." if missed else ".")
        )
        if missed:
            more = sum(r.get("graph_macs_frac", 0.0) >= goal for r in missed)
            text += f" With `as_graph=True` {len(traced) - len(missed) + more} of {len(traced)}."
        lines.append(text)
    return lines


def _percent(row: dict[str, Any]) -> str:
    return f"{row['macs_frac']:.0%}" if "macs_frac" in row else "(crash)"


def _failures(by: dict[str, list[dict[str, Any]]]) -> list[str]:
    found = [*by["crash"], *by["wrong"], *by["skipped"]]
    if not found:
        return []
    lines = ["", "## Crashed, wrong, skipped", ""]
    return lines + _table(
        ["network", "result", "output error", "in float64", "gradient error", "reason"],
        [[f"`{r['name']}`", WORDS[r["status"]], _error(r.get("output_error")),
          _error(r.get("output_error_float64")), _error(r.get("gradient_error")),
          _escape(r["reason"])] for r in found],
        left=2,
    )  # fmt: skip


def _misses(content: dict[str, Any]) -> list[str]:
    """Networks below their goal, with the reason that keeps most parameters out."""
    if content["scope"] != "all":
        return []
    found = [
        r for r in content["cases"]
        if "macs_frac" in r and r["macs_frac"] < GOALS.get(r["kind"], 0.0) and r["reasons"]
    ]  # fmt: skip
    if not found:
        return []
    lines = ["", "## Below the goal", "", "The reason that leaves out most parameters:", ""]
    rows = []
    for row in found:
        reason, n, tensor = row["reasons"][0]
        graph = f"{row['graph_macs_frac']:.1%}" if "graph_macs_frac" in row else ""
        rows.append([f"`{row['name']}`", _escape(reason), f"`{tensor}`",
                     f"{row['macs_frac']:.1%}", graph, f"{n / row['params']:.1%}"])  # fmt: skip
    header = ["network", "reason", "first", "MACs", "as graph", "of parameters"]
    return lines + _table(header, rows, left=3)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _table(header: list[str], rows: list[list[str]], left: int) -> list[str]:
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
