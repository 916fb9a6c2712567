"""Models by name: the published architectures, and clear errors for what cannot be built."""

import sys

import pytest
import torch
from torch import nn

from ato_fast.train import models

# ResNet-18/34 for CIFAR: counts everyone reports (11.17 M, 21.28 M). ResNet-20/56: 269,722 and
# 853,018 of arXiv 1512.03385 (0.27 M, 0.85 M) with its parameter-free shortcuts; option B, used
# here, adds two 1x1 convolutions with BN: 16*32 + 2*32 + 32*64 + 2*64 = 2,752. MobileNetV2:
# torchvision's 3,504,872 for 1000 classes less 990 * 1281 of its classifier.
PARAMETERS = {
    "resnet18": 11_173_962,
    "resnet20": 269_722 + 2_752,
    "resnet34": 21_282_122,
    "resnet56": 853_018 + 2_752,
    "mobilenetv2": 3_504_872 - 990 * 1281,
}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", models.CIFAR)
def test_published_parameter_counts(name):
    assert count(models.build(name, 10, 3, (32, 32))) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name, n_layers", [("resnet20", 20), ("resnet56", 56), ("resnet18", 18), ("resnet34", 34)]
)
def test_depth_is_what_the_name_says(name, n_layers):
    model = models.build(name)
    main = [
        module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "downsample" not in path
    ]
    assert len(main) == n_layers


@pytest.mark.parametrize("name, size", [("resnet20", 8), ("resnet18", 4), ("mobilenetv2", 4)])
def test_small_images_keep_their_resolution_in_the_first_stage(name, size):
    seen = []
    model = models.build(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[2:])))
    model(torch.randn(2, 3, 32, 32))
    assert seen[0] == seen[1] == (32, 32) and seen[-1] == (size, size)


def test_mobilenet_is_torchvisions_but_for_two_strides():
    from torchvision.models import mobilenet_v2

    ours = models.build("cifar:mobilenetv2", 1000, 3, (224, 224))
    theirs = mobilenet_v2(num_classes=1000)
    shapes = [tuple(p.shape) for p in ours.parameters()]
    assert shapes == [tuple(p.shape) for p in theirs.parameters()]
    strides = [
        [m.stride[0] for m in model.modules() if isinstance(m, nn.Conv2d)]
        for model in (ours, theirs)
    ]
    assert sum(a != b for a, b in zip(*strides, strict=True)) == 2


@pytest.mark.parametrize(
    "name, size, source",
    [
        ("resnet18", (32, 32), "cifar"),
        ("resnet18", (224, 224), "torchvision"),
        ("torchvision:resnet18", (32, 32), "torchvision"),
        ("cifar:resnet18", (224, 224), "cifar"),
        ("resnet20", (224, 224), "cifar"),
        ("mobilenetv2", (224, 224), "torchvision"),
        ("resnet50", (32, 32), "torchvision"),
        ("resnet10t", (64, 64), "timm"),
        ("timm:resnet50", (64, 64), "timm"),
    ],
)
def test_names_mean_what_the_docstring_says(name, size, source):
    pytest.importorskip("timm")
    assert models.resolve(name, size)[0] == source


def test_torchvision_models_are_theirs_on_large_images():
    model = models.build("resnet18", 1000, 3, (224, 224))
    assert count(model) == 11_689_512 and model.conv1.kernel_size == (7, 7)


def test_torchvision_resnet_gets_a_small_stem_on_small_images():
    model = models.build("torchvision:resnet18", 10, 1, (28, 28))
    assert model.conv1.kernel_size == (3, 3) and model.conv1.stride == (1, 1)
    assert isinstance(model.maxpool, nn.Identity)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", ["vgg11_bn", "googlenet", "mobilenet_v3_small"])
def test_other_torchvision_models_take_one_channel(name):
    model = models.build(name, 7, 1, (64, 64))
    model.eval()
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)


def test_vision_transformer_takes_the_size_of_the_images():
    assert models.build("vit_b_16", 5, 3, (32, 32)).image_size == 32


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18", "mobilenetv2"])
def test_same_seed_same_weights(name):
    twins = []
    for _ in range(2):
        torch.manual_seed(3)
        twins.append(models.build(name, 10, 1, (16, 16)))
    pairs = zip(twins[0].parameters(), twins[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and twins[0].training


@pytest.mark.parametrize("name, close", [("reznet20", "resnet20"), ("mobilenet2", "mobilenetv2")])
def test_unknown_model_offers_close_matches(name, close):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; did you mean .*{close}"):
        models.build(name)


def test_unknown_source_is_refused():
    with pytest.raises(ValueError, match="expected a prefix of .* got 'keras'"):
        models.build("keras:resnet50")


def test_timm_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs timm: pip install 'ato-fast\[timm\]'"):
        models.build("timm:resnet10t")
    with pytest.raises(ValueError, match="timm is not installed"):
        models.build("resnet10t")


def test_images_too_small_for_a_model_are_refused():
    with pytest.raises(ValueError, match=r"'vgg16_bn' cannot take images of shape \(1, 8, 8\): "):
        models.build("vgg16_bn", 10, 1, (8, 8))


def test_models_that_are_no_classifiers_are_refused(monkeypatch):
    monkeypatch.setitem(models.CIFAR, "odd", lambda n, c: nn.Conv2d(c, n, 1))
    with pytest.raises(ValueError, match=r"expected logits of shape \(2, 10\), got \(2, 10, 8, 8"):
        models.build("odd", 10, 3, (8, 8))
