"""Datasets by name.

``digits`` comes with scikit-learn; the others are read with torchvision's datasets from a folder.
Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import gzip
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from .batches import Augment, Batches, Images, LoaderBatches, MemoryBatches

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Data:
    """A dataset ready for training.

    ``shape`` is (channels, height, width) of what the model sees; ``mean`` and ``std`` are per
    channel, of pixel values in [0, 1].
    """

    name: str
    n_classes: int
    shape: tuple[int, int, int]
    train: Dataset
    test: Dataset
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment

    def batches(
        self,
        part: Dataset,
        batch_size: int,
        *,
        seed: int,
        training: bool,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> Batches:
        """Batches of ``part``: ``self.train``, ``self.test`` or a `Subset` of one.

        ``training`` shuffles, augments and leaves out a last incomplete batch.
        """
        base = part.dataset if isinstance(part, Subset) else part
        chosen = part.indices if isinstance(part, Subset) else range(len(base))
        index = torch.as_tensor(chosen, dtype=torch.long)
        common = {"seed": seed, "training": training, "device": device}
        if not isinstance(base, Images):
            return LoaderBatches(base.view(training), index, batch_size, workers=workers, **common)
        look = {"augment": self.augment, "mean": self.mean, "std": self.std}
        return MemoryBatches(base, index, batch_size, **look, **common)


class MissingData(FileNotFoundError):
    """A dataset that is not where it should be; says where, and how to get it."""

    def __init__(self, name: str, places: list[Path], how: str) -> None:
        looked = ", ".join(str(place) for place in places)
        super().__init__(f"dataset {name} not found; looked for {looked}. {how}")


def load_digits(root: Path | None) -> Data:
    """scikit-learn's handwritten digits: 1797 images of 8x8, 10 classes.

    Each pixel becomes 2x2, which lets the last stage of a CIFAR ResNet work on 4x4. The split
    (1347 train, 450 test) is stratified and always the same. ``root`` is not used.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    raw = sklearn_digits()
    x = torch.from_numpy(raw.images * (255 / 16)).round().to(torch.uint8)[:, None]
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = torch.from_numpy(raw.target).long()
    train, test = train_test_split(
        np.arange(len(y)), test_size=450, random_state=0, stratify=raw.target
    )
    return Data(
        "digits",
        10,
        (1, 16, 16),
        Images(x[train], y[train]),
        Images(x[test], y[test]),
        mean=(0.305,),
        std=(0.376,),
        augment=Augment(shift=2),
    )


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array in the IDX format of MNIST, gzipped if the name ends in ``.gz``.

    Raises:
        ValueError: not an IDX file of bytes, or cut short.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            raw = file.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an IDX file of bytes (magic 0x000008nn)")
    n_dims = raw[3]
    header = 4 + 4 * n_dims
    if len(raw) < header:
        raise ValueError(f"{path}: cut short in its header ({len(raw)} bytes)")
    shape = struct.unpack(f">{n_dims}I", raw[4:header])
    expected = header + int(np.prod(shape))
    if len(raw) != expected:
        raise ValueError(f"{path}: expected {expected} bytes for {shape}, got {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def load_fashion(root: Path | None) -> Data:
    """Fashion-MNIST: torchvision's layout, or any folder with the four IDX files, gzipped or not.

    Without ``root``: ``data``, then the folder of Debian's package dataset-fashion-mnist.
    """
    from torchvision.datasets import FashionMNIST

    roots = [Path("data"), DEBIAN_FASHION] if root is None else [root]
    folders = [folder for r in roots for folder in (r / "FashionMNIST" / "raw", r)]
    names = [f"{part}-{kind}" for part in ("train", "t10k") for kind in FASHION_KINDS]
    for folder in folders:
        found = [_either(folder / name) for name in names]
        if all(found):
            break
    else:
        how = (
            "Put the four files of Fashion-MNIST into one folder and pass --data-root, "
            "or on Debian: apt-get install dataset-fashion-mnist"
        )
        raise MissingData("fashion-mnist", [f / f"{names[0]}[.gz]" for f in folders], how)
    parts = []
    if folder.name == "raw" and all(path.suffix != ".gz" for path in found):
        for train in (True, False):
            part = FashionMNIST(folder.parent.parent, train=train)
            parts.append(Images(part.data[:, None], part.targets.long()))
    else:
        for x, y in (found[:2], found[2:]):
            labels = torch.from_numpy(read_idx(y)).long()
            parts.append(Images(torch.from_numpy(read_idx(x))[:, None], labels))
    for part in parts:
        if part.x.ndim != 4 or len(part.x) != len(part.y) or int(part.y.max()) > 9:
            raise ValueError(
                f"{folder}: expected images [N, H, W] with as many labels in 0..9, got "
                f"{tuple(part.x.shape)} and {tuple(part.y.shape)}"
            )
    return Data(
        "fashion-mnist",
        10,
        tuple(parts[0].x.shape[1:]),
        *parts,
        mean=(0.286,),
        std=(0.353,),
        augment=Augment(shift=2, mirror=True),
    )


FASHION_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _either(path: Path) -> Path | None:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    return None


def _cifar(name: str, n_classes: int, root: Path | None) -> Data:
    from torchvision import datasets

    kind = datasets.CIFAR10 if n_classes == 10 else datasets.CIFAR100
    root = Path("data") if root is None else root
    parts = []
    for train in (True, False):
        try:
            part = kind(str(root), train=train)
        except RuntimeError as error:
            how = (
                f"Get {kind.filename} from the CIFAR page of the University of Toronto, unpack it "
                f"and pass the folder above {kind.base_folder} as --data-root; every file must "
                "have the published checksum"
            )
            raise MissingData(name, [root / kind.base_folder], how) from error
        x = torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)))
        parts.append(Images(x, torch.tensor(part.targets)))
    mean, std = CIFAR_STATISTICS[n_classes]
    augment = Augment(shift=4, mirror=True)
    return Data(name, n_classes, (3, 32, 32), *parts, mean=mean, std=std, augment=augment)


