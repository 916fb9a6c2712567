"""Whether two networks compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..probe import cpu_inputs
from ..shrink import duplicate

EQUALITY_LIMIT = 1e-4
"""Largest relative difference of small and masked network. Rounding in float32 stays below 1e-5."""


def relative_error(expected: Any, actual: Any) -> float:
    """``max |actual - expected| / max |expected|`` over all tensors of two equal structures.

    NaN or infinity anywhere gives NaN.

    Raises:
        ValueError: different numbers of tensors or shapes.
    """
    errors, sizes = [0.0], [0.0]
    for a, b in zip(_tensors(expected), _tensors(actual), strict=True):
        if a.shape != b.shape:
            raise ValueError(f"outputs: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
        if a.numel():
            errors.append((a.double() - b.double()).abs().max().item())
            sizes.append(a.double().abs().max().item())
    # Python's max() would drop a NaN that is not first.
    worst, scale = np.max(errors), np.max(sizes)
    return float(worst / scale if scale else worst)


@torch.no_grad()
def reference_output(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Output in eval mode on CPU in at least float32, where no TF32 blurs the comparison."""
    model = duplicate(model).to("cpu").eval()
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model = model.float()
    return model(*cpu_inputs(inputs))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
