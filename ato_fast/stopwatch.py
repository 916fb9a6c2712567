"""Measures how long a network takes once some of its channels are cut out of it.

Whatever else a machine does hits everything alike: networks to be compared take turns, every one
once a round, the dense network among them. A result is the median over the rounds of the ratio to
the dense network's time in the same round. (A cut network that is measured and one that is deployed
are the same: `shrink` makes both.)
"""

from __future__ import annotations

import copy
import gc
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .groups import Gate, GroupLayout
from .inplace import plain
from .latency import LatencyTable, falling, layout_digest, whole_curve
from .probe import mapped, tensors
from .shrink import duplicate, shrink
from .trace import same_random_numbers

GATE_FRACTIONS = (0.35, 0.7)
"""Widths at which a gate is measured, beside its smallest and its full one, as shares of the full
width. No powers of two: those are faster than their neighbours, and few masks hit them."""

WHOLE_FRACTIONS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Likewise, of all gates together."""

SECONDS = 45.0
"""For a table: rounds are timed until it is spent, but at least `LEAST_ROUNDS`."""

COMPARE_SECONDS = 4.0
"""For a comparison of one small network with the dense one, likewise."""

LEAST_ROUNDS, MOST_ROUNDS = 3, 60
WARM_UP = {"cpu": 1, "cuda": 3}
"""Forward passes of a new network before it is timed."""


def processor() -> str:
    """Name of the CPU."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else "unknown CPU"


def device_name(device: torch.device) -> str:
    """What a latency belongs to: the name of the GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        raise ValueError(f"device: latency is measured on cpu and cuda, got {device}")
    return f"{processor()}, {torch.get_num_threads()} threads"


def described(example: Any) -> tuple[str, ...]:
    """Shape and dtype of every tensor of example inputs."""
    return tuple(
        f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
        for x in tensors(example)
    )


def sample_ms(network: nn.Module, inputs: tuple[Any, ...], device: torch.device) -> float:
    """Milliseconds of one forward pass.

    On a GPU between two events, with the GPU idle at the first: launches by the host count, as they
    do when the network is called.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            begin.record()
            network(*inputs)
            end.record()
            torch.cuda.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter_ns()
    network(*inputs)
    return (time.perf_counter_ns() - start) / 1e6


