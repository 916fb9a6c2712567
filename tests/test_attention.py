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
        if self.how.startswith("sdpa"):
            mask = (torch.arange(n) < n - 1).expand(b, self.heads, n, n)
            mask = mask if self.how.endswith("masked") else None
            y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        else:
            k, v = (z.repeat_interleave(self.heads // self.kv_heads, 1) for z in (k, v))
            if self.how == "einsum":
                logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / 2
            else:
                logits = q @ k.transpose(-2, -1) / 2
            y = logits.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("how", ["sdpa", "sdpa masked", "matmul", "einsum"])
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
    graph = ato.shrink(model, layout, mask, as_graph=True)
    torch.testing.assert_close(graph(T), small(T), rtol=1e-5, atol=1e-6)
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


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 1, enable_nested_tensor=False
        )
        self.out = nn.Linear(16, 3)

    def forward(self, x, padding, causal=True):
        hidden = nn.Transformer.generate_square_subsequent_mask(5).to(x) if causal else None
        return self.out(self.layers(x, hidden, padding, is_causal=causal))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True)
        self.layers, self.out = nn.TransformerDecoder(layer, 1), nn.Linear(16, 3)

    def forward(self, x, memory, padding, memory_padding):
        causal = nn.Transformer.generate_square_subsequent_mask(5).to(x)
        return self.out(self.layers(
            x, memory, causal, tgt_key_padding_mask=padding, tgt_is_causal=True,
            memory_key_padding_mask=memory_padding, memory_is_causal=False,
        ))  # fmt: skip


class Masked(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.out, self.need_weights = nn.Linear(16, 3), need_weights

    def forward(self, x, mask, padding):
        y, _ = self.attention(x, x, x, padding, self.need_weights, mask)
        return self.out(y)


PADDING = torch.zeros(2, 5).masked_fill(torch.arange(10).view(2, 5) > 7, -torch.inf)
HIDDEN = torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
MASKED = {
    "encoder": (Encoder, (T, PADDING)),
    "encoder, bool": (Encoder, (T, PADDING < 0, False)),
    "decoder": (Decoder, (T, T.flip(1), PADDING, torch.zeros(2, 5))),
    "padding": (lambda: Masked(False), (T, None, PADDING)),
    "both": (lambda: Masked(False), (T, HIDDEN, PADDING)),
    "both, weights": (lambda: Masked(True), (T, HIDDEN, PADDING)),
    "weights": (lambda: Masked(True), (T, None, None)),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_masked_attention_loses_heads_as_a_module_and_as_a_graph(name, scope):
    """A mask that is expanded to one for every head follows their number."""
    build, inputs = MASKED[name]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    layout = ato.trace(model, inputs, scope=scope)
    heads = [gate for gate in layout if gate.n == 4]
    assert len(heads) == (2 if name == "decoder" else 1)
    assert layout.verify(model, inputs).ok
    mask = random_mask(layout, 1)
    dense = model(*inputs)
    ato.zero_(model, layout, mask)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = model(*inputs)
        for as_graph in (False, True):
            small = ato.shrink(model, layout, mask, as_graph=as_graph)
            assert sum(p.numel() for p in small.parameters()) == layout.params(mask)
            assert (small(*inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert (expected - dense).abs().max() > 1e-3
    for gate in heads:
        assert mask[gate.span].sum() < 4
