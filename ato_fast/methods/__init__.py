"""Training methods: each a driver over the optimizer, controller, budget and schedule."""

from .ato import ATO, Result
from .feed import hold_out

__all__ = ["ATO", "Result", "hold_out"]
