"""The fused route of the masked forward on models that do more than their graph says.

Whatever a model does, value and gradient have to be those of the affine route.
"""

import random

import numpy as np
import pytest
import torch
from fused_nets import (
    AWKWARD,
    LIFTED,
    MASK,
    Checkpointed,
    Net,
    X,
    affine,
    assert_close,
    loss,
    made,
    ours,
    score,
)  # fmt: skip
from torch import nn

from ato_fast.gates import Gates
from ato_fast.trace import trace
from nets import randomise_norms


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "global"])
def test_models_with_hooks_take_the_affine_route(kind, calls):
    model, layout = made(Net())
    seen = []
    hook = {
        "forward": lambda: model.bn1.register_forward_hook(
            lambda m, args, out: (seen.append(out), out * 1.5 + 0.25)[1]
        ),
        "pre": lambda: model.act.register_forward_pre_hook(
            lambda m, args: (seen.append(args[0]), (args[0] - 0.125,))[1]
        ),
        "backward": lambda: model.bn1.register_full_backward_hook(
            lambda m, gin, gout: seen.append(gin[0])
        ),
        "global": lambda: nn.modules.module.register_module_forward_hook(
            lambda m, args, out: seen.append(out) if m is model.bn1 else None
        ),
    }[kind]()
    try:
        expected, n = affine(model, layout), len(seen)
        got = ours(model, layout)
    finally:
        hook.remove()
    assert calls == [] and n and len(seen) == 2 * n
    assert_close(got, expected)
    assert_close(seen[:n], seen[n:])
    ours(model, layout)
    assert calls == ["relu", "fold"]


@pytest.mark.parametrize("kind", AWKWARD)
def test_models_that_leave_their_graph(kind, calls):
    """Traced as plain networks, so that every norm is thought to be one with an activation."""
    model = randomise_norms(kind().double()).train()
    layout = trace(randomise_norms(Net().double()), (X,))
    expected = affine(model, layout, mask=LIFTED)
    gates, runs = Gates(model, layout), []

    def fn(m):
        runs.append(torch.rand(()).item() + random.random() + np.random.rand())
        return loss(m)

    assert_close(gates.value_and_grad(LIFTED, fn), expected)
    n = calls.count("relu")
    assert_close(gates.value_and_grad(LIFTED, fn), expected)
    if kind.fits:
        assert calls.count("relu") == 2 * n and len(runs) == 2
    else:
        # Found out once, and repeated with the same random numbers.
        assert calls.count("relu") == n and len(runs) == 3
        assert runs[0] == runs[1] != runs[2]
    assert bool(n) == kind.tried and calls[-1] == "fold"
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in model.parameters())
    assert len(list(model.parameters())) == 9


@pytest.mark.parametrize("kind", [Net, *(k for k in AWKWARD if k.traceable)])
def test_models_traced_as_they_are(kind):
    model = randomise_norms(kind().double()).train()
    layout = trace(model, (X,))
    if layout.n_groups:
        lifted = LIFTED[: layout.n_groups]
        expected = affine(model, layout, mask=lifted)
        assert_close(ours(model, layout, mask=lifted), expected)


@pytest.mark.parametrize("outside", [False, True])
def test_checkpointing(outside):
    """The part that runs again in the backward pass still has its mask."""
    model, layout = made(Net())
    expected = ours(model, layout)
    again = Checkpointed(outside).double()
    again.load_state_dict(model.state_dict())
    assert_close(ours(again, layout), expected)
    again.reentrant = True
    x = X.clone().requires_grad_()
    with pytest.raises((RuntimeError, ValueError), match="use_reentrant=True"):
        ours(again, layout, lambda m: score(m(x)))


def test_an_error_because_of_the_fused_tensor_is_not():
    """A model may look at what its norm gives, in ways that modes are not shown."""

    class Checks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            assert x.min() < 0
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Checked(Net):
        def inner(self, x):
            return self.act(Checks.apply(self.bn1(self.conv1(x))))

    model = randomise_norms(Checked().double())
    layout = trace(randomise_norms(Net().double()), (X,))
    with pytest.warns(UserWarning, match="the masked model failed, and not .* AssertionError"):
        got = ours(model, layout, mask=LIFTED)
    assert_close(got, affine(model, layout, mask=LIFTED))


def test_function_transforms(calls):
    model, layout = made(Net())

    def mapped(m):
        return score(torch.func.vmap(lambda x: m(x[None])[0])(X))

    assert_close(ours(model, layout, mapped), affine(model, layout))
    assert calls == []

    def directional(m):
        _, tangent = torch.func.jvp(m, (X,), (torch.ones_like(X),))
        return score(tangent)

    assert_close(ours(model, layout, directional), affine(model, layout, directional))
    assert calls == []


