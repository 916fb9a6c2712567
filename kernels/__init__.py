"""Triton kernels, installed as ``ato_fast.kernels``; importing this registers their launchers.

Kernels here read the plan tables of `ato_fast.plan`. `group_norms` is the only one so far; the
fused step has a C++ and a CUDA kernel in ``csrc/``.
"""

from . import group_norms

__all__ = ["group_norms"]
