"""`torch.export` with errors that name the line of the user's model."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .probe import tensors
from .shrink import duplicate, named_tensors


class TraceError(ValueError):
    """The model could not be captured; the message names the line of the model's code."""


def check_plain(model: object) -> None:
    """Check that ``model`` is a module and no wrapper, which would change the parameters' names.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    wrapped = "module" if isinstance(model, wrappers) else "_orig_mod"
    if isinstance(getattr(model, wrapped, None), nn.Module):
        raise TypeError(
            f"model: expected the plain module, got it wrapped in {type(model).__name__}; "
            f"pass model.{wrapped} and wrap afterwards"
        )


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode for the whole model, and back to each module's own."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Attention in its own operations, not as torch's opaque one for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Calls(TorchFunctionMode):
    """Records every call of a torch function: which, on what shapes and parameters, with what."""

    # These take the training flag itself, or a probability that follows it.
    FLAGGED = frozenset(
        {F.batch_norm, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
         F.feature_alpha_dropout, F.scaled_dot_product_attention, torch.dropout, F.instance_norm}
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []
        self.serial: dict[int, tuple] = {}
        self.kept: list = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Record the call, then make it."""
        kwargs = kwargs or {}
        flagged = func in self.FLAGGED
        seen = [self._plain(x, flagged) for x in (*args, *kwargs.values())]
        # Batch norm in training counts its batches.
        if func is not torch.Tensor.add_ or args[0].dim():
            self.calls.append((func, tuple(seen)))
        result = func(*args, **kwargs)
        # Which call a tensor came from; kept alive, so that no other takes its id.
        for number, tensor in enumerate(tensors(result)):
            self.serial[id(tensor)] = (len(self.calls), number)
            self.kept.append(tensor)
        return result

    def _plain(self, x, flagged: bool):
        if isinstance(x, torch.Tensor):
            if isinstance(x, nn.Parameter):
                return id(x)
            return self.serial.get(id(x), ("given", *x.shape))
        if isinstance(x, tuple | list):
            return tuple(self._plain(y, flagged) for y in x)
        return None if flagged or not isinstance(x, int | float | str | bool) else x


def same_in_training(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether ``model``, on the meta device, makes the same calls in training and evaluation.

    Dropout and the statistics of batch norm aside. False where that cannot be found out.
    """
    calls = []
    for training in (False, True):
        with mode(model, training), torch.no_grad(), no_fast_path(), _Calls() as record:
            try:
                with torch.device("meta"):
                    result = model(*args, **kwargs)
            except Exception:
                return False
        calls.append((record.calls, [record.serial.get(id(t)) for t in tensors(result)]))
    return calls[0] == calls[1]


def capture(
    model: nn.Module, args: tuple, kwargs: dict, training: bool
) -> torch.export.ExportedProgram:
    """The model's graph in train or eval mode; the model is left as it was.

    Raises:
        TraceError: it could not be captured.
    """
    try:
        # A failed export prints the graph so far; the error below says what matters of it.
        printed = io.StringIO()
        with mode(model, training), torch.no_grad(), no_fast_path(), redirect_stderr(printed):
            # A forward pass may leave things behind: on a copy that shares the tensors.
            copied = duplicate(model, {id(t): t for _, t in named_tensors(model)})
            program = torch.export.export(copied, args, kwargs, strict=False)
        sys.stderr.write(printed.getvalue())
        return program
    except Exception as error:
        torch_root = os.path.dirname(torch.__file__)
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith((torch_root, os.path.dirname(__file__), "<"))
        ]
        where = ""
        if frames:
            last = frames[-1]
            where = f"\n  at {last.filename}:{last.lineno} in {last.name}: {last.line}"
        first_line = next((x for x in str(error).splitlines() if x.strip()), "")
        raise TraceError(
            f"model: torch.export could not capture {type(model).__name__}: "
            f"{type(error).__name__}: {first_line}{where}"
        ) from error
