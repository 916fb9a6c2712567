"""What a network scores and costs: accuracy, equality of two networks, latency, size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from .batches import Batches


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of correctly classified images, in [0, 1], in eval mode; the mode is restored."""
    training = model.training
    model.eval()
    correct, total = None, 0
    for x, y in batches.epoch(0):
        hits = (model(as_input(x)).argmax(1) == y).sum()
        correct = hits if correct is None else correct + hits
        total += len(y)
    model.train(training)
    return int(correct) / total


def as_input(x: Tensor) -> Tensor:
    """``x`` [B, C, H, W] in channels_last memory, which convolutions run faster on."""
    n, channels, height, width = x.shape
    if channels > 1:
        return x.contiguous(memory_format=torch.channels_last)
    # With one channel both layouts are the same memory; only these strides name the faster one.
    return x.contiguous().as_strided(x.shape, (height * width, 1, width, 1))


def size_bytes(model: nn.Module) -> int:
    """Size of the weights as a safetensors file."""
    return len(save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}))


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: median and the 20th and 80th percentile."""

    median_ms: float
    low_ms: float
    high_ms: float


@torch.no_grad()
def latency(models: Sequence[nn.Module], x: Tensor, seconds: float = 3.0) -> list[Latency]:
    """Time of a forward pass on ``x`` in eval mode, for each model.

    The models take turns, so that whatever else the machine does hits all of them alike; at least
    20 rounds, then until ``seconds`` are over.
    """
    x = as_input(x)
    modes = [model.training for model in models]
    for model in models:
        model.eval()
        for _ in range(5):
            model(x)
    taken: list[list[float]] = [[] for _ in models]
    until = time.perf_counter() + seconds
    while len(taken[0]) < 20 or time.perf_counter() < until:
        for model, times in zip(models, taken, strict=True):
            _wait(x)
            start = time.perf_counter()
            model(x)
            _wait(x)
            times.append(1e3 * (time.perf_counter() - start))
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)
    percentiles = [np.percentile(times, (50, 20, 80)) for times in taken]
    return [Latency(*(float(value) for value in row)) for row in percentiles]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
