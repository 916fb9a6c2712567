"""Networks that use norms, convolutions and activations in every way the fused route may meet, and
value and gradient of a mask by both routes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ato_fast.gates import Gates
from ato_fast.trace import trace
from nets import randomise_norms


class Net(nn.Module):
    """conv-BN-activation, conv-BN (no gate) with a residual, pool, linear.

    ``tried``: the norm is fused at first. ``fits``: and stays so. ``traceable``: `trace` takes it.
    """

    tried = True
    fits = False
    traceable = True

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


class Before(Net):
    """The norm's result is used before the activation's, in a list."""

    def inner(self, x):
        norm = self.bn1(self.conv1(x))
        both = torch.stack([norm, norm]).mean(0)
        return self.act(norm) + 0.25 * both.relu()


class Custom(Net):
    def inner(self, x):
        return Unseen.apply(self.bn1(self.conv1(x)))


class CustomConvolution(Net):
    fits = True

    def inner(self, x):
        return F.relu(self.bn1(Unseen.apply(self.conv1(x))))


class Whole(torch.autograd.Function):
    """Norm and activation in one function, with its own backward."""

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias):
        z = F.batch_norm(x, mean, var, weight, bias)
        ctx.save_for_backward(x, z, mean, var, weight)
        return F.relu(z)

    @staticmethod
    def backward(ctx, grad):
        x, z, mean, var, weight = ctx.saved_tensors
        grad = grad * (z > 0)
        column, scale = (1, -1, 1, 1), torch.rsqrt(var + 1e-5)
        normed = (x - mean.view(column)) * scale.view(column)
        return (
            grad * (weight * scale).view(column),
            None,
            None,
            (grad * normed).sum((0, 2, 3)),
            grad.sum((0, 2, 3)),
        )


class CustomNorm(Net):
    """Gradients are off where the norm is called."""

    tried = False
    fits = True

    def inner(self, x):
        norm = self.bn1
        return Whole.apply(
            self.conv1(x), norm.running_mean, norm.running_var, norm.weight, norm.bias
        )


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        F.relu(x, inplace=True)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (y > 0)


class CustomInPlace(Net):
    """A function that changes its argument by the very activation."""

    def inner(self, x):
        return Dirty.apply(self.bn1(self.conv1(x)))


class Scripted(Net):
    """The activation is called by TorchScript."""

    traceable = False

    def inner(self, x):
        return torch.jit.script(F.relu)(self.bn1(self.conv1(x)))


class Numpy(Net):
    """Changed through memory that it shares with an array."""

    traceable = False

    def inner(self, x):
        y = self.bn1(self.conv1(x))
        y.detach().numpy()[:, ::2] *= 0.5
        return self.act(y)


class Data(Net):
    """Changed behind autograd's back."""

    traceable = False

    def inner(self, x):
        y = self.bn1(self.conv1(x))
        y.data.clamp_(max=0.5)
        return self.act(y)


class Kept(Net):
    """Somebody may look at the norm's result later."""

    traceable = False

    def inner(self, x):
        self.seen = self.bn1(self.conv1(x))
        return self.act(self.seen)


class Assigned(Net):
    """As do scripts that take features from a module's attribute."""

    traceable = False

    def inner(self, x):
        y = self.bn1(self.conv1(x))
        z = self.act(y)
        self.act.seen = [y]
        return z + 0.5 * self.act.seen[0].relu()


class Dropped(Net):
    """Computed and not used."""

    def inner(self, x):
        y = self.conv1(x)
        self.bn1(y)
        return self.act(self.bn1(y)) + self.act(y)


class Changed(Net):
    """What a convolution read is overwritten before its result is asked for."""

    fits = True

    def inner(self, x):
        x = x * 1
        y = self.bn1(self.conv1(x))
        x.zero_()
        return self.act(y)


