"""Error metrics against a float64 oracle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from every |value| to the next number of ``dtype`` above it, as float64."""
    size = values.abs().to(dtype)
    return (torch.nextafter(size, torch.full_like(size, float("inf"))) - size).double()


def worst_error(values: Tensor, oracle: Tensor) -> float:
    """Largest |values - oracle|; 0 for empty tensors."""
    return float((values.double() - oracle).abs().max()) if values.numel() else 0.0


def assert_as_accurate(
    got: Tensor,
    same_dtype: Tensor,
    oracle: Tensor,
    name: str = "",
    worst: float | None = None,
) -> None:
    """Check every element: error <= 2 x the worst error of ``same_dtype`` + 1 ulp of its own.

    Args:
        got: result under test.
        same_dtype: a plain torch implementation in the same dtype and order of operations.
        oracle: the same in float64.
        worst: worst error of ``same_dtype`` where it is known over more than this tensor.
    """
    if not (got.dtype == same_dtype.dtype and oracle.dtype == torch.float64):
        raise TypeError(f"{name}: dtypes {got.dtype}, {same_dtype.dtype}, {oracle.dtype}")
    if not (got.shape == same_dtype.shape == oracle.shape):
        raise AssertionError(f"{name}: shapes {got.shape}, {same_dtype.shape}, {oracle.shape}")
    if got.numel() == 0:
        return
    error = (got.double() - oracle).abs()
    worst = worst_error(same_dtype, oracle) if worst is None else worst
    allowed = 2 * worst + ulp(oracle, got.dtype)
    # Written so that NaN fails.
    bad = ~(error <= allowed)
    if bad.any():
        at = int((error - allowed).nan_to_num(nan=float("inf")).argmax())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements are off; the worst, element {at}: "
            f"expected {oracle.flatten()[at].item()!r}, got {got.flatten()[at].item()!r}, "
            f"error {error.flatten()[at].item():.3e}, allowed {allowed.flatten()[at].item():.3e}"
        )


def assert_all_as_accurate(
    got: Mapping[str, Tensor], same_dtype: Mapping[str, Tensor], oracle: Mapping[str, Tensor]
) -> None:
    """`assert_as_accurate` for every entry of dictionaries with equal keys.

    The worst error is taken over all entries of one kind (the key's part after ``:``), whose values
    must be of one scale: a tensor of one element says nothing about the size of rounding errors.
    """
    assert got.keys() == same_dtype.keys() == oracle.keys()
    worst: dict[str, float] = {}
    for name in got:
        kind = name.partition(":")[2]
        error = worst_error(same_dtype[name], oracle[name])
        worst[kind] = max(worst.get(kind, 0.0), error)
    for name in got:
        limit = worst[name.partition(":")[2]]
        assert_as_accurate(got[name], same_dtype[name], oracle[name], name, limit)


def assert_same_bits(got: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal bit for bit: tells 0.0 from -0.0 and one NaN from another."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, name
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differ = got.contiguous().view(kind) != expected.contiguous().view(kind)
    assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.numel()} elements differ"
