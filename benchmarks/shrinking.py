"""Suite ``shrink``: what cutting costs, and how much faster a network is that was cut.

Rows ``cut``: milliseconds of `ato.shrink_` of the dense network with its optimizer's state, each
time on a fresh copy. Rows ``speed``: a training step (forward, backward, torch's fused AdamW) and a
forward pass of small networks over those of the dense one. All have at most 45 % of the MACs:
``drawn/R`` by `Budget.freeze` of random logits with widths in multiples of R, ``uniform/R`` with
the same share of every gate.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

import ato_fast as ato
from ato_fast import GroupLayout
from ato_fast.methods.equality import EQUALITY_LIMIT, reference_output, relative_error
from ato_fast.report import table as text_table

from . import timing, training
from .contenders import Red
from .training import Setting

DEFAULT_ROUNDS = {"cpu": 12, "cuda": 20}
CUT_ROUNDS = 4
OPTIMIZER = "adamw"
OURS = "ato.AdamW"
MASKS = {"drawn": training.drawn_mask, "uniform": training.uniform_mask}
GOAL_CASE = "resnet50"
GOAL_ROUND_TO = 8
GOAL_CUT_MS = 2000.0
"""On the CPU."""
GOALS = {"inner": {"step": 0.66, "inference": 0.58}, "all": {"step": 0.58, "inference": 0.58}}
"""Largest ratio small / dense at multiples of `GOAL_ROUND_TO`."""
WHATS = ("step", "inference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite, and those it shares with ``end2end``."""
    training.add_arguments(parser)
    group = parser.add_argument_group("shrink")
    group.add_argument("--round-to", type=training.at_least(1), nargs="+", metavar="N",
                       help="default: 1 8 16; 1 8 for the case tiny")  # fmt: skip
    group.add_argument("--choices", nargs="+", choices=MASKS, default=list(MASKS))


def run(options: argparse.Namespace, save: Callable[[dict], None]) -> dict[str, Any]:
    """Rows for every case, mode and scope; ``red`` lists what failed its check."""
    result: dict[str, Any] = {"rows": [], "red": [], "skipped": []}

    def block(setting: Setting, scope: str, where: dict) -> None:
        if not setting.compiled:
            result["rows"].append({**where, **_cut_row(setting, scope)})
            save(result)
        result["rows"].append({**where, **_speed_row(setting, scope, options)})

    for setting in training.settings(options):
        for scope in options.scopes:
            training.run_block(block, setting, scope, options, result)
            save(result)
    return result


def _cut_row(setting: Setting, scope: str) -> dict[str, Any]:
    """Times of cutting the dense network once, checked before; the size of images is no matter."""
    layout = setting.layout(scope, GOAL_ROUND_TO)
    mask = training.drawn_mask(layout)
    makers = {
        OURS: partial(training.ours, layout=layout, optimizer=OPTIMIZER),
        "torch.optim.AdamW": partial(training.torchs, optimizer=OPTIMIZER),
        "no optimizer": None,
    }
    samplers, errors, clock = {}, {}, setting.clock()
    for name, make in makers.items():
        errors[name] = _check_cut(setting, layout, mask, name, make)
        samplers[name] = partial(_cut, setting, layout, mask, make, clock)
    samples = timing.interleave(samplers, CUT_ROUNDS, warmup=1)
    asked = setting.name == GOAL_CASE and setting.device.type == "cpu"
    return {
        "kind": "cut", "round_to": GOAL_ROUND_TO, "rounds": CUT_ROUNDS,
        "goal_ms": GOAL_CUT_MS if asked else None,
        **training.shares_of(layout, mask), "check": errors,
        "contenders": {name: training.milliseconds(values) for name, values in samples.items()},
    }  # fmt: skip


def _fresh(setting: Setting, layout: GroupLayout, mask: Tensor, make: Callable | None) -> tuple:
    """A copy of the dense network with its dropped groups at zero, and its optimizer or None."""
    model = copy.deepcopy(setting.model)
    optimizer = make(model) if make else None
    ato.zero_(model, layout, mask)
    return model, optimizer


def _cut(
    setting: Setting,
    layout: GroupLayout,
    mask: Tensor,
    make: Callable | None,
    clock: Callable[[Callable[[], object]], float],
) -> float:
    model, optimizer = _fresh(setting, layout, mask, make)
    return clock(lambda: ato.shrink_(model, layout, mask, optimizer=optimizer))


