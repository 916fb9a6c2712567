"""What the compiled libraries are made of: stable symbols only, no spills on any architecture."""

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import ato_fast
from ato_fast import backend

CSRC = Path(__file__).parent.parent / "csrc"
PACKAGE = Path(ato_fast.__file__).parent
NVCC = next(
    (
        str(path)
        for path in (
            Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc",
            Path(shutil.which("nvcc") or "/nonexistent"),
        )
        if path.exists()
    ),
    None,
)
ARCHS = ("80", "90", "100")
THREADS = 256
BLOCKS_PER_SM = 3
MAX_REGISTERS = 65536 // (BLOCKS_PER_SM * THREADS) // 8 * 8
SHARED_PER_SM = {"80": 164, "90": 228, "100": 228}
"""Shared memory of a multiprocessor, KiB; 1 of it per block is the driver's."""
MAX_STATIC_SHARED = 48 << 10


def _library(name):
    found = sorted(PACKAGE.glob(f"{name}.*so"))
    if not found:
        pytest.skip(f"{name} is not built here")
    return found[0]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_only_stable_symbols_are_referenced(name):
    """No C++ symbol of libtorch and no Python symbol: one build serves torch 2.11 to 2.15."""
    command = ["nm", "-D", "-C", "--undefined-only", str(_library(name))]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = [line.split(maxsplit=1)[1] for line in symbols.splitlines() if line.strip()]
    wrong = [s for s in used if re.search(r"\b(at|c10|torch|caffe2)::|\b_?Py[A-Z_]", s)]
    assert not wrong
    assert any("aoti_torch" in s or "torch_" in s for s in used)


def test_the_cpu_library_loads():
    assert backend.extension("_C").reason is None


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.skipif(torch.version.cuda is None, reason="needs the CUDA build of torch's headers")
@pytest.mark.parametrize(
    "source, n_kernels", [("group_step.cu", 6), ("group_norms.cu", 2)], ids=lambda v: str(v)
)
def test_cuda_kernels_fit_three_to_a_multiprocessor_without_spills(source, n_kernels, tmp_path):
    command = [
        NVCC, "-c", "-std=c++20", "-O3", "-fmad=false", "--resource-usage", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}",
        *(f"-I{path}" for path in include_paths()),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS),
        str(CSRC / "cuda" / source), "-o", str(tmp_path / "out.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    used = re.findall(
        r"Compiling entry function '\S*?([a-z]+_kernel)\S*' for 'sm_(\d+)'"
        r".*?Used (\d+) registers.*?(\d+) bytes smem",
        report,
        flags=re.DOTALL,
    )
    assert Counter(arch for _, arch, _, _ in used) == dict.fromkeys(ARCHS, n_kernels), report
    # Of the kernels and of what they call.
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(used)
    assert all(pair == ("0", "0") for pair in spills), report
    for name, arch, registers, shared in used:
        print(f"{name} sm_{arch}: {registers} registers, {shared} bytes of shared memory")
        assert int(registers) <= MAX_REGISTERS, report
        assert int(shared) <= MAX_STATIC_SHARED, report
        assert BLOCKS_PER_SM * (int(shared) + 1024) <= SHARED_PER_SM[arch] << 10, report
