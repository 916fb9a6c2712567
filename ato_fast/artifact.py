"""A shrunk model on disk: ``recipe.json`` (what was kept) and ``model.safetensors`` (weights).

Nothing is pickled. The recipe holds, per tensor that lost anything, the dense shape and the kept
indices per dimension, so that any freshly built dense model can be cut to the same shape.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from .shrink import ATTRIBUTES, RECIPE, attribute, cut, named_tensors

FORMAT = "ato_fast.recipe"
VERSION = 1
RECIPE_FILE = "recipe.json"
WEIGHTS_FILE = "model.safetensors"


class ArtifactError(ValueError):
    """A saved model is missing, damaged, or does not fit; the message says what and where."""


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _canonical(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """One name per tensor, and the other names of tied ones."""
    first: dict[int, str] = {}
    unique, aliases = {}, {}
    for name, tensor in tensors.items():
        known = first.setdefault(id(tensor), name)
        if known == name:
            unique[name] = tensor
        else:
            aliases[name] = known
    return unique, aliases


def as_safetensors(tensors: dict[str, torch.Tensor]) -> bytes:
    """The content of a safetensors file."""
    # Copies, because safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return save_tensors(copies, metadata={"format": "pt"})


def save(
    model: nn.Module,
    directory: str | os.PathLike,
    budget: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write a shrunk model as ``recipe.json`` and ``model.safetensors``.

    Args:
        model: a module made by `shrink`.
        directory: created if missing; files of an earlier save are replaced.
        budget: what was asked for and reached, for the record (JSON values).
        provenance: how it was trained, for the record (JSON values).

    Returns:
        The directory.

    Raises:
        ValueError: ``model`` was not made by `shrink`, or its state_dict holds more than tensors.
        TypeError: ``budget`` or ``provenance`` holds something JSON cannot.
    """
    recipe = getattr(model, RECIPE, None)
    if recipe is None:
        raise ValueError(
            "model: expected a module made by ato_fast.shrink, got one without a recipe; "
            "save dense models with safetensors or torch.save"
        )
    tensors, aliases = _canonical(model.state_dict(keep_vars=True))
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise ValueError(f"model: {name} of its state_dict is a {kind}, expected a tensor")
    weights = as_safetensors(tensors)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "tensors": recipe,
        "attributes": getattr(model, ATTRIBUTES, {}),
        "aliases": aliases,
        "budget": budget,
        "provenance": provenance,
    }
    content["sha256"] = _digest(content)
    text = json.dumps(content, indent=1, allow_nan=False)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / WEIGHTS_FILE, weights)
    write_file(directory / RECIPE_FILE, text.encode())
    return directory


def _digest(content: dict[str, Any]) -> str:
    body = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        # A pipe or a device would be read without end.
        special = path.exists() and not path.is_file()
        data = b"" if special else path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path}: no such file; expected a folder written by save") from None
    except (OSError, ValueError) as error:
        # ValueError: a null character in the name.
        raise ArtifactError(f"{path}: cannot be read: {error}") from None
    if special:
        raise ArtifactError(f"{path}: not a file; expected one written by save")
    return data


def read_recipe(directory: str | os.PathLike) -> dict[str, Any]:
    """The checked content of ``recipe.json``.

    Raises:
        ArtifactError: missing, not a recipe, of another version, changed since it was written, or
            not made as `save` makes one.
    """
    path = Path(directory) / RECIPE_FILE
    try:
        content = json.loads(_read(path))
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f'{path}: not a recipe, "format" is not {FORMAT!r}')
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ArtifactError(f"{path}: recipe version {version!r}, this release reads {VERSION}")
    try:
        digest = _digest(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}") from None
    if content.get("sha256") != digest:
        raise ArtifactError(f"{path}: checksum does not match, the file was changed or damaged")
    # What version 0.1 wrote has none.
    content.setdefault("attributes", {})
    problem = _problem(content)
    if problem:
        raise ArtifactError(f"{path}: not a recipe as save writes it: {problem}")
    return content


def _problem(content: dict[str, Any]) -> str:
    """What is wrong with the parts of a recipe that `load` reads; empty if nothing is."""
    for key, kind in (("weights_sha256", str), ("tensors", dict), ("attributes", dict),
                      ("aliases", dict)):  # fmt: skip
        if not isinstance(content.get(key), kind):
            return f"{key!r} is missing or no {kind.__name__}"
    for name, entry in content["tensors"].items():
        problem = _entry_problem(entry)
        if problem:
            return f"tensor {name!r}: {problem}"
    for path, value in content["attributes"].items():
        if not _is_count(value) or not value:
            return f"attribute {path!r}: expected a whole number above 0, got {value!r}"
    for alias, name in content["aliases"].items():
        if not isinstance(name, str):
            return f"alias {alias!r}: expected a name, got {name!r}"
    return ""


