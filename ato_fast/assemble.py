"""From labels to gates: classes of joined channels, and a reason for every one left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .groups import Gate, GroupLayout, Slice, Unprunable
from .labels import NO_PIN

if TYPE_CHECKING:
    from .trace import Walk


def assemble(walk: Walk, scope: str) -> GroupLayout:
    """The layout of a walked model; gates in forward order."""
    labels = walk.labels
    root = labels.classes()
    reason_of = np.full(labels.n_atoms, -1, dtype=np.int64)
    reasons: list[str] = []

    def forbid(atoms: np.ndarray, reason: str) -> None:
        roots = np.unique(root[atoms])
        free = roots[reason_of[roots] < 0]
        if len(free):
            reason_of[free] = len(reasons)
            reasons.append(reason)

    for tensor, reason in labels.blocked_tensors.items():
        for (name, _), (atoms, _) in labels.attached.items():
            if name == tensor:
                forbid(atoms[atoms >= 0], f"{tensor}: {reason}")
    for (name, _), (atoms, role) in labels.attached.items():
        if name in walk.ignored and role in ("row", "affine"):
            forbid(atoms[atoms >= 0], "left out by ignore=")
    for atoms, reason in labels.blocked:
        forbid(atoms, reason)
    is_residual = np.zeros(labels.n_atoms, dtype=bool)
    for atoms in labels.residual:
        is_residual[root[atoms]] = True
    if scope == "inner":
        forbid(
            np.flatnonzero(is_residual),
            "a residual add couples these channels (scope all offers them)",
        )
    read = np.zeros(labels.n_atoms, dtype=bool)
    for atoms, _ in labels.consumed:
        read[root[atoms]] = True
    forbid(np.flatnonzero(~read[root]), "nothing that could be made smaller reads these channels")

    members: dict[int, list[tuple[str, int]]] = {}
    for key, (atoms, _) in labels.attached.items():
        for r in np.unique(root[atoms[atoms >= 0]]).tolist():
            if reason_of[r] < 0:
                members.setdefault(r, []).append(key)
    by_signature: dict[tuple, list[int]] = {}
    for r in sorted(members):
        by_signature.setdefault(tuple(members[r]), []).append(r)
    for signature in [s for s, roots in by_signature.items() if len(roots) == 1]:
        forbid(np.asarray(by_signature.pop(signature)), "it has a single channel")

    gated: dict[int, set[tuple[str, int]]] = {}
    for atoms, pins in labels.consumed:
        pairs = np.unique(np.stack([root[atoms], pins]), axis=1)
        for r, pin in pairs.T.tolist():
            if pin != NO_PIN:
                gated.setdefault(r, set()).update(labels.pin_sets[pin])

    gates, offset, names = [], 0, set()
    for signature, roots in sorted(by_signature.items(), key=lambda item: item[1][0]):
        channel_of = np.full(labels.n_atoms, -1, dtype=np.int64)
        channel_of[roots] = np.arange(len(roots))
        slices = []
        for tensor, dim in signature:
            atoms, role = labels.attached[tensor, dim]
            channels = np.full(len(atoms), -1, dtype=np.int64)
            channels[atoms >= 0] = channel_of[root[atoms[atoms >= 0]]]
            on = role in ("row", "affine") and any((tensor, dim) in gated.get(r, ()) for r in roots)
            slices.append(Slice(tensor, dim, channels, role, on))
        name = base = signature[0][0].rpartition(".")[0] or signature[0][0]
        number = 2
        while name in names:
            name = f"{base}#{number}"
            number += 1
        names.add(name)
        residual = bool(is_residual[roots].any())
        gates.append(Gate(name, len(roots), tuple(slices), offset, residual))
        offset += len(roots)

    in_group = {s.tensor for gate in gates for s in gate.slices if s.role != "input"}
    left_out = []
    for name in walk.parameters:
        if name in in_group:
            continue
        left_out.append(Unprunable(name, _why(walk, name, root, reason_of, reasons)))
    shapes = {name: tuple(t.shape) for name, t in walk.model.state_dict().items()}
    for name, parameter in walk.model.named_parameters():
        shapes.setdefault(name, tuple(parameter.shape))
    return GroupLayout(
        gates=tuple(gates),
        unprunable=tuple(left_out),
        shapes=shapes,
        parameters=tuple(walk.parameters),
        mac_terms=tuple(walk.mac_terms),
        scope=scope,
        model_name=type(walk.model).__name__,
    )


def _why(walk: Walk, name: str, root: np.ndarray, reason_of: np.ndarray, reasons: list[str]) -> str:
    """The reason, in words, why no channel of a parameter is in a group."""
    labels = walk.labels
    if name in labels.blocked_tensors:
        return labels.blocked_tensors[name]
    if name not in walk.used:
        return "not used in the forward pass"
    for (tensor, _), (atoms, role) in labels.attached.items():
        if tensor != name or role == "input":
            continue
        found = reason_of[root[atoms[atoms >= 0]]]
        found = found[found >= 0]
        if len(found):
            return reasons[int(np.bincount(found).argmax())]
        return "its channels come from outside the model or from an operation without channels"
    return "no rule makes channels of it"
