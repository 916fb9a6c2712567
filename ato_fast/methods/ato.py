"""Auto-Train-Once: one run trains the network, finds what to drop and drives it to zero.

Source: ATO (CVPR 2024, arXiv 2403.14729). Deviations, all off with ``fidelity="paper"``: one
Gumbel draw for both loss terms of the controller; a frozen mask without noise that meets the budget
exactly; strength as a time to zero instead of a number to tune. With ``fidelity="paper"`` the
frozen mask is, as published, one random draw (the one the last search epoch was projected with),
but it is saved with the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..budget import Budget
from ..capture import check_plain
from ..group_optimizer import GroupOptimizer
from ..groups import GroupLayout
from ..inplace import plain
from ..schedule import Schedule
from ..trace import trace
from .clock import Clock
from .finish import Result, finish
from .live import Live, scored
from .pull import Pull, published_share
from .ranks import Ranks
from .search import Search, cross_entropy
from .state import restore, state_of

CONTROLLER_LR = 1e-3
SECONDS = ("controller", "projection", "cutting", "evaluate")


class ATO:
    """Drives one run: call `step` where the optimizer's step was, `finish` at the end.

    Groups that are exactly zero are cut out of ``model`` while it trains (`Schedule.cuts`): model,
    parameters and optimizer stay the objects they are and get smaller.

    Args:
        model: trained in place; on its final device. A `DistributedDataParallel` or `torch.compile`
            wrapper goes here too, so that it learns of the cuts.
        example_inputs: tuple of tensors, what ``model(*example_inputs)`` takes.
        optimizer: ``(model, layout) -> optimizer`` with ``set_mask``, e.g.
            ``partial(ato.AdamW, lr=1e-3)``.
        budget: checked before anything is trained.
        schedule: phases, in steps of this run.
        controller_data: iterable of batches, iterated again and again, that the weights are not
            trained on (see `hold_out`). A plain attribute: may be set before the first step.
        controller_loss: ``(model, batch) -> scalar``; default: cross-entropy of ``(x, y)``. Gets
            the model masked and in eval mode. May be called twice for a step
            (`Gates.value_and_grad`), so it must not communicate between processes.
        scope, min_channels, round_to: as for `trace`.
        fidelity: ``"default"`` or ``"paper"`` (see the module's docstring and `Search`).
        seed: of the controller, its noise and its data order. Equal on every rank; under
            DistributedDataParallel the controller's gradients are averaged over the ranks.
        layout: a traced layout, to trace once for several runs; `GroupLayout.tightened` if need be.
        ema: averaged copies of the model (`torch.optim.swa_utils.AveragedModel`), cut along.
        evaluate: ``module -> float``, e.g. validation accuracy, called before and after groups that
            are due are set to exact zero at a cut, for the report. A plain attribute.

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
        ema: nn.Module | Iterable[nn.Module] | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
    ) -> None:
        for name, value, kind in (("budget", budget, Budget), ("schedule", schedule, Schedule)):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected an ato.{kind.__name__}, got {value!r}")
        for name, value in (("evaluate", evaluate), ("controller_loss", controller_loss)):
            if value is not None and not callable(value):
                raise TypeError(f"{name}: expected a function that gets the model, got {value!r}")
        if not isinstance(controller_data, Iterable | None):
            raise TypeError(
                f"controller_data: expected an iterable of batches, got {controller_data!r}"
            )
        check_plain(plain(model))
        if not any(True for _ in model.parameters()):
            raise ValueError(f"model: {type(model).__name__} has no parameters")
        if layout is None:
            layout = trace(plain(model), example_inputs, scope=scope)
        layout = layout.tightened(min_channels, round_to)
        self.ranks = Ranks(model)
        budget.prepare(plain(model), layout, example_inputs)
        if budget.timed:
            # What an earlier run measured of its mask is not this run's.
            tables = {**budget.state(layout), "verified": None}
            budget.load_state(self.ranks.first(tables), layout)
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
        self.evaluate = evaluate
        self.search = Search(
            plain(model), layout, budget, fidelity=fidelity, seed=seed, ranks=self.ranks
        )
        self.optimizer = _optimizer(optimizer, plain(model), layout)
        self.live = Live(model, layout, self.optimizer, ema)
        self.mask = torch.ones(layout.n_groups, dtype=torch.bool)
        self.frozen = False
        self.history: list[dict] = []
        self.cuts: list[dict] = []
        self._step = 0
        self._projecting = False
        self._strength: Tensor | None = None
        self._threshold: Tensor | None = None
        self._pull = Pull(schedule, layout)
        self._clock = Clock(next(model.parameters()).device)
        self._earlier = dict.fromkeys((*SECONDS, "plain step"), 0.0)

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
        """Seconds spent on controller, projection, cutting, and in ``evaluate`` at cuts.

        The projection is part of the fused optimizer step; its share is what steps with a mask took
        beyond the median step without one, as long as nothing was cut, plus the time to set masks
        and strengths.
        """
        clock = self._clock
        now = {name: clock.total(name) for name in SECONDS}
        now["projection"] += clock.excess("masked step", self._plain_step())
        return {name: self._earlier[name] + now[name] for name in SECONDS}

    def _plain_step(self) -> float:
        """Typical seconds of an optimizer step without a mask, of this run or the one resumed."""
        return self._clock.typical("plain step") or self._earlier["plain step"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the model's gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Optimizer step with projection; controller steps, redraws and the freeze when due.

        Reads nothing back to the host, except where a controller step or an epoch ends or the
        network is cut.

        Args:
            scaler: where the loss was scaled, the scaler: it steps the optimizer, so that a step
                with infinite gradients is skipped, projection included. Calling
                ``scaler.update()`` stays with the caller.

        Raises:
            TypeError: a ``scaler`` that is none.
            ValueError: no ``controller_data`` while the controller still needs it.
            RuntimeError: the ranks of a DistributedDataParallel run disagree on the mask.
            FloatingPointError: a loss of the controller, its logits or, at the end of an epoch, a
                parameter is NaN or infinite.
        """
        if scaler is not None and not hasattr(scaler, "step"):
            raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
        if self.controller_data is None and not self.frozen:
            raise ValueError(
                "controller_data: None; the controller needs batches the weights are not trained "
                "on: train_set, held_out = ato.hold_out(dataset), then "
                "controller_data=DataLoader(held_out, batch_size=...)"
            )
        t, steps = self._step, self.schedule.steps
        self._prepare(t)
        kind = (
            "plain step" if not self._projecting else "small step" if self.cuts else "masked step"
        )
        with self._clock.measure(kind):
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
        """Whatever changes before optimizer step ``t``: cut, mask, strength, freeze."""
        steps = self.schedule.steps
        paper = self.fidelity == "paper"
        cut = t in self.schedule.cuts and (t >= steps.freeze or not paper)
        changed = False
        if cut or (t == steps.zero_by and not paper):
            # What is due next changes at every cut, done or not.
            changed = self._finish_due(t, cut) or not paper
        if t == steps.freeze:
            if not paper:
                with self._clock.measure("controller"):
                    self.mask = self.ranks.first_mask(self.search.frozen_mask(measured=True))
            self.frozen = changed = True
        with self._clock.measure("projection"):
            if steps.controller_start <= t < steps.freeze:
                if t % self.schedule.steps_per_epoch == 0:
                    self.mask = self.search.draw()
                    changed = True
            if changed:
                self.ranks.check_same("mask", self.mask)
            if t < steps.projection_start:
                return
            changed = changed or not self._projecting
            self._projecting = True
            if changed:
                if not paper:
                    self._pull.choose(t, self.mask, self._final_mask, self.search.kept_logits())
                self._strengthen(t)
                self._set_mask()
            elif t == steps.strong_start if paper else self._pull.refresh(t):
                self._strengthen(t)
                self.optimizer.set_strength(self._strength, threshold=self._threshold)

    def _final_mask(self) -> Tensor:
        return self.mask if self.frozen else self.search.frozen_mask()

    def _finish_due(self, t: int, cut: bool) -> bool:
        """Exact zeros for the groups due by step ``t``; with ``cut`` a smaller network.

        Returns whether anything was cut.
        """
        network = self.live.network
        due = self.live.of(self._pull.due & ~self.mask)
        if not self.live.has_work(due, self.mask):
            return False
        record: dict[str, Any] = {"step": t, "epoch": t / self.schedule.steps_per_epoch}
        with self._clock.measure("evaluate"):
            record["accuracy_before"] = scored(self.evaluate, network)
        with self._clock.measure("cutting"):
            record |= self.live.zero(due)
            done = self.live.cut(self.mask, self.example_inputs) if cut else None
            if done is not None:
                # Of the groups there were; new ones follow before the next step.
                self._strength = self._threshold = None
                self.search.follow(network, self.live.layout, self.live.alive)
        record |= done or {"groups": 0}
        record["accuracy_after"] = None
        # Before anything else can fail: what was cut is in the report.
        self.cuts.append(record)
        self.ranks.check_same("network", self.live.alive)
        with self._clock.measure("evaluate"):
            record["accuracy_after"] = scored(self.evaluate, network)
        return done is not None

    def _strengthen(self, t: int) -> None:
        """The strength for step ``t`` and what follows, on the model's device."""
        if self.fidelity == "paper":
            strength = self.schedule.strengths[t >= self.schedule.steps.strong_start]
            share = published_share(self.layout, self.mask)
            device = next(self.model.parameters()).device
            self._strength = strength * self.live.of(share).to(device)
            return
        norms = self.optimizer.group_norms()
        due = self.live.of(self._pull.due).to(norms.device)
        self._threshold = self._pull.thresholds(t, norms, due)

    def _set_mask(self) -> None:
        mask = self.live.of(self.mask)
        self.optimizer.set_mask(mask, self._strength, threshold=self._threshold)

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
                "network_macs": self.live.layout.macs(),
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

        Dropped groups that are left and not exactly zero yet are zeroed first, and counted in the
        report (``n_unfinished``), with the accuracy before and after if ``evaluate`` is given. The
        small network is compared with the masked one on the example inputs.

        Args:
            evaluate: ``module -> float``, e.g. validation accuracy; the small network's is
                ``report["accuracy"]``. Default: the run's ``evaluate``.

        Raises:
            RuntimeError: the mask is not frozen yet, or the small network computes something else.
        """
        if not self.frozen:
            raise RuntimeError(
                f"finish: the mask is not frozen yet: {self._step} steps done, the freeze is at "
                f"step {self.schedule.steps.freeze}"
            )
        return finish(self, evaluate or self.evaluate)

    def state_dict(self) -> dict:
        """All state of the run except the model's own, in tensors, numbers, strings and lists.

        Load it into a run made with the same arguments, which cuts that run's model to the size
        the saved one had; then load the model's own state.
        """
        return state_of(self)

    def load_state_dict(self, state: dict) -> None:
        """Continue a run bit by bit; the arguments of both runs must agree.

        The model is cut to the size it had; its values are loaded separately, after this.

        Raises:
            ValueError: the state is of another version or layout, of other arguments, or has groups
                that this run has lost already.
        """
        restore(self, state)


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
    if not isinstance(optimizer, GroupOptimizer):
        raise TypeError(
            "optimizer: expected it to return an optimizer that projects groups (ato.SGD, "
            f"ato.AdamW), it returned a {type(optimizer).__name__}"
        )
    return optimizer
