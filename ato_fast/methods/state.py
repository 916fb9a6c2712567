"""The state of a run as plain data, and a run continued from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..saved_state import check_groups
from .clock import Clock

if TYPE_CHECKING:
    from .ato import ATO

STATE_VERSION = 2


def state_of(run: ATO) -> dict:
    """See `ATO.state_dict`."""
    return _plain(
        {
            "version": STATE_VERSION,
            "layout": run.layout.sha256,
            "arguments": _arguments(run),
            "step": run._step,
            "mask": run.mask,
            "budget": run.budget.state(run.layout),
            "frozen": run.frozen,
            "projecting": run._projecting,
            "alive": run.live.alive,
            "due": run._pull.due,
            "cuts": run.cuts,
            "strength": run._strength,
            "threshold": run._threshold,
            "optimizer": run.optimizer.state_dict(),
            "search": run.search.state_dict(),
            "history": run.history,
            "seconds": {**run.seconds, "plain step": run._plain_step()},
        }
    )


def _arguments(run: ATO) -> dict:
    """What must agree for a run to be continued, as plain data."""
    return _plain(
        {
            **{f"schedule.{name}": value for name, value in run.schedule.state().items()},
            "budget": [run.budget.kind, run.budget.value],
            "fidelity": run.fidelity,
            "min_channels": run.layout.min_channels,
            "round_to": run.layout.round_to,
            "seed": run.seed,
            "optimizer": type(run.optimizer).__name__,
        }
    )


def restore(run: ATO, state: dict) -> None:
    """See `ATO.load_state_dict`."""
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        got = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state: expected an ATO run's, of version {STATE_VERSION}, got {got!r}")
    if state["layout"] != run.layout.sha256:
        raise ValueError(
            "state: it belongs to another layout: another model, width or scope; resume with "
            "the arguments the run was started with"
        )
    theirs, mine = state["arguments"], _arguments(run)
    for name in sorted(mine.keys() | theirs.keys()):
        if theirs.get(name) != mine.get(name):
            raise ValueError(
                f"state: its {name} is {theirs.get(name)}, this run's is {mine.get(name)}; "
                "resume with the arguments the run was started with"
            )
    check_groups(run.optimizer, state["optimizer"]["param_groups"])
    device = next(run.model.parameters()).device
    run.budget.load_state(state["budget"], run.layout)
    run.search.reprice()
    run.live.restore(state["alive"].to("cpu", torch.bool))
    if not bool(run.live.alive.all()):
        run.search.follow(run.live.network, run.live.layout, run.live.alive)
    run._pull.due = state["due"].to("cpu", torch.bool).clone()
    run.cuts = [dict(entry) for entry in state["cuts"]]
    run._step = int(state["step"])
    run.mask = state["mask"].to("cpu", torch.bool).clone()
    run.frozen = bool(state["frozen"])
    run._projecting = bool(state["projecting"])
    run._strength, run._threshold = (
        None if state[name] is None else state[name].to(device)
        for name in ("strength", "threshold")
    )
    run.optimizer.load_state_dict(state["optimizer"])
    run.search.load_state_dict(state["search"])
    run.history = [dict(entry) for entry in state["history"]]
    run._earlier = dict(state["seconds"])
    run._clock = Clock(device)
    if run._projecting:
        run._set_mask()


def _plain(value: Any) -> Any:
    """``value`` with tuples and mappings turned into lists and dicts, tensors copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
