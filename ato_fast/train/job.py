"""The main job: train a dense twin and an ATO run, keep what came out, say what it costs.

`prepare` reads and checks everything that the user said without writing anything; `Job.run`
trains. A job killed at any moment and prepared again with ``resume="auto"`` ends as if never
killed: both runs are checkpointed after every epoch.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import ATO, SGD, AdamW, Schedule, hold_out, trace
from ..budget import Budget
from ..groups import GroupLayout
from . import data as datasets
from . import models
from .batches import Batches, derive
from .checkpoint import Checkpoints
from .evaluate import accuracy, as_input
from .loop import dense_optimizer, train_ato, train_dense
from .outcome import RESULT, latency_batch, write_outcome
from .recipe import Recipe, recipe_for
from .settings import Place, Settings, check_writable, fingerprint, pick_device

SCHEDULES = {"default": Schedule, "paper": Schedule.paper, "fast": Schedule.fast}
TEST_BATCH = 256


@dataclass
class Job:
    """A checked job, ready to run; made by `prepare`."""

    settings: Settings
    place: Place
    device: torch.device
    data: datasets.Data
    recipe: Recipe
    layout: GroupLayout
    schedule: Schedule
    checkpoints: Checkpoints
    state: dict[str, Any]
    budget: Budget
    """As in the settings, with what was measured."""

    def build(self) -> nn.Module:
        """The dense network as initialised from the seed; the same every time."""
        torch.manual_seed(derive(self.settings.seed, 0))
        channels, *size = self.data.shape
        model = models.build(self.settings.model, self.data.n_classes, channels, tuple(size))
        return model.to(self.device, memory_format=torch.channels_last)

    def example(self) -> tuple[torch.Tensor]:
        """Example inputs for the trace."""
        return (torch.zeros(2, *self.data.shape, device=self.device),)

    def batches(self, part: object, training: bool, seed: int = 0) -> Batches:
        """Batches of a part of the data on the job's device."""
        size = self.recipe.batch_size if training else TEST_BATCH
        return self.data.batches(
            part,
            size,
            seed=derive(self.settings.seed, 1, seed),
            training=training,
            device=self.device,
            workers=self.place.workers,
        )

    def run(self, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
        """Train what is not trained yet, write the outcome; returns the content of result.json.

        Args:
            tell: gets the lines of progress that are not the display's.

        Raises:
            FloatingPointError: the loss or the weights became NaN or infinite.
        """
        finished = self.state.get("finished")
        if finished:
            tell(f"{self.place.output}: this run has already finished")
            return finished
        self.place.output.mkdir(parents=True, exist_ok=True)
        _remove_partial(self.place.output)
        if self.place.overwrite:
            self.checkpoints.clear()
        try:
            if self.settings.dense:
                self._dense()
            run = self._ato()
            result = write_outcome(self, run, tell)
        finally:
            _remove_partial(self.place.output)
            if not any(self.place.output.iterdir()):
                self.place.output.rmdir()
        self.checkpoints.clear()
        return result

    def _save(self, **state: Any) -> None:
        self.state.update(state)
        self.checkpoints.save(self.state | {"fingerprint": fingerprint(self.settings, self.recipe)})

    def _dense(self) -> None:
        past = self.state.setdefault("dense", {"history": [], "seconds": 0.0})
        if len(past["history"]) >= self.recipe.epochs:
            return
        model = self.build()
        optimizer = dense_optimizer(model, self.recipe)
        if past["history"]:
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])

        def save(epoch: int, seconds: float) -> None:
            past["seconds"] = seconds
            if epoch == self.recipe.epochs:
                self._save(model=None, optimizer=None)
            else:
                self._save(model=model.state_dict(), optimizer=optimizer.state_dict())

        train_dense(
            model,
            optimizer,
            self.batches(self.data.train, training=True),
            self.batches(self.data.test, training=False),
            self.recipe,
            history=past["history"],
            seconds=past["seconds"],
            save=save,
        )

    def _ato(self) -> ATO:
        settings, recipe = self.settings, self.recipe
        past = self.state.setdefault("ato", {"history": [], "seconds": 0.0})
        train, held = hold_out(self.data.train, settings.held_out, settings.seed)
        batches = self.batches(train, training=True)
        common = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        if recipe.optimizer == "adamw":
            optimizer = partial(AdamW, **common)
        else:
            optimizer = partial(SGD, momentum=0.9, nesterov=True, **common)
        test = self.batches(self.data.test, training=False)
        run = ATO(
            self.build(),
            self.example(),
            optimizer=optimizer,
            budget=self.budget,
            schedule=self.schedule,
            controller_data=self.batches(held, training=True, seed=1),
            scope=settings.scope,
            fidelity=settings.fidelity,
            seed=settings.seed,
            layout=self.layout,
            evaluate=lambda model: accuracy(model, test),
        )
        if past["history"]:
            run.load_state_dict(self.state["run"])
            run.model.load_state_dict(self.state["model"])

        def save(epoch: int, seconds: float) -> None:
            past["seconds"] = seconds
            self._save(model=run.model.state_dict(), run=run.state_dict())

        train_ato(
            run,
            batches,
            test,
            recipe,
            history=past["history"],
            seconds=past["seconds"],
            save=save,
        )
        return run


