"""The GRU in one op against nn.GRU: reference, CPU kernel, and the controller that uses it."""

import pytest
import torch
from torch import nn

from ato_fast import backend, gru
from ato_fast.controller import Controller
from numerics import assert_all_as_accurate, assert_same_bits

# Steps, inputs, hidden units: below, at and beyond the widths of tiles, and the controller's.
SIZES = [
    (1, 1, 1),
    (1, 64, 128),
    (2, 3, 5),
    (5, 31, 32),
    (7, 33, 37),
    (33, 64, 128),
    (32, 65, 127),
    (20, 129, 129),
    (3, 5, 160),
    (257, 12, 20),
]
WEIGHTS = [name for name, _ in nn.GRU(1, 1, bidirectional=True).named_parameters()]


def problem(sizes, scale=1.0, seed=0):
    """A GRU, and a source and a gradient of its states, cut out of buffers of NaN."""
    n_steps, inputs, hidden = sizes
    torch.manual_seed(seed)
    model = nn.GRU(inputs, hidden, bidirectional=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    source, grad = torch.randn(n_steps, inputs), torch.randn(n_steps, 2 * hidden)
    return model, cut_out(source), cut_out(grad)


def cut_out(values):
    buffer = torch.full((values.numel() + 38,), float("nan"))
    view = buffer[19:-19].view(values.shape)
    return view.copy_(values)


def of_torch(model, source, grad):
    """States and gradients of nn.GRU, by name."""
    states = model(source[:, None])[0].squeeze(1)
    found = torch.autograd.grad(states, list(model.parameters()), grad)
    return named(states.detach(), found)


def of_op(model, source, grad):
    weights = [cut_out(w.detach()) if w.dtype == torch.float32 else w for w in model.parameters()]
    weights = [weight.detach().requires_grad_() for weight in weights]
    states = gru.bi_gru(source, weights)
    return named(states.detach(), torch.autograd.grad(states, weights, grad))


def named(states, grads):
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"] * 2
    found = {f"{n}:{kind}": g for n, kind, g in zip(WEIGHTS, kinds, grads, strict=True)}
    return {"states:states": states, **found}


@pytest.mark.parametrize("sizes", SIZES)
def test_the_reference_is_torchs_gru(sizes):
    model, source, grad = problem(sizes)
    arguments = model.double(), source.double(), grad.double()
    expected = of_torch(*arguments)
    for name, value in of_op(*arguments).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-12, msg=name)


