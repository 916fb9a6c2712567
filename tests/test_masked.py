"""masked_bn_act on the CPU kernel and the reference; its contract as a torch op."""

import pytest
import torch
import torch.nn.functional as F
from masked_cases import DTYPES, SHAPES, channels, check, padded

from ato_fast import backend
from ato_fast.masked import ACTIVATIONS, masked_bn_act, masked_bn_act_ref
from numerics import assert_same_bits

FUNCTIONS = (lambda z: z, F.relu, F.relu6, F.hardswish, F.silu, F.gelu)


@pytest.fixture(params=["cpu", "reference"])
def served(request, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_the_reference(name, dtype, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    for activation in ACTIVATIONS:
        check(name, dtype, activation, "cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_is_what_autograd_finds(activation):
    """The reference against torch's own functions, and both against finite differences."""
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64).mul_(4).requires_grad_()
    gate, scale, shift = (t.double() for t in channels(4))
    gate.requires_grad_()
    y = masked_bn_act(x, gate, scale, shift, activation)
    scale4, shift4, gate4 = (t.view(1, -1, 1, 1) for t in (scale, shift, gate))
    expected = FUNCTIONS[ACTIVATIONS.index(activation)](x * scale4 + shift4) * gate4
    grad = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, gate), grad),
        torch.autograd.grad(expected, (x, gate), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, gate: masked_bn_act(x, gate, scale, shift, activation), (x, gate)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_contract_of_the_ops(layout, served):
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=getattr(torch, f"{layout}_format", None)
                                           or torch.channels_last)  # fmt: skip
    gate, scale, shift = channels(5)
    grad = torch.randn(2, 5, 3, 4)
    ops = torch.ops.ato_fast
    torch.library.opcheck(
        ops.masked_bn_act.default,
        (x.clone().requires_grad_(), gate.clone().requires_grad_(), scale, shift, 4),
    )
    torch.library.opcheck(ops.masked_bn_act_backward.default, (grad, x, gate, scale, shift, 4))


def test_what_comes_in_is_not_written_and_a_later_write_is_noticed(served):
    x, (gate, scale, shift) = torch.randn(2, 5, 6, requires_grad=True), channels(5)
    gate.requires_grad_()
    versions = [t._version for t in (x, gate, scale, shift)]
    work = x * 1
    y = masked_bn_act(work, gate, scale, shift)
    assert [t._version for t in (x, gate, scale, shift)] == versions
    work.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_x_is_kept():
    x, (gate, scale, shift) = torch.randn(4, 8, 16, requires_grad=True), channels(8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        masked_bn_act(x, gate.requires_grad_(), scale, shift, "silu")
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]


