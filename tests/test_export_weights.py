"""Exports of networks that compute their weights, and of zeros that a runtime would lose."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import ato_fast as ato
from ato_fast.export import LIMITS
from ato_fast.fold import fold_weights
from nets import Forward, Plain, randomise_norms

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

GRAPHS = ("onnx", "torch-export")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0 and variance 1 per output channel."""

    def forward(self, x):
        return F.conv2d(x, self.standardised(), self.bias, padding=self.padding)

    def standardised(self):
        flat = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(flat, None, None, training=True, eps=1e-6).reshape_as(self.weight)


class Scaled(Standardised):
    """The same by hand, with a gain per output channel."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def standardised(self):
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return (self.weight - mean) * torch.rsqrt(var + 1e-6) * self.gain


def built(make):
    torch.manual_seed(0)
    inner = make(8, 6, 3, padding=1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), inner, nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))


def weight_norm(*args, **kwargs):
    return parametrizations.weight_norm(nn.Conv2d(*args, **kwargs))


def spectral_norm(*args, **kwargs):
    return parametrizations.spectral_norm(nn.Conv2d(*args, **kwargs))


def content(path):
    """Names of the operations of a file, and how many numbers it holds."""
    if path.name == "onnx":
        graph = onnx.load(path).graph
        sizes = [math.prod(entry.dims) for entry in graph.initializer]
        return [node.op_type for node in graph.node], sum(sizes)
    program = torch.export.load(path)
    tensors = [*program.state_dict.values(), *program.constants.values()]
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return called, sum(t.numel() for t in tensors)


@pytest.mark.parametrize("make", [Standardised, Scaled, weight_norm, spectral_norm])
def test_computed_weights_are_constants(tmp_path, make):
    model, plain = built(make).eval(), built(nn.Conv2d).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Gains and singular vectors stay in archives.
    more = sum(t.numel() for t in before.values()) - sum(p.numel() for p in plain.parameters())
    for name in GRAPHS:
        report = ato.export(model, (X,), tmp_path / "new" / name, name)
        ato.export(plain, (X,), tmp_path / name, name)
        called, size = content(tmp_path / name)
        assert content(report.path) == (called, size + more * (name == "torch-export"))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    state = torch.export.load(tmp_path / "new" / "torch-export").state_dict
    assert {name: t.shape for name, t in state.items()} == {n: t.shape for n, t in before.items()}
    if make is Standardised:
        assert torch.equal(state["1.weight"], model[1].standardised())


def folded(model, x):
    """The program of ``model`` after folding, and its graph and state before."""
    program = torch.export.export(model.eval(), (x,))
    before = str(program.graph), dict(program.state_dict)
    fold_weights(program)
    return program, before


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("scale", torch.ones(4, 4))


class Counts(Buffers):
    """A weight that changes from call to call."""

    def forward(self, x):
        self.scale.add_(1)
        return x @ (self.weight / self.scale)


class CountsByView(Buffers):
    def forward(self, x):
        weight = self.weight / self.scale
        self.scale.view(-1)[:3].add_(1)
        return x @ weight


class Draws(Buffers):
    def forward(self, x):
        return x @ (self.weight + torch.rand_like(self.weight))


class Twice(Buffers):
    """The weight also serves as it is."""

    def forward(self, x):
        return (x @ self.weight) @ (2 * self.weight)


class Apart(Buffers):
    """Two weights of one parameter."""

    def forward(self, x):
        return (x @ (self.weight + 1)) @ (2 * self.weight)


class Grows(Buffers):
    def forward(self, x):
        return torch.cat([x, x], 1) @ torch.cat([self.weight, self.weight])


NOT_FOLDED = (Counts, CountsByView, Draws, Twice, Apart, Grows)


@pytest.mark.parametrize("make", [Plain, *NOT_FOLDED], ids=lambda make: make.__name__)
def test_what_has_no_such_weights_stays_as_it_is(make):
    model = make()
    x = X if make is Plain else torch.randn(2, 4)
    program, (graph, state) = folded(model, x)
    assert str(program.graph) == graph
    assert all(program.state_dict[name] is tensor for name, tensor in state.items())


def test_a_file_without_such_weights_is_the_same_to_the_byte(tmp_path, monkeypatch):
    model = randomise_norms(Plain())
    for name in GRAPHS:
        ato.export(model, (X,), tmp_path / name, name)
    monkeypatch.setattr(sys.modules["ato_fast.export"], "fold_weights", lambda program: None)
    for name in GRAPHS:
        ato.export(model, (X,), tmp_path / "again", name)
        assert (tmp_path / "again").read_bytes() == (tmp_path / name).read_bytes()


def test_a_tied_weight_is_replaced_under_each_of_its_names():
    def forward(parts, x):
        weight = parts["a"].weight.tanh()
        return F.linear(F.linear(x, weight, parts["a"].bias), weight, parts["b"].bias)

    model = Forward(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.parts["b"].weight = model.parts["a"].weight
    x = torch.randn(2, 4)
    program, (_, state) = folded(model, x)
    weights = [program.state_dict[f"parts.{name}.weight"] for name in "ab"]
    assert weights[0] is weights[1] is not state["parts.a.weight"]
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("value", [(), ("constant",), ("constant", 0.0)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_zero_padding_before_max_pooling_keeps_its_zeros(tmp_path, dims, value):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 4, 1)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]

    def forward(parts, x):
        # All below 0, so that the padding is the largest of its windows.
        below = -parts["conv"](x).abs() - 1
        return pool(F.pad(below, (1, 1) * dims, *value), 3, 2)

    model, x = Forward(forward, conv=conv), torch.randn(2, 2, *(7, 6, 5)[:dims])
    assert (model(x) == 0).any()
    report = ato.export(model, (x,), tmp_path / "a")
    assert report.rel_err <= LIMITS["onnx"]
    assert {"Pad", "MaxPool"} <= {node.op_type for node in onnx.load(report.path).graph.node}