def test_gradients_of_the_reference():
    model, source, _ = problem((3, 2, 4))
    weights = [weight.detach().requires_grad_() for weight in model.double().parameters()]
    source = source.double()
    torch.autograd.gradcheck(lambda *w: gru.bi_gru(source, w), weights)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel_is_as_accurate_as_torch(sizes, scale, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    got, same, exact = {}, {}, {}
    # A few numbers say little about the size of rounding errors.
    for seed in range(max(3, 200 // sizes[2])):
        model, source, grad = problem(sizes, scale, seed)
        runs = [of_op(model, source, grad), of_torch(model, source, grad)]
        runs.append(of_torch(model.double(), source.double(), grad.double()))
        for found, run in zip((got, same, exact), runs, strict=True):
            found.update({f"{seed} {name}": value for name, value in run.items()})
    assert_all_as_accurate(got, same, exact)


@pytest.mark.parametrize("served", ["cpu", "reference"])
def test_extreme_arguments(served, monkeypatch):
    """Gates that are 0 and 1 to rounding, and NaN, which reaches what depends on it."""
    monkeypatch.setenv(backend.VARIABLE, served)
    model, source, grad = problem((4, 3, 20))
    got = of_op(model, source * 1e30, grad)
    for name, value in of_torch(model, source * 1e30, grad).items():
        torch.testing.assert_close(got[name], value, msg=name)
    with torch.no_grad():
        model.weight_ih_l0[47] = float("nan")
    got = of_op(model, source, grad)
    assert got["states:states"][:, :20].isnan()[1:].all()
    assert got["states:states"][0].isnan().sum() == 1
    assert not got["states:states"][:, 20:].isnan().any()


@pytest.mark.parametrize("sizes", [(33, 64, 128), (7, 33, 37)])
def test_threads_and_reruns_give_the_same_bits(sizes, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    arguments = problem(sizes)
    before = torch.get_num_threads()
    try:
        runs = []
        for n_threads in (1, 2, 5, 1):
            torch.set_num_threads(n_threads)
            runs.append(of_op(*arguments))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for name, value in run.items():
            assert_same_bits(value, runs[0][name], name)


def test_a_reversed_sequence_swaps_the_directions(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    model, source, _ = problem((9, 6, 21))
    weights = list(model.parameters())
    forward, backward = gru.bi_gru(source, weights).chunk(2, 1)
    swapped = gru.bi_gru(source.flip(0), weights[4:] + weights[:4]).flip(0)
    assert_same_bits(swapped, torch.cat([backward, forward], 1))


def test_strides_do_not_matter(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    model, source, grad = problem((6, 5, 7))
    expected = of_op(model, source, grad)
    weights = [
        torch.stack([w, torch.full_like(w, float("nan"))], -1).requires_grad_()
        for w in model.parameters()
    ]
    states = gru.bi_gru(source.T.contiguous().T, [w[..., 0] for w in weights])
    found = torch.autograd.grad(states, weights, grad.T.contiguous().T)
    got = named(states.detach(), [g[..., 0] for g in found])
    for name, value in got.items():
        assert_same_bits(value, expected[name], name)


def test_only_some_weights_are_trained():
    model, source, grad = problem((6, 5, 7))
    expected = of_torch(model, source, grad)
    model.weight_hh_l0.requires_grad_(False)
    gru.bi_gru(source, list(model.parameters())).backward(grad)
    assert model.weight_hh_l0.grad is None
    torch.testing.assert_close(model.weight_ih_l0.grad, expected["weight_ih_l0:weight_ih"])


@pytest.mark.parametrize("served", ["cpu", "reference"])
def test_contract_of_the_ops(served, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, served)
    model, source, grad = problem((3, 4, 5))
    weights = list(model.parameters())
    torch.library.opcheck(torch.ops.ato_fast.bi_gru.default, (source, *weights))
    weights = [weight.detach() for weight in weights]
    kept = torch.ops.ato_fast.bi_gru(source, *weights)
    torch.library.opcheck(
        torch.ops.ato_fast.bi_gru_backward.default, (grad, source, weights, *kept)
    )


def test_a_weight_that_changed_before_backward():
    model, source, grad = problem((3, 4, 5))
    states = gru.bi_gru(source, list(model.parameters()))
    with torch.no_grad():
        model.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states.backward(grad)


def test_no_gradient_of_the_source():
    model, source, _ = problem((3, 4, 5))
    weights, source = list(model.parameters()), source.clone().requires_grad_()
    with pytest.raises(ValueError, match="source: expected a constant"):
        gru.bi_gru(source, weights)
    with pytest.raises(ValueError, match="source: expected a constant"):
        torch.ops.ato_fast.bi_gru(source, *weights)
    with torch.no_grad():
        gru.bi_gru(source, weights)


def test_no_second_derivative():
    model, source, _ = problem((3, 4, 5))
    weights = list(model.parameters())
    found = torch.autograd.grad(gru.bi_gru(source, weights).sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="bi_gru: gradients of its gradients"):
        found[0].sum().backward()


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ("source", torch.rand(3, 1, 4), r"source: expected \[L, inputs\].*got \[3, 1, 4\]"),
        ("source", torch.rand(0, 4), r"source: expected \[L, inputs\], both >= 1, got \[0, 4\]"),
        ("source", torch.rand(3, 6), r"weights\[0\]: expected weight_ih \[15, 6\].*got \[15, 4\]"),
        ("source", torch.rand(3, 4).half(), "source: expected float32 or float64, got torch.float"),
        (0, torch.rand(15, 5), r"weights\[0\]: expected weight_ih \[15, 4\].*got \[15, 5\]"),
        (1, torch.rand(14, 5), r"weights\[1\]: expected weight_hh \[15, 5\].*got \[14, 5\]"),
        (1, torch.rand(()), r"weights\[1\]: expected weight_hh \[0, 0\].*got \[\]"),
        (2, torch.rand(15, 1), r"weights\[2\]: expected bias_ih \[15\].*got \[15, 1\]"),
        (5, torch.rand(15, 5).double(), r"weights\[5\]: expected weight_hh.*of torch.float64"),
        (7, torch.rand(15, device="meta"), r"weights\[7\]: expected bias_hh.*on cpu, got.*meta"),
        (None, None, "weights: expected 8 tensors, got 7"),
    ],
)
def test_refusals(at, value, message):
    model, source, _ = problem((3, 4, 5))
    weights = list(model.parameters())
    if at == "source":
        source = value
    elif at is None:
        weights.pop()
    else:
        weights[at] = value
    with pytest.raises(ValueError, match=message):
        gru.bi_gru(source, weights)


def test_the_kernels_check_for_themselves():
    assert backend.extension("_C").loaded
    model, source, grad = problem((3, 4, 5))
    weights = [weight.detach() for weight in model.parameters()]
    ops = torch.ops.ato_fast
    kept = ops.bi_gru_kernel(source, weights)
    for at in range(8):
        bad = [torch.rand(2, 2) if i == at else w for i, w in enumerate(weights)]
        with pytest.raises(
            RuntimeError, match=r"weights\[\d\]: expected \d+ elements for 4 inputs"
        ):
            ops.bi_gru_kernel(source, bad)
        with pytest.raises(RuntimeError, match=r"weights\[\d\]: expected"):
            ops.bi_gru_backward_kernel(grad, source, bad, *kept)
    with pytest.raises(RuntimeError, match="weights: expected 8 tensors, got 7"):
        ops.bi_gru_kernel(source, weights[:7])
    for name, at in (("grad", 0), ("states", 1), ("saved", 2)):
        values = [grad, *kept]
        values[at] = values[at][1:].contiguous()
        with pytest.raises(RuntimeError, match=f"{name}: expected .* elements, got"):
            ops.bi_gru_backward_kernel(values[0], source, weights, *values[1:])


def of_controller(controller, slope):
    """Logits and the gradients of all parameters."""
    logits = controller.logits()
    found = torch.autograd.grad(logits, list(controller.parameters()), slope)
    names = [name for name, _ in controller.named_parameters()]
    return {
        "logits:logits": logits.detach(),
        **{f"{n}:{n}": g for n, g in zip(names, found, strict=True)},
    }


class Plain(Controller):
    """The controller in separate operations of torch."""

    def logits(self):
        features = torch.relu(self.norm(self.gru(self.source)[0])).squeeze(1)
        return (self.heads * features.repeat_interleave(self.bounds.diff(), 0)).sum(1) + 3


@pytest.mark.parametrize("widths", [[5], [64, 64, 200, 3, 17] * 4])
def test_the_controller_is_what_it_was(widths, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    ours, plain, exact = (kind(widths, seed=2) for kind in (Controller, Plain, Plain))
    slope = torch.randn(ours.n_groups)
    assert_all_as_accurate(
        of_controller(ours, slope),
        of_controller(plain, slope),
        of_controller(exact.double(), slope.double()),
    )


@pytest.mark.parametrize(
    ("name", "served"),
    [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference"), ("cuda", None), ("triton", None)],
)
def test_what_serves_the_controller(name, served, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, name)
    asked, serving = {}, backend.serving

    def recorded(op, *arguments):
        asked[op] = serving(op, *arguments)
        return asked[op]

    monkeypatch.setattr(backend, "serving", recorded)
    controller = Controller([4, 5, 6])
    states = controller._states()
    assert asked == ({} if served is None else {gru.FORWARD: served})
    if served is None:
        assert_same_bits(states, controller.gru(controller.source)[0].squeeze(1))
