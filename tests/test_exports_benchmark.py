"""`benchmarks.exports`: networks of the zoo as files, and the table of how that went."""

import json

import pytest
import torch
from torch import nn

from benchmarks import exports, zoo_models
from nets import Plain

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")

FAST = ["own:audio_m5", "own:dcgan_generator", "torchvision:squeezenet1_1"]
CNNS = [case for case in zoo_models.CASES if case.kind == "cnn"]


def plain_case(name="own:plain", build=Plain):
    return zoo_models.Case(name, "cnn", build, lambda: (torch.randn(2, 3, 8, 8),))


@pytest.mark.parametrize("name", FAST)
def test_shrunk_networks_are_exported(name):
    row = exports.measure(zoo_models.case(name))
    assert row["status"] == "ok" and row["gates"] and row["macs_frac"] < 0.5, row
    for entry in row["formats"].values():
        assert entry["dynamic_batch"] and entry["rel_err"] <= 1e-5, row


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("case", CNNS, ids=lambda case: case.name)
def test_every_convolutional_network_of_the_zoo(case):
    if case.missing():
        pytest.skip(case.missing())
    row = exports.measure(case)
    assert row["status"] in ("ok", "dense"), row


class Fixed(Plain):
    """Takes batches of 2 only, whatever its width."""

    def forward(self, x):
        return super().forward(x) + torch.ones(2, 1)


class Stuck(Plain):
    """An operation that no exporter takes."""

    def forward(self, x):
        return super().forward(x) * float(x.mean().item() > -1e9)


class Breaks(Plain):
    """Fails for the width it is shrunk to, once it is exported."""

    def forward(self, x):
        if torch.compiler.is_exporting() and self.a[0].out_channels < 8:
            raise RuntimeError("too narrow")
        return super().forward(x)


def broken():
    raise RuntimeError("cannot be built")


def test_a_failure_that_the_dense_network_shares_is_told_from_one_of_ours(monkeypatch):
    monkeypatch.setattr(exports, "FORMATS", ("torch-export",))
    entry = exports.measure(plain_case(build=Fixed))["formats"]["torch-export"]
    assert entry["status"] == "dense" and not entry["dynamic_batch"]
    assert "specialized it to be a constant (2)" in entry["reason"] == entry["dense_reason"]
    small, dense = nn.Sequential(Breaks()), nn.Sequential(Breaks())
    small[0].a[0] = nn.Conv2d(3, 4, 3)
    x = (torch.randn(2, 3, 8, 8),)
    entry = exports.attempt("torch-export", small, dense, x)
    assert entry["status"] == "failed" and "too narrow" in entry["reason"]
    assert entry["dense_reason"] == ""
    entry = exports.attempt("torch-export", Stuck(), Stuck(), x)
    assert entry["status"] == "dense" and "rel_err" not in entry
    assert entry["reason"] == entry["dense_reason"]


def test_command_writes_the_table_and_keeps_what_precedes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exports, "FORMATS", ("torch-export",))
    cases = [
        plain_case(),
        plain_case("own:fixed", Fixed),
        plain_case("own:broken", broken),
        zoo_models.Case("own:absent", "cnn", broken, tuple, ("no_such_package",)),
        zoo_models.Case("own:other", "transformer", broken, tuple),
    ]
    monkeypatch.setattr(exports, "CASES", cases)
    page, figures = tmp_path / "a.md", tmp_path / "a.json"
    page.write_text(f"# Exports\n\nWords.\n\n{exports.HEADING}\n\nold\n")
    assert exports.main(["--json", str(figures), "--markdown", str(page)]) == 1
    content = json.loads(figures.read_text())
    assert content["complete"]
    assert [r["status"] for r in content["networks"]] == ["ok", "dense", "failed", "skipped"]
    text = page.read_text()
    assert text.startswith(f"# Exports\n\nWords.\n\n{exports.HEADING}\n") and "old" not in text
    assert "2 of 3 exported" in text and "1 of them for any batch size" in text
    assert "0 that cannot be had dense either; 1 failed" in text
    assert "RuntimeError: cannot be built" in text and "no_such_package is not installed" in text
    assert "| `own:fixed` | torch-export |" in text and "| the same |" in text
    capsys.readouterr()
    assert exports.main(["--show", str(figures)]) == 1
    assert capsys.readouterr().out == text.partition("Words.\n\n")[2] + "\n"
    with pytest.raises(SystemExit, match="2"):
        exports.main(["--only", "own:other"])
