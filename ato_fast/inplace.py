"""Cut groups out of a model while it trains: parameters, gradients, optimizer state, averages.

Zero is absorbing: a group that is exactly zero, dropped, and whose optimizer state is zero computes
nothing and gets nothing. `shrink_` takes such groups out without changing what is computed, now or
later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .group_optimizer import GroupOptimizer
from .groups import GroupLayout
from .shrink import by_tensor, check_model, named_tensors, new_attributes, prepare_cut, select

WRAPPERS = (DistributedDataParallel, DataParallel, AveragedModel)


def wrappers_of(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` and every module it wraps, the plain one last.

    Known are DistributedDataParallel, DataParallel, AveragedModel and what `torch.compile` returns.
    """
    yield model
    while True:
        inner = model.module if isinstance(model, WRAPPERS) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return
        model = inner
        yield model


def plain(model: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    *_, inner = wrappers_of(model)
    return inner


def shrink_(
    model: nn.Module,
    layout: GroupLayout,
    mask: torch.Tensor | np.ndarray,
    optimizer: torch.optim.Optimizer | None = None,
    ema: nn.Module | Iterable[nn.Module] | None = None,
) -> GroupLayout:
    """Cut the dropped groups out of ``model`` in place, in the middle of training.

    ``model``, its parameters and ``optimizer`` stay the objects they are, so schedulers, scalers,
    hooks and other references go on working: parameters, gradients, buffers and optimizer state get
    smaller. Outputs, gradients and later updates equal, to rounding, those of the model that keeps
    its dropped groups at zero. A CUDA graph captured before has to be captured again; for a
    `torch.compile` wrapper all that is compiled is dropped (`torch.compiler.reset`) and compiles
    again.

    Args:
        model: the module ``layout`` was traced from, or a `DistributedDataParallel`, `DataParallel`
            or `torch.compile` wrapper of it. Give the wrapper if there is one: it is rebuilt.
        layout: its groups as they are now.
        mask: ``[n_groups]``, 1 keep, 0 drop. Every dropped group has to be exactly zero.
        optimizer: steps the model's parameters: `SGD`, `Adam` or `AdamW` of this package, made with
            ``layout``, or any of torch's whose state is shaped like the parameters.
        ema: averaged copies (`torch.optim.swa_utils.AveragedModel` or plain modules), cut alike.
            What an average still holds of a dropped group goes with it.

    Returns:
        The layout of the smaller model, also ``optimizer.layout``.

    Raises:
        ValueError: a dropped group that is not zero (see `zero_`), a mask or layout that does not
            fit, an optimizer of another layout or with state of other shapes. Nothing has changed.
        TypeError: an ``ema`` that is no module, an optimizer that wraps another one.
        RuntimeError: DistributedDataParallel over another process group than the default one.
    """
    averages = check_cuttable(model, layout, ema)
    network = plain(model)
    keep = layout.check_keep(mask)
    check_zero(network, layout, keep)
    kept = layout.kept_indices(keep)
    if not kept:
        return layout
    wrapped = [(m, m.__getstate__()) for m in _parallel(model)]
    if isinstance(optimizer, GroupOptimizer):
        resume = optimizer.prepare_cut(network, layout, kept)
    else:
        resume = _cut_state(optimizer, network, kept)
    small = layout.shrunk(keep)
    cuts = [
        prepare_cut(each, kept, new_attributes(each, layout, keep)) for each in (network, *averages)
    ]
    for apply in cuts:
        apply()
    resume(network, small, keep)
    for module, state in wrapped:
        _rebuild(module, state)
    if _is_compiled(model):
        # Dynamo counts sizes of the same module and falls back to eager after the eighth.
        torch.compiler.reset()
    return small


def _rebuild(module: DistributedDataParallel, state: dict) -> None:
    """Buckets and hooks for parameters of other shapes, as unpickling makes them."""
    hooks = state.pop("_comm_hooks", [])
    module.__setstate__({**state, "_comm_hooks": []})
    for hook, its_state in hooks:
        module.register_comm_hook(its_state, hook)


def check_cuttable(
    model: nn.Module, layout: GroupLayout, ema: nn.Module | Iterable[nn.Module] | None
) -> list[nn.Module]:
    """Check all of `shrink_`'s arguments that a run has from its beginning.

    Returns:
        The plain modules of the averages, each once.

    Raises:
        TypeError, ValueError, RuntimeError: as `shrink_`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if ema is not None and not isinstance(ema, (nn.Module, list, tuple)):
        raise TypeError(
            f"ema: expected a torch.nn.Module or a list of them, got {type(ema).__name__}"
        )
    network = plain(model)
    check_model(network, layout)
    if layout.as_graph:
        raise ValueError(
            "layout: traced with as_graph=True, its gates cannot be cut out of the module itself; "
            "use shrink(..., as_graph=True) after training"
        )
    for module in _parallel(model):
        for _, state in module.__getstate__().get("_comm_hooks", ()):
            if hasattr(state, "error_dict"):
                raise ValueError(
                    f"model: its communication hook keeps gradients in {type(state).__name__}, "
                    "which do not fit after a cut"
                )
    averages: dict[int, nn.Module] = {}
    for average in [ema] if isinstance(ema, nn.Module) else list(ema or ()):
        if not isinstance(average, nn.Module):
            raise TypeError(f"ema: expected torch.nn.Modules, got a {type(average).__name__}")
        inner = plain(average)
        if inner is network:
            raise ValueError("ema: it is the model itself, expected an averaged copy of it")
        try:
            check_model(inner, layout)
        except ValueError as error:
            raise ValueError(f"ema: {error}") from error
        averages[id(inner)] = inner
    return list(averages.values())


def _parallel(model: nn.Module) -> list[DistributedDataParallel]:
    return [m for m in wrappers_of(model) if isinstance(m, DistributedDataParallel)]


def _is_compiled(model: nn.Module) -> bool:
    """Whether the model is what `torch.compile` returned, or any module of it compiles itself."""
    return any(hasattr(m, "_orig_mod") for m in wrappers_of(model)) or any(
        getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()
    )


@torch.no_grad()
def check_zero(model: nn.Module, layout: GroupLayout, keep: torch.Tensor) -> None:
    """Raise ValueError unless every group that ``keep`` (bool, CPU) drops is exactly zero."""
    alive = nonzero_groups(model, layout) & ~keep
    if bool(alive.any()):
        first = int(alive.nonzero()[0])
        gate = next(g for g in layout.gates if g.offset <= first < g.offset + g.n)
        raise ValueError(
            f"mask: {int(alive.sum())} of {int((~keep).sum())} dropped groups are not zero, the "
            f"first is channel {first - gate.offset} of gate {gate.name}; drive them to zero "
            "first, or set them to zero with ato.zero_(model, layout, mask)"
        )


@torch.no_grad()
def nonzero_groups(model: nn.Module, layout: GroupLayout) -> torch.Tensor:
    """Which groups have an entry (row or affine) that is not exactly zero: bool CPU tensor."""
    tensors = dict(named_tensors(model))
    found = None
    for (name, dim), parts in layout.slices_of.items():
        if not any(part.in_group for _, part in parts):
            continue
        tensor = tensors[name].detach()
        if found is None:
            found = torch.zeros(layout.n_groups + 1, dtype=torch.int32, device=tensor.device)
        others = [d for d in range(tensor.dim()) if d != dim]
        rows = (tensor != 0).any(dim=others) if others else tensor != 0
        # Entries in no gate go to the spare last one.
        groups = torch.from_numpy(layout.groups_of(tensor=name, dim=dim) % (layout.n_groups + 1))
        found.index_add_(0, groups.to(found.device), rows.to(found))
    if found is None:
        return torch.zeros(layout.n_groups, dtype=torch.bool)
    return (found[:-1] > 0).cpu()


def _cut_state(optimizer, network: nn.Module, kept):
    """Smaller state for an optimizer of torch's: returns what puts it in place after the cut."""
    if optimizer is None:
        return lambda *_: None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    name = type(optimizer).__name__
    if hasattr(optimizer, "optim"):
        raise TypeError(f"optimizer: {name} steps through another optimizer, which cannot be cut")
    tensors = dict(named_tensors(network))
    dims_of = {tensors[name]: dims for name, dims in by_tensor(kept).items()}
    mine = {param for group in optimizer.param_groups for param in group["params"]}
    shared = [param for param in network.parameters() if param in mine]
    if not shared:
        raise ValueError("optimizer: it steps no parameter of this model")
    new: dict[nn.Parameter, dict] = {}
    for param in shared:
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor) and (
                value.numel() > 1 or param.numel() == 1 == value.dim()
            ):
                if value.shape != param.shape:
                    raise ValueError(
                        f"optimizer: its state {key!r} has shape {tuple(value.shape)} for a "
                        f"parameter of shape {tuple(param.shape)}; {name} cannot be cut"
                    )
                if param in dims_of:
                    new.setdefault(param, {})[key] = select(value, dims_of[param])
            elif isinstance(value, (list, tuple, dict)) and value:
                raise ValueError(
                    f"optimizer: its state {key!r} is a {type(value).__name__}; {name} cannot be "
                    "cut"
                )

    def resume(*_) -> None:
        for param, entries in new.items():
            optimizer.state[param].update(entries)

    return resume
