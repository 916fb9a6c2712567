"""The mask generator: a small bi-GRU whose output decides which groups live, and its objective.

Source: ATO (CVPR 2024, arXiv 2403.14729) and its reference code. A frozen orthogonal input gives
every gate one position of a sequence; a bidirectional GRU, a shared LayerNorm and ReLU turn it into
256 features per gate, and one linear row per group into its logit::

    o_i    = <W_i, relu(norm(gru(a)))[gate of i]>
    soft_i = sigmoid((o_i + s_i + b) / tau),   s_i standard Gumbel, b = 3, tau = 0.4
    hard_i = 1[soft_i >= 1/2] = 1[o_i + s_i + b >= 0]

`Controller.logits` returns ``o + b``: without noise a group is kept iff it is at least 0. With
noise it is dropped with probability ``exp(-exp(o + b))``, so all groups are kept at first (2e-9 at
``o = 0``).

Heads, noise and mask are one op (`gate_mask`). The noise is counter-based (`noise.py`): its state
is the seed and how many draws were taken, and every rank, device and backend draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import backend
from .gru import bi_gru
from .noise import gate_mask, gumbel, uniform

BASE = 3.0  # b of the paper
TEMPERATURE = 0.4  # tau of the paper
INPUT_SIZE = 64
HIDDEN_SIZE = 128
BAND = 0.005  # half width of the flat bottom of the resource loss, from the reference code
LIKELY = math.log(math.log(2.0))
"""Noise-free logit at which dropping and keeping are equally likely: exp(-exp(x)) = 1/2."""


class Controller(nn.Module):
    """Bi-GRU mask generator over gates of the given widths.

    Args:
        widths: channels per gate, in layout order; ``n_groups = sum(widths)``.
        seed: of the initial weights and of the noise. Torch's global generators are not touched.
        device: where weights, noise and masks live.

    Raises:
        ValueError: no gate, or a gate without channels.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        widths = tuple(int(n) for n in widths)
        if not widths or min(widths) < 1:
            raise ValueError(f"widths: expected at least one gate, all >= 1 channel, got {widths}")
        self.widths = widths
        self.seed = int(seed)
        self.draws = 0
        # The modules draw their default initial values from the global generator; they get our
        # own below, so that a seed gives the same controller whatever ran before.
        with torch.random.fork_rng(devices=[]):
            self.gru = nn.GRU(INPUT_SIZE, HIDDEN_SIZE, bidirectional=True)
            self.norm = nn.LayerNorm(2 * HIDDEN_SIZE)
        self.heads = nn.Parameter(torch.empty(sum(widths), 2 * HIDDEN_SIZE))
        init = torch.Generator().manual_seed(seed)
        source = torch.empty(len(widths), 1, INPUT_SIZE)
        nn.init.orthogonal_(source, generator=init)
        for parameter in self.gru.parameters():
            bound = 1 / math.sqrt(HIDDEN_SIZE)
            nn.init.uniform_(parameter, -bound, bound, generator=init)
        bound = 1 / math.sqrt(2 * HIDDEN_SIZE)
        nn.init.uniform_(self.heads, -bound, bound, generator=init)
        self.register_buffer("source", source)
        bounds = torch.tensor([0, *widths]).cumsum(0)
        self.register_buffer("bounds", bounds, persistent=False)
        self.to(device)

    @property
    def n_groups(self) -> int:
        """Length of the mask."""
        return len(self.heads)

    def _states(self) -> Tensor:
        """Outputs of the GRU, ``[L, 256]``: `bi_gru` of CPU tensors, elsewhere nn.GRU (cuDNN).

        Nor has a forced Triton or CUDA backend a kernel of it: nn.GRU serves there.
        """
        if self.source.device.type == "cpu" and backend.requested() not in ("triton", "cuda"):
            return bi_gru(self.source.squeeze(1), [*self.gru.parameters()])
        return self.gru(self.source)[0].squeeze(1)

    def _heads(self, hard: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, uniform numbers of the next draw, and the mask they give."""
        features = torch.relu(self.norm(self._states()))
        return gate_mask(
            features, self.heads, self.bounds, self.seed, self.draws,
            base=BASE, temperature=TEMPERATURE, hard=hard,
        )  # fmt: skip

    def logits(self) -> Tensor:
        """Noise-free ``o + b``, float ``[n_groups]``, differentiable."""
        return self._heads(hard=False)[0]

    def noise(self) -> Tensor:
        """One standard Gumbel draw per group, ``[n_groups]``; the next call gives the next draw."""
        drawn = gumbel(uniform(self.heads[:, 0], self.seed, self.draws))
        self.draws += 1
        return drawn

    def sample(
        self, noise: Tensor | None = None, *, hard: bool = True, logits: Tensor | None = None
    ) -> Tensor:
        """A differentiable mask, float ``[n_groups]``.

        Args:
            noise: as `noise` returns it; ``None`` makes a fresh draw.
            hard: exact 0 and 1 forward, the soft mask's gradient backward (straight-through);
                otherwise the soft mask itself.
            logits: as `logits` returns them, to share one pass between draws; ``None`` computes
                them.
        """
        if noise is None and logits is None:
            _, _, mask = self._heads(hard)
            self.draws += 1
            return mask
        if logits is None:
            logits = self.logits()
        if noise is None:
            noise = self.noise()
        return relax(logits + noise, hard=hard)

    def optimizer(self, lr: float = 1e-3, weight_decay: float = 1e-2) -> torch.optim.AdamW:
        """AdamW with weight decay on GRU and head weights only, as the reference code has it."""
        decayed = [p for name, p in self.gru.named_parameters() if name.startswith("weight")]
        plain = [p for name, p in self.gru.named_parameters() if name.startswith("bias")]
        return torch.optim.AdamW(
            [
                {"params": [*decayed, self.heads], "weight_decay": weight_decay},
                {"params": [*plain, *self.norm.parameters()], "weight_decay": 0.0},
            ],
            lr=lr,
            # One pass per tensor instead of one per operation.
            fused=True,
        )

    def get_extra_state(self) -> dict[str, int]:
        """State of the noise, part of ``state_dict``: two integers."""
        return {"seed": self.seed, "draws": self.draws}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the noise.

        Raises:
            ValueError: no such state, for example one that holds a torch generator's.
        """
        if set(state) != {"seed", "draws"}:
            raise ValueError(
                "controller state: expected the noise's seed and draws, got "
                f"{', '.join(map(str, state)) or 'nothing'}; it was saved by another version"
            )
        self.seed, self.draws = int(state["seed"]), int(state["draws"])


def relax(noisy: Tensor, *, hard: bool) -> Tensor:
    """``sigmoid(noisy / tau)``, or its rounding with the same gradient (straight-through)."""
    soft = torch.sigmoid(noisy / TEMPERATURE)
    if not hard:
        return soft
    # `soft - soft.detach()` is exactly 0, so the sum is exactly 0 or 1.
    return (noisy >= 0).to(soft.dtype) + (soft - soft.detach())


def drop_probability(logits: Tensor) -> Tensor:
    """Probability that a noisy draw drops each group, ``exp(-exp(logit))``."""
    return torch.exp(-torch.exp(logits))


def resource_loss(ratio: Tensor, target: float, band: float = BAND) -> Tensor:
    """How far the kept share of the cost is from its target; 0-dim.

    ``log(max(ratio, target + band) / target)`` above the target,
    ``log(target / min(ratio, target - band))`` below. Inside ``|ratio - target| < band`` the
    gradient is zero and the value a small positive constant. The band shrinks to half of the target
    where the target is smaller than twice the band, which keeps the logarithm finite.

    Args:
        ratio: 0-dim, cost under the mask over the dense cost.
        target: in (0, 1).
    """
    band = min(band, target / 2)
    above = torch.log(ratio.clamp_min(target + band) / target)
    below = torch.log(target / ratio.clamp_max(target - band))
    return torch.where(ratio > target, above, below)
