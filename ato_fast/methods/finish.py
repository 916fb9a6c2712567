"""The end of a run: exact zeros, the small network, proof that both compute the same, a report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..groups import GroupLayout
from ..inplace import nonzero_groups
from ..shrink import shrink
from .equality import EQUALITY_LIMIT, reference_output, relative_error
from .live import scored

if TYPE_CHECKING:
    from .ato import ATO


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    ``model`` is the small network, ``mask`` a bool CPU tensor ``[n_groups]`` (True kept),
    ``report`` plain data (numbers, strings, lists, dicts) that fits JSON. Prints as one line.
    """

    model: nn.Module
    mask: Tensor
    report: dict
    layout: GroupLayout

    def __repr__(self) -> str:
        """Dense and small figures, without the mask and the layout."""
        dense, small = self.report["dense"], self.report["small"]
        counts = ", ".join(
            f"{small[key]:,} of {dense[key]:,} {name} ({small[key] / dense[key]:.1%})"
            for key, name in (("macs", "MACs"), ("params", "parameters"))
        )
        return (
            f"Result({type(self.model).__name__}: {counts}; "
            f"{int(self.mask.sum())} of {len(self.mask)} groups kept; small = masked network to "
            f"{self.report['equality_rel_err']:.1e})"
        )


def mask_sha256(layout: GroupLayout, mask: Tensor) -> str:
    """Digest of a mask: SHA-256 of its bits (packed, first group highest) and the layout's digest.

    Equal iff the same groups of the same layout are kept.
    """
    bits = np.packbits(layout.check_mask(mask).to("cpu", torch.bool).numpy())
    return hashlib.sha256(bits.tobytes() + layout.sha256.encode()).hexdigest()


def finish(run: ATO, evaluate: Callable[[nn.Module], float] | None) -> Result:
    """See `ATO.finish`."""
    live, mask, network = run.live, run.mask, run.live.network
    left = live.of(mask)
    before = after = None
    late = ~left & nonzero_groups(network, live.layout)
    n_unfinished = int(late.sum())
    if n_unfinished:
        before = scored(evaluate, network)
        live.zero(late)
        after = scored(evaluate, network)
    small = shrink(network, live.layout, left)
    error = relative_error(
        reference_output(network, run.example_inputs),
        reference_output(small, run.example_inputs),
    )
    # NaN compares false, so ask for what is wanted rather than for what is not.
    if not error <= EQUALITY_LIMIT:
        raise RuntimeError(
            f"finish: the small network differs from the masked one by {error:.2e} of its largest "
            f"output (limit {EQUALITY_LIMIT:.0e}): a layer's forward depends on sizes the trace "
            "did not see; the run's own model still holds the masked network"
        )
    error = max([error, *(cut.get("equality_rel_err", 0.0) for cut in run.cuts)])
    accuracy = scored(evaluate, small)
    layout = run.layout
    achieved = run.budget.achieved(layout, mask)
    report = {
        "dense": {"macs": layout.macs(), "params": layout.params()},
        "small": {"macs": layout.macs(mask), "params": layout.params(mask)},
        "budget": {
            "kind": run.budget.kind,
            "value": run.budget.value,
            "target": run.budget.target(layout),
            "achieved": achieved,
            "met": achieved <= run.budget.target(layout),
            "measured": run.budget.report(layout, mask),
        },
        "widths": [
            {"gate": gate.name, "before": gate.n, "after": int(mask[gate.span].sum())}
            for gate in layout.gates
        ],
        "n_groups": layout.n_groups,
        "n_dropped": int((~mask).sum()),
        "n_unfinished": n_unfinished,
        "accuracy": accuracy,
        "accuracy_before_projection": before,
        "accuracy_after_projection": after,
        "cuts": [dict(cut) for cut in run.cuts],
        "equality_rel_err": error,
        "mask_sha256": mask_sha256(layout, mask),
        "layout_sha256": layout.sha256,
        "scope": layout.scope,
        "fidelity": run.fidelity,
        "schedule": run.schedule.state(),
        "seed": run.seed,
        "seconds": run.seconds,
    }
    return Result(model=small, mask=mask.clone(), report=report, layout=layout)
