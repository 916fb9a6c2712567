"""masked_bn_act, the controller's heads and the masked forward on a CUDA device."""

import pytest
import torch
import torch.nn.functional as F
from masked_cases import DTYPES, SHAPES, check, check_gate_mask, check_uniform
from torch import nn

from ato_fast import noise
from ato_fast.controller import Controller
from ato_fast.gates import Gates
from ato_fast.masked import ACTIVATIONS, masked_bn_act
from ato_fast.trace import trace
from nets import Plain, randomise_norms
from numerics import assert_same_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_the_reference(name, dtype):
    for activation in ACTIVATIONS:
        check(name, dtype, activation, "triton", "cuda")


def test_the_noise_has_the_bits_of_the_cpu():
    check_uniform("triton", "cuda")
    cpu, cuda = Controller([40, 60], seed=3), Controller([40, 60], seed=3, device="cuda")
    for _ in range(3):
        torch.testing.assert_close(cuda.noise().cpu(), cpu.noise())


@pytest.mark.parametrize("hard", [True, False])
def test_heads(hard):
    check_gate_mask(hard, "triton", "cuda")


def test_same_bits_on_every_run():
    x, grad = torch.randn(2, 16, 96, 28, 28, device="cuda")
    gate = torch.rand(96, device="cuda", requires_grad=True)
    scale, shift = torch.rand(2, 96, device="cuda")
    x.requires_grad_()
    results = []
    for _ in range(5):
        y = masked_bn_act(x, gate, scale, shift, "silu")
        results.append((y, *torch.autograd.grad(y, (x, gate), grad)))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("last", [False, True])
def test_elements_beyond_32_bits(last):
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free device memory")
    shape = (33, 64, 1024, 1024)
    x = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    if last:
        x = torch.zeros((33, 1024, 1024, 64), device="cuda", dtype=torch.bfloat16).movedim(-1, 1)
    assert x.numel() > 2**31
    x[-1, -1, -1, -5:] = 2.0
    x.requires_grad_()
    gate = torch.full((64,), 0.5, device="cuda", requires_grad=True)
    one, zero = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    y = masked_bn_act(x, gate, one, zero, "relu")
    assert (y[-1, -1, -1, -5:] == 1.0).all() and not y[0].any()
    dx, dgate = torch.autograd.grad(y, (x, gate), torch.ones_like(y))
    assert (dx[-1, -1, -1, -5:] == 0.5).all() and float(dx.double().sum()) == 2.5
    assert dgate[-1] == 10.0 and not dgate[:-1].any()


def test_the_current_stream_is_used():
    x = torch.ones(4, 8, 32, 32, device="cuda")
    gate, scale, shift = (torch.ones(8, device="cuda") for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        y = masked_bn_act(x.mul_(3.0), gate, scale, shift, "relu")
        assert (y == 4).all()


def test_a_captured_draw_reads_its_state_anew():
    state = torch.tensor([5, 0], device="cuda")
    like = torch.empty(100, device="cuda")
    expected = [noise.uniform(like, 5, draw) for draw in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        numbers = noise.uniform(like, 0, 0, state)
        state[1] += 1
    for draw in expected:
        graph.replay()
        assert_same_bits(numbers, draw)


def test_a_controllers_draw_waits_for_nothing():
    controller = Controller([40, 60], device="cuda")
    controller.sample().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        controller.sample().sum().backward()
        controller.noise()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_masked_forward_equals_the_affine_route(memory_format, autocast):
    model = randomise_norms(Plain())
    layout = trace(model, (torch.zeros(2, 3, 8, 8),))
    model = nn.Module.to(model.cuda(), memory_format=memory_format)
    x = torch.randn(8, 3, 16, 16, device="cuda")
    y = torch.arange(8, device="cuda") % 5
    mask = torch.linspace(0.1, 1, layout.n_groups, device="cuda").requires_grad_()
    gates = Gates(model, layout)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss = gates(mask, lambda m: F.cross_entropy(m(x), y))
        results = gates.value_and_grad(mask, lambda m: F.cross_entropy(m(x), y))
    assert layout.followers
    limit = 0.05 if autocast else 1e-3
    wanted = loss.detach(), *torch.autograd.grad(loss, mask)
    for got, expected in zip(results, wanted, strict=True):
        assert (got - expected).norm() <= limit * expected.norm()
