"""Operations the tracer does not know: rules of one's own, and gates declared by hand."""

import pytest
import torch
from torch import nn

import ato_fast as ato
from ato_fast import rules
from nets import Forward, conv_bn_relu
from tracing import X, assert_exact, gates_of, reason


@torch.library.custom_op("ato_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@double.register_fake
def _(x):
    return torch.empty_like(x)


double.register_autograd(lambda context, grad: 2 * grad)


@pytest.fixture
def model():
    return Forward(
        lambda m, x: m["c"](double(m["a"](x))).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip


MIDDLE = [
    ("parts.a.0.weight", 0), ("parts.a.1.weight", 0, "affine"), ("parts.a.1.bias", 0, "affine"),
    ("parts.a.1.running_mean", 0, "stat"), ("parts.a.1.running_var", 0, "stat"),
    ("parts.c.weight", 1),
]  # fmt: skip


def test_an_unknown_operation_is_named(model):
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {}
    assert "ato_tests::double is not known" in reason(layout, "parts.a.0.weight")


def test_a_rule_of_ones_own(model):
    @ato.rule("ato_tests::double")
    def _(labels, shapes, x):
        return x

    try:
        layout = ato.trace(model, (X,))
    finally:
        del rules.RULES["ato_tests::double"]
    assert gates_of(layout) == {"parts.a.0": 8}
    assert_exact(model, layout)


@pytest.mark.parametrize("replace", [False, True])
def test_rules_of_the_library_stay(replace):
    with pytest.raises(ValueError, match="rule: 'conv2d' already has a rule of the library's own"):
        ato.rule("conv2d", replace=replace)


def test_a_second_rule_has_to_say_so(model):
    try:
        ato.rule("ato_tests::double")(lambda labels, shapes, x: x.without_pins("a guess"))
        with pytest.raises(ValueError, match="already has a rule; replace=True replaces it"):
            ato.rule("ato_tests::double")
        assert "a guess" in reason(ato.trace(model, (X,)), "parts.a.0.weight")
        ato.rule("ato_tests::double", replace=True)(lambda labels, shapes, x: x)
        assert gates_of(ato.trace(model, (X,))) == {"parts.a.0": 8}
    finally:
        del rules.RULES["ato_tests::double"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("reluu", "did you mean 'relu'"),
        ("relu_", "did you mean 'relu'"),
        ("aten::relu", "did you mean 'relu'"),
        ("relu.default", "did you mean 'relu'"),
        ("nothing_like_this_at_all", "ATen has none like it"),
        ("ato_tests::dubble", "register or import it before its rule"),
    ],
)
def test_a_rule_for_nothing(name, hint):
    with pytest.raises(ValueError, match=f"rule: no operation is called '{name}'; {hint}"):
        ato.rule(name)
    assert name not in rules.RULES


def test_a_wrong_rule_is_found_out(model):
    """It says that channels stay where they are, but the operation reverses them."""

    @torch.library.custom_op("ato_tests::turn", mutates_args=())
    def turn(x: torch.Tensor) -> torch.Tensor:
        return x.flip(1)

    turn.register_fake(torch.empty_like)
    ato.rule("ato_tests::turn")(lambda labels, shapes, x: x)
    wrong = Forward(
        lambda m, x: m["c"](turn(m["a"](x))).mean((2, 3)),
        a=conv_bn_relu(3, 8), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    try:
        layout = ato.trace(wrong, (X,))
    finally:
        del rules.RULES["ato_tests::turn"]
    assert gates_of(layout) == {}


def test_a_declared_gate(model):
    layout = ato.trace(model, (X,), gates={"middle": MIDDLE})
    assert gates_of(layout) == {"middle": 8}
    roles = {s.tensor: (s.role, s.gated) for s in layout.gate("middle").slices}
    assert roles["parts.a.0.weight"] == ("row", False)
    assert roles["parts.a.1.bias"] == ("affine", True)
    assert roles["parts.c.weight"] == ("input", False)
    assert layout.macs(torch.arange(8) < 4) == 64 * (27 * 4 + 4 * 4)
    assert_exact(model, layout)
    assert layout.verify(model, (X,)).ok


def test_a_declared_gate_takes_the_place_of_a_found_one():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    mine = {"mine": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]}
    assert gates_of(ato.trace(model, (x,), gates=mine)) == {"mine": 8}


@pytest.mark.parametrize(
    ("gates", "error", "words"),
    [
        ({"m": MIDDLE[:1] + MIDDLE[-1:]}, ValueError, "'m' does not shrink exactly"),
        ({"m": [("nothing.weight", 0)]}, ValueError, "'nothing.weight', which the model lacks"),
        ({"m": [("parts.a.0.weight", 7)]}, ValueError, "expected a dimension of .* got 7"),
        ({"m": [("parts.a.0.weight", 0, "rows")]}, ValueError, "expected a role of"),
        ({"m": [("parts.a.0.weight", 0), ("parts.c.weight", 0)]}, ValueError, "one common size"),
        ({"m": [("parts.c.weight", 1)]}, ValueError, "no slice produces its channels"),
        ({"m": ["parts.a.0.weight"]}, TypeError, "expected \\(tensor, dim\\)"),
        ({"m": MIDDLE, "n": MIDDLE}, ValueError, "is in 'm' and in 'n'"),
        ([("parts.a.0.weight", 0)], TypeError, "expected a dict of name to slices"),
    ],
)
def test_bad_declarations(model, gates, error, words):
    with pytest.raises(error, match=words):
        ato.trace(model, (X,), gates=gates)


class Hard(nn.Module):
    """A width in a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn_relu(3, 8), conv_bn_relu(8, 6)
        self.head = nn.Linear(6 * 64, 5)

    def forward(self, x):
        return self.head(self.b(self.a(x)).view(-1, 6 * 64))


def test_what_python_hard_codes_shrinks_as_a_graph():
    model = Hard()
    assert gates_of(ato.trace(model, (X,))) == {"a.0": 8}
    layout = ato.trace(model, (X,), as_graph=True)
    assert gates_of(layout) == {"a.0": 8, "b.0": 6}
    mask = torch.arange(14) % 2 == 0
    with pytest.raises(ValueError, match=r"its gates need shrink\(..., as_graph=True\)"):
        ato.shrink(model, layout, mask)
    ato.zero_(model, layout, mask)
    small = ato.shrink(model, layout, mask, as_graph=True)
    assert isinstance(small, torch.fx.GraphModule)
    assert sum(p.numel() for p in small.parameters()) == layout.params(mask)
    assert torch.allclose(small(X), model.eval()(X), atol=1e-5)
    assert layout.verify(model, (X,)).ok


def test_a_graph_takes_every_layout_and_todays_weights():
    model = Hard()
    layout = ato.trace(model, (X,))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    mask = torch.arange(8) % 2 == 0
    ato.zero_(model, layout, mask)
    small = ato.shrink(model, layout, mask, as_graph=True)
    expected = ato.shrink(model, layout, mask).eval()(X)
    assert torch.allclose(small(X), expected, atol=1e-6)
    dense = {id(p) for p in model.parameters()}
    assert not any(id(p) in dense for p in small.parameters())


def test_verify_names_what_fails():
    class Counting(nn.Module):
        """Divides by its width, which no shrinking can follow."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn_relu(3, 8), conv_bn_relu(8, 6)
            self.c = nn.Conv2d(6, 4, 1)

        def forward(self, x):
            y = self.b(self.a(x))
            return self.c(y / (y.shape[1] if self.divide else 6)).mean((2, 3))

    model = Counting()
    model.divide = False
    layout = ato.trace(model, (X,))
    assert gates_of(layout) == {"a.0": 8, "b.0": 6}
    good = layout.verify(model, (X,))
    assert good.ok and 0 <= good.output_error <= 1e-5 and good.gradient_error <= 1e-4
    model.divide = True
    bad = layout.verify(model, (X,))
    assert not bad.ok and [f.gate for f in bad.failures] == ["b.0"]
    assert "c.weight dim 1 (input)" in str(bad)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"example_inputs": X}, TypeError, "example_inputs: expected a tuple"),
        ({"example_inputs": ()}, ValueError, "example_inputs: Hard does not run .* of shape none"),
        ({"example_inputs": (X[:, :2],)}, ValueError, r"run with tensors of shape \(2, 2, 8, 8\)"),
        ({"example_inputs": (X, X)}, ValueError, "example_inputs: Hard does not run .* TypeError"),
        ({"example_inputs": (X,), "kwargs": [1]}, TypeError, "kwargs: expected a dict, got list"),
        ({"example_inputs": (X,), "model": 5}, TypeError, "model: expected a torch.nn.Module"),
    ],
)
def test_verify_with_wrong_inputs(arguments, error, words):
    layout = ato.trace(Hard(), (X,))
    with pytest.raises(error, match=words):
        layout.verify(**{"model": Hard(), **arguments})


def test_a_graph_is_verified_at_its_own_shapes():
    layout = ato.trace(Hard(), (X,), as_graph=True)
    with pytest.raises(ValueError, match=r"traced with alone, expected \(2, 3, 8, 8\), got \(1, 3"):
        layout.verify(Hard(), (X[:1],))
