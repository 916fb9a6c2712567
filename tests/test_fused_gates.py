"""The fused route of the masked forward: where it applies, that it is exact, what it leaves alone.

Every network is compared with gates on its feature maps, or with the affine route.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fused_nets import AWKWARD, Custom, CustomConvolution, Hooked, Net
from torch import nn

from ato_fast import deferred, masked
from ato_fast.gates import Gates
from ato_fast.trace import trace
from benchmarks import cases
from benchmarks.baselines import FeatureGates
from nets import randomise_norms

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PUBLISHED = {
    nn.ReLU: F.relu, nn.ReLU6: F.relu6, nn.SiLU: F.silu, nn.GELU: F.gelu, nn.Hardswish: F.hardswish
}  # fmt: skip


def made(model):
    model = randomise_norms(model.double()).train()
    layout = trace(model, (X,))
    assert layout.n_groups == 8
    return model, layout


@pytest.fixture
def calls(monkeypatch):
    """Activations of the calls of masked_bn_act, and which convolutions took a norm in."""
    seen = []
    original, folded = masked.masked_bn_act, deferred._Convolution.folded
    monkeypatch.setattr(
        deferred, "masked_bn_act", lambda *args: (seen.append(args[4]), original(*args))[1]
    )
    monkeypatch.setattr(
        deferred._Convolution, "folded", lambda *args: (seen.append("fold"), folded(*args))[1]
    )
    return seen


MASK = torch.tensor([1, 0, 0.5, 1, 0, 0.2, 0.9, 1], dtype=torch.float64)


def outcome(model, layout, fn=lambda m: m(X), mask=MASK, **options):
    """Output and gradient of the mask."""
    mask = mask.clone().requires_grad_()
    output = Gates(model, layout, **{"fused": True, **options})(mask, fn)
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape)
    return output.detach(), torch.autograd.grad((output * weights).sum(), mask)[0]


def published(model, mask=MASK):
    """The same with the gate on the feature map, all in torch's own operations."""
    model.eval()
    mask = mask.clone().requires_grad_()
    gated = model.act.register_forward_hook(lambda m, args, out: out * mask.view(1, -1, 1, 1))
    output = model(X)
    gated.remove()
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape)
    return output.detach(), torch.autograd.grad((output * weights).sum(), mask)[0]


def assert_close(got, expected, **limits):
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **(limits or {"rtol": 1e-9, "atol": 1e-9}))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", PUBLISHED)
def test_the_gate_is_after_every_activation_it_knows(activation, inplace, calls):
    options = {} if activation is nn.GELU else {"inplace": inplace}
    model, layout = made(Net(activation, **options))
    got = outcome(model, layout)
    name = activation.__name__.lower()
    assert calls == [name, "fold"]
    assert_close(got, published(model))


@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.Hardtanh, nn.Tanh, nn.Identity,
                                        lambda: nn.GELU(approximate="tanh")])  # fmt: skip
def test_other_activations_have_the_gate_before_them(activation, calls):
    model, layout = made(Net(activation))
    got = outcome(model, layout)
    assert calls == ["identity", "fold"]
    lifted = MASK.clamp_min(2.0**-60)
    assert_close(got, outcome(model, layout, mask=lifted, fused=False))


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_whole_networks_equal_gates_on_feature_maps(name, dtype):
    pytest.importorskip("torchvision")
    model = randomise_norms(cases.network(name).to(dtype))
    layout = cases.load(name, "stored").layout
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 64, 64, generator=generator, dtype=dtype)
    mask = torch.rand(layout.n_groups, generator=generator, dtype=dtype)
    # A dropped channel in a max pool's window: all positions tie, so leave the stem whole.
    mask[layout.gates[0].n :][::3] = 0
    results = []
    feature = FeatureGates(model, layout)
    for route in (feature, lambda mask, x: Gates(model, layout, fused=True)(mask, lambda m: m(x))):
        leaf = mask.clone().requires_grad_()
        output = route(leaf, x)
        F.cross_entropy(output, torch.tensor([1, 2])).backward()
        results.append((output.detach(), leaf.grad))
    (expected, slope), (output, gradient) = results
    of_output, of_gradient = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-3)
    assert (output - expected).abs().max() <= of_output * expected.abs().max()
    assert (gradient - slope).norm() <= of_gradient * slope.norm()
    assert slope.abs().max() > 0 and (slope[mask == 0] != 0).any()


def test_without_a_gradient_wanted_nothing_is_put_together(calls):
    model, layout = made(Net())
    with torch.no_grad():
        Gates(model, layout, fused=True)(MASK.clone().requires_grad_(), lambda m: m(X))
    Gates(model, layout, fused=True)(MASK > 0, lambda m: m(X))
    outcome(model, layout, fused=False)
    assert calls == []


def hooked(model, name, **seen):
    def hook(module, args, output):
        seen["list"].append(output)

    return model.get_submodule(name).register_forward_hook(hook)


def test_hooks_see_the_real_tensors(calls):
    """Of every module, whether they look at once, later, or after everything is over."""
    model, layout = made(Net())
    names = ["conv1", "bn1", "act", "conv2", "bn2", "head"]
    kept = {}
    for fused in (False, True):
        seen = []
        hooks = [hooked(model, name, list=seen) for name in names]
        outcome(model, layout, fused=fused)
        for hook in hooks:
            hook.remove()
        kept[fused] = seen
    for name, plain, fused in zip(names, kept[False], kept[True], strict=True):
        assert isinstance(fused, torch.Tensor) and fused.shape == plain.shape, name
        torch.testing.assert_close(fused + 0, plain + 0, rtol=1e-9, atol=1e-9)
    assert "relu" in calls


