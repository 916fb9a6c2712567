"""The accuracy benchmark: its summary, and one real run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.accuracy import summarise

ROOT = Path(__file__).parent.parent


def figures(small, dense):
    network = {"macs": 100, "params": 10, "wall_s": 2.0}
    return {
        "small": {**network, "macs": 50, "accuracy": small},
        "dense": {**network, "accuracy": dense},
    }


def test_mean_and_spread_per_figure():
    summary = summarise([figures(0.5, 0.75), figures(0.75, 0.5)])
    assert summary["small_accuracy"] == {"mean": 0.625, "min": 0.5, "max": 0.75}
    assert summary["difference"] == {"mean": 0.0, "min": -0.25, "max": 0.25}
    assert summary["macs_frac"]["mean"] == 0.5


def test_without_dense_twin_there_is_no_difference():
    assert "difference" not in summarise([figures(0.5, None)])


@pytest.mark.slow
def test_it_runs_and_records_where(tmp_path):
    options = "--data digits --model resnet20 --macs 0.5 --epochs 3 --batch-size 256".split()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accuracy", *options, "--controller-steps", "4",
         "--no-dense", "--seeds", "0", "--json", str(tmp_path / "a.json")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["seeds"] == [0] and len(content["runs"]) == 1
    assert content["machine"]["processor"] and content["versions"]["torch"]
    assert "commit" in content and "--macs" in content["command"]
    assert f"{content['summary']['small_accuracy']['mean']:.2%}" in done.stdout
