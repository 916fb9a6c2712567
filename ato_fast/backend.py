"""Finds the compiled kernels, says what serves each op, and lets one be forced.

``ATO_FAST_BACKEND``:

* ``auto`` (default): fp32 and bf16 parameters on the CPU use ``_C`` if it was built; on CUDA they
  use ``_C_cuda`` if it was built, else Triton (so on AMD). The pure-torch reference serves the rest
  (float64, float16, other devices). Ops that have no CUDA kernel use Triton there (`register_op`).
* ``cpu``, ``cuda``, ``triton``, ``reference``: that one or an error that says why it cannot serve.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from . import reference

NAMES = ("auto", "triton", "cuda", "cpu", "reference")
OPS = ("group_step_", "group_norms")
"""Ops of the optimizer's step; others join by `register_op`."""
VARIABLE = "ATO_FAST_BACKEND"
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""Parameter dtypes the kernels take; their state is fp32."""
PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""Backends ``auto`` tries per device type before the reference."""

_REFERENCE: dict[str, Callable] = {
    "group_step_": reference.group_step_ref,
    "group_norms": reference.group_norms_ref,
}
_TRITON: dict[str, Callable] = {}
_DTYPES = dict.fromkeys(OPS, KERNEL_DTYPES)
_COMPILED = dict.fromkeys(OPS, ("cpu", "cuda"))


class BackendError(RuntimeError):
    """A forced backend cannot serve the call."""


@dataclass(frozen=True)
class Extension:
    """Outcome of loading one compiled library; ``reason`` is None if it loaded."""

    name: str
    reason: str | None

    @property
    def loaded(self) -> bool:
        """Whether its kernels are registered."""
        return self.reason is None


def register_op(
    op: str, reference: Callable, dtypes: Sequence[torch.dtype], compiled: Sequence[str] = ("cpu",)
) -> None:
    """Offer an op besides `OPS`.

    Args:
        reference: its plain torch function.
        dtypes: of the tensors its kernels take.
        compiled: compiled libraries that have a kernel of it, of ``cpu`` and ``cuda``.
    """
    _REFERENCE[op], _DTYPES[op], _COMPILED[op] = reference, tuple(dtypes), tuple(compiled)


def register_triton(op: str, launcher: Callable) -> None:
    """Offer a Triton launcher for ``op`` (called by the modules of `ato_fast.kernels`)."""
    _TRITON[op] = launcher


@cache
def extension(name: str) -> Extension:
    """Load ``ato_fast/<name>*.so`` once; failure is remembered with its reason."""
    found = sorted(
        path
        for suffix in (".so", ".pyd", ".dylib")
        for path in Path(__file__).parent.glob(f"{name}.*{suffix}")
    ) or sorted(Path(__file__).parent.glob(f"{name}.so"))
    if not found:
        return Extension(name, f"ato_fast.{name} was not built (reinstall with a C++ compiler)")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return Extension(name, f"{found[0].name} does not load: {error}")
    return Extension(name, None)


def requested() -> str:
    """The backend asked for by the environment.

    Raises:
        BackendError: the variable holds no known name.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name not in NAMES:
        raise BackendError(f"{VARIABLE}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


def why_not(name: str, op: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why backend ``name`` cannot serve ``op`` on these buffers; None if it can."""
    if name == "reference":
        return None
    wrong = [str(dtype) for dtype in dtypes if dtype not in _DTYPES[op]]
    if wrong:
        taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[op])
        return f"it takes tensors of {taken}, got {', '.join(wrong)}"
    if name == "triton":
        failure = _load_triton()
        if failure is not None:
            return failure
        if op not in _TRITON:
            return f"there is no Triton kernel of {op}"
        if device.type != "cuda" and not _triton_interprets():
            return f"it needs CUDA tensors or TRITON_INTERPRET=1, got {device.type} tensors"
        return None
    if name not in _COMPILED[op]:
        return f"there is no {name} kernel of {op}"
    if device.type != name:
        return f"it needs {name} tensors, got {device.type} tensors"
    return extension("_C" if name == "cpu" else "_C_cuda").reason


def serving(op: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """Name of the backend that runs ``op`` on buffers of these dtypes on this device.

    Raises:
        BackendError: the forced backend cannot.
    """
    if op not in _REFERENCE:
        raise ValueError(f"op: expected one of {', '.join(_REFERENCE)}, got {op!r}")
    name = requested()
    if name != "auto":
        reason = why_not(name, op, device, dtypes)
        if reason is not None:
            raise BackendError(f"{VARIABLE}={name} cannot serve ato_fast::{op}: {reason}")
        return name
    for candidate in PREFERRED.get(device.type, ()):
        if why_not(candidate, op, device, dtypes) is None:
            return candidate
    return "reference"


def implementation(
    op: str, device: torch.device, dtypes: Sequence[torch.dtype]
) -> Callable[..., object]:
    """What to call for ``op``: the registered op, a Triton launcher or the reference."""
    name = serving(op, device, dtypes)
    if name == "reference":
        return _REFERENCE[op]
    if name == "triton":
        return _TRITON[op]
    return getattr(torch.ops.ato_fast, op).default


def report() -> str:
    """Readable table: what serves each op by device, and every backend that cannot and why."""
    lines = [f"{VARIABLE}={requested()}"]
    dtypes = [torch.float32]
    for device in ("cpu", "cuda"):
        absent = device == "cuda" and not torch.cuda.is_available()
        for op in _REFERENCE:
            try:
                served = serving(op, torch.device(device), dtypes)
            except BackendError as error:
                served = str(error)
            note = " (no CUDA device here)" if absent else ""
            lines.append(f"  {device} tensors, {op:<12} {served}{note}")
    for name, device in (("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda")):
        for op in _REFERENCE:
            reason = why_not(name, op, torch.device(device), dtypes)
            lines.append(f"  {name:<9} {op:<12} {reason or 'ready'}")
    return "\n".join(lines)


@cache
def _load_triton() -> str | None:
    """Import the Triton kernels, which register themselves; why not, if that fails."""
    try:
        from . import kernels  # noqa: F401
    except Exception as error:  # another version of Triton may fail in any way
        return f"the Triton kernels do not import: {error}"
    return None


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
