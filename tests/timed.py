"""A fake clock, networks it times and tables that no clock has seen, for tests of latencies."""

import copy
from functools import cache

import numpy as np
import torch
from torch import nn

import ato_fast as ato
from ato_fast import stopwatch
from ato_fast.budget import Budget
from ato_fast.latency import LatencyTable, layout_digest
from ato_fast.stopwatch import described, device_name

CPU = torch.device("cpu")
FIXED_MS = 0.5


def conv_ms(network, *_):
    """The fake clock: a fixed part, and one microsecond per weight of a convolution."""
    sizes = (m.weight.numel() for m in network.modules() if isinstance(m, nn.Conv2d))
    return FIXED_MS + sum(sizes) / 1e3


def fake_clock(monkeypatch):
    """Replaces the clock by `conv_ms`; returns a function that replaces it by another one."""

    def use(sample):
        monkeypatch.setattr(stopwatch, "sample_ms", sample)

    use(conv_ms)
    monkeypatch.setattr(stopwatch, "MOST_ROUNDS", 5)
    return use


def chain(*channels):
    """Convolutions in a row, then a linear layer; traced once."""
    return copy.deepcopy(_chain(channels))


@cache
def layout_of(widths):
    return ato.trace(_chain((3, *widths)), X)


@cache
def _chain(channels):
    torch.manual_seed(0)
    layers = []
    for c_in, c_out in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 3))


X = (torch.zeros(2, 3, 6, 6),)


def prepared(model, layout=None, **arguments):
    layout = layout or layout_of(tuple(m.out_channels for m in model if isinstance(m, nn.Conv2d)))
    budget = Budget(**{"latency": 0.6, "example": X, **arguments})
    budget.prepare(model, layout)
    return budget, layout


def random_logits(layout, seed=0):
    return torch.randn(layout.n_groups, generator=torch.Generator().manual_seed(seed))


def first(layout, *widths):
    mask = torch.zeros(layout.n_groups, dtype=torch.bool)
    for gate, width in zip(layout.gates, widths, strict=True):
        mask[gate.offset : gate.offset + width] = True
    return mask


def random_table(layout, seed=0):
    """A table of plausible curves that no clock has seen."""
    rng = np.random.default_rng(seed)
    widths = tuple(tuple(sorted({1, g.n // 3, g.n // 2, g.n})) for g in layout.gates)
    saved = tuple(
        (*sorted((rng.random(len(w) - 1) / len(layout.gates)).tolist(), reverse=True), 0.0)
        for w in widths
    )
    most = sum(s[0] for s in saved)
    return LatencyTable(
        layout=layout_digest(layout),
        device=device_name(CPU),
        example=described(X),
        torch=torch.__version__,
        dense_ms=8.0,
        gates=tuple(g.name for g in layout.gates),
        widths=widths,
        saved=saved,
        total=(0.0, 0.4 * most, most),
        ratio=(1.0, 0.7, 0.25),
    )
