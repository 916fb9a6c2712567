"""Asking a layout questions, shared by the tests of the tracer."""

import copy

import torch

import ato_fast as ato
from nets import random_mask, randomise_norms

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def gates_of(layout) -> dict[str, int]:
    return {gate.name: gate.n for gate in layout}


def reason(layout, tensor: str) -> str:
    return {entry.tensor: entry.reason for entry in layout.unprunable}[tensor]


def assert_exact(model, layout, x=X, seeds=(0, 1)):
    """The shrunk model equals the masked one, and the gates of a mask of ones change nothing."""
    model = randomise_norms(copy.deepcopy(model)).eval()
    for seed in seeds:
        mask = random_mask(layout, seed)
        masked = copy.deepcopy(model)
        ato.zero_(masked, layout, mask)
        small = ato.shrink(model, layout, mask)
        expected, got = masked(x), small(x)
        scale = expected.abs().max()
        assert scale > 0
        assert (expected - got).abs().max() <= 1e-5 * scale
        assert layout.params(mask) == sum(p.numel() for p in small.parameters())


def slices(layout, gate):
    return {(s.tensor, s.dim, s.role, s.gated) for s in layout.gate(gate).slices}