def prepare(settings: Settings, place: Place) -> Job:
    """Read the data, build and trace the model, check budget, schedule and output; write nothing.

    Raises:
        ValueError, FileNotFoundError: something that the user said does not work; says what.
    """
    device = pick_device(place.device)
    data = datasets.load(settings.data, place.data_root)
    recipe = recipe_for(data, **settings.recipe)
    channels, *size = data.shape
    torch.manual_seed(derive(settings.seed, 0))
    model = models.build(settings.model, data.n_classes, channels, tuple(size))
    model = model.to(device, memory_format=torch.channels_last)
    layout = trace(
        model,
        (torch.zeros(2, *data.shape, device=device),),
        scope=settings.scope,
        min_channels=settings.min_channels,
        round_to=settings.round_to,
    )
    if settings.fidelity == "paper" and settings.budget.kind != "macs":
        raise ValueError("--fidelity paper counts multiply-adds: use --macs")
    train, _ = hold_out(data.train, settings.held_out, settings.seed)
    n_steps = max(1, len(train) // min(recipe.batch_size, len(train)))
    changes = {}
    if settings.controller_steps is not None:
        changes["controller_steps"] = settings.controller_steps
    schedule = SCHEDULES[settings.schedule](recipe.epochs, n_steps, **changes)
    checkpoints = Checkpoints(place.output / "checkpoints")
    state = _earlier(settings, place, recipe, checkpoints)
    budget = settings.budget
    if budget.timed and "finished" not in state:
        example = torch.zeros(latency_batch(data.shape), *data.shape, device=device)
        budget = replace(budget, example=(as_input(example),))
        if "run" in state:
            budget.load_state(state["run"]["budget"], layout)
        budget.prepare(model, layout)
    if "finished" not in state:
        budget.check(layout)
    return Job(settings, place, device, data, recipe, layout, schedule, checkpoints, state, budget)


def _earlier(
    settings: Settings, place: Place, recipe: Recipe, checkpoints: Checkpoints
) -> dict[str, Any]:
    """State to continue from, {} to start anew."""
    check_writable("--output", place.output)
    if place.overwrite:
        return {}
    if place.resume != "auto":
        if checkpoints.paths():
            raise ValueError(
                f"{place.output} holds an unfinished run: continue it with --resume auto, "
                "or start anew with --overwrite"
            )
        if (place.output / RESULT).exists():
            raise ValueError(
                f"{place.output} holds a finished run: choose another --output, or start anew "
                "with --overwrite"
            )
        return {}
    mine = fingerprint(settings, recipe)
    state = checkpoints.newest(lambda line: print(f"warning: {line}", file=sys.stderr))
    if state is not None:
        _check_same(mine, state.pop("fingerprint"), checkpoints.folder)
        return state
    try:
        finished = json.loads((place.output / RESULT).read_text())
    except (OSError, ValueError):
        return {}
    _check_same(json.loads(json.dumps(mine)), finished.get("settings", {}), place.output / RESULT)
    return {"finished": finished}


def _check_same(mine: dict[str, Any], other: dict[str, Any], where: Path) -> None:
    # What version 0.1 wrote has no round_to.
    other = {"round_to": 1, **other}
    for name in mine.keys() | other.keys():
        if mine.get(name) != other.get(name):
            raise ValueError(
                f"{where} was made with {name} = {other.get(name)}, now it is {mine.get(name)}; "
                "use the same options to continue, or --overwrite to start anew"
            )


def _remove_partial(output: Path) -> None:
    for path in output.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
