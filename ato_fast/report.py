"""Readable tables of a layout."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .groups import Gate, GroupLayout


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Plain text columns; the first ``left`` are left-aligned, the rest right-aligned."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def modules_of(gate: Gate, *roles: str) -> list[str]:
    """Dotted names of the modules whose tensors have one of the roles in a gate."""
    names = (s.tensor.rpartition(".")[0] or s.tensor for s in gate.slices if s.role in roles)
    return list(dict.fromkeys(names))


def _short(names: list[str], most: int = 2) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" +{rest}" if rest > 0 else "")


def gate_macs_share(layout: GroupLayout) -> list[float]:
    """Share of the model's MACs in operations that touch each gate, in [0, 1]."""
    total = max(layout.macs(), 1)
    cost = [term.coef * int(np.prod([layout.shapes[t][d] for t, d in term.dims], dtype=np.int64))
            for term in layout.mac_terms]  # fmt: skip
    shares = []
    for gate in layout.gates:
        keys = {(s.tensor, s.dim) for s in gate.slices}
        touched = sum(
            c for c, term in zip(cost, layout.mac_terms, strict=True) if keys & set(term.dims)
        )
        shares.append(touched / total)
    return shares


def coverage(layout: GroupLayout) -> tuple[float, float]:
    """Share of MACs and of parameters that a gate can make smaller, both in [0, 1]."""
    fixed_macs = total_macs = 0
    for term in layout.mac_terms:
        macs = term.coef * int(np.prod([layout.shapes[t][d] for t, d in term.dims], dtype=np.int64))
        total_macs += macs
        if not any(key in layout.slices_of for key in term.dims):
            fixed_macs += macs
    fixed = total = 0
    for name in layout.parameters:
        shape = layout.shapes[name]
        size = int(np.prod(shape, dtype=np.int64))
        total += size
        if not any((name, dim) in layout.slices_of for dim in range(len(shape))):
            fixed += size
    return 1 - fixed_macs / max(total_macs, 1), 1 - fixed / max(total, 1)


def layout_table(layout: GroupLayout) -> str:
    """What ``print(layout)`` shows: gates, coverage, and what is left out with the reasons."""
    rows = [
        [gate.name, str(gate.n), _short(modules_of(gate, "row")), _short(modules_of(gate, "input")),
         f"{share:.1%}"]
        for gate, share in zip(layout.gates, gate_macs_share(layout), strict=True)
    ]  # fmt: skip
    header = ["gate", "channels", "produced by", "read by", "MACs"]
    lines = [
        f"{layout.model_name}, scope {layout.scope!r}: {len(layout.gates)} gates, "
        f"{layout.n_groups} groups, {layout.macs():,} MACs, {layout.params():,} parameters",
        "",
    ]
    if rows:
        aligned = [[r[0], r[2], r[3], r[1], r[4]] for r in rows]
        head = [header[0], header[2], header[3], header[1], header[4]]
        lines += [table(head, aligned, left=3), ""]
    macs, params = coverage(layout)
    lines.append("MACs: share of the model's in the layers a gate makes smaller; a layer between")
    lines.append("two gates counts for both")
    lines.append(f"within reach of a gate: {macs:.1%} of MACs, {params:.1%} of parameters")
    if layout.unprunable:
        lines += ["", f"not prunable: {len(layout.unprunable)} parameter tensors"]
        reasons = Counter(entry.reason for entry in layout.unprunable)
        for reason, count in reasons.most_common():
            names = [entry.tensor for entry in layout.unprunable if entry.reason == reason]
            lines.append(f"  {reason}: {_short(names, 3)} ({count})")
    return "\n".join(lines)
