"""From a layout and a mask to a physically smaller module.

A group that is exactly zero can be cut without changing what the model computes; `zero_` makes it
so, `shrink` cuts it. Modules keep their classes; their size attributes follow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from . import multihead
from .groups import GroupLayout

RECIPE = "ato_recipe"
ATTRIBUTES = "ato_attributes"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Norms that keep the number of channels as num_features.
FEATURE_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and all buffers, under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def duplicate(model: nn.Module, memo: dict[int, torch.Tensor] | None = None) -> nn.Module:
    """A deep copy; ``memo`` holds, by id, tensors that take the place of others.

    Activations that a module keeps in an attribute (features, an auxiliary loss) are detached.
    """
    memo = dict(memo or {})

    def visit(tree) -> None:
        if isinstance(tree, torch.Tensor):
            if not tree.is_leaf:
                memo.setdefault(id(tree), tree.detach())
        elif isinstance(tree, dict):
            for value in tree.values():
                visit(value)
        elif isinstance(tree, list | tuple):
            for value in tree:
                visit(value)

    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            # Shared, not copied: a hook may hold anything.
            memo.update({id(hook): hook for hook in hooks.values()})
        visit({k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules")})
    return copy.deepcopy(model, memo)


def check_model(model: nn.Module, layout: GroupLayout) -> None:
    """Raise ValueError unless ``layout`` describes ``model``'s tensors."""
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model)}
    if not isinstance(layout, GroupLayout):
        raise TypeError(f"layout: expected a GroupLayout, got {type(layout).__name__}")
    # Other buffers may be tables that a forward pass makes to measure.
    named = {*layout.parameters, *(name for name, _ in layout.slices_of)}
    for name, shape in layout.shapes.items():
        if name not in named:
            continue
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
    tensors = dict(named_tensors(model))
    for (tensor, dim), parts in layout.slices_of.items():
        if not any(part.in_group for _, part in parts):
            continue
        groups = torch.tensor(layout.groups_of(tensor, dim))
        dropped = torch.nonzero((groups >= 0) & ~keep[groups]).flatten()
        if len(dropped):
            target = tensors[tensor]
            target.index_fill_(dim, dropped.to(target.device), 0)
    # Autocast keeps copies in lower precision of what was just written.
    torch.clear_autocast_cache()


def shrink(model: nn.Module, layout: GroupLayout, mask, as_graph: bool = False) -> nn.Module:
    """A physically smaller copy of ``model`` without the dropped groups.

    The result computes what ``model`` computes once the dropped groups are zero (`zero_`); a
    dropped group that is not zero yet is cut all the same. ``model`` itself is left as it is.

    Args:
        model: the module ``layout`` was traced from, or one of the same shape.
        layout: its gates.
        mask: ``[n_groups]``, 1 keep, 0 drop.
        as_graph: return the exported graph of the model instead, shrunk: a `torch.fx.GraphModule`
            for evaluation, at the shapes of the example inputs. It takes every layout; one that
            was traced with ``as_graph=True`` takes nothing else.

    Returns:
        A module of the same classes with smaller tensors. It carries what `save` needs to write
        a recipe, and can be traced and shrunk again. (With ``as_graph``: no recipe.)

    Raises:
        ValueError: wrong mask size, a gate left empty, a layout of another model, or one that
            needs ``as_graph``.
    """
    check_model(model, layout)
    if as_graph:
        from .graph import check_graph, shrink_graph

        small = shrink_graph(model, layout, mask)
        check_graph(small, model, layout, mask, layout.traced)
        return small
    if layout.as_graph:
        raise ValueError(
            "layout: traced with as_graph=True, its gates need shrink(..., as_graph=True)"
        )
    kept = layout.kept_indices(mask)
    keep = layout.check_keep(mask)
    attributes = new_attributes(model, layout, keep)
    dense = dict(named_tensors(model))
    small = duplicate(model, cut_tensors(dense, kept))
    shapes = {name: list(tensor.shape) for name, tensor in dense.items()}
    _finish(small, dense, shapes, kept, attributes)
    return small


def new_attributes(model: nn.Module, layout: GroupLayout, keep: torch.Tensor) -> dict[str, int]:
    """Sizes that modules keep for themselves, by dotted path, once ``keep`` (bool) is cut."""
    attributes: dict[str, int] = {}
    for gate in layout.gates:
        dropped = gate.n - int(keep[gate.span].sum())
        for path, per_channel in gate.attributes if dropped else ():
            now = attributes[path] if path in attributes else attribute(model, path)
            attributes[path] = now - per_channel * dropped
    return attributes


def cut(
    model: nn.Module, kept: dict[tuple[str, int], np.ndarray], attributes: Mapping[str, int]
) -> None:
    """Keep only the given indices, per (tensor, dim), in place, and record them as a recipe.

    Parameters and buffers stay the objects they are; gradients are cut along.

    Args:
        model: its tensors are cut.
        kept: indices to keep.
        attributes: new values of sizes that modules keep for themselves, by dotted path.
    """
    prepare_cut(model, kept, attributes)()