def _check_cut(
    setting: Setting, layout: GroupLayout, mask: Tensor, name: str, make: Callable | None
) -> float:
    """Largest difference that a cut makes, relative to the largest output.

    Raises:
        Red: a difference beyond rounding, or state that is not of its parameter's size.
    """
    model, optimizer = _fresh(setting, layout, mask, make)
    expected = reference_output(model, setting.example)
    ato.shrink_(model, layout, mask, optimizer=optimizer)
    error = relative_error(expected, reference_output(model, setting.example))
    if not error <= EQUALITY_LIMIT:
        raise Red(f"{name}: cutting changed the network by {error:.1e} of its largest output")
    states = optimizer.state.items() if optimizer else ()
    for param, state in states:
        for key in ("exp_avg", "exp_avg_sq"):
            if state[key].shape != param.shape:
                raise Red(
                    f"{name}: {key} has shape {tuple(state[key].shape)} after the cut, its "
                    f"parameter {tuple(param.shape)}"
                )
    n_params = sum(p.numel() for p in model.parameters())
    if n_params != layout.params(mask):
        raise Red(f"{name}: expected {layout.params(mask)} parameters left, got {n_params}")
    return error


def _speed_row(setting: Setting, scope: str, options: argparse.Namespace) -> dict[str, Any]:
    """Training step and forward pass of every small network, over the dense one's."""
    networks, shares = {"dense": setting.model}, {}
    for multiple in options.round_to or ([1, 8] if setting.name == "tiny" else [1, 8, 16]):
        layout = setting.layout(scope, multiple)
        for choice in options.choices:
            mask = MASKS[choice](layout)
            name = f"{choice}/{multiple}"
            shares[name] = {"round_to": multiple, **training.shares_of(layout, mask)}
            networks[name] = ato.shrink(setting.model, layout, mask)
    calls: dict[str, dict[str, Callable[[], None]]] = {what: {} for what in WHATS}
    for name, network in networks.items():
        optimizer = training.torchs(network, OPTIMIZER)
        calls["step"][name] = setting.training_step(network, optimizer)
        calls["inference"][name] = setting.inference(network)
    samples = {}
    clock, warmup = setting.clock(), training.WARMUP[setting.device.type]
    for what, made in calls.items():
        for network in networks.values():
            network.train(what == "step")
        if setting.compiled:
            with timing.at_most(options.compile_seconds):
                for call in made.values():
                    call()
        samplers = {name: partial(clock, call) for name, call in made.items()}
        samples[what] = timing.interleave(samplers, options.rounds, warmup)
    setting.model.train()
    ratios = {what: training.over(samples[what], "dense") for what in WHATS}
    return {
        "kind": "speed", "optimizer": OPTIMIZER, "rounds": options.rounds,
        "goals": GOALS[scope] if setting.name == GOAL_CASE else None,
        "dense": {what: training.milliseconds(samples[what]["dense"]) for what in WHATS},
        "small": {
            name: {**entry, **{f"{what}_over_dense": ratios[what][name] for what in WHATS}}
            for name, entry in shares.items()
        },
    }  # fmt: skip


def table(result: dict[str, Any], masked: list[str] | None = None) -> str:
    """Milliseconds of a cut, and ratios small / dense with what is asked of them."""
    lines = []
    cuts = [row for row in result["rows"] if row["kind"] == "cut"]
    if cuts:
        body = [
            [f"{row['case']} {row['scope']}", name, f"{row['macs_frac']:.1%}",
             f"{entry['median_ms']:.0f} ({entry['p20_ms']:.0f} to {entry['p80_ms']:.0f})",
             f"{row['goal_ms']:.0f}" if row["goal_ms"] and name == OURS else "-"]
            for row in cuts for name, entry in row["contenders"].items()
        ]  # fmt: skip
        header = ["shrink_", "state of", "MACs left", "ms", "goal"]
        lines.append(text_table(header, body, left=2))
    body = []
    for row in result["rows"]:
        if row["kind"] != "speed":
            continue
        place = f"{row['case']} {row['batch']}x{row['pixels']}px {row['mode']} {row['scope']}"
        for name, entry in row["small"].items():
            asked = row["goals"] and entry["round_to"] == GOAL_ROUND_TO
            body.append([
                place, name, f"{entry['macs_frac']:.1%}", f"{entry['params_frac']:.1%}",
                *(text for what in WHATS for text in (
                    training.shown(entry[f"{what}_over_dense"]),
                    f"{row['goals'][what]:.2f}" if asked else "-",
                )),
            ])  # fmt: skip
    if body:
        header = ["small / dense", "mask", "MACs", "parameters",
                  "training step", "goal", "inference", "goal"]  # fmt: skip
        lines += ["", text_table(header, body, left=2)]
    return "\n".join([*lines, *training.left_out(result)])
