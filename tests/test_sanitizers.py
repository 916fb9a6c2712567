"""The CPU step and GRU under AddressSanitizer, UBSan and ThreadSanitizer, on threads of their own.

The kernels' cores are compiled with drivers that need no torch (an instrumented Python is not to
be had); tables, buffers and results travel through files, and the results are compared too.
"""

import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ato_fast import backend, gru
from ato_fast.plan import build_plan
from samples import PROJECTIONS, VARIANTS, by_name, every_layout, layout_of, random_mask, set_grads

ROOT = Path(__file__).parent.parent
CXX = shutil.which("g++") or shutil.which("clang++")
KINDS = {"memory": "address,undefined", "threads": "thread"}
SOURCES = {"driver": ("step.cpp", "loops.cpp"), "gru": ("gru_loops.cpp",)}
THREADS, STEPS = 5, 3

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")]


@pytest.fixture(scope="module", params=KINDS)
def built(request, tmp_path_factory):
    """Builds a driver with one kind of sanitizer, once."""
    folder = tmp_path_factory.mktemp("drivers")

    @cache
    def build(name):
        program = folder / name
        sources = [
            ROOT / f"tests/sanitize/{name}.cpp",
            *(ROOT / "csrc/cpu" / file for file in SOURCES[name]),
        ]
        command = [
            CXX, "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-DATO_NO_CLONES", "-pthread",
            f"-fsanitize={KINDS[request.param]}", "-fno-sanitize-recover=all",
            f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if "cannot find" in done.stderr:
            pytest.skip("the sanitizer's runtime is not installed")
        assert done.returncode == 0, done.stderr
        return program

    return build


@pytest.fixture
def driver(built):
    """The step's driver."""
    return built("driver")


def _raw(tensor):
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy().tobytes()


def _write(path, blocks):
    path.write_bytes(b"".join(struct.pack("<q", len(block)) + block for block in blocks))


def _read(path):
    data, blocks = path.read_bytes(), []
    while data:
        (size,) = struct.unpack_from("<q", data)
        blocks.append(data[8 : 8 + size])
        data = data[8 + size :]
    return blocks


def _blocks(optimizer):
    """Everything the driver reads, in its order."""
    arguments = optimizer.op_arguments()
    params, first, second, step = arguments[:4]
    grads, tensors = arguments[5:7]
    mask, strength, threshold, hyper = arguments[11:15]
    flat = optimizer.flat
    plan = build_plan(flat.table, flat.axes, flat.group_hyper, flat.device, unit=60)
    kinds = [int(p.dtype == torch.bfloat16) for p in params]
    head = [len(params), len(grads), *arguments[18:20], THREADS, STEPS, *kinds]
    blocks = [np.array(head, dtype=np.int64).tobytes()]
    for index, param in enumerate(params):
        blocks += [_raw(param), *(_raw(s[index]) if s else b"" for s in (first, second))]
    constants = [*arguments[20], 0.0, 0.0, 0.0][:3]
    blocks += [_raw(t) for t in (step, tensors, plan.segments, plan.bundles, plan.units)]
    blocks += [_raw(t) for t in (mask, strength, threshold)]
    blocks += [np.array(values, dtype=np.float64).tobytes() for values in (hyper, constants)]
    return blocks + [_raw(g) for g in grads]


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "mixed"])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
@pytest.mark.parametrize("variant", VARIANTS[::2], ids=by_name)
def test_the_step_is_clean_and_right(variant, projection, narrow, driver, tmp_path, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    model = every_layout()
    if narrow:
        model.conv.to(torch.bfloat16)
        model.heads.to(torch.bfloat16)
    layout = layout_of(model)
    optimizer = variant(model, layout, projection=projection)
    optimizer.set_mask(random_mask(layout), threshold=0.8)
    set_grads(model, 0)
    model.up.weight.grad = None
    _write(tmp_path / "in", _blocks(optimizer))
    done = subprocess.run(
        [driver, tmp_path / "in", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[:4000]
    for _ in range(STEPS):
        optimizer.step()
    got = _read(tmp_path / "out")
    for index, param in enumerate(optimizer.flat.buffers):
        for at, state in enumerate(([param], optimizer._first, optimizer._second)):
            if state:
                assert got[3 * index + at] == _raw(state[index if at else 0])
    assert got[-1] == _raw(optimizer._step_counts)


def test_a_planted_error_is_found(driver, tmp_path):
    """A segment beyond its buffer; all bundles in no group in one place."""
    model = every_layout()
    optimizer = VARIANTS[-1](model, layout_of(model))
    set_grads(model, 0)
    blocks = _blocks(optimizer)
    segments = np.frombuffer(blocks[6], dtype=np.int64).reshape(-1, 8).copy()
    if _has(driver, "__asan_init"):
        segments[-1, 5] += 1 << 20
        expected = b"heap-buffer-overflow"
    else:
        bundles = np.frombuffer(blocks[7], dtype=np.int64).reshape(-1, 5)
        free = bundles[bundles[:, 2] < 0, 0]
        segments[free] = segments[free[segments[free, 5].argmax()]]
        expected = b"data race"
    blocks[6] = segments.tobytes()
    _write(tmp_path / "in", blocks)
    done = subprocess.run([driver, tmp_path / "in", tmp_path / "out"], capture_output=True)
    assert done.returncode != 0 and expected in done.stderr


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 33, 130), (17, 5, 37), (3, 64, 32)])
def test_the_gru_is_clean_and_right(sizes, built, tmp_path, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    n_steps, inputs, hidden = sizes
    weights = list(torch.nn.GRU(inputs, hidden, bidirectional=True).parameters())
    source, grad = torch.randn(n_steps, inputs), torch.randn(n_steps, 2 * hidden)
    head = np.array(sizes, dtype=np.int64).tobytes()
    _write(tmp_path / "in", [head, *map(_raw, (source, grad, *weights))])
    done = subprocess.run(
        [built("gru"), tmp_path / "in", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[:4000]
    states = gru.bi_gru(source, weights)
    grads = torch.autograd.grad(states, weights, grad)
    got_states, _, *got_grads = _read(tmp_path / "out")
    assert got_states == _raw(states)
    assert got_grads == [_raw(g) for g in grads]


def _has(program, symbol):
    return symbol in subprocess.run(["nm", program], capture_output=True, text=True).stdout
