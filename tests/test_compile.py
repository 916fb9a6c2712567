"""A compiled training loop may call ``step``: it runs outside the graph and gives the same bits."""

import copy

import pytest
import torch
from torch import nn

import ato_fast as ato
from numerics import assert_same_bits

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(5))


def _trained(make, compiled, steps=4):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten()
    )
    layout = ato.trace(model, (X,))
    optimizer = make(model, layout)
    mask = torch.ones(layout.n_groups)
    mask[::2] = 0
    optimizer.set_mask(mask, threshold=0.02)

    def train_step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    run = torch.compile(train_step, backend="aot_eager") if compiled else train_step
    losses = [run(X).detach() for _ in range(steps)]
    return copy.deepcopy(model.state_dict()), torch.stack(losses), optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda m, layout: ato.SGD(m, layout, lr=0.05, momentum=0.9),
        lambda m, layout: ato.AdamW(m, layout, lr=0.01),
        lambda m, layout: ato.AdamW(m, layout, lr=torch.tensor(0.01), projection=ato.DHSPG()),
    ],
)
def test_a_compiled_loop_follows_the_eager_one(make):
    torch._dynamo.reset()
    got, losses, optimizer = _trained(make, compiled=True)
    expected, eager_losses, _ = _trained(make, compiled=False)
    torch.testing.assert_close(losses, eager_losses, rtol=1e-5, atol=1e-6)
    assert losses[-1] < losses[0]
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    assert all(s["step"] == 4 for s in optimizer.state.values() if "step" in s)


def test_compiling_step_itself_changes_no_bit():
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        optimizer = ato.AdamW(model, ato.trace(model, (torch.randn(2, 6),)), lr=0.01)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(3):
            for param in model.parameters():
                param.grad = torch.full_like(param, 0.1 * (i + 1))
            step()
        results.append([p.detach().clone() for p in model.parameters()])
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)
