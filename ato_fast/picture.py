"""A picture of a layout: its gates in forward order, how they are coupled, and what stays whole.

Drawn with matplotlib alone. Coordinates are inches from the upper left corner. Nodes stand one
below the other in forward order, in lanes by their kind; long networks are broken into columns.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path

from .report import percent, shortened

FORMATS = ("svg", "png")
RESIDUAL, GATE, HELD = 0, 1, 2
KINDS = ("gate coupled by residual adds", "gate", "layers that keep their channels")
# Border and arrows, bar, box; by kind.
COLOURS = (("#b4521f", "#f0bd9c", "#fdf3ec"), ("#2f6db5", "#a9c8ea", "#eff5fc"),
           ("#8a94a3", "#d0d6de", "#f4f5f7"))  # fmt: skip

# Inches.
PITCH, BOX_HEIGHT, LANE_GAP, MARGIN, HEAD = 0.29, 0.21, 0.6, 0.8, 1.05
LEAST_WIDTH, LETTER, NOTE = 6.5, 0.057, 1.15

LONGEST_NAME = 48
"""Letters; longer names are shortened in the middle."""

ONE_COLUMN = 45
"""Nodes up to which there is one column."""

ASPECT = 2
DPI, MOST_PIXELS = 140, 12_000

CROWDED = 150
"""Arrows above which they are drawn fainter."""


@dataclass
class Node:
    """One box: a gate, or a run of layers that stay whole and read the same gates."""

    kind: int
    name: str
    note: str
    macs_frac: float
    place: int
    reads: tuple[str, ...] = ()
    column: int = 0
    x: float = 0.0
    y: float = 0.0
    half: float = 0.0


def draw(facts: dict[str, Any], title: str, kind: str) -> bytes:
    """The picture as the content of a file; equal input gives equal bytes.

    An arrow leads from a gate to the gates and layers that its readers produce; the bar in a box is
    its share of the MACs, on a common scale.

    Args:
        facts: from `describe`.
        title: what the network is called.
        kind: one of `FORMATS`.

    Raises:
        ValueError: another kind.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind: expected one of {FORMATS}, got {kind!r}")
    nodes = nodes_of(facts)
    edges = edges_of(facts, nodes)
    width, height = place(nodes, edges)
    file = io.BytesIO()
    # No date and no random ids.
    with matplotlib.rc_context({"svg.hashsalt": "ato_fast", "font.family": "DejaVu Sans"}):
        dpi = min(DPI, MOST_PIXELS / max(width, height))
        figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        _head(axes, facts, title, {node.kind for node in nodes})
        alpha = 0.75 if len(edges) <= CROWDED else 0.35
        for source, target in edges:
            both = (target, source) in edges
            if not both or source < target:
                _arrow(axes, nodes, source, target, "<|-|>" if both else "-|>", alpha)
        largest = max((node.macs_frac for node in nodes), default=0.0)
        for node in nodes:
            _box(axes, node, largest)
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


def nodes_of(facts: dict[str, Any]) -> list[Node]:
    """Gates and layers that stay whole, in forward order."""
    found = []
    for gate in facts["gates"]:
        kind = RESIDUAL if gate["residual"] else GATE
        note = f"{gate['n']} ch"
        found.append(Node(kind, gate["name"], note, gate["macs_frac"], gate["place"]))
    for layer in facts["held"]:
        share, reads = layer["macs_frac"], tuple(layer["reads"])
        found.append(Node(HELD, layer["module"], "", share, layer["place"], reads))
    nodes: list[Node] = []
    merged = 1
    for node in sorted(found, key=lambda node: (node.place, node.kind)):
        last = nodes[-1] if nodes else None
        if last is not None and node.kind == last.kind == HELD and node.reads == last.reads:
            merged += 1
            last.macs_frac += node.macs_frac
            last.note = f"{merged} layers"
        else:
            merged = 1
            nodes.append(node)
    return nodes


def edges_of(facts: dict[str, Any], nodes: list[Node]) -> dict[tuple[int, int], None]:
    """(from, to) as indices into ``nodes``, in a fixed order."""
    index = {node.name: i for i, node in enumerate(nodes) if node.kind != HELD}
    edges = [(index[gate["name"]], index[fed]) for gate in facts["gates"] for fed in gate["feeds"]]
    for i, node in enumerate(nodes):
        edges += [(index[name], i) for name in node.reads]
    return dict.fromkeys(edges)


def place(nodes: list[Node], edges: dict[tuple[int, int], None]) -> tuple[float, float]:
    """Set the nodes' columns and coordinates; returns width and height of the picture."""
    lanes = {kind: i for i, kind in enumerate(sorted({node.kind for node in nodes}))}
    letters = min(LONGEST_NAME, max((len(node.name) for node in nodes), default=0))
    box = NOTE + LETTER * letters
    lane = box + LANE_GAP
    column = MARGIN + lane * max(1, len(lanes))
    starts = _columns(len(nodes), edges, column)
    ends = [*starts[1:], len(nodes)]
    for c, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for row, node in enumerate(nodes[start:end]):
            node.column, node.half = c, box / 2
            node.x = c * column + MARGIN + lanes[node.kind] * lane + box / 2
            node.y = HEAD + (row + 0.5) * PITCH
    rows = max(end - start for start, end in zip(starts, ends, strict=True))
    return max(LEAST_WIDTH, len(starts) * column), HEAD + rows * PITCH + 0.2


