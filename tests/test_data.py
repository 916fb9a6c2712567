"""Datasets read from files of the real formats, and batches that derive from (seed, epoch)."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from ato_fast.train import data
from ato_fast.train.batches import Augment, Images, MemoryBatches, derive


def idx(array):
    """``array`` as bytes in the IDX format."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion(folder, zipped):
    """Four IDX files: 30 train and 10 test images of random noise; returns the arrays."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 30), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (n, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(n) % 10
    for name, array in arrays.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Makes a tiny CIFAR of the published layout; torchvision's checksums are those of its files.

    torchvision checks the MD5 of every file before it unpickles it, and keeps doing so here.
    """

    def make(n_classes):
        from torchvision import datasets

        cls = datasets.CIFAR10 if n_classes == 10 else datasets.CIFAR100
        folder = tmp_path / cls.base_folder
        folder.mkdir()
        random = np.random.default_rng(1)
        key = "labels" if n_classes == 10 else "fine_labels"
        images = []

        def write(name, content):
            path = folder / name
            path.write_bytes(pickle.dumps(content))
            return hashlib.md5(path.read_bytes()).hexdigest()

        for attribute in ("train_list", "test_list"):
            listed = []
            for name, _ in getattr(cls, attribute):
                pixels = random.integers(0, 256, (4, 3072)).astype(np.uint8)
                images.append(pixels)
                labels = [(i * 7) % n_classes for i in range(4)]
                listed.append([name, write(name, {"data": pixels, key: labels})])
            monkeypatch.setattr(cls, attribute, listed)
        names = {cls.meta["key"]: [str(i) for i in range(n_classes)]}
        meta = cls.meta | {"md5": write(cls.meta["filename"], names)}
        monkeypatch.setattr(cls, "meta", meta)
        return tmp_path, images

    return make


def write_imagenet(root, classes=("n01", "n02", "n03")):
    random = np.random.default_rng(2)
    for part, n in (("train", 4), ("val", 2)):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 256, (40 + 10 * i, 60, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'JPEG'}")


def test_digits_are_the_real_ones_split_evenly_over_classes():
    digits = data.load("digits")
    assert (len(digits.train), len(digits.test)) == (1347, 450)
    assert digits.shape == data.SHAPES["digits"][0] == tuple(digits.train.x.shape[1:])
    share = digits.train.y.bincount() / (digits.train.y.bincount() + digits.test.y.bincount())
    assert ((share - 0.75).abs() < 0.01).all()
    again = data.load("digits")
    assert torch.equal(digits.train.x, again.train.x)
    seen = {bytes(x.numpy().tobytes()) for x in digits.train.x}
    assert not any(bytes(x.numpy().tobytes()) in seen for x in digits.test.x)
    x = torch.cat([b[0] for b in digits.batches(digits.train, 64, seed=0, training=False)])
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("layout", ["FashionMNIST/raw", "."])
def test_fashion_mnist_in_every_layout(tmp_path, zipped, layout):
    root = tmp_path / "root"
    arrays = write_fashion(root / layout, zipped)
    fashion = data.load("fashion-mnist", root)
    assert fashion.shape == (1, 28, 28) and fashion.n_classes == 10
    for part, prefix in ((fashion.train, "train"), (fashion.test, "t10k")):
        assert np.array_equal(part.x[:, 0].numpy(), arrays[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(part.y.numpy(), arrays[f"{prefix}-labels-idx1-ubyte"])


@pytest.mark.skipif(not data.DEBIAN_FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_of_the_debian_package():
    fashion = data.load("fashion-mnist")
    assert (len(fashion.train), len(fashion.test)) == (60000, 10000)
    assert fashion.train.y.bincount().tolist() == [6000] * 10
    pixels = fashion.train.x.double() / 255
    assert abs(float(pixels.mean()) - fashion.mean[0]) < 1e-3
    assert abs(float(pixels.std()) - fashion.std[0]) < 1e-3


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw[:-1], "expected 7856 bytes"),
        (lambda raw: raw[:6], "cut short in its header"),
        (lambda raw: b"\x00\x00\x0d" + raw[3:], "magic"),
        (lambda raw: b"", "magic"),
    ],
    ids=["short", "header", "floats", "empty"],
)
def test_damaged_idx_files_are_refused(tmp_path, damage, message):
    write_fashion(tmp_path / "f", zipped=False)
    path = tmp_path / "f" / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        data.load("fashion-mnist", tmp_path / "f")


def test_torn_gzip_is_refused(tmp_path):
    write_fashion(tmp_path / "f", zipped=True)
    path = tmp_path / "f" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        data.load("fashion-mnist", tmp_path / "f")


