"""The end of a run: exact zeros, the small network, proof that both compute the same, a report."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..groups import GroupLayout
from ..probe import cpu_inputs
from ..shrink import shrink, zero_

if TYPE_CHECKING:
    from .ato import ATO

EQUALITY_LIMIT = 1e-4
"""Largest relative difference of small and masked network. Rounding in float32 stays below 1e-5."""


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


def relative_error(expected: Any, actual: Any) -> float:
    """``max |actual - expected| / max |expected|`` over all tensors of two equal structures.

    NaN or infinity anywhere gives NaN.

    Raises:
        ValueError: different numbers of tensors or shapes.
    """
    errors, sizes = [0.0], [0.0]
    for a, b in zip(_tensors(expected), _tensors(actual), strict=True):
        if a.shape != b.shape:
            raise ValueError(f"outputs: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
        if a.numel():
            errors.append((a.double() - b.double()).abs().max().item())
            sizes.append(a.double().abs().max().item())
    # Python's max() would drop a NaN that is not first.
    worst, scale = np.max(errors), np.max(sizes)
    return float(worst / scale if scale else worst)


def finish(run: ATO, evaluate: Callable[[nn.Module], float] | None) -> Result:
    """See `ATO.finish`."""
    layout, mask = run.layout, run.mask
    dropped = run.optimizer.group_norms().cpu()[~mask]
    n_unfinished = int((dropped != 0).sum())
    before = after = None
    if n_unfinished:
        before = evaluate(run.model) if evaluate else None
        zero_(run.model, layout, mask)
        after = evaluate(run.model) if evaluate else None
    small = shrink(run.model, layout, mask)
    error = relative_error(
        _reference_output(run.model, run.example_inputs),
        _reference_output(small, run.example_inputs),
    )
    # NaN compares false, so ask for what is wanted rather than for what is not.
    if not error <= EQUALITY_LIMIT:
        raise RuntimeError(
            f"finish: the small network differs from the masked one by {error:.2e} of its largest "
            f"output (limit {EQUALITY_LIMIT:.0e}): a layer's forward depends on sizes the trace "
            "did not see; the run's own model still holds the masked network"
        )
    accuracy = evaluate(small) if evaluate else None
    achieved = run.budget.cost(layout, mask)
    report = {
        "dense": {"macs": layout.macs(), "params": layout.params()},
        "small": {"macs": layout.macs(mask), "params": layout.params(mask)},
        "budget": {
            "kind": run.budget.kind,
            "value": run.budget.value,
            "target": run.budget.target(layout),
            "achieved": achieved,
            "met": achieved <= run.budget.target(layout),
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


@torch.no_grad()
def _reference_output(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Output in eval mode on CPU in at least float32, where no TF32 blurs the comparison."""
    model = copy.deepcopy(model).to("cpu").eval()
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model = model.float()
    return model(*cpu_inputs(inputs))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
