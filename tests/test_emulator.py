"""The emulator of thread blocks itself, and the CUDA kernels in it under sanitizers."""

import ctypes
import subprocess
import sys

import pytest

import emulated

pytestmark = pytest.mark.skipif(emulated.GXX is None, reason="needs g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    planted = emulated.EMULATION / "planted.cpp"
    loaded = ctypes.CDLL(str(emulated.build(tmp_path_factory.mktemp("planted"), planted)))
    loaded.emulation_run_planted.restype = ctypes.c_char_p
    return loaded


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "name, error",
    [
        ("neighbours", ""),
        ("barrier and shuffle", ""),
        ("two barriers", "thread 0 waits for its block"),
        ("early exit", "thread 7 has finished"),
        ("half a warp", "thread 16 has finished"),
    ],
)
def test_the_emulator_sees_planted_errors(name, error, seed, library):
    library.emulation_set_order(seed)
    out = (ctypes.c_int * 256)()
    got = library.emulation_run_planted(name.encode(), 3, out).decode()
    assert error in got and bool(got) == bool(error)
    if name == "neighbours":
        for i in range(192):
            block, thread = divmod(i, 64)
            assert out[i] == 2000 * block + thread + (thread + 1) % 64


def test_a_missing_barrier_shows_in_some_order(library):
    results = set()
    for seed in range(3):
        library.emulation_set_order(seed)
        out = (ctypes.c_int * 192)()
        assert library.emulation_run_planted(b"missing barrier", 3, out) == b""
        results.add(tuple(out))
    assert len(results) > 1


SANITIZED = """
import sys
import torch
import emulated, samples
from ato_fast import backend

emulated.load(sys.argv[1])
backend.implementation = emulated.implementation
many = {"make": emulated.many_segments, "layout": emulated.layout_of_many}
for variant in emulated.RULES[1::3]:
    for projection in samples.PROJECTIONS[:2] + samples.PROJECTIONS[-1:]:
        emulated.train(variant, projection, steps=4)
    emulated.train(variant, projection, steps=3, **many)
model, optimizer = emulated.train(emulated.ADAMW, samples.PROJECTIONS[1], torch.bfloat16, steps=3)
optimizer.group_norms()
print("clean", flush=True)
optimizer.flat.plan.segments[-1, 5] += 40
optimizer.step()
"""


@pytest.mark.slow
def test_reads_and_writes_nothing_out_of_bounds(tmp_path):
    """Under AddressSanitizer, and UBSan's checks of alignment; a planted error is found last."""
    try:
        library = emulated.build(tmp_path, sanitized=True)
    except RuntimeError as error:
        if "cannot find" in str(error):
            pytest.skip("the sanitizers' runtime is not installed")
        raise
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library)],
        env=emulated.sanitizer_environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "clean\n", done.stderr[-4000:]
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
