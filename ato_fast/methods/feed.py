"""Data for the controller: held out of training, read again and again, resumable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset


def hold_out(dataset: Dataset, fraction: float = 0.05, seed: int = 0) -> tuple[Subset, Subset]:
    """Split a map-style dataset into (training part, part for the controller), at random.

    The controller's part is what the weights are never trained on. 5 % is the published share.

    Args:
        dataset: has a length and integer indexing.
        fraction: share of the controller, in (0, 1); at least one example each way.
        seed: of the split; the same for every run and rank.

    Raises:
        ValueError: fraction out of range, or fewer than two examples.
        TypeError: a DataLoader or something else without a length, or a fraction that is no number.
    """
    if isinstance(dataset, DataLoader):
        raise TypeError("dataset: expected a dataset, got a DataLoader; pass loader.dataset")
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset: expected one with a length, got {type(dataset).__name__}")
    if not isinstance(fraction, int | float):
        raise TypeError(f"fraction: expected a number in (0, 1), got {fraction!r}")
    n = len(dataset)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a share in (0, 1), got {fraction}")
    if n < 2:
        raise ValueError(f"dataset: expected at least 2 examples to split, got {n}")
    held = min(n - 1, max(1, int(fraction * n)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return (
        Subset(dataset, order[held:].sort().values.tolist()),
        Subset(dataset, order[:held].sort().values.tolist()),
    )


class Feed:
    """Endless batches of an iterable, whose position can be saved and restored.

    Each batch is drawn with torch's global CPU generator seeded from (seed, pass, index) and put
    back afterwards, so that shuffling and random transforms of the controller's data neither depend
    on the training data's random numbers nor disturb them, and a resumed run sees the same batches.
    An explicit generator of a `DataLoader` is saved and restored with the position. Transforms
    that use Python's or NumPy's global generators are outside this.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.passes = 0
        self.index = 0
        self._opened: Tensor | None = None  # state of an explicit generator as the pass began
        self._source: Iterable | None = None
        self._iterator: Iterator | None = None

    def next(self, data: Iterable) -> Any:
        """The next batch of ``data``, starting over at its end.

        Raises:
            ValueError: a pass gives no batch.
        """
        if self._iterator is None or self._source is not data:
            # Other data than before starts at its beginning; a restored position is found again.
            skip = self.index if self._source is None else 0
            self.index = 0
            self._open(data)
            for _ in range(skip):
                try:
                    self._draw()
                except StopIteration:
                    raise ValueError(
                        f"controller_data: the saved position is batch {skip} of a pass, but a "
                        f"pass now ends after {self.index}; resume with the same data"
                    ) from None
                self.index += 1
        try:
            batch = self._draw()
        except StopIteration:
            self.passes, self.index, self._opened = self.passes + 1, 0, None
            self._open(data)
            try:
                batch = self._draw()
            except StopIteration:
                raise ValueError(
                    "controller_data: it gave no batch; expected an iterable that can be iterated "
                    "again and again, such as a DataLoader or a list of batches"
                ) from None
        self.index += 1
        return batch

    def _open(self, data: Iterable) -> None:
        sampler = getattr(data, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.passes)
        generator = getattr(data, "generator", None)
        if isinstance(generator, torch.Generator):
            if self._opened is None:
                self._opened = generator.get_state()
            else:
                generator.set_state(self._opened)
        self._source = data
        with _Seeded(self._seed(0)):
            self._iterator = iter(data)

    def _draw(self) -> Any:
        with _Seeded(self._seed(self.index + 1)):
            return next(self._iterator)

    def _seed(self, index: int) -> int:
        return (self.seed * 1_000_003 + self.passes * 7_919 + index) % 2**63

    def state_dict(self) -> dict[str, int | Tensor | None]:
        """Position in the data."""
        return {"passes": self.passes, "index": self.index, "opened": self._opened}

    def load_state_dict(self, state: dict[str, int | Tensor | None]) -> None:
        """Continue at a saved position; the next batch skips what was already seen of its pass."""
        self.passes, self.index = int(state["passes"]), int(state["index"])
        opened = state["opened"]
        self._opened = None if opened is None else opened.to("cpu", torch.uint8)
        self._source = self._iterator = None


class _Seeded:
    """Seeds torch's global CPU generator inside, restores it outside."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *exception) -> None:
        torch.set_rng_state(self.state)
