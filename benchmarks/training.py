"""Networks in training, dense and cut: what the suites ``shrink`` and ``end2end`` time.

All of a setting's networks see the same batch, in channels_last; on CUDA in bf16 autocast, with
cudnn.benchmark, eager or under ``torch.compile``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ato_fast as ato
from ato_fast import GroupLayout
from ato_fast.train import models

from . import cases, timing
from .contenders import HYPER, OURS, TORCH, reason_of
from .step import release

MACS = 0.45
"""Share of the MACs that is left."""

GATE_SPREAD = 0.5
"""Deviation of the gates' own logits beside that of 1 among a gate's channels. A gate then keeps
between a tenth and nine tenths of its channels."""

SIZES = {"cpu": (16, 160), "cuda": (128, 224)}
"""Default batch and side of the square images; the case ``tiny`` has its own."""

TINY_SIZE = (4, 12)
WARMUP = {"cpu": 1, "cuda": 3}
COMPILER = {False: "eager", True: "compile"}


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: an int that is no smaller."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an int >= {least}, got {text!r}")
        return int(text)

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the suites that train networks."""
    group = parser.add_argument_group("shrink, end2end")
    group.add_argument("--batch", type=at_least(2), metavar="N", help="default: 16, on CUDA 128")
    group.add_argument("--pixels", type=at_least(1), metavar="N",
                       help="side of the images (default: 160, on CUDA 224)")  # fmt: skip
    group.add_argument("--scopes", nargs="+", choices=["inner", "all"], default=["inner", "all"])


