"""What calls of the fused masked forward leave behind, and what one call is to the next."""

import gc
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from fused_nets import (
    LIFTED,
    MASK,
    Custom,
    Net,
    X,
    assert_close,
    loss,
    made,
    ours,
    score,
)  # fmt: skip

from ato_fast.budget import Budget
from ato_fast.gates import Gates
from ato_fast.methods.search import Search
from ato_fast.trace import trace
from nets import randomise_norms


def test_calls_within_calls():
    model, layout = made(Net())
    outcomes = []
    for followers in (layout.followers, {}):
        gates = Gates(model, replace(layout, followers=followers))

        def nested(m, gates=gates):
            before = loss(m)
            return before + gates.value_and_grad(LIFTED, lambda m: score(m(X * 0.5)))[0]

        outcomes.append(gates.value_and_grad(LIFTED, nested))
    assert_close(*outcomes)


def test_a_bank_of_features_over_calls(calls):
    """What one call keeps, the next reads."""

    class Bank(Net):
        def forward(self, x):
            seen = getattr(self, "seen", None)
            self.seen = self.bn1(self.conv1(x))
            out = self.head(torch.tanh(self.bn2(self.conv2(self.act(self.seen))) + x).mean((2, 3)))
            return out if seen is None else out + seen.detach().mean()

    outcomes = []
    _, layout = made(Net())
    for followers in (layout.followers, {}):
        torch.manual_seed(5)
        model = randomise_norms(Bank().double())
        gates = Gates(model, replace(layout, followers=followers))
        outcomes.append([gates.value_and_grad(LIFTED, loss)[0] for _ in range(3)])
    assert "relu" in calls
    assert_close(*outcomes)


def live_tensors():
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@pytest.mark.parametrize("kind", ["fits", "custom", "raises"])
def test_nothing_stays_in_memory(kind):
    """Without the garbage collector, whose turn may be late."""
    model = randomise_norms((Custom if kind == "custom" else Net)().double())
    gates = Gates(model, made(Net())[1])

    def fn(m):
        value = loss(m)
        if kind == "raises":
            # No error is being handled, which would keep what the first attempt left.
            assert sys.exc_info() == (None, None, None)
            raise KeyError("planted")
        return value

    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            with pytest.raises(KeyError) if kind == "raises" else nullcontext():
                gates.value_and_grad(MASK, fn)
            gates.unfit.clear()
            counts.append(live_tensors())
    finally:
        gc.enable()
    assert counts[1:] == counts[1:2] * 3


def test_layers_found_unfit_on_one_rank_are_unfit_on_all():
    model, layout = made(Net())
    mine, other = Gates(model, layout), Gates(model, layout)
    other.unfit = {"conv2.weight"}
    mean = [(a + b) / 2 for a, b in zip(mine.flags(), other.flags(), strict=True)]
    for gates in (mine, other):
        gates.take_flags(mean)
        assert gates.unfit == {"conv2.weight"}


def test_inference_mode():
    model, layout = made(Net())
    gates = Gates(model, layout)
    with torch.inference_mode(), pytest.raises(ValueError, match="under torch.inference_mode"):
        gates.value_and_grad(MASK, loss)
    assert_close(gates.value_and_grad(MASK, loss), ours(model, layout))


def test_what_was_found_out_is_part_of_a_runs_state():
    model = randomise_norms(Net())
    layout = trace(model, (X.float(),))
    search = Search(model, layout, Budget(macs=0.5))
    search.gates.unfit = {"bn1.weight"}
    again = Search(model, layout, Budget(macs=0.5))
    again.load_state_dict(search.state_dict())
    assert again.gates.unfit == {"bn1.weight"}
    again.follow(model, layout, torch.ones(8, dtype=torch.bool))
    assert again.gates.unfit == {"bn1.weight"}


def test_an_error_of_the_model_is_its_own(calls):
    model, layout = made(Net())
    gates, runs = Gates(model, layout), []

    def fails(m):
        runs.append(loss(m))
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        gates.value_and_grad(MASK, fails)
    # The second time with nothing fused, to know whose error it is.
    assert len(runs) == 2 and calls == ["relu", "fold"]
    assert not gates.unfit
