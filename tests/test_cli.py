"""The command line as a user meets it: a whole run, inspection, and every kind of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ato_fast as ato
from ato_fast.train import data, models
from ato_fast.train.cli import main

QUICK = ["--epochs", "3", "--batch-size", "256", "--controller-steps", "8"]
RUN = ["train", "--data", "digits", "--model", "resnet20", "--macs", "0.5", *QUICK]


def command(*arguments, cwd, **environment):
    """``ato-fast`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ato_fast.train.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: (process, folder, content of --json FILE)."""
    folder = tmp_path_factory.mktemp("run")
    done = command(*RUN, "--output", "out", "--json", "figures/a.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, folder / "out", json.loads((folder / "figures" / "a.json").read_text())


def test_the_closing_table_says_what_json_says(finished):
    done, _, figures = finished
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    for name in ("dense", "small"):
        assert f"{figures[name]['accuracy']:.2%}" in lines["accuracy"]
        assert f"{figures[name]['macs'] / 1e6:.3f} M" in lines["MACs"]
        assert f"{figures[name]['params'] / 1e3:.3f} k" in lines["parameters"]
        assert f"{figures[name]['latency_ms']:.2f}" in lines["latency, batch 64x1x16x16"]
        assert f"{figures[name]['wall_s']:.1f} s" in lines["training time"]
    assert "size on disk" in lines


def test_progress_is_one_line_per_epoch_where_there_is_no_terminal(finished):
    lines = [x for x in finished[0].stderr.splitlines() if " epoch " in x]
    assert [x.split()[0] for x in lines] == ["dense"] * 3 + ["ato"] * 3
    assert all("loss" in x and "test" in x for x in lines)
    assert all("MACs" in x for x in lines[3:])


def test_json_holds_the_promised_keys(finished):
    _, folder, figures = finished
    assert figures == json.loads((folder / "result.json").read_text())
    for name in ("dense", "small"):
        assert {"accuracy", "macs", "params", "latency_ms", "bytes"} <= set(figures[name])
        assert 0 <= figures[name]["accuracy"] <= 1
        low, mid, high = (figures[name][f"latency_{x}ms"] for x in ("p20_", "", "p80_"))
        assert 0 < low <= mid <= high
    promised = {"budget", "mask_sha256", "equality_rel_err", "wall_s", "seed", "versions"}
    assert promised <= set(figures)
    assert set(figures["overhead_frac"]) == {"controller", "projection", "cutting"}
    assert all(0 <= share < 1 for share in figures["overhead_frac"].values())
    assert figures["versions"]["torch"] == torch.__version__.split("+")[0]
    assert figures["equality_rel_err"] <= 1e-5


def test_budget_is_met_and_never_exceeded(finished):
    _, _, figures = finished
    share = figures["small"]["macs"] / figures["dense"]["macs"]
    assert 0.495 <= share <= 0.5
    assert figures["budget"]["achieved"] == figures["small"]["macs"]


def test_the_saved_network_is_the_one_that_was_scored(finished):
    _, folder, figures = finished

    def dense():
        return models.build("resnet20", 10, 1, (16, 16))

    small = ato.load(folder, dense).eval()
    assert sum(p.numel() for p in small.parameters()) == figures["small"]["params"]
    digits = data.load("digits")
    test = digits.batches(digits.test, 450, seed=0, training=False)
    ((x, y),) = list(test)
    with torch.no_grad():
        accuracy = float((small(x).argmax(1) == y).double().mean())
    assert abs(accuracy - figures["small"]["accuracy"]) < 1e-9
    layout = ato.trace(dense(), (x[:2],))
    mask = load_file(folder / "mask.safetensors")["mask"]
    assert layout.macs(mask.bool()) == figures["small"]["macs"]
    widths = [[g["before"], g["after"]] for g in figures["widths"]]
    assert widths == [[g.n, int(mask[g.span].sum())] for g in layout.gates]


def test_nothing_else_is_left(finished):
    _, folder, _ = finished
    names = {"model.safetensors", "recipe.json", "mask.safetensors", "report.png", "result.json"}
    assert {p.name for p in folder.iterdir()} == names
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_finished_run_is_not_trained_again(finished, capsys):
    _, folder, figures = finished
    assert main([*RUN, "--output", str(folder), "--resume", "auto"]) == 0
    shown = capsys.readouterr()
    assert "already finished" in shown.err and "epoch" not in shown.err
    assert f"{figures['small']['accuracy']:.2%}" in shown.out


def test_other_options_do_not_continue_a_run(finished, capsys):
    folder = finished[1]
    before = (folder / "result.json").read_bytes()
    assert main([*RUN, "--lr", "0.01", "--output", str(folder), "--resume", "auto"]) == 2
    assert "was made with recipe" in capsys.readouterr().err
    assert (folder / "result.json").read_bytes() == before


def test_a_finished_run_is_not_overwritten_unasked(finished, capsys):
    folder = finished[1]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert main([*RUN, "--output", str(folder)]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_an_unfinished_run_is_not_overwritten_unasked(tmp_path, capsys):
    from ato_fast.train.checkpoint import Checkpoints

    Checkpoints(tmp_path / "checkpoints").save({"epoch": 1})
    assert main([*RUN, "--output", str(tmp_path)]) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert len(Checkpoints(tmp_path / "checkpoints").paths()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--params", "0.6", "--scope", "all", "--optimizer", "adamw", "--schedule", "fast"],
        ["--macs", "6000000", "--fidelity", "paper", "--label-smoothing", "0.1"],
        ["--macs", "0.6", "--scope", "all", "--round-to", "4"],
    ],
    ids=["params-all-adamw-fast", "absolute-paper", "rounded"],
)
def test_other_options_run(tmp_path, options):
    arguments = ["train", "--data", "digits", "--model", "resnet20", "--no-dense", *QUICK]
    out = tmp_path / "out"
    assert main([*arguments, *options, "--seed", "3", "--output", str(out)]) == 0
    figures = json.loads((out / "result.json").read_text())
    assert figures["dense"]["accuracy"] is None and figures["seed"] == 3
    if "paper" not in options:
        assert figures["budget"]["met"]
    if "--round-to" in options:
        assert all(gate["after"] % 4 == 0 for gate in figures["widths"])


BAD = {
    "unknown-data": (["--data", "digts"], "did you mean digits"),
    "unknown-model": (["--model", "resnet21"], "did you mean resnet20"),
    "missing-data": (["--data", "cifar10", "--data-root", "/nowhere"], "/nowhere/cifar-10"),
    "budget-floor": (["--macs", "0.001"], "out of reach; with 1 channel"),
    "budget-above": (["--macs", "1.5"], "fraction in (0, 1)"),
    "budget-not-below": (["--macs", "999999999"], "nothing to prune"),
    "budget-text": (["--macs", "half"], "expected a fraction"),
    "min-channels": (["--min-channels", "0"], "min_channels: expected an int >= 1, got 0"),
    "round-to": (["--round-to", "0"], "round_to: expected an int >= 1, got 0"),
    "round-to-floor": (["--round-to", "64"], "in multiples of 64 the floor is 10130048"),
    "epochs": (["--epochs", "0"], "epochs: expected at least 1, got 0"),
    "too-short": (["--epochs", "1", "--batch-size", "1280"], "train for longer"),
    "batch": (["--batch-size", "-3"], "batch_size: expected at least 1, got -3"),
    "lr": (["--lr", "nan"], "lr: expected above 0, got nan"),
    "held-out": (["--held-out", "1.5"], "fraction"),
    "seed": (["--seed", "-1"], "--seed"),
    "device": (["--device", "tpu"], "device: expected auto, cpu or cuda"),
    "schedule": (["--schedule", "slow"], "invalid choice"),
    "paper-params": (["--fidelity", "paper", "--params", "0.5"], "not allowed with argument"),
    "json-folder": (["--json", "/"], "is a folder"),
    "output-file": (["--output", "/dev/null/x"], "is not a folder"),
    "option": (["--frobnicate"], "unrecognized arguments"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*RUN, *options])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == ""
    assert message in shown.err and len(shown.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [([], "expected a command"), (["frobnicate"], "invalid choice")],
    ids=["no-command", "command"],
)
def test_bad_commands(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == ""
    assert message in shown.err and len(shown.err.splitlines()) == 1


class Branching(nn.Module):
    """Decides by the values of its input, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x):
        if x.sum() > 1:  # the line the error names
            x = x * 2
        return self.fc(x.flatten(1))


def test_a_model_that_cannot_be_captured_names_its_line(monkeypatch, capsys):
    monkeypatch.setitem(models.CIFAR, "branching", lambda n, c: Branching())
    assert main(["inspect", "branching"]) == 2
    shown = capsys.readouterr()
    line = 1 + next(
        i for i, x in enumerate(Path(__file__).read_text().splitlines()) if "the line the" in x
    )
    assert f"{Path(__file__).name}:{line}" in shown.err and len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "ato"])
def test_nan_in_the_loss_ends_with_exit_code_2_and_leaves_nothing(tmp_path, capsys, dense):
    out = tmp_path / "out"
    options = ["--lr", "1e30", "--output", str(out), "--json", str(tmp_path / "a.json")]
    assert main([*RUN, *options, *([] if dense else ["--no-dense"])]) == 2
    shown = capsys.readouterr()
    assert "the training loss is" in shown.err and "--lr" in shown.err and shown.out == ""
    assert not list(tmp_path.iterdir())


def test_bad_input_in_a_process_shows_no_traceback(tmp_path):
    done = command(*RUN, "--data", "digts", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "ato-fast: error: unknown dataset 'digts'; did you mean digits?\n"
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ato-fast {ato.__version__}\n"


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(RUN) == 2
    assert "pip install 'ato-fast[train]'" in capsys.readouterr().err
