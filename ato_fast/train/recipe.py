"""Training recipes: the hyperparameters of a run, the defaults per dataset, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .data import Data

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters that the dense twin and the ATO run share.

    Args:
        epochs, batch_size: both at least 1.
        optimizer: ``sgd`` (Nesterov momentum 0.9) or ``adamw`` (betas 0.9, 0.999).
        lr: peak of the learning rate: linear warm-up over ``warmup`` of the run, then a cosine to
            zero, changed every step.
        weight_decay: applied to every parameter.
        label_smoothing: in [0, 1).

    Raises:
        ValueError: an argument out of range.
    """

    epochs: int
    batch_size: int
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup: float = 0.05

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("lr", math.isfinite(self.lr) and self.lr > 0, "above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def lr_at(self, step: int, n_steps: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0) of ``n_steps``."""
        warmup = self.warmup * n_steps
        if step + 1 < warmup:
            return self.lr * (step + 1) / warmup
        progress = min(1.0, max(0.0, (step - warmup) / max(1.0, n_steps - warmup)))
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


DEFAULTS = {
    "digits": Recipe(epochs=40, batch_size=64, lr=0.1),
    "fashion-mnist": Recipe(epochs=40, batch_size=128, lr=0.1),
    "cifar10": Recipe(epochs=200, batch_size=128, lr=0.1),
    "cifar100": Recipe(epochs=200, batch_size=128, lr=0.1),
    "imagenet": Recipe(
        epochs=90, batch_size=256, lr=0.1, weight_decay=1e-4, label_smoothing=0.1, warmup=5 / 90
    ),
}
ADAMW = {"lr": 1e-3, "weight_decay": 5e-2}


def recipe_for(data: Data, **changes: object) -> Recipe:
    """The recipe of a dataset, with every change that is not None applied.

    Raises:
        ValueError: a change out of range.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    base = DEFAULTS[data.name]
    if changes.get("optimizer") == "adamw":
        changes = {**ADAMW, **changes}
    return replace(base, **changes)
