"""What the subcommands share: errors of one line, kinds of options, files written as a whole."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

EXTRA = ("torchvision", "sklearn", "matplotlib", "tqdm")


class BadInput(Exception):
    """Something given does not work; the message is for the user."""


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of the given kinds, which name what was given, into `BadInput`."""
    try:
        yield
    except kinds as error:
        raise BadInput(" ".join(str(error).split())) from error
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        raise BadInput(f"needs {package}: pip install 'ato-fast[train]'") from error


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def image_shape(text: str) -> tuple[int, int, int]:
    """``3x224x224`` as channels, height, width."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected channels x height x width such as 3x224x224, got {text!r}"
        )
    return tuple(int(part) for part in parts)


def check_file(option: str, path: Path) -> None:
    """Raise ValueError unless a file can be written at ``path``, which ``option`` gave."""
    from .settings import check_writable

    check_writable(option, path.parent)
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder, expected a file name")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write what ``--json`` asks for."""
    write("--json", path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write(option: str, path: Path, content: bytes) -> None:
    """Write a file as a whole, and its folder; an OSError names ``option``."""
    from .checkpoint import write_atomically

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write_bytes(content))
    except OSError as error:
        raise OSError(f"{option} {path}: {error.strerror}") from error
