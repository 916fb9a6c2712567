"""The fused route of the masked forward: where it applies, that it is exact, what it leaves alone.

Every network is compared with gates on its feature maps, or with the affine route.
"""

import pytest
import torch
import torch.nn.functional as F
from fused_nets import MASK, Net, X, affine, assert_close, loss, made, ours, score
from torch import nn

from ato_fast.gates import Gates
from ato_fast.trace import trace
from benchmarks import cases
from benchmarks.baselines import FeatureGates
from nets import randomise_norms

PUBLISHED = {
    nn.ReLU: F.relu, nn.ReLU6: F.relu6, nn.SiLU: F.silu, nn.GELU: F.gelu, nn.Hardswish: F.hardswish
}  # fmt: skip


def published(model, mask=MASK):
    """The same with the gate on the feature map, all in torch's own operations."""
    model.eval()
    mask = mask.clone().requires_grad_()
    gated = model.act.register_forward_hook(lambda m, args, out: out * mask.view(1, -1, 1, 1))
    value = loss(model)
    gated.remove()
    return value.detach(), torch.autograd.grad(value, mask)[0]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", PUBLISHED)
def test_the_gate_is_after_every_activation_it_knows(activation, inplace, calls):
    options = {} if activation is nn.GELU else {"inplace": inplace}
    model, layout = made(Net(activation, **options))
    got = ours(model, layout)
    assert calls == [activation.__name__.lower(), "fold"]
    assert_close(got, published(model))


@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.Hardtanh, nn.Tanh, nn.Identity,
                                        lambda: nn.GELU(approximate="tanh")])  # fmt: skip
def test_other_activations_have_the_gate_before_them(activation, calls):
    model, layout = made(Net(activation))
    got = ours(model, layout)
    assert calls == ["fold"]
    assert_close(got, affine(model, layout))


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_whole_networks_equal_gates_on_feature_maps(name, dtype, calls):
    pytest.importorskip("torchvision")
    model = randomise_norms(cases.network(name).to(dtype))
    layout = cases.load(name, "stored").layout
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 64, 64, generator=generator, dtype=dtype)
    mask = torch.rand(layout.n_groups, generator=generator, dtype=dtype)
    # A dropped channel in a max pool's window: all positions tie, so leave the stem whole.
    mask[layout.gates[0].n :][::3] = 0
    seen = []

    def task(output):
        seen.append(output.detach())
        return F.cross_entropy(output, torch.tensor([1, 2]))

    leaf = mask.clone().requires_grad_()
    (slope,) = torch.autograd.grad(task(FeatureGates(model, layout)(leaf, x)), leaf)
    _, gradient = Gates(model, layout).value_and_grad(mask, lambda m: task(m(x)))
    expected, output = seen
    counts = calls.count("relu"), calls.count("relu6"), calls.count("fold")
    assert counts == {"resnet50": (33, 0, 20), "mobilenet_v2": (0, 35, 15)}[name]
    of_output, of_gradient = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-3)
    assert (output - expected).abs().max() <= of_output * expected.abs().max()
    assert (gradient - slope).norm() <= of_gradient * slope.norm()
    assert slope.abs().max() > 0 and (slope[mask == 0] != 0).any()


def test_a_layout_without_a_graph_takes_the_affine_route(calls):
    model, layout = made(Net())
    blank = layout.shrunk(torch.ones(8, dtype=torch.bool))
    assert_close(ours(model, blank), ours(model, layout))
    assert calls == ["relu", "fold"] * 2
    blank.followers.clear()
    assert_close(ours(model, blank), affine(model, layout))
    assert calls == ["relu", "fold"] * 2


def test_second_derivatives(calls):
    """A penalty on gradients within the function."""
    model, layout = made(Net(nn.SiLU))

    def penalty(m):
        x = X.clone().requires_grad_()
        value = score(m(x))
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + slope.square().sum()

    got = ours(model, layout, penalty)
    assert calls == ["silu", "fold"]

    def gated(m, args, out):
        return out * mask.view(1, -1, 1, 1)

    mask = MASK.clone().requires_grad_()
    hook = model.act.register_forward_hook(gated)
    value = penalty(model.eval())
    hook.remove()
    assert_close(got, (value.detach(), torch.autograd.grad(value, mask)[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, calls):
    model = randomise_norms(Net()).train()
    layout = trace(model, (X.float(),))

    def fn(m):
        with torch.autocast("cpu", dtype=dtype):
            return score(m(X.float()).float())

    got = ours(model, layout, fn, MASK.float())
    assert calls == ["relu", "fold"]
    expected = affine(model, layout, lambda m: score(m(X.float())), MASK.float())
    for mine, theirs in zip(got, expected, strict=True):
        # A few roundings to 8 bits.
        assert (mine - theirs).norm() < 0.03 * theirs.norm()


def test_points(calls):
    """BatchNorm1d after a linear layer."""

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
    got = ours(model, layout, mask=ones)
    assert calls == ["silu"]
    torch.testing.assert_close(got[0], affine(model, layout, mask=ones)[0])


def test_every_thing_is_left_as_it_was():
    model, layout = made(Net())
    model.bn2.eval()
    modes = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    parameters = dict(model.named_parameters())

    def fails(m):
        m(X)
        raise KeyError("planted")

    mask = MASK.clone().requires_grad_()
    value, gradient = ours(model, layout, mask=mask)
    assert not value.requires_grad and not gradient.requires_grad and mask.grad is None
    with pytest.raises(KeyError, match="planted"):
        ours(model, layout, fails)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p is parameters[k] and p.grad is None for k, p in model.named_parameters())
    # No mode is left behind.
    assert torch.overrides._get_current_function_mode_stack() == []


def test_other_tensors_that_learn_get_no_gradient():
    model, layout = made(Net())
    scale = torch.ones(5, dtype=torch.float64, requires_grad=True)
    ours(model, layout, lambda m: (m(X) * scale).sum())
    assert scale.grad is None


def test_masks_of_bools_and_without_grad_mode():
    model, layout = made(Net())
    expected = ours(model, layout, mask=(MASK > 0.3).double())
    with torch.no_grad():
        assert_close(ours(model, layout, mask=MASK > 0.3), expected)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda m: m(X), r"loss: expected a scalar tensor, got shape \(4, 5\)"),
        (lambda m: 1.0, "loss: expected a scalar tensor, got 1.0"),
        (lambda m: loss(m).detach(), "got one that does not depend on it"),
        (lambda m: X.sum(), "got one that does not depend on it"),
    ],
)
def test_values_that_are_no_loss(fn, message):
    model, layout = made(Net())
    with pytest.raises(ValueError, match=message):
        ours(model, layout, fn)


def test_mask_of_wrong_size():
    model, layout = made(Net())
    with pytest.raises(ValueError, match=r"mask: expected shape \(8,\).*got \(7,\)"):
        ours(model, layout, mask=MASK[1:])
