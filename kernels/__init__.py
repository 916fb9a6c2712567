"""Triton kernels, installed as ``ato_fast.kernels``; importing this registers their launchers.

The optimizer's kernels read the plan tables of `ato_fast.plan` and mirror the arithmetic of
``csrc/group_step.h``; `masked_bn_act` and `gate_mask` serve the controller.
"""

from . import gate_mask, group_norms, group_step, masked_bn_act

__all__ = ["gate_mask", "group_norms", "group_step", "masked_bn_act"]
