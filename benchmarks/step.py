"""Suite ``step``: one optimizer step with projection against torch.optim's without and with one.

A block is one case, optimizer and dtype: its contenders are built, checked, and then timed for
every share of dropped groups. Rows ``F``: a share F of the groups, drawn at random, loses a little
norm each step; rows ``F:zero``: those groups are exactly zero already, their gradients too. On CUDA
a row is timed ``eager`` (the GPU idle before each step, so launches count) and as a ``graph``.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ato_fast import backend
from ato_fast.report import table as text_table

from . import cases, contenders, timing
from .contenders import Contender, Red

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_CASES = {
    "cpu": ["resnet50", "mobilenet_v2", "vit_b_16"],
    "cuda": ["resnet50", "mobilenet_v2", "vit_b_16", "convnext_large"],
}
WARMUP = 2


@dataclass(frozen=True)
class Masked:
    """Share of the groups that is dropped, and whether those are exactly zero already."""

    frac: float
    zero: bool = False

    @classmethod
    def parse(cls, text: str) -> Masked:
        """``0.5`` or ``0.5:zero``."""
        number, colon, state = text.partition(":")
        try:
            frac = float(number)
        except ValueError:
            frac = -1.0
        if not 0 <= frac <= 1 or (colon and state != "zero") or (colon and not frac):
            raise argparse.ArgumentTypeError(
                f"expected a share in [0, 1], or SHARE:zero with a share > 0, got {text!r}"
            )
        return cls(frac, bool(colon))

    def __str__(self) -> str:
        return f"{self.frac:g}{':zero' if self.zero else ''}"

    def keep(self, n_groups: int, seed: int = 0) -> Tensor:
        """Bool ``[n_groups]``; exactly the share asked for is False, the same ones every time."""
        generator = torch.Generator().manual_seed(seed)
        keep = torch.ones(n_groups, dtype=torch.bool)
        keep[torch.randperm(n_groups, generator=generator)[: round(self.frac * n_groups)]] = False
        return keep


DEFAULT_MASKED = [Masked(0.0), Masked(0.5), Masked(1.0), Masked(0.5, True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite alone."""
    group = parser.add_argument_group("step")
    group.add_argument("--masked", type=Masked.parse, nargs="+", default=DEFAULT_MASKED,
                       metavar="SHARE[:zero]")  # fmt: skip
    group.add_argument("--dtypes", nargs="+", choices=DTYPES, default=None,
                       help="default: fp32 on the CPU, fp32 bf16 on CUDA")  # fmt: skip
    group.add_argument("--modes", nargs="+", choices=["eager", "graph"], default=None,
                       help="default: eager on the CPU, eager graph on CUDA")  # fmt: skip
    group.add_argument("--contenders", nargs="+", choices=contenders.NAMES,
                       default=list(contenders.NAMES), help="besides ours")  # fmt: skip
    group.add_argument("--compile-cases", nargs="*", default=None, metavar="CASE",
                       help="torch.compile for these cases only (default: all)")  # fmt: skip
    group.add_argument("--no-compile", dest="compile_cases", action="store_const", const=[])
    group.add_argument("--compile-seconds", type=float, default=120, metavar="N",
                       help="give up on the compiler after N seconds per block")  # fmt: skip


def run(options: argparse.Namespace, save: Callable[[dict], None]) -> dict[str, Any]:
    """All blocks asked for; ``save`` is called with the result so far after each.

    The result's ``red`` lists what failed its check and was therefore not timed.
    """
    device = torch.device(options.device)
    default = ["eager", "graph"] if device.type == "cuda" else ["eager"]
    modes = options.modes or default
    dtypes = options.dtypes or (["fp32", "bf16"] if device.type == "cuda" else ["fp32"])
    result: dict[str, Any] = {"rows": [], "red": [], "skipped": []}
    for name in options.cases or DEFAULT_CASES[device.type]:
        case = cases.load(name, options.layouts)
        for dtype in dtypes:
            for optimizer in options.optimizers:
                where = {"case": name, "optimizer": optimizer, "dtype": dtype}
                block = Block(case, optimizer, dtype, device, options, where)
                reason = options.out_of_time() or block.why_not()
                if reason:
                    result["skipped"].append({**where, "reason": reason})
                    continue
                options.progress(" ".join(where.values()))
                try:
                    block.prepare()
                    block.time(modes, result["rows"])
                except Exception as failure:
                    # Whatever broke, later blocks are worth having.
                    reason = contenders.reason_of(failure)
                    result["red"].append({**where, "reason": reason})
                    options.progress(f"RED {reason}")
                del block
                release(device)
                save(result)
    return result


