"""What each ATen operation does to channels; see `registry`."""

from . import elementwise, layers, shape
from .registry import RULES, WITH_WEIGHTS, rule, unknown

__all__ = ["RULES", "WITH_WEIGHTS", "elementwise", "layers", "rule", "shape", "unknown"]
