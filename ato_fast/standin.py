"""The dense model as a copy that runs without values, and what its forward pass does.

Shapes are tried on the meta device, in evaluation and, where training may do something else to
channels, in training too. A forward pass that needs values (it turns a tensor into a number, say)
runs on the CPU instead.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, fx, nn

from . import multihead
from .calls import Calls
from .capture import TraceError, mode, no_fast_path
from .constants import Constants, SharedError
from .probe import cpu_inputs, in_dtype, mapped, on_cpu, tensors
from .shrink import duplicate, named_tensors

ELEMENTS = 2**18
"""Of the inputs that are enough (one image of 224 pixels has 150,528), but no fewer than two
examples, which still show an operation that mixes them."""


class StandIn:
    """Stands in for one model, which is left as it is.

    Args:
        model: any module.
        args, kwargs: of one forward call; kept on the CPU as ``args`` and ``kwargs``.
        batch: their number of examples, of which few may be enough; None to keep them all.

    ``dtype`` is the first of float64 and float32 that the model runs in, None if it is neither.

    Raises:
        TraceError: the model cannot be copied, or a copy does not run.
    """

    def __init__(
        self, model: nn.Module, args: tuple, kwargs: dict, batch: int | None = None
    ) -> None:
        self.model = model
        self.originals = frozenset(id(tensor) for _, tensor in named_tensors(model))
        # What the dense forward pass does in evaluation and, where that is more, in training.
        self.constants: dict[bool, list] = {}
        self.outputs: dict[bool, list] = {}
        self.calls: dict[bool, Calls] = {}
        self._take(args, kwargs)
        error = self._begin()
        if error is None and batch is not None:
            size = sum(x.numel() for x in tensors((args, kwargs)))
            few = max(ELEMENTS * batch // max(size, 1), 2)
            if few < batch:
                self._take_few(args, kwargs, batch, few)
        if error is not None:
            error = self._with_values()
        if error is not None:
            raise TraceError(
                f"model: a copy of {type(model).__name__} does not run on the CPU with the "
                f"example inputs: {type(error).__name__}: {error}"
            ) from error

    def _take(self, args: tuple, kwargs: dict) -> None:
        self.args, self.kwargs = cpu_inputs(args), cpu_inputs(kwargs)

    def _begin(self) -> Exception | None:
        """Learn what the dense model does without values; rounding hides less in double precision,
        but some forwards insist on theirs."""
        self.device = "meta"
        self.outputs.clear()
        empty = mapped((self.args, self.kwargs), lambda x: x.to("meta"))
        for self.dtype in (torch.float64, torch.float32, None):
            self.inputs = empty if self.dtype is None else in_dtype(empty, self.dtype)
            error = self._learn(training=False)
            if error is None:
                break
        return error

    def _take_few(self, args: tuple, kwargs: dict, batch: int, few: int) -> None:
        """Go on with few examples of a large batch, where the model takes them for a batch."""
        expected = [
            torch.Size([few, *shape[1:]]) if shape[:1] == (batch,) else shape
            for shape in self.outputs[False]
        ]
        self._take(*mapped((args, kwargs), lambda x: x[:few] if _leads(x, batch) else x))
        if self._begin() is not None or self.outputs[False] != expected:
            self._take(args, kwargs)
            self._begin()

    def _learn(self, training: bool) -> Exception | None:
        """Record what the dense model does; why it does not run, if it does not."""
        model = self.copy()
        record, calls = Constants(self.originals), Calls(model)
        # It keeps every activation, which without values costs nothing.
        with calls if self.device == "meta" else nullcontext():
            error = self.fails(model, record, training)
        if isinstance(error, SharedError):
            raise TraceError(f"model: {error}")
        if error is None:
            self.constants[training] = record.seen
            self.outputs[training] = [x.shape for x in record.outputs]
            calls.finish(record.outputs)
            self.calls[training] = calls
        return error

    def differs_in_training(self) -> bool:
        """Whether training may treat channels in another way than evaluation.

        Dropout, the statistics of batch norm and stochastic depth aside. Where it does anything
        else, it is tried as well from now on.
        """
        if self._learn(training=True) is not None:
            if self.device == "meta":
                self._with_values()
                self._learn(training=True)
        if self.device != "meta" or not self.calls[True].same(self.calls[False]):
            return True
        # One mode is enough to try: the one that draws the noise, where there is any.
        chosen = self.calls[True].noisy
        self.constants = {chosen: self.constants[chosen]}
        return False

    def _with_values(self) -> Exception | None:
        """Go on with values: some forwards turn a tensor into a number, or keep tables outside
        buffers."""
        self.device, self.dtype, self.inputs = "cpu", None, (self.args, self.kwargs)
        error = self._learn(training=False)
        if error is None:
            self.dtype = next((d for d in (torch.float64, torch.float32) if self._runs_in(d)), None)
        return error

    def _runs_in(self, dtype: torch.dtype) -> bool:
        args, kwargs = in_dtype(self.inputs, dtype)
        try:
            run(self.copy().to(dtype), args, kwargs)
        except Exception:
            return False
        return True

    def copy(self) -> nn.Module:
        """A fresh copy of the model: without values, if it runs without."""
        memo: dict[int, Tensor] = {}
        if self.device == "meta":
            for _, tensor in named_tensors(self.model):
                empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = empty
        try:
            twin = duplicate(self.model, memo)
        except Exception as error:
            raise TraceError(
                f"model: {type(self.model).__name__} cannot be copied, which shrinking needs: "
                f"{type(error).__name__}: {error}"
            ) from error
        for module in twin.modules():
            if type(module) is nn.MultiheadAttention:
                multihead.convert(module)
        if self.device != "meta":
            return on_cpu(twin)
        return twin if self.dtype is None else twin.to(self.dtype)

    def fails(self, model: nn.Module, constants: Constants, training: bool) -> Exception | None:
        """Why ``model`` does not do what the dense one does, as far as shapes and the numbers it
        computes with show; None if it does. ``constants.outputs`` are its outputs."""
        args, kwargs = self.inputs
        try:
            with torch.device(self.device), constants:
                constants.outputs = run(model, args, kwargs, training)
            shapes = [x.shape for x in constants.outputs]
            if self.outputs.get(training, shapes) != shapes:
                raise ValueError("outputs of other shapes")
        except Exception as error:
            return error
        return None


def examples(tree) -> int:
    """The longest first dimension of any tensor, which is no less than the number of examples."""
    return max((len(x) for x in tensors(tree) if x.dim()), default=1)


def _leads(x: Tensor, batch: int) -> bool:
    return x.dim() > 0 and x.shape[0] == batch


def run(model: nn.Module, args: tuple, kwargs: dict, training: bool = False) -> list[Tensor]:
    """Output tensors in eval mode, with the same random numbers every time."""
    chosen = nullcontext() if isinstance(model, fx.GraphModule) else mode(model, training)
    with chosen, no_fast_path(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(tensors(model(*args, **kwargs)))
