"""Networks that use norms, convolutions and activations in every way the fused route may meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """conv-BN-activation, conv-BN (no gate) with a residual, pool, linear."""

    def __init__(self, activation=nn.ReLU, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = activation(**options)
        self.conv2 = nn.Conv2d(8, 3, 3, padding="same")
        self.bn2 = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)

    def inner(self, x):
        return self.act(self.bn1(self.conv1(x)))

    def forward(self, x):
        y = self.bn2(self.conv2(self.inner(x)))
        y += x
        return self.head(torch.tanh(y).mean((2, 3)))


class Unseen(torch.autograd.Function):
    """What torch does not show to modes."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x > 0)


class Twice(Net):
    """The norm's and the convolution's own results are used beside the activation's."""

    def inner(self, x):
        conv = self.conv1(x)
        norm = self.bn1(conv)
        return self.act(norm) + 0.25 * norm.relu() + 0.5 * (conv - conv)


class Custom(Net):
    def inner(self, x):
        return Unseen.apply(self.bn1(self.conv1(x)))


class CustomConvolution(Net):
    def inner(self, x):
        return F.relu(self.bn1(Unseen.apply(self.conv1(x))))


class Changed(Net):
    """What a convolution read is overwritten before its result is asked for."""

    def inner(self, x):
        x = x * 1
        y = self.bn1(self.conv1(x))
        x.zero_()
        return self.act(y)


class WithoutGrad(Net):
    """Looked at without a gradient first."""

    def inner(self, x):
        y = self.bn1(self.conv1(x))
        with torch.no_grad():
            assert (y.mean() < 1e9) and y.shape[1] == 8 and y.dim() == 4 and len(y) == 4
        return self.act(y)


class Again(Net):
    """The same layer twice, with another input."""

    def inner(self, x):
        return self.act(self.bn1(self.conv1(x))) + self.act(self.bn1(self.conv1(x * 0.5)))


class Statistics(Net):
    """A norm that computes its own statistics in evaluation, too."""

    def inner(self, x):
        return self.act(F.batch_norm(self.bn1(self.conv1(x)), None, None, training=True))


class InPlace(Net):
    """Nobody takes what the activation returns."""

    def inner(self, x):
        y = self.bn1(self.conv1(x))
        F.relu(y, inplace=True)
        return y


class Hooked(Net):
    """A hook's own `autograd.Function` stands after the norm."""

    def __init__(self):
        super().__init__()
        self.bn1.register_full_backward_hook(lambda module, grad_in, grad_out: None)


AWKWARD = (
    Twice,
    Custom,
    CustomConvolution,
    Changed,
    WithoutGrad,
    Again,
    Statistics,
    InPlace,
)
