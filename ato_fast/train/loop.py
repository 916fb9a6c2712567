"""One epoch of training, the progress display, and the dense and the ATO run built on both."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..methods import ATO
from .batches import Batches, derive
from .evaluate import accuracy, as_input
from .recipe import Recipe

GPU_READ_INTERVAL = 50
"""Steps between two reads of the loss from a GPU, each of which waits for it."""

Save = Callable[[int, float], None]
"""Called after every epoch with (epochs completed, seconds so far) to write a checkpoint."""


class NonFiniteLoss(FloatingPointError):
    """The training loss became NaN or infinite."""


class Display:
    """Progress on stderr: a tqdm bar on a terminal, otherwise one line per epoch."""

    def __init__(self, name: str, epochs: int, steps_per_epoch: int, first_epoch: int = 0) -> None:
        self.name, self.epochs = name, epochs
        self.bar = tqdm(
            total=epochs * steps_per_epoch,
            initial=first_epoch * steps_per_epoch,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
        )

    def step(self, **shown: str) -> None:
        """One optimizer step is done; ``shown`` replaces what the bar says, if given."""
        if shown:
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done."""
        if self.bar.disable:
            kept = f"  MACs {record['macs_frac']:6.1%}" if "macs_frac" in record else ""
            phase = f"  {record['phase']:<8}" if "phase" in record else ""
            print(
                f"{self.name} epoch {record['epoch']:>3}/{self.epochs}{phase}"
                f"  loss {record['loss']:.4f}  train {record['train_accuracy']:6.2%}"
                f"  test {record['accuracy']:6.2%}{kept}  {record['seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def train_epoch(
    model: nn.Module,
    batches: Batches,
    epoch: int,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], None],
    display: Display,
    shown: Callable[[], dict[str, str]] = dict,
) -> dict[str, float]:
    """Train ``model`` for one epoch.

    Args:
        batches, epoch: what to train on; dropout draws from (seed, epoch) too.
        recipe: learning rate and label smoothing.
        optimizer: whose learning rate is set before every step.
        step: called once the gradients are there; updates the weights.
        shown: what else the progress bar shows.

    Returns:
        ``loss`` and ``train_accuracy``, both means over the epoch, and the last ``lr``.

    Raises:
        NonFiniteLoss: before the step that would use it (on GPU: at the next read).
    """
    model.train()
    torch.manual_seed(derive(batches.seed, epoch, 3))
    n_steps = recipe.epochs * len(batches)
    total_loss = hits = None
    seen = 0
    lr = 0.0
    for i, (x, y) in enumerate(batches.epoch(epoch)):
        now = epoch * len(batches) + i
        lr = recipe.lr_at(now, n_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = model(as_input(x))
        loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        correct = (logits.detach().argmax(1) == y).sum()
        weighted = loss.detach().double() * len(y)
        total_loss = weighted if total_loss is None else total_loss + weighted
        hits = correct if hits is None else hits + correct
        seen += len(y)
        read = not x.is_cuda or i % GPU_READ_INTERVAL == 0 or i == len(batches) - 1
        if read and not math.isfinite(mean := float(total_loss) / seen):
            raise NonFiniteLoss(
                f"the training loss is {mean} in epoch {epoch + 1}, step {now + 1} of {n_steps} "
                f"(learning rate {lr:.3g}); a smaller --lr usually helps"
            )
        step()
        if read:
            rate = int(hits) / seen
            display.step(loss=f"{mean:.4f}", accuracy=f"{rate:.2%}", **shown())
        else:
            display.step()
    return {"loss": float(total_loss) / seen, "train_accuracy": int(hits) / seen, "lr": lr}


def dense_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """torch's own fused optimizer for the dense twin."""
    common = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **common)
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **common)


def train_dense(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    test: Batches,
    recipe: Recipe,
    *,
    history: list[dict],
    seconds: float,
    save: Save,
) -> float:
    """Ordinary training from epoch ``len(history)`` on; a record per epoch is added to ``history``.

    Returns the seconds it took, ``seconds`` spent before included. ``save`` as `Save`.
    """

    def one(epoch: int, display: Display) -> dict:
        return train_epoch(model, batches, epoch, recipe, optimizer, optimizer.step, display)

    return _epochs("dense", model, batches, test, recipe, one, history, seconds, save)


def train_ato(
    run: ATO,
    batches: Batches,
    test: Batches,
    recipe: Recipe,
    *,
    history: list[dict],
    seconds: float,
    save: Save,
) -> float:
    """As `train_dense`, for a run that finds and zeroes what can go."""
    dense_macs = run.layout.macs()

    mask, kept = None, 1.0

    def shown() -> dict[str, str]:
        nonlocal mask, kept
        if mask is not run.mask:
            mask, kept = run.mask, run.layout.macs(run.mask) / dense_macs
        return {"phase": run.phase, "MACs": f"{kept:.1%}"}

    def one(epoch: int, display: Display) -> dict:
        record = train_epoch(
            run.model, batches, epoch, recipe, run.optimizer, run.step, display, shown
        )
        last = run.history[-1]
        return record | {
            "phase": last["phase"],
            "macs_frac": last["macs"] / dense_macs,
            "network_macs_frac": last["network_macs"] / dense_macs,
            "kept": last["kept"],
        }

    def elsewhere() -> float:
        return run.seconds["evaluate"]

    return _epochs("ato", run.model, batches, test, recipe, one, history, seconds, save, elsewhere)


def _epochs(
    name: str,
    model: nn.Module,
    batches: Batches,
    test: Batches,
    recipe: Recipe,
    one: Callable[[int, Display], dict],
    history: list[dict],
    seconds: float,
    save: Save,
    elsewhere: Callable[[], float] = lambda: 0.0,
) -> float:
    """Train from epoch ``len(history)`` on; ``elsewhere``: seconds so far that are no training."""
    first = len(history)
    if first >= recipe.epochs:
        return seconds
    display = Display(name, recipe.epochs, len(batches), first)
    try:
        for epoch in range(first, recipe.epochs):
            start, spent = time.perf_counter(), elsewhere()
            record = one(epoch, display)
            seconds += time.perf_counter() - start - (elsewhere() - spent)
            # Outside the clock: neither the test score per epoch nor the checkpoint is training.
            record |= {"epoch": epoch + 1, "accuracy": accuracy(model, test)}
            record["seconds"] = time.perf_counter() - start
            history.append(record)
            display.epoch(record)
            save(epoch + 1, seconds)
    finally:
        display.close()
    return seconds
