"""What `SGD`, `Adam` and `AdamW` share: flat buffers, mask and strengths, the step, state_dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import backend, ops
from .capture import check_plain
from .flat import FlatParameters
from .groups import GroupLayout
from .projection import Projection, check_projection, check_strength
from .reference import ADAMW, NO_PROJECTION
from .saved_state import check_extra, matched_state
from .shrink import by_tensor, named_tensors, select

EXTRA_KEY = "ato"
"""Key of `state_dict` with what torch.optim does not know."""


class GroupOptimizer(torch.optim.Optimizer):
    """Base of the optimizers over flat buffers.

    Parameter groups are fixed at construction. ``step`` reads no value back from the device.
    """

    _step_supports_amp_scaling = True
    _code: int

    def __init__(
        self,
        model: nn.Module,
        layout: GroupLayout,
        params: Iterable[Mapping[str, Any]] | Iterable[nn.Parameter] | None,
        defaults: dict[str, Any],
        projection: Projection | None,
    ) -> None:
        check_plain(model)
        backend.requested()
        if not isinstance(layout, GroupLayout):
            raise TypeError(f"layout: expected a GroupLayout, got {type(layout).__name__}")
        self.projection = check_projection(projection)
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        self._fixed = False
        super().__init__(params, defaults)
        self._fixed = True
        self._required = frozenset(self.defaults) - {"decoupled_weight_decay"}
        for group in self.param_groups:
            self._check_group(group)
        self.layout = layout
        self.flat = FlatParameters(model, layout, [g["params"] for g in self.param_groups])
        device = self.flat.device
        self._step_counts = torch.zeros(len(self.flat.params), device=device)
        self._first: list[Tensor] = []
        self._second: list[Tensor] = []
        self._scratch = torch.zeros(1, dtype=torch.int32, device=device)
        self._mask = torch.ones(layout.n_groups, dtype=torch.bool, device=device)
        self._keep_array = np.ones(layout.n_groups, dtype=bool)
        self._strength = torch.zeros(layout.n_groups, device=device)
        self._threshold = torch.zeros(layout.n_groups, device=device)
        self._no_lr = torch.empty(0, device=device)
        on_cpu = device.type == "cpu"
        self._rate_dtypes = (torch.float32, torch.float64) if on_cpu else (torch.float32,)
        self._n_rows = len(self.param_groups)
        self._prepare_state()
        # The op mutates buffers that the compiled graph's own inputs view, which it refuses.
        self._launch = torch.compiler.disable(_launch)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """weight_decay, beta1, beta2, eps, nesterov of one parameter group."""
        raise NotImplementedError

    def _needs_first(self) -> bool:
        raise NotImplementedError

    def _state_views(self, index: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: the flat buffers are laid out once.

        Raises:
            RuntimeError: called later.
        """
        if self._fixed:
            raise RuntimeError(
                "add_param_group: the parameters already live in flat buffers; pass all groups as "
                "params= of a new optimizer"
            )
        super().add_param_group(param_group)

    def set_mask(
        self,
        mask: Tensor | np.ndarray | None,
        strength: float | Tensor | None = None,
        *,
        threshold: float | Tensor | None = None,
    ) -> None:
        """Say which groups are dropped and how strongly they are pulled to zero each step.

        Args:
            mask: ``[n_groups]`` of 0 (drop) and 1 (keep), bool, int or float; None drops nothing.
            strength: lambda, one number or ``[n_groups]``; the group loses the norm lr * lambda.
            threshold: norm a group loses per step whatever lr is, one number or ``[n_groups]``.
                Both add up; ``inf`` makes the group zero at the next step. None keeps the last
                values (0 at first).

        Raises:
            ValueError: a mask of another size or with values other than 0 and 1; a negative or NaN
                strength or threshold.
        """
        keep = np.ones(self.layout.n_groups, dtype=bool)
        if mask is not None:
            values = self.layout.check_mask(mask).detach().cpu().numpy()
            if values.dtype != np.bool_ and not np.isin(values, (0, 1)).all():
                raise ValueError("mask: expected only 0 (drop) and 1 (keep)")
            keep = values.astype(bool)
        self.set_strength(strength, threshold=threshold)
        if not np.array_equal(keep, self._keep_array):
            self._keep_array = keep
            self._mask.copy_(torch.from_numpy(keep))

    def set_strength(
        self, strength: float | Tensor | None = None, *, threshold: float | Tensor | None = None
    ) -> None:
        """New strengths for the same mask, written in place on the device; None keeps the old.

        Raises:
            ValueError: as `set_mask`; values of a tensor on an accelerator are not read back.
        """
        new = [
            (check_strength(value, self._strength, name), held)
            for value, held, name in (
                (strength, self._strength, "strength"),
                (threshold, self._threshold, "threshold"),
            )
            if value is not None
        ]
        for value, held in new:
            held.copy_(value) if isinstance(value, Tensor) else held.fill_(value)

    @property
    def mask(self) -> Tensor:
        """The mask in use: bool ``[n_groups]`` on the CPU, True keeps."""
        return torch.from_numpy(self._keep_array.copy())

    @torch.no_grad()
    def group_norms(self) -> Tensor:
        """Norm of every group's current parameters (rows and affine), float32 ``[n_groups]``."""
        return self._sums()[:, 0].sqrt().float()

    @torch.no_grad()
    def n_zero(self) -> Tensor:
        """Number of dropped groups that are exactly zero, 0-dim int64 on the device."""
        return ((self._sums()[:, 0] == 0) & ~self._mask).sum()

    def _sums(self) -> Tensor:
        self.flat.check()
        if not self.flat.buffers:
            return torch.zeros(self.layout.n_groups, 1, dtype=torch.float64)
        flat, plan = self.flat, self.flat.plan
        return ops.group_norms(
            flat.buffers, [], flat.tensors, plan.segments, plan.bundles, plan.blocks,
            self.layout.n_groups,
        )  # fmt: skip

    def _prepare_state(self) -> None:
        """Make the state buffers the hyperparameters need and the views ``self.state`` shows."""
        if not self._first and self._needs_first():
            self._first = self.flat.new_state()
        self._bind_state()

    def _bind_state(self) -> None:
        for index in range(self.flat.n_updated):
            views = {"step": self._step_counts[index], **self._state_views(index)}
            self.state[self.flat.params[index]] = views

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter with a gradient, and the projection of dropped groups.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: a parameter was moved out of its flat buffer.
            BackendError: a forced backend cannot serve this model.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._launch(self)
        return loss

    def prepare_cut(
        self,
        model: nn.Module,
        layout: GroupLayout,
        kept: Mapping[tuple[str, int], np.ndarray],
    ) -> Callable[[nn.Module, GroupLayout, Tensor], None]:
        """Copy the state without what is about to be cut; see `ato_fast.shrink_`.

        Args:
            model, layout: as they still are.
            kept: indices to keep per (tensor, dim).

        Returns:
            ``(model, smaller layout, keep)``, to be called once the parameters are cut: moves them
            and the state to new flat buffers.

        Raises:
            ValueError: ``layout`` is not this optimizer's.
            RuntimeError: a parameter was moved out of its flat buffer.
        """
        if layout.sha256 != self.layout.sha256:
            raise ValueError(
                f"optimizer: it was made with another layout (digest {self.layout.sha256[:12]}, "
                f"the one given has {layout.sha256[:12]}); give optimizer.layout"
            )
        self.flat.check()
        own = set(model.parameters())
        if not all(param in own for param in self.flat.params):
            raise ValueError("optimizer: it steps another model's parameters")
        dims_of = by_tensor(kept)
        tensors = dict(named_tensors(model))
        own = {tensors[name]: dims for name, dims in dims_of.items()}
        states = [
            {k: select(v, own.get(p, {})) for k, v in self._state_views(i).items()}
            for i, p in enumerate(self.flat.params[: self.flat.n_updated])
        ]

        def resume(model: nn.Module, layout: GroupLayout, keep: Tensor) -> None:
            self.layout = layout
            self.flat = FlatParameters(model, layout, [g["params"] for g in self.param_groups])
            # The buffers that were in use get successors of the new size.
            self._first, self._second = (
                self.flat.new_state() if held else [] for held in (self._first, self._second)
            )
            self._prepare_state()
            for index, state in enumerate(states):
                for key, view in self._state_views(index).items():
                    view.copy_(state[key])
            index = torch.nonzero(keep).flatten()
            self._keep_array = self._keep_array[index.numpy()]
            index = index.to(self._mask.device)
            self._mask, self._strength, self._threshold = (
                held.index_select(0, index)
                for held in (self._mask, self._strength, self._threshold)
            )

        return resume

    def op_arguments(self) -> tuple[Any, ...]:
        """Arguments of ``ato_fast::group_step_`` (`ops.py`) for the step now due."""
        if not self._first and self._needs_first():
            self._prepare_state()
        flat, plan = self.flat, self.flat.plan
        if len(self.param_groups) != self._n_rows:
            raise RuntimeError(
                f"param_groups: expected the {self._n_rows} groups this optimizer was made with, "
                f"got {len(self.param_groups)}; make a new optimizer"
            )
        hyper: list[float] = []
        rates: list[Tensor] = []
        for group in self.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                dtype = lr.dtype if lr.dtype in self._rate_dtypes else torch.float32
                rates.append(lr.to(flat.device, dtype, non_blocking=True))
                lr = 0.0
            else:
                rates.append(self._no_lr)
            hyper += (lr, *self._hyper_row(group))
        if all(rate is self._no_lr for rate in rates):
            rates = []
        projection, constants = NO_PROJECTION, ()
        if self.projection is not None:
            projection, constants = self.projection.code, self.projection.args
        return (
            flat.buffers, self._first, self._second, self._step_counts, self._scratch,
            flat.gradients(), flat.tensors, plan.segments, plan.bundles, plan.units, plan.blocks,
            self._mask, self._strength, self._threshold, hyper, rates,
            self._amp("grad_scale"), self._amp("found_inf"),
            self._code, projection, constants,
        )  # fmt: skip

    def _amp(self, name: str) -> Tensor | None:
        """``grad_scale`` or ``found_inf`` as GradScaler leaves it on the optimizer."""
        value = getattr(self, name, None)
        return value.to(self.flat.device, non_blocking=True) if isinstance(value, Tensor) else None

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's dictionary, and under ``"ato"`` the mask, strengths and layout digest.

        States refer to the live buffers, as torch's do. Parameters never updated have no state, as
        in torch.
        """
        packed = super().state_dict()
        counts = self._step_counts.tolist()
        packed["state"] = {
            key: dict(value) for key, value in packed["state"].items() if counts[key] > 0
        }
        packed[EXTRA_KEY] = {
            "mask": self.mask,
            "strength": self._strength,
            "threshold": self._threshold,
            "layout": self.layout.sha256,
        }
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict of this class or of torch.optim's; copies into the flat buffers.

        A dictionary of torch.optim's leaves mask and strengths as they are.

        Raises:
            ValueError: other groups, shapes or layout, or an option this optimizer lacks
                (maximize, amsgrad, differentiable); nothing has changed then.
        """
        for key in ("param_groups", "state"):
            if key not in state_dict:
                raise ValueError(f"state_dict: expected an optimizer's, {key!r} is missing")
        groups = state_dict["param_groups"]
        extra = state_dict.get(EXTRA_KEY)
        values = matched_state(self, groups, state_dict["state"])
        for group in groups:
            missing = sorted(self._required - group.keys())
            if missing:
                raise ValueError(
                    f"state_dict: expected {type(self).__name__}'s, "
                    f"its param_groups lack {', '.join(missing)}"
                )
            # Only torch's Adam and AdamW have the key, and share all others.
            decoupled = group.get("decoupled_weight_decay")
            if decoupled is not None and decoupled != (self._code == ADAMW):
                got = "AdamW's (decoupled" if decoupled else "Adam's (coupled"
                raise ValueError(
                    f"state_dict: expected {type(self).__name__}'s, got {got} weight decay)"
                )
            self._check_group(group)
        if extra is not None:
            check_extra(self, extra)
        plain = {k: v for k, v in state_dict.items() if k != EXTRA_KEY}
        super().load_state_dict({**plain, "state": {}})
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._prepare_state()
        for index, views in enumerate(self.state[p] for p in self.flat.params[: len(values)]):
            for key, view in views.items():
                value = values[index].get(key)
                view.copy_(value) if value is not None else view.zero_()
        if extra is not None:
            self.set_mask(extra["mask"], extra["strength"], threshold=extra["threshold"])

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would still step this model's buffers.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, it steps flat buffers that its "
            "model's parameters view; save state_dict() and load it into a new optimizer"
        )

    def complete_state(self, entry: dict[str, Any]) -> None:
        """Derive what torch's entry lacks."""


def _launch(optimizer: GroupOptimizer) -> None:
    if optimizer.flat.buffers:
        optimizer.flat.check()
        ops.group_step_(*optimizer.op_arguments(), views=optimizer.flat.params)
