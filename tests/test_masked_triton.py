"""The controller's Triton kernels without a GPU: in the interpreter, and compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from ato_fast.kernels import gate_mask, masked_bn_act  # noqa: E402

HERE = Path(__file__).parent
ARCHS = (80, 90, 100)
ACTIVATIONS = ("x_ptr", "grad_ptr", "y_ptr", "dx_ptr")
MAX_REGISTERS = {4: 255, 8: 128}
"""By warps: two blocks of 256 threads per multiprocessor; grids of 128 threads are small."""


def test_in_the_interpreter():
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "ATO_FAST_BACKEND": "triton",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    code = "from masked_cases import interpreted\ninterpreted()\nprint('checked')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("checked\n"), done.stdout + done.stderr


def build(kernel, target, x="*fp32", warps=masked_bn_act.NUM_WARPS, **constants):
    """Compile a kernel; ``x`` is the type of activations, None leaves an argument out."""

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in ACTIVATIONS:
            return x
        if name in ("bounds_ptr", "state_ptr"):
            return "*i64"
        if name == "partial_ptr":
            return "*fp64"
        return "*fp32" if name.endswith("_ptr") else NUMBERS.get(name, "i64")

    signature = {name: kind(name) for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return warps, triton.compile(source, target=target, options=options)


NUMBERS = {"base": "fp32", "temperature": "fp32"}


def masked(kernel, target, x, activation, last, **more):
    """A kernel of masked_bn_act as its launcher has it, for long rows."""
    rows, columns = masked_bn_act._tile(4096)
    return build(
        kernel, target, x, ACTIVATION=activation, LAST=last, ROWS=rows, COLUMNS=columns, **more
    )


def heads(kernel, target, **more):
    """A kernel of gate_mask as its launcher has it, for the published width."""
    return build(kernel, target, warps=gate_mask.NUM_WARPS, ROWS=gate_mask.ROWS, WIDTH=256, **more)


STEPS = {"STEPS": masked_bn_act.STEPS}
FORWARD, BACKWARD = masked_bn_act._forward_kernel, masked_bn_act._backward_kernel
BUILDS = {
    "forward-gelu-bf16": lambda t: masked(FORWARD, t, "*bf16", 5, False),
    "forward-relu-fp32-last": lambda t: masked(FORWARD, t, "*fp32", 1, True),
    "backward-gelu-fp32-last": lambda t: masked(BACKWARD, t, "*fp32", 5, True, **STEPS),
    "backward-silu-bf16": lambda t: masked(BACKWARD, t, "*bf16", 4, False, **STEPS),
    "backward-relu-fp16-last": lambda t: masked(BACKWARD, t, "*fp16", 1, True, **STEPS),
    "uniform": lambda t: build(
        gate_mask._uniform_kernel, t, warps=gate_mask.NUM_WARPS, state_ptr=None,
        BLOCK=gate_mask.BLOCK,
    ),
    "gate_mask": lambda t: heads(gate_mask._gate_mask_kernel, t, HARD=True),
    "gate_mask_backward": lambda t: heads(gate_mask._gate_mask_backward_kernel, t),
}  # fmt: skip


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_cubins_do_not_spill(arch, name, tmp_path):
    from triton.backends.compiler import GPUTarget

    warps, compiled = BUILDS[name](GPUTarget("cuda", arch, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    assert usage["STACK"] == usage["LOCAL"] == "0", report
    assert 0 < int(usage["REG"]) <= MAX_REGISTERS[warps], report
