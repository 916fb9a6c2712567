"""The calls of torch functions that a forward pass makes: does training do what evaluation does?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .probe import tensors
from .shrink import named_tensors

# These take the training flag itself, or a probability that follows it.
FLAGGED = frozenset(
    {F.batch_norm, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
     F.feature_alpha_dropout, F.scaled_dot_product_attention, torch.dropout, F.instance_norm}
)  # fmt: skip
# Noise for stochastic depth: where it comes from, and what may be done to it.
SOURCES = frozenset({torch.empty, torch.rand, torch.Tensor.new_empty})
DRAWN = frozenset({torch.Tensor.bernoulli_, torch.Tensor.div_, torch.bernoulli})
PRODUCTS = frozenset({torch.Tensor.mul, torch.mul})
# By name: attributes and sizes. What is made of them shows in the calls that are given it.
READ = frozenset({"__get__", "__len__", "size", "dim", "numel"})


class Calls(TorchFunctionMode):
    """Records every call of a torch function: which, on what shapes and tensors, with what.

    A product with noise that is one number per example leaves channels and zeros where they are,
    so that the calls of stochastic depth are those of a block without it; ``noisy`` says that there
    was one.

    Args:
        model: the one that will run; its tensors go by name, so that copies of it compare.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list = []
        self.noisy = False
        self.serial = {id(tensor): ("own", name) for name, tensor in named_tensors(model)}
        self.kept: list = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Make the call and record it."""
        kwargs = kwargs or {}
        flagged = func in FLAGGED
        seen = tuple(self._plain(x, flagged) for x in (*args, *kwargs.values()))
        noise = func in SOURCES or (func in DRAWN and self._is_noise(args[0]))
        kept = self._survivor(args) if func in PRODUCTS else None
        # Batch norm in training counts its batches.
        counted = func is torch.Tensor.add_ and not args[0].dim()
        result = func(*args, **kwargs)
        read = getattr(func, "__name__", "") in READ and not isinstance(result, torch.Tensor)
        if noise:
            self._name(result, ("noise", func, seen))
        elif kept is not None:
            self.noisy = True
            self._name(result, kept)
        elif not (counted or read):
            self.calls.append((func, seen))
            for x in args:
                if self._is_noise(x):
                    # Whoever else got hold of it may have written to it.
                    self._name(x, (len(self.calls), "read"))
            # Which call a tensor came from.
            for number, tensor in enumerate(tensors(result)):
                self._name(tensor, (len(self.calls), number))
        return result

    def finish(self, outputs) -> None:
        """The forward pass is over, with these ``outputs``: let go of all tensors."""
        self.calls.append(("outputs", tuple(self._plain(t, False) for t in tensors(outputs))))
        self.serial.clear()
        self.kept.clear()

    def same(self, other: Calls) -> bool:
        """Whether two finished forward passes made the same calls."""
        return self.calls == other.calls

    def _name(self, tensor: torch.Tensor, serial: tuple) -> None:
        self.serial[id(tensor)] = serial
        # Kept alive, so that no other takes its id.
        self.kept.append(tensor)

    def _is_noise(self, x) -> bool:
        return isinstance(x, torch.Tensor) and self.serial.get(id(x), ("",))[0] == "noise"

    def _survivor(self, args: tuple) -> tuple | None:
        """What a product with noise, one number per example, is a product of."""
        if len(args) != 2 or not self._is_noise(args[1]) or not isinstance(args[0], torch.Tensor):
            return None
        x, noise = args
        per_example = noise.shape in ((x.shape[0], *[1] * (x.dim() - 1)), (1,) * x.dim())
        serial = self.serial.get(id(x), ("own",))
        return serial if x.dim() > 1 and per_example and serial[0] not in ("own", "noise") else None

    def _plain(self, x, flagged: bool):
        if isinstance(x, torch.Tensor):
            return self.serial.get(id(x), ("given", *x.shape))
        if isinstance(x, tuple | list):
            return tuple(self._plain(y, flagged) for y in x)
        return None if flagged or not isinstance(x, int | float | str | bool) else x
