"""A network as a file that other programs load: ONNX, `torch.export`, or plain safetensors.

Every export is read back from the bytes that are about to be written and compared with the model;
only then does the file appear. How to load each format: docs/export.md.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from .artifact import as_safetensors, write_file
from .capture import check_plain, no_fast_path
from .fold import fold_weights
from .probe import cpu_inputs, difference, tensors
from .shrink import duplicate, named_tensors
from .trace import same_random_numbers

LIMITS = {"onnx": 1e-4, "torch-export": 1e-5, "state-dict": 0.0}
"""Formats, and the largest difference of an output from the model's, of its largest value. The same
weights in the same module give the same bits; torch's graph may add in another order; another
runtime has kernels of its own and merges operations."""
HALF_STEPS = 4
"""Outputs in half precision may differ by so many units in the last place of their largest."""
ONNX_BYTES = 2**31 - 2**24
"""Weights that fit in an ONNX file: one protobuf message of at most 2 GiB, the graph included."""
INSTALL = "pip install 'ato-fast[export]'"

Run = Callable[[tuple[Tensor, ...]], list[Tensor]]


class ExportError(ValueError):
    """A model could not be exported, or what was exported computes something else."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Args:
        path: the file.
        format: ``"onnx"``, ``"torch-export"`` or ``"state-dict"``.
        size_bytes: its size.
        rel_err: largest difference of an output from the model's, of that output's largest value,
            over all ``batches``; None: not compared, and ``checked_with`` says why.
        limit: the largest ``rel_err`` that is accepted.
        batches: batch sizes compared; empty if none was.
        dynamic_batch: whether the file takes batches of any size.
        opset: version of ONNX's operators, None for other formats.
        checked_with: what ran the file that was read back, with its version.
    """

    path: Path
    format: str
    size_bytes: int
    rel_err: float | None
    limit: float
    batches: tuple[int, ...]
    dynamic_batch: bool
    opset: int | None
    checked_with: str

    def __str__(self) -> str:
        opset = "" if self.opset is None else f" opset {self.opset}"
        batch = "any batch size" if self.dynamic_batch else "one batch size"
        text = f"{self.path}: {self.format}{opset}, {self.size_bytes} bytes, {batch}; "
        if self.rel_err is None:
            return text + f"not compared: {self.checked_with}"
        sizes = ", ".join(map(str, self.batches))
        return text + (
            f"in {self.checked_with} it differs from the model by {self.rel_err:.1e} of the "
            f"largest output (batches of {sizes}; limit {self.limit:g})"
        )


@dataclass(frozen=True)
class _Made:
    """The content of a file, and what it computes once it is read back (None: cannot be run).

    ``unoptimized`` is the same without what the runtime changes in the graph, where it does.
    """

    data: bytes
    run: Run | None
    checked_with: str
    opset: int | None = None
    unoptimized: Callable[[], Run] | None = None


def export(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    path: str | os.PathLike,
    format: str = "onnx",
    opset: int | None = None,
    dynamic_batch: bool = True,
) -> Exported:
    """Write ``model``, in evaluation mode and on the CPU, as one file that needs no ato_fast.

    Nothing is written unless what was made, read back, computes what the model computes. The file
    then appears as a whole; on any error an older one stays as it is.

    - ``"onnx"``: for onnxruntime, TensorRT, OpenVINO and others. Read back with onnxruntime; if
      that is missing, a warning and the report say that nothing was compared.
    - ``"torch-export"``: torch's own archive (``.pt2``), for ``torch.export.load``: a zip file with
      the graph as JSON, the weights as raw bytes, and the example inputs as a pickle of tensors.
      The inputs stored are zeros of the example's shapes. It holds no other pickle, but
      ``torch.export.load`` unpickles what it is given: load only files you trust.
    - ``"state-dict"``: ``model.state_dict()`` as safetensors, tied tensors under each of their
      names. Weights only; the network that takes them has to be there already.

    Weights that the model computes from parameters, such as standardised ones, are computed once
    for the first two. No file holds example values, file names or lines of code of yours.

    Args:
        model: any module `torch.export` can capture, shrunk or dense; left as it is.
        example_inputs: tensors of one forward call; the first dimension of each is the batch. One
            that holds a single value throughout (``torch.zeros``) only gives its shape, and is
            replaced by noise for the comparison.
        path: the file; its folder is made.
        format: see above.
        opset: version of ONNX's operators; torch's default if None.
        dynamic_batch: take batches of any size, and compare three: the example's, one more, and 1.
            False: take and compare the example's only.

    Returns:
        What was written, and how it compares.

    Raises:
        ExportError: the model cannot be exported, the result differs by more than `LIMITS`, or a
            package is missing.
        TypeError, ValueError: bad arguments.
        OSError: the file cannot be written.
    """
    check_plain(model)
    path, n = Path(path), _batch_size(example_inputs, dynamic_batch)
    if format not in LIMITS:
        raise ValueError(f"format: expected one of {tuple(LIMITS)}, got {format!r}")
    if opset is not None and format != "onnx":
        raise ValueError(f"opset: expected None for {format}, got {opset!r}")
    if path.is_dir():
        raise ValueError(f"path: expected a file name, {path} is a folder")
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if format == "onnx" and missing:
        raise ExportError(f"format onnx needs {' and '.join(missing)}: {INSTALL}")
    with same_random_numbers(), torch.no_grad(), no_fast_path():
        plain = _in_eval_on_cpu(model)
        # `cpu_inputs` makes half precision single; the model wants what it was given.
        pairs = zip(example_inputs, cpu_inputs(tuple(example_inputs)), strict=True)
        example = tuple(seen.to(given.dtype) for given, seen in pairs)
        if format == "state-dict":
            made = _state_dict(plain)
        else:
            program, shapes = _program(plain, example, dynamic_batch)
            made = _archive(program) if format == "torch-export" else _onnx(program, shapes, opset)
        error, limit, sizes = None, LIMITS[format], ()
        if made.run is None:
            warnings.warn(f"{path}: not compared, {made.checked_with}", stacklevel=2)
        else:
            sizes = tuple(dict.fromkeys((n, n + 1, 1))) if dynamic_batch else (n,)
            batches = [_rows(example, size) for size in sizes]
            error, limit = _compare(plain, made, batches, limit)
            if not error <= limit:
                text = (
                    f"{path} not written: as {format}, run by {made.checked_with}, "
                    f"{type(model).__name__} differs by {error:.1e} of its largest output; "
                    f"limit {limit:g}"
                )
                if made.unoptimized:
                    whole = replace(made, run=made.unoptimized())
                    error, _ = _compare(plain, whole, batches, limit)
                    text += f"; without the runtime's graph optimizations by {error:.1e}"
                raise ExportError(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, made.data)
    size = len(made.data)
    return Exported(
        path, format, size, error, limit, sizes, dynamic_batch, made.opset, made.checked_with
    )


def _batch_size(example_inputs: object, dynamic_batch: bool) -> int:
    """The batch size of the examples; all of them have it if it is to be dynamic."""
    if not isinstance(example_inputs, tuple | list) or not example_inputs:
        raise TypeError(
            f"example_inputs: expected a tuple of tensors such as (x,), "
            f"got {type(example_inputs).__name__}"
        )
    for i, x in enumerate(example_inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"example_inputs[{i}]: expected a tensor, got {type(x).__name__}")
    sizes = {x.shape[0] if x.dim() else None for x in example_inputs}
    if dynamic_batch and (len(sizes) > 1 or not all(sizes)):
        shapes = ", ".join(str(tuple(x.shape)) for x in example_inputs)
        raise ValueError(
            f"example_inputs: expected the same first dimension, the batch, of at least 1 in all; "
            f"got shapes {shapes}; dynamic_batch=False takes any"
        )
    return example_inputs[0].shape[0] if example_inputs[0].dim() else 1


def _rows(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """``inputs`` with ``size`` rows, the first ones again where there are too few."""
    index = {len(x): torch.arange(size) % len(x) for x in inputs if x.dim()}
    return tuple(
        x if not x.dim() or len(x) == size else x.index_select(0, index[len(x)]) for x in inputs
    )


def _in_eval_on_cpu(model: nn.Module) -> nn.Module:
    copied = duplicate(model).to("cpu")
    try:
        return copied.eval()
    except NotImplementedError:
        # An exported graph has one mode.
        return copied


@contextmanager
def _failing_as(what: str, advice: str = "") -> Iterator[None]:
    """Turn any error into an `ExportError` of one line."""
    # A failed export prints the graph so far.
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
    except Exception as error:
        cause = error
        # What happened is what torch's exporters wrap in advice and reports.
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        # Of constraints that do not hold, the first line only says that there are some.
        reason = next((x for x in lines[1:2] if x.startswith("- ")), (lines or [""])[0])
        reason = reason.removeprefix("- ").partition(". ")[0]
        raise ExportError(f"model: {what}: {type(cause).__name__}: {reason}{advice}") from error
    sys.stderr.write(printed.getvalue())


def _program(
    model: nn.Module, example: tuple[Tensor, ...], dynamic_batch: bool
) -> tuple[torch.export.ExportedProgram, Any]:
    """The graph of ``model`` without the example's values and without lines of its code, and its
    dynamic sizes, laid out like the arguments of its forward pass."""
    shapes = None
    if dynamic_batch:
        # A size of 1 would be taken for a fixed one.
        example = _rows(example, max(2, len(example[0])))
        collected, batch = torch.export.ShapesCollection(), torch.export.Dim("batch", min=1)
        for x in example:
            collected[x] = {0: batch}
        shapes = collected.dynamic_shapes(model, example)
    # Forward may leave things behind: on a copy that shares the tensors.
    copied = duplicate(model, {id(t): t for _, t in named_tensors(model)})
    advice = "; dynamic_batch=False exports for one batch size" if dynamic_batch else ""
    with _failing_as(f"torch.export cannot capture {type(model).__name__}", advice):
        program = torch.export.export(copied, example, dynamic_shapes=shapes, strict=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    fold_weights(program)
    program.example_inputs = (tuple(torch.zeros_like(x) for x in example), {})
    return program, shapes


def _state_dict(model: nn.Module) -> _Made:
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ExportError(
                f"model: {name} of its state_dict is a {type(value).__name__}, expected a tensor"
            )
    data = as_safetensors(state)
    loaded = duplicate(model)
    with _failing_as("its state_dict cannot be loaded again"):
        loaded.load_state_dict(load_tensors(data))
    return _Made(data, lambda inputs: list(tensors(loaded(*inputs))), _version("torch"))


def _archive(program: torch.export.ExportedProgram) -> _Made:
    buffer = io.BytesIO()
    with (
        _failing_as("torch.export cannot write the graph and read it back"),
        warnings.catch_warnings(),
    ):
        # torch 2.11 warns of weights in memory that is read only, and copies them.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        torch.export.save(program, buffer)
        data = buffer.getvalue()
        loaded = torch.export.load(io.BytesIO(data)).module()
    return _Made(data, lambda inputs: list(tensors(loaded(*inputs))), _version("torch"))


def _keep_zero_padding(graph: torch.fx.Graph) -> None:
    """Pad with -0.0, which equals 0.0, before max pooling.

    By default onnxruntime (its PadFusion, as of 1.31) moves padding whose bits are all 0 into the
    pooling, and that pads with -inf: a window without a positive value gave 0 and no longer does.
    """
    aten = torch.ops.aten
    pools = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
    for pool in graph.nodes:
        pad = pool.args[0] if pool.target in pools else None
        if pad is not None and pad.target == aten.pad.default:
            x, sizes, *rest = pad.args
            mode, value = (*rest, *("constant", None)[len(rest) :])
            if mode == "constant" and not value:
                pad.args = (x, sizes, mode, -0.0)


def _onnx(program: torch.export.ExportedProgram, shapes: Any, opset: int | None) -> _Made:
    n_bytes = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if n_bytes > ONNX_BYTES:
        raise ExportError(f"model: {n_bytes} bytes of weights do not fit in one ONNX file (2 GiB)")
    _keep_zero_padding(program.graph)
    with _failing_as("torch.onnx cannot translate the graph"), warnings.catch_warnings():
        # All inputs share the batch, and it is named once.
        warnings.filterwarnings("ignore", ".*The axis name: batch will not be used")
        made = torch.onnx.export(
            program, dynamo=True, dynamic_shapes=shapes, opset_version=opset, verbose=False
        )
        message = made.model_proto
    (found,) = (entry.version for entry in message.opset_import if entry.domain == "")
    if opset not in (None, found):
        # The exporter keeps its own where it cannot convert, and logs that.
        raise ExportError(f"opset: this model cannot be had in {opset}, torch.onnx made {found}")
    data = message.SerializeToString()
    if not importlib.util.find_spec("onnxruntime"):
        return _Made(data, None, f"onnxruntime is not installed: {INSTALL}", found)
    import onnxruntime

    def session(level: onnxruntime.GraphOptimizationLevel) -> Run:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        with _failing_as("onnxruntime cannot load the ONNX file"):
            ready = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in ready.get_inputs()]

        def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
            feed = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
            return [torch.from_numpy(y) for y in ready.run(None, feed)]

        return run

    levels = onnxruntime.GraphOptimizationLevel
    return _Made(
        data,
        session(levels.ORT_ENABLE_ALL),
        _version("onnxruntime"),
        found,
        lambda: session(levels.ORT_DISABLE_ALL),
    )


def _compare(
    model: nn.Module, made: _Made, batches: list[tuple[Tensor, ...]], limit: float
) -> tuple[float, float]:
    """Largest relative error over the batches, and the limit for outputs of their precision."""
    worst = 0.0
    for inputs in batches:
        expected = list(tensors(model(*_copies(inputs))))
        if not expected:
            raise ExportError(f"model: {type(model).__name__} returns no tensor")
        for y in expected:
            if y.numel() and not torch.isfinite(y).any():
                raise ExportError(
                    "example_inputs: the model's output on them is not finite, which shows nothing"
                )
            if y.dtype in (torch.float16, torch.bfloat16):
                limit = max(limit, HALF_STEPS * torch.finfo(y.dtype).eps)
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        with _failing_as(f"exported, it fails in {made.checked_with} on inputs {shapes}"):
            got = made.run(_copies(inputs))
        worst = max(worst, difference(expected, got))
    return worst, limit


def _copies(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For a forward pass that may write to its inputs."""
    return tuple(x.clone() for x in inputs)


def _version(package: str) -> str:
    return f"{package} {metadata.version(package)}"
