"""Channel labels: which channels of which tensors are the same channel.

Every output channel of a convolution or linear layer gets an *atom* (an integer). A tensor
dimension carries an array of atoms, one per index, -1 where the index is in no gate. Operations
that line channels up (an add, a depthwise convolution) *join* atoms; operations that make a
channel impossible to remove *block* them, with the reason in words. The classes of joined,
unblocked atoms become the groups.

Next to its atoms a labelled dimension carries *pins*: which parameters, set to zero at a channel,
make the activation zero there. Pins are what proves that a group is zero-invariant: where an
operation does not keep zero (a sigmoid), they are lost; where a consumer reads a channel whose
pins are lost, the channel is blocked.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

NO_PIN = -1
COMPUTED = "read by a weight that is computed in the forward pass or is a buffer"


@dataclass(frozen=True)
class Value:
    """What is known of one activation: atoms and pins per dimension (None = no channels there).

    ``lost`` says in words why pins are missing; ``tensor`` names the parameter or buffer this value
    is, for values that are read straight from the model.
    """

    shape: tuple[int, ...]
    atoms: tuple[np.ndarray | None, ...]
    pins: tuple[np.ndarray | None, ...]
    lost: str = ""
    tensor: str | None = None

    @staticmethod
    def plain(shape: tuple[int, ...], tensor: str | None = None) -> Value:
        """A value without channels: an input, a constant, a parameter."""
        nothing = (None,) * len(shape)
        return Value(tuple(shape), nothing, nothing, tensor=tensor)

    @staticmethod
    def channels(
        shape: tuple[int, ...], dim: int, atoms: np.ndarray, pins: np.ndarray, lost: str = ""
    ) -> Value:
        """A value whose only channels lie along ``dim``."""
        value = Value.plain(shape)
        return value.with_dim(dim, atoms, pins, lost)

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

    def reshaped(self, shape: tuple[int, ...], dims: tuple[int | None, ...]) -> Value:
        """Dimensions picked from this value: ``dims[d]`` is the old dimension, None a new one."""
        return Value(
            tuple(shape),
            tuple(None if d is None else self.atoms[d] for d in dims),
            tuple(None if d is None else self.pins[d] for d in dims),
            self.lost,
        )


@dataclass
class Labels:
    """Atoms, joins and blocks of one model; shared by all graphs traced from it.

    ``trainable`` names the tensors that are parameters; the rest are buffers.
    """

    n_atoms: int = 0
    joins: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    residual: list[np.ndarray] = field(default_factory=list)
    blocked: list[tuple[np.ndarray, str]] = field(default_factory=list)
    consumed: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    attached: dict[tuple[str, int], tuple[np.ndarray, str]] = field(default_factory=dict)
    blocked_tensors: dict[str, str] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    pin_sets: list[frozenset[tuple[str, int]]] = field(default_factory=list)
    _pin_ids: dict[frozenset[tuple[str, int]], int] = field(default_factory=dict)

    def fresh(self, n: int) -> np.ndarray:
        """``n`` new atoms."""
        self.n_atoms += n
        return np.arange(self.n_atoms - n, self.n_atoms, dtype=np.int64)

    def pin(self, tensors: frozenset[tuple[str, int]]) -> int:
        """Id of a set of (tensor, dim) pins."""
        if tensors not in self._pin_ids:
            self._pin_ids[tensors] = len(self.pin_sets)
            self.pin_sets.append(tensors)
        return self._pin_ids[tensors]

    def both_pins(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Pins of a sum: zero only where both terms are, so the union, or lost with either."""
        pairs, inverse = np.unique(np.stack([a, b], axis=1), axis=0, return_inverse=True)
        ids = [
            NO_PIN if NO_PIN in (p, q) else self.pin(self.pin_sets[p] | self.pin_sets[q])
            for p, q in pairs.tolist()
        ]
        return np.asarray(ids, dtype=np.int64)[inverse.reshape(-1)]

    def block(self, atoms: np.ndarray | None, reason: str) -> None:
        """These channels can not be removed."""
        if atoms is not None and (atoms >= 0).any():
            self.blocked.append((atoms[atoms >= 0], reason))

    def block_value(self, value: Value, reason: str) -> None:
        """No channel of this value can be removed."""
        for atoms in value.atoms:
            self.block(atoms, reason)
        if value.tensor is not None:
            self.blocked_tensors.setdefault(value.tensor, reason)

    def join(self, a: np.ndarray, b: np.ndarray, reason: str, residual: bool = False) -> None:
        """Index by index, ``a`` and ``b`` are the same channel; ``reason`` blocks mismatches."""
        both = (a >= 0) & (b >= 0)
        self.block(a[(a >= 0) & ~both], reason)
        self.block(b[(b >= 0) & ~both], reason)
        differ = both & (a != b)
        if differ.any():
            self.joins.append((a[differ], b[differ]))
            if residual:
                self.residual.append(a[differ])

    def attach(self, tensor: str, dim: int, atoms: np.ndarray, role: str) -> None:
        """Entries of ``tensor`` along ``dim`` belong to these channels.

        A tensor used several times (weight sharing) joins the channels of all uses.
        """
        known = self.attached.get((tensor, dim))
        if known is None:
            self.attached[tensor, dim] = (atoms, role)
        elif known[1] != role:
            reason = f"{tensor} is shared by uses of different kinds"
            self.block(known[0], reason)
            self.block(atoms, reason)
        else:
            self.join(known[0], atoms, f"{tensor} is shared with a use whose channels are fixed")

    def weight(self, value: Value | None) -> str | None:
        """The parameter that a layer's weight or bias is; None if it is computed or a buffer."""
        return value.tensor if value is not None and value.tensor in self.trainable else None

    def rows(self, tensor: str, dim: int, n: int) -> np.ndarray:
        """Atoms of the channels that ``tensor`` produces; the same at every use of the tensor."""
        known = self.attached.get((tensor, dim))
        if known is not None and known[1] == "row":
            return known[0]
        atoms = self.fresh(n)
        self.attach(tensor, dim, atoms, "row")
        return atoms

    def consume(self, value: Value, dim: int, tensor: str | None, tensor_dim: int) -> None:
        """A weight reads channels along ``dim``: they must be zero when their group is.

        ``tensor`` None means that the consumer's weight is not a plain parameter.
        """
        atoms, pins = value.atoms[dim], value.pins[dim]
        if tensor is None:
            self.block(atoms, COMPUTED)
            return
        if atoms is None:
            atoms = np.full(value.shape[dim], -1, dtype=np.int64)
            pins = atoms
        self.attach(tensor, tensor_dim, atoms, "input")
        live = atoms >= 0
        lost = live & (pins < 0)
        self.block(
            atoms[lost],
            f"{tensor} reads a value that is not zero when the group is: {value.lost}",
        )
        self.consumed.append((atoms[live & ~lost], pins[live & ~lost]))

    def classes(self) -> np.ndarray:
        """Smallest atom of each atom's class, int64 ``[n_atoms]``."""
        parent = np.arange(self.n_atoms, dtype=np.int64)
        if not self.joins:
            return parent
        a = np.concatenate([x for x, _ in self.joins])
        b = np.concatenate([x for _, x in self.joins])
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
