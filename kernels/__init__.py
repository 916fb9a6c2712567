"""Triton kernels, installed as ``ato_fast.kernels``; importing this registers their launchers.

Kernels here read the plan tables of `ato_fast.plan` and mirror the arithmetic of
``csrc/group_step.h``.
"""

from . import group_norms, group_step

__all__ = ["group_norms", "group_step"]
