"""Parts that the random networks are put together from: functions as modules, norms, layers."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Random(random.Random):
    """Random numbers, and how often a part is one that no channel survives."""

    hostile = 0.0

    def is_hostile(self) -> bool:
        """True with probability `hostile`."""
        return self.random() < self.hostile


class Apply(nn.Module):
    """``function(self, *inputs)`` over named modules; ``how`` is the function in words."""

    def __init__(self, how: str, function: Callable, **modules: nn.Module) -> None:
        super().__init__()
        self.how, self.function = how, function
        for name, module in modules.items():
            setattr(self, name, module)

    def extra_repr(self) -> str:
        return self.how

    def forward(self, *inputs: Tensor):
        return self.function(self, *inputs)


class Weight(nn.Module):
    """A parameter, or a buffer, that belongs to no layer."""

    def __init__(self, *shape: int, buffer: bool = False) -> None:
        super().__init__()
        value = torch.randn(shape)
        if buffer:
            self.register_buffer("value", value)
        else:
            self.value = nn.Parameter(value)

    def extra_repr(self) -> str:
        return f"{tuple(self.value.shape)}"


class Sizes:
    """Where a reshape takes the channels from: the tensor, a size left open, or a fixed number."""

    def __init__(self, r: Random) -> None:
        self.how = r.choice(("shape", "open", "open", "fixed"))

    def heads(self, x: Tensor, n: int, width: int) -> Tensor:
        """``[N, T, C]`` -> ``[N, n, T, C / n]``."""
        per_head = {"shape": x.shape[-1] // n, "open": -1, "fixed": width // n}[self.how]
        return x.reshape(*x.shape[:2], n, per_head).transpose(1, 2)

    def merge(self, x: Tensor, width: int) -> Tensor:
        """``[N, n, T, D]`` -> ``[N, T, n * D]``."""
        x = x.transpose(1, 2)
        size = {"shape": x.shape[2] * x.shape[3], "open": -1, "fixed": width}[self.how]
        return x.reshape(*x.shape[:2], size)

    def shuffle(self, x: Tensor, n: int, width: int) -> Tensor:
        """Channels ``(n, C / n)`` -> ``(C / n, n)``."""
        per_group = {"shape": x.shape[1] // n, "open": -1, "fixed": width // n}[self.how]
        size = {"shape": x.shape[1], "open": -1, "fixed": width}[self.how]
        y = x.reshape(len(x), n, per_group, *x.shape[2:]).transpose(1, 2)
        return y.reshape(len(x), size, *x.shape[2:])


def function(how: str, call: Callable) -> Apply:
    """A function of one tensor as a module."""
    return Apply(how, lambda m, x: call(x))


def width(r: Random) -> int:
    return r.choice((4, 8, 8, 12, 16))


def activation(r: Random, c: int) -> nn.Module:
    if r.is_hostile():
        return r.choice((
            nn.Softplus(), function("x + 1", lambda x: x + 1), nn.Softmax(dim=1),
            function("cos(x)", torch.cos), function("clamp(x, 0.1, 2)", lambda x: x.clamp(0.1, 2)),
            nn.Sigmoid(),
        ))  # fmt: skip
    return r.choice((
        nn.ReLU(inplace=True), nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.1),
        nn.ELU(), nn.Hardswish(), nn.PReLU(c), nn.PReLU(), nn.Identity(), nn.ReLU6(), nn.Mish(),
        function("x * sigmoid(x)", lambda x: x * torch.sigmoid(x)),
        function("0.5 * relu(x) ** 2", lambda x: 0.5 * F.relu(x) ** 2),
        function("x - 0.3 * x.abs()", lambda x: x - 0.3 * x.abs()),
    ))  # fmt: skip


def norm(r: Random, c: int) -> nn.Module:
    if r.random() < 0.75:
        return r.choice((nn.BatchNorm2d(c), nn.BatchNorm2d(c, affine=False), nn.Identity()))
    if not r.is_hostile():
        return r.choice((
            nn.GroupNorm(c, c), nn.GroupNorm(r.choice((2, 4)), c),
            nn.InstanceNorm2d(c, affine=r.random() < 0.5),
        ))  # fmt: skip
    last = function("x.permute(0, 2, 3, 1)", lambda x: x.permute(0, 2, 3, 1))
    first = function("x.permute(0, 3, 1, 2)", lambda x: x.permute(0, 3, 1, 2))
    return r.choice((nn.GroupNorm(1, c), nn.Sequential(last, nn.LayerNorm(c), first)))


def conv(r: Random, c: int, out: int, groups: int = 1) -> nn.Conv2d:
    kernel = r.choice((1, 3))
    return nn.Conv2d(c, out, kernel, padding=kernel // 2, groups=groups, bias=r.random() < 0.5)


def layer(r: Random, c: int, out: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(r, c, out, groups), norm(r, out), activation(r, out))


def _overwrite(m, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:3] = 1.0
    return x


HOSTILE = (
    ("roll(x, 1, 1)", lambda m, x: x.roll(1, 1)),
    ("x.flip(1)", lambda m, x: x.flip(1)),
    ("x.cumsum(1)", lambda m, x: x.cumsum(1)),
    ("x / x.norm(dim=1)", lambda m, x: F.normalize(x, dim=1)),
    ("x * C ** -0.5", lambda m, x: x * x.shape[1] ** -0.5),
    ("x * sigmoid(x.mean(1))", lambda m, x: x * x.mean(1, keepdim=True).sigmoid()),
    ("x - x.amax(1)", lambda m, x: x - x.amax(1, keepdim=True)),
    ("einsum(x, w)", lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.w.value)),
    ("linear(x, w.tanh())", lambda m, x: F.linear(x.permute(0, 2, 3, 1), m.w.value.tanh())
     .permute(0, 3, 1, 2)),
    ("matmul(w, x)", lambda m, x: (m.w.value @ x.flatten(2)).unflatten(2, x.shape[2:])),
    ("x[:, 1:3] = 1", _overwrite),
    ("x @ x.T of the channels", lambda m, x: ((x.flatten(2) @ x.flatten(2).transpose(1, 2) / 9)
                                              .softmax(-1) @ x.flatten(2)).view_as(x)),
    ("local response norm", lambda m, x: F.local_response_norm(x, 3)),
    ("x.reshape(N, -1, 2, H, W).sum(2), repeated",
     lambda m, x: x.reshape(len(x), -1, 2, *x.shape[2:]).sum(2).repeat(1, 2, 1, 1)),
)  # fmt: skip
