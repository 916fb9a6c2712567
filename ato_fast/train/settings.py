"""What a job is asked for: the settings its outcome depends on, and where it works."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..budget import Budget
from .recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """What the user asked for; everything that the outcome depends on, except the machine.

    ``recipe`` holds the changes to the dataset's recipe, None where it is kept;
    ``controller_steps`` is None for the schedule's own number.
    """

    data: str
    model: str
    budget: Budget
    recipe: dict[str, Any] = field(default_factory=dict)
    scope: str = "inner"
    schedule: str = "default"
    controller_steps: int | None = None
    fidelity: str = "default"
    min_channels: int = 1
    round_to: int = 1
    held_out: float = 0.05
    seed: int = 0
    dense: bool = True


@dataclass(frozen=True)
class Place:
    """Where to read from, write to and train; no part of the outcome.

    ``resume`` is ``"never"`` or ``"auto"``; ``overwrite`` starts anew whatever ``output`` holds.
    """

    output: Path
    data_root: Path | None = None
    resume: str = "never"
    overwrite: bool = False
    device: str = "auto"
    workers: int = 2


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu or cuda[:N], got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda[:N], got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} was asked for, but torch sees no CUDA device")
    return device


def fingerprint(settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued."""
    budget = settings.budget
    limits = {"macs": budget.macs, "params": budget.params, budget.kind: budget.value}
    return asdict(settings) | {"budget": limits, "recipe": asdict(recipe)}


def check_writable(option: str, path: Path) -> None:
    """Raise ValueError unless ``path`` can be made: the nearest existing folder is writable."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{option} {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{option} {path}: no permission to write in {existing}")
