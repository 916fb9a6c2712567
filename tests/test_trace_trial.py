"""What the trial runs: few examples, one mode, single precision, and what decides."""

import pytest
import torch
from torch import nn

import ato_fast as ato
from ato_fast import walk
from ato_fast.standin import StandIn
from nets import Plain
from random_networks import build
from tracing import gates_of

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Noisy(nn.Module):
    """A block whose output training multiplies with noise of some kind."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.c, self.kind = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3), kind
        self.register_buffer("one", torch.full((6,), 1.5))
        self.register_buffer("other", torch.full((6,), 2.5))

    def forward(self, x):
        h = self.b(self.a(x).relu())
        if self.kind == "buffers":
            h = h * (self.other if self.training else self.one)
        elif self.kind == "written":
            gate = torch.empty(len(h), 1)
            gate[:] = h[:, :1]
            h = h * gate if self.training else h
        elif self.training and self.kind != "none":
            if self.kind == "per channel":
                noise = torch.empty(h.shape).bernoulli_(0.9)
            else:
                noise = torch.empty(len(h), 1).bernoulli_(0.9).div_(0.9)
            h = h + noise if self.kind == "added" else h * noise
        return self.c(x + h)


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [("none", 1), ("per example", 1), ("per channel", 2), ("written", 2), ("added", 2),
     ("buffers", 2)],
)  # fmt: skip
def test_training_has_its_own_graph_where_it_does_anything_else(kind, graphs, monkeypatch):
    """Stochastic depth, one number per example, leaves channels and zeros where they are."""
    captured = []

    def capture(*args, **kwargs):
        captured.append(args)
        return original(*args, **kwargs)

    original = walk.capture
    monkeypatch.setattr(walk, "capture", capture)
    layout = ato.trace(Noisy(kind), (X,))
    assert len(captured) == graphs
    assert gates_of(layout)["a"] == 8


def test_noise_of_a_fixed_size_is_tried():
    """Its size follows no width, so the smaller model of training does not run."""

    class Fixed(Noisy):
        def forward(self, x):
            h = self.a(x).relu().t()
            if self.training:
                h = h * torch.empty(8, 1).bernoulli_(0.9)
            return self.c(x + self.b(h.t()))

    assert gates_of(ato.trace(Fixed("none"), (X,))) == {}


def test_few_examples_are_enough():
    x = torch.randn(32, 3, 64, 64)
    assert StandIn(Plain(), (x,), {}, 32).args[0].shape == (21, 3, 64, 64)
    assert StandIn(Plain(), (x[:, :, :8],), {}, 32).args[0].shape == (32, 3, 8, 64)
    layouts = [ato.trace(Plain(), (y,)) for y in (x, x[:2])]
    assert layouts[0].sha256 == layouts[1].sha256
    assert layouts[0].macs() == layouts[1].macs()


@pytest.mark.parametrize("shape", [(32, -1), (1, -1)])
def test_a_batch_that_is_written_down_or_mixed_stays(shape):
    class Fixed(Plain):
        def forward(self, x):
            return super().forward(x).reshape(shape)

    dense = StandIn(Fixed(), (torch.randn(32, 3, 64, 64),), {}, 32)
    assert dense.args[0].shape[0] == 32


class Counted(nn.Module):
    """Every channel adds a little, which no operation of the graph shows."""

    def __init__(self, little):
        super().__init__()
        self.a, self.c, self.little = nn.Linear(6, 8), nn.Linear(8, 3), little

    def forward(self, x):
        h = self.a(x).relu()
        return self.c(h) * (1 + self.little * torch.ones(h.shape[1]).sum())


@pytest.mark.parametrize(("little", "gates"), [(0.0, {"a": 8}), (1.5e-6, {}), (1e-3, {})])
def test_a_small_error_is_not_taken_for_rounding(little, gates):
    """1.5e-6 of the output a channel is less than single precision is trusted with."""
    assert gates_of(ato.trace(Counted(little), (X,))) == gates


def test_rounding_is_not_taken_for_an_error():
    """Single precision loses four digits here, so double precision decides."""

    class Cancelling(Counted):
        def forward(self, x):
            return (self.c(self.a(x).relu()) + 1e3) - 1e3

    assert gates_of(ato.trace(Cancelling(0.0), (X,))) == {"a": 8}


def test_one_gate_does_not_hide_what_is_wrong_with_another():
    """Some random values let nothing of the first gate through the ReLU behind the second."""
    model, inputs = build(1771848, 5)
    assert gates_of(ato.trace(model, inputs, scope="all")) == {"heads.0.1": 12}