# Per channel over the training images, of pixel values in [0, 1].
CIFAR_STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folder(Dataset):
    """An `ImageFolder` with the augmentation of ImageNet training or the central crop of tests."""

    def __init__(self, path: Path, size: int = 224) -> None:
        from torchvision import datasets, transforms

        normalise = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        self.training = transforms.Compose(
            [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *normalise]
        )
        resize = transforms.Resize(size * 256 // 224)
        self.testing = transforms.Compose([resize, transforms.CenterCrop(size), *normalise])
        self.images = datasets.ImageFolder(str(path))

    def __len__(self) -> int:
        return len(self.images)

    def view(self, training: bool) -> Dataset:
        """The images through the training or the test transform."""
        return _View(self.images, self.training if training else self.testing)


class _View(Dataset):
    def __init__(self, images: Dataset, transform: Callable) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label


def load_imagenet(root: Path | None) -> Data:
    """ImageNet as folders ``train/<class>/*`` and ``val/<class>/*``; any number of classes."""
    root = Path("data/imagenet") if root is None else root
    for part in ("train", "val"):
        if not (root / part).is_dir():
            how = (
                "Unpack the ILSVRC2012 archives into one folder per class under train/ and val/ "
                "and pass the folder above as --data-root"
            )
            raise MissingData("imagenet", [root / "train", root / "val"], how)
    train, test = Folder(root / "train"), Folder(root / "val")
    classes, others = train.images.classes, test.images.classes
    if classes != others:
        odd = sorted(set(classes) ^ set(others))[:3]
        raise ValueError(f"{root}: train/ and val/ hold different classes, e.g. {', '.join(odd)}")
    shape = (3, 224, 224)
    look = (IMAGENET_MEAN, IMAGENET_STD, Augment())  # `Folder` augments and normalises itself
    return Data("imagenet", len(classes), shape, train, test, *look)


SHAPES: dict[str, tuple[tuple[int, int, int], int]] = {
    "digits": ((1, 16, 16), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "imagenet": ((3, 224, 224), 1000),
}
"""Image shape and number of classes per dataset, for those who do not need the images."""

LOADERS: dict[str, Callable[[Path | None], Data]] = {
    "digits": load_digits,
    "fashion-mnist": load_fashion,
    "cifar10": lambda root: _cifar("cifar10", 10, root),
    "cifar100": lambda root: _cifar("cifar100", 100, root),
    "imagenet": load_imagenet,
}


def load(name: str, root: str | os.PathLike | None = None) -> Data:
    """The dataset called ``name``, read from ``root``.

    Raises:
        ValueError: unknown name (offers close matches), or files of another format.
        MissingData: not found (says where it was looked for and how to get it).
    """
    check_name(name)
    return LOADERS[name](None if root is None else Path(root))


def check_name(name: str) -> None:
    """Raise ValueError, with close matches, unless there is a dataset called ``name``."""
    if name not in LOADERS:
        close = difflib.get_close_matches(name, LOADERS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(LOADERS)}"
        raise ValueError(f"unknown dataset {name!r}; {hint}")
