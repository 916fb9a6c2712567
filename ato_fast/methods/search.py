"""The search for a mask: controller, its data, its objective and its optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..budget import Budget, paper_ratio
from ..controller import LIKELY, Controller, relax, resource_loss
from ..cost import Cost
from ..gates import Gates
from ..groups import GroupLayout
from .feed import Feed
from .ranks import Ranks

GAMMA = 8.0
"""Weight of the resource loss: 2 times the published reg_w = 4 (spec of both ResNet runs)."""

FIDELITIES = ("default", "paper")


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Default controller loss: cross-entropy of a batch ``(x, y)``, no smoothing, no mixup."""
    x, y = batch
    device = next(model.parameters()).device
    return F.cross_entropy(model(x.to(device)), y.to(device))


class Search:
    """Trains a controller so that its masks keep the task loss low at the budget.

    Args:
        model, layout, budget: as for `ATO`.
        fidelity: ``"default"``: one hard Gumbel draw for both loss terms, whole-model cost.
            ``"paper"``: a soft draw for the task loss, an independent hard one for the cost, which
            counts the gated part as published, against the converted ratio.
        seed: of controller and data order.
        ranks: the processes that share the controller: its gradients are averaged over them.

    Raises:
        ValueError: unknown fidelity; a parameter budget with ``fidelity="paper"``.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: GroupLayout,
        budget: Budget,
        *,
        fidelity: str = "default",
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        if fidelity not in FIDELITIES:
            raise ValueError(f"fidelity: expected one of {FIDELITIES}, got {fidelity!r}")
        if fidelity == "paper" and budget.kind != "macs":
            raise ValueError("fidelity='paper' counts multiply-adds: expected Budget(macs=...)")
        self.layout = layout
        self.budget = budget
        self.fidelity = fidelity
        self.gates = Gates(model, layout)
        self.alive: Tensor | None = None
        """Which groups the network still has, bool ``[n_groups]`` on its device; None: all."""
        widths = [gate.n for gate in layout.gates]
        device = next(model.parameters()).device
        self.controller = Controller(widths, seed=seed, device=device)
        self.optimizer = self.controller.optimizer()
        self.feed = Feed(seed)
        self.ranks = ranks or Ranks(model)
        self.losses: list[tuple[float, float, float]] = []
        self._cost = budget.cost
        if fidelity == "paper":
            paper = Cost(layout, "paper")
            self._cost = lambda _, mask: paper.macs(mask)
        self.reprice()

    def reprice(self) -> None:
        """Read target and dense cost from the budget, again where it was measured anew."""
        self.ratio = self.budget.target(self.layout) / self.budget.cost(self.layout)
        self._dense = float(self._cost(self.layout, None))
        if self.fidelity == "paper":
            total = self.layout.macs() + _extra(self.layout)
            self.ratio = paper_ratio(self.ratio, total, self._dense)

    def follow(self, model: nn.Module, layout: GroupLayout, alive: Tensor) -> None:
        """Go on with a model that was cut: groups that are gone are pinned to 0.

        Args:
            model: after the cut.
            layout: of the groups that are left.
            alive: bool ``[n_groups]`` of the traced layout.
        """
        unfit = self.gates.unfit
        self.gates = Gates(model, layout)
        self.gates.unfit = unfit
        self.alive = alive.to(self.controller.heads.device)

    @torch.no_grad()
    def kept_logits(self) -> Tensor:
        """Noise-free logits, ``[n_groups]``; minus infinity for groups that are gone."""
        logits = self.controller.logits()
        return logits if self.alive is None else logits.masked_fill(~self.alive, -math.inf)

    def step(
        self, data: Iterable, loss_fn: Callable[[nn.Module, Any], Tensor], lr: float
    ) -> tuple[float, float, float]:
        """One controller step; returns (objective, task loss, resource loss).

        Raises:
            FloatingPointError: the task loss or the controller's logits are NaN or infinite.
        """
        batch = self.feed.next(data)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        task, resource = self._backward(batch, loss_fn)
        objective = task + GAMMA * resource.to(task.dtype)
        flags = self.gates.flags()
        values = torch.stack([x.double() for x in (objective, task, resource)])
        values = torch.cat([values, values.new_tensor(flags)])
        # A loss that is NaN on one rank is NaN on all of them, so that all of them stop.
        self.ranks.average_([values, *(p.grad for p in self.controller.parameters())])
        values = values.tolist()
        self.gates.take_flags(values[3:])
        values = values[:3]
        for name, value in zip(("objective", "task loss", "resource loss"), values, strict=True):
            if name != "objective" and not math.isfinite(value):
                raise FloatingPointError(
                    f"controller step: the {name} is {value}; the masked network in eval mode "
                    "gave it (look at the model's loss and running statistics)"
                )
        self.optimizer.step()
        self.losses.append(tuple(values))
        return tuple(values)

    @torch.enable_grad()
    def _backward(
        self, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the objective; returns task and resource loss, detached."""
        logits = self.controller.logits()
        noise = self.controller.noise()
        hard = relax(logits + noise, hard=True)
        gate = hard
        if self.fidelity == "paper":
            gate = relax(logits + self.controller.noise(), hard=False)
        if self.alive is not None:
            hard, gate = hard * self.alive, gate[self.alive]
        try:
            task, slope = self.gates.value_and_grad(gate, lambda model: loss_fn(model, batch))
        except Exception as error:
            raise RuntimeError(
                f"controller_loss failed on a batch of controller_data ({_described(batch)}): "
                f"{type(error).__name__}: {error}"
            ) from error
        resource = resource_loss(self._cost(self.layout, hard) / self._dense, self.ratio)
        torch.autograd.backward([gate, GAMMA * resource], [slope, None])
        return task, resource.detach()

    @torch.no_grad()
    def draw(self) -> Tensor:
        """The mask the projection uses until the next draw; bool CPU ``[n_groups]``.

        Default: a group is dropped if the controller would drop it more often than not (noise-free
        logit below `LIKELY`) *and* a freeze now would drop it too. So an unconverged controller,
        whose masks are all ones, drops nothing, and one that has overshot its budget never pulls at
        groups the frozen mask would keep. No noise, so a group does not flicker between epochs.
        It need not keep to ``layout.widths``, as nothing is cut by it. Paper: one random draw, at
        the nearest widths.
        """
        logits = self.kept_logits()
        if self.fidelity == "paper":
            mask = relax(logits + self.controller.noise(), hard=True).bool().cpu()
            return self._to_width(mask, logits)
        return (logits >= LIKELY).cpu() | self.frozen_mask()

    @torch.no_grad()
    def frozen_mask(self, measured: bool = False) -> Tensor:
        """The mask that meets the budget (`Budget.freeze`); bool CPU.

        Args:
            measured: verify a latency budget by measurement.

        Raises:
            FloatingPointError: the controller's logits are NaN.
        """
        logits = self.kept_logits().cpu()
        if not bool((torch.isfinite(logits) | (logits == -math.inf)).all()):
            raise FloatingPointError("controller: its logits are not finite, so no mask is defined")
        return self.budget.freeze(self.layout, logits, measured=measured)

    def _to_width(self, mask: Tensor, logits: Tensor) -> Tensor:
        """``mask`` with every gate at the nearest of its ``layout.widths``, the wider of two.

        The best groups are added, or the worst of those kept dropped.
        """
        mask, logits = mask.clone(), logits.cpu()
        for gate in self.layout.gates:
            kept = mask[gate.span]
            n = int(kept.sum())
            width = min(self.layout.widths(gate), key=lambda w: (abs(w - n), -w))
            best = logits[gate.span].argsort(descending=True, stable=True)
            order = torch.cat([best[kept[best]], best[~kept[best]]])
            mask[gate.offset + order[:width]] = True
            mask[gate.offset + order[width:]] = False
        return mask

    def state_dict(self) -> dict:
        """Everything the rest of the search depends on."""
        return {
            "controller": self.controller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "feed": self.feed.state_dict(),
            "losses": [list(x) for x in self.losses],
            "unfit": sorted(self.gates.unfit),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.feed.load_state_dict(state["feed"])
        self.losses = [tuple(x) for x in state["losses"]]
        self.gates.unfit = set(state.get("unfit", ()))


def _described(batch: Any) -> str:
    """What a batch is made of, for messages."""
    if isinstance(batch, Tensor):
        return f"a {batch.dtype} tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__} of {', '.join(map(_described, batch)) or 'nothing'}"
    if isinstance(batch, dict):
        return f"dict with {', '.join(map(repr, batch))}"
    return type(batch).__name__


def _extra(layout: GroupLayout) -> int:
    """What the published counting adds to a model's multiply-adds: 3 per gated output element."""
    total = 0
    for term in layout.mac_terms:
        if any(key in layout.slices_of for key in term.dims):
            tensor, dim = term.dims[0]
            total += 3 * term.out_per_channel * layout.shapes[tensor][dim]
    return total