class Asked(Net):
    """Only asked what it is like."""

    fits = True

    def inner(self, x):
        y = self.bn1(self.conv1(x))
        assert y.shape[1] == 8 and y.dim() == 4 and y.dtype == x.dtype and not y.is_cuda
        return self.act(y)


class WithoutGrad(Net):
    """Looked at without a gradient first."""

    traceable = False

    def inner(self, x):
        y = self.bn1(self.conv1(x))
        with torch.no_grad():
            assert (y.mean() < 1e9) and len(y) == 4
        return self.act(y)


class OffAndOn(Net):
    """The activation without a gradient, for its values, and with one."""

    def inner(self, x):
        y = self.bn1(self.conv1(x))
        with torch.no_grad():
            weight = self.act(y).mean()
        return self.act(y) * weight


class Again(Net):
    """The same layer twice, with another input."""

    fits = True

    def inner(self, x):
        return self.act(self.bn1(self.conv1(x))) + self.act(self.bn1(self.conv1(x * 0.5)))


class Tied(Net):
    """The norm is called by its second name."""

    fits = True

    def __init__(self):
        super().__init__()
        self.other = self.bn1

    def inner(self, x):
        return self.act(self.other(self.conv1(x)))


class Keywords(Net):
    fits = True

    def inner(self, x):
        n = self.bn1
        y = F.batch_norm(
            input=self.conv1(x), running_mean=n.running_mean, running_var=n.running_var,
            weight=n.weight, bias=n.bias,
        )  # fmt: skip
        return self.act(y)


class OtherActivation(Net):
    def inner(self, x):
        return F.leaky_relu(self.bn1(self.conv1(x)), 0.1)


class Statistics(Net):
    """A norm that computes its own statistics in evaluation, too."""

    def inner(self, x):
        return self.act(F.batch_norm(self.bn1(self.conv1(x)), None, None, training=True))


class Trained(Net):
    """A norm that is called in training mode all the same."""

    tried = False
    fits = True

    def inner(self, x):
        norm = self.bn1
        y = F.batch_norm(self.conv1(x), None, None, norm.weight, norm.bias, training=True)
        return self.act(y)


class InPlace(Net):
    """Nobody takes what the activation returns."""

    fits = True

    def inner(self, x):
        y = self.bn1(self.conv1(x))
        F.relu(y, inplace=True)
        return y


class Checkpointed(Net):
    """A part runs again in the backward pass; the norm in it, or before it."""

    reentrant = False

    def __init__(self, outside):
        super().__init__()
        self.outside = outside

    def inner(self, x):
        if self.outside:
            return checkpoint(self.act, self.bn1(self.conv1(x)), use_reentrant=self.reentrant)
        return checkpoint(super().inner, x, use_reentrant=self.reentrant)


AWKWARD = (
    Twice, Before, Custom, CustomConvolution, CustomNorm, CustomInPlace, Scripted, Numpy, Data,
    Kept, Assigned, Dropped, Changed, Asked, WithoutGrad, OffAndOn, Again, Tied, Keywords,
    OtherActivation, Statistics, Trained, InPlace,
)  # fmt: skip

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.tensor([1, 0, 0.5, 1, 0, 0.2, 0.9, 1], dtype=torch.float64)
LIFTED = MASK.clamp_min(2.0**-60)


def score(output):
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum()


def loss(model):
    return score(model(X))


def affine(model, layout, fn=loss, mask=MASK):
    """Value of ``fn`` and gradient of the mask by the affine route."""
    mask = mask.clone().requires_grad_()
    value = Gates(model, layout)(mask, fn)
    return value.detach(), torch.autograd.grad(value, mask)[0]


def ours(model, layout, fn=loss, mask=MASK):
    return Gates(model, layout).value_and_grad(mask, fn)


def made(model):
    model = randomise_norms(model.double()).train()
    layout = trace(model, (X,))
    assert layout.n_groups == 8
    return model, layout


def assert_close(got, expected, **limits):
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **(limits or {"rtol": 1e-9, "atol": 1e-9}))
