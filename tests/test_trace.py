"""Tracing: which channels go together, what keeps zero and what does not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ato_fast as ato
from nets import Forward, Plain, Residual, conv_bn_relu
from tracing import X, assert_exact, gates_of, reason, slices


def test_plain_net_has_a_gate_per_convolution():
    layout = ato.trace(Plain(), (X,))
    assert gates_of(layout) == {"a.0": 8, "b.0": 12}
    assert slices(layout, "a.0") == {
        ("a.0.weight", 0, "row", False),
        ("a.1.weight", 0, "affine", True),
        ("a.1.bias", 0, "affine", True),
        ("a.1.running_mean", 0, "stat", False),
        ("a.1.running_var", 0, "stat", False),
        ("b.0.weight", 1, "input", False),
    }
    assert_exact(Plain(), layout)


def test_scopes_of_a_residual_block():
    model = Residual()
    inner = ato.trace(model, (X,))
    assert gates_of(inner) == {"inner.0": 6}
    assert "residual add" in reason(inner, "stem.0.weight")
    everything = ato.trace(model, (X,), scope="all")
    assert gates_of(everything) == {"stem.0": 8, "inner.0": 6}
    coupled = {s.tensor for s in everything.gate("stem.0").slices if s.role == "row"}
    assert coupled == {"stem.0.weight", "outer.0.weight"}
    assert everything.gate("stem.0").residual and not everything.gate("inner.0").residual
    assert_exact(model, inner)
    assert_exact(model, everything)


def test_every_parameter_is_in_a_group_or_has_a_reason():
    for scope in ("inner", "all"):
        layout = ato.trace(Residual(), (X,), scope=scope)
        grouped = {s.tensor for g in layout for s in g.slices if s.in_group}
        left = {entry.tensor for entry in layout.unprunable}
        assert grouped | left == set(layout.parameters)
        assert not grouped & left
        assert all(entry.reason for entry in layout.unprunable)


def test_bias_without_norm_is_gated_at_the_rows():
    model = Forward(
        lambda m, x: m["c"](torch.relu(m["a"](x))).mean((2, 3)),
        a=nn.Conv2d(3, 8, 3), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert slices(layout, "parts.a") == {
        ("parts.a.weight", 0, "row", True),
        ("parts.a.bias", 0, "row", True),
        ("parts.c.weight", 1, "input", False),
    }
    assert_exact(model, layout)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_goes_with_its_input(multiplier):
    model = Forward(
        lambda m, x: m["project"](m["depthwise"](m["expand"](x))).mean((2, 3)),
        expand=conv_bn_relu(3, 8),
        depthwise=conv_bn_relu(8, 8 * multiplier, groups=8),
        project=nn.Conv2d(8 * multiplier, 4, 1),
    )
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.expand.0": 8}
    channels = next(
        s.channels for s in layout.gates[0].slices if s.tensor == "parts.depthwise.0.weight"
    )
    assert channels.tolist() == [c for c in range(8) for _ in range(multiplier)]
    gated = {s.tensor for s in layout.gates[0].slices if s.gated}
    assert {"parts.expand.1.weight", "parts.depthwise.1.weight"} <= gated
    assert_exact(model, layout)


@pytest.mark.parametrize(("width", "groups"), [(12, 6), (12, 2), (12, 3), (12, 4)])
def test_grouped_convolution(width, groups):
    model = Forward(
        lambda m, x: m["c"](m["b"](m["a"](x))).mean((2, 3)),
        a=conv_bn_relu(3, width), b=conv_bn_relu(width, 2 * width, groups=groups),
        c=nn.Conv2d(2 * width, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    per_group = width // groups
    if groups >= per_group:
        assert gates_of(layout) == {"parts.a.0": groups}
    else:
        assert gates_of(layout) == {"parts.a.0": per_group, "parts.b.0": 2 * width // groups}
    assert_exact(model, layout, seeds=range(4))


def test_grouped_convolution_keeps_its_groups_when_only_rows_go():
    """Half of the rows of every group is as many rows as one whole group."""
    model = Forward(
        lambda m, x: m["c"](m["b"](m["a"](x))).mean((2, 3)),
        a=conv_bn_relu(3, 8), b=conv_bn_relu(8, 8, groups=2), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    mask = torch.ones(layout.n_groups, dtype=torch.bool)
    mask[layout.gate("parts.b.0").offset + 1 : layout.gate("parts.b.0").offset + 3] = False
    small = ato.shrink(model, layout, mask)
    conv = small.parts["b"][0]
    assert (conv.groups, conv.in_channels, conv.out_channels) == (2, 8, 4)
    assert small(X).shape == (2, 4)


def test_one_channel_convolution_is_not_depthwise():
    model = Forward(
        lambda m, x: m["c"](m["a"](x)).mean((2, 3)),
        a=conv_bn_relu(1, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X[:, :1],))
    assert gates_of(layout) == {"parts.a.0": 8}
    assert_exact(model, layout, X[:, :1])


def test_concat_keeps_producers_apart():
    model = Forward(
        lambda m, x: m["c"](torch.cat([m["a"](x), x, m["b"](x)], 1)).mean((2, 3)),
        a=conv_bn_relu(3, 4), b=conv_bn_relu(3, 6), c=nn.Conv2d(13, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.a.0": 4, "parts.b.0": 6}
    reads = next(s for s in layout.gate("parts.b.0").slices if s.role == "input")
    assert reads.channels.tolist() == [-1] * 7 + list(range(6))
    assert_exact(model, layout)


def test_flatten_to_linear_repeats_channels():
    model = Forward(
        lambda m, x: m["head"](torch.flatten(m["a"](x), 1)),
        a=conv_bn_relu(3, 4), head=nn.Linear(4 * 64, 5),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    reads = next(s for s in layout.gates[0].slices if s.role == "input")
    assert reads.channels.tolist() == [c for c in range(4) for _ in range(64)]
    assert_exact(model, layout)


def test_dense_block_norms_belong_to_their_producers():
    model = Forward(
        lambda m, x: m["c"](m["norm"](torch.cat([m["a"](x), m["b"](x)], 1)).relu()).mean((2, 3)),
        a=nn.Conv2d(3, 4, 1, bias=False), b=nn.Conv2d(3, 6, 1, bias=False),
        norm=nn.BatchNorm2d(10), c=nn.Conv2d(10, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    affine = next(s for s in layout.gate("parts.b").slices if s.tensor == "parts.norm.weight")
    assert affine.gated and affine.channels.tolist() == [-1] * 4 + list(range(6))
    assert_exact(model, layout)


def test_squeeze_excite_follows_its_channels():
    model = Forward(
        lambda m, x: m["c"]((y := m["a"](x)) * torch.sigmoid(
            m["up"](torch.relu(m["down"](y.mean((2, 3), keepdim=True)))))).mean((2, 3)),
        a=conv_bn_relu(3, 8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1),
        c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.a.0": 8, "parts.down": 4}
    up = next(s for s in layout.gate("parts.a.0").slices if s.tensor == "parts.up.weight")
    assert up.role == "row" and not up.gated
    assert_exact(model, layout)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (torch.sigmoid, "sigmoid"),
        (lambda y: y + 1, "adding 1"),
        (lambda y: torch.clamp(y, 0.5, 2.0), "clamp to"),
        (lambda y: F.pad(y, (1, 1, 1, 1), value=2.0), "padding with 2"),
        (lambda y: torch.sort(y, dim=1)[0], "sort"),
        (lambda y: torch.softmax(y, 1), "softmax"),
        (lambda y: y.roll(1, 1), "roll"),
        (lambda y: y[:, torch.arange(8).flip(0)], "index"),
        (lambda y: y.cumsum(1), "cumsum"),
        (lambda y: y / y.abs(), "divided by a value that is zero with the group"),
        (lambda y: y + torch.ones(8, 1, 1), "whose channels stay"),
        (lambda y: F.group_norm(y, 2), "depends on this number of channels"),
        (lambda y: y.sqrt(), "sqrt"),
    ],
)
def test_what_does_not_keep_zero_is_unprunable(function, words):
    model = Forward(
        lambda m, x: m["c"](function(m["a"](x))).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {}
    assert words in reason(layout, "parts.a.0.weight")


@pytest.mark.parametrize(
    "function",
    [
        F.silu,
        F.gelu,
        torch.tanh,
        F.hardswish,
        F.relu6,
        lambda y: F.leaky_relu(y, 0.1),
        lambda y: y * 2 / 3,
        lambda y: F.max_pool2d(y, 2),
        lambda y: F.avg_pool2d(y, 2),
        lambda y: F.adaptive_avg_pool2d(y, 3),
        lambda y: F.adaptive_max_pool2d(y, 3),
        lambda y: F.pad(y, (1, 1, 1, 1)),
        lambda y: F.pad(y, (1, 1, 1, 1), "reflect"),
        lambda y: y * F.relu6(y + 3) / 6,
        lambda y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
        lambda y: y.transpose(1, 3).transpose(1, 3),
        lambda y: y.flatten(2).reshape(2, -1, 8, 8),
        lambda y: F.dropout(y, 0.5, False),
        lambda y: F.interpolate(y, scale_factor=2),
        lambda y: y.abs().pow(2),
        lambda y: y - 0.5 * y,
        lambda y: torch.clamp(y, -1, 1),
        lambda y: y.unsqueeze(1).squeeze(1),
        lambda y: y.contiguous().clone(),
    ],
)
def test_what_keeps_zero_is_prunable(function):
    model = Forward(
        lambda m, x: m["c"](function(m["a"](x))).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    ).eval()  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.a.0": 8}
    assert_exact(model, layout)


def test_channel_shuffle_couples_across_groups():
    def shuffle(y):
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    model = Forward(
        lambda m, x: m["c"](shuffle(m["a"](x))).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.a.0": 4}
    assert_exact(model, layout, seeds=range(4))
