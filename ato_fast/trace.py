"""From a model to its `GroupLayout`, through `torch.export`'s graph of ATen operations.

The exported graphs (evaluation and training) are walked once each; `rules` says what each operation
does to channels, `labels.py` keeps the books, and `trial.py` tries the result on copies.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from .assemble import assemble, refuse
from .capture import TraceError, check_plain
from .groups import GroupLayout, check_widths
from .standin import StandIn
from .trial import Trial
from .walk import Walk

SCOPES = ("inner", "all")


def trace(
    model: nn.Module,
    example_inputs: tuple,
    scope: str = "inner",
    ignore: Sequence[str] = (),
    kwargs: dict | None = None,
    as_graph: bool = False,
    gates: Mapping[str, Sequence[tuple]] = MappingProxyType({}),
    min_channels: int = 1,
    round_to: int = 1,
) -> GroupLayout:
    """Find the zero-invariant groups of ``model``.

    Args:
        model: any module `torch.export` can capture; left as it is (mode, gradients, statistics).
        example_inputs: positional arguments of one forward call; the first dimension of the first
            tensor is the batch. They are run through copies of the model on the CPU, to check that
            every gate shrinks exactly.
        scope: ``"inner"``: channels that no residual add couples (ATO, CVPR 2024).
            ``"all"``: coupled channels too (OTO, NeurIPS 2021).
        ignore: names of modules or parameters whose output channels stay whole, as in
            ``model.named_modules()``; shell patterns such as ``"layer1.*"`` are understood. ATO's
            published gates leave the stem out: ``ignore=["conv1"]`` on torchvision's ResNets.
        kwargs: keyword arguments of the forward call.
        as_graph: offer also gates that only the exported graph can lose, where the model's Python
            hard-codes a size; the network is then shrunk by ``shrink(..., as_graph=True)``.
        gates: gates declared by hand, for operations the tracer does not know: name to a list of
            ``(tensor, dim)`` or ``(tensor, dim, role)`` that share one channel index, such as
            ``{"mid": [("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)]}``. The role defaults
            to ``row`` along dimension 0 and ``input`` along others; see `Slice`. They are checked
            like all others.
        min_channels: every mask chosen for the layout keeps at least so many channels of each gate.
        round_to: and a multiple of so many (8 suits tensor cores), or all channels of the gate.

    Returns:
        The layout; ``layout.unprunable`` lists every parameter left out, with the reason.

    Raises:
        TraceError: `torch.export` cannot capture the model, or it cannot be copied.
        TypeError, ValueError: bad arguments, or a declared gate that does not shrink exactly.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
    check_plain(model)
    if not isinstance(example_inputs, tuple | list):
        raise TypeError(
            f"example_inputs: expected a tuple of forward arguments such as (x,), "
            f"got {type(example_inputs).__name__}"
        )
    if isinstance(ignore, str) or not all(isinstance(x, str) for x in _listed(ignore)):
        raise TypeError(f"ignore: expected a list of names, got {ignore!r}")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise TypeError(f"kwargs: expected a dict, got {type(kwargs).__name__}")
    check_widths(min_channels, round_to)
    walk = Walk(model, tuple(example_inputs), dict(kwargs or {}), as_graph)
    walk.ignore(ignore)
    walk.declare(gates)
    with same_random_numbers():
        return _trace(walk, scope).tightened(min_channels, round_to)


def _trace(walk: Walk, scope: str) -> GroupLayout:
    walk.run(training=False)
    # A graph takes no other batch than it was made with.
    batch = None if walk.as_graph else walk.labels.batch
    dense = StandIn(walk.model, walk.args, walk.kwargs, batch)
    # Training may read channels that evaluation never shows: auxiliary heads, extra outputs.
    if dense.differs_in_training():
        try:
            walk.run(training=True)
        except TraceError as error:
            warnings.warn(
                f"training mode was not captured, gates are judged by evaluation alone: {error}",
                stacklevel=4,
            )
            reason = f"not used in evaluation, and training mode was not captured: {error}"
            walk.labels.reasons.update(dict.fromkeys(walk.unused(), reason))
    trial = Trial(dense)
    while True:
        layout = assemble(walk, scope)
        verdict = trial(layout)
        if verdict.clean:
            return layout
        for gate in verdict.refused:
            if gate.name in walk.declared:
                raise ValueError(
                    f"gates: {gate.name!r} does not shrink exactly: the shrunk model failed or "
                    "gave another output than the model with these channels zeroed"
                )
            refuse(walk, gate)
        for gate in layout:
            if gate.name in verdict.attributes:
                walk.attributes[tuple((s.tensor, s.dim) for s in gate.slices)] = verdict.attributes[
                    gate.name
                ]


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Put the generators of Python, NumPy and torch back."""
    before, numpy_before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


def _listed(names) -> Sequence:
    return names if isinstance(names, list | tuple | set | frozenset) else (None,)