class Block:
    """One case, optimizer and dtype with its contenders."""

    def __init__(
        self,
        case: cases.Case,
        optimizer: str,
        dtype: str,
        device: torch.device,
        options: argparse.Namespace,
        where: dict[str, str],
    ) -> None:
        self.case, self.optimizer, self.device = case, optimizer, device
        self.dtype = DTYPES[dtype]
        self.options = options
        self.where = where
        self.backends = options.backends or [os.environ.get(backend.VARIABLE) or "auto"]
        wanted = options.compile_cases
        compiles = wanted is None or case.name in wanted
        self.names = tuple(n for n in options.contenders if compiles or n != "compile")
        self.left_out: dict[str, str] = {}
        if "compile" in options.contenders and not compiles:
            self.left_out["compile"] = "not asked for"

    def why_not(self) -> str | None:
        """Why this block does not fit into memory, if so; None if it does."""
        per_copy = self.case.n_params * (2 * self.dtype.itemsize + 8)
        # Besides the contenders: the start of all, a judge, foreach's temporaries.
        needed = per_copy * (len(self.names) + len(self.backends) + 3)
        free = free_bytes(self.device)
        if free is None or needed < 0.9 * free:
            return None
        return f"it needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"

    def prepare(self) -> None:
        """Build and check the contenders.

        Raises:
            Red: one of them is off.
            BackendError: a backend asked for cannot serve.
        """
        last = self.options.memory_format == "channels_last"
        self.start = cases.values(self.case, self.device, self.dtype, last)
        args = (self.case, self.start, self.optimizer, self.dtype, self.device)
        self.present = list(contenders.build(*args, self.backends, self.names))
        self.errors, left_out = contenders.check(
            self.present, self.case, self.start, self.optimizer, self.dtype,
            self.options.compile_seconds,
        )  # fmt: skip
        self.left_out.update(left_out)
        self.present = [c for c in self.present if c.name not in left_out]

    def time(self, modes: list[str], rows: list[dict]) -> None:
        """Time every row of every mode; appends to ``rows``.

        Raises:
            Red: a group that was to shrink reached zero, or one that was to be zero is not.
        """
        lam = contenders.SHRINK / contenders.HYPER[self.optimizer]["lr"]
        for mode in modes:
            if mode == "graph":
                for contender in self.present:
                    make_capturable(contender)
            for masked in self.options.masked:
                keep = masked.keep(self.case.layout.n_groups)
                for contender in self.present:
                    contender.start(self.case.layout, self.start, keep, lam, masked.zero)
                rows.append(self._row(mode, masked, keep))

    def _row(self, mode: str, masked: Masked, keep: Tensor) -> dict:
        samplers, skipped = {}, dict(self.left_out)
        clock = (
            timing.DeviceClock(self.device, idle=mode == "eager")
            if self.device.type == "cuda"
            else timing.HostClock()
        )
        for contender in self.present:
            call = contender.step
            if mode == "graph":
                reason = contender.not_capturable
                if reason is None:
                    try:
                        contender.prepare()
                        contender.step()
                        call = timing.captured(contender.step)
                    except Exception as failure:
                        if contender.name.startswith("ours"):
                            raise Red(
                                f"{contender.name} cannot be captured: {failure}"
                            ) from failure
                        reason = f"not captured: {type(failure).__name__}"
                if reason is not None:
                    skipped[contender.name] = reason
                    continue
            samplers[contender.name] = partial(_sample, clock, contender.prepare, call)
        samples = timing.interleave(samplers, self.options.rounds, WARMUP)
        self._verify(masked, keep)
        layout = self.case.layout
        sizes = {c.name: c.n_bytes for c in self.present}
        return {
            **self.where, "masked": str(masked), "mode": mode,
            "n_params": self.case.n_params, "n_tensors": len(layout.parameters),
            "n_gates": len(layout.gates), "n_groups": layout.n_groups,
            "n_dropped": int((~keep).sum()), "layout": self.case.source,
            "memory_format": self.options.memory_format, "rounds": self.options.rounds,
            "served": self._served(), "check": self.errors,
            "contenders": summary(samples, sizes), "skipped": skipped,
        }  # fmt: skip

    def _served(self) -> dict[str, str]:
        found = {}
        for contender in self.present:
            if contender.name.startswith("ours"):
                contender.prepare()
                found[contender.name] = backend.serving("group_step_", self.device, [self.dtype])
        return found

    def _verify(self, masked: Masked, keep: Tensor) -> None:
        for contender in self.present:
            if not contender.name.startswith("ours"):
                continue
            contender.prepare()
            n_zero = int(contender.optimizer.n_zero())
            expected = int((~keep).sum()) if masked.zero else 0
            if n_zero != expected:
                raise Red(
                    f"{contender.name}, masked {masked}: expected {expected} zero groups after the "
                    f"timing, got {n_zero}"
                )


