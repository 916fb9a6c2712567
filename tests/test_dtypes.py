"""bf16 parameters with fp32 state, alone and mixed with fp32 ones; dtypes the kernels lack."""

import pytest
import torch

from ato_fast import backend
from samples import (
    BACKENDS,
    PROJECTIONS,
    VARIANTS,
    by_name,
    every_layout,
    layout_of,
    random_mask,
    set_grads,
    twin,
)

BF16_NETS = {
    "all": lambda model: model.to(torch.bfloat16),
    "mixed": lambda model: (model.conv.to(torch.bfloat16), model.huge.to(torch.bfloat16)),
}


def run_bf16(variant, projection, narrow):
    """Train a network that is bf16 altogether or in part."""
    model = every_layout()
    BF16_NETS[narrow](model)
    layout = layout_of(model)
    optimizer = variant(model, layout, projection=projection)
    source = every_layout()
    for step in range(6):
        if step == 2:
            optimizer.set_mask(random_mask(layout), threshold=0.3)
        set_grads(source, step)
        for param, like in zip(model.parameters(), source.parameters(), strict=True):
            param.grad = like.grad.bfloat16().to(param.dtype)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("served", BACKENDS[1:2], indirect=True)
@pytest.mark.parametrize("narrow", BF16_NETS)
@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
@pytest.mark.parametrize("variant", VARIANTS[2::2], ids=by_name)
def test_bf16_parameters_keep_fp32_state(variant, projection, narrow, served, monkeypatch):
    """As the reference, bit for bit but where the last bit of fp32 tips the rounding."""
    got, optimizer = run_bf16(variant, projection, narrow)
    monkeypatch.setenv(backend.VARIABLE, "reference")
    same, other = run_bf16(variant, projection, narrow)
    assert all(s["step"] == 6 for p, s in optimizer.state.items() if p.numel())
    for (name, param), expected in zip(got.named_parameters(), same.parameters(), strict=True):
        assert param.dtype == expected.dtype
        bf16 = param.dtype == torch.bfloat16
        torch.testing.assert_close(
            param.detach(), expected.detach(), rtol=2**-8 if bf16 else 2e-4, atol=1e-5
        )
        if bf16 and param.numel() > 100:
            assert (param == expected).float().mean() > 0.98, name
        for key, value in optimizer.state[param].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(
                value, other.state[expected][key], rtol=2e-2, atol=2e-2 if bf16 else 1e-3
            )


@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
def test_bf16_follows_the_float64_oracle_for_one_step(projection, served, monkeypatch):
    """One step from the same numbers: off by one rounding to bf16."""
    model = every_layout(torch.bfloat16).to(served)
    wide = twin(model, torch.float64)
    for net in (model, wide):
        optimizer = VARIANTS[-1](net, layout_of(net), projection=projection)
        optimizer.set_mask(random_mask(optimizer.layout), threshold=0.3)
        set_grads(net, 0)
        for param in net.parameters():
            param.grad = param.grad.bfloat16().to(param.dtype)
        optimizer.step()
        monkeypatch.setenv(backend.VARIABLE, "reference")
    for got, expected in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-5)


def test_float16_parameters_are_the_references(monkeypatch):
    model = every_layout(torch.float16)
    optimizer = VARIANTS[-1](model, layout_of(model))
    assert backend.serving("group_step_", optimizer.flat.device, optimizer.flat.dtypes) == (
        "reference"
    )
    for name in ("cpu", "cuda", "triton"):
        monkeypatch.setenv(backend.VARIABLE, name)
        with pytest.raises(backend.BackendError, match="takes tensors of float32, bfloat16, got"):
            optimizer.step()
