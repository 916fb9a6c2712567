"""What layouts are tried with: nested masks, random values, inputs, and how far results differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .groups import Gate, GroupLayout
from .shrink import named_tensors


def nested_masks(layout: GroupLayout, gates: Iterable[Gate], seed: int = 0) -> Iterator[Tensor]:
    """Masks that drop channels of ``gates`` only, each part of the one before: most of the channels
    kept, some of them, a single one."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.ones(layout.n_groups, dtype=torch.bool) for _ in range(3)]
    for gate in gates:
        order = gate.offset + torch.randperm(gate.n, generator=generator)
        share = 0.5 + 0.4 * float(torch.rand((), generator=generator))
        n = min(max(int(share * gate.n), 1), gate.n - 1)
        for mask in masks:
            mask[order[n:]] = False
            n = max(n // 2, 1) if mask is masks[0] else 1
    yield from masks


def alternating_masks(layout: GroupLayout, gates: Iterable[Gate]) -> Iterator[Tensor]:
    """Every second of ``gates`` at one channel, then the others."""
    gates = list(gates)
    for first in (0, 1):
        mask = torch.ones(layout.n_groups, dtype=torch.bool)
        for gate in gates[first::2]:
            mask[gate.offset + 1 : gate.offset + gate.n] = False
        yield mask


class FullPrecision(TorchFunctionMode):
    """Every operation as it is outside of ``torch.autocast``: the rounding of half precision would
    hide what is wrong, and differs with the width.

    Args:
        device: type of the device that tensors are on.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device if torch.amp.is_autocast_available(device) else "cpu"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Make the call."""
        # Exported graphs insist on the precision they were captured in.
        if func is torch.ops.aten._assert_tensor_metadata.default:
            return None
        with torch.autocast(self.device, enabled=False):
            return func(*args, **(kwargs or {}))


def on_cpu(model: nn.Module) -> nn.Module:
    """``model`` itself on the CPU, in float32 if it was in a half precision."""
    model = model.to("cpu")
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return model.float() if half else model


def difference(expected: list[Tensor], got: list[Tensor], floor: float = 1e-300) -> float:
    """Largest difference, relative to the largest value of the same tensor, or to ``floor`` if that
    is larger; inf if shapes or places that are not finite differ."""
    if len(expected) != len(got):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return float("inf")
        finite = torch.isfinite(a)
        a, b = a[finite].double(), b[finite].double()
        if a.numel() and (error := float((a - b).abs().max())):
            worst = max(worst, error / max(float(a.abs().max()), floor))
    return worst


def randomise(model: nn.Module, layout: GroupLayout, seed: int = 0) -> None:
    """Values as after training, so that nothing hides: norms' weights and statistics random, and
    so is every parameter that holds one value throughout (zero gammas, layer scales)."""
    generator = torch.Generator().manual_seed(seed)
    stats = {s.tensor for gate in layout.gates for s in gate.slices if s.role == "stat"}
    affine = {s.tensor for gate in layout.gates for s in gate.slices if s.role == "affine"}
    seen = set()
    for name, tensor in named_tensors(model):
        if id(tensor) in seen or not tensor.is_floating_point() or not tensor.numel():
            continue
        seen.add(id(tensor))
        statistic = name in stats and not isinstance(tensor, nn.Parameter)
        if not (statistic or name in affine or _constant(tensor)):
            continue
        noise = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        with torch.no_grad():
            if statistic:
                # Statistics, not tables: what only ever is positive stays so.
                tensor.mul_(0.5 + noise).add_(0.1 * noise)
            else:
                tensor.add_(noise - 0.5)


def _constant(tensor: Tensor) -> bool:
    """Whether this is a parameter of one value throughout."""
    if not isinstance(tensor, nn.Parameter):
        return False
    flat = tensor.detach().reshape(-1)
    # Nearly every other parameter shows it in its first and last entry.
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


def tensors(tree) -> Iterator[Tensor]:
    """All tensors of nested containers; objects with attributes count as their ``__dict__``."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors(value)
    elif hasattr(tree, "__dict__"):
        yield from tensors(vars(tree))


def mapped(tree, function: Callable[[Tensor], Tensor]):
    """Nested containers with ``function`` of every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(value, function) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(value, function) for value in tree)
    return tree


def in_dtype(tree, dtype: torch.dtype):
    """Inputs with every floating tensor in ``dtype``."""
    return mapped(tree, lambda x: x.to(dtype) if x.is_floating_point() else x)


def cpu_inputs(tree):
    """Inputs to compare networks on: on the CPU, at least float32, and with something to see.

    A floating tensor of one value throughout, such as ``torch.zeros`` to give a shape, becomes
    noise in [0, 1).
    """

    def seen(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.detach().cpu()
        x = x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32))
        if x.numel() > 1 and bool((x == x.flatten()[0]).all()):
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype)
            x = torch.empty_like(x).copy_(noise)
        return x

    return mapped(tree, seen)
