"""ato_fast: train once, get a smaller network that computes exactly the same function.

Auto-Train-Once (CVPR 2024) and its siblings over fused kernels. See README.md.
"""

from .artifact import ArtifactError, load, save
from .budget import Budget
from .capture import TraceError
from .export import Exported, ExportError, export
from .groups import Gate, GroupLayout, Slice, Unprunable
from .inplace import shrink_
from .labels import Value
from .latency import LatencyTable
from .methods import ATO, Result, hold_out
from .optimizer import SGD, Adam, AdamW
from .projection import DHSPG, HalfSpace, Prox
from .rules import rule
from .schedule import Schedule
from .shrink import shrink, zero_
from .trace import trace
from .verify import Verification

__version__ = "0.1.0"

__all__ = [
    "ATO",
    "DHSPG",
    "SGD",
    "Adam",
    "AdamW",
    "ArtifactError",
    "Budget",
    "ExportError",
    "Exported",
    "Gate",
    "GroupLayout",
    "HalfSpace",
    "LatencyTable",
    "Prox",
    "Result",
    "Schedule",
    "Slice",
    "TraceError",
    "Unprunable",
    "Value",
    "Verification",
    "export",
    "hold_out",
    "load",
    "rule",
    "save",
    "shrink",
    "shrink_",
    "trace",
    "zero_",
]
