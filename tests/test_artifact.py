"""recipe.json + model.safetensors: exact round trip, clear refusals, no pickle."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ato_fast as ato
from nets import Plain, Residual, conv_bn_relu, random_mask, randomise_norms, shrunk_residual

X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def small():
    return shrunk_residual(X)


def test_round_trip_is_bit_exact(small, tmp_path):
    ato.save(small, tmp_path / "out", budget={"macs": 0.5}, provenance={"seed": 3})
    loaded = ato.load(tmp_path / "out", Residual).eval()
    assert loaded.state_dict().keys() == small.state_dict().keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert torch.equal(loaded(X), small(X))
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["budget"] == {"macs": 0.5} and recipe["provenance"] == {"seed": 3}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"recipe.json", "model.safetensors"}


def test_loaded_model_can_be_saved_again(small, tmp_path):
    ato.save(small, tmp_path / "a")
    ato.save(ato.load(tmp_path / "a", Residual), tmp_path / "b")
    for name in ("recipe.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tied_weights_stay_tied(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(),
                              nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))  # fmt: skip
        model[4].weight = model[2].weight
        return model

    model = build()
    layout = ato.trace(model, (torch.randn(1, 4),))
    small = ato.shrink(model, layout, random_mask(layout))
    ato.save(small, tmp_path)
    loaded = ato.load(tmp_path, build)
    assert loaded[4].weight is loaded[2].weight
    assert torch.equal(loaded[2].weight, small[2].weight)


def test_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a module made by ato_fast.shrink"):
        ato.save(Plain(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_provenance_that_json_cannot_hold(small, tmp_path):
    with pytest.raises(TypeError):
        ato.save(small, tmp_path / "out", provenance={"x": object()})
    assert not (tmp_path / "out").exists()


def test_missing_folder(tmp_path):
    with pytest.raises(ato.ArtifactError, match=r"recipe\.json: no such file"):
        ato.load(tmp_path / "nowhere", Residual)


def test_missing_weights(small, tmp_path):
    ato.save(small, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ato.ArtifactError, match=r"model\.safetensors: no such file"):
        ato.load(tmp_path, Residual)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_weights(small, tmp_path, damage):
    ato.save(small, tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        del data[-7:]
    else:
        data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(ato.ArtifactError, match=r"model\.safetensors: checksum does not match"):
        ato.load(tmp_path, Residual)


def test_tampered_recipe(small, tmp_path):
    ato.save(small, tmp_path)
    path = tmp_path / "recipe.json"
    content = json.loads(path.read_text())
    content["tensors"]["head.weight"]["keep"]["1"][0] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(ato.ArtifactError, match=r"recipe\.json: checksum does not match"):
        ato.load(tmp_path, Residual)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not readable as JSON"), ("[]", "not a recipe"), ('{"format": "x"}', "not a recipe"),
     ('{"format": "ato_fast.recipe", "version": 99}', "recipe version 99, this release reads 1")],
)  # fmt: skip
def test_not_a_recipe(tmp_path, text, words):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ato.ArtifactError, match=words):
        ato.load(tmp_path, Residual)


def test_other_architectures_do_not_fit(small, tmp_path):
    ato.save(small, tmp_path)
    with pytest.raises(ato.ArtifactError, match="does not fit this model: it has no tensor"):
        ato.load(tmp_path, Plain)

    def wider():
        model = Residual()
        model.inner = nn.Sequential(nn.Conv2d(8, 9, 3), nn.BatchNorm2d(9))
        return model

    with pytest.raises(ato.ArtifactError, match=r"has shape \[9.*the recipe was made for \[6"):
        ato.load(tmp_path, wider)

    def more():
        model = Residual()
        model.extra = nn.Linear(2, 2)
        return model

    with pytest.raises(ato.ArtifactError, match=r"missing \['extra.bias', 'extra.weight'\]"):
        ato.load(tmp_path, more)
    with pytest.raises(ato.ArtifactError, match="is torch.float64 of shape"):
        ato.load(tmp_path, lambda: Residual().double())
    with pytest.raises(TypeError, match=r"got a Residual itself; pass lambda: Residual\(...\)"):
        ato.load(tmp_path, Residual())
    with pytest.raises(TypeError, match="build_model: expected a callable that returns"):
        ato.load(tmp_path, lambda: None)


def test_failed_write_leaves_the_old_files(small, tmp_path, monkeypatch):
    ato.save(small, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        ato.save(small, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


class Tied(nn.Module):
    """Two layers share a weight, and a head reads the channels in another module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.c.weight = self.b.weight
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


