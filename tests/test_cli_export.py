"""``ato-fast export`` and ``ato-fast bench``: from a folder on disk to a file or a figure."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ato_fast as ato
from ato_fast.train import export_cli, models
from ato_fast.train.cli import main
from nets import random_mask

pytest.importorskip("onnxruntime")


def tiny(n_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n_classes),
    )  # fmt: skip


NETWORK = {"model": "tiny", "n_classes": 10, "input_shape": [1, 16, 16]}
GIVEN = ["--model", "tiny", "--classes", "10", "--input-size", "1x16x16"]


@pytest.fixture(autouse=True)
def tiny_by_name(monkeypatch):
    monkeypatch.setitem(models.CIFAR, "tiny", tiny)


@pytest.fixture
def small():
    model = tiny(10, 1).eval()
    layout = ato.trace(model, (torch.randn(2, 1, 16, 16),))
    return ato.shrink(model, layout, random_mask(layout))


def exported(folder, output, *more, form="torch-export"):
    return main(["export", str(folder), "--format", form, "--output", str(output), *more])


def test_what_train_wrote_is_exported_and_timed_without_further_words(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    train = ["train", "--data", "digits", "--model", "tiny", "--macs", "0.5", "--no-dense"]
    quick = ["--epochs", "3", "--batch-size", "256", "--controller-steps", "8"]
    assert main([*train, *quick, "--output", str(out)]) == 0
    assert json.loads((out / "recipe.json").read_text())["provenance"]["network"] == NETWORK
    capsys.readouterr()
    model, report = tmp_path / "new" / "a.onnx", tmp_path / "new" / "a.json"
    assert exported(out, model, "--json", str(report), form="onnx") == 0
    content = json.loads(report.read_text())
    assert content["path"] == str(model) and content["size_bytes"] == model.stat().st_size
    assert content["format"] == "onnx" and content["batches"] == [2, 3, 1]
    assert 0 <= content["rel_err"] <= content["limit"] and content["dynamic_batch"]
    assert str(model) in capsys.readouterr().out
    monkeypatch.setattr(export_cli, "BENCH_SECONDS", 0.01)
    figures = tmp_path / "bench.json"
    assert main(["bench", str(out), "--batch", "3", "--device", "cpu", "--json", str(figures)]) == 0
    content = json.loads(figures.read_text())
    assert content["input"] == [3, 1, 16, 16]
    columns = zip(content["dense_ms"], content["small_ms"], content["ratio"], strict=True)
    rows = list(columns)
    assert len(rows) == export_cli.BENCH_ROUNDS
    assert all(dense > 0 and ratio == small / dense for dense, small, ratio in rows)
    shown = capsys.readouterr().out
    assert "forward pass on 3x1x16x16" in shown and "small/dense" in shown
    assert f"{sorted(content['ratio'])[2]:.1%} ({min(content['ratio']):.1%} to" in shown


def test_options_say_what_the_folder_does_not(small, tmp_path, capsys):
    ato.save(small, tmp_path / "s")
    output = tmp_path / "a"
    assert exported(tmp_path / "s", output, *GIVEN[:2]) == 2
    shown = capsys.readouterr()
    assert "give --classes, --input-size" in shown.err and len(shown.err.splitlines()) == 1
    assert exported(tmp_path / "s", output, *GIVEN, form="state-dict") == 0
    weights = load_file(output)
    assert weights.keys() == small.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in small.state_dict().items())


def test_one_batch_size(small, tmp_path):
    ato.save(small, tmp_path / "s", provenance={"network": NETWORK})
    assert exported(tmp_path / "s", tmp_path / "a", "--fixed-batch", "--batch", "3") == 0
    graph = torch.export.load(tmp_path / "a").module()
    x = torch.randn(3, 1, 16, 16)
    assert torch.equal(graph(x), small(x))
    with pytest.raises(AssertionError):
        graph(x[:2])


BAD = {
    "folder": (["--model", "tiny"], "nowhere", "recipe.json: no such file"),
    "batch": (["--batch", "0"], "s", "--batch: expected at least 1, got 0"),
    "classes": (["--classes", "0"], "s", "--classes: expected at least 1, got 0"),
    "other-classes": (["--classes", "11"], "s", "has shape [11, 16], the recipe was made for [10"),
    "other-model": (["--model", "resnet20"], "s", "does not fit this model: it has no tensor"),
    "size": (["--input-size", "16x16"], "s", "expected channels x height x width"),
    "too-small": (["--input-size", "1x2x2"], "s", "cannot take images of shape (1, 2, 2)"),
    "opset": (["--opset", "18"], "s", "opset: expected None for torch-export, got 18"),
    "json": (["--json", "/"], "s", "--json /: is a folder"),
    "format": (["--format", "tflite"], "s", "invalid choice: 'tflite'"),
    "option": (["--half"], "s", "unrecognized arguments: --half"),
}


@pytest.mark.parametrize("options, folder, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(small, tmp_path, capsys, options, folder, message):
    ato.save(small, tmp_path / "s", provenance={"network": NETWORK})
    try:
        code = exported(tmp_path / folder, tmp_path / "a", *options)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == ""
    assert message in shown.err and len(shown.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    "network",
    [3, [], {"model": "tiny"}, {**NETWORK, "n_classes": True}, {**NETWORK, "model": ["tiny"]},
     {**NETWORK, "input_shape": [1, 16]}, {**NETWORK, "input_shape": [1, "a", 16]},
     {**NETWORK, "input_shape": [1, -3, 16]}],
    ids=str,
)  # fmt: skip
def test_a_record_of_the_network_that_makes_no_sense(small, tmp_path, capsys, network):
    ato.save(small, tmp_path / "s", provenance={"network": network})
    assert exported(tmp_path / "s", tmp_path / "a") == 2
    shown = capsys.readouterr()
    assert "the recipe's record of the network" in shown.err and len(shown.err.splitlines()) == 1


def test_an_output_that_is_a_folder(small, tmp_path, capsys):
    ato.save(small, tmp_path / "s", provenance={"network": NETWORK})
    assert exported(tmp_path / "s", tmp_path / "s") == 2
    assert "--output" in capsys.readouterr().err


def test_bench_refuses_what_export_refuses(small, tmp_path, capsys):
    ato.save(small, tmp_path / "s")
    for options, message in ((["--device", "tpu"], "device: expected auto"), ([], "give --model")):
        assert main(["bench", str(tmp_path / "s"), *options]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and len(shown.err.splitlines()) == 1
