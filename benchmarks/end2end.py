"""Suite ``end2end``: the wall-clock of a whole run over that of training the dense network.

A step is timed at a few sizes of the network, and so are controller steps, new masks and cuts, all
interleaved with the dense network's step under torch's fused optimizer; `integral` adds them up
over a schedule. Row ``real``: the same for a short run of a small network, which is then also run
as a whole, step by step in turn with the dense one.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ato_fast as ato
from ato_fast import GroupLayout, Schedule
from ato_fast.methods.equality import reference_output, relative_error
from ato_fast.methods.live import Live, stage_mask
from ato_fast.methods.search import Search
from ato_fast.report import table as text_table

from . import timing, training
from .contenders import HYPER, OURS, Red
from .integral import Costs, integrate
from .training import MACS, Setting

DEFAULT_ROUNDS = {"cpu": 12, "cuda": 20}
CUT_ROUNDS = 3
ROUND_TO = 8
STEPS_PER_EPOCH = 5004
"""ImageNet's in batches of 256."""

SCHEDULES: dict[str, tuple[Callable[[int], Schedule], str, float | None]] = {
    "Schedule.paper(245)": (partial(Schedule.paper, 245), "inner", 0.82),
    "Schedule(90)": (partial(Schedule, 90), "inner", None),
    "Schedule.fast(90)": (partial(Schedule.fast, 90), "all", 0.65),
}
"""Schedule by steps per epoch, scope, and the largest ratio asked for of ResNet-50's run."""

REAL_EPOCHS = 8

PULL = 1e-6
"""Share of its norm that a dropped group loses per step while timed; none comes near zero."""

