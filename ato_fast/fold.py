"""Weights that a network computes from its parameters in every call, computed once.

Such are those of weight standardisation, weight norm or spectral norm: in evaluation they are the
same whatever the input is.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg


def fold_weights(program: torch.export.ExportedProgram) -> None:
    """Put what ``program`` computes from parameters and buffers alone in the place of one of them.

    That one has its shape and dtype and serves nothing else; where there is none, it is computed in
    every call as before. So names and shapes stay, and no file gets larger. What else it was
    computed from, such as gains, stays and is unused.

    Args:
        program: of a module in evaluation mode, on one device. Changed in place: its graph, and
            tensors of its ``state_dict`` are replaced; none is written to.
    """
    state, signature = program.state_dict, program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    values, origins = _from_parameters(program, names)
    read = [node for node in values if any(user not in values for user in node.users)]
    n_readers = Counter(origin for node in read for origin in origins[node])
    for node in read:
        for place in origins[node]:
            value, old = values[node], state.get(names[place.name])
            if node is not place and n_readers[place] == 1 and _alike(value, old):
                new = old.detach().clone().copy_(value)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, old.requires_grad)
                state.update({name: new for name, tied in state.items() if tied is old})
                node.replace_all_uses_with(place)
                break
    for node in reversed(values):
        if node.op == "call_function" and not node.users:
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _from_parameters(
    program: torch.export.ExportedProgram, names: dict[str, str]
) -> tuple[dict[Node, Any], dict[Node, list[Node]]]:
    """The values of the nodes that no input has a part in, in the graph's order, and the
    placeholders each of them comes from; without what is written to, and what comes from that."""
    tensors = {**program.state_dict, **program.constants}
    values: dict[Node, Any] = {}
    origins: dict[Node, list[Node]] = {}
    changed: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            values[node], origins[node] = tensors[names[node.name]], [node]
            continue
        found = [source for source in node.all_input_nodes if source in values]
        reached = list(dict.fromkeys(origin for source in found for origin in origins[source]))
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            changed.update(reached)
        elif found and len(found) == len(node.all_input_nodes) and _repeats(node.target, schema):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node], origins[node] = node.target(*args, **kwargs), reached
    for node in [node for node in values if not changed.isdisjoint(origins[node])]:
        del values[node], origins[node]
    return values, origins


def _repeats(target: Any, schema: torch.FunctionSchema | None) -> bool:
    """Whether a call computes the same again."""
    if schema is None:
        return target is operator.getitem
    return torch.Tag.nondeterministic_seeded not in target.tags


def _alike(value: Any, old: Tensor | None) -> bool:
    return (
        isinstance(value, Tensor)
        and old is not None
        and (value.shape, value.dtype) == (old.shape, old.dtype)
    )
