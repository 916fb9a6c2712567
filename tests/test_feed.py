"""Data for the controller: the split, and positions that can be resumed."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ato_fast.methods.feed import Feed, hold_out


def test_hold_out():
    data = TensorDataset(torch.arange(200))
    train_part, held = hold_out(data, 0.05, seed=1)
    assert (len(train_part), len(held)) == (190, 10)
    assert sorted(train_part.indices + held.indices) == list(range(200))
    assert hold_out(data, 0.05, seed=1)[1].indices == held.indices
    assert hold_out(data, 0.05, seed=2)[1].indices != held.indices
    assert len(hold_out(TensorDataset(torch.arange(3)), 0.05)[1]) == 1
    for fraction in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match="fraction: expected a share"):
            hold_out(data, fraction)
    with pytest.raises(ValueError, match="at least 2 examples"):
        hold_out([0], 0.5)
    with pytest.raises(TypeError, match="dataset: expected one with a length, got generator"):
        hold_out(x for x in range(3))
    with pytest.raises(TypeError, match=r"fraction: expected a number in \(0, 1\), got 'a'"):
        hold_out(data, "a")


def batches(feed, data, n):
    return [feed.next(data)[0].tolist() for _ in range(n)]


@pytest.mark.parametrize("own_generator", [False, True])
def test_feed_resumes_anywhere(own_generator):
    def data():
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return DataLoader(
            TensorDataset(torch.arange(10)), batch_size=3, shuffle=True, generator=generator
        )

    whole = batches(Feed(0), data(), 12)
    assert sorted(sum(whole[:4], [])) == list(range(10))
    assert whole[:4] != whole[4:8]
    for position in range(12):
        feed = Feed(0)
        source = data()
        assert batches(feed, source, position) == whole[:position]
        resumed = Feed(0)
        resumed.load_state_dict(feed.state_dict())
        # A generator that others have used since must not matter.
        other = data()
        if own_generator:
            other.generator.manual_seed(77)
            if resumed.state_dict()["opened"] is None or position % 4 == 0:
                other.generator.set_state(source.generator.get_state())
        torch.rand(3)
        assert batches(resumed, other, 12 - position) == whole[position:]


def test_feed_does_not_touch_the_global_generator():
    data = DataLoader(TensorDataset(torch.arange(10)), batch_size=3, shuffle=True)
    before = torch.get_rng_state()
    batches(Feed(0), data, 9)
    assert torch.equal(torch.get_rng_state(), before)


def test_feed_needs_batches():
    with pytest.raises(ValueError, match="it gave no batch"):
        Feed(0).next([])
    feed, once = Feed(0), iter([1, 2])
    assert [feed.next(once), feed.next(once)] == [1, 2]
    with pytest.raises(ValueError, match="iterated again and again"):
        feed.next(once)
    shorter = Feed(0)
    shorter.load_state_dict({"passes": 0, "index": 3, "opened": None})
    with pytest.raises(ValueError, match="saved position is batch 3.*ends after 2"):
        shorter.next([1, 2])
