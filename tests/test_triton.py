"""Triton kernels without a GPU: results in the interpreter, code for NVIDIA and AMD targets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from ato_fast.kernels import coefficients, common, group_norms, group_step  # noqa: E402

HERE = Path(__file__).parent
ARCHS = (80, 90, 100)
CASES = (
    "table('sgd', 'sgd-decay', 'momentum', 'dampening')",
    "table('nesterov', 'adam', 'adamw'); layouts()",
    "dtypes(); parameter_groups(); norms(); positions(); host_tables(); refusals()",
    "zeros(); found_inf(); missing(); bits(); rounding()",
)
POINTERS = {
    "segments_ptr": "*i64",
    "bundles_ptr": "*i64",
    "blocks_ptr": "*i64",
    "coefficients_ptr": "*fp32",
    "addresses_ptr": "*i64",
    "rows_ptr": "*i64",
    "rates_ptr": "*i64",
    "hyper_ptr": "*fp64",
    "constants_ptr": "*fp64",
    "mask_ptr": "*u8",
    "strength_ptr": "*fp32",
    "threshold_ptr": "*fp32",
    "step_ptr": "*fp32",
    "grad_scale_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
    "out_ptr": "*fp64",
    "n_tensors": "i32",
}
compiled_only = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on"
)


@pytest.mark.parametrize("case", CASES)
def test_in_the_interpreter(case):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "ATO_FAST_BACKEND": "triton",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    code = f"from triton_cases import *\nwith torch.no_grad(): {case}\nprint('checked')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("checked\n"), done.stdout + done.stderr


def build(kernel, target, buffers=(), **constants):
    """Compile a kernel for one or two parameter buffers; arguments set to None are left out."""
    near, far = (*buffers, None, None)[:2]
    rule = constants.get("RULE", 0)
    kinds = {
        **POINTERS,
        "near_ptr": near,
        "far_ptr": far,
        "param_near_ptr": near,
        "param_far_ptr": far,
        "first_near_ptr": "*fp32" if rule > 0 else None,
        "first_far_ptr": "*fp32" if rule > 0 and far else None,
        "second_near_ptr": "*fp32" if rule > 1 else None,
        "second_far_ptr": "*fp32" if rule > 1 and far else None,
    }
    kinds.update(dict.fromkeys(constants, "constexpr"))
    constants.update({name: None for name in kernel.arg_names if kinds[name] is None})
    signature = {name: kinds[name] or "constexpr" for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {**common.OPTIONS}
    if target.backend == "hip":
        options.pop("maxnreg", None)
    return triton.compile(source, target=target, options=options)


def build_step(target, rule, projection, *buffers):
    """The step kernel as `group_step_triton` launches it."""
    return build(
        group_step._group_step_kernel, target, buffers, RULE=rule, PROJECTION=projection,
        CHANNELS=common.CHANNELS, BLOCK=common.block_size(buffers),
    )  # fmt: skip


def build_norms(target, with_grads, *buffers):
    """The norms kernel as `group_norms_triton` launches it."""
    more = {} if with_grads else {"addresses_ptr": None}
    return build(
        group_norms._group_norms_kernel, target, buffers, CHANNELS=common.CHANNELS,
        BLOCK=common.block_size(buffers), **more,
    )  # fmt: skip


def build_coefficients(target, optimizer):
    """The coefficients kernel as `launch_coefficients` launches it."""
    return build(
        coefficients._coefficients_kernel, target, OPTIMIZER=optimizer, BLOCK=coefficients.BLOCK
    )


BUILDS = {
    "sgd-prox-bf16": lambda t: build_step(t, 0, 1, "*bf16"),
    "momentum-half_space-fp32": lambda t: build_step(t, 1, 2, "*fp32"),
    "momentum-dhspg-both": lambda t: build_step(t, 1, 3, "*fp32", "*bf16"),
    "adam-none-fp32": lambda t: build_step(t, 2, 0, "*fp32"),
    "adam-prox-fp32": lambda t: build_step(t, 2, 1, "*fp32"),
    "adam-dhspg-fp32": lambda t: build_step(t, 2, 3, "*fp32"),
    "adam-dhspg-bf16": lambda t: build_step(t, 2, 3, "*bf16"),
    "adam-dhspg-both": lambda t: build_step(t, 2, 3, "*bf16", "*fp32"),
    "norms-bf16": lambda t: build_norms(t, False, "*bf16"),
    "norms-grads-both": lambda t: build_norms(t, True, "*fp32", "*bf16"),
    "coefficients-sgd": lambda t: build_coefficients(t, 0),
    "coefficients-adamw": lambda t: build_coefficients(t, 2),
}


@compiled_only
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_cubins_do_not_spill(arch, name, tmp_path):
    from triton.backends.compiler import GPUTarget

    compiled = BUILDS[name](GPUTarget("cuda", arch, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    # Spilled registers would live on the stack or in local memory.
    assert usage["STACK"] == usage["LOCAL"] == "0", report
    assert 0 < int(usage["REG"]) <= common.MAX_REGISTERS, report
    # Rounded as in csrc/group_step.h: no contraction, and roots and quotients to nearest.
    for approximate in ("fma.rn.f32", "sqrt.approx", "div.full", "div.approx"):
        assert approximate not in compiled.asm["ptx"]


@compiled_only
@pytest.mark.parametrize("name", BUILDS)
def test_amd_code_does_not_spill(name):
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    if "amd" not in backends:
        pytest.skip("this triton has no AMD backend")
    text = BUILDS[name](GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
    assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", text) == ["0"]
    assert re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text) == ["0"]
