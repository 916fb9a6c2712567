"""From a model to its `GroupLayout`, through `torch.export`'s graph of ATen operations.

The exported graphs (evaluation and training) are walked once each; `rules` says what each operation
does to channels, `labels.py` keeps the books, and `verify.py` tries the result on a copy.
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import rules
from .assemble import assemble
from .capture import TraceError, capture, check_plain
from .groups import GroupLayout, MacTerm
from .labels import Labels, Value
from .verify import culprits, tensors

SCOPES = ("inner", "all")

# Products of two activations, and layers whose multiply-adds do not follow from one weight's
# shape: counted by torch's own counter, as a constant.
_COUNTED_BY_TORCH = frozenset(
    "matmul mm bmm addmm baddbmm einsum scaled_dot_product_attention conv_transpose1d "
    "conv_transpose2d conv_transpose3d".split()
)


def trace(
    model: nn.Module,
    example_inputs: tuple,
    scope: str = "inner",
    ignore: Sequence[str] = (),
    kwargs: dict | None = None,
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

    Returns:
        The layout; ``layout.unprunable`` lists every parameter left out, with the reason.

    Raises:
        TraceError: `torch.export` cannot capture the model, or it cannot be copied.
        TypeError, ValueError: bad arguments.
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
    walk = Walk(model, tuple(example_inputs), dict(kwargs or {}))
    walk.ignore(ignore)
    walk.run(training=False)
    # Training may read channels that evaluation never shows: auxiliary heads, extra outputs.
    try:
        walk.run(training=True)
    except TraceError as error:
        reason = f"not used in evaluation, and training mode was not captured: {error}"
        walk.labels.blocked_tensors.update(dict.fromkeys(walk.unused(), reason))
    while True:
        layout = assemble(walk, scope)
        wrong = culprits(model, walk.args, walk.kwargs, layout)
        if not wrong:
            return layout
        for gate in wrong:
            for part in gate.slices:
                atoms, _ = walk.labels.attached[part.tensor, part.dim]
                walk.labels.block(
                    atoms[part.channels >= 0],
                    "the forward pass depends on this number of channels (hard-coded in a "
                    "reshape, say): the shrunk model failed or gave another output",
                )


@dataclass
class Walk:
    """Propagation over one or two graphs of the same model."""

    model: nn.Module
    args: tuple
    kwargs: dict
    labels: Labels = field(default_factory=Labels)
    mac_terms: list[MacTerm] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    same: dict[torch.fx.Node, torch.fx.Node] = field(default_factory=dict)
    names: dict[torch.fx.Node, list[torch.fx.Node]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        first: dict[int, str] = {}
        self.canonical: dict[str, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            self.canonical[name] = first.setdefault(id(parameter), name)
        self.parameters = [n for n, c in self.canonical.items() if n == c]
        self.labels.trainable = frozenset(self.parameters)
        inputs = [x for x in tensors((self.args, self.kwargs)) if x.dim()]
        self.batch = inputs[0].shape[0] if inputs else 1

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

    def unused(self) -> list[str]:
        """Parameters that no graph walked so far reads."""
        return [name for name in self.parameters if name not in self.used]

    def run(self, training: bool) -> None:
        """Capture the model in one mode and propagate labels through its graph."""
        program = capture(self.model, self.args, self.kwargs, training)
        signature = program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        outputs = set(signature.user_outputs)
        values: dict[torch.fx.Node, object] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                name = stored.get(node.name)
                name = self.canonical.get(name, name)
                if name is not None and node.users:
                    self.used.add(name)
                values[node] = _plain(node.meta.get("val"), name)
            elif node.op == "get_attr":
                values[node] = _plain(node.meta.get("val"), None)
            elif node.op == "call_function":
                values[node] = self.call(node, values, count=not training)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    if source.name in outputs:
                        for value in _flat(values[source]):
                            self.labels.block_value(value, "reaches the model output")

    def call(self, node: torch.fx.Node, values: dict, count: bool):
        """Value of one operation, by its rule."""
        meta = node.meta.get("val")
        if node.target is operator.getitem:
            source = values[node.args[0]]
            if isinstance(source, list):
                return source[node.args[1]]
            return _plain(meta, None)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
        inputs = _flat(args) + _flat(kwargs)
        shapes = [v.shape for v in _flat(_plain(meta, None))]
        full_name = getattr(node.target, "_opname", str(node.target))
        in_place = full_name.endswith("_") and not full_name.endswith("__")
        name = full_name[:-1] if in_place else full_name
        if not node.users and not in_place:
            return _plain(meta, None)
        if count:
            self.count(node, name, args, shapes)
        labelled = [v for v in inputs if v.labelled]
        if not labelled and name not in rules.WITH_WEIGHTS:
            for value in inputs:
                self.read_outside(value, name)
            return _plain(meta, None)
        if name not in rules.WITH_WEIGHTS:
            for value in inputs:
                self.read_outside(value, name)
        if name in rules.RULES:
            result = rules.RULES[name](self.labels, shapes, *args, **kwargs)
        else:
            result = rules.unknown(self.labels, name, inputs, shapes)
        if not isinstance(meta, tuple | list) and isinstance(result, list):
            result = result[0] if result else None
        if in_place:
            self.overwrite(node, values, result)
        return result

    def read_outside(self, value: Value, name: str) -> None:
        """A parameter or buffer is read by an operation that is no layer of its own."""
        if value.tensor is not None:
            reason = f"used by {name} outside any layer"
            self.labels.blocked_tensors.setdefault(value.tensor, reason)

    def overwrite(self, node: torch.fx.Node, values: dict, result) -> None:
        """After an in-place operation its first argument, under every name, is the result."""
        target = self.same.get(node.args[0], node.args[0])
        before = values[target]
        self.same[node] = target
        names = self.names.setdefault(target, [target])
        names.append(node)
        if not isinstance(before, Value) or not isinstance(result, Value):
            return
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

    def count(self, node: torch.fx.Node, name: str, args, shapes) -> None:
        """Record the multiply-adds of one operation, per example."""
        weight = args[1] if len(args) > 1 and isinstance(args[1], Value) else None
        if name in ("conv1d", "conv2d", "conv3d"):
            channel = len(shapes[0]) - len(weight.shape) + 1
            if channel == 0:
                raise ValueError(
                    "example_inputs: expected a batch, as the first dimension; a convolution got "
                    f"an input without one (its output has shape {shapes[0]})"
                )
            positions = _size(shapes[0]) // shapes[0][channel]
        elif name == "linear":
            positions = _size(shapes[0]) // shapes[0][-1]
        elif name in _COUNTED_BY_TORCH:
            fake = torch.fx.map_arg(
                (node.args, node.kwargs),
                lambda n: torch.empty(
                    n.meta["val"].shape, dtype=n.meta["val"].dtype, device="meta"
                ),
            )
            with FlopCounterMode(display=False) as counter:
                node.target(*fake[0], **fake[1])
            macs = counter.get_total_flops() // 2 // self.batch
            self.mac_terms.append(MacTerm(node.name, macs, ()))
            return
        else:
            return
        positions //= self.batch
        if weight.tensor is None:
            self.mac_terms.append(MacTerm(node.name, positions * _size(weight.shape), ()))
        else:
            dims = tuple((weight.tensor, d) for d in range(len(weight.shape)))
            self.mac_terms.append(MacTerm(weight.tensor, positions, dims, positions))


def _listed(names) -> Sequence:
    return names if isinstance(names, list | tuple | set | frozenset) else (None,)


def _prefixes(name: str) -> list[str]:
    """``a.b.weight`` -> ``a``, ``a.b``, ``a.b.weight``."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _plain(meta, tensor: str | None):
    """`Value` (or a list of them) without channels for a node's example value."""
    if isinstance(meta, torch.Tensor):
        return Value.plain(tuple(int(s) for s in meta.shape), tensor)
    if isinstance(meta, tuple | list):
        return [_plain(x, tensor) for x in meta]
    return None


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
