"""One slow, clear torch function per op: the oracle in float64 and the fallback on any device.

The arguments are those of the ops (see `ops.py`). Formulas: `torch.optim`'s SGD, Adam and AdamW
element by element; the proximal and half-space projections of ATO section 3. Nothing here reads a
value back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SGD, ADAM, ADAMW = 0, 1, 2
NO_PROJECTION, PROX, HALF_SPACE = 0, 1, 2
HYPER_COLUMNS = ("lr", "weight_decay", "beta1", "beta2", "eps", "nesterov")


def group_step_ref(
    params: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: Tensor,
    scratch: Tensor,
    grads: Sequence[Tensor],
    tensors: Tensor,
    chunks: Tensor,
    items: Tensor,
    work: Tensor,
    units: Tensor,
    strength: Tensor,
    threshold: Tensor,
    hyper: Sequence[float],
    lr: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    n_slots: int,
    n_projected: int,
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

    elements = owner = before = None
    if projection != NO_PROJECTION and n_projected:
        elements, owner = _elements(params, chunks[:n_slots], items, n_projected)
        before = _joined(params)[elements]

    for index, (buffer, offset, numel, row) in enumerate(tensors.tolist()):
        grad = grads[index]
        if grad.numel() == 0:
            continue
        here = slice(offset, offset + numel)
        x = params[buffer][here]
        m = first[buffer][here] if first else None
        v = second[buffer][here] if second else None
        work_dtype = m.dtype if m is not None else _compute_dtype(x.dtype)
        g = _in_memory_order(grad).to(work_dtype)
        if grad_scale is not None:
            g = g / grad_scale.to(work_dtype)
        values = dict(zip(HYPER_COLUMNS, rows[row], strict=True), lr=rates[row])
        new_x, new_m, new_v = _update(optimizer, x.to(work_dtype), g, m, v, step[index], values)
        put(x, new_x)
        if new_m is not None:
            put(m, new_m)
        if new_v is not None:
            put(v, new_v)
        if optimizer != SGD or values["beta1"] != 0:
            put(step[index], step[index] + 1)

    if elements is None:
        return
    flat = _joined(params)
    z, scale = _project(
        (flat[elements], before),
        owner,
        items,
        (strength, threshold),
        rates,
        projection,
        projection_args,
    )
    flat[elements] = z if run is None else torch.where(run, z, flat[elements])
    _write_back(params, flat)
    dead = (scale == 0)[owner]
    if run is not None:
        dead = dead & run
    for state in (first, second):
        if state:
            flat = _joined(state)
            flat[elements] = flat[elements].masked_fill(dead, 0)
            _write_back(state, flat)


def group_norms_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    tensors: Tensor,
    chunks: Tensor,
    items: Tensor,
    n_slots: int,
    n_projected: int,
) -> Tensor:
    """Sums of squares per item, float64 ``[n_items, 1]``, or ``[n_items, 3]`` with gradients."""
    elements, owner = _elements(params, chunks[:n_slots], items, n_projected)
    x = _joined(params)[elements].double()
    columns = [x * x]
    if grads:
        flat = _joined([torch.zeros_like(buffer) for buffer in params])
        base = _bases(params)
        for (buffer, offset, numel, _), grad in zip(tensors.tolist(), grads, strict=True):
            if grad.numel():
                at = base[buffer] + offset
                flat[at : at + numel] = _in_memory_order(grad).to(flat.dtype)
        g = flat[elements].double()
        columns += [g * g, x * g]
    return torch.stack([_segment_sum(c, owner, items) for c in columns], dim=1)


def _update(
    optimizer: int,
    x: Tensor,
    g: Tensor,
    m: Tensor | None,
    v: Tensor | None,
    step: Tensor,
    h: dict[str, float | Tensor],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One tensor's new value and states; formulas as in torch.optim's documentation."""
    lr, wd = h["lr"], h["weight_decay"]
    if optimizer == SGD:
        g = g + wd * x
        momentum = h["beta1"]
        if momentum == 0:
            return x - lr * g, None, None
        m = torch.where(step == 0, g, momentum * m + (1 - h["beta2"]) * g)
        direction = g + momentum * m if h["nesterov"] else m
        return x - lr * direction, m, None
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
    return x - rate * (m / (v.sqrt() / correction2.to(x.dtype) + h["eps"])), m, v


