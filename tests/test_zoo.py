"""Real architectures: no crash, and every offered gate shrinks to exactly the zeroed network.

A diverse part of `benchmarks.zoo_models` runs always; all of it behind the marker ``zoo``
(``make zoo``).
"""

import copy
import dataclasses
import json
import time

import pytest
import torch
from torch import nn

import ato_fast as ato
from ato_fast.gates import Gates
from benchmarks import zoo, zoo_models, zoo_report
from benchmarks.exactness import CHANGE, compare, outputs, random_mask, randomise, relative_error
from nets import Plain

# Export's warning about caches that timm's attention layers keep.
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")

FAST = [
    "cifar:resnet20", "own:carn_m", "own:stacked_unet", "own:dcgan_generator", "own:audio_m5",
    "own:transformer_encoder", "torchvision:resnet18", "torchvision:squeezenet1_1",
    "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x1_0",
    "torchvision:regnet_y_400mf", "torchvision:r3d_18", "timm:convnext_atto",
    "timm:mambaout_femto", "timm:vit_tiny_patch16_224", "timm:levit_128s",
    "timm:edgenext_xx_small", "timm:gmlp_ti16_224", "transformers:LlamaForCausalLM",
]  # fmt: skip
GATED = [("cifar:resnet20", "inner"), ("cifar:resnet20", "all"),
         ("torchvision:mobilenet_v2", "inner"), ("torchvision:densenet121", "all"),
         ("torchvision:regnet_y_400mf", "inner")]  # fmt: skip
REACHED = ["torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:resnet50",
           "torchvision:efficientnet_b0"]  # fmt: skip
"""Everything but the classifier's rows and the image's channels is within reach in scope "all"."""


def traced(name, scope="all"):
    """Model, inputs and layout of a case; the model's parameters are random after tracing."""
    case = zoo_models.case(name)
    if case.missing():
        pytest.skip(case.missing())
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.inputs()
    layout = ato.trace(model, inputs, scope=scope)
    return randomise(model), inputs, layout


@pytest.mark.parametrize("name", FAST)
def test_every_offered_gate_is_exact(name):
    model, inputs, layout = traced(name)
    grouped = {s.tensor for g in layout for s in g.slices if s.in_group}
    assert grouped | {u.tensor for u in layout.unprunable} == set(layout.parameters)
    if not layout.gates:
        return
    errors = compare(model, inputs, layout, random_mask(layout, seed=0))
    assert errors.exact, errors
    assert errors.change > CHANGE and errors.slope > 0, errors


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("case", zoo_models.CASES, ids=lambda case: case.name)
def test_the_whole_zoo(case, scope):
    if case.missing():
        pytest.skip(case.missing())
    row = zoo.measure(case, scope)
    assert row["status"] in ("exact", "none"), row


@pytest.mark.parametrize(("name", "scope"), GATED)
def test_gated_equals_shrunk(name, scope):
    model, inputs, layout = traced(name, scope)
    mask = random_mask(layout, seed=1)
    small = ato.shrink(model, layout, mask)
    with torch.no_grad():
        expected = outputs(small(*inputs))
        gated = outputs(Gates(model, layout)(mask.float(), lambda m: m(*inputs)))
    assert relative_error(expected, gated) <= 1e-5


@pytest.mark.parametrize("name", REACHED)
def test_coverage_of_convolutional_networks(name):
    macs, params = traced(name)[2].coverage()
    assert macs == 1.0
    assert params > 0.99


def test_auxiliary_heads_still_train_after_shrinking():
    model, inputs, layout = traced("torchvision:googlenet", "inner")
    small = ato.shrink(model, layout, random_mask(layout, seed=0)).train()
    assert small(*inputs).logits.shape == (2, 1000)


def test_the_zoo_is_wide_enough():
    names = [case.name for case in zoo_models.CASES]
    assert len(names) == len(set(names)) >= 65
    assert sum(name.startswith("timm:") for name in names) >= 25
    assert {case.kind for case in zoo_models.CASES} == set(zoo_models.KINDS)
    assert {*FAST, *REACHED, *(name for name, _ in GATED)} <= set(names)


def plain():
    torch.manual_seed(0)
    model, x = Plain().eval(), torch.randn(2, 3, 8, 8)
    return randomise(model), (x,), ato.trace(model, (x,))


def test_a_planted_error_is_seen():
    """Two channels changed places in what reads them."""
    model, inputs, layout = plain()
    mask = torch.ones(layout.n_groups, dtype=torch.bool)
    mask[0] = False
    assert compare(model, inputs, layout, mask).exact
    reads = next(s for s in layout.gates[0].slices if s.role == "input")
    reads.channels[[0, 1]] = reads.channels[[1, 0]]
    wrong = compare(model, inputs, dataclasses.replace(layout), mask)
    assert not wrong.exact
    assert wrong.output > 1e-3 and wrong.output_float64 > 1e-3 and wrong.gradient > 1e-3


