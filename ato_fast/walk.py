"""Propagation of channel labels through the exported graphs of a model."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from . import rules
from .capture import capture
from .graph import values_of
from .groups import ROLES
from .labels import Labels, Value
from .probe import tensors
from .shrink import named_tensors

# Operations that run a graph within the graph, and leave what it computes as it is.
REGIONS = frozenset(
    {"higher_order::wrap_with_autocast", "higher_order::wrap_with_set_grad_enabled"}
)

LAYERS = frozenset({"batch_norm", "conv1d", "conv2d", "conv3d"})
"""Operations whose followers are noted; their second argument is their weight."""


@dataclass
class Walk:
    """Propagation over one or two graphs of the same model."""

    model: nn.Module
    args: tuple
    kwargs: dict
    as_graph: bool = False
    labels: Labels = field(default_factory=Labels)
    used: set[str] = field(default_factory=set)
    same: dict[torch.fx.Node, torch.fx.Node] = field(default_factory=dict)
    names: dict[torch.fx.Node, list[torch.fx.Node]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    attributes: dict[tuple, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    declared: dict[str, list[tuple[str, int, str]]] = field(default_factory=dict)
    classes: object = None
    program: torch.export.ExportedProgram | None = None
    values: dict[str, object] = field(default_factory=dict)
    arguments: dict[str, tuple] = field(default_factory=dict)
    keys: dict[torch.fx.Node, str] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    followers: dict[str, set[str | None]] = field(default_factory=dict)
    """By the weight of a convolution or norm: what alone reads its outputs (`_follower`)."""

    def __post_init__(self) -> None:
        first: dict[int, str] = {}
        self.canonical: dict[str, str] = {}
        for name, tensor in named_tensors(self.model):
            self.canonical[name] = first.setdefault(id(tensor), name)
        own = dict(self.model.named_parameters(remove_duplicate=False))
        self.parameters = [n for n, c in self.canonical.items() if n == c and n in own]
        self.labels.as_graph = self.as_graph
        self.labels.trainable = frozenset(self.parameters)
        inputs = [x for x in tensors((self.args, self.kwargs)) if x.dim()]
        # The first with more than a batch, so that a vector of time steps may come before it.
        inputs.sort(key=lambda x: x.dim() < 2)
        self.labels.batch = inputs[0].shape[0] if inputs else 1

    def ignore(self, patterns: Sequence[str]) -> None:
        """Keep the channels that modules or parameters of these names produce."""
        for pattern in patterns:
            found = [
                name
                for name in self.parameters
                if any(fnmatch.fnmatchcase(prefix, pattern) for prefix in _prefixes(name))
            ]
            if not found:
                raise ValueError(f"ignore: no module or parameter is called {pattern!r}")
            self.ignored.update(found)

    def declare(self, gates: Mapping[str, Sequence[tuple]]) -> None:
        """Take over gates declared by hand."""
        if not isinstance(gates, Mapping):
            raise TypeError(f"gates: expected a dict of name to slices, got {gates!r}")
        known = dict(named_tensors(self.model))
        taken: dict[tuple[str, int], str] = {}
        for name, slices in gates.items():
            entries, sizes = [], set()
            for entry in slices:
                if not isinstance(entry, tuple | list) or len(entry) not in (2, 3):
                    raise TypeError(
                        f"gates: expected (tensor, dim) or (tensor, dim, role) in {name!r}, "
                        f"got {entry!r}"
                    )
                tensor, dim, role = (*entry, "row" if entry[1] == 0 else "input")[:3]
                if tensor not in known:
                    raise ValueError(f"gates: {name!r} names {tensor!r}, which the model lacks")
                if not isinstance(dim, int) or not 0 <= dim < known[tensor].dim():
                    raise ValueError(
                        f"gates: {name!r}, {tensor}: expected a dimension of "
                        f"{tuple(known[tensor].shape)}, got {dim!r}"
                    )
                if role not in ROLES:
                    raise ValueError(f"gates: {name!r}: expected a role of {ROLES}, got {role!r}")
                if taken.setdefault((tensor, dim), name) != name:
                    raise ValueError(
                        f"gates: {tensor} dim {dim} is in {taken[tensor, dim]!r} and in {name!r}"
                    )
                sizes.add(known[tensor].shape[dim])
                entries.append((tensor, dim, role))
            if len(sizes) != 1 or min(sizes) < 2:
                raise ValueError(
                    f"gates: {name!r}: expected slices of one common size above 1, "
                    f"got {sorted(sizes)}"
                )
            if all(role in ("stat", "input") for *_, role in entries):
                raise ValueError(f"gates: {name!r}: no slice produces its channels (role row)")
            self.declared[name] = entries

    def size(self, tensor: str, dim: int) -> int:
        """Entries of a tensor along a dimension."""
        return dict(named_tensors(self.model))[tensor].shape[dim]

    def unused(self) -> list[str]:
        """Parameters that no graph walked so far reads."""
        return [name for name in self.parameters if name not in self.used]

    def run(self, training: bool) -> None:
        """Capture the model in one mode and propagate labels through its graph."""
        program = capture(self.model, self.args, self.kwargs, training)
        signature = program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        given = set(signature.user_inputs)
        outputs = set(signature.user_outputs)
        self.labels.counting = not training
        self.keys.clear()
        values: dict[torch.fx.Node, object] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                name = stored.get(node.name)
                name = self.canonical.get(name, name)
                if name is not None and node.users:
                    self.used.add(name)
                values[node] = _plain(node.meta.get("val"), name, node.name in given)
        for source in self.propagate(program.graph_module, values):
            if source.name in outputs:
                for value in _flat(values[source]):
                    self.labels.block_value(value, "reaches the model output")
        if not training:
            self.program = program
            self.values = {key: values[node] for node, key in self.keys.items()}

    def propagate(
        self, owner: torch.fx.GraphModule, values: dict, path: str = ""
    ) -> list[torch.fx.Node]:
        """Fill in ``values`` of a graph whose inputs have theirs; returns the nodes it puts out.

        ``path`` leads from the whole graph to this one, which may be a region of it.
        """
        dead = _dead(owner.graph)
        if self.labels.counting:
            self.dead |= {path + node.name for node in dead}
        results: list[torch.fx.Node] = []
        for node in owner.graph.nodes:
            if node.op == "get_attr":
                values[node] = _plain(node.meta.get("val"))
            elif node.op == "call_function":
                self.keys[node] = path + node.name
                if self.labels.counting and _name(node)[0] in LAYERS:
                    weight = _tensor(node.args[1], values)
                    self.followers.setdefault(weight, set()).add(_follower(node, values))
                if _name(node)[0] in REGIONS:
                    values[node] = self.region(node, owner, values, path)
                else:
                    values[node] = self.call(node, values, bool(node.users) and node not in dead)
            elif node.op == "output":
                results = node.all_input_nodes
        return results

    def region(
        self, node: torch.fx.Node, owner: torch.fx.GraphModule, values: dict, path: str
    ) -> list:
        """Values that a graph within the graph (what ``with torch.autocast`` encloses) puts out."""
        (at,) = (k for k, x in enumerate(node.args) if getattr(x, "op", "") == "get_attr")
        name = node.args[at].target
        inner = owner.get_submodule(name)
        given = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for inside, outside in zip(given, node.args[at + 1 :], strict=True):
            values[inside] = values[outside]
            # One tensor under two names.
            self.same[inside] = self.same.get(outside, outside)
            self.names.setdefault(self.same[inside], [self.same[inside]]).append(inside)
        self.propagate(inner, values, f"{path}{name}.")
        (results,) = (n.args[0] for n in inner.graph.nodes if n.op == "output")
        return [values[result] for result in results]

    def call(self, node: torch.fx.Node, values: dict, read: bool):
        """Value of one operation, by its rule; not if nothing reads it."""
        meta = node.meta.get("val")
        if node.target is operator.getitem:
            source = values[node.args[0]]
            if isinstance(source, list) and node.args[1] < len(source):
                return source[node.args[1]]
            return _plain(meta, data=True)
        name, in_place = _name(node)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = self.materialise(args), self.materialise(kwargs)
        inputs = _flat(args) + _flat(kwargs)
        if self.labels.counting:
            self.arguments[self.keys[node]] = values_of(args)
        plain = _plain(meta, data=any(v.data for v in inputs))
        if not read and not in_place:
            return plain
        if not any(v.labelled for v in inputs) and name not in rules.UNLABELLED:
            return plain
        shapes = [v.shape for v in _flat(plain)]
        if name in rules.RULES:
            try:
                result = rules.RULES[name](self.labels, shapes, *args, **kwargs)
            except rules.InputError:
                raise
            except Exception as error:  # Never a guess: what a rule cannot read is refused.
                why = f"{name} (its rule failed with {type(error).__name__}: {error})"
                result = rules.unknown(self.labels, why, inputs, shapes)
        else:
            result = rules.unknown(self.labels, name, inputs, shapes)
        try:
            result = _like(plain, result)
        except ValueError as error:
            result = _like(plain, rules.unknown(self.labels, f"{name} ({error})", inputs, shapes))
        result = self.without_singles(result)
        if in_place:
            self.overwrite(node, values, result)
        return result

    def without_singles(self, result):
        """A dimension of one channel can not lose it."""
        for value in _flat(result):
            for d in value.labelled:
                if value.shape[d] == 1:
                    self.labels.block(value.atoms[d], "one of these is cut out by its number")
        return _map(result, lambda v: v.reshaped(
            v.shape, [d if n > 1 else None for d, n in enumerate(v.shape)]))  # fmt: skip

    def materialise(self, tree):
        """Arguments with atoms for every parameter and buffer among them."""
        if isinstance(tree, Value):
            return self.labels.materialise(tree)
        if isinstance(tree, dict):
            return {key: self.materialise(value) for key, value in tree.items()}
        if isinstance(tree, tuple | list):
            return [self.materialise(value) for value in tree]
        return tree

    def overwrite(self, node: torch.fx.Node, values: dict, result) -> None:
        """After an in-place operation its first argument, under every name, is the result."""
        target = self.same.get(node.args[0], node.args[0])
        before = values[target]
        self.same[node] = target
        names = self.names.setdefault(target, [target])
        names.append(node)
        if not isinstance(before, Value) or not isinstance(result, Value):
            return
        if _is_view(target) and set(result.labelled) - set(before.labelled):
            self.labels.block_value(result, "written through a view")
        for name in names:
            values[name] = result
        if before.shape != result.shape:
            return
        kept = zip(before.pins, result.pins, strict=True)
        lost = any(
            p is not None and (p >= 0).any() and (q is None or (q < 0).any()) for p, q in kept
        )
        if lost and any(_is_view(user) for name in names for user in name.users):
            self.labels.block_value(before, "changed in place, and read through a view")
        if lost and _is_view(target):
            self.labels.block_value(before, "changed in place through a view")


def _name(node: torch.fx.Node) -> tuple[str, bool]:
    """The operation as rules call it, and whether it is in place."""
    name = getattr(node.target, "_opname", str(node.target))
    in_place = name.endswith("_") and not name.endswith("__")
    name = name[:-1] if in_place else name
    namespace = getattr(node.target, "namespace", "aten")
    return name if namespace == "aten" else f"{namespace}::{name}", in_place


def _tensor(node: torch.fx.Node | None, values: dict) -> str | None:
    """Name of the parameter or buffer that a node reads straight from the model."""
    return getattr(values.get(node), "tensor", None)


def _follower(node: torch.fx.Node, values: dict) -> str | None:
    """What alone reads a layer: see `GroupLayout.followers`; None for others."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    given = [*user.args, *user.kwargs.values()]
    if given[0] is not node:
        return None
    match _name(node)[0], _name(user)[0], given[1:]:
        case "batch_norm", "relu" | "relu6" | "silu" | "hardswish" as name, []:
            return name
        case "batch_norm", "hardtanh", [0, 6]:
            return "relu6"
        case "batch_norm", "gelu", [] | ["none"]:
            return "gelu"
        case _, "batch_norm", [weight, *_]:
            return _tensor(weight, values)
    return None


