"""A state_dict checked against the optimizer that is to take it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .projection import check_strength

if TYPE_CHECKING:
    from .group_optimizer import GroupOptimizer


def matched_state(
    optimizer: GroupOptimizer, groups: list[dict[str, Any]], state: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Saved state per parameter of ours, checked against shapes."""
    check_groups(optimizer, groups)
    values = []
    for saved, own in zip(groups, optimizer.param_groups, strict=True):
        for key, param in zip(saved["params"], own["params"], strict=True):
            name = optimizer.flat.names[len(values)]
            entry = dict(state.get(key, {}))
            optimizer.complete_state(entry)
            for field, value in entry.items():
                if field != "step" and isinstance(value, Tensor) and value.shape != param.shape:
                    raise ValueError(
                        f"state_dict: {name}, {field}: expected shape {tuple(param.shape)}, "
                        f"got {tuple(value.shape)}"
                    )
                if isinstance(value, (int, float)):
                    value = torch.tensor(float(value))
                if not isinstance(value, Tensor):
                    raise ValueError(
                        f"state_dict: {name}, {field}: expected a tensor or a number, got {value!r}"
                    )
                # A copy: the dictionary may be this optimizer's own, whose states are views.
                entry[field] = value.detach().clone()
            values.append(entry)
    return values


def check_groups(optimizer: GroupOptimizer, groups: list[dict[str, Any]]) -> None:
    """Raise ValueError unless the parameter groups have as many parameters as the optimizer's."""
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"state_dict: expected {len(optimizer.param_groups)} parameter group(s), "
            f"got {len(groups)}"
        )
    for row, (saved, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        if len(saved["params"]) != len(own["params"]):
            raise ValueError(
                f"state_dict: group {row}: expected {len(own['params'])} parameters, "
                f"got {len(saved['params'])}"
            )


def check_extra(optimizer: GroupOptimizer, extra: Mapping[str, Any]) -> None:
    """Raise ValueError unless mask, strengths and layout of a state_dict are this optimizer's."""
    missing = sorted({"mask", "strength", "threshold", "layout"} - extra.keys())
    if missing:
        raise ValueError(f"state_dict: its 'ato' entry lacks {', '.join(missing)}")
    if extra["layout"] != optimizer.layout.sha256:
        raise ValueError(
            f"state_dict: it belongs to another layout (digest {extra['layout'][:12]}, "
            f"this one's is {optimizer.layout.sha256[:12]})"
        )
    optimizer.layout.check_mask(extra["mask"], "state_dict: mask")
    for name in ("strength", "threshold"):
        check_strength(extra[name], optimizer._strength, f"state_dict: {name}")
