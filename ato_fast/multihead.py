"""`torch.nn.MultiheadAttention` after some of its heads are gone.

Torch's own forward takes the size of a head from ``embed_dim // num_heads`` and insists that all
heads together are as wide as the input, so a layer that lost heads becomes this subclass: same
parameters by the same names, same call.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShrunkMultiheadAttention(nn.MultiheadAttention):
    """Attention with ``num_heads`` heads of ``head_dim``, over inputs of any width.

    Made by `shrink`, never constructed. ``in_proj_weight`` is ``[3 * num_heads * head_dim,
    embed_dim]`` (or ``{q,k,v}_proj_weight``), ``out_proj`` maps ``num_heads * head_dim`` to
    ``embed_dim``.
    """

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        separate = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        weights = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        bias = self.in_proj_bias
        biases = [None] * 3 if bias is None else bias.chunk(3)
        triples = zip((query, key, value), weights, biases, strict=True)
        # [N, L, H * D] -> [N, H, L, D]
        return [
            F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in triples
        ]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `torch.nn.MultiheadAttention.forward`."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: is_causal=True needs the mask too, got None")
        q, k, v = self._project(query, key, value)
        mask = _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (q.shape[0], -1))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
            weights = (logits if mask is None else logits + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            output = weights @ v
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            output = output.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (True hides) as one that is added to the logits."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def refit(
    module: nn.MultiheadAttention, prefix: str, kept_of: Mapping[str, Mapping[int, np.ndarray]]
) -> None:
    """Make the layer fit its tensors, given the indices kept of each tensor per dimension."""
    joint = module.in_proj_weight is not None
    name, parts = ("in_proj_weight", 3) if joint else ("v_proj_weight", 1)
    kept = kept_of.get(prefix + name, {})
    if not kept:
        return
    rows = kept.get(0)
    if rows is not None:
        heads = np.unique(rows // module.head_dim)
        module.num_heads = len(heads) // parts
        module.head_dim = len(rows) // parts // module.num_heads
    module.embed_dim = module.out_proj.weight.shape[0]
    convert(module)


def convert(module: nn.MultiheadAttention) -> None:
    """Make ``module`` a `ShrunkMultiheadAttention`, unless it adds keys of its own."""
    if module.bias_k is not None or module.add_zero_attn:
        return
    # Torch's encoder layer goes around this class's forward where this is True.
    module._qkv_same_embed_dim = False
    module.__class__ = ShrunkMultiheadAttention
