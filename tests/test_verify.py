"""Forward passes that depend on a width in ways the graph does not show."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ato_fast as ato
from nets import Forward, conv_bn_relu
from tracing import X, assert_exact, gates_of, reason


def shuffle(y, groups):
    n, c, h, w = y.shape
    return y.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def restore(m, y):
    b, c, h, w = y.shape
    return m["b"](y).flatten(2).relu().reshape(b, c, h, w)


@pytest.mark.parametrize("computed", [True, False])
def test_a_hard_coded_size_is_found_before_training(computed):
    def forward(m, x):
        y = m["b"](m["a"](x))
        return m["head"](y.view(-1, y.shape[1] * 64 if computed else 6 * 64))

    model = Forward(forward, a=conv_bn_relu(3, 8), b=conv_bn_relu(8, 6), head=nn.Linear(6 * 64, 5))
    layout = ato.trace(model, (X,))
    if computed:
        assert gates_of(layout) == {"parts.a.0": 8, "parts.b.0": 6}
    else:
        assert gates_of(layout) == {"parts.a.0": 8}
        assert "depends on this number of channels" in reason(layout, "parts.b.0.weight")
    assert_exact(model, layout)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: shuffle(y, 4),
        lambda m, y: y / y.shape[1] ** 0.5,
        lambda m, y: y.relu() if y.shape[1] >= 8 else y - 1 + 1,
        restore,
        lambda m, y: F.conv2d(y, m["d"].weight, groups=y.shape[1] // 1 if len(y) else 8),
        lambda m, y: torch.cat([y, y], 1).view(2, 4, -1, 8, 8).flatten(1, 2)[:, :8],
    ],
)
def test_a_forward_that_depends_on_the_width_is_never_offered_wrongly(function):
    """Whatever the graph shows, an offered gate shrinks exactly, also to a single channel."""
    model = Forward(
        lambda m, x: m["c"](function(m, m["a"](x))).mean((2, 3)),
        a=conv_bn_relu(3, 16),
        b=nn.Conv2d(16, 16, 1),
        d=nn.Conv2d(16, 16, 1, groups=16, bias=False),
        c=nn.LazyConv2d(4, 1),
    ).eval()
    model(X)
    layout = ato.trace(model, (X,))
    if layout.gates:
        assert_exact(model, layout, seeds=range(4))
    else:
        assert reason(layout, "parts.a.0.weight")


def test_squeeze_without_dims_is_tried_with_one_channel():
    model = Forward(
        lambda m, x: m["head"](F.adaptive_avg_pool2d(m["a"](x), 1).squeeze()),
        a=conv_bn_relu(3, 8), head=nn.Linear(8, 5),
    )  # fmt: skip
    assert gates_of(ato.trace(model, (X,))) == {}


def test_gates_that_fail_only_together_are_all_refused():
    def forward(m, x):
        y = torch.cat([m["a"](x), m["b"](x)], 1)
        assert y.shape[1] > 6
        return m["c"](y).mean((2, 3))

    model = Forward(forward, a=conv_bn_relu(3, 8), b=conv_bn_relu(3, 8), c=nn.Conv2d(16, 4, 1))
    assert gates_of(ato.trace(model, (X,))) == {}
