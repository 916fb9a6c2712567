"""What inspect says: facts that add up, text that fits, a picture, and the command line."""

import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

import ato_fast as ato
from ato_fast import picture
from ato_fast.describe import IN_PART, NO_WEIGHT, describe
from ato_fast.groups import Gate, GroupLayout, MacTerm, Slice, Unprunable
from ato_fast.report import layout_table, percent, shortened, terminal_width
from ato_fast.train import models
from ato_fast.train.cli import main
from nets import Forward, Plain, Residual, chain_layout, conv_bn_relu

X = torch.randn(1, 3, 8, 8)


@pytest.fixture(scope="module")
def inner():
    return ato.trace(Residual(), (X,))


@pytest.fixture(scope="module")
def everything():
    return ato.trace(Residual(), (X,), scope="all")


@pytest.fixture(scope="module")
def mixed():
    """Every kind of leftover: a buffer's product, a tensor in a gate in part, a held layer."""
    rows = np.array([0, 1, 2, 3, 4, -1, -1, -1])
    gates = (Gate("w", 5, (Slice("w.weight", 0, rows, "row"),
                           Slice("v.weight", 1, np.arange(5), "input")), 0),)  # fmt: skip
    terms = (
        MacTerm("w.weight", 10, (("w.weight", 0), ("w.weight", 1))),
        MacTerm("v.weight", 2, (("v.weight", 0), ("v.weight", 1))),
        MacTerm("u.weight", 1, (("u.weight", 0), ("u.weight", 1))),
        MacTerm("matmul", 7, ()),
    )
    shapes = {"w.weight": (8, 4), "v.weight": (3, 5), "u.weight": (3, 3)}
    held = (
        Unprunable("v.weight", "reaches the model output"),
        Unprunable("u.weight", "u.weight is special"),
    )
    return GroupLayout(gates, held, shapes, tuple(shapes), terms)


def test_gates_say_who_makes_and_reads_them(everything):
    stem, inner = describe(everything)["gates"]
    assert (stem["name"], stem["n"], stem["residual"]) == ("stem.0", 8, True)
    assert stem["produced_by"] == ["stem.0", "outer.0"]
    assert stem["read_by"] == ["inner.0", "head"] and stem["feeds"] == ["inner.0"]
    assert (inner["n"], inner["residual"]) == (6, False)
    assert inner["read_by"] == ["outer.0"] and inner["feeds"] == ["stem.0"]
    macs = {"stem": 3 * 8 * 9 * 64, "inner": 8 * 6 * 9 * 64, "outer": 6 * 8 * 9 * 64, "head": 40}
    total = sum(macs.values())
    assert stem["macs_frac"] == 1.0
    assert inner["macs_frac"] == pytest.approx((macs["inner"] + macs["outer"]) / total)


def test_reasons_add_up_to_what_coverage_leaves(inner, everything, mixed):
    for layout in (inner, everything, mixed):
        facts = describe(layout)
        for kind in ("macs", "params"):
            covered = facts["coverage"][f"{kind}_frac"]
            fixed = sum(reason[f"fixed_{kind}_frac"] for reason in facts["reasons"])
            assert covered + fixed == pytest.approx(1)
            assert covered == getattr(layout.coverage(), kind)
            for reason in facts["reasons"]:
                assert 0 <= reason[f"fixed_{kind}_frac"] <= reason[f"{kind}_frac"] <= 1
        listed = [name for reason in facts["reasons"] for name in reason["tensors"]]
        assert len(listed) == len(set(listed))
        assert {u.tensor for u in layout.unprunable} <= set(listed)
        json.dumps(facts, allow_nan=False)


def test_each_reason_costs_its_share(mixed):
    macs = 10 * 32 + 2 * 15 + 9 + 7
    reasons = {reason.pop("reason"): reason for reason in describe(mixed)["reasons"]}
    assert reasons["reaches the model output"] == {
        "tensors": ["v.weight"], "macs_frac": 30 / macs, "params_frac": 15 / 56,
        "fixed_macs_frac": 0.0, "fixed_params_frac": 0.0,
    }  # fmt: skip
    assert reasons["a tensor is special"]["fixed_macs_frac"] == 9 / macs
    assert reasons[IN_PART]["fixed_params_frac"] == 12 / 56
    assert reasons[NO_WEIGHT]["fixed_macs_frac"] == 7 / macs
    assert len(reasons) == 4


