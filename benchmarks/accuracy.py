"""Accuracy of the dense and the small network over several seeds.

``python -m benchmarks.accuracy --data digits --model resnet20 --macs 0.5 --seeds 0 1 2 --json F``
runs ``ato-fast train`` once per seed and reports mean and spread (smallest to largest).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OWN = ("versions", "machine", "commit")


def run_seed(arguments: list[str], seed: int, output: Path) -> dict[str, Any]:
    """The figures of one run of ``ato-fast train``.

    Raises:
        SystemExit: the run failed; its exit code is passed on.
    """
    command = [sys.executable, "-m", "ato_fast.train.cli", "train", *arguments]
    command += ["--seed", str(seed), "--output", str(output)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads((output / "result.json").read_text())


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, smallest and largest of every figure over the runs.

    ``difference`` is small minus dense accuracy, per seed, and absent without a dense twin.
    """
    figures = {
        "small_accuracy": [r["small"]["accuracy"] for r in runs],
        "macs_frac": [r["small"]["macs"] / r["dense"]["macs"] for r in runs],
        "params_frac": [r["small"]["params"] / r["dense"]["params"] for r in runs],
        "small_wall_s": [r["small"]["wall_s"] for r in runs],
    }
    if all(r["dense"]["accuracy"] is not None for r in runs):
        dense = [r["dense"]["accuracy"] for r in runs]
        figures["dense_accuracy"] = dense
        figures["difference"] = [
            small - d for small, d in zip(figures["small_accuracy"], dense, strict=True)
        ]
        figures["dense_wall_s"] = [r["dense"]["wall_s"] for r in runs]
    return {
        name: {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; unknown options go to ``ato-fast train`` as they are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE")
    own, rest = parser.parse_known_args(argv)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in own.seeds:
            print(f"seed {seed}", file=sys.stderr, flush=True)
            runs.append(run_seed(rest, seed, Path(folder) / str(seed)))
    summary = summarise(runs)
    content = {
        "command": ["python", "-m", "benchmarks.accuracy", *rest, "--seeds", *map(str, own.seeds)],
        "seeds": own.seeds,
        "summary": summary,
        **{name: runs[0][name] for name in OWN},
        "runs": [
            {k: v for k, v in r.items() if k not in (*OWN, "history", "widths")} for r in runs
        ],
    }
    if own.json:
        own.json.parent.mkdir(parents=True, exist_ok=True)
        own.json.write_text(json.dumps(content, indent=1) + "\n")
    for name, value in summary.items():
        show = "{:.2f} s".format if name.endswith("_s") else "{:.2%}".format
        print(f"{name:<16} {show(value['mean']):>9}  "
              f"({show(value['min'])} to {show(value['max'])})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