class Attention(nn.Module):
    """Heads by an attribute of its own, and `torch.nn.MultiheadAttention` after it."""

    def __init__(self):
        super().__init__()
        self.num_heads = 8
        self.qkv, self.proj = nn.Linear(6, 96), nn.Linear(32, 16)
        self.mha, self.head = nn.MultiheadAttention(16, 8, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        y = torch.relu(self.proj(y))
        return self.head(self.mha(y, y, y, need_weights=False)[0])


class Grouped(nn.Module):
    """Grouped and depthwise convolutions, group norm and a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem, self.depth = conv_bn_relu(3, 16), conv_bn_relu(16, 16, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.norm, self.head = nn.GroupNorm(8, 32), nn.Linear(48, 5)

    def forward(self, x):
        x = self.depth(self.stem(x))
        y = torch.relu(self.norm(self.grouped(x)))
        return self.head(torch.cat([x, y], 1).mean((2, 3)))


TWICE = {"tied": (Tied, (4,)), "attention": (Attention, (5, 6)), "residual": (Residual, (3, 8, 8)),
         "grouped": (Grouped, (3, 8, 8))}  # fmt: skip


@pytest.mark.parametrize("build, shape", TWICE.values(), ids=TWICE)
def test_shrunk_three_times_and_loaded(tmp_path, build, shape):
    x = torch.randn(2, *shape)
    model = randomise_norms(build()).eval()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = [sum(p.numel() for p in model.parameters())]
    for turn in range(3):
        layout = ato.trace(model, (x,), scope="all")
        mask = random_mask(layout, seed=turn, keep=0.6)
        for gate in layout.gates if turn == 2 else ():
            # What an earlier turn made of an attribute stays.
            mask[gate.span] |= bool(gate.attributes)
        ato.zero_(model, layout, mask)
        expected = model(x)
        model = ato.shrink(model, layout, mask)
        torch.testing.assert_close(model(x), expected)
        ato.save(model, tmp_path / str(turn))
        # From the dense model, and from what was loaded the turn before.
        loaded = ato.load(tmp_path / str(turn), build).eval()
        assert torch.equal(loaded(x), model(x))
        ato.save(loaded, tmp_path / "again")
        assert ato.load(tmp_path / "again", build).eval()(x).equal(model(x))
        model = loaded
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    recipe = json.loads((tmp_path / "2" / "recipe.json").read_text())["tensors"]
    for name, tensor in model.state_dict().items():
        expected = dense[name]
        for dim, indices in recipe.get(name, {"keep": {}})["keep"].items():
            expected = expected.index_select(int(dim), torch.tensor(indices))
        assert torch.equal(tensor, expected), name
    if build is Tied:
        assert model.c.weight is model.b.weight
    if build is Attention:
        assert model.num_heads < 8 and model.mha.num_heads < 8


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    class Shared(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("start", self.head.bias.detach()[:2])

    model = Shared().eval()
    layout = ato.trace(model, (X,))
    small = ato.shrink(model, layout, random_mask(layout))
    small.start = small.head.bias.detach()[:2]
    ato.save(small, tmp_path)
    assert torch.equal(ato.load(tmp_path, Shared).start, small.start)


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(Plain):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    model = Extra().eval()
    layout = ato.trace(model, (X,))
    small = ato.shrink(model, layout, random_mask(layout))
    with pytest.raises(ValueError, match="_extra_state of its state_dict is a dict"):
        ato.save(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