@pytest.mark.parametrize("where", ["module", "wrapper", "function"])
def test_compiled_models(where, calls):
    model, layout = made(Net())
    expected = affine(model, layout)
    fn = loss
    if where == "module":
        model.act.compile(backend="eager")
    elif where == "wrapper":
        model.act = torch.compile(model.act, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        fn = lambda m: score(compiled(X))  # noqa: E731
    for _ in range(2):
        assert_close(ours(model, layout, fn), expected)
    # How far torch.compile gets under a mode is torch's business.
    assert calls == [] or where == "function"
    torch.compiler.reset()


def gradient_norm(m):
    value = loss(m)
    slopes = torch.autograd.grad(value, [m.bn1.weight], create_graph=True, allow_unused=True)
    return value + sum(g.square().sum() for g in slopes if g is not None)


def statistics_changed(m):
    m.bn2.running_mean.fill_(0.3)
    return loss(m)


def statistics_measured(m):
    with torch.no_grad():
        m.bn1.reset_running_stats()
        m.bn2.reset_running_stats()
        m.train()
        m(X * 3)
        m.eval()
    return loss(m)


def weights_changed(m):
    before = m.conv2.weight.clone()
    m.conv2.weight.data.add_(0.1)
    value = loss(m)
    m.conv2.weight.data.copy_(before)
    return value


def original_changed(m):
    """As an optimizer's step would, which holds the parameters themselves."""
    with torch.no_grad():
        m.originals[0].mul_(2)
    value = loss(m)
    with torch.no_grad():
        m.originals[0].div_(2)
    return value


def activation_of_statistics(m):
    torch.relu_(m.bn1.running_mean)
    return loss(m)


@pytest.mark.parametrize(
    "fn",
    [gradient_norm, activation_of_statistics, statistics_changed, statistics_measured,
     weights_changed, original_changed],
)  # fmt: skip
def test_functions_that_use_what_layers_are_made_of(fn, calls):
    outcomes = []
    for route in (affine, ours):
        torch.manual_seed(3)
        model, layout = made(Net())
        # In a tuple, so that it is no parameter of another name.
        model.originals = (model.bn1.weight, model.conv2.weight)
        outcomes.append(route(model, layout, fn, LIFTED))
    assert calls
    assert_close(*outcomes)


class Inner(torch.autograd.Function):
    """Has a graph of its own, which its backward goes through."""

    @staticmethod
    def forward(ctx, fn, x, *parameters):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = fn(ctx.x)
        ctx.parameters = parameters
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad):
        sources = [ctx.x, *ctx.parameters]
        return None, *torch.autograd.grad(ctx.y, sources, grad, allow_unused=True)


class InnerGraph(Net):
    def inner(self, x):
        return Inner.apply(super().inner, x, self.bn1.weight, self.bn1.bias)


def test_a_graph_within_the_graph(calls):
    """As deep equilibrium models have it."""
    model, _ = made(Net())
    layout = trace(model, (X,))
    inner = InnerGraph().double()
    inner.load_state_dict(model.state_dict())
    x = X.clone().requires_grad_()
    value, gradient = Gates(inner, layout).value_and_grad(LIFTED, lambda m: score(m(x)))
    assert "relu" in calls
    assert_close((value, gradient), affine(model, layout, mask=LIFTED))


def tanh(x: torch.Tensor):
    return x.tanh()


@pytest.mark.parametrize(
    "unseen",
    [torch.func.vmap(tanh), torch.func.functionalize(tanh), lambda y: torch.func.vjp(tanh, y)[0],
     "script", "compiled"],
)  # fmt: skip
def test_the_norm_is_also_read_where_modes_do_not_see_it(unseen, calls):
    if unseen == "script":
        unseen = torch.jit.script(tanh)
    elif unseen == "compiled":
        unseen = torch.compile(tanh, backend="eager")

    class More(Net):
        def inner(self, x):
            y = self.bn1(self.conv1(x))
            return self.act(y) + 0.25 * unseen(y)

    model, layout = randomise_norms(More().double()), made(Net())[1]
    assert_close(ours(model, layout, mask=LIFTED), affine(model, layout, mask=LIFTED))
    assert "relu" in calls
    torch.compiler.reset()


@pytest.mark.parametrize("frozen", ["conv2", "bn2"])
def test_weights_that_are_buffers(frozen, calls):
    model, _ = made(Net())
    module = model.get_submodule(frozen)
    for name in ("weight", "bias"):
        tensor = getattr(module, name).detach()
        delattr(module, name)
        module.register_buffer(name, tensor)
    layout = trace(model, (X,))
    assert_close(ours(model, layout), affine(model, layout))
    assert calls == ["relu"]


def test_a_stem_without_a_gate_is_left_as_it_is(calls):
    """There, nothing needs a gradient; and so it is of the same layers without gradients."""

    class Stem(Net):
        def __init__(self):
            super().__init__()
            self.conv0, self.bn0 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return super().forward(self.bn0(self.conv0(x)))

    model = randomise_norms(Stem().double())
    layout = trace(model, (X,), ignore=["conv0"])
    assert layout.n_groups == 8 and "conv0.weight" in layout.followers
    gates = Gates(model, layout)

    def distilled(m):
        with torch.no_grad():
            target = m(X)
        return (m(X) - 0.5 * target).square().sum()

    assert_close(gates.value_and_grad(LIFTED, loss), affine(model, layout, mask=LIFTED))
    got = gates.value_and_grad(LIFTED, distilled)
    assert_close(got, affine(model, layout, distilled, LIFTED))
    assert calls == ["relu", "fold"] * 2 and not gates.unfit


def test_dropped_groups_in_a_max_pool_have_the_affine_routes_gradient():
    """At a gate of exactly 0 all places of a window would tie."""

    class Pooled(Net):
        def inner(self, x):
            return nn.functional.max_pool2d(super().inner(x), 2)

        def forward(self, x):
            return self.head(self.bn2(self.conv2(self.inner(x))).mean((2, 3)))

    model = randomise_norms(Pooled().double())
    layout = trace(model, (X,))
    mask = torch.cat([MASK, torch.ones(layout.n_groups - 8, dtype=torch.float64)])
    assert_close(ours(model, layout, mask=mask), affine(model, layout, mask=mask))