def _columns(n: int, edges: dict[tuple[int, int], None], width: float) -> list[int]:
    """First node of each column: about equal columns, broken where few arrows cross."""
    if n <= ONE_COLUMN:
        return [0]
    n_columns = max(1, round((ASPECT * n * PITCH / width) ** 0.5))
    rows = n / n_columns
    crossing = [0] * (n + 1)
    for pair in edges:
        for i in range(min(pair) + 1, max(pair) + 1):
            crossing[i] += 1
    starts = [0]
    for c in range(1, n_columns):
        near = range(round((c - 0.2) * rows), min(n - 1, round((c + 0.2) * rows)) + 1)
        starts.append(min(near, key=lambda i: (crossing[i], abs(i - c * rows))))
    return starts


def _head(axes, facts: dict[str, Any], title: str, kinds: set[int]) -> None:
    coverage = facts["coverage"]
    axes.text(0.25, 0.28, title, fontsize=12, fontweight="bold", va="center")
    axes.text(
        0.25,
        0.53,
        f"scope {facts['scope']}: {len(facts['gates'])} gates can remove from "
        f"{percent(coverage['macs_frac'])} of the MACs and {percent(coverage['params_frac'])} "
        "of the parameters",
        fontsize=8.5,
        va="center",
    )
    x = 0.25
    for kind in sorted(kinds):
        name, (border, bar, box) = KINDS[kind], COLOURS[kind]
        axes.add_patch(Rectangle((x, 0.73), 0.24, 0.14, fc=box, ec=border, lw=0.8))
        axes.add_patch(Rectangle((x, 0.73), 0.12, 0.14, fc=bar, lw=0))
        axes.text(x + 0.3, 0.8, name, fontsize=7.5, va="center")
        x += 0.5 + 0.06 * len(name)
    axes.text(x, 0.8, "bar: share of MACs     arrow: is read by", fontsize=7.5, va="center")


def _box(axes, node: Node, largest: float) -> None:
    border, bar, box = COLOURS[node.kind]
    left, top = node.x - node.half, node.y - BOX_HEIGHT / 2
    shape = {"boxstyle": "round,pad=0,rounding_size=0.04", "zorder": 3}
    outline = FancyBboxPatch(
        (left, top), 2 * node.half, BOX_HEIGHT, fc=box, ec=border, lw=0.8, **shape
    )
    axes.add_patch(outline)
    if largest:
        share = 2 * node.half * node.macs_frac / largest
        filled = Rectangle((left, top), share, BOX_HEIGHT, fc=bar, lw=0, zorder=4)
        axes.add_patch(filled)
        filled.set_clip_path(outline)
    colour = "#6b7480" if node.kind == HELD else "#1c2733"
    text = {"fontsize": 7, "va": "center", "zorder": 5, "color": colour}
    notes = [node.note] if node.note else []
    right = " · ".join([*notes, percent(node.macs_frac)])
    axes.text(left + 0.07, node.y, shortened(node.name, LONGEST_NAME), **text)
    axes.text(left + 2 * node.half - 0.07, node.y, right, ha="right", **text)


def _arrow(axes, nodes: list[Node], source: int, target: int, style: str, alpha: float) -> None:
    """Straight down to the next node of a lane, else from side to side."""
    a, b = nodes[source], nodes[target]
    middle = (nodes[i] for i in range(source + 1, target))
    if a.x == b.x and a.y < b.y and all(node.x != a.x for node in middle):
        path = Path([(a.x, a.y + BOX_HEIGHT / 2), (b.x, b.y - BOX_HEIGHT / 2)])
    else:
        # To the same lane, an arc on the left; it grows with the distance as far as there is room.
        out = -1 if b.x <= a.x else 1
        back = -out if b.x != a.x else out
        reach = 0.75 * LANE_GAP
        if a.x == b.x:
            reach *= min(1.5, 0.6 + abs(b.y - a.y) / 6)
        elif a.column != b.column:
            reach = abs(b.x - a.x) / 3
        start, end = (a.x + out * a.half, a.y), (b.x + back * b.half, b.y)
        curve = [start, (start[0] + out * reach, a.y), (end[0] + back * reach, b.y), end]
        path = Path(curve, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    axes.add_patch(
        FancyArrowPatch(
            path=path,
            arrowstyle=style,
            mutation_scale=6,
            lw=0.8,
            color=COLOURS[HELD if b.kind == HELD else a.kind][0],
            alpha=alpha if a.column == b.column else 0.35,
            zorder=2,
        )
    )
