"""The mask generator against the numbers of the specification."""

import copy
import math

import pytest
import torch

from ato_fast import backend
from ato_fast.controller import (
    BASE,
    INPUT_SIZE,
    LIKELY,
    Controller,
    drop_probability,
    relax,
    resource_loss,
)

# Widths of the inner channels of torchvision's ResNet-50: two gates per bottleneck.
RESNET50 = [w for w, n in ((64, 3), (128, 4), (256, 6), (512, 3)) for _ in range(2 * n)]


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_resnet50_has_the_published_size():
    controller = Controller(RESNET50)
    assert len(RESNET50) == 32
    assert controller.n_groups == 7552
    assert n_parameters(controller.gru) == 148_992
    assert n_parameters(controller.norm) == 512
    assert controller.heads.numel() == 1_933_312
    assert n_parameters(controller) == 148_992 + 512 + 1_933_312


def test_input_is_frozen_and_orthonormal():
    controller = Controller(RESNET50)
    assert controller.source.shape == (32, 1, INPUT_SIZE)
    assert not controller.source.requires_grad
    rows = controller.source.view(32, INPUT_SIZE)
    torch.testing.assert_close(rows @ rows.T, torch.eye(32))
    assert "source" in controller.state_dict()


def test_initial_values_have_the_published_bounds():
    controller = Controller(RESNET50)
    for p in controller.gru.parameters():
        assert p.abs().max() <= 1 / math.sqrt(128)
    assert controller.gru.weight_ih_l0.abs().max() > 0.95 / math.sqrt(128)
    assert 0.99 / 16 < controller.heads.abs().max() <= 1 / 16
    assert controller.heads.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.01)


def test_logits_equal_one_linear_layer_per_gate():
    controller = Controller([3, 5, 2], seed=4)
    out, _ = controller.gru(controller.source, torch.zeros(2, 1, 128))
    features = torch.relu(controller.norm(out))
    expected, start = [], 0
    for position, width in enumerate([3, 5, 2]):
        head = torch.nn.Linear(256, width, bias=False)
        with torch.no_grad():
            head.weight.copy_(controller.heads[start : start + width])
        expected.append(head(features[position, 0]) + BASE)
        start += width
    torch.testing.assert_close(controller.logits(), torch.cat(expected))


def test_same_seed_same_controller_whatever_ran_before():
    torch.manual_seed(1)
    first = Controller([4, 4], seed=7)
    torch.rand(17)
    before = torch.get_rng_state()
    second = Controller([4, 4], seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.noise(), second.noise())
    assert not torch.equal(first.heads, Controller([4, 4], seed=8).heads)


def test_noise_is_one_standard_gumbel():
    controller = Controller([200_000], seed=0)
    noise = controller.noise()
    assert torch.isfinite(noise).all()
    # Mean: Euler's constant. Variance: pi^2 / 6. Bounds: 5 standard errors.
    assert noise.mean().item() == pytest.approx(0.5772, abs=5 * 1.283 / math.sqrt(200_000))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)


@pytest.mark.parametrize("logit", [1.0, 0.0, -1.0, -2.0, -4.0])
def test_drop_probability(logit):
    controller = Controller([200_000], seed=3)
    hard = controller.sample(logits=torch.full((200_000,), logit))
    expected = math.exp(-math.exp(logit))
    assert drop_probability(torch.tensor(logit)).item() == pytest.approx(expected, rel=1e-5)
    spread = math.sqrt(expected * (1 - expected) / 200_000)
    assert 1 - hard.mean().item() == pytest.approx(expected, abs=5 * spread)


def test_drop_probability_matches_the_specification():
    table = {0.0: 0.37, -1.0: 0.69, -2.0: 0.87, -4.0: 0.98}
    for logit, expected in table.items():
        assert drop_probability(torch.tensor(logit)).item() == pytest.approx(expected, abs=5e-3)
    initial = drop_probability(torch.tensor(BASE, dtype=torch.float64)).item()
    assert initial == pytest.approx(1.9e-9, rel=0.02)
    assert drop_probability(torch.tensor(LIKELY)).item() == pytest.approx(0.5)


def test_all_kept_at_first():
    controller = Controller(RESNET50, seed=0)
    assert (controller.logits() > LIKELY).all()
    assert (controller.sample() == 1).all()


