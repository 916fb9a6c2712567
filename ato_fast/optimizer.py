"""`SGD`, `Adam`, `AdamW`: the updates of torch.optim with the projection in the same pass.

All are `torch.optim.Optimizer`s over flat buffers (`flat.py`). Without dropped groups they follow
torch.optim to rounding; their ``state_dict`` loads into torch.optim's class and back, and holds the
mask and strengths besides, so that a resumed run continues bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .group_optimizer import GroupOptimizer
from .groups import GroupLayout
from .projection import Projection, Prox
from .reference import ADAM, ADAMW
from .reference import SGD as SGD_CODE

UNSUPPORTED = ("maximize", "amsgrad", "differentiable")
"""Options of torch.optim that a loaded state_dict must not ask for."""


class SGD(GroupOptimizer):
    """torch.optim.SGD with the projection of dropped groups fused into the step.

    Args:
        model: its parameters are re-homed into flat buffers.
        layout: groups of this model (`ato_fast.trace`).
        lr, momentum, dampening, weight_decay, nesterov: as torch.optim.SGD; lr may be a tensor.
        projection: `Prox`, `HalfSpace`, `DHSPG` or None.
        params: parameter groups over this model's parameters (default: all that require grad).

    Raises:
        ValueError: a hyperparameter out of range, or a layout that is not this model's.
    """

    _code = SGD_CODE

    def __init__(
        self,
        model: nn.Module,
        layout: GroupLayout,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        projection: Projection | None = Prox(),  # noqa: B008  (frozen dataclass)
        params: Iterable[Mapping[str, Any]] | Iterable[nn.Parameter] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(model, layout, params, defaults, projection)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        _check_flags(group)
        _check_range("lr", group["lr"])
        for name in ("momentum", "weight_decay"):
            _check_range(name, group[name])
        _check_number("dampening", group["dampening"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov: expected momentum > 0 and dampening = 0 with it, got momentum "
                f"{group['momentum']!r} and dampening {group['dampening']!r}"
            )

    def _hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return (
            group["weight_decay"],
            group["momentum"],
            group["dampening"],
            0.0,
            float(group["nesterov"]),
        )

    def _needs_first(self) -> bool:
        return any(group["momentum"] != 0 for group in self.param_groups)

    def _state_views(self, index: int) -> dict[str, Tensor]:
        if not self._first:
            return {}
        return {"momentum_buffer": self.flat.view(self._first, index)}

    def complete_state(self, entry: dict[str, Any]) -> None:
        """As `GroupOptimizer.complete_state`."""
        if entry.get("momentum_buffer") is None:
            entry.clear()
        else:
            entry.setdefault("step", 1.0)


class Adam(GroupOptimizer):
    """torch.optim.Adam (weight decay added to the gradient) with the projection in the step.

    Args:
        model: its parameters are re-homed into flat buffers.
        layout: groups of this model (`ato_fast.trace`).
        lr, betas, eps, weight_decay: as torch.optim.Adam; lr may be a tensor.
        projection: `Prox`, `HalfSpace`, `DHSPG` or None.
        params: parameter groups over this model's parameters (default: all that require grad).

    Raises:
        ValueError: a hyperparameter out of range, or a layout that is not this model's.
    """

    _code = ADAM

    def __init__(
        self,
        model: nn.Module,
        layout: GroupLayout,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        projection: Projection | None = Prox(),  # noqa: B008  (frozen dataclass)
        params: Iterable[Mapping[str, Any]] | Iterable[nn.Parameter] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            # As torch.optim's Adam and AdamW, which share all else, tell their states apart.
            "decoupled_weight_decay": self._code == ADAMW,
        }
        super().__init__(model, layout, params, defaults, projection)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        _check_flags(group)
        for name in ("lr", "eps", "weight_decay"):
            _check_range(name, group[name])
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
            _check_range(name, beta, below=1.0)

    def _hyper_row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return (group["weight_decay"], beta1, beta2, group["eps"], 0.0)

    def _needs_first(self) -> bool:
        return True

    def complete_state(self, entry: dict[str, Any]) -> None:
        """As `GroupOptimizer.complete_state`."""
        missing = sorted({"step", "exp_avg", "exp_avg_sq"} - entry.keys())
        if entry and missing:
            raise ValueError(f"state_dict: an entry of its state lacks {', '.join(missing)}")

    def _prepare_state(self) -> None:
        if not self._second:
            self._second = self.flat.new_state()
        super()._prepare_state()

    def _state_views(self, index: int) -> dict[str, Tensor]:
        return {
            "exp_avg": self.flat.view(self._first, index),
            "exp_avg_sq": self.flat.view(self._second, index),
        }


class AdamW(Adam):
    """torch.optim.AdamW (decoupled weight decay) with the projection in the step.

    Arguments and errors as `Adam`; weight_decay defaults to 1e-2.
    """

    _code = ADAMW

    def __init__(
        self,
        model: nn.Module,
        layout: GroupLayout,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        projection: Projection | None = Prox(),  # noqa: B008  (frozen dataclass)
        params: Iterable[Mapping[str, Any]] | Iterable[nn.Parameter] | None = None,
    ) -> None:
        super().__init__(model, layout, lr, betas, eps, weight_decay, projection, params)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _check_range(name: str, value: object, below: float | None = None) -> None:
    """Check that ``value`` is a number >= 0 (and < ``below``); lr may be a one-element tensor."""
    if name == "lr" and isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"lr: expected a floating tensor with one element, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
        return
    limit = "" if below is None else f" and < {below:g}"
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < 0
        or (below is not None and value >= below)
    ):
        raise ValueError(f"{name}: expected a finite number >= 0{limit}, got {value!r}")


def _check_flags(group: Mapping[str, Any]) -> None:
    for name in UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"{name}: expected False (not supported), got {group[name]!r}")