def prepare_cut(
    model: nn.Module, kept: dict[tuple[str, int], np.ndarray], attributes: Mapping[str, int]
) -> Callable[[], None]:
    """As `cut`, which is what the function returned does; nothing has changed before.

    Raises:
        ValueError: a sparse gradient.
    """
    tensors = dict(named_tensors(model))
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    smaller = {}
    for name, dims in by_tensor(kept).items():
        tensor, grad = tensors[name], tensors[name].grad
        if grad is not None and grad.layout is not torch.strided:
            raise ValueError(f"{name}.grad: expected a dense gradient, got layout {grad.layout}")
        new_grad = None if grad is None else select(grad, dims)
        smaller[id(tensor)] = (tensor, select(tensor, dims), new_grad)

    def apply() -> None:
        for tensor, data, grad in smaller.values():
            _set_data(tensor, data)
            tensor.grad = grad
        # Autocast keeps copies in lower precision of what was just replaced.
        torch.clear_autocast_cache()
        _finish(model, tensors, shapes, kept, attributes)

    return apply


@torch.no_grad()
def _set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Let ``tensor`` hold ``data``, of another shape, from now on; its gradient is dropped."""
    if isinstance(tensor, nn.Parameter):
        tensor.grad = None
        # A loss that is kept holds the node that accumulates gradients of the old shape, and the
        # next graph would use it again. Autograd makes a new node where the dtype changes.
        other = torch.float32 if data.dtype == torch.float64 else torch.float64
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data
    torch.autograd.graph.increment_version(tensor)


def attribute(model: nn.Module, path: str) -> int:
    """The attribute of a submodule, such as ``blocks.0.attn.num_heads``."""
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def by_tensor(kept: dict[tuple[str, int], np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """Indices to keep per dimension, by tensor."""
    dims_of: dict[str, dict[int, np.ndarray]] = {}
    for (name, dim), indices in kept.items():
        dims_of.setdefault(name, {})[dim] = indices
    return dims_of


def cut_tensors(
    dense: dict[str, torch.Tensor], kept: dict[tuple[str, int], np.ndarray]
) -> dict[int, torch.Tensor]:
    """The smaller tensors, by ``id`` of the ones they replace."""
    smaller = {}
    for name, dims in by_tensor(kept).items():
        old, new = dense[name], select(dense[name], dims)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        smaller[id(old)] = new
    return smaller


def _finish(
    model: nn.Module,
    dense: dict[str, torch.Tensor],
    shapes: Mapping[str, list[int]],
    kept: dict[tuple[str, int], np.ndarray],
    attributes: Mapping[str, int],
) -> None:
    """Make a model whose tensors were cut consistent, and record what was cut as its recipe."""
    names: dict[int, list[str]] = {}
    for name, tensor in dense.items():
        names.setdefault(id(tensor), []).append(name)
    kept_of: dict[str, dict[int, np.ndarray]] = {}
    recipe = {name: dict(entry) for name, entry in getattr(model, RECIPE, {}).items()}
    for name, dims in by_tensor(kept).items():
        entry = recipe.get(name) or {"shape": shapes[name], "keep": {}}
        entry["keep"] = dict(entry["keep"])
        for dim, indices in dims.items():
            before = entry["keep"].get(str(dim))
            now = indices if before is None else np.asarray(before)[indices]
            entry["keep"][str(dim)] = [int(i) for i in now]
        for alias in names[id(dense[name])]:
            recipe[alias] = entry
            kept_of[alias] = dims
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            multihead.refit(module, prefix, kept_of)
        else:
            _refit(module, kept_of.get(f"{prefix}weight", {}).get(0))
    for path, value in attributes.items():
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
    setattr(model, RECIPE, recipe)
    setattr(model, ATTRIBUTES, {**getattr(model, ATTRIBUTES, {}), **attributes})


@torch.no_grad()
def select(old: torch.Tensor, dims: Mapping[int, np.ndarray]) -> torch.Tensor:
    """A copy of ``old`` with the given indices per dimension, in its memory format."""
    new = old.detach()
    for dim, indices in dims.items():
        new = new.index_select(dim, torch.from_numpy(np.asarray(indices)).to(old.device))
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        return new.contiguous(memory_format=torch.channels_last)
    return new.contiguous()


def replace_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` where the parameter or buffer called ``name`` was."""
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
    if isinstance(module, CONVOLUTIONS + TRANSPOSED):
        turned = isinstance(module, TRANSPOSED)
        if module.groups > 1 and kept_rows is not None:
            n_rows = module.in_channels if turned else module.out_channels
            # Whole groups went, or every group lost the same number of rows.
            module.groups = groups_left(kept_rows, n_rows // module.groups, module.groups)
        rows, columns = weight.shape[0], weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (rows, columns) if turned else (columns, rows)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, FEATURE_NORMS):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.GroupNorm):
        if kept_rows is not None:
            size = module.num_channels // module.num_groups
            module.num_groups = groups_left(kept_rows, size, module.num_groups)
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape


def groups_left(kept_rows: np.ndarray, size: int, groups: int) -> int:
    """Groups of ``size`` rows that kept any."""
    return int((np.bincount(kept_rows // size, minlength=groups) > 0).sum())
