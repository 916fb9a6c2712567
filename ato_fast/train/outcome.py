"""What a finished run leaves behind: the small network on disk, checked, and its figures."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from .. import ATO, Result, load, save
from ..methods.equality import EQUALITY_LIMIT, relative_error
from . import plots
from .evaluate import accuracy, as_input, latency, size_bytes
from .machine import commit, machine, versions
from .settings import fingerprint

if TYPE_CHECKING:
    from .job import Job

LATENCY_BATCH = 64
LATENCY_BATCH_LARGE = 8  # above `LARGE` pixels a side
LARGE = 64
RESULT = "result.json"
ARTEFACTS = ("model.safetensors", "recipe.json", "mask.safetensors", "report.png", RESULT)
"""Files of a finished run; the last one makes it finished."""


def latency_batch(shape: Sequence[int]) -> int:
    """Images of ``shape`` (channels, height, width) in a batch whose latency is measured."""
    return LATENCY_BATCH_LARGE if max(shape[1:]) > LARGE else LATENCY_BATCH


def write_outcome(job: Job, run: ATO, tell: Callable[[str], None]) -> dict[str, Any]:
    """Cut the run's network, check that the small one computes and scores the same, write it.

    Everything is made in a folder beside the final place and moved there at the end. Returns the
    content of ``result.json``.

    Raises:
        RuntimeError: the small network, or the one read back from disk, computes something else.
    """
    test = job.batches(job.data.test, training=False)
    result = run.finish(evaluate=lambda model: accuracy(model, test))
    error = max(result.report["equality_rel_err"], _compare(run.model, result.model, test))
    if not error <= EQUALITY_LIMIT:
        raise RuntimeError(
            f"the small network differs from the masked one by {error:.1e} of its largest output "
            f"on test images; limit {EQUALITY_LIMIT:.0e}"
        )
    score = accuracy(result.model, test)
    partial = job.place.output / f".partial-{os.getpid()}"
    partial.mkdir()
    network = {
        "model": job.settings.model,
        "n_classes": job.data.n_classes,
        "input_shape": list(job.data.shape),
    }
    settings = fingerprint(job.settings, job.recipe)
    provenance = {"network": network, "settings": settings, "accuracy": score}
    save(result.model, partial, budget=result.report["budget"], provenance=provenance)
    _check_reload(job, result, partial, test, score)
    mask = {"mask": result.mask.to(torch.uint8)}
    save_file(mask, partial / "mask.safetensors", metadata={"layout_sha256": result.layout.sha256})
    (partial / "mask.safetensors").chmod(0o644)
    content = _content(job, run, result, score, error)
    plots.draw(partial / "report.png", content, result.report["widths"], content["history"])
    (partial / RESULT).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    for name in ARTEFACTS:
        os.replace(partial / name, job.place.output / name)
    shutil.rmtree(partial)
    tell(f"wrote {', '.join(ARTEFACTS)} to {job.place.output}")
    return content


@torch.no_grad()
def _compare(masked: nn.Module, small: nn.Module, test) -> float:
    """Relative difference of the outputs on one batch of test images, on CPU in float32."""
    x = as_input(next(iter(test.epoch(0)))[0].cpu())
    return relative_error(*(copy.deepcopy(model).cpu().eval()(x) for model in (masked, small)))


def _check_reload(job: Job, result: Result, folder: Path, test, score: float) -> None:
    reloaded = load(folder, job.build).to(job.device)
    again = accuracy(reloaded, test)
    if again != score:
        raise RuntimeError(
            f"the network read back from {folder} scores {again:.4%}, the one written {score:.4%}"
        )


def _content(job: Job, run: ATO, result: Result, score: float, error: float) -> dict[str, Any]:
    dense_model = job.build()
    shape = (latency_batch(job.data.shape), *job.data.shape)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(job.device)
    timings = latency([dense_model, result.model], x)
    dense, small = (
        {
            "accuracy": None,
            **result.report[name],
            "latency_ms": timing.median_ms,
            "latency_p20_ms": timing.low_ms,
            "latency_p80_ms": timing.high_ms,
            "bytes": size_bytes(model),
            "wall_s": None,
        }
        for name, model, timing in zip(
            ("dense", "small"), (dense_model, result.model), timings, strict=True
        )
    )
    history = {name: job.state.get(name, {}).get("history", []) for name in ("dense", "ato")}
    if history["dense"]:
        dense |= {
            "accuracy": history["dense"][-1]["accuracy"],
            "wall_s": job.state["dense"]["seconds"],
        }
    wall = job.state["ato"]["seconds"]
    small |= {"accuracy": score, "wall_s": wall}
    return {
        "data": job.data.name,
        "model": job.settings.model,
        "epochs": job.recipe.epochs,
        "dense": dense,
        "small": small,
        "budget": result.report["budget"],
        "mask_sha256": result.report["mask_sha256"],
        "equality_rel_err": error,
        "n_unfinished": result.report["n_unfinished"],
        "wall_s": wall,
        "overhead_frac": {
            name: spent / wall for name, spent in run.seconds.items() if name != "evaluate"
        },
        "cuts": result.report["cuts"],
        "latency_input": list(shape),
        "widths": result.report["widths"],
        "seed": job.settings.seed,
        "settings": fingerprint(job.settings, job.recipe),
        "versions": versions(),
        "machine": machine(job.device),
        "commit": commit(),
        "history": history,
    }