def test_one_reason_for_many_tensors_is_one_line():
    """Reasons name tensors; grouped they must not."""

    def forward(parts, x):
        for name in ("a", "b", "c"):
            x = torch.sigmoid(parts[name](x))
        return parts["d"](x)

    convs = {name: nn.Conv2d(3 if name == "a" else 8, 8, 1) for name in "abcd"}
    layout = ato.trace(Forward(forward, **convs), (X,))
    assert len({u.reason for u in layout.unprunable}) == 4
    reasons = describe(layout)["reasons"]
    assert len(reasons) == 2 and max(len(reason["tensors"]) for reason in reasons) == 6


def test_floor_is_that_of_the_smallest_mask(inner):
    layout = inner.tightened(round_to=4)
    for count in ("macs", "params"):
        mask = torch.tensor([True] * 4 + [False] * 2)
        assert describe(layout)["floor"][count] == getattr(layout, count)(mask)
    nothing = ato.trace(nn.Linear(4, 2), (torch.randn(1, 4),))
    assert describe(nothing)["floor"] == {"macs": 8, "params": 10}
    assert "smallest network" not in layout_table(nothing)


def test_held_layers_in_forward_order(inner):
    held = describe(inner)["held"]
    assert [h["module"] for h in held] == ["stem.0", "outer.0", "head"]
    assert [h["reads"] for h in held] == [[], ["inner.0"], []]
    assert [h["fixed"] for h in held] == [True, False, True]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_text_fits_and_names_stay_apart(width):
    names = [f"features.denseblock{i}.denselayer{j}" for i in range(1, 4) for j in range(1, 16)]
    chain = chain_layout((4,) * len(names))
    gates = tuple(
        Gate(f"{name}.conv", gate.n, (*gate.slices, *chain.gates[0].slices), gate.offset)
        for name, gate in zip(names, chain.gates, strict=True)
    )
    lines = layout_table(replace(chain, gates=gates, model_name="Net"), width).splitlines()
    assert max(map(len, lines)) <= width
    cells = [line.split("  ")[0] for line in lines if re.match(r"feat.*conv\b", line)]
    assert len(cells) == len(names)
    if width >= 100:
        assert cells == [f"{name}.conv" for name in names]


