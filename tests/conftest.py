"""What every test starts from: a fixed seed, and a counted skip without a GPU."""

import pytest
import torch

from ato_fast import backend
from samples import BACKENDS


@pytest.fixture(params=BACKENDS)
def served(request, monkeypatch):
    """Force a backend; the value is the device to use."""
    monkeypatch.setenv(backend.VARIABLE, request.param)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
