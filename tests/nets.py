"""Small networks and layouts for tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import ato_fast as ato
from ato_fast.groups import Gate, GroupLayout, MacTerm, Slice


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch-norm weights, biases and statistics as after training, so that nothing is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def random_mask(layout, seed: int = 0, keep: float = 0.5) -> torch.Tensor:
    """A random mask that keeps at least one channel of every gate."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(layout.n_groups, generator=generator) < keep
    for gate in layout.gates:
        mask[gate.offset + int(torch.randint(gate.n, (), generator=generator))] = True
    return mask


def conv_bn_relu(inp: int, out: int, **kwargs) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, out, 3, padding=1, bias=False, **kwargs),
                         nn.BatchNorm2d(out), nn.ReLU(inplace=True))  # fmt: skip


class Plain(nn.Module):
    """conv-BN-ReLU twice, pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn_relu(3, 8)
        self.b = conv_bn_relu(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.b(self.a(x)).mean((2, 3)))


class Residual(nn.Module):
    """A stem, one residual block with an inner width, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8)
        self.inner = conv_bn_relu(8, 6)
        self.outer = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.outer(self.inner(x)) + x)
        return self.head(x.mean((2, 3)))


class Forward(nn.Module):
    """Modules by name and a forward function over them."""

    def __init__(self, forward, **modules) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.function = forward

    def forward(self, *args):
        return self.function(self.parts, *args)


def chain_layout(widths=(8, 12, 6), size=(16, 4, 1)):
    """Convolutions 3 -> widths -> 5 in a row, each width a gate; no torch module involved."""
    shapes, terms, gates, parameters = {}, [], [], []
    channels = [3, *widths, 5]
    for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
        shapes[f"conv{i}.weight"] = (c_out, c_in, 3, 3)
        parameters.append(f"conv{i}.weight")
        area = size[min(i, len(size) - 1)]
        terms.append(
            MacTerm(f"conv{i}", 9 * area, ((f"conv{i}.weight", 0), (f"conv{i}.weight", 1)), area)
        )
    offset = 0
    for i, n in enumerate(widths):
        gates.append(
            Gate(
                f"conv{i}",
                n,
                (
                    Slice(f"conv{i}.weight", 0, np.arange(n), "row", gated=True),
                    Slice(f"conv{i + 1}.weight", 1, np.arange(n), "input"),
                ),
                offset,
            )
        )
        offset += n
    return GroupLayout(
        gates=tuple(gates),
        unprunable=(),
        shapes=shapes,
        parameters=tuple(parameters),
        mac_terms=tuple(terms),
    )


def shrunk_residual(x: torch.Tensor) -> nn.Module:
    """`Residual` in eval mode without about half of its groups."""
    model = randomise_norms(Residual()).eval()
    layout = ato.trace(model, (x,), scope="all")
    return ato.shrink(model, layout, random_mask(layout))
