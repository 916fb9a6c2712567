"""Batches whose order and augmentation derive from (seed, epoch) alone.

So a run that starts again at epoch k sees exactly what the run never interrupted saw. Small
datasets are held in memory as uint8 and augmented a batch at a time; large ones go through a
DataLoader with worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def derive(seed: int, *path: int) -> int:
    """A 63-bit seed that depends on every argument, the same on every machine."""
    words = np.random.SeedSequence([seed, *path]).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1))


class Images(Dataset):
    """Images in memory.

    Args:
        x: uint8 ``[N, C, H, W]``.
        y: int64 ``[N]``, class of each image.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@dataclass(frozen=True)
class Augment:
    """Random shift by up to ``shift`` pixels (zero padding, as a padded crop), and mirroring."""

    shift: int = 0
    mirror: bool = False

    def __call__(self, x: Tensor, random: torch.Generator) -> Tensor:
        """``x`` uint8 [B, C, H, W] augmented; draws on CPU, so that every device sees the same."""
        n, _, height, width = x.shape
        if self.shift:
            offsets = torch.randint(0, 2 * self.shift + 1, (2, n), generator=random)
            offsets = offsets.to(x.device)
            rows = offsets[0][:, None] + torch.arange(height, device=x.device)
            columns = offsets[1][:, None] + torch.arange(width, device=x.device)
            padded = torch.nn.functional.pad(x, (self.shift,) * 4)
            batch = torch.arange(n, device=x.device)[:, None, None]
            picked = padded[batch, :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
            x = picked.permute(0, 3, 1, 2)
        if self.mirror:
            flip = torch.rand(n, generator=random).lt(0.5).to(x.device)
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        return x


class Batches:
    """Batches ``(x float [B, C, H, W] normalised, y int64 [B])`` of the images in ``index``."""

    def __init__(self, index: Tensor, batch_size: int, seed: int, training: bool) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not len(index):
            raise ValueError("cannot make batches of an empty set")
        self.index, self.seed, self.training = index, seed, training
        self.batch_size = min(batch_size, len(index))

    def __len__(self) -> int:
        whole, rest = divmod(len(self.index), self.batch_size)
        return whole if self.training or not rest else whole + 1

    def order(self, epoch: int) -> list[Tensor]:
        """Indices of every batch of ``epoch``; a function of (seed, epoch)."""
        index = self.index
        if self.training:
            random = torch.Generator().manual_seed(derive(self.seed, epoch, 0))
            index = index[torch.randperm(len(index), generator=random)]
        return list(index.split(self.batch_size))[: len(self)]

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``epoch``, which depend on nothing that happened before."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass; like a DataLoader, shuffling draws from torch's global CPU generator."""
        return self.epoch(int(torch.randint(2**31, ())) if self.training else 0)


class MemoryBatches(Batches):
    """Batches of `Images`, held on ``device``."""

    def __init__(
        self,
        images: Images,
        index: Tensor,
        batch_size: int,
        *,
        seed: int,
        training: bool,
        augment: Augment,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(index, batch_size, seed, training)
        self.x, self.y = images.x.to(device), images.y.to(device)
        self.augment = augment if training else Augment()
        scale = 1 / (255 * torch.tensor(std))
        shift = -torch.tensor(mean) / torch.tensor(std)
        self.scale, self.shift = (t.view(1, -1, 1, 1).to(device) for t in (scale, shift))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Batches.epoch`."""
        random = torch.Generator().manual_seed(derive(self.seed, epoch, 1))
        for chosen in self.order(epoch):
            chosen = chosen.to(self.x.device)
            x = self.augment(self.x[chosen], random)
            yield x.float() * self.scale + self.shift, self.y[chosen]


class _Seeded(Dataset):
    """Draws the augmentation of image ``i`` in ``epoch`` from (seed, epoch, i).

    So the result does not depend on how many workers there are.
    """

    def __init__(self, base: Dataset, seed: int) -> None:
        self.base, self.seed = base, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(self.seed, epoch, 1, index))
            return self.base[index]


class LoaderBatches(Batches):
    """Batches of a dataset that decodes its images on the fly, through worker processes.

    ``images[i]`` is ``(float tensor [C, H, W], int)`` and may draw from torch's global generator.
    """

    def __init__(
        self,
        images: Dataset,
        index: Tensor,
        batch_size: int,
        *,
        seed: int,
        training: bool,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        super().__init__(index, batch_size, seed, training)
        self.dataset, self.device = _Seeded(images, seed), torch.device(device)
        self.workers = workers

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Batches.epoch`."""
        keys = [[(epoch, i) for i in chosen.tolist()] for chosen in self.order(epoch)]
        pinned = self.device.type == "cuda"
        # A generator of its own: the loader would otherwise draw from the global one.
        random = torch.Generator().manual_seed(derive(self.seed, epoch, 2))
        loader = DataLoader(
            self.dataset,
            batch_sampler=keys,
            num_workers=self.workers,
            pin_memory=pinned,
            generator=random,
        )
        for x, y in loader:
            yield x.to(self.device, non_blocking=pinned), y.to(self.device, non_blocking=pinned)
