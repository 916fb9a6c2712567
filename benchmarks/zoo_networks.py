"""Networks of the zoo that no library has: restoration, segmentation, generation, sound."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """CARN's residual block; with ``groups`` > 1 the efficient one of CARN-M."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.second = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.point = nn.Conv2d(width, width, 1) if groups > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> the same shape."""
        y = self.second(F.relu(self.first(x)))
        if self.point is not None:
            y = self.point(F.relu(y))
        return F.relu(y + x)


class Cascade(nn.Module):
    """Three blocks, each reading a 1x1 convolution of everything before it."""

    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.merge = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width * (i + 2), width, 1), nn.ReLU())
            for i in range(len(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> the same shape."""
        seen = out = x
        for block, merge in zip(self.blocks, self.merge, strict=True):
            seen = torch.cat([seen, block(out)], 1)
            out = merge(seen)
        return out


class CARN(nn.Module):
    """Cascading residual network for super-resolution (Ahn et al., ECCV 2018, arXiv:1803.08664).

    Args:
        groups: 1 is CARN; 4 is CARN-M, whose cascades also run one and the same block three times.
        scale: 2 or 4.
    """

    def __init__(self, groups: int = 1, scale: int = 2, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1))
        self.entry = nn.Conv2d(3, width, 3, padding=1)

        def blocks() -> list[nn.Module]:
            if groups > 1:
                return [ResidualBlock(width, groups)] * 3
            return [ResidualBlock(width, groups) for _ in range(3)]

        self.body = Cascade(width, [Cascade(width, blocks()) for _ in range(3)])
        up: list[nn.Module] = []
        for _ in range(scale // 2):
            up += [nn.Conv2d(width, 4 * width, 3, padding=1, groups=groups), nn.ReLU()]
            up += [nn.PixelShuffle(2)]
        self.up = nn.Sequential(*up)
        self.exit = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` -> ``[N, 3, scale * H, scale * W]``."""
        return self.exit(self.up(self.body(self.entry(x - self.mean)))) + self.mean


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Twice convolution, batch norm, ReLU."""
    layers: list[nn.Module] = []
    for i in (inputs, outputs):
        layers += [nn.Conv2d(i, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015): every level's features are concatenated on the way up.

    Args:
        bilinear: resize and convolve on the way up, and average on the way down, in place of
            transposed convolutions and max pooling.
    """

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 2,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        bilinear: bool = False,
    ) -> None:
        super().__init__()
        self.bilinear = bilinear
        self.down = nn.ModuleList(
            double_conv(i, o) for i, o in zip((inputs, *widths), widths, strict=False)
        )
        self.grow, self.up = nn.ModuleList(), nn.ModuleList()
        for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True):
            if bilinear:
                self.grow.append(nn.Sequential(nn.UpsamplingBilinear2d(scale_factor=2),
                                               nn.Conv2d(low, high, 1)))  # fmt: skip
            else:
                self.grow.append(nn.ConvTranspose2d(low, high, 2, stride=2))
            self.up.append(double_conv(2 * high, high))
        self.head = nn.Conv2d(widths[0], outputs, 1)

    def features(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` -> ``[N, widths[0], H, W]``."""
        skips = []
        for i, block in enumerate(self.down):
            if i:
                x = F.avg_pool2d(x, 2) if self.bilinear else F.max_pool2d(x, 2)
            x = block(x)
            skips.append(x)
        for grow, up, skip in zip(self.grow, self.up, skips[-2::-1], strict=True):
            x = up(torch.cat([skip, grow(x)], 1))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` -> ``[N, outputs, H, W]``."""
        return self.head(self.features(x))


class StackedUNet(nn.Module):
    """Two different U-Nets in a row; the second reads the first one's features and the image."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        self.first = UNet(widths=widths)
        self.second = UNet(inputs=widths[0] + 3, widths=widths, bilinear=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, 3, H, W]`` -> both networks' ``[N, 2, H, W]``."""
        features = self.first.features(x)
        return self.first.head(features), self.second(torch.cat([features, x], 1))


class Generator(nn.Module):
    """DCGAN's generator (Radford et al., 2015) at 64x64."""

    def __init__(self, latent: int = 100, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = (latent, 8 * width, 4 * width, 2 * width, width)
        for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
            stride, padding = (2, 1) if i else (1, 0)
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """``[N, latent]`` -> ``[N, 3, 64, 64]``."""
        return self.layers(z[:, :, None, None])


class AudioNet(nn.Module):
    """M5 (Dai et al., 2016, arXiv:1610.00087): 1-d convolutions on the waveform."""

    def __init__(self, classes: int = 35) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for outputs, kernel, stride in ((128, 80, 4), (128, 3, 1), (256, 3, 1), (512, 3, 1)):
            layers += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs)]
            layers += [nn.ReLU(), nn.MaxPool1d(4)]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, samples]`` -> ``[N, classes]``."""
        return F.log_softmax(self.head(self.features(x).mean(2)), dim=1)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` between two linear layers."""

    def __init__(self, width: int = 512, layers: int = 3, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(80, width)
        layer = nn.TransformerEncoderLayer(
            width, nhead=8, dim_feedforward=4 * width, batch_first=True, norm_first=norm_first
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 40)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 80]`` -> ``[N, T, 40]``."""
        return self.head(self.layers(self.embed(x)))
