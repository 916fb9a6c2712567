"""zero_ and shrink: what changes, what stays, what is refused."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import ato_fast as ato
from nets import Plain, Residual, random_mask, randomise_norms

X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def traced():
    model = randomise_norms(Residual())
    return model, ato.trace(model, (X,), scope="all")


def test_zero_touches_dropped_groups_and_nothing_else(traced):
    model, layout = traced
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mask = random_mask(layout)
    ato.zero_(model, layout, mask)
    for name, tensor in model.state_dict().items():
        changed = torch.zeros_like(tensor, dtype=torch.bool)
        for dim in range(tensor.dim()):
            parts = layout.slices_of.get((name, dim), ())
            if any(part.in_group for _, part in parts):
                groups = torch.tensor(layout.groups_of(name, dim))
                gone = (groups >= 0) & ~mask[groups]
                changed.index_fill_(dim, gone.nonzero().flatten(), True)
        assert torch.equal(tensor[~changed], before[name][~changed])
        assert (tensor[changed] == 0).all()


def test_shrink_leaves_the_model_alone(traced):
    model, layout = traced
    before = copy.deepcopy(model.state_dict())
    small = ato.shrink(model, layout, random_mask(layout))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.stem[0].out_channels == 8
    for ours, theirs in zip(small.parameters(), model.parameters(), strict=True):
        assert ours.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


def test_attributes_follow_the_tensors(traced):
    model, layout = traced
    mask = random_mask(layout)
    small = ato.shrink(model, layout, mask)
    stem, inner = (int(mask[g.span].sum()) for g in layout.gates)
    assert (small.stem[0].in_channels, small.stem[0].out_channels) == (3, stem)
    assert small.stem[1].num_features == stem
    assert (small.inner[0].in_channels, small.inner[0].out_channels) == (stem, inner)
    assert small.head.in_features == stem
    assert type(small) is Residual
    assert "in_features" in repr(small.head)


def test_parameters_keep_requires_grad_memory_format_and_mode(traced):
    model, layout = traced
    model.train()
    model.inner[0].weight.requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    small = ato.shrink(model, layout, random_mask(layout))
    assert small.training
    assert not small.inner[0].weight.requires_grad and small.outer[0].weight.requires_grad
    assert small.outer[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_full_mask_changes_no_shape(traced):
    model, layout = traced
    small = ato.shrink(model, layout, torch.ones(layout.n_groups))
    assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]


def test_a_shrunk_model_can_be_traced_and_shrunk_again(traced):
    model, layout = traced
    model.eval()
    first = random_mask(layout, 1, keep=0.8)
    ato.zero_(model, layout, first)
    small = ato.shrink(model, layout, first)
    again = ato.trace(small, (X,), scope="all")
    second = random_mask(again, 2)
    ato.zero_(small, again, second)
    smaller = ato.shrink(small, again, second)
    assert (small(X) - smaller(X)).abs().max() <= 1e-5 * small(X).abs().max()
    kept = smaller.ato_recipe["inner.0.weight"]["keep"]["0"]
    survivors = torch.arange(6)[first[layout.gate("inner.0").span]]
    assert kept == survivors[second[again.gate("inner.0").span]].tolist()


def test_shrunk_model_trains():
    model = torchvision.models.resnet18(weights=None, num_classes=4)
    x = torch.randn(4, 3, 32, 32)
    layout = ato.trace(model, (x,), scope="all")
    small = ato.shrink(model, layout, random_mask(layout)).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(small(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_layout_of_another_model_is_refused(traced):
    _, layout = traced
    mask = torch.ones(layout.n_groups)
    for function in (ato.shrink, ato.zero_):
        with pytest.raises(ValueError, match="not this model's, 'stem.0.weight' is missing"):
            function(Plain(), layout, mask)
    wider = Residual()
    wider.head = nn.Linear(8, 6)
    with pytest.raises(ValueError, match=r"head.weight has shape \(6, 8\)"):
        ato.shrink(wider, layout, mask)


def test_bad_masks_are_refused(traced):
    model, layout = traced
    with pytest.raises(ValueError, match=r"mask: expected shape"):
        ato.shrink(model, layout, torch.ones(3))
    with pytest.raises(TypeError, match="mask: expected a tensor or array, got str"):
        ato.shrink(model, layout, "abc")
    with pytest.raises(TypeError, match="layout: expected a GroupLayout, got NoneType"):
        ato.shrink(model, None, torch.ones(3))
    with pytest.raises(ValueError, match="drops all 8 channels of gate stem.0"):
        ato.zero_(model, layout, torch.zeros(layout.n_groups))