class Setting:
    """A dense network in training mode, a batch for it, and how a step is made.

    Args:
        name: a case, or ``cifar:`` and a network of `ato_fast.train.models`.
        device: of the network.
        batch, pixels: images per batch (2 or more) and their side; None for the default.
        compiled: whether steps go through ``torch.compile``.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        batch: int | None = None,
        pixels: int | None = None,
        compiled: bool = False,
    ) -> None:
        size = TINY_SIZE if name == "tiny" else SIZES[device.type]
        self.name, self.device, self.compiled = name, device, compiled
        self.batch, self.pixels = batch or size[0], pixels or size[1]
        torch.manual_seed(0)
        x = torch.randn(self.batch, 3, self.pixels, self.pixels)
        self.example = (x[:2].clone(),)
        last = torch.channels_last
        self.model = _network(name).to(memory_format=last)
        # Every network has at least as many classes.
        y = torch.randint(0, 5, (self.batch,))
        self.data = (x.to(device).contiguous(memory_format=last), y.to(device))
        self._traced: dict[str, GroupLayout] = {}

    def layout(self, scope: str, round_to: int) -> GroupLayout:
        """The network's groups; traced once per scope, on the CPU."""
        if scope not in self._traced:
            self._traced[scope] = ato.trace(self.model.cpu(), self.example, scope=scope)
        self.model.to(self.device).train()
        return self._traced[scope].tightened(round_to=round_to)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of a batch; also what the controller is given."""
        with self._autocast():
            return F.cross_entropy(model(batch[0]), batch[1])

    def training_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Callable[[], None]:
        """Forward, backward, optimizer step and clearing of gradients, as one call."""
        called = self._called(model)

        def step() -> None:
            self.loss(called, self.data).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def inference(self, model: nn.Module) -> Callable[[], None]:
        """A forward pass without gradients; the mode is the model's."""
        called = self._called(model)

        def infer() -> None:
            with torch.no_grad(), self._autocast():
                called(self.data[0])

        return infer

    def _called(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        if not self.compiled:
            return model

        def forward(x: Tensor) -> Tensor:
            return model(x)

        # torch.compile keeps eight versions per code object and runs whatever is beyond eagerly.
        code = forward.__code__.replace()
        own = FunctionType(code, globals(), closure=forward.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=False)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def clock(self) -> Callable[[Callable[[], object]], float]:
        """Milliseconds of a call, the device idle before and after it."""
        if self.device.type == "cuda":
            return timing.DeviceClock(self.device, idle=True)
        return timing.HostClock()

    def state(self) -> dict:
        """What a row says of its setting."""
        return {
            "case": self.name, "batch": self.batch, "pixels": self.pixels,
            "mode": COMPILER[self.compiled], "memory_format": "channels_last",
            "autocast": "bf16" if self.device.type == "cuda" else None,
        }  # fmt: skip


def _network(name: str) -> nn.Module:
    if name.startswith("cifar:"):
        return models.build(name, n_classes=10, in_channels=3, size=(32, 32))
    return cases.network(name)


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Of every case, eager and, on CUDA, compiled unless ``--compile-cases`` leaves it out."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        for name in options.cases or ["resnet50"]:
            wanted = options.compile_cases
            compiles = options.device == "cuda" and (wanted is None or name in wanted)
            for compiled in (False, True) if compiles else (False,):
                device = torch.device(options.device)
                yield Setting(name, device, options.batch, options.pixels, compiled)
    finally:
        torch.backends.cudnn.benchmark = before


def run_block(
    block: Callable[[Setting, str, dict], None],
    setting: Setting,
    scope: str,
    options: argparse.Namespace,
    result: dict[str, list],
) -> None:
    """Call ``block`` with what a row says of its place, unless the time is over.

    What it raises goes to the result's ``red``: later blocks are worth having.
    """
    where = {**setting.state(), "scope": scope}
    reason = options.out_of_time()
    if reason:
        result["skipped"].append({**where, "reason": reason})
        return
    options.progress(f"{setting.name} {where['mode']} {scope}")
    try:
        block(setting, scope, where)
    except Exception as failure:
        result["red"].append({**where, "reason": reason_of(failure)})
        options.progress(f"RED {reason_of(failure)}")
    release(setting.device)


def left_out(result: dict[str, list]) -> list[str]:
    """A table's lines on blocks that were not timed."""
    return [
        f"{'RED' if kind == 'red' else 'skipped'} {entry['case']} {entry['mode']} "
        f"{entry['scope']}: {entry['reason']}"
        for kind in ("red", "skipped")
        for entry in result[kind]
    ]


def ours(model: nn.Module, layout: GroupLayout, optimizer: str) -> torch.optim.Optimizer:
    """Our optimizer with `Prox`, its state filled by one step."""
    made = OURS[optimizer](model, layout, projection=ato.Prox(), **HYPER[optimizer])
    return _stepped(made)


def torchs(model: nn.Module, optimizer: str) -> torch.optim.Optimizer:
    """torch's fused optimizer, its state filled by one step."""
    return _stepped(TORCH[optimizer](model.parameters(), fused=True, **HYPER[optimizer]))


def _stepped(made: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in made.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, 1e-3)
    made.step()
    made.zero_grad(set_to_none=True)
    return made


def drawn_logits(layout: GroupLayout, seed: int = 0) -> Tensor:
    """Logits ``[n_groups]`` as a search might leave them: gates differ, and so do their channels.

    Each is the sum of a normal number of its own and one of its gate, `GATE_SPREAD` wide.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layout.n_groups, generator=generator)
    for gate in layout.gates:
        logits[gate.span] += GATE_SPREAD * torch.randn((), generator=generator)
    return logits


def drawn_mask(layout: GroupLayout, macs: float = MACS) -> Tensor:
    """What freezing `drawn_logits` keeps: bool ``[n_groups]``."""
    return ato.Budget(macs=macs).freeze(layout, drawn_logits(layout))


def uniform_mask(layout: GroupLayout, macs: float = MACS) -> Tensor:
    """The largest mask within ``macs`` that keeps the same share of every gate, rounded down.

    Bool ``[n_groups]``; a gate keeps one of ``layout.widths`` and no fewer than the smallest.

    Raises:
        ValueError: out of reach.
    """
    budget = ato.Budget(macs=macs)
    budget.check(layout)

    def mask(share: float) -> Tensor:
        keep = torch.zeros(layout.n_groups, dtype=torch.bool)
        for gate in layout.gates:
            least, *wider = layout.widths(gate)
            width = max([least, *(w for w in wider if w <= share * gate.n)])
            keep[gate.offset : gate.offset + width] = True
        return keep

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        fits = layout.macs(mask(middle)) <= budget.target(layout)
        low, high = (middle, high) if fits else (low, middle)
    return mask(low)


def shares_of(layout: GroupLayout, mask: Tensor) -> dict[str, float]:
    """Shares of MACs and parameters that a mask leaves, and of channels in the gates' extremes."""
    kept = [float(mask[gate.span].float().mean()) for gate in layout.gates]
    return {
        "macs_frac": layout.macs(mask) / layout.macs(),
        "params_frac": layout.params(mask) / layout.params(),
        "least_kept_frac": min(kept),
        "most_kept_frac": max(kept),
    }


def over(samples: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """Spread of ``other / base``, formed round by round, for every contender but the base."""
    return {
        name: timing.spread([x / b for x, b in zip(values, samples[base], strict=True)])
        for name, values in samples.items()
        if name != base
    }


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Spread of times, as a row's entries."""
    return {f"{key}_ms": value for key, value in timing.spread(values).items()}


def shown(spread: Mapping[str, float]) -> str:
    """A ratio for a table: median and percentiles."""
    return f"{spread['median']:.3f} ({spread['p20']:.3f} to {spread['p80']:.3f})"
