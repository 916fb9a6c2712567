"""Kernels one by one, for a quick look at a change: ``make bench``. CPU, one model, warm caches.

Comparisons that are published come from `benchmarks.run`, which interleaves.
"""

import pytest
import torch
import torch.nn.functional as F

import ato_fast as ato
from ato_fast.controller import Controller
from ato_fast.masked import masked_bn_act

from . import cases, contenders
from .contenders import HYPER, OURS, SHRINK

PROJECTIONS = {"none": None, "prox": ato.Prox(), "half_space": ato.HalfSpace()}


@pytest.fixture(scope="module")
def case():
    """3.5 M parameters in 158 tensors: seconds for all, and depthwise rows of 9 elements."""
    return cases.load("mobilenet_v2", "stored")


@pytest.fixture(scope="module")
def start(case):
    """Parameters and gradients all start from."""
    return cases.values(case, torch.device("cpu"), torch.float32)


@pytest.fixture
def keep(case):
    """Mask that drops every other group."""
    return torch.arange(case.layout.n_groups) % 2 == 0


def timed(benchmark, step):
    """Run the step often enough for a steady median."""
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(step, rounds=60, warmup_rounds=5)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("optimizer", OURS)
def test_step(benchmark, case, start, keep, optimizer, projection):
    """Ours with each projection."""
    benchmark.group = f"step {optimizer} mobilenet_v2, half of the groups dropped"
    model = cases.bare_model(start)
    made = OURS[optimizer](
        model, case.layout, projection=PROJECTIONS[projection], **HYPER[optimizer]
    )
    lam = SHRINK / HYPER[optimizer]["lr"]
    made.set_mask(keep, lam * contenders.shares(case.layout, keep))
    timed(benchmark, made.step)
    assert not int(made.n_zero())


@pytest.mark.parametrize("name", ["fused", "foreach", "fused+per_layer"])
@pytest.mark.parametrize("optimizer", OURS)
def test_torch(benchmark, case, start, keep, optimizer, name):
    """torch.optim without projection, and with one layer by layer."""
    benchmark.group = f"step {optimizer} mobilenet_v2, half of the groups dropped"
    contender = contenders.torchs(name, case, start, optimizer, torch.float32)
    if contender.projects:
        contender.set_mask(keep, SHRINK / HYPER[optimizer]["lr"])
    timed(benchmark, contender.step)


@pytest.mark.parametrize("optimizer", OURS)
def test_step_of_tiny_tensors(benchmark, case, optimizer):
    """What a step costs besides the arithmetic."""
    benchmark.group = f"step {optimizer}, tensors of 1 to 4 elements"
    small = cases.shrunk(case)
    values = cases.values(small, torch.device("cpu"), torch.float32)
    made = OURS[optimizer](cases.bare_model(values), small.layout, **HYPER[optimizer])
    timed(benchmark, made.step)


def test_group_norms(benchmark, case, start):
    """Norms of all groups."""
    benchmark.group = "group_norms mobilenet_v2"
    made = ato.SGD(cases.bare_model(start), case.layout)
    timed(benchmark, made.group_norms)
    assert made.group_norms().shape == (case.layout.n_groups,)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("route", ["ours", "eager"])
def test_masked_bn_act(benchmark, route, memory_format):
    """Norm, ReLU and gate of a feature map of ResNet-50, forward and backward."""
    benchmark.group = f"masked_bn_act, 8x256x28x28, {memory_format}"
    x = torch.randn(8, 256, 28, 28).contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn_like(x)
    gate = torch.rand(256, requires_grad=True)
    scale, shift = torch.rand(256), torch.randn(256)
    mean, var = torch.zeros(256), torch.ones(256)

    def forward():
        if route == "ours":
            return masked_bn_act(x, gate, scale, shift, "relu")
        y = F.batch_norm(x, mean, var, scale, shift, False, 0.0, 0.0)
        return torch.relu(y) * gate.view(1, -1, 1, 1)

    timed(benchmark, lambda: torch.autograd.grad(forward(), (x, gate), grad))


def test_controller(benchmark, case):
    """Mask, its gradient and the controller's optimizer step."""
    benchmark.group = "controller mobilenet_v2"
    controller = Controller([gate.n for gate in case.layout.gates])
    optimizer = controller.optimizer()
    slope = torch.randn(controller.n_groups)

    def step():
        optimizer.zero_grad()
        controller.sample().backward(slope)
        optimizer.step()

    timed(benchmark, step)
