"""One slow, clear torch function per op: the oracle in float64 and the fallback on any device.

The arguments are those of the ops (see `ops.py`). Formulas: `torch.optim`'s SGD, Adam and AdamW
element by element; the proximal and half-space projections of ATO section 3, DHSPG of OTOv2. The
tables are read on the host, which on an accelerator waits for it; no other value is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SGD, ADAM, ADAMW = 0, 1, 2
NO_PROJECTION, PROX, HALF_SPACE, DHSPG = 0, 1, 2, 3
HYPER_COLUMNS = ("lr", "weight_decay", "beta1", "beta2", "eps", "nesterov")


def group_step_ref(
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
) -> None:
    """Update every tensor that has a gradient, then project the dropped groups; see `ops.py`."""
    if not params:
        return
    rows = [hyper[i : i + len(HYPER_COLUMNS)] for i in range(0, len(hyper), len(HYPER_COLUMNS))]
    rates = [lr[i] if lr and lr[i].numel() else rows[i][0] for i in range(len(rows))]
    run = None if found_inf is None else (found_inf == 0).reshape(())

    def put(target: Tensor, value: Tensor) -> None:
        value = value.to(target.dtype)
        target.copy_(value if run is None else torch.where(run, value, target))

    # Values are rounded to the parameters' dtype once, after the projection.
    before = [buffer.to(_compute_dtype(buffer.dtype), copy=True) for buffer in params]
    after = [buffer.clone() for buffer in before]
    moved = [torch.zeros_like(buffer) for buffer in before] if projection == DHSPG else []
    for index, (buffer, offset, numel, row) in enumerate(tensors.tolist()):
        values = dict(zip(HYPER_COLUMNS, rows[row], strict=True), lr=rates[row])
        grad = grads[index]
        if grad.numel() == 0:
            continue
        here = slice(offset, offset + numel)
        x = before[buffer][here]
        m = first[buffer][here] if first else None
        v = second[buffer][here] if second else None
        g = _in_memory_order(grad).to(x.dtype)
        if grad_scale is not None:
            g = g / grad_scale.to(x.dtype)
        z, u, new_m, new_v = _update(optimizer, x, g, m, v, step[index], values)
        after[buffer][here] = z
        if moved:
            moved[buffer][here] = u
        if new_m is not None:
            put(m, new_m)
        if new_v is not None:
            put(v, new_v)
        if optimizer != SGD or values["beta1"] != 0:
            put(step[index], step[index] + 1)

    if projection != NO_PROJECTION:
        for group, parts, row in _groups(segments, bundles):
            n = len(mask[group])
            dead = _project(
                *([_channels(b[p[1]], p, n) for p in parts if b] for b in (before, after, moved)),
                ~mask[group],
                _threshold(strength[group], threshold[group], rates[row]),
                projection,
                projection_args,
            )
            for state in (first, second):
                for part in parts if state else ():
                    view = _channels(state[part[1]], part, n)
                    put(view, view.masked_fill(dead[:, None], 0))
    for buffer, value in zip(params, after, strict=True):
        put(buffer, value)


def group_norms_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    tensors: Tensor,
    segments: Tensor,
    bundles: Tensor,
    blocks: Tensor,
    n_groups: int,
) -> Tensor:
    """Sums per group, float64 ``[n_groups, 1]``, or ``[n_groups, 3]`` with gradients."""
    sums = torch.zeros(n_groups, 3 if grads else 1, dtype=torch.float64, device=params[0].device)
    for group, parts, _ in _groups(segments, bundles):
        for part in parts:
            n = len(sums[group])
            x = _channels(params[part[1]], part, n).double()
            products = [x * x]
            if grads:
                flat, start = _in_memory_order(grads[part[0]]), part[4]
                g = (
                    _channels(flat, part, n, start).double()
                    if flat.numel()
                    else torch.zeros_like(x)
                )
                products += [g * g, x * g]
            sums[group] += torch.stack([p.sum((0, 2)) for p in products], dim=1)
    return sums


def _groups(segments: Tensor, bundles: Tensor) -> Iterator[tuple[slice, list[list[int]], int]]:
    """Every bundle of groups: the groups, its segments, its hyperparameter row."""
    rows = segments.tolist()
    for begin, end, group, n, row in bundles.tolist():
        if group >= 0:
            yield slice(group, group + n), rows[begin:end], row


def _channels(flat: Tensor, segment: Sequence[int], n: int, start: int | None = None) -> Tensor:
    """View ``[outer, n, inner]`` of a segment's n channels."""
    inner, outer, stride = segment[5:8]
    at = segment[3] if start is None else start
    return flat.as_strided((outer, n, inner), (stride, inner, 1), flat.storage_offset() + at)