class Stopwatch:
    """Times a dense network against what is left of it under masks.

    It keeps the network's structure, small tensors and buffers, and of every larger parameter only
    mean and deviation, from which it makes values of the same scale when it measures. So it can
    measure the dense network also after the model was cut, and holds no second copy of it.

    Args:
        model: dense, on its device; left as it is: tensors, gradients, mode, random generators.
        layout: its gates.
        example: positional arguments of one forward call.

    Raises:
        ValueError: a device that is neither a CPU nor a CUDA device, or a layout of another model.
    """

    def __init__(self, model: nn.Module, layout: GroupLayout, example: tuple[Any, ...]) -> None:
        model = plain(model)
        self.layout = layout
        self.device = next(model.parameters()).device
        self.device_name = device_name(self.device)
        self.inputs = mapped(tuple(example), lambda x: x.detach().to(self.device, copy=True))
        self.example = described(self.inputs)
        self._scales: dict[int, tuple[float, float]] = {}
        memo: dict[int, Tensor] = {}
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.numel() and parameter.is_floating_point():
                hollow = torch.empty_like(parameter, device="meta", requires_grad=False)
                memo[id(parameter)] = nn.Parameter(hollow, requires_grad=False)
                values = parameter.detach().float()
                scale = (float(values.mean()), float(values.std(correction=0)))
                self._scales[id(memo[id(parameter)])] = scale
        self._model = duplicate(model, memo).eval()

    def dense(self) -> nn.Module:
        """The dense network with weights of the same scale, on its device, in eval mode."""
        generator = torch.Generator(self.device).manual_seed(0)
        memo = {}
        for parameter in self._model.parameters():
            if id(parameter) in self._scales:
                mean, deviation = self._scales[id(parameter)]
                values = torch.empty_like(parameter, device=self.device)
                values.normal_(mean, deviation, generator=generator)
                memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
        return copy.deepcopy(self._model, memo)

    def table(self) -> LatencyTable:
        """Measure all gates alone, then all together.

        Gates that look alike (same layers, same sizes) have the same curve. Those of them that
        share no layer are cut together, and each gets an equal part of what that saves: a
        difference that many times as large stands out from the noise that much better.
        """
        start = time.perf_counter()
        layout, kinds = self.layout, list(_alike(self.layout))
        smallest = [layout.widths(gate)[0] for gate in layout.gates]
        saved = {gate.offset: ((gate.n,), (0.0,)) for gate in layout.gates}
        with self._measuring():
            dense = self.dense()
            plans = [measured_widths(layout, kind[0], GATE_FRACTIONS) for kind in kinds]
            wholes = [smallest]
            for fraction in WHOLE_FRACTIONS:
                wholes.append([_nearest(layout.widths(g), fraction * g.n) for g in layout.gates])
            n_networks = sum(1 + len(plan) for plan in plans if plan) + 1 + len(wholes)
            share = SECONDS / n_networks
            n_forwards, denses = 0, []
            for kind, plan in zip(kinds, plans, strict=True):
                if not plan:
                    continue
                together = _apart(kind)
                masks = [_cut_to(layout, {g.offset: w for g in together}) for w in plan]
                times = self._interleaved(dense, masks, share * (1 + len(masks)))
                n_forwards += times.size
                denses += times[0].tolist()
                ratios = [_median_ratio(row, times[0]) for row in times[1:]]
                curve = falling([max(0.0, 1 - ratio) / len(together) for ratio in ratios] + [0.0])
                for gate in kind:
                    saved[gate.offset] = ((*plan, gate.n), (*curve[:-1], 0.0))
            masks = [
                _cut_to(layout, {g.offset: w for g, w in zip(layout.gates, widths, strict=True)})
                for widths in wholes
            ]
            times = self._interleaved(dense, masks, share * (1 + len(masks)))
            n_forwards += times.size
            denses += times[0].tolist()
        totals = [
            sum(
                float(np.interp(width, *saved[gate.offset]))
                for gate, width in zip(layout.gates, widths, strict=True)
            )
            for widths in wholes
        ]
        total, ratio = whole_curve(totals, [_median_ratio(row, times[0]) for row in times[1:]])
        curves = [saved[gate.offset] for gate in layout.gates]
        return LatencyTable(
            layout=layout_digest(layout),
            device=self.device_name,
            example=self.example,
            torch=torch.__version__,
            dense_ms=float(np.median(denses)),
            gates=tuple(gate.name for gate in layout.gates),
            widths=tuple(widths for widths, _ in curves),
            saved=tuple(values for _, values in curves),
            total=total,
            ratio=ratio,
            n_forwards=n_forwards,
            seconds=time.perf_counter() - start,
        )

    def compare(self, mask: Tensor) -> tuple[float, float]:
        """Milliseconds of the dense network, and what is left of it under ``mask`` over that."""
        with self._measuring():
            times = self._interleaved(self.dense(), [mask], COMPARE_SECONDS)
        return float(np.median(times[0])), _median_ratio(times[1], times[0])

    def _interleaved(self, dense: nn.Module, masks: Sequence[Tensor], seconds: float) -> np.ndarray:
        """Milliseconds ``[1 + n_masks, n_rounds]``, of the dense network first."""
        networks = [dense, *(shrink(dense, self.layout, mask) for mask in masks)]
        for network in networks[1:] * WARM_UP[self.device.type]:
            self._sample(network)
        rounds: list[list[float]] = []
        until = time.perf_counter() + seconds
        while len(rounds) < MOST_ROUNDS:
            times = [0.0] * len(networks)
            for i in range(len(networks)):
                # Rotated, so that nobody always comes first.
                which = (i + len(rounds)) % len(networks)
                times[which] = self._sample(networks[which])
            rounds.append(times)
            if len(rounds) >= LEAST_ROUNDS and time.perf_counter() > until:
                break
        return np.asarray(rounds).T

    def _sample(self, network: nn.Module) -> float:
        with torch.inference_mode():
            return sample_ms(network, self.inputs, self.device)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """No gradients, no autocast, no garbage collection, random generators as they were."""
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with (
                same_random_numbers(),
                torch.random.fork_rng(devices=devices),
                torch.autocast(self.device.type, enabled=False),
                torch.no_grad(),
            ):
                yield
        finally:
            if collecting:
                gc.enable()


def measured_widths(layout: GroupLayout, gate: Gate, fractions: Iterable[float]) -> list[int]:
    """The smallest of ``layout.widths(gate)`` and the nearest to each fraction, without the full
    one; ascending."""
    widths = layout.widths(gate)
    chosen = {widths[0], *(_nearest(widths, share * gate.n) for share in fractions)}
    return sorted(chosen - {gate.n})


def _nearest(widths: Sequence[int], wanted: float) -> int:
    return min(widths, key=lambda width: abs(width - wanted))


def _median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    return float(np.median(np.divide(times, base)))


def _cut_to(layout: GroupLayout, widths: dict[int, int]) -> Tensor:
    """Mask of the first so many channels of the gates with these offsets, and of all others."""
    mask = torch.ones(layout.n_groups, dtype=torch.bool)
    for gate in layout.gates:
        mask[gate.offset + widths.get(gate.offset, gate.n) : gate.offset + gate.n] = False
    return mask


def _alike(layout: GroupLayout) -> Iterator[list[Gate]]:
    """Gates by the layers they run through: sizes, roles, multiply-adds."""
    kinds: dict[Any, list[Gate]] = {}
    for gate in layout.gates:
        keys = {(part.tensor, part.dim) for part in gate.slices}
        parts = sorted(
            (layout.shapes[part.tensor], part.dim, part.role, int((part.channels >= 0).sum()))
            for part in gate.slices
        )
        terms = sorted(
            (float(term.coef), [layout.shapes[tensor] for tensor, _ in term.dims])
            for term in layout.mac_terms
            if keys & set(term.dims)
        )
        kinds.setdefault((gate.n, repr(parts), repr(terms)), []).append(gate)
    yield from kinds.values()


def _apart(gates: Sequence[Gate]) -> list[Gate]:
    """As many of ``gates`` as share no tensor, in order."""
    chosen: list[Gate] = []
    used: set[str] = set()
    for gate in gates:
        mine = {part.tensor for part in gate.slices}
        if not mine & used:
            chosen.append(gate)
            used |= mine
    return chosen
