"""Builds ``ato_fast._C`` (CPU, always) and ``ato_fast._C_cuda`` (when an nvcc toolkit exists).

Both target the LibTorch stable ABI of torch 2.11 and reference no Python symbol, so one build
serves torch 2.11 to 2.15 and every CPython 3.10+. Metadata lives in pyproject.toml.

Environment:
    FORCE_CUDA=1 builds the CUDA part or fails; FORCE_CUDA=0 skips it.
    TORCH_CUDA_ARCH_LIST: default ``8.0;9.0;10.0+PTX``.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import find_packages, setup

# An nvcc on PATH may be a wrapper outside the toolkit; torch would take its folder for CUDA_HOME.
if "CUDA_HOME" not in os.environ and Path("/usr/local/cuda/bin/nvcc").exists():
    os.environ["CUDA_HOME"] = "/usr/local/cuda"
from torch.utils.cpp_extension import (  # noqa: E402
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
)

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"


def sources(folder: str, suffix: str) -> list[str]:
    """Sources of one backend, relative to the root as setuptools wants them."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def headers() -> list[str]:
    """Files whose change rebuilds everything."""
    found = (p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))
    return sorted(str(p.relative_to(ROOT)) for p in found)


def cpu_extension() -> CppExtension:
    """The CPU kernels. No FP contraction: vector body and scalar tail round alike, on any CPU."""
    if sys.platform == "win32":
        flags = ["/O2", "/fp:precise"]
    else:
        flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    return CppExtension(
        "ato_fast._C",
        sources("cpu", ".cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=headers(),
        extra_compile_args={"cxx": [*flags, TARGET]},
        py_limited_api=True,
    )


def why_no_cuda() -> str | None:
    """The reason to skip the CUDA part, or None to build it. A visible GPU plays no role."""
    force = os.environ.get("FORCE_CUDA")
    if force == "1":
        return None
    if force == "0":
        return "FORCE_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA build"
    if CUDA_HOME is None and shutil.which("nvcc") is None:
        return "no CUDA toolkit (set CUDA_HOME or put nvcc on PATH)"
    return None


def cuda_extension() -> CUDAExtension:
    """The CUDA kernels; never fast-math, nor contracted: every instantiation rounds alike."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
    return CUDAExtension(
        "ato_fast._C_cuda",
        sources("cuda", ".cu"),
        include_dirs=[str(ROOT / "csrc")],
        depends=headers(),
        extra_compile_args={
            "cxx": ["-O3", TARGET, "-DUSE_CUDA"],
            "nvcc": ["-O3", "-fmad=false", TARGET, "-DUSE_CUDA"],
        },
        py_limited_api=True,
    )


def extensions() -> list:
    """What to build on this machine."""
    built = [cpu_extension()]
    reason = why_no_cuda()
    if reason is None:
        built.append(cuda_extension())
    else:
        print(f"ato_fast: the CUDA extension is skipped: {reason}", file=sys.stderr)
    return built


setup(
    packages=[*find_packages(include=["ato_fast", "ato_fast.*"]), "ato_fast.kernels"],
    package_dir={"ato_fast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
