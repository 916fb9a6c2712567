"""Exports: what other programs read computes what the model computes, or no file appears."""

import io
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ato_fast as ato
from ato_fast.export import LIMITS
from nets import Forward, Residual, random_mask, randomise_norms

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FORMATS = tuple(LIMITS)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def shrunk():
    model = randomise_norms(Residual()).eval()
    layout = ato.trace(model, (X,), scope="all")
    return ato.shrink(model, layout, random_mask(layout))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return shrunk()


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """Per format the report of an export of ``small``."""
    folder = tmp_path_factory.mktemp("exported")
    return {name: ato.export(small, (X,), folder / "new" / name, format=name) for name in FORMATS}


def run_onnx(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))


def outputs(report, model, x):
    """What the file computes, read with nothing of ours."""
    if report.format == "onnx":
        return torch.from_numpy(run_onnx(report.path, x)[0])
    if report.format == "torch-export":
        return torch.export.load(report.path).module()(x)
    twin = Residual.__new__(Residual)
    twin.__dict__ = {**model.__dict__}
    weights = load_file(report.path)
    return torch.func.functional_call(twin, weights, x)


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_computes_what_the_model_computes(exported, small, name):
    report = exported[name]
    for x in (X, OTHER, OTHER[:1]):
        expected = small(x)
        error = (outputs(report, small, x) - expected).abs().max() / expected.abs().max()
        assert error <= LIMITS[name]
    assert report.rel_err <= report.limit == LIMITS[name]
    assert report.size_bytes == report.path.stat().st_size
    assert report.batches == (2, 3, 1) and report.dynamic_batch
    assert (report.opset is None) == (name != "onnx")
    assert str(report.path) in str(report) and f"{report.rel_err:.1e}" in str(report)


def test_the_batch_dimension_has_a_name(exported):
    graph = onnx.load(exported["onnx"].path).graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_one_batch_size(small, tmp_path):
    report = ato.export(small, (X,), tmp_path / "a", format="onnx", dynamic_batch=False)
    assert report.batches == (2,) and not report.dynamic_batch and "one batch size" in str(report)
    assert onnx.load(report.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_an_example_of_one_row(small, tmp_path):
    report = ato.export(small, (X[:1],), tmp_path / "a", format="torch-export")
    assert report.batches == (1, 2)
    assert torch.export.load(report.path).module()(OTHER).shape == (7, 5)


def test_an_older_opset_on_request_and_no_other_instead(small, tmp_path):
    report = ato.export(small, (X,), tmp_path / "a", opset=18)
    found = {entry.domain: entry.version for entry in onnx.load(report.path).opset_import}
    assert report.opset == found[""] == 18
    with pytest.raises(ato.ExportError, match="opset: this model cannot be had in 3"):
        ato.export(small, (X,), tmp_path / "b", opset=3)
    assert not (tmp_path / "b").exists()


def test_nothing_of_the_machine_or_of_the_example_is_in_the_file(exported):
    here = Path(ato.__file__).parent.parent
    for report in exported.values():
        data = report.path.read_bytes()
        assert str(here).encode() not in data and b".py" not in data
        assert X.numpy().tobytes()[:64] not in data


def test_the_archive_of_torch_holds_one_pickle_and_that_holds_zeros(exported):
    with zipfile.ZipFile(exported["torch-export"].path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    # A pickle of protocol 2 or later, or a zip file around one.
    pickled = {n for n, c in contents.items() if c.startswith((b"\x80", b"PK"))}
    assert {name.partition("/")[2] for name in pickled} == {"data/sample_inputs/model.pt"}
    (inner,) = (contents[name] for name in pickled)
    ((x,), kwargs) = torch.load(io.BytesIO(inner), weights_only=True)
    assert x.shape == X.shape and not x.any() and kwargs == {}
    config = next(c for n, c in contents.items() if n.endswith("model_weights_config.json"))
    assert b'"use_pickle": true' not in config


@pytest.mark.parametrize("name", FORMATS[1:])
@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_the_model_stays_as_it_is(tmp_path, name):
    class Keeping(Residual):
        def forward(self, x):
            self.seen = x.mean()
            return super().forward(x)

    model = Keeping().train()
    model.inner.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = dict(model.named_parameters())
    attributes, rng = set(vars(model)), torch.get_rng_state()
    x = X.clone()
    ato.export(model, (x,), tmp_path / "a", format=name)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(tensors[k] is v for k, v in model.named_parameters())
    assert set(vars(model)) == attributes and torch.equal(torch.get_rng_state(), rng)
    assert model.head.weight.grad.all() and torch.equal(x, X)


class Otherwise(nn.Module):
    """Computes something else once it is exported, or once its state was loaded."""

    def __init__(self, change=1.01):
        super().__init__()
        self.fc, self.change = nn.Linear(4, 3), change
        self.register_state_dict_post_hook(self._tampered)

    @staticmethod
    def _tampered(module, state, prefix, metadata):
        state["fc.weight"] = state["fc.weight"] * module.change

    def forward(self, x):
        return self.fc(x) * (self.change if torch.compiler.is_exporting() else 1)


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_result_is_not_written(tmp_path, name):
    path, inputs = tmp_path / "a", (torch.randn(2, 4),)
    path.write_bytes(b"older")
    with pytest.raises(ato.ExportError, match=r"not written: as .* differs by .*; limit") as error:
        ato.export(Otherwise(), inputs, path, format=name)
    # Tells what onnxruntime makes of the file from what is in it.
    assert ("without the runtime's graph optimizations by" in str(error.value)) == (name == "onnx")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"older"]
    if name != "onnx":
        assert ato.export(Otherwise(1.0), inputs, path, format=name).rel_err <= LIMITS[name]


def test_a_failed_write_leaves_the_older_file(small, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"older")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        ato.export(small, (X,), path, format="state-dict")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"older"]


