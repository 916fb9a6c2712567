"""DHSPG at learning rates so small that fp32 rounds a good part of every step away.

Every group moves at nearly a right angle to itself: the sign of a small inner product decides
whether it becomes zero, and its size the strength if it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ato_fast import DHSPG
from samples import Variant, layout_from, twin

RATES = (1e-5, 1e-6)
N = 96
"""Groups of either kind."""


class Rows(nn.Module):
    """Groups of a long piece, an element and one without gradient; groups of one short piece."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Linear(150, N)
        self.still = nn.Parameter(torch.empty(N))
        self.short = nn.Linear(24, N, bias=False)

    def moving(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters with a gradient, by kind of group."""
        return [self.long.weight, self.long.bias], [self.short.weight]


def _rows(params: Sequence[Tensor]) -> Tensor:
    """The parameters' elements, a row per group, in float64."""
    return torch.cat([p.detach().cpu().double().reshape(N, -1) for p in params], dim=1)


def _set_gradients(model: Rows, variant: Variant) -> None:
    """First gradients that move a group by lr * d, d at 90 degrees to it but for 0.06 to 0.6."""
    l2 = 0.0 if variant.name == "adamw" else variant.hyper.get("weight_decay", 0.0)
    cosine = 10 ** -torch.linspace(2, 3, N).double() * (-1) ** torch.arange(N)
    for params in model.moving():
        x = _rows(params)
        along = x / x.norm(dim=1, keepdim=True)
        d = torch.rand(x.shape, dtype=torch.float64) * 1.2 - 0.6
        d -= (d * along).sum(1, keepdim=True) * along
        d += (cosine * d.norm(dim=1))[:, None] * along
        # Adam with eps 1 moves by g / (|g| + 1).
        g = (d / (1 - d.abs()) if "adam" in variant.name else d) - l2 * x
        for p, part in zip(params, g.split([p[0].numel() for p in params], dim=1), strict=True):
            p.grad = part.reshape(p.shape).to(p)


def wrong_groups(
    variant: Variant, lr: float, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> int:
    """How many of the 2 N groups one step leaves elsewhere than OTOv2's formulas in float64."""
    torch.manual_seed(0)
    model = Rows()
    for p in model.parameters():
        nn.init.normal_(p)
    model.to(dtype).to(device)
    layout = layout_from(model, [
        ("long", N, [(name, 0, None, "row") for name in ("long.weight", "long.bias", "still")]),
        ("short", N, [("short.weight", 0, None, "row")]),
    ])  # fmt: skip
    hyper = {**variant.hyper, "lr": lr, **({"eps": 1.0} if "adam" in variant.name else {})}
    optimizer = variant(model, layout, projection=DHSPG(), **hyper)
    # Too much for any group, and for those that grow reduced to what OTOv2 allows.
    optimizer.set_mask(torch.zeros(2 * N), threshold=2 * optimizer.group_norms())
    _set_gradients(model, variant)

    before, wide = twin(model, torch.float64).cpu(), twin(model, torch.float64).cpu()
    for p, like in zip(wide.parameters(), model.parameters(), strict=True):
        p.grad = None if like.grad is None else like.grad.double().cpu()
    getattr(torch.optim, variant.make.__name__)(wide.parameters(), **hyper).step()
    decay = 1 - lr * hyper["weight_decay"] if variant.name == "adamw" else 1.0
    optimizer.step()

    wrong = 0
    rtol = 2**-8 if dtype == torch.bfloat16 else 2e-5
    kinds = zip(before.moving(), wide.moving(), model.moving(), strict=True)
    for kind, (old, new, got) in enumerate(kinds):
        x, z = _rows(old), _rows(new)
        u = decay * x - z
        still = before.still.detach() if kind == 0 else torch.zeros(N)
        norm = ((x * x).sum(1) + still**2).sqrt()
        xu, uu = (x * u).sum(1), (u * u).sum(1)
        low, high = -xu / norm, -uu * norm / xu
        grows = xu < 0
        assert grows.any() and not grows.all() and (high < norm).all()
        expected = z - (0.5 * (low + high) / norm)[:, None] * x
        expected[~grows] = 0
        right = torch.isclose(_rows(got), expected, rtol=rtol, atol=1e-6).all(1)
        wrong += int((~right).sum())
    return wrong
