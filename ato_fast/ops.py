"""The op table: schema, fake and checked wrapper of every op.

``ato_fast::group_step_``: one optimizer step and the projection of the dropped groups.

* ``params``: flat buffers, one per dtype. ``first``/``second``: state buffers like them (fp32 for
  parameters of 32 bits or fewer): momentum or exp_avg, and exp_avg_sq; empty lists where unused.
* ``step`` fp32 ``[n_tensors]``: updates done (SGD: updates of the momentum buffer).
* ``scratch`` int32 ``[1]``: zero between steps; a kernel's counter of finished blocks.
* ``grads``: one per tensor where autograd left it, of the parameter's dtype, its elements in the
  parameter's memory order; an empty tensor where missing (no update, the projection still
  applies). Never written.
* ``tensors`` int64 ``[n_tensors, 4]`` on the host; ``segments``, ``bundles``, ``units``,
  ``blocks``: see `plan.py`.
* ``mask`` bool ``[n_groups]``: False drops the group. ``strength``, ``threshold`` fp32
  ``[n_groups]``: a dropped group loses the norm ``lr * strength + threshold``.
* ``hyper``: rows of ``lr, weight_decay, beta1 | momentum, beta2 | dampening, eps, nesterov``, one
  per parameter group; ``lr``: empty, or per row a one-element tensor that replaces the row's lr
  (an empty tensor keeps it).
* ``grad_scale``, ``found_inf``: as torch's fused optimizers take them: gradients are divided by the
  scale; if found_inf is not zero nothing changes, not even ``step``.
* ``optimizer``: 0 SGD, 1 Adam, 2 AdamW. ``projection``: 0 none, 1 prox, 2 half-space ``[eps]``,
  3 DHSPG ``[eps, amplify, cap]``.

``ato_fast::group_norms``: per group ``sum(x^2)``, and with gradients ``sum(g^2)``, ``sum(x*g)``, as
float64 ``[n_groups, 1 or 3]``; 0 for a group without parameters.

Ops registered from C++ do not bump version counters, so the wrappers do, for every mutated tensor
and for the parameters that view the buffers: a weight changed between forward and backward must
raise, not give a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import backend
from .reference import (
    ADAMW,
    DHSPG,
    HYPER_COLUMNS,
    SGD,
    group_norms_ref,
    group_step_ref,
)

PROJECTION_CONSTANTS = (0, 0, 1, 3)
"""How many constants each projection takes."""

SCHEMAS = {
    "group_step_": (
        "(Tensor(a!)[] params, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!) step, "
        "Tensor(e!) scratch, Tensor[] grads, Tensor tensors, Tensor segments, Tensor bundles, "
        "Tensor units, Tensor blocks, Tensor mask, Tensor strength, Tensor threshold, "
        "float[] hyper, Tensor[] lr, Tensor? grad_scale, Tensor? found_inf, "
        "int optimizer, int projection, float[] projection_args) -> ()"
    ),
    "group_norms": (
        "(Tensor[] params, Tensor[] grads, Tensor tensors, Tensor segments, Tensor bundles, "
        "Tensor blocks, int n_groups) -> Tensor"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"ato_fast::{_name}", _schema)
torch.library.impl("ato_fast::group_step_", "CompositeExplicitAutograd")(group_step_ref)
torch.library.impl("ato_fast::group_norms", "CompositeExplicitAutograd")(group_norms_ref)


@torch.library.register_fake("ato_fast::group_step_")
def _group_step_fake(*args: object) -> None:
    return None


@torch.library.register_fake("ato_fast::group_norms")
def _group_norms_fake(params, grads, tensors, segments, bundles, blocks, n_groups):
    return segments.new_empty((n_groups, 3 if grads else 1), dtype=torch.float64)


def group_step_(
    params: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: Tensor,
    scratch: Tensor,
    grads: Sequence[Tensor],
    tensors: Tensor,
    segments: Tensor,
    bundles: Tensor,
    units: Tensor,
    blocks: Tensor,
    mask: Tensor,
    strength: Tensor,
    threshold: Tensor,
    hyper: Sequence[float],
    lr: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    optimizer: int,
    projection: int,
    projection_args: Sequence[float],
    *,
    views: Iterable[Tensor] = (),
) -> None:
    """Run the step on the backend in charge, then bump versions; arguments as in the module text.

    Args:
        views: tensors whose data lies in ``params`` but whose version counter is their own
            (``p.data`` was set to a view).

    Raises:
        ValueError: lists of the wrong length, an unknown code, a buffer that is not flat.
        BackendError: a forced backend cannot serve these buffers.
    """
    if not params:
        return
    _check_buffers("params", params, params)
    _check_buffers("first", first, params if first or optimizer != SGD else ())
    _check_buffers("second", second, params if second or optimizer != SGD else ())
    _check_tables(params[0], grads, tensors, segments, bundles, blocks)
    if step.shape != (len(grads),):
        raise ValueError(f"step: expected shape ({len(grads)},), got {tuple(step.shape)}")
    if mask.dim() != 1 or not mask.shape == strength.shape == threshold.shape:
        raise ValueError(
            "mask, strength and threshold: expected one shape [n_groups], got "
            f"{tuple(mask.shape)}, {tuple(strength.shape)} and {tuple(threshold.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, got {mask.dtype}")
    if not SGD <= optimizer <= ADAMW:
        raise ValueError(f"optimizer: expected 0 (sgd), 1 (adam) or 2 (adamw), got {optimizer}")
    if not 0 <= projection < len(PROJECTION_CONSTANTS):
        raise ValueError(f"projection: expected 0 to {DHSPG}, got {projection}")
    if len(projection_args) != PROJECTION_CONSTANTS[projection]:
        raise ValueError(
            f"projection_args: expected {PROJECTION_CONSTANTS[projection]} value(s) for projection "
            f"{projection}, got {len(projection_args)}"
        )
    if len(hyper) % len(HYPER_COLUMNS):
        raise ValueError(f"hyper: expected rows of {len(HYPER_COLUMNS)}, got {len(hyper)} values")
    if len(bundles) and not units.numel():
        raise ValueError("units: expected at least one bound, got none")
    run = backend.implementation("group_step_", params[0].device, [p.dtype for p in params])
    run(
        params, first, second, step, scratch, grads, tensors, segments, bundles, units, blocks,
        mask, strength, threshold, hyper, lr, grad_scale, found_inf,
        optimizer, projection, projection_args,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*params, *first, *second, step, scratch, *views])


def group_norms(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    tensors: Tensor,
    segments: Tensor,
    bundles: Tensor,
    blocks: Tensor,
    n_groups: int,
) -> Tensor:
    """Sums per group on the backend in charge, float64 ``[n_groups, 1 or 3]``.

    Raises:
        ValueError: lists of the wrong length, a buffer that is not flat.
        BackendError: a forced backend cannot serve these buffers.
    """
    _check_buffers("params", params, params)
    _check_tables(
        params[0], grads or [params[0]] * len(tensors), tensors, segments, bundles, blocks
    )
    run = backend.implementation("group_norms", params[0].device, [p.dtype for p in params])
    return run(params, grads, tensors, segments, bundles, blocks, n_groups)


def _check_buffers(name: str, buffers: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(buffers) != len(params):
        raise ValueError(f"{name}: expected {len(params)} flat buffer(s), got {len(buffers)}")
    for index, (buffer, like) in enumerate(zip(buffers, params, strict=True)):
        if buffer.dim() != 1 or not buffer.is_contiguous() or buffer.shape != like.shape:
            raise ValueError(
                f"{name}[{index}]: expected a contiguous buffer of shape {tuple(like.shape)}, "
                f"got shape {tuple(buffer.shape)} and stride {buffer.stride()}"
            )
        if buffer.device != params[0].device:
            raise ValueError(
                f"{name}[{index}]: expected device {params[0].device}, got {buffer.device}"
            )


def _check_tables(
    like: Tensor,
    grads: Sequence[Tensor],
    tensors: Tensor,
    segments: Tensor,
    bundles: Tensor,
    blocks: Tensor,
) -> None:
    if tensors.device.type != "cpu" or tensors.dim() != 2 or tensors.shape[1] != 4:
        raise ValueError(
            f"tensors: expected int64 [n, 4] on the CPU, got {tuple(tensors.shape)} "
            f"on {tensors.device}"
        )
    if len(grads) != len(tensors):
        raise ValueError(f"grads: expected {len(tensors)}, one per tensor, got {len(grads)}")
    tables = (("segments", segments, 8), ("bundles", bundles, 5), ("blocks", blocks, 3))
    for name, table, columns in tables:
        if table.dim() != 2 or table.shape[1] != columns or table.device != like.device:
            raise ValueError(
                f"{name}: expected int64 [n, {columns}] on {like.device}, "
                f"got {tuple(table.shape)} on {table.device}"
            )
