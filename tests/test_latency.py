"""Latency tables: what is measured, and what is estimated from it. One fake clock for all."""

import copy
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from timed import (
    X,
    chain,
    conv_ms,
    fake_clock,
    first,
    prepared,
    random_table,
)
from torch import nn

import ato_fast as ato
from ato_fast import stopwatch
from ato_fast.budget import Budget
from ato_fast.controller import resource_loss
from ato_fast.latency import LatencyTable, Timed, falling, layout_digest, whole_curve
from ato_fast.stopwatch import Stopwatch, measured_widths
from nets import chain_layout
from runs import EXAMPLE, Net, one_thread


@pytest.fixture(autouse=True)
def single():
    with one_thread():
        yield


@pytest.fixture
def clock(monkeypatch):
    return fake_clock(monkeypatch)


def test_a_gates_curve_is_what_cutting_it_saves(clock):
    model = chain(3, 40, 60, 8)
    budget, layout = prepared(model)
    table, dense = budget.table_of(layout), conv_ms(model)
    assert table.dense_ms == dense and table.gates == tuple(g.name for g in layout.gates)
    for gate, widths, saved in zip(layout.gates, table.widths, table.saved, strict=True):
        assert widths == (*measured_widths(layout, gate, stopwatch.GATE_FRACTIONS), gate.n)
        assert widths[0] == 1 and set(widths) <= set(layout.widths(gate))
        for width, share in zip(widths, saved, strict=True):
            mask = torch.ones(layout.n_groups, dtype=torch.bool)
            mask[gate.offset + width : gate.offset + gate.n] = False
            assert share == pytest.approx(1 - conv_ms(ato.shrink(model, layout, mask)) / dense)


def test_savings_do_not_add_up_but_the_whole_curve_is_right(clock):
    """The middle layer between the shares a and b costs a b: the sum of savings is too much."""
    model = chain(3, 40, 40, 3)
    budget, layout = prepared(model)
    table = budget.table_of(layout)
    for share in stopwatch.WHOLE_FRACTIONS:
        widths = [max(1, round(share * gate.n)) for gate in layout.gates]
        mask = first(layout, *widths)
        true = conv_ms(ato.shrink(model, layout, mask))
        saved = sum(
            np.interp(w, *curve)
            for w, *curve in zip(widths, table.widths, table.saved, strict=True)
        )
        assert budget.cost(layout, mask) == pytest.approx(true)
        if share < 0.7:
            assert (1 - saved) * table.dense_ms < 0.9 * true