def _entry_problem(entry: Any) -> str:
    """What is wrong with the recipe of one tensor: its dense shape, kept indices per dimension."""
    if not isinstance(entry, dict) or not {"shape", "keep"} <= entry.keys():
        return 'expected "shape" and "keep"'
    shape, keep = entry["shape"], entry["keep"]
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        return '"shape" is no list of sizes'
    if not isinstance(keep, dict):
        return '"keep" is no table of indices by dimension'
    dims = {str(dim): size for dim, size in enumerate(shape)}
    for dim, indices in keep.items():
        if dim not in dims:
            return f"a shape of {len(shape)} dimensions has none called {dim!r}"
        if not isinstance(indices, list) or not indices or not all(map(_is_count, indices)):
            return f"dimension {dim}: expected a list of indices"
        if any(a >= b for a, b in pairwise(indices)) or indices[-1] >= dims[dim]:
            return f"dimension {dim}: expected rising indices below {dims[dim]}"
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _kept(
    recipe: dict[str, Any], model: nn.Module, path: Path
) -> dict[tuple[str, int], np.ndarray]:
    tensors = dict(named_tensors(model))
    kept = {}
    for name, entry in recipe["tensors"].items():
        if name in recipe["aliases"]:
            continue
        if name not in tensors:
            raise ArtifactError(f"{path} does not fit this model: it has no tensor {name!r}")
        shape = list(tensors[name].shape)
        if shape != entry["shape"]:
            raise ArtifactError(
                f"{path} does not fit this model: {name} has shape {shape}, "
                f"the recipe was made for {entry['shape']}"
            )
        for dim, indices in entry["keep"].items():
            kept[name, int(dim)] = np.asarray(indices, dtype=np.int64)
    for name, value in recipe["attributes"].items():
        try:
            now = attribute(model, name)
        except AttributeError as error:
            raise ArtifactError(f"{path} does not fit this model: {error}") from None
        if not _is_count(now) or value > now:
            raise ArtifactError(
                f"{path} does not fit this model: {name} is {now!r}, the recipe makes it {value}"
            )
    return kept


def load(directory: str | os.PathLike, build_model: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a shrunk model saved by `save`.

    Args:
        directory: where `save` wrote.
        build_model: returns a dense model of the architecture that was shrunk (its weights do not
            matter; they are cut and overwritten).

    Returns:
        The shrunk model on CPU or wherever ``build_model`` puts it, in the mode it was built in.

    Raises:
        ArtifactError: a file is missing, truncated, tampered with, or of another architecture.
    """
    if isinstance(build_model, nn.Module):
        name = type(build_model).__name__
        raise TypeError(
            f"build_model: expected a callable that returns a dense model, got a {name} itself; "
            f"pass lambda: {name}(...)"
        )
    directory = Path(directory)
    recipe = read_recipe(directory)
    path = directory / WEIGHTS_FILE
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != recipe["weights_sha256"]:
        raise ArtifactError(f"{path}: checksum does not match {RECIPE_FILE}, truncated or changed")
    try:
        weights = load_tensors(data)
    except Exception as error:
        # safetensors lets KeyError and TypeError through for dtypes that torch does not have.
        raise ArtifactError(f"{path}: not readable as safetensors: {error!r}") from error
    model = build_model()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"build_model: expected a callable that returns a torch.nn.Module, "
            f"it returned {type(model).__name__}"
        )
    kept = _kept(recipe, model, directory / RECIPE_FILE)
    try:
        cut(model, kept, recipe["attributes"])
    except Exception as error:
        # Indices that are possible one by one, and together leave a layer that cannot be.
        raise ArtifactError(
            f"{directory / RECIPE_FILE} does not fit this model: {error!r}"
        ) from error
    tensors, aliases = _canonical(model.state_dict(keep_vars=True))
    if aliases != recipe["aliases"]:
        raise ArtifactError(f"{path} does not fit this model: other tensors are tied in it")
    missing, extra = (
        sorted(tensors.keys() - weights.keys()),
        sorted(weights.keys() - tensors.keys()),
    )
    if missing or extra:
        raise ArtifactError(
            f"{path} does not fit this model: "
            f"missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}"
        )
    for name, tensor in tensors.items():
        saved = weights[name]
        if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
            raise ArtifactError(
                f"{path} does not fit this model: {name} is {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}, the file holds {saved.dtype} of {tuple(saved.shape)}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])
    return model
