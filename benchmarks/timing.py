"""Interleaved timing: a round times every contender once, so that drift hits all of them alike.

A sample is the time of one call. Rounds rotate the order and every other one runs backwards, so
nobody always follows the same neighbour. Comparisons are made per round and summarised afterwards:
median with 20th and 80th percentile.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20
"""Read between two samples on a GPU: five times the 50 MiB of an H100's L2. Reading leaves no lines
behind that the next sample would have to write back."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile (linear interpolation between neighbours)."""
    p20, median, p80 = np.percentile(np.asarray(values, dtype=np.float64), [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def ratios(samples: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """Spread of ``base / other``, formed round by round, for every other contender."""
    return {
        name: spread([mine / theirs for mine, theirs in zip(samples[base], values, strict=True)])
        for name, values in samples.items()
        if name != base
    }


def order(names: Sequence[str], turn: int) -> list[str]:
    """Order of the contenders in round ``turn``: rotated by one each, odd rounds backwards."""
    shift = turn % len(names)
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if turn % 2 else rotated


def interleave(
    samplers: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Samples per contender, one per round; ``warmup`` rounds before are thrown away.

    Args:
        samplers: each call runs its contender once and returns the sample.
    """
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            for name in order(names, turn):
                value = samplers[name]()
                if turn >= 0:
                    samples[name].append(value)
    finally:
        if collecting:
            gc.enable()
    return samples


class HostClock:
    """Milliseconds of a call on the CPU."""

    def __call__(self, call: Callable[[], object]) -> float:
        """Time one call."""
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) / 1e6


class DeviceClock:
    """Milliseconds of a call's work on the GPU, between two events, with a cold L2.

    Args:
        idle: wait for the GPU before each sample. The time then includes the host's launches, which
            is what an eager call costs. Without it the GPU still has the flush to do while the host
            launches, which suits a graph: only the device's time is seen.
    """

    def __init__(self, device: torch.device, idle: bool) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._sink = torch.zeros((), device=device)
        self._idle = idle
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, call: Callable[[], object]) -> float:
        """Time one call."""
        begin, end = self._events
        torch.sum(self._flush, dim=0, out=self._sink)
        if self._idle:
            torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph's replay. ``step`` must have run before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    return graph.replay


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds`` (in the main thread, where signals exist).

    A C call that does not return to Python is not interrupted.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again, should somebody on the way swallow the first.
    signal.setitimer(signal.ITIMER_REAL, seconds, 10.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
