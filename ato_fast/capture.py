"""`torch.export` with errors that name the line of the user's model."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch import nn

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