def _project(
    values: tuple[Tensor, Tensor],
    owner: Tensor,
    items: Tensor,
    strengths: tuple[Tensor, Tensor],
    rates: list[float | Tensor],
    projection: int,
    args: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The projected elements and every item's scale (0 = dropped).

    ``values`` are the elements after and before the update.
    """
    z, x = (value.to(_compute_dtype(value.dtype)) for value in values)
    wide = z.double()
    group, row = items[:, 2], items[:, 3]
    lr = torch.stack([_scalar(rate, z.device) for rate in rates])
    lam, fixed = (value[group].double() for value in strengths)
    limit = torch.where(lam == float("inf"), lam, lr[row] * lam) + fixed
    xx = _segment_sum(x.double() ** 2, owner, items)
    if projection == PROX:
        norm = (_segment_sum(wide**2, owner, items) + 1e-8).sqrt()
        scale = torch.where(limit >= norm, 0.0, 1 - limit / norm)
    else:
        hard = limit == float("inf")
        pull = torch.where(hard, 0.0, limit / (xx.sqrt() + 1e-8))
        z = z - pull.to(z.dtype)[owner] * x
        zx = _segment_sum(z.double() * x.double(), owner, items)
        scale = torch.where((zx < args[0] * xx) | (hard & ~zx.isnan()), 0.0, 1.0).double()
    # Exact zero is absorbing: a group that was zero before the step stays so.
    scale = torch.where(xx == 0, 0.0, scale)
    factor = scale.to(z.dtype)[owner]
    return torch.where(factor == 0, torch.zeros_like(z), z * factor), scale


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.float64).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_memory_order(grad: Tensor) -> Tensor:
    """The elements of a dense tensor in the order they lie in memory."""
    return grad.as_strided((grad.numel(),), (1,))


def _bases(buffers: Sequence[Tensor]) -> list[int]:
    bases, total = [], 0
    for buffer in buffers:
        bases.append(total)
        total += buffer.numel()
    return bases


def _joined(buffers: Sequence[Tensor]) -> Tensor:
    """All buffers end to end; one buffer is returned itself, so writing to it writes through."""
    if len(buffers) == 1:
        return buffers[0]
    dtype = torch.float64 if any(b.dtype == torch.float64 for b in buffers) else torch.float32
    return torch.cat([buffer.to(dtype) for buffer in buffers])


def _write_back(buffers: Sequence[Tensor], flat: Tensor) -> None:
    if len(buffers) > 1:
        for buffer, base in zip(buffers, _bases(buffers), strict=True):
            buffer.copy_(flat[base : base + buffer.numel()])


def _elements(
    params: Sequence[Tensor], chunks: Tensor, items: Tensor, n_projected: int
) -> tuple[Tensor, Tensor]:
    """Place of every projected element in the joined buffers, and the item that owns it."""
    base = torch.tensor(_bases(params), device=chunks.device)
    start, inner, outer, stride = chunks[:, 3] + base[chunks[:, 1]], *chunks[:, 5:8].T
    size = inner * outer
    index = torch.repeat_interleave(size, output_size=n_projected)
    within = torch.arange(n_projected, device=chunks.device) - (size.cumsum(0) - size)[index]
    elements = start[index] + within // inner[index] * stride[index] + within % inner[index]
    chunk_owner = torch.repeat_interleave(items[:, 1] - items[:, 0], output_size=len(chunks))
    return elements, chunk_owner[index]


def _segment_sum(values: Tensor, owner: Tensor, items: Tensor) -> Tensor:
    """Sum per item in float64; elements of one item are neighbours, so the order is fixed."""
    lengths = torch.zeros(len(items), dtype=torch.int64, device=owner.device)
    lengths.index_add_(0, owner, torch.ones_like(owner))
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True)