def _update(
    optimizer: int,
    x: Tensor,
    g: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    step: Tensor,
    h: dict[str, float | Tensor],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One tensor's new value, what moved it but for decoupled decay, and its new states.

    Formulas as in torch.optim's documentation.
    """
    lr, wd = h["lr"], h["weight_decay"]
    if optimizer == SGD:
        g = g + wd * x
        momentum = h["beta1"]
        if momentum == 0:
            u = lr * g
            return x - u, u, None, None
        m = torch.where(step == 0, g, momentum * m + (1 - h["beta2"]) * g)
        u = lr * (g + momentum * m if h["nesterov"] else m)
        return x - u, u, m, None
    if optimizer == ADAM:
        g = g + wd * x
    else:
        x = x * (1 - lr * wd)
    count = step.double() + 1
    m = h["beta1"] * m + (1 - h["beta1"]) * g
    v = h["beta2"] * v + (1 - h["beta2"]) * g * g
    correction1 = 1 - h["beta1"] ** count
    correction2 = (1 - h["beta2"] ** count).sqrt()
    rate = (lr / correction1).to(x.dtype)
    u = rate * (m / (v.sqrt() / correction2.to(x.dtype) + h["eps"]))
    return x - u, u, m, v


def _threshold(strength: Tensor, threshold: Tensor, lr: float | Tensor) -> Tensor:
    """Norm every group loses, float64; an infinite strength means so whatever lr is."""
    strength = strength.double()
    rate = lr.double().reshape(()) if isinstance(lr, Tensor) else lr
    return torch.where(strength == float("inf"), strength, rate * strength) + threshold


def _project(
    before: list[Tensor],
    after: list[Tensor],
    moved: list[Tensor],
    dropped: Tensor,
    limit: Tensor,
    projection: int,
    args: Sequence[float],
) -> Tensor:
    """Project the dropped groups of a bundle, writing to ``after``; which of them became zero."""

    def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
        total = torch.zeros(len(dropped), dtype=torch.float64, device=dropped.device)
        for x, y in zip(a, b, strict=True):
            total += (x.double() * y.double()).sum((0, 2))
        return total

    xx = dot(before, before)
    if projection == PROX:
        norm = (dot(after, after) + 1e-8).sqrt()
        scale = torch.where(limit >= norm, 0.0, 1 - limit / norm)
        pull = torch.zeros_like(scale)
    else:
        zx = dot(after, before)
        hard = (limit == float("inf")) & ~zx.isnan()
        if projection == DHSPG:
            xu, uu = dot(before, moved), dot(moved, moved)
            limit = _dhspg_threshold(xx, xu, uu, limit, args[1], args[2])
        pull = torch.where(limit == float("inf"), 0.0, limit / (xx.sqrt() + 1e-8))
        scale = torch.where((zx - pull * xx < args[0] * xx) | hard, 0.0, 1.0).double()
    # Exact zero is absorbing: a group that was zero before the step stays so.
    scale = torch.where(xx == 0, 0.0, scale)
    dead = dropped & (scale == 0)
    for x, z in zip(before, after, strict=True):
        wanted = scale.to(z.dtype)[:, None] * z - pull.to(z.dtype)[:, None] * x
        wanted = torch.where(dead[:, None], torch.zeros_like(z), wanted)
        z.copy_(torch.where(dropped[:, None], wanted, z))
    return dead


def _dhspg_threshold(
    xx: Tensor, xu: Tensor, uu: Tensor, limit: Tensor, amplify: float, cap: float
) -> Tensor:
    """Between the pull that makes the norm fall and the one up to which the step descends."""
    low = -xu / xx.sqrt()
    high = -uu * xx.sqrt() / xu
    wanted = torch.minimum(torch.maximum(amplify * low, limit), cap * limit)
    wanted = torch.where(wanted >= high, 0.5 * (low + high), wanted)
    return torch.where((xu < 0) & (limit != float("inf")), wanted, limit)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_memory_order(grad: Tensor) -> Tensor:
    """The elements of a dense tensor in the order they lie in memory."""
    return grad.as_strided((grad.numel(),), (1,))
