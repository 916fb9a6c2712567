"""What each operation does to channels; see `registry`."""

from . import attention, contractions, elementwise, norms, place, shape
from .registry import BUILT_IN, RULES, UNLABELLED, InputError, rule, unknown

BUILT_IN.update(RULES)

__all__ = [
    "InputError", "RULES", "UNLABELLED", "attention", "contractions", "elementwise", "norms",
    "place", "rule", "shape", "unknown",
]  # fmt: skip
