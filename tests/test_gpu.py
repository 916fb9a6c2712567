"""What only a CUDA device can show: graphs, streams, no waiting, indices beyond 32 bits."""

import copy

import pytest
import torch
from torch import nn

import ato_fast as ato
from ato_fast import backend
from ato_fast.groups import GroupLayout
from numerics import assert_same_bits
from samples import VARIANTS, every_layout, layout_of, random_mask, set_grads

pytestmark = pytest.mark.gpu

SERVED = ["cuda", "triton"]


@pytest.fixture(params=SERVED)
def served(request, monkeypatch):
    """Force a backend."""
    monkeypatch.setenv(backend.VARIABLE, request.param)
    return request.param


def _problem(make, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()
    ).cuda()
    x = torch.randn(4, 3, 10, 10, device="cuda")
    layout = ato.trace(model, (x,))
    optimizer = make(model, layout)
    mask = torch.ones(layout.n_groups)
    mask[::2] = 0
    return model, optimizer, mask, x


MAKERS = {
    "sgd": lambda m, layout, lr: ato.SGD(m, layout, lr=lr, momentum=0.9),
    "adamw": lambda m, layout, lr: ato.AdamW(m, layout, lr=lr, projection=ato.HalfSpace()),
    "adam": lambda m, layout, lr: ato.Adam(m, layout, lr=lr, projection=ato.DHSPG()),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_captured_training_step_follows_the_eager_one(make, served):
    """Forward, backward and step in one graph; masks, strengths and lr change between replays."""
    results = []
    for captured in (False, True):
        lr = torch.tensor(0.01, device="cuda")
        model, optimizer, mask, x = _problem(lambda m, layout, lr=lr: make(m, layout, lr))

        def train_step(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                train_step()
        torch.cuda.current_stream().wait_stream(side)
        run = train_step
        if captured:
            optimizer.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                train_step()
            run = graph.replay
        for step in range(6):
            if step == 2:
                optimizer.set_mask(mask, threshold=0.05)
            if step == 4:
                lr.fill_(0.002)
                optimizer.set_strength(threshold=0.1)
            run()
        assert all(s["step"].item() == 9 for s in optimizer.state.values())
        results.append([p.detach().clone() for p in model.parameters()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_step_waits_for_nothing(make, served):
    model, optimizer, mask, x = _problem(lambda m, layout: make(m, layout, 0.01))
    optimizer.set_mask(mask, threshold=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (0.02, 0.03):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used(served):
    """Behind a long kernel on a side stream, the step must come after the gradient it reads."""
    results = []
    for side in (torch.cuda.current_stream(), torch.cuda.Stream()):
        model = every_layout().cuda()
        optimizer = VARIANTS[-1](model, layout_of(model))
        optimizer.set_mask(random_mask(optimizer.layout), threshold=0.2)
        set_grads(model, 0)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            for param in model.parameters():
                param.grad.mul_(2.0)
            optimizer.step()
        torch.cuda.synchronize()
        results.append([p.detach().clone() for p in model.parameters()])
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("projection", [None, ato.Prox(), ato.HalfSpace(), ato.DHSPG()])
def test_triton_follows_the_reference(variant, projection, monkeypatch):
    results = []
    for name in ("triton", "reference"):
        monkeypatch.setenv(backend.VARIABLE, name)
        model = every_layout().cuda()
        optimizer = variant(model, layout_of(model), projection=projection)
        optimizer.set_mask(random_mask(optimizer.layout), threshold=0.3)
        for step in range(3):
            set_grads(model, step)
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_elements_beyond_32_bits(served):
    """A buffer of more than 2^31 elements; the last rows are dropped, updated and right."""
    rows, columns = 40_000, 54_000
    if torch.cuda.mem_get_info()[0] < 2.2 * 4 * rows * columns:
        pytest.skip("needs 20 GB of free device memory")
    model = nn.Linear(columns, rows, bias=False, device="cuda")
    with torch.no_grad():
        model.weight.fill_(1.0)
    model.weight.grad = torch.ones_like(model.weight)
    part = ato.Slice("weight", 0, torch.arange(rows).numpy(), "row")
    layout = GroupLayout(
        gates=(ato.Gate("rows", rows, (part,), 0),),
        unprunable=(),
        shapes={"weight": (rows, columns)},
        parameters=("weight",),
        mac_terms=(),
    )
    optimizer = ato.SGD(model, layout, lr=0.25)
    mask = torch.ones(rows)
    mask[-1] = mask[-3] = 0
    optimizer.set_mask(mask, threshold=float("inf"))
    optimizer.step()
    assert model.weight.numel() > 2**31
    expected = [0.75, 0.0, 0.75, 0.0]
    for row, value in zip((-4, -3, -2, -1), expected, strict=True):
        assert (model.weight[row] == value).all()
    assert (model.weight[0] == 0.75).all() and int(optimizer.n_zero()) == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_parameters_device_is_used_whatever_the_current_one(served):
    model = every_layout().to("cuda:1")
    other = copy.deepcopy(model).to("cuda:0")
    for net in (model, other):
        optimizer = VARIANTS[-1](net, layout_of(net))
        optimizer.set_mask(random_mask(optimizer.layout), threshold=0.2)
        set_grads(net, 0)
        optimizer.step()
    for got, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(got.detach().cpu(), expected.detach().cpu())
