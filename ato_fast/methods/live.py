"""The network of a run as it gets smaller: which groups are left, and how others are taken out.

Everything a run decides is about the groups of the layout that was traced; the optimizer and the
masked forward know those that are left. `Live` stands between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..group_optimizer import GroupOptimizer
from ..groups import GroupLayout
from ..inplace import check_cuttable, nonzero_groups, plain, shrink_
from ..shrink import shrink, zero_
from .equality import EQUALITY_LIMIT, reference_output, relative_error


def stage_mask(layout: GroupLayout, final: Tensor, logits: Tensor, progress: float) -> Tensor:
    """What is kept once a share ``progress`` of every gate's way to ``final`` is done.

    Masks of growing progress are nested where logits and ``final`` stay the same, keep to
    ``layout.widths``, and end in ``final``.

    Args:
        layout: the gates.
        final: bool CPU ``[n_groups]``, at one of the widths of every gate.
        logits: ``[n_groups]``, higher is kept longer.
        progress: in [0, 1].

    Returns:
        Bool CPU tensor ``[n_groups]``, a superset of ``final``.
    """
    scores = logits.detach().cpu().double().numpy()
    keep = torch.zeros_like(final)
    for gate in layout.gates:
        kept = final[gate.span].numpy()
        wanted = kept.sum() + (1 - progress) * (gate.n - kept.sum())
        # A hair below, or rounding of the product would keep one more than all of ``final``.
        width = next(w for w in layout.widths(gate) if w >= wanted - 1e-6)
        order = np.lexsort((-scores[gate.span], ~kept))
        keep[torch.from_numpy(gate.offset + order[:width])] = True
    return keep


class Live:
    """The groups of ``layout`` that ``model`` still has.

    Args:
        model: trained; a wrapper of the module ``layout`` was traced from, or that module.
        layout: all groups, as traced.
        optimizer: of the module and ``layout``.
        ema: averaged copies that are cut along.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: GroupLayout,
        optimizer: GroupOptimizer,
        ema: nn.Module | Iterable[nn.Module] | None,
    ) -> None:
        self.model = model
        self.full = layout
        self.optimizer = optimizer
        check_cuttable(model, layout, ema)
        self.ema = [ema] if isinstance(ema, nn.Module) else list(ema or ())
        self.alive = torch.ones(layout.n_groups, dtype=torch.bool)
        """Bool CPU ``[n_groups]`` of the traced layout."""

    @property
    def network(self) -> nn.Module:
        """The module inside all wrappers."""
        return plain(self.model)

    @property
    def layout(self) -> GroupLayout:
        """The groups that are left."""
        return self.optimizer.layout

    def of(self, values: Tensor) -> Tensor:
        """The part of ``values`` (one per traced group) that belongs to groups that are left."""
        return values[self.alive.to(values.device)]

    def has_work(self, due: Tensor, mask: Tensor) -> bool:
        """Whether `zero` or `cut` would find a group.

        Args:
            due: as for `zero`.
            mask: as for `cut`.
        """
        nonzero = nonzero_groups(self.network, self.layout)
        return bool(((due & nonzero) | ~(self.of(mask) | nonzero)).any())

    def zero(self, due: Tensor) -> dict:
        """Set groups to exact zero.

        Args:
            due: bool CPU, one entry per group that is left.

        Returns:
            ``n_unfinished``: how many were not zero, ``unfinished_norm``: the largest norm of them.
        """
        late = due & nonzero_groups(self.network, self.layout)
        norm = 0.0
        if bool(late.any()):
            norm = self.optimizer.group_norms().cpu()[late].max().item()
            zero_(self.network, self.layout, ~late)
        return {"n_unfinished": int(late.sum()), "unfinished_norm": norm}

    def cut(self, mask: Tensor, inputs: tuple[Any, ...]) -> dict | None:
        """Cut the groups that ``mask`` drops and that are exactly zero; None if there are none.

        A gate keeps one of the layout's widths: where fewer groups would be left than the next
        allowed number, some of those at zero stay.

        Args:
            mask: bool CPU over the traced groups.
            inputs: example inputs; the smaller network is compared with the one before.

        Returns:
            What was cut, as plain data: ``groups``, and the ``macs``, ``params`` left.

        Raises:
            RuntimeError: the smaller network would compute something else; nothing was cut.
        """
        zero = ~nonzero_groups(self.network, self.layout)
        keep = self.of(mask) | ~zero
        left = self.alive.clone()
        left[self.alive] = keep
        for gate in self.full.gates:
            n = int(left[gate.span].sum())
            missing = next(w for w in self.full.widths(gate) if w >= n) - n
            spare = gate.offset + (self.alive & ~left)[gate.span].nonzero().flatten()
            left[spare[:missing]] = True
        keep = self.of(left)
        if bool(keep.all()):
            return None
        small = shrink(self.network, self.layout, keep)
        error = relative_error(
            reference_output(self.network, inputs), reference_output(small, inputs)
        )
        if not error <= EQUALITY_LIMIT:
            raise RuntimeError(
                f"the network without {int((~keep).sum())} groups that are zero differs from the "
                f"one with them by {error:.2e} of its largest output (limit {EQUALITY_LIMIT:.0e}): "
                "a layer's forward depends on sizes the trace did not see; nothing was cut"
            )
        self._cut(keep, left)
        return {
            "groups": int((~keep).sum()),
            "macs": self.layout.macs(),
            "params": self.layout.params(),
            "equality_rel_err": error,
        }

    def restore(self, alive: Tensor) -> None:
        """Cut a network that is still whole down to the groups of a saved run.

        Raises:
            ValueError: groups that this network has lost already.
        """
        if bool((alive & ~self.alive).any()):
            raise ValueError(
                "state: it has groups that were cut out of this run already; load it into a run "
                "made anew"
            )
        keep = self.of(alive)
        zero_(self.network, self.layout, keep)
        self._cut(keep, alive)

    def _cut(self, keep: Tensor, alive: Tensor) -> None:
        shrink_(self.model, self.layout, keep, optimizer=self.optimizer, ema=self.ema)
        self.alive = alive.clone()


def scored(evaluate: Callable[[nn.Module], float] | None, model: nn.Module) -> float | None:
    """What ``evaluate`` gives, with the training flags of all modules as before; None without."""
    if evaluate is None:
        return None
    modes = [(module, module.training) for module in model.modules()]
    try:
        return float(evaluate(model))
    finally:
        for module, training in modes:
            module.training = training
