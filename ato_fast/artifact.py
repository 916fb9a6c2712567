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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from .shrink import ATTRIBUTES, RECIPE, cut, named_tensors

FORMAT = "ato_fast.recipe"
VERSION = 1
RECIPE_FILE = "recipe.json"
WEIGHTS_FILE = "model.safetensors"


class ArtifactError(ValueError):
    """A saved model is missing, damaged, or does not fit; the message says what and where."""


def _write(path: Path, data: bytes) -> None:
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
        ValueError: ``model`` was not made by `shrink`.
        TypeError: ``budget`` or ``provenance`` holds something JSON cannot.
    """
    recipe = getattr(model, RECIPE, None)
    if recipe is None:
        raise ValueError(
            "model: expected a module made by ato_fast.shrink, got one without a recipe; "
            "save dense models with safetensors or torch.save"
        )
    tensors, aliases = _canonical(model.state_dict(keep_vars=True))
    weights = save_tensors({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
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
    _write(directory / WEIGHTS_FILE, weights)
    _write(directory / RECIPE_FILE, text.encode())
    return directory


def _digest(content: dict[str, Any]) -> str:
    body = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_recipe(directory: str | os.PathLike) -> dict[str, Any]:
    """The checked content of ``recipe.json``.

    Raises:
        ArtifactError: missing, not a recipe, of another version, or changed since it was written.
    """
    path = Path(directory) / RECIPE_FILE
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path}: no such file; expected a folder written by save") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f'{path}: not a recipe, "format" is not {FORMAT!r}')
    if content.get("version") != VERSION:
        raise ArtifactError(
            f"{path}: recipe version {content.get('version')!r}, this release reads {VERSION}"
        )
    if content.get("sha256") != _digest(content):
        raise ArtifactError(f"{path}: checksum does not match, the file was changed or damaged")
    return content


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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != recipe["weights_sha256"]:
        raise ArtifactError(f"{path}: checksum does not match {RECIPE_FILE}, truncated or changed")
    try:
        weights = load_tensors(data)
    except SafetensorError as error:
        raise ArtifactError(f"{path}: {error}") from None
    model = build_model()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"build_model: expected a callable that returns a torch.nn.Module, "
            f"it returned {type(model).__name__}"
        )
    kept = _kept(recipe, model, directory / RECIPE_FILE)
    try:
        cut(model, kept, recipe.get("attributes", {}))
    except AttributeError as error:
        raise ArtifactError(f"{directory / RECIPE_FILE} does not fit this model: {error}") from None
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
