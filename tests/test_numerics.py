"""The metrics must catch errors that are planted, and pass honest rounding."""

import pytest
import torch

from numerics import assert_all_as_accurate, assert_as_accurate, assert_same_bits, ulp


def _samples():
    generator = torch.Generator().manual_seed(0)
    oracle = torch.randn(1000, generator=generator, dtype=torch.float64)
    return oracle, oracle.float()


def test_correct_rounding_passes():
    oracle, same = _samples()
    assert_as_accurate(same.clone(), same, oracle)


@pytest.mark.parametrize("position", [0, 499, 999])
def test_one_wrong_element_of_a_thousand_fails(position):
    oracle, same = _samples()
    got = same.clone()
    got[position] += 1e-4
    with pytest.raises(AssertionError, match="1 of 1000 elements"):
        assert_as_accurate(got, same, oracle)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_fails(value):
    oracle, same = _samples()
    got = same.clone()
    got[3] = value
    with pytest.raises(AssertionError, match="element 3"):
        assert_as_accurate(got, same, oracle)


def test_bf16_arithmetic_passed_off_as_fp32_fails():
    oracle, same = _samples()
    with pytest.raises(AssertionError):
        assert_as_accurate(same.bfloat16().float(), same, oracle)


def test_error_just_beyond_the_allowance_fails():
    oracle = torch.ones(4, dtype=torch.float64)
    same = oracle.float()
    step = ulp(oracle, torch.float32).float()
    assert_as_accurate(same + step, same, oracle)
    with pytest.raises(AssertionError):
        assert_as_accurate(same + 2 * step, same, oracle)


def test_errors_of_one_kind_are_no_allowance_for_another():
    oracle, same = _samples()
    coarse = same.bfloat16().float()
    got = {"w": same.clone(), "w:state": coarse}
    with pytest.raises(AssertionError, match="w:state"):
        assert_all_as_accurate(got, {"w": coarse, "w:state": same}, dict.fromkeys(got, oracle))
    assert_all_as_accurate(got, {"w": same, "w:state": coarse}, dict.fromkeys(got, oracle))


def test_empty_tensors_pass_and_other_shapes_fail():
    empty = torch.empty(0)
    assert_as_accurate(empty, empty, empty.double())
    with pytest.raises(AssertionError, match="shapes"):
        assert_as_accurate(torch.ones(2), torch.ones(3), torch.ones(3).double())


def test_bit_equality_tells_zeros_and_last_bits_apart():
    assert_same_bits(torch.tensor([0.0]), torch.tensor([0.0]))
    with pytest.raises(AssertionError):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    with pytest.raises(AssertionError):
        assert_same_bits(torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor(2.0)))
