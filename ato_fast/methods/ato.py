"""Auto-Train-Once: one run trains the network, finds what to drop and drives it to zero.

Source: ATO (CVPR 2024, arXiv 2403.14729). Deviations, all off with ``fidelity="paper"``: one
Gumbel draw for both loss terms of the controller; a frozen mask without noise that meets the budget
exactly; strength as a time to zero instead of a number to tune. With ``fidelity="paper"`` the
frozen mask is, as published, one random draw (the one the last search epoch was projected with),
but it is saved with the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..budget import Budget
from ..groups import GroupLayout
from ..schedule import Schedule
from ..trace import trace
from .clock import Clock
from .finish import Result, finish
from .search import Search, cross_entropy

RAMP_REFRESHES = 50
"""How often the ramp looks at the groups' norms again; between two looks it is a straight line."""

CONTROLLER_LR = 1e-3
STATE_VERSION = 1


class ATO:
    """Drives one run: call `step` where the optimizer's step was, `finish` at the end.

    Args:
        model: trained in place; on its final device.
        example_inputs: tuple of tensors, what ``model(*example_inputs)`` takes.
        optimizer: ``(model, layout) -> optimizer`` with ``set_mask``, e.g.
            ``partial(ato.AdamW, lr=1e-3)``.
        budget: checked before anything is trained.
        schedule: phases, in steps of this run.
        controller_data: iterable of batches, iterated again and again, that the weights are not
            trained on (see `hold_out`). A plain attribute: may be set before the first step.
        controller_loss: ``(model, batch) -> scalar``; default: cross-entropy of ``(x, y)``. Gets
            the model masked and in eval mode.
        scope, min_channels, round_to: as for `trace`.
        fidelity: ``"default"`` or ``"paper"`` (see the module's docstring and `Search`).
        seed: of the controller, its noise and its data order. Equal on every rank.
        layout: a traced layout, to trace once for several runs; `GroupLayout.tightened` if need be.

    Raises:
        ValueError: a bad argument, or a budget out of reach (its floor is named).
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        *,
        optimizer: Callable[[nn.Module, GroupLayout], torch.optim.Optimizer],
        budget: Budget,
        schedule: Schedule,
        controller_data: Iterable | None = None,
        controller_loss: Callable[[nn.Module, Any], Tensor] | None = None,
        scope: str = "inner",
        fidelity: str = "default",
        min_channels: int = 1,
        round_to: int = 1,
        seed: int = 0,
        layout: GroupLayout | None = None,
    ) -> None:
        for name, value, kind in (("budget", budget, Budget), ("schedule", schedule, Schedule)):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected an ato.{kind.__name__}, got {value!r}")
        if layout is None:
            layout = trace(model, example_inputs, scope=scope)
        layout = layout.tightened(min_channels, round_to)
        budget.check(layout)
        self.model = model
        self.example_inputs = tuple(example_inputs)
        self.layout = layout
        self.budget = budget
        self.schedule = schedule
        self.controller_data = controller_data
        self.controller_loss = controller_loss or cross_entropy
        self.fidelity = fidelity
        self.seed = seed
        self.search = Search(model, layout, budget, fidelity=fidelity, seed=seed)
        self.optimizer = _optimizer(optimizer, model, layout)
        self.mask = torch.ones(layout.n_groups, dtype=torch.bool)
        self.frozen = False
        self.history: list[dict] = []
        self._step = 0
        self._projecting = False
        self._strength: Tensor | None = None
        self._threshold: Tensor | None = None
        self._clock = Clock(next(model.parameters()).device)
        self._earlier = {"controller": 0.0, "projection": 0.0, "plain step": 0.0}

    @property
    def controller(self) -> nn.Module:
        """The mask generator."""
        return self.search.controller

    @property
    def epoch(self) -> int:
        """Epochs completed; equals ``schedule.epochs`` at the end."""
        return self._step // self.schedule.steps_per_epoch

    @property
    def phase(self) -> str:
        """Phase of the next step, one of `schedule.PHASES`."""
        return self.schedule.phase(self._step)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent on the controller and on the projection.

        The projection is part of the fused optimizer step; its share is what steps with a mask took
        beyond the median step without one, plus the time to set masks and strengths.
        """
        clock = self._clock
        projection = clock.total("projection") + clock.excess("masked step", self._plain_step())
        return {
            "controller": self._earlier["controller"] + clock.total("controller"),
            "projection": self._earlier["projection"] + projection,
        }

    def _plain_step(self) -> float:
        """Typical seconds of an optimizer step without a mask, of this run or the one resumed."""
        return self._clock.typical("plain step") or self._earlier["plain step"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the model's gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Optimizer step with projection; controller steps, redraws and the freeze when due.

        Reads nothing back to the host, except where a controller step or an epoch ends.

        Args:
            scaler: where the loss was scaled, the scaler: it steps the optimizer, so that a step
                with infinite gradients is skipped, projection included. Calling
                ``scaler.update()`` stays with the caller.

        Raises:
            ValueError: no ``controller_data`` while the controller still needs it.
            FloatingPointError: a loss of the controller, its logits or, at the end of an epoch, a
                parameter is NaN or infinite.
        """
        if self.controller_data is None and not self.frozen:
            raise ValueError(
                "controller_data: None; the controller needs batches the weights are not trained "
                "on: train_set, held_out = ato.hold_out(dataset), then "
                "controller_data=DataLoader(held_out, batch_size=...)"
            )
        t, steps = self._step, self.schedule.steps
        with self._clock.measure("projection"):
            self._prepare(t)
        with self._clock.measure("masked step" if self._projecting else "plain step"):
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
        self._step += 1
        due = self.schedule.controller_due(t)
        if due:
            lr = CONTROLLER_LR * (0.1 if t >= steps.controller_drop else 1.0)
            with self._clock.measure("controller"):
                for _ in range(due):
                    self.search.step(self.controller_data, self.controller_loss, lr)
        if self._step % self.schedule.steps_per_epoch == 0:
            self._end_epoch(t)

    def _prepare(self, t: int) -> None:
        """Whatever changes before optimizer step ``t``: mask, strength, freeze."""
        steps = self.schedule.steps
        redrawn = False
        if t == steps.freeze:
            if self.fidelity == "default":
                self.mask = self.search.frozen_mask()
            self.frozen = redrawn = True
        elif steps.controller_start <= t < steps.freeze:
            if t % self.schedule.steps_per_epoch == 0:
                self.mask = self.search.draw()
                redrawn = True
        if t < steps.projection_start:
            return
        started = not self._projecting
        self._projecting = True
        if started or redrawn:
            self._strengthen(t)
            self._set_mask()
        elif self._due(t):
            self._strengthen(t)
            self.optimizer.set_strength(self._strength, threshold=self._threshold)

    def _due(self, t: int) -> bool:
        """Whether the strength changes before step ``t`` although the mask does not."""
        steps = self.schedule.steps
        if self.fidelity == "paper":
            return t == steps.strong_start
        every = max(1, (steps.zero_by - steps.freeze) // RAMP_REFRESHES)
        ramping = steps.freeze <= t < steps.zero_by
        return t == steps.zero_by - 1 or (ramping and (t - steps.freeze) % every == 0)

    def _strengthen(self, t: int) -> None:
        """The strength for step ``t`` and what follows, on the model's device."""
        steps = self.schedule.steps
        if self.fidelity == "paper":
            strength = self.schedule.strengths[t >= steps.strong_start]
            self._strength = strength * self._share_of_gate()
            return
        norms = self.optimizer.group_norms()
        if t >= steps.zero_by - 1:
            self._threshold = torch.full_like(norms, math.inf)
        elif t >= steps.freeze:
            self._threshold = norms / (steps.zero_by - t)
        else:
            n_steps = max(1, steps.freeze - steps.projection_start)
            self._threshold = norms * (self.schedule.pull / n_steps)

    def _share_of_gate(self) -> Tensor:
        """Published weight per group: dropped groups of its gate over all dropped groups."""
        dropped = ~self.mask
        n_dropped = max(1, int(dropped.sum()))
        weights = torch.zeros(self.layout.n_groups)
        for gate in self.layout.gates:
            weights[gate.span] = float(dropped[gate.span].sum()) / n_dropped
        return weights.to(next(self.model.parameters()).device)

    def _set_mask(self) -> None:
        self.optimizer.set_mask(self.mask, self._strength, threshold=self._threshold)

    def _end_epoch(self, t: int) -> None:
        self.check_finite()
        losses = self.search.losses
        means = np.mean(losses, axis=0).tolist() if losses else [None] * 3
        self.history.append(
            {
                "epoch": self.epoch,
                "phase": self.schedule.phase(t),
                "kept": [int(self.mask[gate.span].sum()) for gate in self.layout.gates],
                "macs": self.layout.macs(self.mask),
                "params": self.layout.params(self.mask),
                "controller_steps": len(losses),
                "controller_objective": means[0],
                "controller_task_loss": means[1],
                "controller_resource_loss": means[2],
            }
        )
        self.search.losses = []
        self._clock.durations("controller")

    def check_finite(self) -> None:
        """Raise if a parameter is NaN or infinite; called at the end of every epoch.

        Raises:
            FloatingPointError: naming the first such parameter.
        """
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        finite = torch.stack([torch.isfinite(p.detach()).all() for p in parameters])
        if not bool(finite.all()):
            first = names[int(finite.to(torch.uint8).argmin())]
            raise FloatingPointError(
                f"parameter {first} is not finite after epoch {self.epoch} (step {self._step}), "
                f"phase {self.schedule.phase(self._step - 1)}"
            )

    def finish(self, evaluate: Callable[[nn.Module], float] | None = None) -> Result:
        """Cut the dropped groups; returns the small network and a report.

        Dropped groups that are not exactly zero yet are zeroed first, and counted in the report
        (``n_unfinished``), with the accuracy before and after if ``evaluate`` is given. The small
        network is compared with the masked one on the example inputs.

        Args:
            evaluate: ``module -> float``, e.g. validation accuracy; the small network's is
                ``report["accuracy"]``.

        Raises:
            RuntimeError: the mask is not frozen yet, or the small network computes something else.
        """
        if not self.frozen:
            raise RuntimeError(
                f"finish: the mask is not frozen yet: {self._step} steps done, the freeze is at "
                f"step {self.schedule.steps.freeze}"
            )
        return finish(self, evaluate)

    def state_dict(self) -> dict:
        """All state of the run except the model's own, in tensors, numbers, strings and lists.

        Load it into a run made with the same arguments, after the model's own state.
        """
        return _plain(
            {
                "version": STATE_VERSION,
                "layout": self.layout.sha256,
                "arguments": self._arguments(),
                "step": self._step,
                "mask": self.mask,
                "frozen": self.frozen,
                "projecting": self._projecting,
                "strength": self._strength,
                "threshold": self._threshold,
                "optimizer": self.optimizer.state_dict(),
                "search": self.search.state_dict(),
                "history": self.history,
                "seconds": {**self.seconds, "plain step": self._plain_step()},
            }
        )

    def _arguments(self) -> dict:
        """What must agree for a run to be continued, as plain data."""
        return _plain(
            {
                **{f"schedule.{name}": value for name, value in self.schedule.state().items()},
                "budget": [self.budget.kind, self.budget.value],
                "fidelity": self.fidelity,
                "min_channels": self.layout.min_channels,
                "round_to": self.layout.round_to,
                "seed": self.seed,
                "optimizer": type(self.optimizer).__name__,
            }
        )

    def load_state_dict(self, state: dict) -> None:
        """Continue a run bit by bit; the arguments of both runs must agree.

        Raises:
            ValueError: the state is of another version or layout, or of other arguments.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise ValueError(f"state: expected an ATO run's, of version {STATE_VERSION}")
        if state["layout"] != self.layout.sha256:
            raise ValueError(
                "state: it belongs to another layout: another model, width or scope; resume with "
                "the arguments the run was started with"
            )
        # States of version 0.1 name no round_to.
        theirs, mine = {"round_to": 1, **state["arguments"]}, self._arguments()
        for name in sorted(mine.keys() | theirs.keys()):
            if theirs.get(name) != mine.get(name):
                raise ValueError(
                    f"state: its {name} is {theirs.get(name)}, this run's is {mine.get(name)}; "
                    "resume with the arguments the run was started with"
                )
        device = next(self.model.parameters()).device
        self._step = int(state["step"])
        self.mask = state["mask"].to("cpu", torch.bool).clone()
        self.frozen = bool(state["frozen"])
        self._projecting = bool(state["projecting"])
        self._strength, self._threshold = (
            None if state[name] is None else state[name].to(device)
            for name in ("strength", "threshold")
        )
        self.optimizer.load_state_dict(state["optimizer"])
        self.search.load_state_dict(state["search"])
        self.history = [dict(entry) for entry in state["history"]]
        self._earlier = dict(state["seconds"])
        self._clock = Clock(device)
        if self._projecting:
            self._set_mask()


def _optimizer(
    make: Callable[[nn.Module, GroupLayout], torch.optim.Optimizer],
    model: nn.Module,
    layout: GroupLayout,
) -> torch.optim.Optimizer:
    """The optimizer of a run, checked to be one that projects groups."""
    theirs = getattr(getattr(make, "func", make), "__module__", "").startswith("torch.optim")
    if theirs or not callable(make) or isinstance(make, torch.optim.Optimizer):
        raise TypeError(
            "optimizer: expected a callable (model, layout) -> optimizer such as "
            f"partial(ato.AdamW, lr=1e-3), got {make!r}"
        )
    optimizer = make(model, layout)
    if not hasattr(optimizer, "set_mask"):
        raise TypeError(
            "optimizer: expected it to return an optimizer that projects groups (ato.SGD, "
            f"ato.AdamW), it returned a {type(optimizer).__name__}"
        )
    return optimizer


def _plain(value: Any) -> Any:
    """``value`` with tuples and mappings turned into lists and dicts, tensors copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
