"""What a layout offers and leaves out, and what each reason costs, as plain data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .budget import KINDS, floor
from .cost import dense_macs, gated_entries

if TYPE_CHECKING:
    from .groups import Gate, GroupLayout, MacTerm

NO_WEIGHT = "an operation without a weight of its own, such as a product of two activations"
NO_PARAMETER = "a weight that is no parameter of the model"
IN_PART = "the other channels of tensors that have some in a gate"


def describe(layout: GroupLayout) -> dict[str, Any]:
    """All that ``ato-fast inspect`` says, as plain data that fits JSON.

    Shares (``_frac``) are of the whole dense model's MACs or parameters, in [0, 1].

    Returns:
        ``scope``, ``min_channels``, ``round_to``, ``n_groups``, ``macs``, ``params``; ``floor``:
        the smallest ``macs`` and ``params`` a mask reaches; ``coverage``: `GroupLayout.coverage`
        as ``macs_frac`` and ``params_frac``; ``gates``, ``reasons`` and ``held`` (see below);
        ``unprunable``: ``tensor`` and ``reason`` of each parameter in no group.

        Of each gate: ``name``, ``n`` (channels), ``residual``, ``macs_frac`` (of the operations it
        makes smaller, each in full), ``produced_by`` and ``read_by`` (modules), ``feeds`` (gates
        those readers produce), ``place`` (of its first operation in the order of execution),
        ``slices`` (tensor, dim, role).
        Of each reason (names in it replaced by "a tensor"): ``reason``, ``tensors``; ``macs_frac``
        and ``params_frac`` of the layers whose own channels it keeps; ``fixed_macs_frac`` and
        ``fixed_params_frac``: the part of those that no gate makes smaller from the input side
        either. The fixed shares add up to what ``coverage`` leaves.
        Of each held layer, i.e. module that keeps its own channels and computes something or reads
        a gate: ``module``, ``reason``, ``macs_frac``, ``fixed`` (no gate makes it smaller),
        ``reads`` (gates), ``place``.
    """
    coverage = layout.coverage()
    order = _order(layout)
    return {
        "scope": layout.scope,
        "min_channels": layout.min_channels,
        "round_to": layout.round_to,
        "n_groups": layout.n_groups,
        "macs": layout.macs(),
        "params": layout.params(),
        "floor": {kind: floor(layout, kind) for kind in KINDS},
        "coverage": {"macs_frac": coverage.macs, "params_frac": coverage.params},
        "gates": _gates(layout, order),
        "reasons": _reasons(layout),
        "held": _held(layout, order),
        "unprunable": [{"tensor": u.tensor, "reason": u.reason} for u in layout.unprunable],
    }


def module_of(tensor: str) -> str:
    """Dotted name of the module that holds a tensor; the tensor's own where that is the model."""
    return tensor.rpartition(".")[0] or tensor


def modules_of(gate: Gate, *roles: str) -> list[str]:
    """The modules whose tensors have one of the roles in a gate."""
    return list(dict.fromkeys(module_of(s.tensor) for s in gate.slices if s.role in roles))


def _order(layout: GroupLayout) -> dict[str, int]:
    """Place of each module's first operation in the order of execution."""
    order: dict[str, int] = {}
    for place, term in enumerate(layout.mac_terms):
        for tensor, _ in term.dims[:1]:
            order.setdefault(module_of(tensor), place)
    return order


