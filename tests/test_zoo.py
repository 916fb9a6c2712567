"""Real architectures: shrunk, zeroed and gated networks are the same function, in both scopes."""

import copy

import pytest
import torch
import torchvision

import ato_fast as ato
from ato_fast.gates import Gates
from ato_fast.train import models
from nets import random_mask, randomise_norms

TORCHVISION = [
    "resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "densenet121", "googlenet",
    "regnet_x_400mf", "regnet_y_400mf", "efficientnet_b0",
    "resnext50_32x4d", "mobilenet_v3_small", "shufflenet_v2_x0_5",
]  # fmt: skip


def build(name):
    if name in ("resnet20", "resnet56"):
        return models.build(name, 10, 3, (32, 32)), torch.randn(2, 3, 32, 32)
    arguments = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=20, **arguments)
    return model, torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("name", ["resnet20", "resnet56", *TORCHVISION])
def test_shrunk_equals_masked(name, scope):
    torch.manual_seed(0)
    model, x = build(name)
    model = randomise_norms(model).eval()
    layout = ato.trace(model, (x,), scope=scope)
    assert layout.gates
    gates = Gates(model, layout)
    for seed in (0, 1):
        mask = random_mask(layout, seed)
        masked = copy.deepcopy(model)
        ato.zero_(masked, layout, mask)
        small = ato.shrink(masked, layout, mask)
        with torch.no_grad():
            expected, got = masked(x), small(x)
            dense = model(x)
            gated = gates(mask, lambda m: m(x))
        assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()
        assert (expected - gated).abs().max() <= 1e-5 * expected.abs().max()
        assert not torch.allclose(expected, dense, rtol=1e-2)
        assert layout.params(mask) == sum(p.numel() for p in small.parameters())
    grouped = {s.tensor for g in layout for s in g.slices if s.in_group}
    assert grouped | {u.tensor for u in layout.unprunable} == set(layout.parameters)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "densenet121", "efficientnet_b0"])
def test_input_gradients_equal_too(name):
    torch.manual_seed(0)
    model, x = build(name)
    model = randomise_norms(model).eval()
    layout = ato.trace(model, (x,), scope="all")
    mask = random_mask(layout)
    ato.zero_(model, layout, mask)
    gradients = []
    for module in (model, ato.shrink(model, layout, mask)):
        point = x.clone().requires_grad_()
        module(point).square().sum().backward()
        gradients.append(point.grad)
    scale = gradients[0].abs().max()
    assert scale > 0
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-4 * scale


def test_auxiliary_heads_still_train_after_shrinking():
    model, x = build("googlenet")
    layout = ato.trace(model, (x,))
    small = ato.shrink(model, layout, random_mask(layout)).train()
    assert small(x).logits.shape == (2, 20)


def test_coverage_of_convolutional_networks():
    """Everything but the classifier and the image's channels is within reach in scope "all"."""
    from ato_fast.report import coverage

    for name in ("resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "efficientnet_b0"):
        model, x = build(name)
        macs, params = coverage(ato.trace(model, (x,), scope="all"))
        assert macs == 1.0
        assert params > 0.99