def test_alike_gates_are_cut_together_and_share_what_that_saves(clock):
    """Two gates of the same layers that do not touch; every table entry is one gate's."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

        def forward(self, x):
            y = torch.relu(self.norms[0](self.a(x)))
            return torch.relu(x + self.norms[1](self.b(y)))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block(), Block(), Block())
    layout = ato.trace(model, X)
    assert len(layout.gates) == 3
    seen = []
    clock(lambda network, *_: seen.append(network[1].a.out_channels) or conv_ms(network))
    budget, layout = prepared(model, layout)
    table = budget.table_of(layout)
    assert len(set(table.saved)) == 1
    mask = first(layout, 1, 8, 8)
    assert table.saved[0][0] == pytest.approx(
        1 - conv_ms(ato.shrink(model, layout, mask)) / conv_ms(model)
    )
    # One kind of gates, and all together: five rounds and one to warm up.
    n_networks = len(table.widths[0]) - 1 + 1 + len(stopwatch.WHOLE_FRACTIONS)
    assert len(seen) == 6 * n_networks + 5 * 2 and table.n_forwards == 5 * (n_networks + 2)


def test_drift_of_the_machine_cancels(clock, monkeypatch):
    """The machine gets slower by a thousandth with every pass; in one round only that is seen."""
    model = chain(3, 40, 60, 8)
    calm, layout = prepared(model)
    monkeypatch.setattr(stopwatch, "MOST_ROUNDS", 20)
    drift, calls = 1e-3, itertools.count()
    clock(lambda network, *_: conv_ms(network) * (1 + drift) ** next(calls))
    drifting, _ = prepared(model, layout)
    tables = drifting.table_of(layout), calm.table_of(layout)
    for widths, *saved in zip(tables[1].widths, *(table.saved for table in tables), strict=True):
        most = (1 + drift) ** len(widths) - 1
        assert saved[0] == pytest.approx(saved[1], abs=most)


def test_noise_leaves_a_monotone_table(clock):
    noise = np.random.default_rng(0)
    clock(lambda network, *_: conv_ms(network) * noise.lognormal(0, 0.5))
    budget, layout = prepared(chain(3, 20, 30, 40, 8))
    table = budget.table_of(layout)  # its constructor checks that curves are monotone
    assert all(
        later < earlier for earlier, later in zip(table.ratio, table.ratio[1:], strict=False)
    )
    costs = [budget.cost(layout, first(layout, n, n, n, 2)) for n in range(1, 21)]
    assert costs == sorted(costs)


def test_falling_and_whole_curve():
    assert falling([3, 1, 2, 0]) == [3, 1.5, 1.5, 0]
    assert falling([1, 2, 6]) == [3, 3, 3]
    assert falling([]) == []
    total, ratio = whole_curve([0.8, 0.4, 0.4, 0.0], [0.3, 0.5, 0.7, 1.2])
    assert total == (0, 0.4, 0.8) and ratio == (1, 0.6, 0.3)
    total, ratio = whole_curve([0.5, 1.0], [1.3, 1.2])
    assert total == (0, 0.5, 1) and 1 > ratio[1] > ratio[2] > 0.999
    assert whole_curve([0.0, 0.0], [1.1, 0.9]) == ((0.0,), (1.0,))


def test_gradient_of_the_estimate():
    """Of soft masks, also below the smallest width measured; in float64 against differences."""
    layout = chain_layout((8, 12, 6))
    price = Timed(layout, random_table(layout))
    generator = torch.Generator().manual_seed(1)
    for scale in (1.0, 0.5, 0.02):
        mask = scale * torch.rand(26, generator=generator, dtype=torch.float64)
        assert torch.autograd.gradcheck(price, mask.requires_grad_())
        assert torch.autograd.gradcheck(
            lambda m: resource_loss(price(m) / price.dense_ms, 0.1), mask, eps=1e-7
        )
        assert price(mask) > 0 and price(mask).shape == ()
    full = torch.ones(26, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(price(full), full)
    # The kept groups of a gate are alike, and keeping more never makes it faster.
    for gate in layout.gates:
        assert (gradient[gate.span] == gradient[gate.offset]).all() and gradient[gate.offset] >= 0
    assert gradient.sum() > 0 and price(full).item() == 8.0
    with pytest.raises(ValueError, match=r"mask: expected shape \(26,\)"):
        price(full[1:])


def test_hard_and_soft_masks_agree():
    layout = chain_layout((8, 12, 6))
    price = Timed(layout, random_table(layout))
    for seed in range(5):
        mask = torch.rand(26, generator=torch.Generator().manual_seed(seed)) < 0.5
        assert price.of(mask) == price(mask.double()).item() == price(mask.float()).item()


def test_measuring_leaves_the_model_as_it_was():
    model = Net()
    model.body[1].eval()
    nn.functional.cross_entropy(model(EXAMPLE[0]), torch.tensor([0, 1])).backward()
    model.fc.bias.requires_grad_(False)
    layout = ato.trace(model, EXAMPLE)
    before = copy.deepcopy(model.state_dict())
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    tensors = {id(t): t._version for t in model.state_dict(keep_vars=True).values()}

    def draws(*arguments):
        torch.rand(1), np.random.rand(), random.random()
        return stopwatch_sample(*arguments)

    stopwatch_sample = stopwatch.sample_ms
    budget = Budget(latency=0.9, example=EXAMPLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopwatch, "sample_ms", draws)
        patch.setattr(stopwatch, "SECONDS", 0.2)
        patch.setattr(stopwatch, "COMPARE_SECONDS", 0.1)
        budget.prepare(model, layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            budget._measured.verify(layout, 1e-9, 0.0, lambda _: first(layout, 4, 4, 4))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert tensors == {id(t): t._version for t in model.state_dict(keep_vars=True).values()}
    for name, parameter in model.named_parameters():
        same = parameter.grad is grads[name] is None or torch.equal(parameter.grad, grads[name])
        assert same
    assert modes == [m.training for m in model.modules()]
    assert not model.fc.bias.requires_grad and model.fc.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1] == generators[1]).all() and random.getstate() == generators[2]


def test_the_networks_that_are_timed():
    """Weights of the same scale and the same small tensors, in eval mode, no gradients."""
    torch.manual_seed(0)
    model = chain(3, 40, 60, 8)
    model[1].running_mean.fill_(3.0)
    layout = ato.trace(model, X)
    watch = Stopwatch(model, layout, X)
    assert all(p.is_meta for p in watch._model.parameters() if p.dim() > 1)
    dense = watch.dense()
    for name, now in dense.state_dict().items():
        then = model.state_dict()[name]
        if then.dim() > 1:
            assert not torch.equal(now, then)
            # The standard error of a deviation from n values is about 1 / sqrt(2 n) of it.
            limit = 5 * float(then.std()) / (2 * then.numel()) ** 0.5
            assert abs(float(now.std() - then.std())) < limit
        else:
            assert torch.equal(now, then)
    assert not any(m.training for m in dense.modules())
    # A forward pass may write to its inputs.
    assert torch.equal(watch.inputs[0], X[0]) and watch.inputs[0].data_ptr() != X[0].data_ptr()
    small = ato.shrink(dense, layout, first(layout, 3, 4, 5))
    assert small(*X).shape == (2, 3)


def test_save_and_load(clock, tmp_path):
    model = chain(3, 20, 30, 8)
    budget, layout = prepared(model)
    table = budget.table_of(layout)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    clock(None)
    for given in (table, tmp_path / "table.json", str(tmp_path / "table.json")):
        other, _ = prepared(model, layout, table=given)
        assert other.table_of(layout) == table
    with pytest.raises(ValueError, match="belongs to another layout .3 gates; this one has 2"):
        prepared(chain(3, 20, 30), table=table)
    with pytest.raises(ValueError, match="example '2x3x6x6 float32', this is '4x3x6x6 float32'"):
        prepared(model, layout, table=table, example=(torch.zeros(4, 3, 6, 6),))
    state = table.state()
    other = LatencyTable.from_state({**state, "device": "NVIDIA H100"})
    with pytest.raises(ValueError, match="device 'NVIDIA H100', this is"):
        prepared(model, layout, table=other)
    for broken in (
        {**state, "saved": state["saved"][1:]},
        {**state, "ratio": [1.0, *state["ratio"][:0:-1]]},
        {**state, "dense_ms": -1.0},
        {**state, "dense_ms": "fast"},
        {**state, "version": 2},
        {k: v for k, v in state.items() if k != "total"},
        {"format": "another"},
        [],
    ):
        with pytest.raises(ValueError, match="latency table"):
            LatencyTable.from_state(broken)
    (tmp_path / "text").write_text("no table")
    with pytest.raises(ValueError, match="text: not JSON"):
        Budget(latency=0.5, table=tmp_path / "text")
    with pytest.raises(OSError):
        Budget(latency=0.5, table=tmp_path / "nothing")


def test_the_same_gates_with_other_layers_are_another_layout():
    """Kernel and image size decide the latency, not only which channels belong together."""
    layouts = []
    for kernel, size in ((3, 6), (5, 6), (3, 12)):
        model = nn.Sequential(
            nn.Conv2d(3, 8, kernel, padding=kernel // 2), nn.ReLU(), nn.Conv2d(8, 4, 3)
        )
        layouts.append(ato.trace(model, (torch.zeros(2, 3, size, size),)))
    assert len({layout.sha256 for layout in layouts}) == 1
    assert len({layout_digest(layout) for layout in layouts}) == 3
