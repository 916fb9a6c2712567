"""From labels to gates: classes of joined channels, and a reason for every one left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from .graph import Traced
from .groups import Gate, GroupLayout, MacTerm, Slice, Unprunable
from .labels import NO_PIN, Fold, Labels, Product
from .shrink import named_tensors

if TYPE_CHECKING:
    from .walk import Walk

RESIDUAL = "a residual add couples these channels (scope all offers them)"
UNREAD = "nothing that could be made smaller reads these channels"
OTHER_AXIS = "another axis of a reshape is made smaller instead"
HARD_CODED = (
    "the forward pass depends on this number of channels (hard-coded in a reshape, say): the "
    "shrunk model failed or gave another output; as_graph=True may take it"
)


class _Classes:
    """Classes of joined atoms, and the first reason to leave each alone."""

    def __init__(self, walk: Walk, scope: str, more: Sequence = ()) -> None:
        self.labels = labels = walk.labels
        self.root = labels.classes(more)
        self.reason_of = np.full(labels.n_atoms, -1, dtype=np.int64)
        self.reasons: list[str] = []
        self.choices: list[np.ndarray] = []
        for name, entries in walk.declared.items():
            for tensor, dim, _ in entries:
                atoms = labels.attached.get((tensor, dim))
                if atoms is not None:
                    self.forbid(atoms, f"declared by hand as gate {name!r}")
        for atoms, reason in labels.blocked:
            self.forbid(atoms, reason)
        self.residual = np.zeros(labels.n_atoms, dtype=bool)
        for atoms in labels.residual:
            self.residual[self.root[atoms]] = True
        if scope == "inner":
            self.forbid(np.flatnonzero(self.residual), RESIDUAL)
        for key, atoms in labels.attached.items():
            if key[0] in walk.ignored and role_of(labels, key) in ("row", "affine"):
                self.forbid(atoms, "left out by ignore=")

    def forbid(self, atoms: np.ndarray, reason: str) -> None:
        roots = np.unique(self.root[atoms])
        free = roots[self.reason_of[roots] < 0]
        if len(free):
            self.reason_of[free] = len(self.reasons)
            self.reasons.append(reason)

    def free(self, atoms: np.ndarray) -> np.ndarray:
        """Which of these atoms may go, bool."""
        return (atoms >= 0) & (self.reason_of[self.root[atoms]] < 0)


def role_of(labels: Labels, key: tuple[str, int]) -> str:
    """Role of (tensor, dim): what its uses made of it, else merely cut."""
    return labels.roles.get(key, "input" if key[0] in labels.trainable else "stat")


def _unfold(walk: Walk, scope: str) -> _Classes:
    """Choose one axis of every fold; the others stay whole.

    First where only one axis is free, since that may decide others; then by preference.
    """
    labels = walk.labels
    classes = _Classes(walk, scope)
    joins: list[tuple[np.ndarray, np.ndarray]] = []
    others: list[np.ndarray] = []
    left = list(labels.folds)

    def decide(fold: Fold, axis: int | None) -> None:
        for k, atoms in enumerate(fold.axes):
            if k != axis:
                others.append(atoms)
                classes.forbid(atoms[atoms >= 0], OTHER_AXIS)
        if axis is None:
            blocked = classes.reason_of[classes.root[fold.axes[fold.order[0]]]]
            blocked = blocked[blocked >= 0]
            reason = classes.reasons[blocked[0]] if len(blocked) else OTHER_AXIS
            classes.forbid(fold.whole[fold.whole >= 0], reason)
            dead.append((fold.whole, reason))
            return
        a, b = fold.whole, fold.axes[axis][fold.index[axis]]
        both = (a >= 0) & (b >= 0)
        joins.append((a[both], b[both]))
        fixed = [x[~both & (x >= 0)] for x in (a, b)]
        dead.extend((x, "reshaped together with channels that are fixed") for x in fixed if len(x))

    dead: list[tuple[np.ndarray, str]] = []
    choices: list[np.ndarray] = []
    while left:
        waiting = []
        for fold in left:
            free = [k for k in fold.order if classes.free(fold.axes[k]).any()]
            if len(free) < 2:
                decide(fold, free[0] if free else None)
            else:
                waiting.append((fold, free))
        if len(waiting) == len(left):
            fold, free = waiting.pop(0)
            # An axis that is free throughout, else the first that is free in part; in both cases
            # rather one that leaves several channels.
            axis = max(free, key=lambda k: (_several(classes, fold, k),
                                            classes.free(fold.axes[k]).all()))  # fmt: skip
            choices.append(fold.axes[axis])
            decide(fold, axis)
        left = [fold for fold, _ in waiting]
    classes = _Classes(walk, scope, joins)
    for atoms, reason in dead:
        classes.forbid(atoms[atoms >= 0], reason)
    for atoms in others:
        classes.forbid(atoms[atoms >= 0], OTHER_AXIS)
    classes.choices = choices
    return classes


def _several(classes: _Classes, fold: Fold, axis: int) -> bool:
    """Whether making ``axis`` of ``fold`` smaller leaves channels that are not all one."""
    roots, places = classes.root[fold.whole], fold.index[axis]
    reached = roots == roots[0]
    while True:
        more = np.isin(roots, roots[np.isin(places, places[reached])])
        if np.array_equal(more, reached):
            return not reached.all()
        reached = more


def assemble(walk: Walk, scope: str) -> GroupLayout:
    """The layout of a walked model; gates in forward order."""
    labels = walk.labels
    walk.classes = classes = _unfold(walk, scope)
    root = classes.root
    read = np.zeros(labels.n_atoms, dtype=bool)
    for atoms, _ in labels.consumed:
        read[root[atoms]] = True
    classes.forbid(np.flatnonzero(~read[root]), UNREAD)

    by_signature = _by_signature(labels, classes)
    for signature in [s for s, roots in by_signature.items() if len(roots) == 1]:
        classes.forbid(by_signature.pop(signature), "it has a single channel")

    gated: dict[tuple[str, int], list[np.ndarray]] = {}
    for atoms, pins in labels.consumed:
        for pin in np.unique(pins[pins != NO_PIN]).tolist():
            found = root[atoms[pins == pin]]
            for key in labels.pin_sets[pin]:
                gated.setdefault(key, []).append(found)

    gates, offset, names = [], 0, set()
    group_of = np.full(labels.n_atoms, -1, dtype=np.int64)
    for signature, roots in sorted(by_signature.items(), key=lambda item: item[1][0]):
        channel_of = np.full(labels.n_atoms, -1, dtype=np.int64)
        channel_of[roots] = np.arange(len(roots))
        group_of[roots] = np.arange(len(roots)) + offset
        slices = []
        for key in signature:
            channels = channel_of[root[labels.attached[key]]]
            role = role_of(labels, key)
            on = role in ("row", "affine") and any(
                (channel_of[found] >= 0).any() for found in gated.get(key, ())
            )
            slices.append(Slice(*key, channels, role, on))
        first = next((s.tensor for s in slices if s.in_group), slices[0].tensor)
        name = base = first.rpartition(".")[0] or first
        number = 2
        while name in names:
            name = f"{base}#{number}"
            number += 1
        names.add(name)
        residual = bool(classes.residual[roots].any())
        attributes = walk.attributes.get(signature, ())
        gates.append(Gate(name, len(roots), tuple(slices), offset, residual, attributes))
        offset += len(roots)

    for name, entries in walk.declared.items():
        n = walk.size(*entries[0][:2])
        affine = any(role == "affine" for *_, role in entries)
        slices = [
            Slice(t, d, np.arange(n), role, role == ("affine" if affine else "row"))
            for t, d, role in entries
        ]
        if name in names:
            raise ValueError(f"gates: {name!r} is a gate that was found too; choose another name")
        gates.append(Gate(name, n, tuple(slices), offset))
        offset += n

    in_group = {s.tensor for gate in gates for s in gate.slices if s.role != "input"}
    left_out = [
        Unprunable(name, _why(walk, name, classes))
        for name in walk.parameters
        if name not in in_group
    ]
    shapes = {name: tuple(t.shape) for name, t in named_tensors(walk.model)}
    group_of = group_of[root]
    return GroupLayout(
        gates=tuple(gates),
        unprunable=tuple(left_out),
        shapes=shapes,
        parameters=tuple(walk.parameters),
        mac_terms=tuple(_mac_terms(labels, gates, group_of)),
        scope=scope,
        model_name=type(walk.model).__name__,
        as_graph=walk.as_graph,
        followers={
            weight: name
            for weight, (name, *more) in walk.followers.items()
            if weight is not None and name is not None and not more
        },
        traced=Traced(walk.program, walk.values, walk.arguments, frozenset(walk.dead), group_of),
    )


def _by_signature(
    labels: Labels, classes: _Classes
) -> dict[tuple[tuple[str, int], ...], np.ndarray]:
    """Free classes that are in the same (tensor, dim)s, by those, ascending."""
    signatures: list[tuple[tuple[str, int], ...]] = [()]
    signature_of = np.zeros(labels.n_atoms, dtype=np.int64)
    for key, atoms in labels.attached.items():
        roots = np.unique(classes.root[atoms[classes.free(atoms)]])
        known, place = np.unique(signature_of[roots], return_inverse=True)
        signature_of[roots] = len(signatures) + place
        signatures += [(*signatures[k], key) for k in known.tolist()]
    return {
        signatures[k]: np.flatnonzero(signature_of == k)
        for k in np.unique(signature_of[signature_of > 0]).tolist()
    }


def refuse(walk: Walk, gate: Gate) -> None:
    """Never offer this gate again; where its channels come from a fold, another axis may serve."""
    labels = walk.labels
    atoms = np.concatenate([labels.attached[s.tensor, s.dim][s.channels >= 0] for s in gate.slices])
    mine = np.zeros(labels.n_atoms, dtype=bool)
    mine[walk.classes.root[atoms]] = True
    axes = [axis for axis in walk.classes.choices if mine[walk.classes.root[axis]].any()]
    for axis in axes or [atoms]:
        labels.block(axis, HARD_CODED)


def _mac_terms(labels: Labels, gates: list[Gate], group_of: np.ndarray) -> list[MacTerm]:
    """Multiply-adds as products of kept sizes of tensors."""
    known: dict[bytes, tuple[tuple[str, int], int]] = {}

    def shape_of(atoms: np.ndarray) -> tuple[bytes, int]:
        """How often each group occurs, up to a common factor, and that factor."""
        groups = np.where(atoms >= 0, group_of[atoms], -1)
        unique, counts = np.unique(groups, return_counts=True)
        factor = gcd(*counts.tolist())
        return unique.tobytes() + (counts // factor).tobytes(), factor

    for gate in gates:
        for part in gate.slices:
            key = (part.tensor, part.dim)
            if key not in labels.attached:
                continue
            signature, factor = shape_of(labels.attached[key])
            if factor < known.get(signature, (key, np.inf))[1]:
                known[signature] = (key, factor)

    def per_example(coef: int) -> int | float:
        return coef // labels.batch if coef % labels.batch == 0 else coef / labels.batch

    def parts(atoms: np.ndarray) -> list[np.ndarray]:
        """A dimension that no tensor mirrors, gate by gate."""
        if shape_of(atoms)[0] in known:
            return [atoms]
        groups = np.where(atoms >= 0, group_of[atoms], -1)
        gate = np.searchsorted([g.offset for g in gates], groups, side="right")
        return [atoms[gate == k] for k in np.unique(gate)]

    def terms(product: Product) -> Iterator[MacTerm]:
        if product.dims:
            positions = per_example(product.out_per_channel)
            yield MacTerm(product.name, per_example(product.coef), product.dims, positions)
            return
        for choice in itertools.product(*map(parts, product.atoms)):
            yield term(replace(product, atoms=choice))

    def term(product: Product) -> MacTerm:
        coef, dims = product.coef, []
        found = [(atoms, *shape_of(atoms)) for atoms in product.atoms]
        # Sizes that stay first, so that the others divide evenly.
        for atoms, signature, factor in sorted(found, key=lambda entry: entry[1] in known):
            key, per = known.get(signature, (None, 1))
            if key is None or (coef * factor) % per:
                coef *= len(atoms)
            else:
                coef = coef * factor // per
                dims.append(key)
        return MacTerm(product.name, per_example(coef), tuple(dims))

    return [term for product in labels.products for term in terms(product)]


def _why(walk: Walk, name: str, classes: _Classes) -> str:
    """The reason, in words, why no channel of a parameter is in a group."""
    labels = walk.labels
    if name in labels.reasons:
        return labels.reasons[name]
    if name not in walk.used:
        return "not used in the forward pass"
    keys = [key for key in labels.attached if key[0] == name]
    if not keys:
        return "it has no channels, or a single one"
    made = any(role_of(labels, key) != "input" for key in keys)
    if not made and walk.size(name, 0) == 1:
        return "it has a single channel"
    # What a layer produces says more than what it reads.
    keys.sort(key=lambda key: (role_of(labels, key) == "input", key[1]))
    for key in keys:
        found = classes.reason_of[classes.root[labels.attached[key]]]
        found = found[found >= 0]
        if len(found):
            return classes.reasons[int(np.bincount(found).argmax())]
    return "no operation makes channels of it"
