"""What serves each op, forcing a backend, and the checks of the op wrappers."""

import subprocess
import sys

import pytest
import torch

from ato_fast import Prox, backend, ops
from samples import VARIANTS, every_layout, layout_of, random_mask, set_grads

CPU = torch.device("cpu")
FP32 = [torch.float32]


@pytest.fixture
def arguments():
    model = every_layout()
    optimizer = VARIANTS[-1](model, layout_of(model), projection=Prox())
    optimizer.set_mask(random_mask(optimizer.layout), threshold=0.5)
    set_grads(model, 0)
    return dict(zip(NAMES, optimizer.op_arguments(), strict=True))


NAMES = [
    part.split()[-1] for part in ops.SCHEMAS["group_step_"].split(")->")[0].strip("()").split(", ")
]
NAMES[-1] = "projection_args"


def test_auto_takes_the_cpu_kernel_for_fp32_and_the_reference_otherwise(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    for op in backend.OPS:
        assert backend.serving(op, CPU, FP32) == "cpu"
        assert backend.serving(op, CPU, [torch.float64]) == "reference"
        assert backend.serving(op, CPU, [torch.float32, torch.bfloat16]) == "cpu"
        assert backend.serving(op, CPU, [torch.float16]) == "reference"
        assert backend.serving(op, torch.device("mps"), FP32) == "reference"


@pytest.mark.parametrize(
    ("cuda", "triton", "served"),
    [(None, None, "cuda"), ("no", None, "triton"), ("no", "no", "reference")],
)
def test_auto_on_cuda_takes_the_extension_then_triton(cuda, triton, served, monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "extension", lambda name: backend.Extension(name, cuda))
    monkeypatch.setattr(backend, "_load_triton", lambda: triton)
    monkeypatch.setattr(backend, "_TRITON", dict.fromkeys(backend.OPS))
    for op in backend.OPS:
        assert backend.serving(op, torch.device("cuda"), FP32) == served
        assert backend.serving(op, torch.device("cuda"), [torch.float64]) == "reference"


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_forced_backend_is_what_runs(name, monkeypatch, arguments):
    called = []
    monkeypatch.setenv(backend.VARIABLE, name)
    original = backend._REFERENCE["group_step_"]
    monkeypatch.setitem(
        backend._REFERENCE, "group_step_", lambda *a: (called.append(1), original(*a))
    )
    ops.group_step_(**arguments)
    assert bool(called) == (name == "reference")


def test_an_unknown_name_raises(monkeypatch, arguments):
    monkeypatch.setenv(backend.VARIABLE, "cudnn")
    with pytest.raises(backend.BackendError, match="expected one of auto, triton.*got 'cudnn'"):
        ops.group_step_(**arguments)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda", "it needs cuda tensors, got cpu tensors"),
        ("triton", "it needs CUDA tensors or TRITON_INTERPRET=1"),
    ],
)
def test_a_forced_backend_that_cannot_serve_raises_and_says_why(
    name, reason, monkeypatch, arguments
):
    monkeypatch.setenv(backend.VARIABLE, name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = arguments["params"][0].clone()
    with pytest.raises(backend.BackendError, match=f"{name} cannot serve .*({reason})"):
        ops.group_step_(**arguments)
    assert torch.equal(arguments["params"][0], before)


def test_a_forced_backend_that_was_not_built_raises(monkeypatch, arguments):
    missing = backend.Extension("_C", "ato_fast._C was not built")
    monkeypatch.setattr(backend, "extension", lambda name: missing)
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    with pytest.raises(backend.BackendError, match="_C was not built"):
        ops.group_step_(**arguments)
    monkeypatch.setenv(backend.VARIABLE, "auto")
    assert backend.serving("group_step_", CPU, FP32) == "reference"
    assert "was not built" in backend.report()


def test_report_names_every_backend(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "auto")
    report = backend.report()
    assert "cpu       group_step_  ready" in report
    assert all(word in report for word in ("cuda", "triton", "group_norms"))


def test_importing_loads_no_extension():
    code = (
        "import ato_fast.optimizer, ato_fast.backend as b;"
        "assert b.extension.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("first", lambda v: [], r"first: expected 1 flat buffer\(s\), got 0"),
        ("second", lambda v: [v[0][:-1]], r"second\[0\]: expected a contiguous buffer"),
        ("params", lambda v: [v[0][::2]], r"params\[0\]: expected a contiguous buffer"),
        ("params", lambda v: [v[0].view(2, -1)], r"params\[0\]: expected a contiguous buffer"),
        ("grads", lambda v: v[:-1], "grads: expected .*, one per tensor"),
        ("tensors", lambda v: v[:, :3], r"tensors: expected int64 \[n, 4\] on the CPU"),
        ("segments", lambda v: v[:, :7], r"segments: expected int64 \[n, 8\]"),
        ("bundles", lambda v: v.to("meta"), r"bundles: expected int64 \[n, 5\] on cpu.*on meta"),
        ("blocks", lambda v: v[0], r"blocks: expected int64 \[n, 3\]"),
        ("step", lambda v: v[:-1], "step: expected shape"),
        ("strength", lambda v: v[:-1], "mask, strength and threshold: expected one shape"),
        ("mask", lambda v: v[:-1], "mask, strength and threshold: expected one shape"),
        ("mask", lambda v: v.float(), "mask: expected bool, got torch.float32"),
        ("projection_args", lambda v: (0.5,), r"projection_args: expected 0 value\(s\) for pro"),
        ("optimizer", lambda v: 3, "optimizer: expected 0"),
        ("projection", lambda v: -1, "projection: expected 0"),
        ("projection", lambda v: 4, "projection: expected 0 to 3"),
        ("hyper", lambda v: v[:-1], "hyper: expected rows of 6"),
    ],
)
def test_the_wrapper_refuses(name, value, message, arguments):
    before = arguments["params"][0].clone()
    with pytest.raises(ValueError, match=message):
        ops.group_step_(**{**arguments, name: value(arguments[name])})
    assert torch.equal(arguments["params"][0], before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grads", lambda v: [g.double() for g in v], r"grads\[\d+\]: expected its parameter's"),
        ("first", lambda v: [v[0].double()], r"first\[0\]: expected dtype"),
        ("step", lambda v: v.double(), r"step\[0\]: expected dtype"),
        ("segments", lambda v: v.int(), "segments: expected int64"),
        ("units", lambda v: v.int(), "units: expected int64"),
        ("units", lambda v: v[:-1], r"units: expected bounds over \d+ bundles"),
        ("hyper", lambda v: [], r"tensors\[0\]: expected one of 0 row\(s\) of hyper"),
        ("tensors", lambda v: v + torch.tensor([9, 0, 0, 0]), r"expected one of 1 buffer\(s\)"),
        ("tensors", lambda v: v + torch.tensor([0, 1 << 40, 0, 0]), "expected a place in a buffer"),
        (
            "grads",
            lambda v: [*v[:-1], torch.ones(5)],
            r"grads\[\d+\]: expected \d+ elements or non",
        ),
        ("grad_scale", lambda v: torch.ones(2), "grad_scale: expected one element"),
        ("found_inf", lambda v: torch.ones(1, dtype=torch.int32), "found_inf: expected float32"),
        ("lr", lambda v: [torch.ones(1)] * 2, "lr: expected 1 tensors or none, got 2"),
    ],
)
def test_the_cpu_kernel_refuses(name, value, message, arguments, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    before = arguments["params"][0].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.group_step_(**{**arguments, name: value(arguments[name])})
    assert torch.equal(arguments["params"][0], before)


@pytest.mark.parametrize("with_grads", [False, True])
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_group_norms_and_opcheck(name, with_grads, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, name)
    model = every_layout()
    optimizer = VARIANTS[-1](model, layout_of(model))
    set_grads(model, 0)
    model.heads.weight.grad = None
    flat, plan, n_groups = optimizer.flat, optimizer.flat.plan, optimizer.layout.n_groups
    grads = flat.gradients() if with_grads else []
    tables = (flat.tensors, plan.segments, plan.bundles, plan.blocks)
    arguments = (flat.buffers, grads, *tables, n_groups)
    sums = ops.group_norms(*arguments)
    expected = torch.zeros(n_groups, 3, dtype=torch.float64)
    for item in range(n_groups):
        for param, param_name in zip(flat.params, flat.names, strict=True):
            for gate in optimizer.layout.gates:
                for part in gate.slices:
                    if part.tensor != param_name or not part.in_group:
                        continue
                    for channel, group in enumerate(part.channels.tolist()):
                        if group >= 0 and group + gate.offset == item:
                            x = param.detach().double().select(part.dim, channel)
                            g = torch.zeros_like(x)
                            if param.grad is not None:
                                g = param.grad.double().select(part.dim, channel)
                            expected[item] += torch.stack(
                                [(x * x).sum(), (g * g).sum(), (x * g).sum()]
                            )
    torch.testing.assert_close(sums, expected if with_grads else expected[:, :1])
    op = torch.ops.ato_fast.group_norms.default
    torch.library.opcheck(op, arguments)
