"""Counter-based noise against published vectors, and the controller's heads in one op."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from masked_cases import check_gate_mask, check_uniform

from ato_fast import backend, noise

# Of the generator's authors: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    assert noise.philox(torch.tensor([counter]), key).tolist() == [list(expected)]


def test_the_first_numbers_come_from_the_first_vector():
    expected = [((word >> 9) + 0.5) / 2**23 for word in VECTORS[0][2]]
    assert noise.uniform(torch.empty(4), 0, 0).tolist() == expected


def test_the_kernel_gives_the_bits_of_the_reference(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    check_uniform("cpu")


def test_numbers_are_uniform_and_draws_differ():
    n = 200_000
    draws = [noise.uniform(torch.empty(n), 7, draw) for draw in (0, 1)]
    for numbers in draws:
        assert 0 < numbers.min() and numbers.max() < 1
        # 5 standard errors of mean and variance.
        assert numbers.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * n))
        assert numbers.var().item() == pytest.approx(1 / 12, abs=5 / math.sqrt(180 * n))
    correlation = torch.corrcoef(torch.stack(draws))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(n)
    assert torch.isfinite(noise.gumbel(torch.tensor([0.5 / 2**23, 1 - 0.5 / 2**23]))).all()


@pytest.mark.parametrize("hard", [True, False])
def test_the_kernel_is_as_accurate_as_the_reference(hard, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    check_gate_mask(hard, "cpu")


def problem(dtype=torch.float32):
    bounds = torch.tensor([0, 3, 3, 10, 80])
    return torch.rand(4, 12, dtype=dtype), torch.randn(80, 12, dtype=dtype), bounds


@pytest.mark.parametrize("served", ["cpu", "reference"])
def test_the_mask_is_what_separate_operations_give(served, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, served)
    features, heads, bounds = problem()
    for leaf in (features, heads):
        leaf.requires_grad_()
    weights = torch.randn(80)
    logits, numbers, soft = noise.gate_mask(
        features, heads, bounds, 5, 2, base=0.3, temperature=0.4, hard=False
    )
    _, _, hard = noise.gate_mask(
        features, heads, bounds, 5, 2, base=0.3, temperature=0.4, hard=True
    )
    gate_of = torch.repeat_interleave(torch.arange(4), bounds.diff())
    expected = (heads * features[gate_of]).sum(1) + 0.3
    noisy = expected - torch.log(-torch.log(numbers))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(soft, torch.sigmoid(noisy / 0.4))
    assert torch.equal(hard, (soft >= 0.5).float())
    wanted = torch.autograd.grad((torch.sigmoid(noisy / 0.4) * weights).sum(), (features, heads))
    for mask in (soft, hard):
        found = torch.autograd.grad((mask * weights).sum(), (features, heads), retain_graph=True)
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected)


def heads_gradient(n_heads, seed=0):
    heads = torch.linspace(-seed, 1, 12 * n_heads).view(n_heads, 12).requires_grad_()
    features, bounds = torch.linspace(0, 1, 12)[None], torch.tensor([0, n_heads])
    mask = noise.gate_mask(features, heads, bounds, 5, 2, base=0.3, temperature=0.4, hard=True)[2]
    return torch.autograd.grad(mask.sum(), heads)[0]


def test_the_memory_of_a_gradient_is_used_again_once_it_is_free(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    first, second = heads_gradient(80), heads_gradient(80, seed=1)
    expected = first.clone(), second.clone()
    place, tail = second.data_ptr(), first[40:]
    del first, second
    again = heads_gradient(80, seed=1)
    assert again.data_ptr() == place and torch.equal(again, expected[1])
    # A view of the first one still holds its memory.
    others = [heads_gradient(n, seed) for seed, n in enumerate((80, 7, 80, 500))]
    assert torch.equal(tail, expected[0][40:])
    assert torch.equal(others[0], expected[0]) and torch.equal(again, expected[1])
    assert len({g.untyped_storage().data_ptr() for g in (tail, again, *others)}) == 6


def test_threads_that_share_the_memory_of_gradients(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    expected = [heads_gradient(80, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda i: heads_gradient(80, i % 4).clone(), range(400))
        assert all(torch.equal(g, expected[i % 4]) for i, g in enumerate(found))


def test_contract_of_the_op():
    features, heads, bounds = problem()
    op = torch.ops.ato_fast.gate_mask.default
    args = (features.requires_grad_(), heads.requires_grad_(), bounds, 1, 2, None, 3.0, 0.4, True)
    torch.library.opcheck(op, args)
    grads = torch.randn(2, 80)
    values = [t.detach() for t in op(*args)[:2]]
    torch.library.opcheck(
        torch.ops.ato_fast.gate_mask_backward.default,
        (*grads, features.detach(), heads.detach(), bounds, *values, 0.4),
    )


@pytest.mark.parametrize("served", ["cpu", "reference"])
def test_nan_reaches_the_mask(served, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, served)
    features, heads, bounds = problem()
    features[2] = float("nan")
    for hard in (True, False):
        mask = noise.gate_mask(features, heads, bounds, 0, 0, base=0, temperature=1, hard=hard)[2]
        assert torch.equal(mask.isnan(), (torch.arange(80) >= 3) & (torch.arange(80) < 10))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.rand(4, 11), r"features and heads: expected \[L, H\] and \[G, H\]"),
        (0, torch.rand(4, 12).double(), "features: expected float32, got torch.float64"),
        (2, torch.tensor([0, 80]), r"bounds: expected int64 \[5\], got torch.int64 \[2\]"),
        (2, torch.zeros(5), r"bounds: expected int64 \[5\], got torch.float32"),
    ],
)
def test_refusals(at, value, message):
    arguments = list(problem())
    arguments[at] = value
    with pytest.raises(ValueError, match=message):
        noise.gate_mask(*arguments, 0, 0, base=0.0, temperature=1.0, hard=True)


def test_bounds_that_do_not_cover_the_heads(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    features, heads, _ = problem()
    for bounds in ([0, 3, 3, 10, 79], [0, 3, 2, 10, 80], [1, 3, 3, 10, 80], [0, 3, 3, 90, 80]):
        with pytest.raises(RuntimeError, match="bounds"):
            noise.gate_mask(
                features, heads, torch.tensor(bounds), 0, 0, base=0.0, temperature=1.0, hard=True
            )


def test_a_state_of_another_kind():
    with pytest.raises(ValueError, match=r"state: expected int64 \[2\] on cpu, got torch.int32"):
        noise.uniform(torch.empty(3), 0, 0, torch.zeros(2, dtype=torch.int32))