def test_a_shrunk_network_that_does_not_run_is_seen():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)).reshape(-1, self.width))

        width = 8

    model, x = Fixed().eval(), torch.randn(2, 3, 8, 8)

    class Free(Fixed):
        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    layout = ato.trace(Free(), (x,))
    wrong = compare(model, (x,), layout, random_mask(layout, seed=0))
    assert not wrong.exact and "the shrunk model fails: RuntimeError" in wrong.problem


def test_randomise_leaves_nothing_constant():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.ln = nn.BatchNorm2d(8), nn.LayerNorm(8)
            self.scale = nn.Parameter(torch.full((8,), 1e-6))
            self.zero = nn.Parameter(torch.zeros(8, 8))
            self.weight = nn.Parameter(torch.randn(8))

    model = Small()
    before = copy.deepcopy(model)
    randomise(model)
    for name, tensor in model.named_parameters():
        assert tensor.std() > 0.03, name
    assert torch.equal(model.weight, before.weight)
    assert model.norm.running_mean.std() > 0 and (model.norm.running_var > 0.4).all()
    assert torch.equal(randomise(before).scale, model.scale)


def broken():
    raise RuntimeError("cannot be built\nsecond line")


def test_command_records_failures_and_goes_on(tmp_path, monkeypatch, capsys):
    cases = [
        zoo_models.Case("own:broken", "cnn", broken, tuple),
        zoo_models.Case("own:absent", "cnn", broken, tuple, ("no_such_package",)),
        zoo_models.case("own:audio_m5"),
    ]
    monkeypatch.setattr(zoo, "CASES", cases)
    json_file, page = tmp_path / "zoo.json", tmp_path / "zoo.md"
    assert zoo.main(["--json", str(json_file), "--markdown", str(page), "--masks", "1"]) == 1
    content = json.loads(json_file.read_text())
    assert content["complete"]
    assert [row["status"] for row in content["cases"]] == ["crash", "skipped", "exact"]
    assert content["cases"][0]["reason"] == "RuntimeError: cannot be built"
    assert content["cases"][2]["macs_frac"] == 1.0
    text = page.read_text()
    assert "2 networks, scope `all`: 1 traced, 1 exact" in text
    assert "1 of 2 have at least 90% of their MACs within reach; not `own:broken` (crash)." in text
    assert "no_such_package is not installed" in text
    capsys.readouterr()
    assert zoo.main(["--show", str(json_file)]) == 1
    assert capsys.readouterr().out == text + "\n"
    assert zoo.main(["--only", "own:audio*", "--scope", "inner", "--masks", "1"]) == 0
    with pytest.raises(SystemExit, match="2"):
        zoo.main(["--only", "nothing"])


class Written(nn.Module):
    """Its first layer's width is written into the forward pass."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 1), nn.Linear(32, 5)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu().view(-1, 8, 4, 4)).relu().mean((2, 3)))


def test_a_network_below_its_goal_is_also_measured_as_a_graph():
    case = zoo_models.Case("own:written", "cnn", Written, lambda: (torch.randn(2, 3, 6, 6),))
    row = zoo.measure(case, "all", 1)
    assert row["status"] == "exact"
    assert row["macs_frac"] < 0.9 and row["graph_macs_frac"] == 1.0
    assert row["graph_output_error"] <= 1e-5 and row["graph_gradient_error"] <= 1e-12
    assert row["graph_change"] > CHANGE
    for other in (dataclasses.replace(case, kind="other"), zoo_models.case("own:audio_m5")):
        assert "graph_macs_frac" not in zoo.measure(other, "all", 1)
    page = zoo_report.markdown(
        {"cases": [row], "complete": True, "scope": "all", "masks": 1, "commit": None,
         "limits": {"output": 1, "gradient": 1}, "command": ["x"], "wall_s": 1, "versions": {},
         "machine": {"processor": "one", "threads": 1}}
    )  # fmt: skip
    assert "With `as_graph=True` 1 of 1." in page
    share = f"{row['macs_frac']:.1%}"
    assert f"| {share} | 100.0% |" in page


def test_a_wrong_graph_is_seen(monkeypatch):
    original = zoo.compare

    def compare(model, inputs, layout, mask):
        errors = original(model, inputs, layout, mask)
        return dataclasses.replace(errors, output=1.0) if layout.as_graph else errors

    monkeypatch.setattr(zoo, "compare", compare)
    case = zoo_models.Case("own:written", "cnn", Written, lambda: (torch.randn(2, 3, 6, 6),))
    row = zoo.measure(case, "all", 1)
    assert (row["status"], row["reason"]) == ("wrong", "as a graph: not the same function")


def test_a_case_that_takes_too_long_is_a_crash():
    def never_ready():
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pass

    row = zoo.measure(zoo_models.Case("own:slow", "cnn", never_ready, tuple), "all", 1, 0.1)
    assert row["status"] == "crash" and row["reason"] == "OutOfTime: it took more than 0.1 s"
