"""The closing table of a run as plain text."""

from __future__ import annotations

from typing import Any

from ..report import table


def closing_table(result: dict[str, Any]) -> str:
    """Dense and small network side by side, then how they were made."""
    dense, small = result["dense"], result["small"]
    shape = "x".join(str(n) for n in result["latency_input"])
    rows = [
        ["accuracy", _percent(dense["accuracy"]), _percent(small["accuracy"]), _points(result)],
        _row("MACs", dense["macs"], small["macs"], _count),
        _row("parameters", dense["params"], small["params"], _count),
        _row("size on disk", dense["bytes"], small["bytes"], _bytes),
        [
            f"latency, batch {shape}",
            _range(dense),
            _range(small),
            f"{small['latency_ms'] / dense['latency_ms']:.1%}",
        ],
        ["training time", _seconds(dense["wall_s"]), _seconds(small["wall_s"]), _times(result)],
    ]
    overhead = result["overhead_frac"]
    budget = result["budget"]
    lines = [
        f"{result['model']} on {result['data']}, {result['epochs']} epochs, seed {result['seed']}",
        "",
        table(["", "dense", "small", "small/dense"], rows),
        "",
        f"{_budget(budget)}; "
        f"of the training time {overhead['controller']:.1%} was the controller's, "
        f"{overhead['projection']:.1%} the projection's, {overhead['cutting']:.1%} the cuts' "
        f"({len(result['cuts'])})",
        f"small network = masked network to {result['equality_rel_err']:.1e} of its largest "
        "output; reloaded from disk it scores the same",
        "latency: median (20th to 80th percentile), interleaved, "
        f"{result['machine']['threads']} threads on {result['machine']['device']}",
    ]
    return "\n".join(lines)


def _budget(budget: dict[str, Any]) -> str:
    target, reached = budget["target"], budget["achieved"]
    if budget["measured"] is not None:
        return f"budget: latency <= {target:.3g} ms, measured {reached:.3g} ms at the freeze"
    return f"budget: {budget['kind']} <= {target:,}, reached {reached:,}"


def _row(name: str, dense: int, small: int, show) -> list[str]:
    return [name, show(dense), show(small), f"{small / dense:.1%}"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _points(result: dict[str, Any]) -> str:
    dense, small = result["dense"]["accuracy"], result["small"]["accuracy"]
    return "" if dense is None else f"{100 * (small - dense):+.2f} points"


def _count(n: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3f} {unit}"
    return str(n)


def _bytes(n: int) -> str:
    return f"{n / 2**20:.2f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"


def _range(network: dict[str, Any]) -> str:
    low, high = network["latency_p20_ms"], network["latency_p80_ms"]
    return f"{network['latency_ms']:.2f} ({low:.2f} to {high:.2f}) ms"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _times(result: dict[str, Any]) -> str:
    dense = result["dense"]["wall_s"]
    return "" if dense is None else f"{result['small']['wall_s'] / dense:.1%}"
