"""Triton kernels without a GPU: results in the interpreter, cubins for three architectures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
ARCHS = (80, 90, 100)
MAX_REGISTERS = 128
"""128 threads of 128 registers: four blocks per multiprocessor."""
INTERPRETED = """
import torch
from samples import VARIANTS, every_layout, layout_of, random_mask, set_grads
from ato_fast import backend, ops

model = every_layout()
optimizer = VARIANTS[-1](model, layout_of(model))
set_grads(model, 0)
model.heads.weight.grad = None
flat = optimizer.flat
dropped = ~random_mask(optimizer.layout, seed=4, keep=0.6).numpy()
for plan in (flat.plan(dropped), flat.plan(dropped & False)):
    for grads in ([], flat.gradients()):
        arguments = (flat.buffers, grads, flat.tensors, plan.chunks, plan.items)
        assert backend.serving("group_norms", flat.device, flat.dtypes) == "triton"
        got = ops.group_norms(*arguments, plan.n_slots, plan.n_projected)
        expected = backend._REFERENCE["group_norms"](*arguments, plan.n_slots, plan.n_projected)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        again = ops.group_norms(*arguments, plan.n_slots, plan.n_projected)
        assert torch.equal(got, again)
print("checked", len(plan.items), int(dropped.sum()))
"""


def test_group_norms_in_the_interpreter():
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "ATO_FAST_BACKEND": "triton",
        "PYTHONPATH": str(HERE),
    }
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "checked" in done.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
@pytest.mark.parametrize("with_grads", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_group_norms_compiles_without_spills(arch, with_grads, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ato_fast.kernels import group_norms

    signature = {
        "params_ptr": "*fp32",
        "grad_table_ptr": "*i64",
        "chunks_ptr": "*i64",
        "items_ptr": "*i64",
        "out_ptr": "*fp64",
        "WITH_GRADS": "constexpr",
        "BLOCK": "constexpr",
    }
    source = ASTSource(
        fn=group_norms._group_norms_kernel,
        signature=signature,
        constexprs={"WITH_GRADS": with_grads, "BLOCK": group_norms.BLOCK},
    )
    options = {"num_warps": group_norms.NUM_WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    # Spilled registers would live on the stack or in local memory.
    assert usage["STACK"] == usage["LOCAL"] == "0", report
    assert 0 < int(usage["REG"]) <= MAX_REGISTERS, report