def _sample(clock: Callable, prepare: Callable[[], None], call: Callable[[], object]) -> float:
    prepare()
    return clock(call)


def release(device: torch.device) -> None:
    """Give back what a block held; compiled steps keep their optimizers alive until the reset."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make_capturable(contender: Contender) -> None:
    """Let a CUDA graph hold torch's Adam step: its step counts must live on the GPU."""
    made = contender.optimizer
    if made is None or contender.name.startswith("ours"):
        return
    for group in made.param_groups:
        if "capturable" in group:
            group["capturable"] = True
            for param in group["params"]:
                state = made.state[param]
                state["step"] = state["step"].to(param.device)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def summary(samples: dict[str, list[float]], sizes: dict[str, int]) -> dict[str, dict]:
    """Per contender: times, bytes a step must move, rate, share of the copy's, ratio of ours."""
    against = timing.ratios(samples, "ours")
    copied = timing.ratios(samples, "copy") if "copy" in samples else {}
    found = {}
    for name, values in samples.items():
        times = timing.spread(values)
        entry = {f"{key}_ms": value for key, value in times.items()}
        entry["bytes"] = sizes[name]
        entry["gb_per_s"] = sizes[name] / times["median"] / 1e6
        if name in copied:
            # The copy moves what ours must; a contender with smaller state moves less.
            entry["copy_frac"] = copied[name]["median"] * sizes[name] / sizes["copy"]
        if name in against:
            entry["ours_over_this"] = against[name]
        found[name] = entry
    return found


def table(result: dict[str, Any], masked: list[str] | None = None) -> str:
    """Readable rows: ours in ms, and the ratio ours / contender for all others.

    Args:
        masked: only rows with these shares.
    """
    rows = [r for r in result["rows"] if not masked or r["masked"] in masked]
    names = [n for r in rows for n in r["contenders"]]
    others = [n for n in dict.fromkeys(names) if n not in ("ours", "copy")]
    lines = []
    if rows:
        header = ["case", "step", "masked", "mode", "ours ms", "GB/s", "of copy"]
        body = [_cells(row, others) for row in rows]
        lines += [
            "time of ours / time of the contender, median of per-round ratios (20th to 80th "
            "percentile for fused); below 1 ours is faster",
            text_table([*header, *others], body, left=4),
        ]
    for kind in ("red", "skipped"):
        for entry in result[kind]:
            lines.append(
                f"{'RED' if kind == 'red' else 'skipped'} {entry['case']} {entry['optimizer']} "
                f"{entry['dtype']}: {entry['reason']}"
            )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row["skipped"].items():
            place = f"{row['case']} {row['optimizer']} {row['dtype']}"
            places = reasons.setdefault(f"without {name}, {row['mode']}: {reason}", [])
            if place not in places:
                places.append(place)
    return "\n".join([*lines, *(f"{r} ({', '.join(p)})" for r, p in sorted(reasons.items()))])


def _cells(row: dict, others: list[str]) -> list[str]:
    ours = row["contenders"]["ours"]
    cells = [
        row["case"], f"{row['optimizer']} {row['dtype']}", row["masked"], row["mode"],
        f"{ours['median_ms']:.3f}", f"{ours['gb_per_s']:.0f}",
        f"{ours['copy_frac']:.0%}" if "copy_frac" in ours else "-",
    ]  # fmt: skip
    for name in others:
        entry = row["contenders"].get(name)
        if entry is None:
            cells.append("-")
            continue
        ratio = entry["ours_over_this"]
        text = f"{ratio['median']:.3f}"
        if name == "fused":
            text += f" ({ratio['p20']:.3f} to {ratio['p80']:.3f})"
        cells.append(text)
    return cells
