"""Models by name: our CIFAR networks, and any classifier of torchvision or timm.

``build("resnet20", n_classes=10, in_channels=1, size=(8, 8))``. The plain names ``resnet18``,
``resnet34`` and ``mobilenetv2`` mean the CIFAR variant on small images (at most 64 pixels a side)
and torchvision's otherwise; a prefix ``cifar:``, ``torchvision:`` or ``timm:`` says which.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, nn

SMALL_INPUT = 64  # pixels a side up to which an image counts as small


def _conv_bn(c_in: int, c_out: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, k, stride, (k - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual add (He et al., arXiv 1512.03385, figure 5 left).

    The shortcut is the identity, or a strided 1x1 convolution with BN where the shape changes
    (option B of the paper).
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and c_in == c_out
        self.downsample = nn.Identity() if same else _conv_bn(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, c_in, H, W] to [B, c_out, H/stride, W/stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(nn.Module):
    """ResNet for small images: a 3x3 stem without pooling, then stages of `BasicBlock`.

    Args:
        blocks: blocks per stage; every stage but the first halves the resolution.
        widths: channels per stage. (16, 32, 64) is section 4.2 of arXiv 1512.03385
            (ResNet-20/32/44/56/110), (64, 128, 256, 512) the usual ResNet-18/34 for CIFAR.
        n_classes, in_channels: size of the output and of the input.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        n_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        stages = []
        c_in = widths[0]
        for i, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (depth - 1)
            stage = []
            for stride in strides:
                stage.append(BasicBlock(c_in, width, stride))
                c_in = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, n_classes)
        _init_conv(self)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, in_channels, H, W] to logits [B, n_classes]."""
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (Sandler et al., arXiv 1801.04381, table 1)."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = c_in * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [*_conv_bn(c_in, hidden, 1), nn.ReLU6(inplace=True)]
        layers += [*_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True)]
        layers += [*_conv_bn(hidden, c_out, 1)]
        self.conv = nn.Sequential(*layers)
        self.use_residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, c_in, H, W] to [B, c_out, H/stride, W/stride]."""
        return x + self.conv(x) if self.use_residual else self.conv(x)


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 1.0 for small images.

    The layers of arXiv 1801.04381, table 2; the stem and the second stage keep the resolution,
    so that 32x32 images end at 4x4.
    """

    # expansion, output channels, repeats, stride of the first
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, n_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv_bn(in_channels, 32), nn.ReLU6(inplace=True)]
        c_in = 32
        for expand, width, repeats, stride in self.STAGES:
            for i in range(repeats):
                layers.append(InvertedResidual(c_in, width, stride if i == 0 else 1, expand))
                c_in = width
        layers += [*_conv_bn(c_in, 1280, 1), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, n_classes)
        _init_conv(self)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, in_channels, H, W] to logits [B, n_classes]."""
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        return self.classifier(self.dropout(x))


def _init_conv(model: nn.Module) -> None:
    """He initialisation of the convolutions; norms start at weight 1, bias 0 (torch's default)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


_NARROW, _WIDE = (16, 32, 64), (64, 128, 256, 512)
CIFAR: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": lambda n, c: CifarResNet((2, 2, 2, 2), _WIDE, n, c),
    "resnet20": lambda n, c: CifarResNet((3, 3, 3), _NARROW, n, c),
    "resnet34": lambda n, c: CifarResNet((3, 4, 6, 3), _WIDE, n, c),
    "resnet56": lambda n, c: CifarResNet((9, 9, 9), _NARROW, n, c),
    "mobilenetv2": lambda n, c: CifarMobileNetV2(n, c),
}
TORCHVISION_NAMES = {"mobilenetv2": "mobilenet_v2"}  # our name: torchvision's
SOURCES = ("cifar", "torchvision", "timm")


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _timm_names() -> list[str]:
    try:
        import timm
    except ImportError:
        return []
    return timm.list_models()


def resolve(name: str, size: tuple[int, int]) -> tuple[str, str]:
    """(source, name there) for a model called ``name`` on images of ``size`` (height, width).

    Raises:
        ValueError: unknown name (offers close matches), or a timm model without timm.
    """
    source, _, plain = name.rpartition(":")
    if source and source not in SOURCES:
        raise ValueError(f"model {name!r}: expected a prefix of {SOURCES}, got {source!r}")
    small = max(size) <= SMALL_INPUT
    alias = TORCHVISION_NAMES.get(plain, plain)
    if plain in CIFAR and (source == "cifar" or not source and small):
        return "cifar", plain
    if source in ("", "torchvision") and alias in _torchvision_names():
        return "torchvision", alias
    if plain in CIFAR and not source:
        return "cifar", plain
    timm_names = _timm_names()
    if source in ("", "timm") and plain in timm_names:
        return "timm", plain
    if source == "timm" and not timm_names:
        raise ValueError(f"model {name!r} needs timm: pip install 'ato-fast[timm]'")
    others = sorted({*_torchvision_names(), *timm_names} - {*CIFAR})
    close = difflib.get_close_matches(plain, CIFAR, n=2, cutoff=0.7)
    close += difflib.get_close_matches(plain, others, n=4 - len(close), cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"ours are {', '.join(CIFAR)}"
    without = "" if timm_names else " (timm is not installed, its models are not among the names)"
    raise ValueError(f"unknown model {name!r}; {hint}{without}")


def build(
    name: str, n_classes: int = 10, in_channels: int = 3, size: tuple[int, int] = (32, 32)
) -> nn.Module:
    """A freshly initialised classifier.

    Args:
        name: as the module docstring says.
        n_classes, in_channels: size of the output and of the input.
        size: height and width of the images. The stem of torchvision's ResNets is replaced by a
            3x3 convolution without pooling on small ones.

    Raises:
        ValueError: unknown name, or a model that cannot take images of this size.
    """
    source, plain = resolve(name, size)
    shape = (2, in_channels, *size)
    try:
        if source == "cifar":
            model = CIFAR[plain](n_classes, in_channels)
        elif source == "torchvision":
            model = _torchvision(plain, n_classes, in_channels, size)
        else:
            import timm

            model = timm.create_model(plain, num_classes=n_classes, in_chans=in_channels)
        model.eval()
        with torch.no_grad():
            out = model(torch.zeros(shape))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model {name!r} cannot take images of shape {shape[1:]}: {reason}"
        ) from error
    expected = (shape[0], n_classes)
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"model {name!r}: expected logits of shape {expected}, got {got}")
    return model.train()


def _torchvision(name: str, n_classes: int, in_channels: int, size: tuple[int, int]) -> nn.Module:
    from torchvision import models

    builder = models.get_model_builder(name)
    options: dict[str, object] = {"weights": None, "num_classes": n_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        options["image_size"] = size[0]
    model = builder(**options)
    if isinstance(model, models.ResNet) and max(size) <= SMALL_INPUT:
        model.conv1 = nn.Conv2d(in_channels, model.conv1.out_channels, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
        _init_conv(model.conv1)
    elif in_channels != 3:
        _replace_first_conv(model, in_channels)
    return model


def _replace_first_conv(model: nn.Module, in_channels: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            parent, _, child = name.rpartition(".")
            fresh = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
            setattr(model.get_submodule(parent), child, fresh)
            return
