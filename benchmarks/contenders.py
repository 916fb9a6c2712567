"""Who takes part in a comparison of optimizer steps, and the check each passes before it is timed.

Every contender owns its parameters, gradients and state, so that caches treat all alike.

=================  ==========================================================================
ours               `ato_fast`'s optimizer with `Prox`; ``ours:NAME`` with that backend forced
fused              torch.optim with ``fused=True``, no projection
foreach, loop      torch.optim with ``foreach=True`` or ``False``, no projection
compile            ``torch.compile`` of torch.optim's ``foreach`` step, no projection
fused+per_layer    fused, then `baselines.GatherProjection`: what the published code does
loop+per_layer     loop, then the same
fused+scaled       fused, then `baselines.ScaleProjection`
copy               one copy between flat buffers of the bytes a step must move
=================  ==========================================================================

The copy is the ceiling on a GPU. On a CPU a step can beat it: what a copy writes is often read into
the cache first, while a step updates in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import ato_fast as ato
from ato_fast import backend

from . import baselines, timing
from .cases import Case, Values, bare_model, fill_groups, restore

HYPER = {
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2},
    "sgd": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-4},
}
TORCH = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
OURS = {"adamw": ato.AdamW, "sgd": ato.SGD}
FLAGS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
NAMES = ("fused", "foreach", "loop", "compile", "fused+per_layer", "loop+per_layer",
         "fused+scaled", "copy")  # fmt: skip

SHRINK = 1e-3
"""Norm all gates' channels lose together per step while timed; no group comes near zero."""
SHRINK_CHECK = 0.1
"""The same in the check, where the projection has to be seen next to the update."""
CHECK_STEPS = 3
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (10 * 2**-8, 1e-3)}
"""Relative and absolute. bf16: in three steps torch rounds a parameter six times and ours three, by
half a unit in the last place, and torch's state is bf16."""


class Red(RuntimeError):
    """A contender does not compute what the others compute: nothing may be timed."""


@dataclass
class Contender:
    """One way to make a step; ``step`` is what is timed."""

    name: str
    step: Callable[[], object]
    n_bytes: int
    """What a step must move at least, with this contender's state dtype."""
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    set_mask: Callable[[Tensor, float], None] | None = None
    """Keep mask and strength (lambda of the paper) of those that project; None: no projection."""
    prepare: Callable[[], None] = field(default=lambda: None)
    """Untimed, right before a sample."""
    not_capturable: str | None = None
    """Why a CUDA graph cannot hold it."""

    @property
    def projects(self) -> bool:
        """Whether it pulls dropped groups to zero."""
        return self.set_mask is not None

    def start(self, layout, values: Values, keep: Tensor, lam: float, zero: bool) -> None:
        """Write parameters, gradients and mask; with ``zero`` dropped groups are zero already."""
        if self.model is None:
            return
        restore(self.model, values)
        if self.set_mask is not None:
            self.set_mask(keep, lam)
        if not zero:
            return
        params = dict(self.model.named_parameters())

        def tensors(name: str) -> list[Tensor]:
            param = params[name]
            if not self.projects:
                return [param.grad]
            states = [s for s in self.optimizer.state[param].values() if s.shape == param.shape]
            return [param, param.grad, *states]

        fill_groups(layout, keep, tensors)


def bytes_per_step(n_params: int, optimizer: str, dtype: torch.dtype, state: torch.dtype) -> int:
    """Least traffic of a step: fp32 28 B per parameter for AdamW, 20 for SGD with momentum."""
    p, s = dtype.itemsize, state.itemsize
    return n_params * (3 * p + (4 if optimizer == "adamw" else 2) * s)


def shares(layout: ato.GroupLayout, keep: Tensor) -> Tensor:
    """The paper's n_l / N per group: its gate's share of all dropped groups, float32."""
    n_dropped = max(int((~keep).sum()), 1)
    share = torch.zeros(layout.n_groups)
    for gate in layout.gates:
        share[gate.span] = int((~keep[gate.span]).sum()) / n_dropped
    return share


def force(name: str) -> None:
    """Let backend ``name`` serve from here on."""
    os.environ[backend.VARIABLE] = name


def ours(
    name: str, serve: str, case: Case, start: Values, optimizer: str, dtype: torch.dtype
) -> Contender:
    """`ato_fast`'s optimizer, served by backend ``serve``."""
    model = bare_model(start)
    made = OURS[optimizer](model, case.layout, projection=ato.Prox(), **HYPER[optimizer])

    def set_mask(keep: Tensor, lam: float) -> None:
        made.set_mask(keep, lam * shares(case.layout, keep))

    return Contender(
        name,
        made.step,
        bytes_per_step(case.n_params, optimizer, dtype, torch.float32),
        model,
        made,
        set_mask,
        prepare=lambda: force(serve),
    )