def _dead(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Operations that make tensors which nothing reads, not even another operation that is read."""
    dead: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or _plain(node.meta.get("val")) is None:
            continue
        name, in_place = _name(node)
        if not in_place and name not in REGIONS and dead >= {*node.users}:
            dead.add(node)
    return dead


def _prefixes(name: str) -> list[str]:
    """``a.b.weight`` -> ``a``, ``a.b``, ``a.b.weight``."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _plain(meta, tensor: str | None = None, data: bool = False):
    """`Value` (or a list of them) without channels for a node's example value."""
    if isinstance(meta, torch.Tensor):
        return Value.plain([int(s) for s in meta.shape], tensor, data=data)
    if isinstance(meta, tuple | list):
        return [_plain(x, tensor, data) for x in meta]
    return None


def _like(plain, result):
    """What a rule returned, in the form of the operation's result."""
    if isinstance(plain, list):
        results = iter(result if isinstance(result, list) else [result])
        return [p if p is None else _like(p, next(results, p)) for p in plain]
    if isinstance(result, list | tuple):
        result = result[0] if result else plain
    if plain is None:
        return plain
    if not isinstance(result, Value) or not (
        result.shape == plain.shape and len(result.atoms) == len(plain.shape)
    ):
        raise ValueError("its rule gave a value of another shape")
    return replace(result, data=plain.data, tensor=None)


def _map(tree, function):
    """``function`` of a value, or of each in a list."""
    if isinstance(tree, list):
        return [_map(item, function) for item in tree]
    return tree if tree is None else function(tree)


def _flat(tree) -> list[Value]:
    """All values of nested arguments."""
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [value for item in tree for value in _flat(item)]


def _is_view(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.name.endswith("_"):
        return False
    return any(result.alias_info is not None for result in schema.returns)
