"""Damaged, forged and mixed-up artifacts: an `ArtifactError` in every case, never another error."""

import copy
import hashlib
import json
import os
import random

import pytest
import torch

import ato_fast as ato
from nets import Residual, shrunk_residual

X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def small():
    return shrunk_residual(X)


def test_files_of_two_folders_do_not_mix(small, tmp_path):
    ato.save(small, tmp_path / "a")
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.head.bias += 1
    ato.save(other, tmp_path / "b")
    os.replace(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")
    with pytest.raises(ato.ArtifactError, match=r"model\.safetensors: checksum does not match"):
        ato.load(tmp_path / "b", Residual)


def special_file(path, kind):
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path if kind == "loop" else path.parent / "nowhere")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "dangling"])
@pytest.mark.parametrize("name", ["recipe.json", "model.safetensors"])
def test_what_is_no_file(small, tmp_path, name, kind):
    ato.save(small, tmp_path)
    special_file(tmp_path / name, kind)
    words = {"dangling": "no such file; ", "loop": "cannot be read: "}.get(kind, "not a file; ")
    with pytest.raises(ato.ArtifactError) as raised:
        ato.load(tmp_path, Residual)
    assert str(raised.value).startswith(f"{tmp_path / name}: {words}")


def test_links_to_whole_files_are_followed(small, tmp_path):
    ato.save(small, tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("recipe.json", "model.safetensors"):
        (tmp_path / "b" / name).symlink_to(tmp_path / "a" / name)
    assert torch.equal(ato.load(tmp_path / "b", Residual).eval()(X), small(X))


def test_a_folder_that_cannot_be_named():
    with pytest.raises(ato.ArtifactError, match="cannot be read"):
        ato.load("a\0b", Residual)


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b"9" * 5000, b"", b"\0", b"\xff\xfe", b'"\xc3"', b'{"format": NaN}',
     b'{"format": "ato_fast.recipe", "version": 1, "a": NaN}',
     b'{"format": "ato_fast.recipe", "version": 1, "a": 1e999}',
     b'{"format": "ato_fast.recipe", "version": 1, "a": ' + b"[" * 900 + b"]" * 900 + b"}"],
    ids=lambda text: text[:60].decode("latin-1"),
)  # fmt: skip
def test_odd_json(tmp_path, text):
    (tmp_path / "recipe.json").write_bytes(text)
    with pytest.raises(ato.ArtifactError, match="not readable as JSON|not a recipe|checksum"):
        ato.load(tmp_path, Residual)


def seal(folder, content):
    """Write a recipe whose checksums are right whatever else it holds."""
    content["weights_sha256"] = hashlib.sha256(
        (folder / "model.safetensors").read_bytes()
    ).hexdigest()
    body = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True)
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "recipe.json").write_text(json.dumps(content))


def at(*path):
    """A change of a recipe: what the path leads to becomes the last item."""

    def change(content):
        *to, name, value = path
        for key in to:
            content = content[key]
        content[name] = value

    return change