def test_print_is_as_wide_as_the_terminal(everything, monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert terminal_width() == 72 and str(everything) == layout_table(everything, 72)
    monkeypatch.setenv("COLUMNS", "10")
    assert terminal_width() == 60


def test_text_says_what_a_person_needs(inner, everything):
    text = layout_table(inner, 100)
    macs, params = inner.coverage()
    assert f"remove from {macs:.1%} of the MACs and {params:.1%} of the parameters" in text
    assert "(every gate at 1 channel)" in text
    assert "reaches the model output: head.weight, head.bias" in text
    line = next(line for line in text.splitlines() if "residual add couples" in line)
    facts = {r["reason"]: r for r in describe(inner)["reasons"]}
    reason = next(r for name, r in facts.items() if "residual add" in name)
    assert line.split()[:4] == [
        percent(reason[key])
        for key in ("macs_frac", "fixed_macs_frac", "params_frac", "fixed_params_frac")
    ]
    assert "also produced by" not in text
    assert "stem.0   outer.0           inner.0, head" in layout_table(everything, 100)
    tight = layout_table(everything.tightened(3, 4), 100)
    assert "(every gate at 3 channels, rounded up to a multiple of 4)" in " ".join(tight.split())


def test_percent_is_zero_and_all_only_where_it_is():
    shares = [0.0, 1e-6, 0.0004999, 0.0005, 0.5, 0.9994, 0.9999, sum([0.1] * 10), 1.0]
    assert [percent(share) for share in shares] == [
        "0.0%", "<0.1%", "<0.1%", "0.1%", "50.0%", "99.9%", ">99.9%", "100.0%", "100.0%",
    ]  # fmt: skip


@pytest.mark.parametrize("width", range(3, 30))
def test_shortened(width):
    text = "features.denseblock1.conv2"
    short = shortened(text, width)
    assert len(short) <= width
    assert short == text if width >= len(text) else "…" in short and ".…" not in short
    assert short[-1] == "2"


def drawn_names(content: bytes) -> list[str]:
    """Texts of an SVG; matplotlib writes each beside its outlines."""
    ElementTree.fromstring(content)
    return re.findall(r"<!-- (.*?) -->", content.decode())


def test_picture_names_every_gate_and_draws_every_edge(everything):
    facts = describe(everything)
    texts = drawn_names(picture.draw(facts, "Residual", "svg"))
    assert {"Residual", "stem.0", "inner.0", "head"} <= set(texts)
    assert "8 ch · 100.0%" in texts and "6 ch · 65.8%" not in texts
    nodes = picture.nodes_of(facts)
    assert [(node.name, node.kind) for node in nodes] == [
        ("stem.0", picture.RESIDUAL), ("inner.0", picture.GATE), ("head", picture.HELD),
    ]  # fmt: skip
    assert list(picture.edges_of(facts, nodes)) == [(0, 1), (1, 0), (0, 2)]


def test_neighbours_that_stay_whole_share_a_box():
    def forward(parts, x):
        x = torch.softmax(parts["b"](torch.softmax(parts["a"](x), 1)), 1)
        return parts["d"](parts["c"](x)).mean((2, 3))

    model = Forward(
        forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=conv_bn_relu(4, 6),
        d=nn.Conv2d(6, 2, 1),
    )  # fmt: skip
    nodes = picture.nodes_of(describe(ato.trace(model, (X,))))
    assert [(n.name, n.note) for n in nodes] == [
        ("parts.a", "2 layers"), ("parts.c.0", "6 ch"), ("parts.d", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("n_gates", [0, 1, 20, 200])
def test_boxes_keep_apart_and_inside(n_gates):
    facts = describe(chain_layout((4,) * n_gates))
    nodes = picture.nodes_of(facts)
    width, height = picture.place(nodes, picture.edges_of(facts, nodes))
    seen = sorted((node.column, node.y, node.x) for node in nodes)
    for a, b in zip(seen, seen[1:], strict=False):
        assert a[0] != b[0] or b[1] - a[1] > picture.BOX_HEIGHT
    for node in nodes:
        assert 0 < node.x - node.half and node.x + node.half < width and node.y < height
    n_columns = 1 + max([node.column for node in nodes], default=0)
    assert n_columns == 1 if n_gates < 45 else 1 < n_columns < 8
    assert [node.name for node in nodes if node.kind == picture.GATE] == [
        f"conv{i}" for i in range(n_gates)
    ]


@pytest.mark.parametrize("kind", picture.FORMATS)
def test_equal_layouts_give_equal_pictures(everything, kind):
    first, again = (picture.draw(describe(everything), "Residual", kind) for _ in range(2))
    assert first == again


def test_png_shows_something(everything):
    content = picture.draw(describe(everything), "Residual", "png")
    image = matplotlib.image.imread(io.BytesIO(content))
    assert image.shape[0] > 200 and image.shape[1] > 800
    for kind in (picture.RESIDUAL, picture.GATE, picture.HELD):
        n_pixels = 0
        for fill in picture.COLOURS[kind][1:]:
            colour = np.array([int(fill[i : i + 2], 16) for i in (1, 3, 5)]) / 255
            n_pixels += (np.abs(image[..., :3] - colour).max(-1) < 0.005).sum()
        assert n_pixels > 3000


def test_other_formats_are_refused(everything):
    with pytest.raises(ValueError, match=r"kind: expected one of .*got 'pdf'"):
        picture.draw(describe(everything), "Residual", "pdf")


@pytest.fixture
def small(monkeypatch):
    """`Plain` and `Residual` under names that the command line takes."""
    for name, build in {"plain": Plain, "residual": Residual}.items():
        monkeypatch.setitem(models.CIFAR, name, lambda n, c, build=build: build())
    return ["--input-size", "3x8x8", "--classes", "5"]


def test_inspect_prints_and_writes_all_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--data", "digits", "--json", "new/l.json", "--graph", "new/g.svg"]
    assert main(["inspect", "resnet20", *options]) == 0
    shown = capsys.readouterr().out
    facts = json.loads((tmp_path / "new" / "l.json").read_text())
    model = models.build("resnet20", 10, 1, (16, 16))
    layout = ato.trace(model, (torch.zeros(2, 1, 16, 16),))
    assert facts == {"model": "resnet20", "input": [1, 16, 16], **describe(layout)}
    assert shown == f"input 1x16x16\n{layout}\n"
    assert len(facts["gates"]) == 9 and facts["n_groups"] == 3 * (16 + 32 + 64)
    assert {gate["name"] for gate in facts["gates"]} <= set(shown.split())
    drawn = drawn_names((tmp_path / "new" / "g.svg").read_bytes())
    assert {gate["name"] for gate in facts["gates"]} <= set(drawn)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["g.svg", "l.json"]


def test_inspect_scope_all_offers_residual_channels(small, capsys):
    assert main(["inspect", "residual", *small, "--scope", "all"]) == 0
    shown = capsys.readouterr().out
    assert "scope 'all'" in shown and "a residual add couples" not in shown


def test_inspect_ignores_and_rounds(small, tmp_path, capsys):
    path = tmp_path / "l.json"
    options = ["--ignore", "a", "head", "--ignore", "b.0", "--json", str(path)]
    assert main(["inspect", "plain", *small, *options]) == 0
    assert json.loads(path.read_text())["gates"] == []
    assert "left out by ignore=" in capsys.readouterr().out
    options = ["--ignore", "a", "--round-to", "8", "--min-channels", "3", "--json", str(path)]
    assert main(["inspect", "plain", *small, *options]) == 0
    facts = json.loads(path.read_text())
    assert [gate["name"] for gate in facts["gates"]] == ["b.0"]
    assert (facts["round_to"], facts["min_channels"]) == (8, 3)
    layout = ato.trace(Plain(), (X,), ignore=["a"])
    mask = torch.tensor([True] * 8 + [False] * 4)
    assert facts["floor"]["macs"] == layout.macs(mask)


@pytest.mark.parametrize("failures", [[], ["b.0: differs by 0.5"]], ids=["exact", "different"])
def test_inspect_verify_tells_by_its_exit_code(small, tmp_path, monkeypatch, capsys, failures):
    class Verified(SimpleNamespace):
        def __str__(self):
            return f"verified, {len(self.failures)} failures"

    asked = []

    def verify(layout, model, inputs):
        asked.append((type(model), [tuple(x.shape) for x in inputs]))
        return Verified(ok=not failures, failures=failures)

    monkeypatch.setattr(GroupLayout, "verify", verify)
    path = tmp_path / "l.json"
    code = main(["inspect", "plain", *small, "--verify", "--json", str(path)])
    assert code == (1 if failures else 0) and asked == [(Plain, [(2, 3, 8, 8)])]
    shown = capsys.readouterr().out
    assert shown.endswith(f"\n\nverified, {len(failures)} failures\n")
    found = json.loads(path.read_text())["verify"]
    assert found == {"ok": not failures, "failures": failures}


def test_inspect_verify_of_a_real_network(small, tmp_path, capsys):
    path = tmp_path / "l.json"
    assert (
        main(["inspect", "residual", *small, "--scope", "all", "--verify", "--json", str(path)])
        == 0
    )
    assert "every gate shrinks exactly" in capsys.readouterr().out
    assert json.loads(path.read_text())["verify"] == {"ok": True, "failures": []}


BAD = {
    "model": (["resnet19"], "did you mean"),
    "size": (["resnet20", "--input-size", "32x32"], "expected channels x height x width"),
    "classes": (["resnet20", "--classes", "0"], "--classes: expected at least 1, got 0"),
    "data": (["resnet20", "--data", "cifar1"], "did you mean cifar10"),
    "none": ([], "required: MODEL"),
    "ignore": (["resnet20", "--ignore", "conv9"], "no module or parameter is called 'conv9'"),
    "ignore-nothing": (["resnet20", "--ignore"], "expected at least one argument"),
    "round-to": (["resnet20", "--round-to", "0"], "round_to: expected an int >= 1, got 0"),
    "round-to-text": (["resnet20", "--round-to", "x"], "invalid int value: 'x'"),
    "min-channels": (["resnet20", "--min-channels", "-1"], "min_channels: expected an int >= 1"),
    "graph": (["resnet20", "--graph", "g.pdf"], "--graph g.pdf: expected a file name that ends in"),
    "graph-plain": (["resnet20", "--graph", "svg"], "expected a file name that ends in .svg or"),
    "graph-folder": (["resnet20", "--graph", "/"], "--graph /: is a folder"),
    "json-folder": (["resnet20", "--json", "/"], "--json /: is a folder"),
    "json-place": (["resnet20", "--json", "/dev/null/x.json"], "is not a folder"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_to_inspect(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["inspect", *arguments])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == ""
    assert message in shown.err and len(shown.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_inspect_without_matplotlib_says_how_to_get_it(small, tmp_path, monkeypatch, capsys):
    for name in [x for x in sys.modules if x.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ato_fast.picture")
    monkeypatch.delattr(ato, "picture")
    assert main(["inspect", "plain", *small, "--graph", str(tmp_path / "g.svg")]) == 2
    assert "pip install 'ato-fast[train]'" in capsys.readouterr().err
    assert main(["inspect", "plain", *small]) == 0
