"""Training mode, and what tracing leaves behind."""

import pytest
import torch
from torch import nn

import ato_fast as ato
from nets import Plain, random_mask
from tracing import X, gates_of, reason, slices


class Modes(nn.Module):
    """Does something else in training."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h, g = self.a(x).relu(), self.b(x).relu()
        if self.training and self.kind == "swap":
            h, g = g, h
        if self.kind == "features" and self.training:
            return self.c(h), h
        if self.kind == "width" and self.training:
            return self.c(h * h.shape[1] ** -0.5)
        if self.kind == "fixed" and self.training:
            return self.c(h.reshape(-1, 8))
        return self.c(h) + g.sum()


@pytest.mark.parametrize("kind", ["features", "width", "fixed"])
def test_training_is_judged_too(kind):
    layout = ato.trace(Modes(kind), (torch.randn(4, 6),))
    assert "a" not in gates_of(layout)


def test_labels_follow_values_not_shapes_in_training():
    """In training b's channels meet c's columns, so both are one gate, in evaluation only a's."""
    layout = ato.trace(Modes("swap"), (torch.randn(4, 6),))
    cut = {s.tensor for s in layout.gate("a").slices}
    assert "b.weight" in cut


def test_random_generators_and_the_model_are_left_alone():
    import random

    import numpy as np

    class Noisy(Plain):
        def forward(self, x):
            random.random(), np.random.rand(), torch.rand(1)
            self.last = super().forward(x)
            return self.last

    model = Noisy()
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    ato.trace(model, (X,))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not hasattr(model, "last")
    model(X)
    ato.trace(model, (X,))
    layout = ato.trace(model, (X,))
    assert layout.verify(model, (X,)).ok


def test_training_only_heads_are_seen():
    class Auxiliary(Plain):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(8, 5)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            y = self.a(x)
            out = self.head(self.b(y).mean((2, 3)))
            return (out, self.extra(y.mean((2, 3)))) if self.training else out

    model = Auxiliary()
    layout = ato.trace(model, (X,))
    assert ("extra.weight", 1, "input", False) in slices(layout, "a.0")
    assert reason(layout, "unused.weight") == "not used in the forward pass"
    small = ato.shrink(model, layout, random_mask(layout)).train()
    assert [y.shape for y in small(X)] == [(2, 5), (2, 5)]


def test_training_mode_that_cannot_be_captured_is_not_fatal():
    class Moody(Plain):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(8, 5)

        def forward(self, x):
            if self.training and x.sum() > 0:
                return self.extra(self.a(x).mean((2, 3)))
            return super().forward(x)

    with pytest.warns(UserWarning, match="training mode was not captured"):
        layout = ato.trace(Moody(), (X.abs(),))
    assert gates_of(layout) == {"b.0": 12}
    assert "training mode was not captured" in reason(layout, "extra.weight")
