"""Checkpoints without pickle: one safetensors file each, written atomically, the last two kept.

The nested state (dicts, lists, tuples, numbers, strings, tensors) becomes JSON in the file's
metadata, with every tensor replaced by a reference to one stored beside it. A SHA-256 over JSON and
tensors is checked before anything is used, so a torn or altered file is never taken for a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "ato_fast.checkpoint.1"
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")


class BadCheckpoint(ValueError):
    """A checkpoint file that is torn, altered or of another format."""


def encode(state: Any, tensors: dict[str, Tensor]) -> Any:
    """``state`` as plain JSON values; its tensors are added to ``tensors``.

    Raises:
        TypeError: a value that is none of the types above, naming its type.
    """
    if isinstance(state, Tensor):
        name = f"t{len(tensors)}"
        # Not `contiguous`: a view of a larger buffer must not drag the buffer along.
        tensors[name] = state.detach().cpu().clone(memory_format=torch.contiguous_format)
        # torch's fused optimizers step through memory: a momentum laid out unlike its parameter
        # would silently be applied to the wrong weights.
        other = not state.is_contiguous() and state.dim() == 4
        if other and state.is_contiguous(memory_format=torch.channels_last):
            return {"channels_last": name}
        return {"tensor": name}
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, (list, tuple)):
        return {type(state).__name__: [encode(item, tensors) for item in state]}
    if isinstance(state, dict):
        return {"dict": [[encode(k, tensors), encode(v, tensors)] for k, v in state.items()]}
    raise TypeError(f"cannot store a {type(state).__name__} in a checkpoint")


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `encode`; channels_last tensors are so again, all others contiguous."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "channels_last":
        return tensors[content].contiguous(memory_format=torch.channels_last)
    if kind == "dict":
        return {decode(k, tensors): decode(v, tensors) for k, v in content}
    items = [decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write(temporary)`` make a file, flush it to disk and rename it to ``path``.

    Whatever happens, ``path`` is the old file or the whole new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Checkpoints:
    """The checkpoints of one run, in ``folder``; numbered, only the newest `KEPT` stay."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def paths(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name))

    def save(self, state: Any) -> Path:
        """Write ``state`` as the newest checkpoint and drop those beyond the last two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        existing = self.paths()
        number = int(_NAME.fullmatch(existing[-1].name)[1]) + 1 if existing else 1
        tensors: dict[str, Tensor] = {}
        text = json.dumps(encode(state, tensors))
        metadata = {"format": FORMAT, "state": text, "sha256": _digest(text, tensors)}
        path = self.folder / f"checkpoint-{number:08d}.safetensors"
        write_atomically(path, lambda file: save_file(tensors, file, metadata=metadata))
        for old in self.paths()[:-KEPT]:
            old.unlink()
        return path

    @staticmethod
    def read(path: Path) -> Any:
        """The state in ``path``; tensors on CPU.

        Raises:
            BadCheckpoint: torn, altered, or not a checkpoint.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise BadCheckpoint(f"{path}: torn or not a safetensors file ({error})") from error
        if metadata.get("format") != FORMAT:
            raise BadCheckpoint(f"{path}: expected format {FORMAT}, got {metadata.get('format')!r}")
        if _digest(metadata.get("state", ""), tensors) != metadata.get("sha256"):
            raise BadCheckpoint(f"{path}: checksum does not match; the file was altered")
        return decode(json.loads(metadata["state"]), tensors)

    def newest(self, warn: Callable[[str], None]) -> Any | None:
        """State of the newest whole checkpoint, or None; ``warn`` is told about the others.

        Bad files get the ending ``.bad``, so that `save` does not count them among the last two.
        """
        for path in reversed(self.paths()):
            try:
                return self.read(path)
            except BadCheckpoint as error:
                warn(f"{error}; using the one before it")
                path.rename(path.with_suffix(".bad"))
        return None

    def clear(self) -> None:
        """Remove all checkpoints, leftovers of interrupted writes, and the folder if empty."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name.startswith(("checkpoint-", ".checkpoint-")):
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
