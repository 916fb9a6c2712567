"""Attention heads: gates, attributes that follow, torch's own layer, saved and loaded."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ato_fast as ato
from ato_fast import multihead
from nets import random_mask
from tracing import assert_exact, gates_of

T = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Grouped(nn.Module):
    """6 query heads on 2 key and value heads; their numbers are attributes."""

    def __init__(self, how="sdpa"):
        super().__init__()
        self.how, self.heads, self.kv_heads, self.size = how, 6, 2, 4
        self.q, self.o = nn.Linear(16, 24), nn.Linear(24, 16)
        self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv_heads, self.size).transpose(1, 2)
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (z.repeat_interleave(self.heads // self.kv_heads, 1) for z in (k, v))
            if self.how == "einsum":
                logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / 2
            else:
                logits = q @ k.transpose(-2, -1) / 2
            y = logits.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("how", ["sdpa", "matmul", "einsum"])
def test_query_heads_go_with_their_keys_and_values(how, tmp_path):
    model = Grouped(how).eval()
    layout = ato.trace(model, (T,))
    assert gates_of(layout) == {"q": 2}
    (gate,) = layout.gates
    assert dict(gate.attributes) == {"heads": 3, "kv_heads": 1}
    assert {s.tensor for s in gate.slices if s.role == "input"} == {"o.weight"}
    assert_exact(model, layout, T)
    mask = torch.tensor([False, True])
    ato.zero_(model, layout, mask)
    small = ato.shrink(model, layout, mask)
    assert (small.heads, small.kv_heads, small.size) == (3, 1, 4)
    ato.save(small, tmp_path)
    assert json.loads((tmp_path / "recipe.json").read_text())["attributes"] == {
        "heads": 3, "kv_heads": 1
    }  # fmt: skip
    loaded = ato.load(tmp_path, lambda: Grouped(how)).eval()
    assert torch.equal(loaded(T), small(T))
    with pytest.raises(ato.ArtifactError):
        ato.load(tmp_path, lambda: nn.MultiheadAttention(16, 2))


def test_products_of_two_activations_are_counted_by_the_mask():
    """5 x 5 x 4 multiply-adds a head for q k and for its product with v."""
    layout = ato.trace(Grouped(), (T,))
    linear = 5 * 16 * (24 + 8 + 8 + 24)
    assert layout.macs() == linear + 6 * 2 * 100
    assert layout.macs(torch.tensor([True, False])) == linear // 2 + 3 * 2 * 100


class SelfAttention(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **arguments)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention_loses_heads(batch_first, bias, tmp_path):
    model = SelfAttention(batch_first=batch_first, bias=bias).eval()
    layout = ato.trace(model, (T,))
    assert gates_of(layout)["attention"] == 4
    assert_exact(model, layout, T)
    mask = random_mask(layout)
    small = ato.shrink(model, layout, mask)
    assert isinstance(small.attention, nn.MultiheadAttention)
    assert small.attention.num_heads == int(mask[layout.gate("attention").span].sum()) < 4
    ato.save(small, tmp_path)
    loaded = ato.load(tmp_path, lambda: SelfAttention(batch_first=batch_first, bias=bias)).eval()
    assert torch.equal(loaded(T), small(T))


@pytest.mark.parametrize("mask", [None, "bool", "float", "per head"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"batch_first": True}, {"kdim": 6, "vdim": 7}])
def test_the_subclass_is_torchs_layer(mask, padding, need_weights, arguments):
    layer = nn.MultiheadAttention(16, 4, **arguments).eval()
    twin = copy.deepcopy(layer)
    multihead.convert(twin)
    n = 2 if arguments.get("batch_first") else 5
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 5, 16, generator=generator)
    k = torch.randn(2, 5, arguments.get("kdim", 16), generator=generator)
    v = torch.randn(2, 5, arguments.get("vdim", 16), generator=generator)
    batch, length = (2, 5) if n == 2 else (5, 2)
    masks = {
        None: None,
        "bool": torch.ones(length, length).triu(1).bool(),
        "float": torch.randn(length, length, generator=generator),
        "per head": torch.randn(batch * 4, length, length, generator=generator),
    }
    keys = torch.zeros(batch, length, dtype=torch.bool)
    keys[0, -1] = True
    more = {
        "attn_mask": masks[mask], "need_weights": need_weights,
        "key_padding_mask": keys if padding else None,
    }  # fmt: skip
    if padding and mask == "float":
        more["key_padding_mask"] = torch.zeros(batch, length).masked_fill(keys, -torch.inf)
    expected, weights = layer(q, k, v, **more)
    got, got_weights = twin(q, k, v, **more)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (weights is None) == (got_weights is None)
    if weights is not None:
        torch.testing.assert_close(got_weights, weights, rtol=1e-5, atol=1e-6)


def test_the_subclass_takes_unbatched_inputs():
    layer = nn.MultiheadAttention(16, 4).eval()
    twin = copy.deepcopy(layer)
    multihead.convert(twin)
    for a, b in zip(layer(T[0], T[0], T[0]), twin(T[0], T[0], T[0]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
