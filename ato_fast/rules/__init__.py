"""What each operation does to channels; see `registry`."""

from . import attention, contractions, elementwise, norms, place, shape
from .registry import BUILT_IN, CONTRACTIONS, RULES, InputError, rule, unknown

BUILT_IN.update(RULES)

__all__ = [
    "CONTRACTIONS", "InputError", "RULES", "attention", "contractions", "elementwise", "norms",
    "place", "rule", "shape", "unknown",
]  # fmt: skip
