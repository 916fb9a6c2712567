"""The numbers a forward pass computes with: a width among them shows that it can not be changed."""

from __future__ import annotations

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class SharedError(ValueError):
    """A copy uses tensors of the model it was made from."""


class Constants(TorchFunctionMode):
    """The numbers a forward pass computes with, call by call; they must not follow the width.

    Args:
        originals: ids of the tensors of the model that was copied; a copy has to do without them.
        expected: the numbers of the dense model; the first call with others raises ValueError.
    """

    ARITHMETIC = frozenset("add sub mul div truediv pow multiply divide true_divide".split())

    def __init__(self, originals: frozenset[int], expected: list | None = None) -> None:
        super().__init__()
        self.originals = originals
        self.expected = expected
        self.seen: list = []
        self.outputs: list = []
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Compare the numbers of a call, then make it."""
        self.calls += 1
        kwargs = kwargs or {}
        if any(id(x) in self.originals for x in (*args, *kwargs.values())):
            raise SharedError(
                "expected a forward pass through its own modules, but a copy of the model still "
                "uses the original's parameters (through a function that closes over it, say), so "
                "no smaller copy can be made"
            )
        name = getattr(func, "__name__", "").strip("_")
        plain = name.removeprefix("r").removeprefix("i")
        counts = (int, float) if plain in self.ARITHMETIC else float
        numbers = [x for x in (*args, *kwargs.values())
                   if isinstance(x, counts) and not isinstance(x, bool)]  # fmt: skip
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            numbers.append(args[0].shape[-1] if args else kwargs["query"].shape[-1])
        if numbers:
            if self.expected is not None:
                place = len(self.seen)
                if place >= len(self.expected) or self.expected[place] != (name, numbers):
                    raise ValueError(f"{name} with {numbers}, a number that follows the width")
            self.seen.append((name, numbers))
        return func(*args, **kwargs)
