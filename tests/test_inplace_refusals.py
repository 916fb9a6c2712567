"""What `shrink_` refuses: nothing is cut where something would be lost; all is as it was."""

from functools import partial

import pytest
import torch
from cuts import SGD, loss_of, plain, step, whole
from torch import nn

import ato_fast as ato
from nets import random_mask


@pytest.fixture
def made():
    model, x = plain()
    layout = ato.trace(model, (x[:2],))
    return model, x, layout, random_mask(layout)


def unchanged(model, action, error, match):
    before = whole(model.state_dict().items())
    with pytest.raises(error, match=match):
        action()
    assert torch.equal(before, whole(model.state_dict().items()))


def test_groups_that_are_not_zero(made):
    model, _, layout, mask = made
    n = int((~mask).sum())
    match = f"{n} of {n} dropped groups are not zero, the first is channel"
    unchanged(model, lambda: ato.shrink_(model, layout, mask), ValueError, match)


def test_one_entry_left(made):
    model, _, layout, mask = made
    ato.zero_(model, layout, mask)
    gate = layout.gates[1]
    at = int((~mask[gate.span]).nonzero()[0])
    model.b[1].bias.data[at] = 1e-30
    match = f"1 of .* the first is channel {at} of gate {gate.name}"
    unchanged(model, lambda: ato.shrink_(model, layout, mask), ValueError, match)


def test_an_optimizer_of_another_layout(made):
    model, _, layout, mask = made
    ato.zero_(model, layout, mask)
    other = SGD(model, ato.trace(model, (torch.zeros(2, 3, 8, 8),), ignore=["a.0"]))
    action = partial(ato.shrink_, model, layout, mask, optimizer=other)
    unchanged(model, action, ValueError, "optimizer: it was made with another layout")


def test_an_optimizer_of_another_model(made):
    model, _, layout, mask = made
    ato.zero_(model, layout, mask)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    action = partial(ato.shrink_, model, layout, mask, optimizer=other)
    unchanged(model, action, ValueError, "optimizer: it steps no parameter of this model")


def test_state_that_is_not_shaped_like_its_parameter(made):
    model, x, layout, mask = made
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, x)
    ato.zero_(model, layout, mask)
    action = partial(ato.shrink_, model, layout, mask, optimizer=optimizer)
    unchanged(model, action, ValueError, "Adafactor cannot be cut")


def test_something_else_as_optimizer(made):
    model, _, layout, mask = made
    ato.zero_(model, layout, mask)
    action = partial(ato.shrink_, model, layout, mask, optimizer="sgd")
    unchanged(model, action, TypeError, "optimizer: expected a torch.optim.Optimizer")


def test_the_model_as_its_own_average(made):
    model, _, layout, mask = made
    ato.zero_(model, layout, mask)
    action = partial(ato.shrink_, model, layout, mask, ema=model)
    unchanged(model, action, ValueError, "ema: it is the model itself")


def test_an_optimizer_that_was_not_told_of_the_cut_says_so(made):
    model, x, layout, mask = made
    optimizer = SGD(model, layout)
    ato.zero_(model, layout, mask)
    ato.shrink_(model, layout, mask)
    loss_of(model, x).backward()
    with pytest.raises(RuntimeError, match="no longer lives in the optimizer's flat buffer"):
        optimizer.step()


def test_a_mask_that_keeps_everything_changes_nothing(made):
    model, _, layout, _ = made
    before = [p.data_ptr() for p in model.parameters()]
    assert ato.shrink_(model, layout, torch.ones(layout.n_groups)) is layout
    assert before == [p.data_ptr() for p in model.parameters()]
