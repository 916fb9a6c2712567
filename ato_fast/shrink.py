"""From a layout and a mask to a physically smaller module.

A group that is exactly zero can be cut without changing what the model computes; `zero_` makes it
so, `shrink` cuts it. Modules keep their classes; their size attributes follow.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from .groups import GroupLayout

RECIPE = "ato_recipe"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_model(model: nn.Module, layout: GroupLayout) -> None:
    """Raise ValueError unless ``layout`` describes ``model``'s tensors."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    if not isinstance(layout, GroupLayout):
        raise TypeError(f"layout: expected a GroupLayout, got {type(layout).__name__}")
    for name, shape in layout.shapes.items():
        if name not in shapes:
            raise ValueError(f"layout: not this model's, {name!r} is missing from the model")
        if shapes[name] != shape:
            raise ValueError(
                f"layout: not this model's, {name} has shape {shapes[name]}, "
                f"the layout was traced with {shape}"
            )


@torch.no_grad()
def zero_(model: nn.Module, layout: GroupLayout, mask) -> None:
    """Set every dropped group of ``model`` to exact zero, in place.

    Args:
        model: the module ``layout`` was traced from.
        layout: its gates.
        mask: ``[n_groups]``, 1 keep, 0 drop.

    Raises:
        ValueError: wrong mask size, a gate left empty, or a layout of another model.
    """
    check_model(model, layout)
    keep = layout.check_keep(mask)
    tensors = model.state_dict(keep_vars=True)
    for (tensor, dim), parts in layout.slices_of.items():
        if not any(part.in_group for _, part in parts):
            continue
        groups = torch.tensor(layout.groups_of(tensor, dim))
        dropped = torch.nonzero((groups >= 0) & ~keep[groups]).flatten()
        if len(dropped):
            target = tensors[tensor]
            target.index_fill_(dim, dropped.to(target.device), 0)


def shrink(model: nn.Module, layout: GroupLayout, mask) -> nn.Module:
    """A physically smaller copy of ``model`` without the dropped groups.

    The result computes what ``model`` computes once the dropped groups are zero (`zero_`); a
    dropped group that is not zero yet is cut all the same. ``model`` itself is left as it is.

    Args:
        model: the module ``layout`` was traced from, or one of the same shape.
        layout: its gates.
        mask: ``[n_groups]``, 1 keep, 0 drop.

    Returns:
        A module of the same classes with smaller tensors. It carries what `save` needs to write
        a recipe, and can be traced and shrunk again.

    Raises:
        ValueError: wrong mask size, a gate left empty, or a layout of another model.
    """
    check_model(model, layout)
    kept = layout.kept_indices(mask)
    small = copy.deepcopy(model)
    cut(small, kept)
    return small


def cut(model: nn.Module, kept: dict[tuple[str, int], np.ndarray]) -> None:
    """Keep only the given indices, per (tensor, dim), in place, and record them as a recipe."""
    previous = getattr(model, RECIPE, {})
    tensors = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    by_tensor: dict[str, dict[int, np.ndarray]] = {}
    for (name, dim), indices in kept.items():
        by_tensor.setdefault(name, {})[dim] = indices
    rows_of: dict[str, np.ndarray | None] = {}
    recipe = {name: dict(entry) for name, entry in previous.items()}
    for name, dims in by_tensor.items():
        old = tensors[name]
        entry = recipe.get(name) or {"shape": list(old.shape), "keep": {}}
        entry["keep"] = dict(entry["keep"])
        for dim, indices in dims.items():
            before = entry["keep"].get(str(dim))
            now = indices if before is None else np.asarray(before)[indices]
            entry["keep"][str(dim)] = [int(i) for i in now]
        new = _select(old, dims)
        for alias in names[id(old)]:
            recipe[alias] = entry
            rows_of[alias] = dims.get(0)
            _replace(model, alias, new)
    for name, module in model.named_modules():
        _refit(module, rows_of.get(f"{name}.weight" if name else "weight"))
    setattr(model, RECIPE, recipe)


def _select(old: torch.Tensor, dims: dict[int, np.ndarray]) -> torch.Tensor:
    with torch.no_grad():
        new = old.detach()
        for dim, indices in dims.items():
            new = new.index_select(dim, torch.from_numpy(np.asarray(indices)).to(old.device))
        if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
            new = new.contiguous(memory_format=torch.channels_last)
        else:
            new = new.contiguous()
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def _refit(module: nn.Module, kept_rows: np.ndarray | None) -> None:
    """Make a layer's size attributes agree with its tensors."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    if isinstance(module, CONVOLUTIONS):
        if module.groups > 1 and kept_rows is not None:
            rows_per_group = module.out_channels // module.groups
            count = np.bincount(kept_rows // rows_per_group, minlength=module.groups)
            # Whole groups went, or every group lost the same number of rows.
            if not count.all():
                module.groups = int((count > 0).sum())
        module.out_channels = weight.shape[0]
        module.in_channels = weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, BATCH_NORMS):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
