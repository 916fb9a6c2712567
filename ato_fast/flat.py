"""Flat buffers: a model's parameters end to end in memory, each `nn.Parameter` a view of its place.

`FlatParameters` moves the data once, keeps every parameter's own strides (channels_last stays
channels_last) and 64-byte alignment, knows where the groups of a `GroupLayout` lie in the buffers,
and notices when somebody moved a parameter away again. The model, `state_dict`, DDP and AMP see
ordinary parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .groups import GroupLayout
from .plan import Axis, build_plan

ALIGN_BYTES = 64


class FlatParameters:
    """Parameters of ``model`` in flat buffers, one per dtype, all on one device.

    Args:
        model: its parameters are re-homed in place (``p.data`` becomes a view).
        layout: whose in-group slices say what is projected.
        groups: the optimizer's parameters, one list per parameter group. Parameters of the layout's
            groups that are in none of them (frozen ones) are re-homed too, so that their channels
            can be projected; they are never updated.

    Raises:
        ValueError: a layout that is not this model's, a parameter listed twice or not of this
            model, parameters on several devices, or parameters that overlap in memory.
    """

    def __init__(
        self, model: nn.Module, layout: GroupLayout, groups: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        self.layout = layout
        self._homes = _homes(model)
        name_of = {}
        by_name = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            name_of.setdefault(param, name)
            by_name[name] = param
        hyper_of: dict[nn.Parameter, int] = {}
        for row, members in enumerate(groups):
            for param in members:
                if param not in name_of:
                    raise ValueError(
                        f"params: group {row} holds a tensor of shape {tuple(param.shape)} that is "
                        "not a parameter of this model"
                    )
                if param in hyper_of:
                    raise ValueError(f"params: {name_of[param]} is listed more than once")
                hyper_of[param] = row
        sliced = _sliced(layout, by_name)
        self.n_updated = len(hyper_of)
        frozen = [p for p in dict.fromkeys(param for param, _, _ in sliced) if p not in hyper_of]
        self.params: list[nn.Parameter] = [*hyper_of, *frozen]
        self.names = [name_of[p] for p in self.params]
        self._check_memory()
        self.device = self.params[0].device if self.params else torch.device("cpu")
        self.buffers: list[Tensor] = []
        self._rehome(hyper_of)
        self.strides = [p.stride() for p in self.params]
        self._addresses = [p.data_ptr() for p in self.params]
        self._missing = [buffer.new_empty(0) for buffer in self.buffers]
        self._absent = [self._missing[row[0]] for row in self.table.tolist()]
        self.group_hyper = self._rows_of_groups(sliced, hyper_of)
        self.axes = self._find_axes(sliced)
        self.plan = build_plan(self.table, self.axes, self.group_hyper, self.device)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Dtype of every buffer."""
        return [buffer.dtype for buffer in self.buffers]

    def new_state(self) -> list[Tensor]:
        """Zero buffers like the parameters', fp32 for parameters of 32 bits or fewer."""
        return [
            torch.zeros_like(b, dtype=b.dtype if b.dtype == torch.float64 else torch.float32)
            for b in self.buffers
        ]

    def view(self, buffers: Sequence[Tensor], index: int) -> Tensor:
        """Tensor ``index``'s part of ``buffers`` with the parameter's shape and strides."""
        buffer, offset, _, _ = self.table[index]
        return buffers[buffer].as_strided(
            self.params[index].shape, self.strides[index], int(offset)
        )

    def check(self) -> None:
        """Raise if a parameter no longer lives in its flat buffer.

        Raises:
            RuntimeError: ``model.to()``, ``p.data = ...`` or ``load_state_dict(assign=True)`` moved
                or replaced a parameter after the optimizer was made.
        """
        addresses = [param.data_ptr() for param in self.params]
        for param, address, name in zip(
            self.params if addresses != self._addresses else (),
            self._addresses,
            self.names,
            strict=False,
        ):
            if param.data_ptr() != address:
                raise RuntimeError(
                    f"{name}: it no longer lives in the optimizer's flat buffer (expected address "
                    f"{address:#x}, got {param.data_ptr():#x}); model.to(), p.data = ... or "
                    "another optimizer moved it, or shrink_ without optimizer= cut it. Make the "
                    "optimizer after the last such call"
                )
        for owner, key, param in self._homes:
            if owner.get(key) is not param:
                raise RuntimeError(
                    f"{key}: the model's parameter is no longer the one this optimizer updates; "
                    "load_state_dict(assign=True) or an assignment replaced it. Make a new "
                    "optimizer"
                )

    def gradients(self) -> list[Tensor]:
        """One gradient per tensor in the parameter's memory layout; an empty tensor if missing.

        Gradients are returned as they are; one with other strides is copied, never changed.

        Raises:
            TypeError: a sparse gradient.
        """
        grads = [param.grad for param in self.params[: self.n_updated]]
        expected = zip(grads, self.strides, self._absent, strict=False)
        for index, (grad, strides, absent) in enumerate(expected):
            if grad is None:
                grads[index] = absent
            else:
                try:
                    if grad.stride() == strides:
                        continue
                except RuntimeError:  # a sparse tensor has no strides
                    pass
                grads[index] = self._matching(grad, index)
        return grads + self._absent[self.n_updated :]

    def _matching(self, grad: Tensor, index: int) -> Tensor:
        if grad.layout is not torch.strided:
            raise TypeError(
                f"{self.names[index]}.grad: expected a dense gradient, got layout {grad.layout}"
            )
        strides = self.strides[index]
        if all(
            a == b or n == 1 for n, a, b in zip(grad.shape, grad.stride(), strides, strict=True)
        ):
            return grad
        copy = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
        return copy.copy_(grad)

    def _check_memory(self) -> None:
        devices = {p.device for p in self.params}
        if len(devices) > 1:
            raise ValueError(
                "params: expected all parameters on one device, got "
                + ", ".join(sorted(map(str, devices)))
            )
        spans = []
        for name, p in zip(self.names, self.params, strict=True):
            if not p.is_floating_point():
                raise ValueError(f"{name}: expected a floating dtype, got {p.dtype}")
            if p.layout is not torch.strided or p.device.type == "meta":
                raise ValueError(
                    f"{name}: expected a dense tensor with data, got layout {p.layout} "
                    f"on {p.device}"
                )
            if p.numel():
                extent = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) + 1
                spans.append((p.data_ptr(), p.data_ptr() + extent * p.element_size(), name))
        spans.sort()
        for (_, end, name), (begin, _, other) in zip(spans, spans[1:], strict=False):
            if begin < end:
                raise ValueError(
                    f"{name} and {other} overlap in memory; tie weights by sharing one "
                    "nn.Parameter, not its data"
                )

    def _rehome(self, hyper_of: dict[nn.Parameter, int]) -> None:
        sizes: dict[torch.dtype, int] = {}
        rows = []
        for param in self.params:
            align = ALIGN_BYTES // param.element_size()
            offset = sizes.get(param.dtype, 0)
            sizes[param.dtype] = offset + -(-param.numel() // align) * align
            buffer = list(sizes).index(param.dtype)
            rows.append((buffer, offset, param.numel(), hyper_of.get(param, 0)))
        self.table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        """int64 ``[n_tensors, 4]``: buffer, offset, numel, hyperparameter row."""
        self.tensors = torch.from_numpy(self.table)
        with torch.no_grad():
            for dtype, size in sizes.items():
                self.buffers.append(_aligned_zeros(size, dtype, self.device))
            for param, (buffer, offset, _, _) in zip(self.params, rows, strict=True):
                strides = param.stride() if _is_dense(param) else param.contiguous().stride()
                view = self.buffers[buffer].as_strided(param.shape, strides, offset)
                view.copy_(param.data)
                param.data = view

    def _find_axes(self, sliced: list[tuple[nn.Parameter, int, np.ndarray]]) -> list[Axis]:
        index_of = {param: i for i, param in enumerate(self.params)}
        found: dict[int, tuple[int, np.ndarray]] = {}
        for param, dim, groups in sliced:
            index = index_of[param]
            if index not in found:
                found[index] = (dim, groups.copy())
                continue
            known_dim, known = found[index]
            if known_dim != dim:
                raise ValueError(
                    f"{self.names[index]}: its groups lie along dimensions {known_dim} and {dim}; "
                    "a tensor may produce channels along one dimension only"
                )
            clash = (known >= 0) & (groups >= 0) & (known != groups)
            if clash.any():
                at = int(np.flatnonzero(clash)[0])
                raise ValueError(
                    f"{self.names[index]} dim {dim}: entry {at} belongs to groups "
                    f"{int(known[at])} and {int(groups[at])}; expected at most one"
                )
            found[index] = (dim, np.maximum(known, groups))
        axes = []
        for index, (dim, groups) in sorted(found.items()):
            param = self.params[index]
            n = param.shape[dim]
            inner = param.stride(dim) if n > 1 else param.numel()
            outer = param.numel() // (n * inner) if param.numel() else 0
            axes.append(Axis(index, inner, outer, groups))
        return axes

    def _rows_of_groups(
        self,
        sliced: list[tuple[nn.Parameter, int, np.ndarray]],
        hyper_of: dict[nn.Parameter, int],
    ) -> np.ndarray:
        """Hyperparameter row per group: that of the tensor with its first slice (rows first)."""
        rows = np.zeros(self.layout.n_groups, dtype=np.int64)
        for param, _, groups in reversed(sliced):
            if param in hyper_of and param.numel():
                rows[groups[groups >= 0]] = hyper_of[param]
        return rows


def _sliced(
    layout: GroupLayout, by_name: dict[str, nn.Parameter]
) -> list[tuple[nn.Parameter, int, np.ndarray]]:
    """(parameter, dim, flat group per entry) of every in-group slice, ``row`` slices first.

    Raises:
        ValueError: a tensor the model lacks or of another shape: not this model's layout.
    """
    found = []
    for gate in layout.gates:
        for part in gate.slices:
            if not part.in_group:
                continue
            if part.tensor not in by_name:
                raise ValueError(
                    f"layout: gate {gate.name} needs parameter {part.tensor!r}, which this model "
                    "does not have; trace this model again"
                )
            param = by_name[part.tensor]
            expected = tuple(layout.shapes[part.tensor])
            if tuple(param.shape) != expected:
                raise ValueError(
                    f"layout: {part.tensor}: expected shape {expected}, the model's is "
                    f"{tuple(param.shape)}; trace this model again"
                )
            channels = np.asarray(part.channels, dtype=np.int64)
            groups = np.where(channels >= 0, channels + gate.offset, -1)
            found.append((part.role != "row", param, part.dim % param.dim(), groups))
    found.sort(key=lambda entry: entry[0])
    return [entry[1:] for entry in found]


def _homes(model: nn.Module) -> list[tuple[dict[str, object], str, nn.Parameter]]:
    """Where the model keeps each parameter, to notice a replacement."""
    return [
        (module._parameters, key, param)
        for module in model.modules()
        for key, param in module._parameters.items()
        if param is not None
    ]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, each once, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _aligned_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``size`` zeros whose first element lies on an `ALIGN_BYTES` boundary."""
    spare = ALIGN_BYTES // torch.empty((), dtype=dtype).element_size()
    base = torch.zeros(size + spare, dtype=dtype, device=device)
    skip = -base.data_ptr() % ALIGN_BYTES // base.element_size()
    return base[skip : skip + size]
