"""What a layout offers and leaves out, as text."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING, Any

from .describe import describe

if TYPE_CHECKING:
    from .groups import GroupLayout

NARROWEST = 60
"""Columns below which text is not squeezed any further."""

LEAST_COLUMN = 16
"""Columns that other modules' names get before a gate's own name is cut."""

MOST_REASONS = 12


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


def percent(share: float) -> str:
    """A share in [0, 1] as ``12.3%``; only nothing is ``0.0%``, and only all is ``100.0%``."""
    rounding = 1e-9
    if rounding < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 - rounding else f"{share:.1%}"


def terminal_width() -> int:
    """Columns to print on: the terminal's (or ``COLUMNS``), 100 where there is none."""
    return max(NARROWEST, shutil.get_terminal_size((100, 24)).columns)


def layout_table(layout: GroupLayout, width: int | None = None) -> str:
    """What ``print(layout)`` shows: gates, coverage, and what is left out with the reasons.

    Args:
        width: columns that no line exceeds (at least `NARROWEST`); default `terminal_width`.
    """
    width = terminal_width() if width is None else max(NARROWEST, width)
    return text_of(describe(layout), layout.model_name, width)


def text_of(facts: dict[str, Any], title: str, width: int) -> str:
    """`describe`'s facts as text of at most ``width`` columns."""
    macs, params = facts["macs"], facts["params"]
    head = (
        f"{title}, scope {facts['scope']!r}: {len(facts['gates'])} gates, "
        f"{facts['n_groups']} groups, {macs:,} MACs, {params:,} parameters"
    )
    lines = textwrap.wrap(head, width)
    if facts["gates"]:
        lines += ["", _gates_table(facts["gates"], width)]
        note = (
            "MACs: share of the model's in the operations a gate makes smaller; one between two "
            "gates counts for both"
        )
        lines += textwrap.wrap(note, width)
    coverage, least = facts["coverage"], facts["floor"]
    channels = facts["min_channels"]
    widths = f"every gate at {channels} channel{'s' * (channels > 1)}"
    if facts["round_to"] > 1:
        widths += f", rounded up to a multiple of {facts['round_to']}"
    reach = (
        f"gates can remove from {percent(coverage['macs_frac'])} of the MACs and "
        f"{percent(coverage['params_frac'])} of the parameters"
    )
    lines += ["", *textwrap.wrap(reach, width)]
    if facts["gates"]:
        floors = (
            f"smallest network: {percent(least['macs'] / max(macs, 1))} of the MACs, "
            f"{percent(least['params'] / max(params, 1))} of the parameters ({widths})"
        )
        lines += textwrap.wrap(floors, width)
    if facts["reasons"]:
        lines += ["", *_reason_lines(facts["reasons"], width)]
    return "\n".join(lines)


def _gates_table(gates: list[dict[str, Any]], width: int) -> str:
    """One line per gate; the names of other modules give way before the gates' own."""
    also = [_also_by(gate) for gate in gates]
    header = ["gate", "also produced by", "read by", "channels", "MACs"]
    for most, relative in ((2, False), (1, False), (2, True), (1, True)):
        rows = [
            [
                gate["name"],
                _listed(others, most, gate["name"] if relative else ""),
                _listed(gate["read_by"], most, gate["name"] if relative else ""),
                str(gate["n"]),
                percent(gate["macs_frac"]),
            ]
            for gate, others in zip(gates, also, strict=True)
        ]
        columns = [max(len(row[i]) for row in [header, *rows]) for i in range(5)]
        if not any(also):
            columns[1] = -2  # left out, with the gap before it
        if sum(columns) + 8 <= width:
            break
    while sum(columns) + 8 > width:
        widest = max((1, 2), key=lambda i: columns[i])
        columns[widest if columns[widest] > LEAST_COLUMN else 0] -= 1
    kept = [i for i in range(5) if columns[i] > 0]
    rows = [[shortened(row[i], columns[i]) for i in kept] for row in [header, *rows]]
    return table(rows[0], rows[1:], left=len(kept) - 2)


def _also_by(gate: dict[str, Any]) -> list[str]:
    """Producers beside the one that the gate is named after."""
    return [name for name in gate["produced_by"] if name != gate["name"].partition("#")[0]]


def _listed(names: list[str], most: int, base: str = "") -> str:
    """The first ``most`` names and how many more; ``base``'s leading parts become an ellipsis."""
    shown = [_relative(name, base) for name in names[:most]]
    rest = len(names) - most
    return ", ".join(shown) + (f" +{rest}" if rest > 0 else "")


def _relative(name: str, base: str) -> str:
    """``a.b.d`` seen from ``a.b.c`` is ``…d``, and ``a.b.1`` seen from ``a.b.0`` is ``…b.1``."""
    parts, others = name.split("."), base.split(".")
    same = 0
    while same < min(len(parts), len(others)) - 1 and parts[same] == others[same]:
        same += 1
    if all(part.isdigit() for part in parts[same:]):
        same -= 1
    return "…" + ".".join(parts[same:]) if same > 0 else name


def shortened(text: str, width: int) -> str:
    """``text`` with its middle left out; the end tells names apart, so more of it stays."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    tail = text[len(text) - (width - 1 - head) :]
    return text[:head].rstrip(".") + "…" + tail.lstrip(".")


def _reason_lines(reasons: list[dict[str, Any]], width: int) -> list[str]:
    """A table whose last column, the reason and examples, is wrapped."""
    lines = ["  MACs   fixed   params   fixed  kept whole because"]
    lines.append("------  ------  -------  ------  " + "-" * min(width - 33, 40))
    for reason in reasons[:MOST_REASONS]:
        keys = ("macs_frac", "fixed_macs_frac", "params_frac", "fixed_params_frac")
        a, b, c, d = (percent(reason[key]) for key in keys)
        examples = f": {_listed(reason['tensors'], 3)}" if reason["tensors"] else ""
        wrapped = textwrap.wrap(reason["reason"] + examples, width - 33)
        lines.append(f"{a:>6}  {b:>6}  {c:>7}  {d:>6}  {wrapped[0]}")
        lines += [" " * 33 + line for line in wrapped[1:]]
    if len(reasons) > MOST_REASONS:
        rest = sum(reason["macs_frac"] for reason in reasons[MOST_REASONS:])
        lines.append(
            f"{percent(rest):>6}" + " " * 27 + f"{len(reasons) - MOST_REASONS} more reasons"
        )
    note = (
        "MACs, params: of the layers whose own channels stay; fixed: of these, what no gate makes "
        "smaller from the input side either"
    )
    return [*lines, *textwrap.wrap(note, width)]