def test_a_model_made_for_one_batch_size(tmp_path):
    model = Forward(lambda parts, x: parts["fc"](x.reshape(2, -1)), fc=nn.Linear(12, 3))
    inputs = (torch.randn(2, 3, 4),)
    with pytest.raises(ato.ExportError, match=r"marked batch .*; dynamic_batch=False exports"):
        ato.export(model, inputs, tmp_path / "new" / "a", format="torch-export")
    assert not list(tmp_path.iterdir())
    ato.export(model, inputs, tmp_path / "a", format="torch-export", dynamic_batch=False)


def test_an_operation_that_onnx_does_not_have(tmp_path):
    model = Forward(lambda parts, x: torch.linalg.svd(x)[1])
    with pytest.raises(ato.ExportError, match=r"cannot translate .*No ONNX function.*linalg_svd"):
        ato.export(model, (torch.randn(2, 3, 4),), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_several_inputs_and_outputs_of_several_kinds(tmp_path):
    def forward(parts, tokens, scale, unused):
        scale += 1.0
        x = parts["table"](tokens) * scale[:, None]
        return {"sum": x.sum(1), "both": (x.argmax(-1), x.mean(2))}

    model = Forward(forward, table=nn.Embedding(50, 6))
    inputs = (torch.arange(6).reshape(2, 3), torch.zeros(2, 1), torch.randn(2, 4))
    for name in FORMATS:
        report = ato.export(model, inputs, tmp_path / name, format=name)
        assert report.rel_err <= LIMITS[name] and not inputs[1].any()
    tokens, scale = torch.arange(12).reshape(4, 3), torch.randn(4, 1)
    found = run_onnx(tmp_path / "onnx", tokens, scale, torch.randn(4, 4))
    expected = model(tokens, scale.clone(), None)
    torch.testing.assert_close(torch.from_numpy(found[0]), expected["sum"])
    assert torch.equal(torch.from_numpy(found[1]), expected["both"][0])


def test_one_tensor_for_two_inputs(tmp_path):
    model = Forward(lambda parts, x, y: parts["fc"](x - 2 * y), fc=nn.Linear(4, 3))
    x, y = torch.randn(2, 2, 4).unbind()
    ato.export(model, (x, x), tmp_path / "a", format="torch-export")
    assert torch.equal(torch.export.load(tmp_path / "a").module()(x, y), model(x, y))


def test_attention_that_lost_heads(tmp_path):
    def forward(parts, x):
        x = parts["embed"](x)
        return parts["head"](parts["attention"](x, x, x, need_weights=False)[0])

    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    model = Forward(forward, embed=nn.Linear(6, 16), attention=attention, head=nn.Linear(16, 3))
    x = torch.randn(2, 5, 6)
    layout = ato.trace(model, (x,), scope="all")
    small = ato.shrink(model, layout, random_mask(layout))
    assert small.parts["attention"].num_heads < 4
    for name in ("onnx", "torch-export"):
        assert ato.export(small, (x,), tmp_path / name, format=name).rel_err <= LIMITS[name]


def test_a_network_that_was_shrunk_as_a_graph(tmp_path):
    model = Forward(
        lambda parts, x: parts["b"](torch.relu(parts["a"](x)).view(-1, 8)),
        a=nn.Linear(4, 8), b=nn.Linear(8, 3),
    )  # fmt: skip
    x = torch.randn(2, 4)
    layout = ato.trace(model, (x,), as_graph=True)
    graph = ato.shrink(model, layout, random_mask(layout), as_graph=True)
    for name in FORMATS:
        report = ato.export(graph, (x,), tmp_path / name, format=name, dynamic_batch=False)
        assert report.rel_err <= LIMITS[name]


def test_tied_tensors_are_under_each_of_their_names(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    report = ato.export(model, (torch.randn(2, 4),), tmp_path / "a", format="state-dict")
    weights = load_file(report.path)
    assert torch.equal(weights["0.weight"], weights["1.weight"])
    nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).load_state_dict(weights)


def test_half_precision(small, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).bfloat16()
    for name in ("torch-export", "state-dict"):
        report = ato.export(model, (X.bfloat16(),), tmp_path / name, format=name)
        assert report.rel_err <= report.limit == 4 * 2**-7
    assert load_file(tmp_path / "state-dict")["0.weight"].dtype == torch.bfloat16


def test_state_that_is_no_tensor(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ato.ExportError, match="_extra_state of its state_dict is a dict"):
        ato.export(Extra(4, 3), (torch.randn(2, 4),), tmp_path / "a", format="state-dict")


def test_an_output_that_shows_nothing(tmp_path):
    model = Forward(lambda parts, x: parts["fc"](x) / 0.0 * 0.0, fc=nn.Linear(4, 3))
    with pytest.raises(ato.ExportError, match="not finite, which shows nothing"):
        ato.export(model, (torch.randn(2, 4),), tmp_path / "a", format="torch-export")
    silent = Forward(lambda parts, x: None)
    with pytest.raises(ato.ExportError, match="returns no tensor"):
        ato.export(silent, (X,), tmp_path / "a", format="torch-export")


def test_weights_that_no_onnx_file_holds(small, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["ato_fast.export"], "ONNX_BYTES", 1000)
    with pytest.raises(ato.ExportError, match=r"\d+ bytes of weights do not fit"):
        ato.export(small, (X,), tmp_path / "a")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(small, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    text = rf"format onnx needs {package}: pip install 'ato-fast\[export\]'"
    with pytest.raises(ato.ExportError, match=text):
        ato.export(small, (X,), tmp_path / "a")
    assert ato.export(small, (X,), tmp_path / "b", format="torch-export").rel_err == 0


def test_without_onnxruntime_the_report_says_that_nothing_was_compared(
    small, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match="not compared, onnxruntime is not installed"):
        report = ato.export(small, (X,), tmp_path / "a")
    assert report.rel_err is None and report.batches == ()
    assert "not compared: onnxruntime is not installed: pip install" in str(report)
    monkeypatch.undo()
    assert run_onnx(report.path, OTHER)[0].shape == (7, 5)


BAD = {
    "format": (lambda m, p: ato.export(m, (X,), p, format="tflite"), ValueError, "format: expec"),
    "opset": (lambda m, p: ato.export(m, (X,), p, "state-dict", opset=18), ValueError, "opset: "),
    "tensor": (lambda m, p: ato.export(m, X, p), TypeError, "expected a tuple of tensors"),
    "empty": (lambda m, p: ato.export(m, (), p), TypeError, "expected a tuple of tensors"),
    "entry": (lambda m, p: ato.export(m, (X, 3), p), TypeError, r"example_inputs\[1\]: expec"),
    "batch": (lambda m, p: ato.export(m, (X, X[:1]), p), ValueError, "the same first dimension"),
    "scalar": (lambda m, p: ato.export(m, (torch.ones(()),), p), ValueError, "the same first dim"),
    "none": (lambda m, p: ato.export(m, (X[:0],), p), ValueError, "the batch, of at least 1"),
    "folder": (lambda m, p: ato.export(m, (X,), p.parent), ValueError, "path: expected a file"),
    "module": (lambda m, p: ato.export(m.forward, (X,), p), TypeError, "expected a torch.nn.Mod"),
    "wrapped": (lambda m, p: ato.export(nn.DataParallel(m), (X,), p), TypeError, "plain module"),
}


@pytest.mark.parametrize("call, kind, message", BAD.values(), ids=BAD)
def test_bad_arguments(small, tmp_path, call, kind, message):
    with pytest.raises(kind, match=message):
        call(small, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_no_warning_of_ours_or_torch(small, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("torch-export", "state-dict"):
            ato.export(small, (X,), tmp_path / name, format=name)
