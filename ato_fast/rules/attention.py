"""Scaled dot product attention: heads, and the size of a head."""

from __future__ import annotations

from ..labels import Labels, Value
from .contractions import contract
from .registry import rule
from .shape import reshape


@rule("scaled_dot_product_attention")
def _attention(
    labels: Labels, out, query: Value, key: Value, value: Value, mask=None, dropout=0.0,
    causal=False, *, scale=None, enable_gqa=False,
) -> Value:  # fmt: skip
    if scale is None:
        for side in (query, key):
            labels.block(side.atoms[-1], "the scale of the softmax follows from this size")
    lead = list(range(len(query.shape) - 2))
    shared = list(lead)
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        # Query heads (kv, n) share the key and value head kv.
        kv = key.shape[-3]
        grouped = (*query.shape[:-3], kv, query.shape[-3] // kv, *query.shape[-2:])
        query = reshape(labels, query, grouped)
        lead = [*lead, "shared"]
        if isinstance(mask, Value) and len(mask.shape) > 2:
            heads = grouped[-4:-2] if mask.shape[-3] > 1 else (1, 1)
            mask = reshape(labels, mask, (*mask.shape[:-3], *heads, *mask.shape[-2:]))
    logits_shape = (*query.shape[:-1], key.shape[-2])
    logits = contract(
        labels, "attention", ((query, [*lead, "n", "d"]), (key, [*shared, "m", "d"])),
        [*lead, "n", "m"], logits_shape,
    )  # fmt: skip
    if isinstance(mask, Value):
        for d in mask.labelled:
            from_end = len(mask.shape) - d
            place = len(logits_shape) - from_end
            if place >= 0 and from_end > 2:
                labels.join(logits.atoms[place], mask.atoms[d])
            else:
                labels.block(mask.atoms[d], "an attention mask over positions")
    for d in logits.labelled[::-1]:
        if d >= len(logits_shape) - 2:
            labels.block(logits.atoms[d], "softmax runs over these positions")
            logits = logits.with_dim(d, None, None)
    weights = logits.without_pins("softmax(0) is not 0")
    result = contract(
        labels, "attention", ((weights, [*lead, "n", "m"]), (value, [*shared, "m", "e"])),
        [*lead, "n", "e"], (*weights.shape[:-1], value.shape[-1]),
    )  # fmt: skip
    return reshape(labels, result, out[0])
