"""A run killed with SIGKILL at any moment and resumed ends bit-identical to one never killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

RUN = [sys.executable, "-m", "ato_fast.train.cli", "train", "--data", "digits", "--model",
       "resnet20", "--macs", "0.5", "--epochs", "3", "--batch-size", "256",
       "--controller-steps", "8", "--seed", "1", "--resume", "auto", "--output", "out"]  # fmt: skip
PATIENCE_S = 300


def start(folder):
    return subprocess.Popen(RUN, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def kill_once(folder, reached):
    """Run until ``reached(folder)``, then SIGKILL; returns what had been written to stderr."""
    process = start(folder)
    until = time.monotonic() + PATIENCE_S
    while not reached(folder / "out"):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL
    return said.decode()


def finish(folder):
    process = start(folder)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said.decode()
    return said.decode()


def outcome(folder):
    """Everything a run leaves, without timings and what depends on them."""
    figures = json.loads((folder / "out" / "result.json").read_text())
    for records in figures["history"].values():
        for record in records:
            del record["seconds"]
    kept = {k: figures[k] for k in ("history", "mask_sha256", "widths", "equality_rel_err")}
    kept["accuracy"] = [figures[name]["accuracy"] for name in ("dense", "small")]
    weights = (folder / "out" / "model.safetensors").read_bytes()
    return kept, weights, (folder / "out" / "recipe.json").read_bytes()


def checkpoint(number):
    """Whether checkpoint ``number`` is there: 1 to 3 are the dense twin's, 4 to 6 the ATO run's."""
    name = f"checkpoint-{number:08d}.safetensors"
    return lambda out: (out / "checkpoints" / name).exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder)
    return outcome(folder)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, undisturbed):
    said = kill_once(tmp_path, checkpoint(1))
    assert "epoch   3/3" not in said
    # In the ATO run, while the controller is searching.
    kill_once(tmp_path, checkpoint(4))
    # Between the last epoch and the end: while the outcome is being written.
    kill_once(tmp_path, lambda out: list(out.glob(".partial-*")))
    assert "epoch" not in finish(tmp_path)
    assert outcome(tmp_path) == undisturbed
    names = {"model.safetensors", "recipe.json", "mask.safetensors", "report.png", "result.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names


@pytest.mark.slow
def test_a_tampered_checkpoint_costs_one_epoch_and_nothing_else(tmp_path, undisturbed):
    """Torn files and every other changed byte: test_checkpoint.py."""
    kill_once(tmp_path, checkpoint(5))
    newest = sorted((tmp_path / "out" / "checkpoints").glob("checkpoint-*.safetensors"))[-1]
    raw = bytearray(newest.read_bytes())
    raw[-10] ^= 1
    newest.write_bytes(raw)
    said = finish(tmp_path)
    assert f"warning: out/checkpoints/{newest.name}" in said
    assert "using the one before it" in said
    assert outcome(tmp_path) == undisturbed