@pytest.mark.parametrize("n_classes", [10, 100])
def test_cifar_is_read(cifar, n_classes):
    root, images = cifar(n_classes)
    loaded = data.load(f"cifar{n_classes}", root)
    assert loaded.n_classes == n_classes and loaded.shape == (3, 32, 32)
    expected = np.concatenate(images).reshape(-1, 3, 32, 32)
    assert np.array_equal(torch.cat([loaded.train.x, loaded.test.x]).numpy(), expected)
    assert loaded.test.y.tolist() == [(i * 7) % n_classes for i in range(4)]
    x, y = next(iter(loaded.batches(loaded.train, 4, seed=0, training=True)))
    assert x.shape == (4, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64


def test_cifar_with_a_changed_file_is_not_unpickled(cifar):
    root, _ = cifar(10)
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(data.MissingData, match="checksum"):
        data.load("cifar10", root)


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet_folders_are_read_alike_with_any_number_of_workers(tmp_path, workers):
    write_imagenet(tmp_path)
    loaded = data.load("imagenet", tmp_path)
    assert loaded.n_classes == 3 and (len(loaded.train), len(loaded.test)) == (12, 6)
    batches = loaded.batches(loaded.train, 5, seed=3, training=True, workers=workers)
    state = torch.get_rng_state()
    found = list(batches.epoch(1))
    assert [len(y) for _, y in found] == [5, 5]
    assert torch.equal(state, torch.get_rng_state())
    alone = loaded.batches(loaded.train, 5, seed=3, training=True)
    for (x, y), (x0, y0) in zip(found, alone.epoch(1), strict=True):
        assert x.shape == (5, 3, 224, 224) and torch.equal(x, x0) and torch.equal(y, y0)
    assert not torch.equal(found[0][0], next(alone.epoch(2))[0])


def test_imagenet_test_images_are_not_augmented(tmp_path):
    write_imagenet(tmp_path)
    loaded = data.load("imagenet", tmp_path)
    first, second = (
        torch.cat([x for x, _ in loaded.batches(loaded.test, 4, seed=s, training=False).epoch(s)])
        for s in (0, 1)
    )
    assert len(first) == 6 and torch.equal(first, second)


def test_imagenet_with_other_classes_in_val_is_refused(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "val" / "n03").rename(tmp_path / "val" / "n09")
    with pytest.raises(ValueError, match="different classes, e.g. n03, n09"):
        data.load("imagenet", tmp_path)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "imagenet"])
def test_missing_data_says_where_and_how(tmp_path, name):
    with pytest.raises(data.MissingData) as caught:
        data.load(name, tmp_path / "nowhere")
    message = str(caught.value)
    assert str(tmp_path / "nowhere") in message and "--data-root" in message


@pytest.mark.parametrize(
    "name, close", [("digts", "digits"), ("cifar-10", "cifar10"), ("mnist", "fashion-mnist")]
)
def test_unknown_dataset_offers_close_matches(name, close):
    with pytest.raises(ValueError, match=f"unknown dataset '{name}'; did you mean .*{close}"):
        data.load(name)


def images(n=20):
    x = torch.randint(0, 256, (n, 1, 6, 6), dtype=torch.uint8)
    return Images(x, torch.arange(n))


def batches_of(part, **changes):
    arguments = {"seed": 5, "training": True, "augment": Augment(1, True), "mean": (0.5,)}
    return MemoryBatches(
        part, torch.arange(len(part)), 6, **{**arguments, "std": (0.25,), **changes}
    )


def test_order_and_augmentation_derive_from_seed_and_epoch():
    part = images()
    torch.manual_seed(1)
    first = list(batches_of(part).epoch(4))
    torch.manual_seed(2)
    fresh = batches_of(part)
    list(fresh.epoch(3))
    for (x, y), (x0, y0) in zip(first, fresh.epoch(4), strict=True):
        assert torch.equal(x, x0) and torch.equal(y, y0)
    orders = [torch.cat([y for _, y in batches_of(part, seed=s).epoch(e)]) for s, e in
              ((5, 4), (5, 5), (6, 4))]  # fmt: skip
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_training_leaves_out_an_incomplete_batch_and_tests_do_not():
    part = images(20)
    assert [len(y) for _, y in batches_of(part)] == [6, 6, 6]
    test = [y for _, y in batches_of(part, training=False)]
    assert torch.equal(torch.cat(test), torch.arange(20))
    assert len(batches_of(part)) == 3 and len(batches_of(part, training=False)) == 4
    assert [len(y) for _, y in batches_of(images(4))] == [4]


def test_iterating_shuffles_by_the_global_generator():
    batches = batches_of(images())
    torch.manual_seed(7)
    first, second = list(batches), list(batches)
    torch.manual_seed(7)
    again = list(batches)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


def test_a_subset_gives_only_its_own_images():
    digits = data.load("digits")
    part = Subset(digits.train, [5, 9, 700])
    ((x, y),) = list(digits.batches(part, 64, seed=0, training=False))
    assert torch.equal(y, digits.train.y[[5, 9, 700]]) and len(x) == 3


def test_shift_moves_the_picture_by_whole_pixels_and_fills_with_zero():
    x = torch.randint(1, 256, (200, 2, 5, 7), dtype=torch.uint8)
    moved = Augment(shift=2)(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and moved.dtype == torch.uint8
    offsets = set()
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for before, after in zip(padded, moved, strict=True):
        found = [
            (r, c)
            for r in range(5)
            for c in range(5)
            if torch.equal(before[:, r : r + 5, c : c + 7], after)
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) == 25


def test_mirror_flips_about_half_of_the_pictures():
    x = torch.randint(0, 256, (400, 1, 3, 4), dtype=torch.uint8)
    out = Augment(mirror=True)(x, torch.Generator().manual_seed(0))
    flipped = (out == x.flip(3)).flatten(1).all(1)
    kept = (out == x).flatten(1).all(1)
    assert (flipped | kept).all() and 150 < int(flipped.sum()) < 250


def test_derived_seeds_differ_in_every_argument():
    seeds = {derive(s, a, b) for s in range(4) for a in range(4) for b in range(4)}
    assert len(seeds) == 64 and all(0 <= seed < 2**63 for seed in seeds)


def test_nothing_to_batch_is_refused():
    with pytest.raises(ValueError, match="empty set"):
        batches_of(images(0))
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        data.load("digits").batches(images(), 0, seed=0, training=True)
