"""A small model with every way a group can lie in memory, its layout by hand, and step variants."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from ato_fast import DHSPG, HalfSpace, Prox
from ato_fast.group_optimizer import GroupOptimizer
from ato_fast.groups import Gate, GroupLayout, Slice
from ato_fast.optimizer import SGD, Adam, AdamW


class EveryLayout(nn.Module):
    """Parameters only; sizes 0, 1, 127, 128, 129 and one beyond the largest chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)  # [16, 3, 3, 3]
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, bias=False)  # [16, 1, 3, 3]
        self.last = nn.Conv2d(16, 9, 3).to(memory_format=torch.channels_last)
        self.up = nn.ConvTranspose2d(5, 7, 3)  # [5, 7, 3, 3], rows along dim 1
        self.up_last = nn.ConvTranspose2d(4, 7, 2).to(memory_format=torch.channels_last)
        self.heads = nn.Linear(31, 12)  # a channel = 3 rows
        self.mixed = nn.Linear(10, 23)  # two gates and rows in none
        self.single = nn.Linear(1, 1)
        self.odd = nn.Linear(127, 129)
        self.even = nn.Linear(128, 3)
        self.huge = nn.Linear(17_000, 1, bias=False)  # longer than a chunk
        self.free = nn.Linear(25, 700)  # in no gate, longer than a chunk
        self.nothing = nn.Parameter(torch.empty(0))
        self.scalar = nn.Parameter(torch.tensor(0.5))


def _gate(name: str, n: int, offset: int, *parts: tuple) -> Gate:
    slices = [
        Slice(tensor, dim, np.arange(n) if channels is None else np.asarray(channels), role)
        for tensor, dim, channels, role in parts
    ]
    return Gate(name, n, tuple(slices), offset)


def layout_from(model: nn.Module, specs: list[tuple]) -> GroupLayout:
    """Layout from ``(gate, n, [(tensor, dim, channels or None for 0..n-1, role)])`` per gate."""
    gates, offset = [], 0
    for name, n, parts in specs:
        gates.append(_gate(name, n, offset, *parts))
        offset += n
    return GroupLayout(
        gates=tuple(gates),
        unprunable=(),
        shapes={key: tuple(value.shape) for key, value in model.state_dict().items()},
        parameters=tuple(name for name, _ in model.named_parameters()),
        mac_terms=(),
    )


def layout_of(model: nn.Module) -> GroupLayout:
    """Layout of an `EveryLayout`."""
    mixed_a = [-1, -1, 0, 1, 2, 3, *[-1] * 17]
    mixed_b = [*[-1] * 6, 4, 3, 2, 1, 0, 0, -1, -1, 1, *[-1] * 8]
    specs = [
        ("coupled", 16, [
            ("conv.weight", 0, None, "row"), ("conv.bias", 0, None, "row"),
            ("norm.weight", 0, None, "affine"), ("norm.bias", 0, None, "affine"),
            ("norm.running_mean", 0, None, "stat"),
            ("depthwise.weight", 0, None, "row"), ("last.weight", 1, None, "input"),
        ]),
        ("last", 9, [("last.weight", 0, None, "row"), ("last.bias", 0, None, "row")]),
        ("up", 7, [
            ("up.weight", 1, None, "row"), ("up.bias", 0, None, "row"),
            ("up_last.weight", 1, np.arange(7)[::-1].copy(), "row"),
        ]),
        ("heads", 4, [("heads.weight", 0, np.repeat(np.arange(4), 3), "row"),
                      ("heads.bias", 0, np.repeat(np.arange(4), 3), "row")]),
        ("mixed_a", 4, [("mixed.weight", 0, mixed_a, "row"), ("mixed.bias", 0, mixed_a, "row")]),
        ("mixed_b", 5, [("mixed.weight", 0, mixed_b, "row")]),
        ("single", 1, [("single.weight", 0, None, "row")]),
        ("odd", 129, [("odd.weight", 0, None, "row"), ("odd.bias", 0, None, "row")]),
        ("even", 3, [("even.weight", 0, None, "row")]),
        ("huge", 1, [("huge.weight", 0, None, "row")]),
        ("bare", 2, []),
    ]  # fmt: skip
    return layout_from(model, specs)


def every_layout(dtype: torch.dtype = torch.float32, seed: int = 0) -> EveryLayout:
    """The model with random parameters that are exact in float32."""
    torch.manual_seed(seed)
    model = EveryLayout()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape))
    return model.to(dtype)


def random_mask(layout: GroupLayout, seed: int = 1, keep: float = 0.5) -> torch.Tensor:
    """Bool mask ``[n_groups]``; True keeps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layout.n_groups, generator=generator) < keep


def set_grads(model: nn.Module, step: int, scale: float = 1.0) -> None:
    """Gradients that depend on the step alone, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in model.parameters():
        grad = torch.randn(param.shape, generator=generator) * scale
        param.grad = torch.empty_like(param).copy_(grad)


@dataclass(frozen=True)
class Variant:
    """An optimizer with hyperparameters that exercise one branch."""

    name: str
    make: type[GroupOptimizer]
    hyper: dict

    def __call__(self, model: nn.Module, layout: GroupLayout, **more) -> GroupOptimizer:
        """The optimizer of ``model``."""
        return self.make(model, layout, **{**self.hyper, **more})


VARIANTS = [
    Variant("sgd", SGD, {"lr": 0.05}),
    Variant("sgd-decay", SGD, {"lr": 0.05, "weight_decay": 0.1}),
    Variant("momentum", SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    Variant("dampening", SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    Variant("nesterov", SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    Variant("adam", Adam, {"lr": 0.02, "weight_decay": 0.05}),
    Variant("adamw", AdamW, {"lr": 0.02, "weight_decay": 0.05, "betas": (0.85, 0.98)}),
]
BACKENDS = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROJECTIONS = [None, Prox(), HalfSpace(), HalfSpace(eps=0.2), DHSPG(eps=0.1)]


def by_name(value: object) -> str:
    """Readable test ids for variants and projections."""
    if isinstance(value, Variant):
        return value.name
    if isinstance(value, (HalfSpace, DHSPG)):
        return f"{value.name}-{value.eps:g}"
    return "none" if value is None else getattr(value, "name", str(value))


def snapshot(model: nn.Module, optimizer: GroupOptimizer | None = None) -> dict[str, torch.Tensor]:
    """Copies of all parameters and, by ``name:state``, of the optimizer's states."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = param.detach().clone()
        if optimizer is not None:
            for key, value in optimizer.state.get(param, {}).items():
                found[f"{name}:{key}"] = value.detach().clone()
    return found


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """An independent copy that keeps every parameter's strides."""
    return copy.deepcopy(model).to(dtype or next(model.parameters()).dtype)