def _gates(layout: GroupLayout, order: dict[str, int]) -> list[dict[str, Any]]:
    total = max(layout.macs(), 1)
    touched = dict.fromkeys((gate.name for gate in layout.gates), 0)
    for term in layout.mac_terms:
        for name in {g.name for key in term.dims for g, _ in layout.slices_of.get(key, ())}:
            touched[name] += dense_macs(layout, term)
    makers: dict[str, list[str]] = {}
    for gate in layout.gates:
        for module in modules_of(gate, "row"):
            makers.setdefault(module, []).append(gate.name)
    rows, place = [], 0
    for gate in layout.gates:
        produced_by, read_by = modules_of(gate, "row"), modules_of(gate, "input")
        # Gates are in forward order: one that no counted operation produces follows its neighbour.
        place = min((order[m] for m in produced_by if m in order), default=place)
        fed = [name for module in read_by for name in makers.get(module, ()) if name != gate.name]
        rows.append(
            {
                "name": gate.name,
                "n": gate.n,
                "residual": gate.residual,
                "macs_frac": touched[gate.name] / total,
                "produced_by": produced_by,
                "read_by": read_by,
                "feeds": list(dict.fromkeys(fed)),
                "place": place,
                "slices": [[s.tensor, s.dim, s.role] for s in gate.slices],
            }
        )
    return rows


def _in_gate(layout: GroupLayout, term: MacTerm) -> bool:
    return any((layout.groups_of(*key) >= 0).any() for key in term.dims)


def _reasons(layout: GroupLayout) -> list[dict[str, Any]]:
    """What each reason costs; the dearest first."""
    reason_of = {entry.tensor: _general(entry.reason, layout) for entry in layout.unprunable}
    total = {"macs": max(layout.macs(), 1), "params": max(layout.params(), 1)}
    found: dict[str, dict[str, Any]] = {}

    def charge(reason: str, kind: str, amount: int, fixed: int) -> dict[str, Any]:
        keys = ("macs_frac", "params_frac", "fixed_macs_frac", "fixed_params_frac")
        new = {"reason": reason, "tensors": [], **dict.fromkeys(keys, 0.0)}
        entry = found.setdefault(reason, new)
        entry[f"{kind}_frac"] += amount / total[kind]
        entry[f"fixed_{kind}_frac"] += fixed / total[kind]
        return entry

    for name in layout.parameters:
        size = math.prod(layout.shapes[name])
        fixed = size - gated_entries(layout, name)
        if name in reason_of:
            charge(reason_of[name], "params", size, fixed)["tensors"].append(name)
        elif fixed:
            charge(IN_PART, "params", fixed, fixed)["tensors"].append(name)
    for term in layout.mac_terms:
        macs = dense_macs(layout, term)
        fixed = 0 if _in_gate(layout, term) else macs
        weight = term.dims[0][0] if term.dims else None
        if weight in reason_of:
            charge(reason_of[weight], "macs", macs, fixed)
        elif fixed:
            charge(NO_PARAMETER if weight else NO_WEIGHT, "macs", macs, fixed)
    return sorted(found.values(), key=lambda r: (-r["macs_frac"], -r["params_frac"]))


def _general(reason: str, layout: GroupLayout) -> str:
    """A reason without the tensors' names in it, so that the same one for many counts as one."""
    words = reason.split(" ")
    return " ".join(
        word.replace(name, "a tensor") if (name := word.rstrip(":,;.")) in layout.shapes else word
        for word in words
    )


def _held(layout: GroupLayout, order: dict[str, int]) -> list[dict[str, Any]]:
    """Layers whose own channels stay, in forward order."""
    total = max(layout.macs(), 1)
    makers = {module for gate in layout.gates for module in modules_of(gate, "row")}
    held: dict[str, dict[str, Any]] = {}
    for entry in layout.unprunable:
        module = module_of(entry.tensor)
        if module not in makers:
            new = {"reason": entry.reason, "macs_frac": 0.0, "fixed": True, "reads": []}
            held.setdefault(module, {"module": module, **new})
    for term in layout.mac_terms:
        layer = held.get(module_of(term.dims[0][0])) if term.dims else None
        if layer is not None:
            layer["macs_frac"] += dense_macs(layout, term) / total
            layer["fixed"] &= not _in_gate(layout, term)
    for gate in layout.gates:
        for module in modules_of(gate, "input"):
            if module in held:
                held[module]["reads"].append(gate.name)
    rows = [layer for layer in held.values() if layer["module"] in order or layer["reads"]]
    for layer in rows:
        layer["place"] = order.get(layer["module"], len(layout.mac_terms))
    return sorted(rows, key=lambda layer: layer["place"])
