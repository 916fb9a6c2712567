"""The tracer's last word: cut the model at random and compare, before anything is trained.

An exported graph does not say whether a size in it is computed or hard-coded, and a forward pass
may depend on a width in ways no operation shows (``x / x.shape[1] ** 0.5``). So every layout is
tried on a copy of the model: dropped groups are zeroed in one copy and cut from another, and both
must give the same output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .capture import TraceError, mode
from .groups import Gate, GroupLayout
from .shrink import shrink, zero_

TOLERANCE = 1e-4
"""Of the largest output, in float32 on the CPU; rounding stays below 1e-5 on the networks tried."""


def culprits(model: nn.Module, args: tuple, kwargs: dict, layout: GroupLayout) -> list[Gate]:
    """Gates of ``layout`` that do not shrink exactly, alone or together.

    The model is left as it is; copies run on the CPU, in eval mode, with the norms' weights and
    statistics replaced by random ones (fresh norms would hide a shifted zero).

    Raises:
        TraceError: the model cannot be copied, or does not run on the CPU.
    """
    if not layout.gates:
        return []
    try:
        twin = copy.deepcopy(model).to("cpu")
    except RuntimeError as error:
        raise TraceError(
            f"model: {type(model).__name__} cannot be copied, which shrinking needs: {error} "
            "(torch.nn.utils.weight_norm is such; use torch.nn.utils.parametrizations.weight_norm)"
        ) from error
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters()):
        twin = twin.float()
    args, kwargs = cpu_inputs(args), cpu_inputs(kwargs)
    _randomise(twin, layout)
    try:
        _run(twin, args, kwargs)
    except Exception as error:
        raise TraceError(
            f"model: a copy of {type(model).__name__} does not run on the CPU with the example "
            f"inputs: {type(error).__name__}: {error}"
        ) from error
    return _search(twin, args, kwargs, layout, list(layout.gates))


def _search(
    model: nn.Module, args: tuple, kwargs: dict, layout: GroupLayout, gates: list[Gate]
) -> list[Gate]:
    """The smallest halves of ``gates`` that fail; all of them where they fail only together."""
    if all(_exact(model, args, kwargs, layout, mask) for mask in _masks(layout, gates)):
        return []
    if len(gates) == 1:
        return gates
    half = len(gates) // 2
    found = _search(model, args, kwargs, layout, gates[:half])
    found += _search(model, args, kwargs, layout, gates[half:])
    return found or gates


def _masks(layout: GroupLayout, gates: list[Gate]) -> Iterator[Tensor]:
    """Masks that drop channels of ``gates`` only: a random number of them, then all but one."""
    generator = torch.Generator().manual_seed(0)
    for single in (False, True):
        mask = torch.ones(layout.n_groups, dtype=torch.bool)
        for gate in gates:
            n = 1
            if not single:
                n += int(torch.randint(gate.n - 1, (), generator=generator))
            dropped = torch.randperm(gate.n, generator=generator)[n:]
            mask[gate.offset + dropped] = False
        yield mask


def _exact(model: nn.Module, args: tuple, kwargs: dict, layout: GroupLayout, mask: Tensor) -> bool:
    zeroed = copy.deepcopy(model)
    zero_(zeroed, layout, mask)
    expected = _run(zeroed, args, kwargs)
    try:
        got = _run(shrink(zeroed, layout, mask), args, kwargs)
    except Exception:
        return False
    if len(expected) != len(got):
        return False
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape:
            return False
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return False
        a, b = a[finite].double(), b[finite].double()
        if a.numel() and (a - b).abs().max() > TOLERANCE * a.abs().max():
            return False
    return True


def _run(model: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Output tensors in eval mode, with the same random numbers every time."""
    with mode(model, training=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(tensors(model(*args, **kwargs)))


def _randomise(model: nn.Module, layout: GroupLayout) -> None:
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict(keep_vars=True)
    seen = set()
    with torch.no_grad():
        for gate in layout.gates:
            for part in gate.slices:
                tensor = state[part.tensor]
                if part.role not in ("affine", "stat") or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                noise = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
                if part.role == "stat":
                    tensor.mul_(0.5 + noise).add_(0.1 * noise)
                else:
                    tensor.add_(noise - 0.5)


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


def cpu_inputs(tree):
    """Inputs to compare networks on: on the CPU, at least float32, and with something to see.

    A floating tensor of one value throughout, such as ``torch.zeros`` to give a shape, becomes
    noise in [0, 1).
    """
    if isinstance(tree, Tensor):
        if not tree.is_floating_point():
            return tree.detach().cpu()
        x = tree.detach().to("cpu", torch.promote_types(tree.dtype, torch.float32))
        if x.numel() > 1 and bool((x == x.flatten()[0]).all()):
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype)
            x = torch.empty_like(x).copy_(noise)
        return x
    if isinstance(tree, dict):
        return {key: cpu_inputs(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(cpu_inputs(value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(cpu_inputs(value) for value in tree)
    return tree
