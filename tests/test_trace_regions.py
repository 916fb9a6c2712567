"""Regions of a graph: what ``with torch.autocast`` and ``with torch.enable_grad`` enclose."""

import pytest
import torch
from torch import nn

import ato_fast as ato
from ato_fast.probe import FullPrecision
from tracing import gates_of

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Regions(nn.Module):
    """Three layers, the first two inside of something."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.c, self.kind = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), kind

    def forward(self, x):
        if self.kind == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.b(self.a(x).relu().view(-1, 8)).relu_()
        elif self.kind == "nested":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.a(x).relu()
                with torch.autocast("cpu", enabled=False):
                    h = self.b(h.float().view(-1, 8)).relu()
        else:
            with torch.enable_grad():
                h = self.b(self.a(x).relu().view(-1, 8)).relu()
        return self.c(h.float())


@pytest.mark.parametrize("kind", ["autocast", "nested", "enable_grad"])
def test_gates_and_macs_inside_of_a_region(kind):
    """One of the layers has its width written into the forward pass."""
    model = Regions(kind).eval()
    assert gates_of(ato.trace(model, (X,))) == {"b": 8}
    layout = ato.trace(model, (X,), as_graph=True)
    assert gates_of(layout) == {"a": 8, "b": 8}
    assert layout.macs() == 6 * 8 + 8 * 8 + 8 * 3
    assert layout.verify(model, (X,)).ok
    mask = torch.arange(16) % 3 > 0
    ato.zero_(model, layout, mask)
    small = ato.shrink(model, layout, mask, as_graph=True)
    assert sum(p.numel() for p in small.parameters()) == layout.params(mask)
    with FullPrecision(), torch.no_grad():
        expected, got = model(X), small(X)
    assert (expected - got).abs().max() <= 1e-6 * expected.abs().max()
    # Half precision is still what the region computes in.
    assert torch.equal(small(X), got) == (kind == "enable_grad")


def test_a_change_in_place_inside_of_a_region_is_seen_outside():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x).relu()
            with torch.enable_grad():
                h.add_(1)
            return self.c(h)

    layout = ato.trace(Shifted(), (X,))
    assert gates_of(layout) == {}
    assert {u.tensor: u.reason for u in layout.unprunable}["a.weight"].endswith("adding 1")
