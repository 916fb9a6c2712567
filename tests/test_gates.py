"""The masked forward against gates on feature maps, and what it must leave alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ato_fast.gates import Gates
from ato_fast.trace import trace


class Chain(nn.Module):
    """conv-BN-ReLU twice, then a convolution with bias and ReLU, then a linear layer.

    ``gates`` multiplies the feature maps after each ReLU, as published.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.conv3 = nn.Conv2d(5, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x, gates=None):
        gates = gates or [torch.ones(n, dtype=x.dtype) for n in (6, 5, 4)]
        x = torch.relu(self.bn1(self.conv1(x))) * gates[0].view(1, -1, 1, 1)
        x = torch.relu(self.bn2(self.conv2(x))) * gates[1].view(1, -1, 1, 1)
        x = torch.relu(self.conv3(x)) * gates[2].view(1, -1, 1, 1)
        return self.fc(self.drop(x).mean((2, 3)))


class Plain(Chain):
    """The same network without gates, which is what a user has."""

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.conv3(x))
        return self.fc(self.drop(x).mean((2, 3)))


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Plain().double()
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.1, 1)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    layout = trace(model, (x,))
    assert [gate.n for gate in layout.gates] == [6, 5, 4]
    return model, layout, x


MASKS = {
    "ones": torch.ones(15),
    "soft": torch.linspace(0.05, 1, 15),
    "hard": torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1.0]),
    "mixed": torch.tensor([1, 0, 0.5, 1, 0, 1e-3, 0, 1, 1, 0.2, 1, 0, 0, 0.9, 1]),
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_gates_on_feature_maps(case, name):
    model, layout, x = case
    target = torch.tensor([0, 1, 2, 0])
    ours = MASKS[name].double().requires_grad_()
    output = Gates(model, layout)(ours, lambda m: m(x))
    (gradient,) = torch.autograd.grad(F.cross_entropy(output, target), ours)

    reference = Chain().double()
    reference.load_state_dict(model.state_dict())
    reference.eval()
    theirs = MASKS[name].double().requires_grad_()
    expected = reference(x, theirs.split([6, 5, 4]))
    (expected_gradient,) = torch.autograd.grad(F.cross_entropy(expected, target), theirs)

    assert expected_gradient.abs().min() > 0
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def test_dropped_groups_get_a_gradient_in_float32(case):
    model, layout, x = case
    model.float()
    mask = torch.zeros(15, requires_grad=True)
    with torch.no_grad():
        mask[[0, 7, 11]] = 1
    loss = Gates(model, layout)(mask, lambda m: m(x.float()).square().sum())
    (gradient,) = torch.autograd.grad(loss, mask)
    assert (gradient[:6] != 0).all()


def test_bool_mask_is_exact(case):
    model, layout, x = case
    mask = MASKS["hard"].bool()
    with torch.no_grad():
        output = Gates(model, layout)(mask, lambda m: m(x))
        model.bn1.weight.mul_(mask[:6])
        model.bn1.bias.mul_(mask[:6])
        model.bn2.weight.mul_(mask[6:11])
        model.bn2.bias.mul_(mask[6:11])
        model.conv3.weight.mul_(mask[11:].view(-1, 1, 1, 1))
        model.conv3.bias.mul_(mask[11:])
        assert torch.equal(output, model.eval()(x))


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_model_is_left_as_it_was(case):
    model, layout, x = case
    model.train()
    model.bn2.eval()
    modes = [m.training for m in model.modules()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before, seen = snapshot(model), []

    def loss(m):
        assert m is model
        seen.append([module.training for module in m.modules()])
        return m(x).sum()

    mask = torch.rand(15, dtype=torch.float64, requires_grad=True)
    Gates(model, layout)(mask, loss).backward()
    assert seen == [[False] * len(modes)]
    assert mask.grad is not None
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all((p.grad == 3).all() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_modes_and_tensors_are_restored_when_the_closure_raises(case):
    model, layout, x = case
    model.train()
    model.bn1.eval()
    modes = [m.training for m in model.modules()]
    before, parameters = snapshot(model), dict(model.named_parameters())

    def loss(m):
        m(x)
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        Gates(model, layout)(torch.rand(15, dtype=torch.float64), loss)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p is parameters[k] for k, p in model.named_parameters())


def test_mask_of_wrong_size(case):
    model, layout, x = case
    with pytest.raises(ValueError, match=r"mask: expected shape \(15,\).*got \(14,\)"):
        Gates(model, layout)(torch.ones(14), lambda m: m(x))


def test_model_without_the_layouts_tensors(case):
    _, layout, _ = case
    with pytest.raises(ValueError, match="gated tensors that are no parameter: bn1.bias"):
        Gates(nn.Linear(2, 2), layout)
