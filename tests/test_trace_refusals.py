"""What the tracer refuses, sees twice or leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ato_fast as ato
from ato_fast.rules.elementwise import KEEPS_ZERO, LOSES_ZERO
from nets import Forward, Plain, Residual, conv_bn_relu, random_mask, randomise_norms
from tracing import X, assert_exact, gates_of, reason, slices


@pytest.mark.parametrize("order", [0, 1])
def test_grouped_convolution_shared_with_a_fixed_input(order):
    def forward(m, x):
        calls = [lambda: m["b"](m["a"](x)), lambda: m["b"](x)]
        first, second = calls[order](), calls[1 - order]()
        return m["c"](first + second).mean((2, 3))

    x = torch.randn(2, 8, 8, 8)
    model = Forward(
        forward, a=conv_bn_relu(8, 8), b=nn.Conv2d(8, 8, 3, padding=1, groups=2),
        c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (x,), scope="all")
    assert "parts.a.0" not in gates_of(layout)
    assert_exact(model, layout, x)


def test_tied_depthwise_weights_both_change_their_groups():
    model = Forward(
        lambda m, x: m["c"](m["e"](m["d"](m["a"](x)))).mean((2, 3)), a=conv_bn_relu(3, 8),
        d=nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),
        e=nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    model.parts["e"].weight = model.parts["d"].weight
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.a.0": 8}
    assert_exact(model, layout)


def test_a_buffer_read_outside_its_layer_is_refused():
    model = Forward(
        lambda m, x: m["c"](m["a"](x)).mean((2, 3)) + m["a"][1].running_var.sum(),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {}
    assert "running_var is a buffer" in reason(layout, "parts.a.0.weight")


@pytest.mark.parametrize("persistent", [True, False])
def test_a_convolution_whose_weight_is_a_buffer_is_refused(persistent):
    model = Forward(
        lambda m, x: m["c"](F.conv2d(m["a"](x), m["a"].blur, groups=8)).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    model.parts["a"].register_buffer("blur", torch.ones(8, 1, 3, 3) / 9, persistent=persistent)
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {}
    assert "is a buffer" in reason(layout, "parts.a.0.weight")


def test_training_mode_counts_even_if_every_parameter_is_used_in_evaluation():
    model = Forward(
        lambda m, x: m["c"](m["a"](x) + (1 if m.training else 0)).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model.eval(), (X,))
    assert "adding 1" in reason(layout, "parts.a.0.weight")


def test_a_model_that_keeps_an_activation_can_be_traced():
    """Old-style weight norm does so; a deep copy of such a module raises."""
    model = Plain()
    torch.nn.utils.weight_norm(model.head)
    model(X)
    layout = ato.trace(model, (X,))
    assert "a.0" in gates_of(layout) and layout.verify(model, (X,)).ok


def test_a_model_that_copies_share_is_refused():
    model = nn.Module()
    model.a, model.b = nn.Linear(6, 8), nn.Linear(8, 3)
    model.forward = lambda x: model.b(model.a(x).relu())
    with pytest.raises(ato.TraceError, match="still uses the original's parameters"):
        ato.trace(model, (torch.randn(4, 6),))


def test_prelu_slopes_follow_their_channels():
    model = Forward(
        lambda m, x: m["c"](m["p"](m["a"](x))).mean((2, 3)),
        a=nn.Conv2d(3, 8, 1), p=nn.PReLU(8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert ("parts.p.weight", 0, "affine", False) in slices(layout, "parts.a")
    assert_exact(model, layout)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda m, y: y + torch.sigmoid(y), "sigmoid"),
        (lambda m, y: torch.cat([y, torch.sigmoid(y)], 2), "sigmoid"),
        (lambda m, y: torch.cat([y, torch.ones(2, 8, 8, 8)], 2), "channels that are fixed"),
        (lambda m, y: torch.clamp_min(y, 0.5), "clamp to [0.5, None]"),
        (lambda m, y: torch.div(y - 1, 2, rounding_mode="floor"), "this division"),
        (
            lambda m, y: y.mean((2, 3))[:, :, None, None] + y.mean(1, keepdim=True),
            "a mean counts these",
        ),
        (lambda m, y: F.layer_norm(y, (8,), bias=torch.ones(8)), "LayerNorm shifts 0"),
        (
            lambda m, y: F.linear(y.mT.transpose(1, 3), torch.ones(8, 8)),
            "together with a size that is fixed",
        ),
    ],
)
def test_pins_and_places_that_are_lost(function, words):
    model = Forward(
        lambda m, x: m["c"](function(m, m["a"](x))).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {}
    assert words in reason(layout, "parts.a.0.weight")


def test_zero_stays_zero_or_not_as_the_rules_say():
    zero = torch.zeros(3)
    for name in KEEPS_ZERO:
        function = getattr(torch, name, None) or getattr(F, name, None)
        if function is not None and name not in ("dropout", "feature_dropout", "rrelu", "type_as"):
            assert torch.equal(function(zero), zero), name
    for name in LOSES_ZERO:
        function = getattr(torch, name, None) or getattr(F, name, None) or F.logsigmoid
        assert (function(zero) != 0).all(), name


def test_nested_inputs_and_missing_batch():
    class Nested(Plain):
        def forward(self, batch):
            return super().forward(batch["x"])

    assert ato.trace(Nested(), ({"x": X},)).macs() == ato.trace(Plain(), (X,)).macs()
    with pytest.raises(ValueError, match="example_inputs: expected a batch"):
        ato.trace(Forward(lambda m, x: m["c"](x), c=nn.Conv2d(3, 4, 1)), (X[0],))


def test_in_place_change_of_shape():
    model = Forward(
        lambda m, x: m["c"](m["a"](x).unsqueeze_(1).squeeze_(1)).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.a.0": 8}


def test_norm_without_affine_is_unprunable():
    model = Forward(
        lambda m, x: m["c"](m["n"](m["a"](x)).relu()).mean((2, 3)),
        a=nn.Conv2d(3, 8, 1), n=nn.BatchNorm2d(8, affine=False), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert "batch norm without affine" in reason(layout, "parts.a.weight")


def test_a_channel_read_twice_is_lost_where_one_reader_is():
    model = Forward(
        lambda m, x: (m["c"](y := m["a"](x)) + m["d"](torch.sigmoid(y))).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1), d=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {}
    assert "sigmoid(0) is not 0" in reason(layout, "parts.a.0.weight")


def test_in_place_operations_change_every_name_of_the_value():
    def forward(m, x):
        y = m["a"](x)
        y.add_(1)
        return m["c"](y).mean((2, 3))

    model = Forward(
        forward, a=nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), c=nn.Conv2d(8, 4, 1)
    )
    layout = ato.trace(model, (X,))
    assert "adding 1" in reason(layout, "parts.a.0.weight")


def test_in_place_through_a_view_is_refused():
    def forward(m, x):
        y = m["a"](x)
        y.flatten(1).add_(1)
        return m["c"](y).mean((2, 3))

    model = Forward(
        forward, a=nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), c=nn.Conv2d(8, 4, 1)
    )
    layout = ato.trace(model, (X,))
    assert "in place through a view" in reason(layout, "parts.a.0.weight")


def test_out_of_place_activation_leaves_its_input_alone():
    """hardtanh keeps channels and zero; the sum of both is still zero with the group."""
    model = Forward(
        lambda m, x: m["c"](F.hardtanh(y := m["a"](x)) + y).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.a.0": 8}
    assert_exact(model, layout)


def test_a_module_used_twice_joins_both_uses():
    model = Forward(
        lambda m, x: m["c"](m["b"](m["b"](m["a"](x)))).mean((2, 3)),
        a=conv_bn_relu(3, 8), b=conv_bn_relu(8, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.a.0": 8}
    assert_exact(model, layout)


def test_a_module_that_reads_fixed_and_free_channels_keeps_its_inputs():
    model = Forward(
        lambda m, x: m["c"](m["b"](m["a"](x)) + m["b"](x)).mean((2, 3)),
        a=conv_bn_relu(3, 3), b=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,), scope="all")
    assert gates_of(layout) == {"parts.b.0": 8}
    assert_exact(model, layout)


def test_weights_computed_in_the_forward_and_read_elsewhere_are_followed():
    """A sum over a weight does not see rows that are zero, so they may go."""
    model = Forward(
        lambda m, x: (m["c"](F.conv2d(m["a"](x), m["b"].weight * 2).relu()).mean((2, 3))
                      + m["a"][0].weight.sum()),
        a=conv_bn_relu(3, 8), b=nn.Conv2d(8, 6, 1, bias=False), c=nn.Conv2d(6, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"parts.a.0": 8, "parts.b": 6}
    assert layout.macs() == 64 * (27 * 8 + 8 * 6 + 6 * 4)
    assert layout.macs(torch.arange(14) % 2) == 64 * (27 * 4 + 4 * 3 + 3 * 4)
    assert_exact(model, layout)


def test_a_mean_over_a_weight_is_refused():
    model = Forward(
        lambda m, x: m["c"](m["a"](x)).mean((2, 3)) + m["a"][0].weight.mean(),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    assert gates_of(ato.trace(model, (X,))) == {}


def test_tied_weights():
    model = Forward(
        lambda m, x: m["c"](m["b"](m["a"](x)).relu()).mean((2, 3)),
        a=conv_bn_relu(3, 8), b=nn.Conv2d(8, 8, 1, bias=False), c=nn.Conv2d(8, 4, 1),
        twin=nn.Conv2d(8, 8, 1, bias=False),
    )  # fmt: skip
    model.parts["twin"].weight = model.parts["b"].weight
    layout = ato.trace(model, (X,))
    small = ato.shrink(model, layout, random_mask(layout))
    assert small.parts["twin"].weight is small.parts["b"].weight
    assert_exact(model, layout)


def test_unread_and_single_channels_are_left_out():
    model = Forward(
        lambda m, x: (m["c"](m["a"](x)).mean((2, 3)), m["dead"](x), None)[0],
        a=conv_bn_relu(3, 1), c=nn.Conv2d(1, 4, 1), dead=nn.Conv2d(3, 4, 1),
    )  # fmt: skip
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {}
    assert reason(layout, "parts.a.0.weight") == "it has a single channel"


def test_ignore_keeps_channels_whole():
    layout = ato.trace(Plain(), (X,), ignore=["a.*"])
    assert gates_of(layout) == {"b.0": 12}
    assert reason(layout, "a.0.weight") == "left out by ignore="
    with pytest.raises(ValueError, match="no module or parameter is called 'zzz'"):
        ato.trace(Plain(), (X,), ignore=["zzz"])
    with pytest.raises(TypeError, match="ignore: expected a list of names"):
        ato.trace(Plain(), (X,), ignore="a")


def test_tracing_leaves_the_model_alone():
    model = randomise_norms(Residual()).train()
    model.inner.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    ato.trace(model, (X,), scope="all")
    assert [m.training for m in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_linear_only_network():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 3))
    layout = ato.trace(model, (torch.randn(4, 6),))
    assert gates_of(layout) == {"0": 8, "2": 7}
    assert_exact(model, layout, torch.randn(4, 6))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_stay_and_are_counted(layer):
    model = Forward(
        lambda m, x: m["b"](m["r"](m["a"](x).relu())[0][:, -1]),
        a=nn.Linear(8, 16), r=layer(16, 6, num_layers=2, batch_first=True), b=nn.Linear(6, 3),
    )  # fmt: skip
    layout = ato.trace(model, (torch.randn(2, 5, 8),))
    assert gates_of(layout) == {}
    assert "recurrent layer" in reason(layout, "parts.r.weight_hh_l0")
    matrices = sum(p.numel() for p in model.parts["r"].parameters() if p.dim() == 2)
    assert layout.macs() == 5 * (8 * 16 + matrices) + 6 * 3


def test_a_reason_of_the_network_comes_before_ignore():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    layout = ato.trace(model, (torch.randn(4, 6),), ignore=["0"])
    assert "LayerNorm" in reason(layout, "0.weight")


def test_layer_norm_says_why():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    layout = ato.trace(model, (torch.randn(4, 6),))
    assert reason(layout, "0.weight") == "LayerNorm normalises over this dimension"
    assert reason(layout, "1.weight") == "LayerNorm normalises over this dimension"


def test_capture_failure_names_the_line():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            if x.sum() > 0:
                return self.a(x)
            return x

    where = r"test_trace_refusals\.py:\d+ in forward: if x\.sum\(\) > 0"
    where = rf"could not capture Branches(.|\n)*{where}"
    with pytest.raises(ato.TraceError, match=where):
        ato.trace(Branches(), (torch.randn(2, 3),))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"scope": "outer"}, ValueError, "scope: expected one of"),
        ({"model": "resnet50"}, TypeError, "model: expected a torch.nn.Module, got str"),
        ({"model": nn.DataParallel(Plain())}, TypeError, "pass model.module and wrap afterwards"),
        ({"example_inputs": X}, TypeError, "example_inputs: expected a tuple"),
        ({"ignore": 5}, TypeError, "ignore: expected a list of names, got 5"),
        ({"ignore": [5]}, TypeError, "ignore: expected a list of names"),
        ({"kwargs": [1]}, TypeError, "kwargs: expected a dict, got list"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        ato.trace(**{"model": Plain(), "example_inputs": (X,), **arguments})
