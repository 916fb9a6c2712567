"""Suite ``overhead``: microseconds a step costs on tensors so small that nothing else is left.

As many tensors and gates as ResNet-50 has, each of 1 to 4 elements. ``same``: gradients stay where
they are; ``new``: they lie elsewhere at each step, as after ``zero_grad(set_to_none=True)``. The
time is the host's; on CUDA the device's work is waited for outside of it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from ato_fast import backend
from ato_fast.report import table as text_table

from . import cases, contenders, timing
from .contenders import Contender

CASE = "resnet50"
NAMES = ("fused", "foreach")
STEPS = 20
"""Steps per sample."""
KEEP_SHRINK = 1e-4
"""Share of `contenders.SHRINK`: thousands of steps must not bring a group to zero."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This suite has no options of its own."""


def run(options: argparse.Namespace, save: Callable[[dict], None]) -> dict[str, Any]:
    """Rows for every optimizer, without a mask and with half of the groups dropped."""
    device = torch.device(options.device)
    case = cases.shrunk(cases.load(CASE, "stored"))
    result: dict[str, Any] = {"rows": [], "red": [], "skipped": []}
    serve = (options.backends or [os.environ.get(backend.VARIABLE) or "auto"])[0]
    steps = 5 if options.quick else STEPS
    for optimizer in options.optimizers:
        where = {"case": case.name, "optimizer": optimizer, "dtype": "fp32"}
        options.progress(" ".join(where.values()))
        start = cases.values(case, device, torch.float32)
        present = list(
            contenders.build(case, start, optimizer, torch.float32, device, [serve], NAMES)
        )
        try:
            contenders.check(present, case, start, optimizer, torch.float32, 0)
        except Exception as failure:
            result["red"].append({**where, "reason": contenders.reason_of(failure)})
            continue
        half = torch.arange(case.layout.n_groups) % 2 == 0
        lam = KEEP_SHRINK * contenders.SHRINK / contenders.HYPER[optimizer]["lr"]
        for masked, keep in (("0", torch.ones_like(half)), ("0.5", half)):
            for grads in ("same", "new"):
                samplers = {}
                for contender in present:
                    contender.start(case.layout, start, keep, lam, zero=False)
                    samplers[contender.name] = sampler(contender, grads == "new", steps, device)
                samples = timing.interleave(samplers, options.rounds)
                against = timing.ratios(samples, "ours")
                found: dict[str, dict] = {}
                for name, values in samples.items():
                    found[name] = {f"{k}_us": v for k, v in timing.spread(values).items()}
                    if name in against:
                        found[name]["ours_over_this"] = against[name]
                result["rows"].append({
                    **where, "masked": masked, "grads": grads, "steps": steps,
                    "rounds": options.rounds, "n_tensors": len(case.shapes),
                    "n_params": case.n_params, "n_groups": case.layout.n_groups,
                    "served": backend.serving("group_step_", device, [torch.float32]),
                    "contenders": found,
                })  # fmt: skip
        save(result)
    return result


def sampler(
    contender: Contender, new: bool, steps: int, device: torch.device
) -> Callable[[], float]:
    """Mean host microseconds per step over ``steps`` steps."""
    params = list(contender.model.parameters())
    sets = [[p.grad for p in params], [p.grad.clone() for p in params]]

    def sample() -> float:
        contender.prepare()
        total = 0
        for index in range(steps):
            if new:
                for param, grad in zip(params, sets[index % 2], strict=True):
                    param.grad = grad
            begin = time.perf_counter_ns()
            contender.step()
            total += time.perf_counter_ns() - begin
            if device.type == "cuda":
                torch.cuda.synchronize()
        return total / steps / 1e3

    return sample


def table(result: dict[str, Any], masked: list[str] | None = None) -> str:
    """Microseconds per step of every contender."""
    rows = [r for r in result["rows"] if not masked or r["masked"] in masked]
    lines = []
    if rows:
        names = list(rows[0]["contenders"])
        body = []
        for row in rows:
            cells = [row["case"], row["optimizer"], row["masked"], row["grads"]]
            for name in names:
                entry = row["contenders"][name]
                cells.append(f"{entry['median_us']:.0f} ({entry['p20_us']:.0f} to "
                             f"{entry['p80_us']:.0f})")  # fmt: skip
            body.append(cells)
        header = ["overhead", "step", "masked", "gradients", *(f"{n} us" for n in names)]
        lines.append(text_table(header, body, left=4))
    for entry in result["red"]:
        lines.append(f"RED {entry['case']} {entry['optimizer']}: {entry['reason']}")
    return "\n".join(lines)