KEEP = ("tensors", "head.weight", "keep")
FORGED = {
    "no-tensors": (lambda c: c.pop("tensors"), "'tensors' is missing or no dict"),
    "no-aliases": (lambda c: c.pop("aliases"), "'aliases' is missing or no dict"),
    "list-of-tensors": (at("tensors", []), "'tensors' is missing or no dict"),
    "entry": (at("tensors", "head.weight", 3), """tensor 'head.weight': expected "shape" and"""),
    "shape": (at("tensors", "head.weight", "shape", [5, -8]), '"shape" is no list of sizes'),
    "shape-text": (at("tensors", "head.weight", "shape", "58"), '"shape" is no list of sizes'),
    "other-shape": (at("tensors", "head.weight", "shape", [5, 9]), "has shape [5, 8], the recipe"),
    "keep": (at(*KEEP, [1]), '"keep" is no table of indices'),
    "dimension": (at(*KEEP, "2", [0]), "none called '2'"),
    "negative-dimension": (at(*KEEP, "-1", [0]), "none called '-1'"),
    "padded-dimension": (at(*KEEP, "01", [0]), "none called '01'"),
    "no-index": (at(*KEEP, "1", []), "dimension 1: expected a list of indices"),
    "text-index": (at(*KEEP, "1", ["0"]), "dimension 1: expected a list of indices"),
    "true-index": (at(*KEEP, "1", [False, True]), "dimension 1: expected a list of indices"),
    "real-index": (at(*KEEP, "1", [0.0, 1.0]), "dimension 1: expected a list of indices"),
    "negative-index": (at(*KEEP, "1", [-1, 0]), "dimension 1: expected a list of indices"),
    "large-index": (at(*KEEP, "1", [0, 8]), "expected rising indices below 8"),
    "huge-index": (at(*KEEP, "1", [10**30]), "expected rising indices below 8"),
    "twice": (at(*KEEP, "1", [3, 3]), "expected rising indices below 8"),
    "unsorted": (at(*KEEP, "1", [3, 2]), "expected rising indices below 8"),
    "other-number": (at(*KEEP, "1", [3]), "head.weight is torch.float32 of shape (5, 1), the"),
    "attributes": (at("attributes", []), "'attributes' is missing or no dict"),
    "attribute-zero": (at("attributes", "head.in_features", 0), "a whole number above 0, got 0"),
    "attribute-true": (at("attributes", "head.in_features", True), "above 0, got True"),
    "attribute-grown": (at("attributes", "head.in_features", 9), "is 8, the recipe makes it 9"),
    "attribute-module": (at("attributes", "nowhere.size", 1), "does not fit this model: Residual"),
    "attribute-name": (at("attributes", "head.size", 1), "has no attribute 'size'"),
    "attribute-mode": (at("attributes", "head.training", 1), "is True, the recipe makes it 1"),
    "attribute-method": (at("attributes", "head.forward", 1), "does not fit this model: head.for"),
    "attribute-weight": (at("attributes", "head.weight", 1), "does not fit this model: head.wei"),
    "alias": (at("aliases", "head.weight", 3), "alias 'head.weight': expected a name, got 3"),
    "alias-of-nothing": (at("aliases", "head.weight", "x"), "other tensors are tied in it"),
    "weights-checksum": (lambda c: c.pop("tensors") and c.update(tensors=[]), "no dict"),
    "version": (at("version", True), "recipe version True, this release reads 1"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", FORGED.values(), ids=FORGED)
def test_a_forged_recipe_with_the_right_checksum(small, tmp_path, change, message):
    ato.save(small, tmp_path)
    content = json.loads((tmp_path / "recipe.json").read_text())
    change(content)
    seal(tmp_path, content)
    with pytest.raises(ato.ArtifactError) as raised:
        ato.load(tmp_path, Residual)
    assert message in str(raised.value)


def test_a_recipe_without_attributes_is_read(small, tmp_path):
    """What version 0.1 wrote."""
    ato.save(small, tmp_path)
    content = json.loads((tmp_path / "recipe.json").read_text())
    del content["attributes"]
    seal(tmp_path, content)
    assert torch.equal(ato.load(tmp_path, Residual).eval()(X), small(X))


ODD = (None, True, 0, -1, 7, 10**30, 1.5, 1e308, "", "head.weight", "\ud800", [], [1], [[]], {},
       {"shape": [1]}, float("nan"), float("-inf"))  # fmt: skip


def places(tree, path=()):
    """The way to every value in nested dicts and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def loads_or_refuses(folder):
    """Whether it loads; ArtifactError counts as no, anything else is an error."""
    try:
        model = ato.load(folder, Residual).eval()
    except ato.ArtifactError as error:
        assert len(str(error).splitlines()) == 1
        return False
    model(X)
    return True


def test_random_changes_of_the_recipe_are_refused_or_harmless(small, tmp_path):
    ato.save(small, tmp_path, provenance={"a": [1, {"b": 2.5}]})
    content = json.loads((tmp_path / "recipe.json").read_text())
    changes, loaded = random.Random(0), 0
    for _ in range(400):
        changed = copy.deepcopy(content)
        *to, last = changes.choice(list(places(changed)))
        inner = changed
        for key in to:
            inner = inner[key]
        if changes.random() < 0.2:
            del inner[last]
        else:
            inner[last] = changes.choice(ODD)
        seal(tmp_path, changed)
        loaded += loads_or_refuses(tmp_path)
    assert loaded < 100


def test_every_flipped_bit_and_every_cut_is_seen(small, tmp_path):
    ato.save(small, tmp_path)
    changes = random.Random(0)
    for name in ("recipe.json", "model.safetensors"):
        path = tmp_path / name
        data = path.read_bytes()
        for _ in range(200):
            flipped = bytearray(data)
            flipped[changes.randrange(len(data))] ^= 1 << changes.randrange(8)
            for damaged in (flipped, data[: changes.randrange(len(data))]):
                path.write_bytes(damaged)
                assert not loads_or_refuses(tmp_path)
        path.write_bytes(data)
    assert loads_or_refuses(tmp_path)


def test_damaged_weights_with_the_right_checksum(small, tmp_path):
    ato.save(small, tmp_path)
    content = json.loads((tmp_path / "recipe.json").read_text())
    path = tmp_path / "model.safetensors"
    data, changes = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(300):
        damaged = bytearray(data)
        damaged[changes.randrange(header)] = changes.randrange(256)
        path.write_bytes(damaged[: changes.choice([len(data), changes.randrange(len(data))])])
        seal(tmp_path, content)
        loads_or_refuses(tmp_path)
    path.write_bytes(data.replace(b"F32", b"I32", 1))
    seal(tmp_path, content)
    with pytest.raises(ato.ArtifactError, match=r"the file holds torch\.int32"):
        ato.load(tmp_path, Residual)