def torchs(name: str, case: Case, start: Values, optimizer: str, dtype: torch.dtype) -> Contender:
    """One of torch.optim's, with a projection after ``+``."""
    update, _, projection = name.partition("+")
    flags = FLAGS.get(update, {"foreach": True})
    model = bare_model(start)
    params = dict(model.named_parameters())
    if update == "compile" and optimizer == "adamw" and next(iter(params.values())).is_cuda:
        flags = {**flags, "capturable": True}
    made = TORCH[optimizer](params.values(), **HYPER[optimizer], **flags)
    contender = Contender(
        name, made.step, bytes_per_step(case.n_params, optimizer, dtype, dtype), model, made
    )
    if update == "compile":
        contender.step = torch.compile(made.step)
    if projection:
        kind = {
            "per_layer": baselines.GatherProjection,
            "scaled": baselines.ScaleProjection,
        }[projection]
        layers = kind(params, case.layout)
        lr = HYPER[optimizer]["lr"]

        def step() -> None:
            made.step()
            layers.project(lr)

        contender.step, contender.set_mask = step, layers.set_mask
        if projection == "per_layer":
            contender.not_capturable = "boolean indexing waits for the device"
    return contender


def copy(case: Case, optimizer: str, dtype: torch.dtype, device: torch.device) -> Contender:
    """A flat copy that reads and writes, together, what a step of ours must move."""
    n_bytes = bytes_per_step(case.n_params, optimizer, dtype, torch.float32)
    source = torch.rand(max(n_bytes // 8, 1), device=device)
    target = torch.empty_like(source)
    return Contender("copy", lambda: target.copy_(source), n_bytes)


def build(
    case: Case,
    start: Values,
    optimizer: str,
    dtype: torch.dtype,
    device: torch.device,
    backends: list[str],
    names: tuple[str, ...] = NAMES,
) -> Iterator[Contender]:
    """The contenders one by one; the first is ``ours`` on the first of ``backends``."""
    for index, serve in enumerate(backends):
        yield ours(f"ours:{serve}" if index else "ours", serve, case, start, optimizer, dtype)
    for name in names:
        if name == "copy":
            yield copy(case, optimizer, dtype, device)
        else:
            yield torchs(name, case, start, optimizer, dtype)


def check(
    contenders: list[Contender],
    case: Case,
    start: Values,
    optimizer: str,
    dtype: torch.dtype,
    compile_seconds: float,
) -> tuple[dict[str, float], dict[str, str]]:
    """Run every contender for `CHECK_STEPS` steps and compare parameters.

    Without a mask all must equal ``fused``; with half of the groups dropped those that project must
    equal ``fused+per_layer``; these judges are made for the purpose if they do not take part.
    Everything has run at least once afterwards.

    Returns:
        The largest error per contender, as a share of what is allowed, and reasons for leaving one
        out (``compile`` only: the compiler failed or took too long).

    Raises:
        Red: a contender is off.
    """
    layout = case.layout
    everything = torch.ones(layout.n_groups, dtype=torch.bool)
    half = torch.arange(layout.n_groups) % 2 == 0
    lam = SHRINK_CHECK / HYPER[optimizer]["lr"]
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    present = [c for c in contenders if c.model is not None]
    for keep, judge_name, among in (
        (everything, "fused", present),
        (half, "fused+per_layer", [c for c in present if c.projects]),
    ):
        judge = next((c for c in among if c.name == judge_name), None)
        if judge is None:
            judge = torchs(judge_name, case, start, optimizer, dtype)
        _clear_state(judge)
        _run(judge, layout, start, keep, lam)
        for contender in among:
            if contender is judge:
                continue
            _clear_state(contender)
            try:
                with timing.at_most(compile_seconds if contender.name == "compile" else 600):
                    _run(contender, layout, start, keep, lam)
                error = _error(contender.model, judge.model, dtype)
                if not error <= 1:
                    raise Red(
                        f"{contender.name} differs from {judge.name} after {CHECK_STEPS} steps by "
                        f"{error:.3g} times what is allowed"
                    )
            except Exception as failure:
                if contender.name != "compile":
                    raise
                left_out[contender.name] = reason_of(failure)
                continue
            errors[contender.name] = max(errors.get(contender.name, 0.0), error)
    for contender in contenders:
        if contender.name == "copy":
            contender.step()
    return errors, left_out


def _clear_state(contender: Contender) -> None:
    """State as before the first step, in place where it exists."""
    for entry in contender.optimizer.state.values():
        for value in entry.values():
            if isinstance(value, Tensor):
                value.zero_()


def _run(contender: Contender, layout, start: Values, keep: Tensor, lam: float) -> None:
    contender.start(layout, start, keep, lam, zero=False)
    contender.prepare()
    for _ in range(CHECK_STEPS):
        contender.step()


def _error(got: nn.Module, expected: nn.Module, dtype: torch.dtype) -> float:
    """Largest ``|got - expected| / (rtol * |expected| + atol)``; NaN if anything is NaN."""
    rtol, atol = TOLERANCE[dtype]
    other = dict(expected.named_parameters())
    worst = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for name, param in got.named_parameters():
            want = other[name].double()
            if not want.numel():
                continue
            excess = (param.double() - want).abs_().div_(want.abs_().mul_(rtol).add_(atol)).max()
            worst = torch.maximum(worst, excess.cpu())
    return float(worst)


def reason_of(failure: BaseException) -> str:
    """One line on what went wrong, with the kind of error unless it is a `Red`."""
    text = " ".join(str(failure).split("\n")[:2]).strip()[:300] or "no message"
    return text if isinstance(failure, Red) else f"{type(failure).__name__}: {text}"
