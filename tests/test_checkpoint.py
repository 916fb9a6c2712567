"""Checkpoints: what goes in comes out, and a damaged file is never used."""

import math

import numpy as np
import pytest
import torch

from ato_fast.train.checkpoint import BadCheckpoint, Checkpoints


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


STATE = {
    "model": {"w": torch.randn(3, 4), "n": torch.tensor(7), "empty": torch.zeros(0, 2)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"lr": 0.1}]},
    "tuple": (1, "two", None, True, [False]),
    "numbers": [0.1 + 0.2, math.inf, -math.inf, math.nan, 2**60, 5e-324],
    "dtypes": [torch.randn(5).to(t) for t in (torch.bfloat16, torch.float64)]
    + [torch.tensor([True, False]), torch.arange(4, dtype=torch.uint8)],
    "tensor": {"tensor": "t0", "dict": [], "tuple": ()},
}


def refuse(line):
    raise AssertionError(f"unexpected warning: {line}")


def test_state_comes_back_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(STATE)
    assert same(STATE, checkpoints.newest(refuse))


def test_numpy_scalars_become_plain_numbers(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"n": np.int64(3), "x": np.float32(0.5)})
    assert checkpoints.newest(refuse) == {"n": 3, "x": 0.5}


def test_views_and_layouts_are_stored_as_values(tmp_path):
    base = torch.randn(1000, 64)
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = {"row": base[3], "column": base[:, 1], "image": image}
    path = Checkpoints(tmp_path).save(state)
    loaded = Checkpoints.read(path)
    assert same(state, loaded)
    assert loaded["image"].stride() == image.stride() != image.contiguous().stride()
    assert loaded["column"].is_contiguous()
    assert path.stat().st_size < 10_000


def test_other_types_are_named(tmp_path):
    with pytest.raises(TypeError, match="cannot store a set"):
        Checkpoints(tmp_path).save({"a": [{1, 2}]})
    assert not list(tmp_path.iterdir())


def test_the_last_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for epoch in range(5):
        checkpoints.save({"epoch": epoch})
    assert [Checkpoints.read(p)["epoch"] for p in checkpoints.paths()] == [3, 4]
    assert checkpoints.newest(refuse) == {"epoch": 4}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_torn_file_is_detected_and_the_one_before_used(tmp_path, share):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"epoch": 0, "x": torch.randn(50)})
    path = checkpoints.save({"epoch": 1, "x": torch.randn(50)})
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    said = []
    assert checkpoints.newest(said.append)["epoch"] == 0
    assert len(said) == 1 and path.name in said[0] and "using the one before it" in said[0]
    checkpoints.save({"epoch": 2})
    checkpoints.save({"epoch": 3})
    assert [Checkpoints.read(p)["epoch"] for p in checkpoints.paths()] == [2, 3]


def test_no_byte_can_be_changed_unnoticed(tmp_path):
    path = Checkpoints(tmp_path).save({"epoch": 1, "x": torch.randn(40), "s": "text"})
    raw = path.read_bytes()
    expected = Checkpoints.read(path)
    for place in range(len(raw)):
        damaged = bytearray(raw)
        damaged[place] ^= 0x11
        path.write_bytes(damaged)
        try:
            state = Checkpoints.read(path)
        except BadCheckpoint:
            continue
        # Only white space that pads the header does not matter.
        assert same(state, expected) and raw[place : place + 1] == b" "


def test_another_safetensors_file_is_no_checkpoint(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "checkpoint-00000001.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(BadCheckpoint, match="expected format"):
        Checkpoints.read(path)


def test_a_write_that_fails_leaves_the_old_ones(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"epoch": 0})

    def broken(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("ato_fast.train.checkpoint.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save({"epoch": 1})
    assert checkpoints.newest(refuse) == {"epoch": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001.safetensors"]


def test_leftovers_of_a_killed_write_are_ignored_and_cleared(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save({"epoch": 0})
    (tmp_path / "c" / ".checkpoint-00000002.safetensors.99.tmp").write_bytes(b"half")
    assert checkpoints.newest(refuse) == {"epoch": 0}
    checkpoints.clear()
    assert not (tmp_path / "c").exists()


def test_no_checkpoint_at_all(tmp_path):
    assert Checkpoints(tmp_path / "none").newest(refuse) is None