@pytest.mark.parametrize("name", ["rows", "channels_last", "short-rows"])
def test_same_bits_on_every_run_and_any_number_of_threads(name, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    shape = (64, *SHAPES[name][1:])
    x, _ = padded(shape, torch.float32, name.startswith("channels_last"))
    gate, scale, shift = channels(shape[1])
    gate.requires_grad_()
    x = x.repeat(2, *[1] * (x.dim() - 1)).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            y = masked_bn_act(x, gate, scale, shift, "silu")
            results.append((y.detach(), *torch.autograd.grad(y, (x, gate), y.detach())))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_same_bits(got, expected)


def test_a_gate_of_zero_gets_its_gradient(served):
    x, grad = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    gate = torch.zeros(2, requires_grad=True)
    scale, shift = torch.ones(2), torch.zeros(2)
    masked_bn_act(x, gate, scale, shift, "relu").backward(grad)
    torch.testing.assert_close(gate.grad, (grad * x.relu()).sum((0, 2)))
    assert (gate.grad != 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_are_not_finite(activation, served):
    values = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, -200.0, -0.0, 6.0, -3.0, 3.0]
    x = torch.tensor(values).view(-1, 1).requires_grad_()
    one = torch.ones(1)
    y = masked_bn_act(x, one, one, torch.zeros(1), activation)
    z = x.detach().requires_grad_()
    expected = FUNCTIONS[ACTIVATIONS.index(activation)](z)
    # Some of torch's own kernels have gelu(inf) = nan.
    same = slice(2, None) if activation == "gelu" else slice(None)
    torch.testing.assert_close(y[same], expected[same], equal_nan=True)
    assert y[0].isnan()
    # Where the function jumps to infinity or is undefined, so is its slope.
    inner = torch.arange(3, 8)
    (mine,), (theirs,) = (torch.autograd.grad(o.sum(), t) for o, t in ((y, x), (expected, z)))
    torch.testing.assert_close(mine[inner], theirs[inner], equal_nan=True)


@pytest.mark.parametrize("cut", [lambda t: t[:, :, ::2], lambda t: t.transpose(0, 1),
                                 lambda t: t[:, 1:], lambda t: t[:1].expand(6, 6, 6)])  # fmt: skip
def test_other_strides_are_copied(cut, served):
    x = cut(torch.randn(6, 6, 6)).requires_grad_()
    gate, scale, shift = channels(x.shape[1])
    grad = torch.randn(6, *x.shape[1:])[: len(x)].flip(2)
    results = []
    for value in (x, x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()):
        y = masked_bn_act(value, gate.requires_grad_(), scale, shift, "silu")
        results.append((y, *torch.autograd.grad(y, (value, gate), grad)))
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


def test_compiled(served):
    gate, scale, shift = channels(5)
    gate.requires_grad_()

    def function(x):
        return masked_bn_act(x.sin(), gate, scale, shift, "relu6").square()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-3, 3, 90).view(3, 5, 6).requires_grad_()
        y = call(x)
        results.append((y, *torch.autograd.grad(y.sum(), (x, gate))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def arguments(**changes):
    gate, scale, shift = channels(5)
    return {"x": torch.randn(2, 5, 3), "gate": gate, "scale": scale, "shift": shift, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "activation: expected one of .*got 'tanh'"),
        ({"x": torch.randn(5)}, r"x: expected \[N, C, \*spatial\], got shape \(5,\)"),
        ({"x": torch.zeros(2, 5, dtype=torch.int32)}, "x: expected float32.*got torch.int32"),
        ({"gate": torch.ones(4)}, r"gate: expected \[5\] of torch.float32.*got \[4\]"),
        ({"shift": torch.ones(5).double()}, "shift: expected .*float32.*got .*float64"),
        ({"x": torch.randn(2, 5).double()}, "gate: expected .*float64.*got .*float32"),
        ({"scale": torch.ones(5, requires_grad=True)}, "scale: expected a constant"),
        ({"shift": torch.ones(5, requires_grad=True)}, "shift: expected a constant"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        masked_bn_act(**arguments(**changes))


def test_the_op_itself_refuses_a_gradient_for_the_norm():
    values = list(arguments().values())
    values[2] = values[2].requires_grad_()
    with pytest.raises(ValueError, match="scale: expected a constant"):
        torch.ops.ato_fast.masked_bn_act(*values, 1)
    with torch.no_grad():
        masked_bn_act(*values)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation):
    gate, scale, shift = (value.double() for value in channels(3))
    x = torch.linspace(-4, 4, 24, dtype=torch.float64).view(2, 3, 4).requires_grad_()
    gate = gate.clone().requires_grad_()
    call = lambda x, gate: masked_bn_act(x, gate, scale, shift, activation)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (x, gate))
    # Against torch's own, one order higher.
    formula = lambda x, gate: masked_bn_act_ref(x, gate, scale, shift, 0, code)  # noqa: E731
    code = ACTIVATIONS.index(activation)
    results = []
    for function in (call, formula):
        value = function(x, gate).sin().sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, (x, gate), create_graph=True)
            value = sum(g.sin().sum() for g in gradients)
        results.append(gradients)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda", "there is no cuda kernel of masked_bn_act_kernel"),
        ("triton", "it needs CUDA tensors or TRITON_INTERPRET=1"),
    ],
)
def test_a_forced_backend_that_cannot_serve_raises(name, reason, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(backend.BackendError, match=reason):
        masked_bn_act(**arguments())


def test_a_forced_kernel_takes_no_float64(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    with pytest.raises(backend.BackendError, match="it takes tensors of float32, .*got .*float64"):
        masked_bn_act(**{k: v.double() for k, v in arguments().items()})
