"""Channel labels: which channels of which tensors are the same channel.

Every index of every dimension of a parameter or buffer gets an *atom* (an integer) when it is first
used. A dimension of an activation carries an array of atoms, one per index, -1 where the index is
in no gate. Operations that line channels up (an add, a contraction, a depthwise convolution) *join*
atoms; operations that make a channel impossible to remove *block* them, with the reason in words.
The classes of joined, unblocked atoms become the groups.

Next to its atoms a labelled dimension carries *pins*: which parameters, set to zero at a channel,
make the activation zero there. Pins are what proves that a group is zero-invariant: where an
operation does not keep zero (a sigmoid), they are lost; where a consumer reads a channel whose
pins are lost, the channel is blocked.

A reshape that splits a dimension (channels into heads x head size) or merges two leaves open which
of the factors can be made smaller: that is a *fold*, and `assemble` chooses one of its axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

NO_PIN = -1
FIXED = "lined up with a size that is fixed"
# Where uses of a tensor disagree, the first of these that any use asks for.
_ROLE_ORDER = ("row", "affine", "stat", "input")


@dataclass(frozen=True)
class Value:
    """What is known of one activation: atoms and pins per dimension (None = no channels there).

    ``lost`` says in words why pins are missing; ``tensor`` names the parameter or buffer this value
    is, for values that are read straight from the model; ``data`` is whether it depends on the
    model's inputs.
    """

    shape: tuple[int, ...]
    atoms: tuple[np.ndarray | None, ...]
    pins: tuple[np.ndarray | None, ...]
    lost: str = ""
    tensor: str | None = None
    data: bool = False

    @staticmethod
    def plain(
        shape: Sequence[int], tensor: str | None = None, lost: str = "", data: bool = False
    ) -> Value:
        """A value without channels: an input, a constant."""
        nothing = (None,) * len(shape)
        return Value(tuple(shape), nothing, nothing, lost, tensor, data)

    def with_dim(
        self, dim: int, atoms: np.ndarray | None, pins: np.ndarray | None, lost: str = ""
    ) -> Value:
        """This value with other atoms and pins along ``dim``."""
        all_atoms, all_pins = list(self.atoms), list(self.pins)
        all_atoms[dim], all_pins[dim] = atoms, pins
        return replace(
            self, atoms=tuple(all_atoms), pins=tuple(all_pins), lost=lost or self.lost, tensor=None
        )

    @property
    def labelled(self) -> tuple[int, ...]:
        """Dimensions that carry channels."""
        return tuple(d for d, atoms in enumerate(self.atoms) if atoms is not None)

    def without_pins(self, reason: str) -> Value:
        """This value after an operation that does not keep zero."""
        pins = tuple(None if p is None else np.full_like(p, NO_PIN) for p in self.pins)
        return replace(self, pins=pins, lost=reason, tensor=None)

    def reshaped(self, shape: Sequence[int], dims: Sequence[int | None]) -> Value:
        """Dimensions picked from this value: ``dims[d]`` is the old dimension, None a new one."""
        return Value(
            tuple(shape),
            tuple(None if d is None else self.atoms[d] for d in dims),
            tuple(None if d is None else self.pins[d] for d in dims),
            self.lost,
            data=self.data,
        )


@dataclass(frozen=True, eq=False)
class Fold:
    """One dimension (``whole``) as a grid: element ``e`` lies at ``index[k][e]`` of axis ``k``.

    Only one axis can be made smaller; ``order`` lists them by preference, ``axes`` are their atoms.
    """

    whole: np.ndarray
    axes: tuple[np.ndarray, ...]
    index: tuple[np.ndarray, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Product:
    """Multiply-adds of one operation on the whole batch: ``coef`` times its labelled dimensions.

    They are given by name (``dims`` of a weight) or by their ``atoms``; ``out_per_channel`` as in
    `MacTerm`.
    """

    name: str
    coef: int
    dims: tuple[tuple[str, int], ...] = ()
    atoms: tuple[np.ndarray, ...] = ()
    out_per_channel: int = 1


@dataclass
class Labels:
    """Atoms, joins and blocks of one model; shared by all graphs traced from it.

    ``trainable`` names the tensors that are parameters; the rest are buffers. ``batch`` is the
    number of examples that were traced; multiply-adds are recorded while ``counting``;
    ``as_graph``: sizes that the model's Python hard-codes do not matter.
    """

    n_atoms: int = 0
    joins: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    residual: list[np.ndarray] = field(default_factory=list)
    blocked: list[tuple[np.ndarray, str]] = field(default_factory=list)
    consumed: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    attached: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    batch: int = 1
    as_graph: bool = False
    counting: bool = True
    pin_sets: list[frozenset[tuple[str, int]]] = field(default_factory=list)
    _pin_ids: dict[frozenset[tuple[str, int]], int] = field(default_factory=dict)

    def fresh(self, n: int) -> np.ndarray:
        """``n`` new atoms."""
        self.n_atoms += n
        return np.arange(self.n_atoms - n, self.n_atoms, dtype=np.int64)

    def materialise(self, value: Value) -> Value:
        """A parameter or buffer with its own atoms along every dimension longer than 1."""
        if value.tensor is None or value.labelled:
            return value
        result = value
        for d, n in enumerate(value.shape):
            if n < 2:
                continue
            key = (value.tensor, d)
            if key not in self.attached:
                self.attached[key] = self.fresh(n)
            pin = self.pin(frozenset([key])) if value.tensor in self.trainable else NO_PIN
            result = result.with_dim(d, self.attached[key], np.full(n, pin, dtype=np.int64))
        lost = "" if value.tensor in self.trainable else f"{value.tensor} is a buffer"
        return replace(result, tensor=value.tensor, lost=lost)

    def pin(self, tensors: frozenset[tuple[str, int]]) -> int:
        """Id of a set of (tensor, dim) pins."""
        if tensors not in self._pin_ids:
            self._pin_ids[tensors] = len(self.pin_sets)
            self.pin_sets.append(tensors)
        return self._pin_ids[tensors]

    def both_pins(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Pins of a sum: zero only where both terms are, so the union, or lost with either."""
        return self.all_pins(np.stack([a, b]))

    def all_pins(self, rows: np.ndarray) -> np.ndarray:
        """Pins of the sum of all rows of ``[k, n]``: `both_pins` over the first dimension."""
        if (rows == rows[:1]).all():
            return rows[0].copy()
        columns, inverse = np.unique(np.sort(rows, axis=0), axis=1, return_inverse=True)
        ids = []
        for column in columns.T:
            used = np.unique(column).tolist()
            sets = (self.pin_sets[p] for p in used if p != NO_PIN)
            ids.append(NO_PIN if NO_PIN in used else self.pin(frozenset().union(*sets)))
        return np.asarray(ids, dtype=np.int64)[inverse.reshape(-1)]

    def count(self, name: str, coef: int, atoms: Sequence[np.ndarray]) -> None:
        """Record the multiply-adds of a contraction over the whole batch."""
        if self.counting:
            self.products.append(Product(name, coef, atoms=tuple(atoms)))

    def count_weight(self, weight: Value, positions: int) -> None:
        """Record ``positions`` products with a whole weight, over the whole batch."""
        if self.counting:
            dims = tuple((weight.tensor, d) for d in range(len(weight.shape)))
            self.products.append(Product(weight.tensor, positions, dims, out_per_channel=positions))

    def own(self, pins: np.ndarray | None, role: str) -> None:
        """The parameters behind these pins produce channels: they belong to the group."""
        if pins is None:
            return
        for pin in np.unique(pins).tolist():
            for key in self.pin_sets[pin] if pin != NO_PIN else ():
                self.role(key, role)

    def role(self, key: tuple[str, int], role: str) -> None:
        """What a use of (tensor, dim) makes of it."""
        known = self.roles.get(key, role)
        self.roles[key] = min(known, role, key=_ROLE_ORDER.index)

    def block(self, atoms: np.ndarray | None, reason: str) -> None:
        """These channels can not be removed."""
        if atoms is not None and (atoms >= 0).any():
            self.blocked.append((atoms[atoms >= 0], reason))

    def block_value(self, value: Value, reason: str) -> None:
        """No channel of this value can be removed."""
        value = self.materialise(value)
        for atoms in value.atoms:
            self.block(atoms, reason)
        if value.tensor is not None:
            self.reasons.setdefault(value.tensor, reason)

    def join(
        self, a: np.ndarray | None, b: np.ndarray | None, reason: str = FIXED, residual=False
    ) -> None:
        """Index by index, ``a`` and ``b`` are the same channel; ``reason`` blocks mismatches."""
        if a is None or b is None:
            self.block(b if a is None else a, reason)
            return
        both = (a >= 0) & (b >= 0)
        self.block(a[~both], reason)
        self.block(b[~both], reason)
        differ = both & (a != b)
        if differ.any():
            self.joins.append((a[differ], b[differ]))
            if residual:
                self.residual.append(a[differ])

    def consume(self, atoms: np.ndarray, pins: np.ndarray, who: str, lost: str) -> None:
        """A contraction reads these channels: they must be zero when their group is."""
        live = atoms >= 0
        gone = live & (pins < 0)
        why = lost or "its producer is no parameter"
        self.block(atoms[gone], f"{who} reads a value that is not zero when the group is: {why}")
        self.consumed.append((atoms[live & ~gone], pins[live & ~gone]))

    def fold(self, whole: np.ndarray, sizes: Sequence[int], axes: dict[int, np.ndarray | None],
             order: Sequence[int] | None = None) -> None:  # fmt: skip
        """``whole`` is a grid of ``sizes``; ``axes[k]`` are the atoms along grid dimension k."""
        grid = np.indices(sizes).reshape(len(sizes), -1)
        named = [k for k, atoms in axes.items() if atoms is not None]
        order = [named.index(k) for k in (named if order is None else order) if k in named]
        self.folds.append(
            Fold(
                whole,
                tuple(axes[k] for k in named),
                tuple(grid[k] for k in named),
                tuple(order),
            )
        )

    def split(self, atoms: np.ndarray, pins: np.ndarray, sizes: Sequence[int],
              order: Sequence[int] | None = None) -> tuple[list, list]:  # fmt: skip
        """A dimension as a grid of ``sizes``: atoms and pins per grid dimension."""
        axes = {k: self.fresh(n) if n > 1 else None for k, n in enumerate(sizes)}
        self.fold(atoms, sizes, axes, order)
        grid = pins.reshape(tuple(sizes))
        all_pins = []
        for k, n in enumerate(sizes):
            rows = np.moveaxis(grid, k, -1).reshape(-1, n)
            all_pins.append(None if axes[k] is None else self.all_pins(rows))
        return list(axes.values()), all_pins

    def merge(self, atoms: Sequence[np.ndarray | None], pins: Sequence[np.ndarray | None],
              sizes: Sequence[int], order: Sequence[int] | None = None,
              ) -> tuple[np.ndarray | None, np.ndarray | None]:  # fmt: skip
        """A grid of dimensions as one, in row-major order: its atoms and pins."""
        marked = [k for k, a in enumerate(atoms) if a is not None]
        if not marked:
            return None, None
        shown = {}
        for k in marked:
            spread = [1] * len(sizes)
            spread[k] = -1
            shown[k] = (
                np.broadcast_to(atoms[k].reshape(spread), sizes).reshape(-1),
                np.broadcast_to(pins[k].reshape(spread), sizes).reshape(-1),
            )
        if len(marked) == 1:
            return shown[marked[0]]
        whole = self.fresh(int(np.prod(sizes)))
        self.fold(whole, sizes, {k: atoms[k] for k in marked}, order)
        # Whichever axis is chosen, its zero has to show: an axis that lost its pins is no choice
        # where another has them.
        stacked = np.stack([p for _, p in shown.values()])
        kept = (stacked >= 0).any(axis=0)
        for k in marked:
            gone = kept & (shown[k][1] < 0)
            self.block(shown[k][0][gone], "merged with channels that are zero on their own")
        rows = np.where(stacked >= 0, stacked, stacked.max(axis=0))
        return whole, self.all_pins(rows)

    def classes(self, more: Sequence[tuple[np.ndarray, np.ndarray]] = ()) -> np.ndarray:
        """Smallest atom of each atom's class, int64 ``[n_atoms]``, with ``more`` joins."""
        parent = np.arange(self.n_atoms, dtype=np.int64)
        joins = [*self.joins, *more]
        if not joins:
            return parent
        a = np.concatenate([x for x, _ in joins])
        b = np.concatenate([x for _, x in joins])
        while True:
            root_a, root_b = parent[a], parent[b]
            if np.array_equal(root_a, root_b):
                return parent
            low = np.minimum(root_a, root_b)
            np.minimum.at(parent, root_a, low)
            np.minimum.at(parent, root_b, low)
            while True:
                jumped = parent[parent]
                if np.array_equal(jumped, parent):
                    break
                parent = jumped