ASSUMES = (
    "loading data, evaluation and making the run (tracing) cost nothing on either side",
    "the controller's mask is that of the freeze as soon as the projection starts",
    "logits are random numbers (row real: those of the run)",
    "between the sizes measured, costs are linear in MACs",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite; ``--batch``, ``--pixels`` and ``--scopes`` are those of ``shrink``."""
    group = parser.add_argument_group("end2end")
    group.add_argument("--stages", type=training.at_least(0), default=2, metavar="N",
                       help="sizes measured between dense and small (default: 2)")  # fmt: skip
    group.add_argument("--run-optimizer", choices=["adamw", "sgd"], default="sgd")
    group.add_argument("--real-steps", type=training.at_least(0), default=20, metavar="N",
                       help="steps per epoch of the real run (default: 20; 0: none)")  # fmt: skip


def run(options: argparse.Namespace, save: Callable[[dict], None]) -> dict[str, Any]:
    """A row of measured costs per scope, one per schedule, and one for the real run."""
    result: dict[str, Any] = {"rows": [], "red": [], "skipped": [], "assumes": list(ASSUMES)}
    per_epoch = 20 if options.quick else STEPS_PER_EPOCH

    def block(setting: Setting, scope: str, where: dict) -> None:
        where = {**where, "optimizer": options.run_optimizer}
        layout = setting.layout(scope, ROUND_TO)
        logits = training.drawn_logits(layout)
        sizes = Sizes(layout, ato.Budget(macs=MACS).freeze(layout, logits), logits)
        shares = np.linspace(0, 1, options.stages + 2)
        costs, row = measure(setting, sizes, shares, options)
        result["rows"].append({"kind": "costs", **where, **row})
        save(result)
        for name, (make, its_scope, goal) in SCHEDULES.items():
            if its_scope == scope:
                schedule = make(per_epoch)
                result["rows"].append({
                    "kind": "run", **where, "schedule": name, "steps_per_epoch": per_epoch,
                    "goal": goal if setting.name == "resnet50" else None,
                    **integrate(schedule, costs, sizes.macs_at),
                })  # fmt: skip

    def real(setting: Setting, scope: str, where: dict) -> None:
        where = {**where, "optimizer": options.run_optimizer}
        result["rows"].append({"kind": "real", **where, **real_row(setting, scope, options)})

    for setting in training.settings(options):
        for scope in options.scopes:
            training.run_block(block, setting, scope, options, result)
            save(result)
    if options.real_steps:
        setting = small_setting(torch.device(options.device), options.quick)
        training.run_block(real, setting, "inner", options, result)
    return result


class Sizes:
    """The networks a run goes through: dense, stages, small.

    Args:
        layout: of the dense network.
        final: bool ``[n_groups]``, what the small network keeps.
        logits: ``[n_groups]``; the least wanted groups go first.
    """

    def __init__(self, layout: GroupLayout, final: Tensor, logits: Tensor) -> None:
        self.layout, self.final, self.logits = layout, final, logits

    def mask(self, progress: float) -> Tensor:
        """What is left once a share of the way to the small network is gone."""
        return stage_mask(self.layout, self.final, self.logits, progress)

    def macs_at(self, progress: float) -> float:
        """Share of the MACs that is left then."""
        return self.layout.macs(self.mask(progress)) / self.layout.macs()


class Trainee:
    """Our side of a run at one size: network, optimizer with mask, and search."""

    def __init__(self, setting: Setting, sizes: Sizes, progress: float, optimizer: str) -> None:
        model = copy.deepcopy(setting.model)
        self.setting, self.sizes = setting, sizes
        self.optimizer = training.ours(model, sizes.layout, optimizer)
        self.search = Search(model, sizes.layout, ato.Budget(macs=MACS))
        self.live = Live(model, sizes.layout, self.optimizer, None)
        self.live.restore(sizes.mask(progress))
        self._follow()
        norms = self.optimizer.group_norms()
        self.optimizer.set_mask(self.live.of(sizes.final), threshold=PULL * norms)
        self.step = setting.training_step(model, self.optimizer)

    def _follow(self) -> None:
        self.search.follow(self.live.network, self.live.layout, self.live.alive)

    def controller_step(self) -> None:
        """A step of the search."""
        self.search.step([self.setting.data], self.setting.loss, 1e-3)

    def redraw(self) -> None:
        """A new mask, with what the next cut is to take."""
        self.search.draw()
        stage_mask(self.sizes.layout, self.search.frozen_mask(), self.search.kept_logits(), 0.5)

    def cut(self, progress: float) -> None:
        """Cut down to a share of the way, as a run does once the groups in question are due."""
        mask = self.sizes.mask(progress)
        self.live.zero(self.live.of(~mask))
        if self.live.cut(mask, self.setting.example) is not None:
            self._follow()

    def finish(self) -> None:
        """What the end of a run does with a network that is cut already."""
        network, layout = self.live.network, self.live.layout
        small = ato.shrink(network, layout, torch.ones(layout.n_groups, dtype=torch.bool))
        relative_error(*(reference_output(m, self.setting.example) for m in (network, small)))

    def check(self) -> None:
        """Raise Red if a group that was to be pulled at reached zero, and so became cheaper."""
        n_zero = int(self.optimizer.n_zero())
        if n_zero:
            raise Red(f"expected no group at zero after the timing, got {n_zero}")


def measure(
    setting: Setting, sizes: Sizes, progress: np.ndarray, options: argparse.Namespace
) -> tuple[Costs, dict[str, Any]]:
    """Costs at each of the sizes in ``progress`` (from 0 to 1), and the row that says them.

    Raises:
        Red: a dropped group reached zero.
        TimeoutError: the compiler took too long.
    """
    optimizer, clock = options.run_optimizer, setting.clock()
    dense, plain = copy.deepcopy(setting.model), copy.deepcopy(setting.model)
    trainees = [Trainee(setting, sizes, share, optimizer) for share in progress]
    calls = {
        "dense": setting.training_step(dense, training.torchs(dense, optimizer)),
        "plain": setting.training_step(plain, training.ours(plain, sizes.layout, optimizer)),
    }
    for i, trainee in enumerate(trainees):
        calls[f"step {i}"] = trainee.step
        calls[f"controller {i}"] = trainee.controller_step
    calls["redraw"] = trainees[0].redraw
    compile_ms = {}
    if setting.compiled:
        with timing.at_most(options.compile_seconds):
            for name, call in calls.items():
                compile_ms[name] = timing.HostClock()(call)
    samples = timing.interleave(
        {name: partial(clock, call) for name, call in calls.items()},
        options.rounds,
        training.WARMUP[setting.device.type],
    )
    for trainee in trainees:
        trainee.check()
    del trainees, dense, plain, calls
    cuts = _cuts(setting, sizes, progress, optimizer)
    dense_ms = timing.spread(samples["dense"])["median"]
    ratios = {
        name: np.array(values) / np.array(samples["dense"]) for name, values in samples.items()
    }
    # A network that was cut is compiled anew.
    first_ms = [compile_ms.get(f"step {i}", 0.0) for i in range(1, len(progress))]
    recompile_ms = float(np.median(first_ms))
    costs = Costs(
        macs=np.array([sizes.macs_at(share) for share in progress]),
        plain=ratios["plain"],
        projecting=np.stack([ratios[f"step {i}"] for i in range(len(progress))]),
        controller=np.stack([ratios[f"controller {i}"] for i in range(len(progress))]),
        redraw=float(np.median(ratios["redraw"])),
        cut=(np.array(cuts["cut"]) + recompile_ms) / dense_ms,
        idle_cut=cuts["idle"] / dense_ms,
        finish=cuts["finish"] / dense_ms,
    )
    over = training.over(samples, "dense")
    return costs, {
        "rounds": options.rounds, "round_to": sizes.layout.round_to,
        "dense": training.milliseconds(samples["dense"]), "plain_over_dense": over["plain"],
        "sizes": [
            {"progress": float(share), "macs_frac": float(macs),
             "step_over_dense": over[f"step {i}"], "controller_over_dense": over[f"controller {i}"]}
            for i, (share, macs) in enumerate(zip(progress, costs.macs, strict=True))
        ],
        "redraw_over_dense": over["redraw"], "cut_ms": cuts, "recompile_ms": recompile_ms,
    }  # fmt: skip


def _cuts(setting: Setting, sizes: Sizes, progress: np.ndarray, optimizer: str) -> dict[str, Any]:
    """Milliseconds (medians): ``cut`` from each size to the next, ``idle``, and ``finish``."""
    clock, last = setting.clock(), len(progress) - 1
    small = Trainee(setting, sizes, 1.0, optimizer)

    def cut(i: int) -> float:
        trainee = Trainee(setting, sizes, progress[i], optimizer)
        return clock(lambda: trainee.cut(progress[i + 1]))

    samplers: dict[Any, Callable[[], float]] = {i: partial(cut, i) for i in range(last)}
    samplers["idle"] = lambda: clock(lambda: small.cut(1.0))
    samplers["finish"] = lambda: clock(small.finish)
    samples = timing.interleave(samplers, CUT_ROUNDS, warmup=0)
    medians = {key: timing.spread(values)["median"] for key, values in samples.items()}
    return {"cut": [medians.pop(i) for i in range(last)], **medians}


def small_setting(device: torch.device, quick: bool) -> Setting:
    """A network of CIFAR on small images, for a run that is over in seconds."""
    if quick:
        return Setting("cifar:resnet20", device, 4, 8)
    return Setting("cifar:resnet18", device, *((8, 16) if device.type == "cpu" else (128, 32)))


def real_row(setting: Setting, scope: str, options: argparse.Namespace) -> dict[str, Any]:
    """A run measured as a whole, and the integral for the same schedule, mask and logits."""
    layout = setting.layout(scope, ROUND_TO)
    schedule = Schedule(
        REAL_EPOCHS, options.real_steps, freeze=0.3, zero_by=0.4, controller_steps=40
    )
    real, sizes = _real_run(setting, layout, schedule, options.run_optimizer)
    shares = np.linspace(0, 1, options.stages + 2)
    costs, row = measure(setting, sizes, shares, options)
    summed = integrate(schedule, costs, sizes.macs_at)
    return {
        "schedule": schedule.state(), "real": real, "integral": summed, "costs": row,
        "integral_over_real": summed["ratio"]["median"] / real["ratio"],
    }  # fmt: skip


def _real_run(
    setting: Setting, layout: GroupLayout, schedule: Schedule, optimizer: str
) -> tuple[dict[str, Any], Sizes]:
    """A run to its end, a dense step after or before each of its own, and the sizes it had."""
    run = ato.ATO(
        copy.deepcopy(setting.model),
        setting.example,
        optimizer=partial(OURS[optimizer], **HYPER[optimizer]),
        budget=ato.Budget(macs=MACS),
        schedule=schedule,
        controller_data=[setting.data],
        controller_loss=setting.loss,
        layout=layout,
    )
    dense = copy.deepcopy(setting.model)

    def own() -> None:
        setting.loss(run.model, setting.data).backward()
        run.step()
        run.zero_grad()

    samplers = {
        "run": own,
        "dense": setting.training_step(dense, training.torchs(dense, optimizer)),
    }
    clock, milliseconds, macs = setting.clock(), {"run": 0.0, "dense": 0.0}, 0
    for step in range(schedule.steps.end):
        if step == schedule.steps.freeze:
            logits = run.search.kept_logits().cpu()
        for name in timing.order(list(samplers), step):
            milliseconds[name] += clock(samplers[name])
        macs += run.live.layout.macs()
    milliseconds["run"] += clock(run.finish)
    return {
        "run_s": milliseconds["run"] / 1e3,
        "dense_s": milliseconds["dense"] / 1e3,
        "ratio": milliseconds["run"] / milliseconds["dense"],
        "mean_macs_frac": macs / schedule.steps.end / layout.macs(),
        "cuts": sum(bool(cut["groups"]) for cut in run.cuts),
        "shares": {name: 1e3 * s / milliseconds["run"] for name, s in run.seconds.items()},
    }, Sizes(layout, run.mask, logits)


def table(result: dict[str, Any], masked: list[str] | None = None) -> str:
    """Every run's stretches and other parts with their share of it, and its sum."""
    lines: list[str] = []
    for row in result["rows"]:
        place = f"{row['case']} {row['batch']}x{row['pixels']}px {row['mode']}, {row['optimizer']}"
        if row["kind"] == "run":
            goal = f", goal {row['goal']:.2f}" if row["goal"] else ""
            lines += [
                "", f"{row['schedule']}, scope {row['scope']}: {training.shown(row['ratio'])} of "
                f"dense training{goal}", f"({place})", _parts(row),
            ]  # fmt: skip
        elif row["kind"] == "real":
            real, summed = row["real"], row["integral"]
            lines += [
                "", f"a real run of {summed['steps']} steps, {place}: {real['ratio']:.3f} of dense "
                f"training; the integral says {training.shown(summed['ratio'])}; MACs of the mean "
                f"step {real['mean_macs_frac']:.1%} and {summed['mean_macs_frac']:.1%}",
                _parts(summed),
            ]  # fmt: skip
    if lines:
        lines += ["", "* costs interpolated in MACs; taken for granted:"]
        lines += [f"  {assumed}" for assumed in result["assumes"]]
    return "\n".join([*lines[1:], *training.left_out(result)])


def _parts(summed: dict[str, Any]) -> str:
    body = []
    for part in summed["stretches"]:
        name = "projecting" if part["projecting"] else "no mask"
        body.append([
            name + "*" * part["interpolated"], f"{part['last'] - part['first']:,}",
            f"{part['macs_frac']:.1%}", training.shown(part["step_over_dense"]),
            f"{part['share']['median']:.1%}",
        ])  # fmt: skip
    controller, cutting = summed["controller"], summed["cutting"]
    body += [
        ["controller", f"{controller['steps']:,}", "",
         training.shown(controller["step_over_dense"]), f"{controller['share']['median']:.1%}"],
        ["cuts", f"{cutting['cuts']}", "", "", f"{cutting['share']['median']:.2%}"],
        ["new masks", f"{summed['redrawing']['masks']}", "", "",
         f"{summed['redrawing']['share']['median']:.2%}"],
    ]  # fmt: skip
    return text_table(["part", "times", "MACs", "of a dense step", "of the run"], body)
