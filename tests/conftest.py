"""What every test starts from: a fixed seed, and a counted skip without a GPU."""

import pytest
import torch

from ato_fast import backend, fused, masked
from samples import BACKENDS


@pytest.fixture(params=BACKENDS)
def served(request, monkeypatch):
    """Force a backend; the value is the device to use."""
    monkeypatch.setenv(backend.VARIABLE, request.param)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """Activations of the calls of masked_bn_act, and where a convolution took a norm in."""
    seen = []
    original, returned = masked.masked_bn_act, fused.Fused._return
    monkeypatch.setattr(
        fused, "masked_bn_act", lambda *args: (seen.append(args[4]), original(*args))[1]
    )

    def noted(mode, layer, result):
        if isinstance(layer, fused.Folded):
            seen.append("fold")
        return returned(mode, layer, result)

    monkeypatch.setattr(fused.Fused, "_return", noted)
    return seen


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
