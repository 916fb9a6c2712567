"""The picture of a run: widths before, after and over time, training curves, MACs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BEFORE, AFTER, DENSE, ATO, GRID = "#d5dbe3", "#2f6db5", "#8a94a3", "#d1622b", "#e8ebef"
PHASE_COLOURS = {
    "warmup": "#f4f5f7",
    "search": "#e3edf8",
    "project": "#d3e4f5",
    "zeroing": "#f8e3d6",
    "finetune": "#eaf5e6",
}
MOST_NAMES = 40
"""Gates up to which every bar is named."""


def draw(path: Path, result: dict[str, Any], widths: list[dict], curves: dict[str, list]) -> None:
    """Write a PNG.

    Args:
        path: of the file.
        result: what the run ended with: ``dense``, ``small`` and ``budget`` are read.
        widths: per gate ``gate`` (name), ``before``, ``after`` (channels).
        curves: ``dense`` (may be empty) and ``ato``: one record per epoch, as `loop` makes them.
    """
    figure = Figure(figsize=(11, 11), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    top, left, right, bottom = figure.subplot_mosaic(
        [["widths", "widths"], ["accuracy", "macs"], ["kept", "kept"]]
    ).values()
    _widths(top, widths)
    _accuracy(left, result, curves)
    _macs(right, result, curves["ato"])
    _kept(bottom, widths, curves["ato"])
    for axes in (top, left, right, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.title.set_fontweight("bold")
    figure.suptitle(_headline(result), fontsize=14, fontweight="bold", x=0.012, ha="left")
    figure.savefig(path, format="png", metadata={"Software": None})


def _headline(result: dict[str, Any]) -> str:
    small, dense = result["small"], result["dense"]
    text = (
        f"{result['model']} on {result['data']}: {small['macs'] / dense['macs']:.1%} of the MACs, "
        f"{small['params'] / dense['params']:.1%} of the parameters, "
        f"accuracy {small['accuracy']:.2%}"
    )
    return text if dense["accuracy"] is None else f"{text} (dense {dense['accuracy']:.2%})"


def _widths(axes, widths: list[dict]) -> None:
    places = range(len(widths))
    before = [row["before"] for row in widths]
    after = [row["after"] for row in widths]
    axes.bar(places, before, width=0.8, color=BEFORE, label="dense")
    axes.bar(places, after, width=0.8, color=AFTER, label="small")
    axes.set_title("Channels per gate", loc="left")
    axes.set_xlim(-0.6, len(widths) - 0.4)
    axes.set_ylim(0, max(before) * 1.1)
    axes.grid(axis="y", color=GRID)
    axes.legend(frameon=False, ncols=2, loc="upper left")
    if len(widths) > MOST_NAMES:
        axes.set_xlabel("gate, in forward order")
        return
    names = [row["gate"] for row in widths]
    long = max(map(len, names)) * len(names) > 90
    axes.set_xticks(
        places, names, rotation=35 if long else 0, ha="right" if long else "center", fontsize=8
    )
    if len(widths) <= 24:
        for place, row in enumerate(widths):
            label = f"{row['after']}/{row['before']}"
            axes.annotate(
                label,
                (place, row["before"]),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )


def _phases(axes, records: list[dict]) -> None:
    """Shade the phases behind a plot over epochs and name those that are wide enough."""
    start = 0
    for i, record in enumerate(records):
        last = i + 1 == len(records)
        if last or records[i + 1]["phase"] != record["phase"]:
            axes.axvspan(start, i + 1, color=PHASE_COLOURS[record["phase"]], lw=0, zorder=0)
            if i + 1 - start >= 0.07 * len(records):
                axes.annotate(
                    record["phase"],
                    ((start + i + 1) / 2, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, -4),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=8,
                    color="#555555",
                )
            start = i + 1
    axes.set_xlim(0, max(1, len(records)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")


def _accuracy(axes, result: dict[str, Any], curves: dict[str, list]) -> None:
    _phases(axes, curves["ato"])
    for name, colour, label in (
        ("dense", DENSE, "dense twin"),
        ("ato", ATO, "ATO, network in training"),
    ):
        records = curves[name]
        if records:
            epochs = [r["epoch"] for r in records]
            axes.plot(epochs, [r["accuracy"] for r in records], color=colour, lw=1.8, label=label)
    small = result["small"]["accuracy"]
    end = len(curves["ato"])
    axes.plot([end], [small], "o", color=AFTER, ms=8, clip_on=False, label="small network, final")
    settled = [r["accuracy"] for records in curves.values() for r in records[len(records) // 5 :]]
    lowest = min([*settled, small], default=0.0)
    margin = max(0.002, 0.06 * (1 - lowest))
    axes.set_ylim(max(0.0, lowest - margin), 1 + 2.5 * margin)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Test accuracy", loc="left")
    axes.grid(axis="y", color=GRID)
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def _macs(axes, result: dict[str, Any], records: list[dict]) -> None:
    _phases(axes, records)
    epochs = [0, *(r["epoch"] for r in records)]
    # A record holds the mask at the end of its epoch.
    kept = [1.0, *(r["macs_frac"] for r in records)]
    axes.step(epochs, kept, where="pre", color=ATO, lw=1.8, label="kept by the mask")
    trained = [1.0, *(r["network_macs_frac"] for r in records)]
    axes.step(epochs, trained, where="pre", color=AFTER, lw=1.8, label="network in training")
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    budget = result["budget"]
    if budget["kind"] == "macs":
        target = budget["target"] / result["dense"]["macs"]
        axes.axhline(target, color="#333333", lw=1, ls="--")
        axes.annotate(
            f"budget {target:.0%}",
            (len(records), target),
            xytext=(-6, -5),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
        )
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("MACs", loc="left")
    axes.grid(axis="y", color=GRID)


def _kept(axes, widths: list[dict], records: list[dict]) -> None:
    """Heat map: gates from top to bottom, epochs from left to right, share of channels kept."""
    before = [row["before"] for row in widths]
    shares = [[n / of for n, of in zip(r["kept"], before, strict=True)] for r in records]
    image = axes.imshow(
        list(zip(*shares, strict=True)),
        aspect="auto",
        interpolation="nearest",
        cmap="Blues",
        vmin=0,
        vmax=1,
        extent=(0, len(records), len(widths) - 0.5, -0.5),
    )
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, format=PercentFormatter(1))
    bar.outline.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_title("Channels kept by the mask", loc="left")
    if len(widths) <= MOST_NAMES:
        axes.set_yticks(range(len(widths)), [row["gate"] for row in widths], fontsize=7)
    else:
        axes.set_ylabel("gate, in forward order")
