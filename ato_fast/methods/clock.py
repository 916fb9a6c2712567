"""Where the time of a run goes, without a host synchronisation per step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch


class Clock:
    """Durations by name: wall clock on CPU, events on CUDA (read when asked for)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._done: dict[str, list[float]] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the duration of the block to ``name``."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pending.append((name, start, end))
        else:
            start = time.perf_counter()
            yield
            self._done.setdefault(name, []).append(time.perf_counter() - start)

    def durations(self, name: str) -> list[float]:
        """Seconds of every block measured so far as ``name``; waits for pending CUDA work."""
        if self._pending:
            torch.cuda.synchronize(self.device)
            for key, start, end in self._pending:
                self._done.setdefault(key, []).append(start.elapsed_time(end) / 1e3)
            self._pending.clear()
        return self._done.get(name, [])

    def total(self, name: str) -> float:
        """Sum of `durations`."""
        return sum(self.durations(name))

    def typical(self, name: str) -> float:
        """Median of `durations`; 0 if there is none."""
        blocks = self.durations(name)
        return median(blocks) if blocks else 0.0

    def excess(self, name: str, baseline: float) -> float:
        """Seconds spent in ``name`` beyond ``baseline`` per block; 0 if ``baseline`` is 0."""
        blocks = self.durations(name)
        return max(0.0, sum(blocks) - len(blocks) * baseline) if baseline else 0.0