def test_hooks_that_change_tensors():
    model, layout = made(Net())
    for name in ("conv1", "bn1", "bn2"):
        model.get_submodule(name).register_forward_hook(lambda m, args, out: out * 1.5 + 0.25)
        model.get_submodule(name).register_forward_pre_hook(lambda m, args: (args[0] - 0.125,))
    lifted = MASK.clamp_min(2.0**-60)
    expected = outcome(model, layout, mask=lifted, fused=False)
    assert_close(outcome(model, layout, mask=lifted), expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_backward_hooks():
    model, layout = made(Net())
    seen = []
    model.bn1.register_full_backward_hook(lambda m, gin, gout: seen.append((gin[0], gout[0])))
    expected = outcome(model, layout, fused=False)
    got = outcome(model, layout)
    assert_close(got, expected)
    assert len(seen) == 2
    assert_close(seen[1], seen[0])


@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_models_equal_the_affine_route(kind):
    model = randomise_norms(kind().double()).train()
    layout = trace(randomise_norms(Net().double()), (X,))
    lifted = MASK.clamp_min(2.0**-60)
    expected = outcome(model, layout, mask=lifted, fused=False)
    assert expected[1].abs().min() > 0
    assert_close(outcome(model, layout, mask=lifted), expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", [Net, Custom, CustomConvolution, Hooked])
def test_backward_within_the_function(kind):
    model, layout = randomise_norms(kind().double()), trace(Net().double(), (X,))
    slopes = []
    for fused in (False, True):
        mask = MASK.clamp_min(2.0**-60).requires_grad_()
        Gates(model, layout, fused=fused)(mask, lambda m: m(X).square().sum().backward())
        slopes.append(mask.grad)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_the_result_may_be_a_convolution_or_a_norm(calls):
    class Maps(Net):
        def forward(self, x):
            y = self.conv2(self.inner(x))
            return {"maps": [self.bn2(y), y]}

    model, layout = randomise_norms(Maps().double()), trace(Net().double(), (X,))
    found = {}
    for fused in (False, True):
        mask = MASK.clone().requires_grad_()
        result = Gates(model, layout, fused=fused)(mask, lambda m: m(X))["maps"]
        assert all(type(value) is torch.Tensor for value in result)
        found[fused] = (*result, torch.autograd.grad(result[0].sum() + result[1].prod(), mask)[0])
    assert_close(found[True], found[False])
    # What was computed for its own sake is not computed again with the norm in it.
    assert calls == ["relu"]


@pytest.mark.parametrize("where", ["module", "wrapper", "function"])
def test_compiled_models(where, calls):
    model, layout = made(Net())
    expected = outcome(model, layout, fused=False)
    fn = lambda m: m(X)  # noqa: E731
    if where == "module":
        model.act.compile(backend="eager")
    elif where == "wrapper":
        model.act = torch.compile(model.act, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        fn = lambda m: compiled(X)  # noqa: E731
    assert_close(outcome(model, layout, fn), expected)
    # How far torch.compile gets under a mode is torch's business.
    assert calls == [] or where == "function"
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, calls):
    model = randomise_norms(Net()).train()
    layout = trace(model, (X.float(),))
    x = X.float()

    def fn(m):
        with torch.autocast("cpu", dtype=dtype):
            return m(x).float()

    got = outcome(model, layout, fn, MASK.float())
    assert calls == ["relu", "fold"]
    expected = outcome(model, layout, lambda m: m(x), MASK.float(), fused=False)
    for mine, theirs in zip(got, expected, strict=True):
        # A few roundings to 8 bits.
        assert (mine - theirs).norm() < 0.03 * theirs.norm()


def test_a_norm_alone_and_points(calls):
    """A norm before the convolution, and BatchNorm1d after a linear layer."""

    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(432, 8)
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(F.silu(self.norm(self.fc(x.flatten(1)))))

    model, layout = made(Points())
    ones = (MASK > 0).double()
    got = outcome(model, layout, mask=ones)
    assert calls == ["silu"]
    torch.testing.assert_close(got[0], outcome(model, layout, mask=ones, fused=False)[0])


def test_every_thing_is_left_as_it_was():
    model, layout = made(Net())
    model.bn2.eval()
    modes = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    parameters = dict(model.named_parameters())

    def fails(m):
        m(X)
        raise KeyError("planted")

    outcome(model, layout)
    with pytest.raises(KeyError, match="planted"):
        outcome(model, layout, fails)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p is parameters[k] and p.grad is None for k, p in model.named_parameters())
    # No mode is left behind.
    assert type(model.conv1(X)) is torch.Tensor


def test_less_memory_is_kept_than_on_the_affine_route():
    model, layout = made(Net())
    sizes = {}
    for fused in (False, True):
        kept = {}
        pack = lambda t, kept=kept: (kept.update({t.data_ptr(): t.numel()}), t)[1]  # noqa: E731
        mask = MASK.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            Gates(model, layout, fused=fused)(mask, lambda m: m(X))
        sizes[fused] = sum(kept.values())
    assert sizes[True] < sizes[False]


def test_what_escapes_the_call_has_the_weights_of_the_call():
    """Held by an object that nobody looks into, and asked for after the weights have changed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    layout = trace(model, (x,))
    expected = model(x).detach()
    mask = torch.ones(layout.n_groups, requires_grad=True)
    held = Gates(model, layout, fused=True)(mask, lambda m: SimpleNamespace(y=m(x)))
    with torch.no_grad():
        model[3].weight.add_(1)
    torch.testing.assert_close(held.y.detach() + 0, expected, rtol=1e-4, atol=1e-5)