def test_hard_is_exact_and_has_the_soft_gradient():
    noisy = torch.linspace(-4, 4, 101).requires_grad_()
    soft = relax(noisy, hard=False)
    (soft_grad,) = torch.autograd.grad(soft.sum(), noisy)
    hard = relax(noisy, hard=True)
    (hard_grad,) = torch.autograd.grad(hard.sum(), noisy)
    assert set(hard.tolist()) == {0.0, 1.0}
    assert torch.equal(hard.bool(), soft >= 0.5)
    assert torch.equal(hard_grad, soft_grad)
    torch.testing.assert_close(soft_grad, (soft * (1 - soft) / 0.4).detach())


def test_noise_continues_after_a_round_trip():
    first = Controller([5, 6], seed=2)
    first.noise()
    state = copy.deepcopy(first.state_dict())
    expected = [first.noise(), first.noise()]
    second = Controller([5, 6], seed=99)
    second.load_state_dict(state)
    for noise in expected:
        assert torch.equal(second.noise(), noise)
    assert torch.equal(first.logits(), second.logits())


def test_the_state_of_the_noise_is_two_integers():
    controller = Controller([5, 6], seed=2)
    controller.sample()
    controller.noise()
    assert controller.state_dict()["_extra_state"] == {"seed": 2, "draws": 2}


def test_a_state_of_another_version_is_refused():
    controller = Controller([5])
    state = controller.state_dict()
    state["_extra_state"] = {"generator": torch.zeros(16), "device": "cpu"}
    with pytest.raises(ValueError, match="expected the noise's seed and draws, got generator, dev"):
        controller.load_state_dict(state)


def test_one_op_draws_what_separate_calls_draw():
    once, apart = Controller([40, 60], seed=3), Controller([40, 60], seed=3)
    with torch.no_grad():
        for controller in (once, apart):
            controller.heads.mul_(60)
    for hard in (True, False):
        mask = once.sample(hard=hard)
        expected = apart.sample(apart.noise(), hard=hard, logits=apart.logits())
        torch.testing.assert_close(mask, expected)
        weights = torch.linspace(-1, 1, 100)
        for controller, value in ((once, mask), (apart, expected)):
            controller.zero_grad()
            (value * weights).sum().backward()
        for got, wanted in zip(once.parameters(), apart.parameters(), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad)
    assert 0 < once.sample().mean() < 1
    # Logits alone use up no noise.
    once.logits()
    assert once.draws == 3


def test_one_seed_draws_the_same_on_every_backend(monkeypatch):
    draws = []
    for served in ("cpu", "reference"):
        monkeypatch.setenv(backend.VARIABLE, served)
        controller = Controller([7, 9], seed=11)
        draws.append([controller.noise() for _ in range(3)])
    for mine, theirs in zip(*draws, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_optimizer_decays_weights_only():
    controller = Controller([5, 6])
    optimizer = controller.optimizer()
    decayed, plain = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (decayed["lr"], decayed["weight_decay"]) == (1e-3, 1e-2)
    assert (plain["lr"], plain["weight_decay"]) == (1e-3, 0.0)
    names = {p: name for name, p in controller.named_parameters()}
    assert {names[p] for p in plain["params"]} == {
        *(n for n in names.values() if n.startswith("gru.bias")),
        "norm.weight",
        "norm.bias",
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


@pytest.mark.parametrize("widths", [[], [4, 0], [-1]])
def test_bad_widths(widths):
    with pytest.raises(ValueError, match="widths: expected at least one gate"):
        Controller(widths)


@pytest.mark.parametrize(
    ("target", "gamma", "logged"), [(0.193, 16, 0.4092), (0.37, 4, 0.0537), (0.54, 8, 0.0737)]
)
def test_resource_loss_reproduces_the_published_logs(target, gamma, logged):
    ratio = torch.tensor(target + 1e-6, dtype=torch.float64)
    assert gamma * resource_loss(ratio, target).item() == pytest.approx(logged, abs=5e-5)


def test_resource_loss_values_and_gradients():
    def value_and_slope(ratio, target=0.4):
        ratio = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
        loss = resource_loss(ratio, target)
        return loss.item(), torch.autograd.grad(loss, ratio)[0].item()

    assert value_and_slope(0.8) == pytest.approx((math.log(2), 1 / 0.8))
    assert value_and_slope(0.2) == pytest.approx((math.log(2), -1 / 0.2))
    assert value_and_slope(0.403) == pytest.approx((math.log(0.405 / 0.4), 0))
    assert value_and_slope(0.398) == pytest.approx((math.log(0.4 / 0.395), 0))
    # A target below the band: finite, and it still pushes the right way.
    assert value_and_slope(0.01, 0.004) == pytest.approx((math.log(2.5), 100))
    assert value_and_slope(0.001, 0.004) == pytest.approx((math.log(4), -1000))
