"""Builds the CUDA sources for the host: real thread blocks, emulated (`tests/emulation`).

The library registers ``ato_fast_emulated::group_step_`` and ``group_norms``, the CUDA
implementations for CPU tensors, host functions included. Also the runs its tests compare.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.utils.cpp_extension import include_paths

from ato_fast import ops
from samples import VARIANTS, every_layout, layout_from, layout_of, random_mask, set_grads, twin

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
EMULATION = Path(__file__).parent / "emulation"
GXX = shutil.which("g++")
BY_NAME = {variant.name: variant for variant in VARIANTS}
RULES = [BY_NAME[name] for name in ("sgd", "momentum", "nesterov", "adam", "adamw")]
ADAMW = BY_NAME["adamw"]
SANITIZERS = ["-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all"]


def build(folder: Path, *more: Path, sanitized: bool = False) -> Path:
    """Compile the CUDA sources (or ``more`` instead) and the emulator to a library."""
    sources = [*(more or sorted(CUDA.glob("*.cu"))), EMULATION / "emulator.cpp"]
    torch_lib = Path(torch.__file__).parent / "lib"
    extra = SANITIZERS if sanitized else []
    flags = [
        GXX, "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", *extra,
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", f"-I{CUDA}",
        *(f"-I{path}" for path in include_paths()),
    ]  # fmt: skip

    def compile_one(source: Path) -> str:
        target = folder / f"{source.name}.o"
        _run([*flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "emulated.so"
    link = [f"-L{torch_lib}", f"-Wl,-rpath,{torch_lib}", "-ltorch_cpu", "-lc10"]
    _run([GXX, "-shared", *extra, *objects, *link, "-o", str(library)])
    return library


def load(library: Path) -> ctypes.CDLL:
    """Register the ops; the library, whose ``emulation_set_order`` draws another order of threads.

    Once per process.
    """
    for name, schema in ops.SCHEMAS.items():
        torch.library.define(f"ato_fast_emulated::{name}", schema)
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


def implementation(op: str, *_: object) -> object:
    """What `ato_fast.backend.implementation` is to return."""
    return getattr(torch.ops.ato_fast_emulated, op).default


def sanitizer_environment() -> dict[str, str]:
    """Environment of a Python process that can load a sanitized library."""
    runtimes = [
        subprocess.run(
            [GXX, f"-print-file-name=lib{name}.so"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
    }


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


class ManySegments(nn.Module):
    """Channels of more segments than a tile holds, short ones and long ones."""

    def __init__(self):
        super().__init__()
        self.short = nn.ModuleList(nn.Linear(2, 11) for _ in range(40))
        self.long = nn.ModuleList(nn.Linear(150, 3) for _ in range(35))


def many_segments():
    torch.manual_seed(0)
    return ManySegments()


def layout_of_many(model):
    return layout_from(
        model,
        [
            (name, n, [
                (f"{name}.{i}.{part}", 0, None, "row")
                for i in range(len(getattr(model, name)))
                for part in ("weight", "bias")
            ])
            for name, n in (("short", 11), ("long", 3))
        ],
    )  # fmt: skip


def train(variant, projection, dtype=None, steps=8, make=every_layout, layout=layout_of):
    """Half the groups are dropped after two steps, strongly enough that some become zero."""
    model = make()
    if dtype is not None:
        model = twin(model, dtype)
    optimizer = variant(model, layout(model), projection=projection)
    n_groups = optimizer.layout.n_groups
    strength = 16.0 * (1 + torch.arange(n_groups) % 7)
    for step in range(steps):
        if step == 2:
            optimizer.set_mask(random_mask(optimizer.layout), strength, threshold=0.01)
        set_grads(model, step)
        if step == 4 and make is every_layout:
            model.heads.weight.grad = None
        optimizer.step()
    return model, optimizer


def dropped_part(optimizer):
    """Every dropped group's elements of parameters and states, by name."""
    layout, mask = optimizer.layout, optimizer.mask
    for gate in layout.gates:
        for part in gate.slices:
            if not part.in_group:
                continue
            param = optimizer.flat.params[optimizer.flat.names.index(part.tensor)]
            groups = torch.tensor(layout.groups_of(part.tensor, part.dim))
            dropped = (groups >= 0) & ~mask[groups]
            for value in [param, *optimizer.state[param].values()]:
                if value.dim() == param.dim():
                    yield part.tensor, value.detach().movedim(part.dim, 0)[dropped]
