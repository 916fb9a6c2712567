"""What is compared with: the published algorithm as one would write it in plain PyTorch.

`FeatureGates` is the masked forward; the projections work layer by layer after the optimizer's
step. Both of these compute the proximal step of Auto-Train-Once (arXiv 2403.14729): channel c of
gate l, dropped by the mask, with the norm nu over its rows in all of the gate's tensors,

    x <- x / nu * max(0, nu - lr * lam * n_l / N),     nu = sqrt(sum(x^2) + 1e-8)

where n_l of the N dropped groups are in gate l.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ato_fast import GroupLayout

NORM_EPS = 1e-8


class LayerProjection:
    """What both have in common: per gate its tensors, channels first, and the mask's part.

    Raises:
        ValueError: a channel map other than one row per channel in order.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], layout: GroupLayout) -> None:
        self._gates: list[tuple[slice, list[Tensor]]] = []
        for gate in layout.gates:
            members = []
            for part in gate.slices:
                if not part.in_group:
                    continue
                if not np.array_equal(part.channels, np.arange(gate.n)):
                    raise ValueError(f"gate {gate.name}, {part.tensor}: rows are not its channels")
                members.append(params[part.tensor].detach().movedim(part.dim, 0))
            self._gates.append((gate.span, members))
        self._work: list[tuple[Tensor, float, list[Tensor]]] = []

    def set_mask(self, keep: Tensor, lam: float) -> None:
        """``keep``: bool ``[n_groups]``, False drops; ``lam``: the published strength."""
        n_dropped = max(int((~keep).sum()), 1)
        self._work = []
        for span, members in self._gates:
            if not members:
                continue
            dropped = ~keep[span]
            share = int(dropped.sum()) / n_dropped
            self._work.append((dropped.to(members[0].device), lam * share, members))


class GatherProjection(LayerProjection):
    """As published: dropped rows are picked by a boolean mask, scaled and put back.

    On CUDA every boolean index waits for the device, as in the published code.
    """

    @torch.no_grad()
    def project(self, lr: float) -> None:
        """Shrink the dropped groups of every gate by ``lr * lam * n_l / N``."""
        for dropped, lam, members in self._work:
            if lam == 0:
                continue
            rows = [member[dropped] for member in members]
            norm = (sum(map(_squares, rows)) + NORM_EPS).sqrt()
            scale = (norm - lr * lam).clamp(min=0) / norm
            for member, picked in zip(members, rows, strict=True):
                factor = scale.view(-1, *[1] * (picked.dim() - 1))
                member[dropped] = (picked * factor).to(member.dtype)


class ScaleProjection(LayerProjection):
    """Whole tensors times one factor per channel, 1 for the kept ones: never waits for the GPU."""

    @torch.no_grad()
    def project(self, lr: float) -> None:
        """Shrink the dropped groups of every gate by ``lr * lam * n_l / N``."""
        for dropped, lam, members in self._work:
            if lam == 0:
                continue
            norm = (sum(map(_squares, members)) + NORM_EPS).sqrt()
            scale = torch.where(dropped, (norm - lr * lam).clamp(min=0) / norm, 1)
            for member in members:
                member.mul_(scale.view(-1, *[1] * (member.dim() - 1)))


def _squares(rows: Tensor) -> Tensor:
    """Sum of squares per row, float32."""
    squares = rows.float().square()
    return squares.sum(tuple(range(1, rows.dim()))) if rows.dim() > 1 else squares


class FeatureGates:
    """Feature maps after the activation times the mask, in evaluation, on a copy of the model.

    For torchvision's ResNet-50 and MobileNetV2 and for `cases.Tiny`. As published, all of the model
    takes part in backward: `clear` throws its gradients away afterwards.

    Raises:
        ValueError: a gate whose activation is not known.
    """

    def __init__(self, model: nn.Module, layout: GroupLayout) -> None:
        self.model = copy.deepcopy(model).eval()
        self._mask: Tensor | None = None
        for gate in layout.gates:
            for part in gate.slices:
                if part.gated and part.tensor.endswith(".weight"):
                    self._place(part.tensor.removesuffix(".weight"), gate.span)

    def _place(self, norm: str, span: slice) -> None:
        parent_name, _, leaf = norm.rpartition(".")
        parent = self.model.get_submodule(parent_name)

        def gated(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output * self._mask[span].view(1, -1, *[1] * (output.dim() - 2))

        if leaf in ("bn1", "bn2") and hasattr(parent, "conv3"):
            parent.forward = types.MethodType(_bottleneck, parent)
            # One activation module serves three places of a block.
            parent.add_module(f"act_{leaf}", nn.ReLU(inplace=True))
            parent.get_submodule(f"act_{leaf}").register_forward_hook(gated)
        elif leaf == "bn1" and hasattr(parent, "relu"):
            parent.relu.register_forward_hook(gated)
        elif isinstance(parent, nn.Sequential) and len(parent) == 3:
            parent.register_forward_hook(gated)
        elif isinstance(parent, nn.Sequential) and parent[-1] is parent.get_submodule(leaf):
            parent.register_forward_hook(gated)
        elif leaf == "hidden":
            # `cases.Tiny`: the activation between its two linear layers is a function.
            parent.head.register_forward_pre_hook(
                lambda module, args: (gated(module, (), args[0]),)
            )
        else:
            raise ValueError(f"{norm}: it is not known where its feature map is gated")

    def __call__(self, mask: Tensor, x: Tensor) -> Tensor:
        """The masked model's output."""
        self._mask = mask
        return self.model(x)

    def clear(self) -> None:
        """Throw the gradients of the model's parameters away."""
        for param in self.model.parameters():
            param.grad = None


def _bottleneck(self: nn.Module, x: Tensor) -> Tensor:
    """torchvision's block with an activation module per place."""
    out = self.act_bn1(self.bn1(self.conv1(x)))
    out = self.act_bn2(self.bn2(self.conv2(out)))
    out = self.bn3(self.conv3(out))
    out += x if self.downsample is None else self.downsample(x)
    return self.relu(out)
