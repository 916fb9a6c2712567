"""What test_triton.py runs in a process of its own, where Triton's interpreter is on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ato_fast import DHSPG, HalfSpace, Prox, backend, ops
from ato_fast.kernels import common
from ato_fast.reference import group_norms_ref, group_step_ref
from numerics import assert_same_bits
from samples import (
    PROJECTIONS,
    Variant,
    by_name,
    every_layout,
    layout_of,
    random_mask,
    set_grads,
    snapshot,
)
from small_rates import RATES, wrong_groups
from triton_small import (
    BARE,
    BY_NAME,
    bf16,
    check_step,
    cloned,
    drop_some,
    small,
    small_layout,
    some_bf16,
)


def follow(variant: Variant, projection: object, convert: Callable | None = None, **more) -> None:
    """Two steps with half of the groups dropped, the second with gradients missing."""
    model, optimizer = small(variant, projection, convert, **more)
    drop_some(optimizer)
    for step in range(2):
        set_grads(model, step)
        if step == 1:
            model.heads.weight.grad = model.wide.weight.grad = None
        check_step(optimizer)
    if projection is not None:
        zero, dropped = int(optimizer.n_zero()), int((~optimizer.mask).sum())
        assert 2 <= zero <= dropped - 2, (zero, dropped)


def table(*names: str) -> None:
    """Every projection with these optimizers."""
    for name in names:
        for projection in PROJECTIONS:
            print(name, by_name(projection))
            follow(BY_NAME[name], projection)


def dtypes() -> None:
    """bf16 parameters, and both dtypes in one group, in either order of the buffers."""
    for convert in (bf16, some_bf16):
        for name, projection in (("nesterov", DHSPG()), ("adamw", HalfSpace(0.2))):
            print(convert.__name__, name)
            follow(BY_NAME[name], projection, convert)
        # Rounded to nearest even: plain SGD has the reference's bits.
        model, optimizer = small(BY_NAME["sgd"], None, convert)
        assert len(optimizer.flat.buffers) == (1 if convert is bf16 else 2)
        set_grads(model, 0)
        arguments = optimizer.op_arguments()
        expected = cloned(arguments)
        group_step_ref(*expected)
        ops.group_step_(*arguments)
        for got, wanted in zip(arguments[0], expected[0], strict=True):
            assert_same_bits(got, wanted)
    # The NaN that NVIDIA GPUs make would overflow to -0.
    model, optimizer = small(BY_NAME["momentum"], None, bf16)
    set_grads(model, 0)
    optimizer._first[0].view(torch.int32).fill_(0x7FFFFFFF)
    optimizer.step()
    assert model.wide.weight.isnan().all()


def layouts() -> None:
    """`samples.every_layout`: channels-last, depthwise, sizes 127 to 129, a channel of 17,000."""
    model = every_layout()
    optimizer = BY_NAME["adamw"](model, layout_of(model), projection=DHSPG(eps=0.1))
    set_grads(model, 0)
    drop_some(optimizer)
    check_step(optimizer)


def rounding() -> None:
    """DHSPG's strength is chosen by what the optimizer does, not by fp32's rounding."""
    for name in ("sgd-decay", "nesterov", "adam", "adamw"):
        for lr in RATES:
            assert wrong_groups(BY_NAME[name], lr) == 0, (name, lr)
    assert wrong_groups(BY_NAME["adamw"], RATES[0], torch.bfloat16) == 0


def parameter_groups() -> None:
    """A group with momentum beside one without, lr as number and as tensor."""
    model, _ = small(BY_NAME["sgd"], None)
    some, others = list(model.parameters())[::2], list(model.parameters())[1::2]
    groups = [
        {"params": some, "momentum": 0.9, "lr": torch.tensor(0.02)},
        {"params": others, "momentum": 0.0, "weight_decay": 0.1},
    ]
    optimizer = BY_NAME["sgd"](model, small_layout(model), projection=Prox(), params=groups)
    drop_some(optimizer)
    for step in range(2):
        set_grads(model, step)
        check_step(optimizer)
    states = [bool(optimizer.state[p]["momentum_buffer"].any()) for p in others if p.numel()]
    assert not any(states)


def zeros() -> None:
    """Zero is exact and absorbing, its state cleared; NaN is not hidden by it."""
    for name, projection in (("momentum", Prox()), ("adamw", DHSPG())):
        model, optimizer = small(BY_NAME[name], projection)
        mask = random_mask(optimizer.layout, seed=5)
        dropped = (~mask).nonzero()[:, 0]
        set_grads(model, 0)
        optimizer.step()
        optimizer.set_mask(mask.clone(), threshold=math.inf)
        optimizer.step()
        assert int(optimizer.n_zero()) == len(dropped)
        optimizer.set_strength(threshold=0.0)
        for step in (1, 2):
            set_grads(model, step, scale=100.0)
            optimizer.step()
        plan, flat = optimizer.flat.plan, optimizer.flat
        tables = (flat.tensors, plan.segments, plan.bundles, plan.blocks, optimizer.layout.n_groups)
        for buffers in (flat.buffers, optimizer._first, optimizer._second):
            if buffers:
                sums = group_norms_ref(buffers, [], *tables)[:, 0]
                assert not sums[dropped].any()
                mask[BARE] = False
                assert (sums[mask] > 0).all()

        model, optimizer = small(BY_NAME[name], projection)
        optimizer.set_mask(torch.zeros(optimizer.layout.n_groups), threshold=math.inf)
        set_grads(model, 0)
        model.wide.weight.grad[1, 1060] = float("nan")
        optimizer.step()
        assert model.wide.weight[1].isnan().any() and not model.wide.weight[0].any()


def found_inf() -> None:
    """Nothing changes, not even the counts; a scale divides without a trace in the bits."""
    for name in ("nesterov", "adamw"):
        model, optimizer = small(BY_NAME[name], Prox())
        set_grads(model, 0)
        optimizer.step()
        drop_some(optimizer)
        before = snapshot(model, optimizer)
        set_grads(model, 1)
        model.conv.weight.grad[0] = float("nan")
        optimizer.found_inf = torch.ones(1)
        optimizer.step()
        for key, value in snapshot(model, optimizer).items():
            assert_same_bits(value, before[key], key)

        results = []
        for scale in (1.0, 1024.0):
            model, optimizer = small(BY_NAME[name], Prox())
            drop_some(optimizer)
            set_grads(model, 0, scale)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(1)
            optimizer.step()
            results.append(snapshot(model, optimizer))
        for key, value in results[0].items():
            assert_same_bits(results[1][key], value, key)


def missing() -> None:
    """Without any gradient only the projection acts, and no count advances."""
    model, optimizer = small(BY_NAME["adamw"], Prox())
    norms = optimizer.group_norms()
    before = snapshot(model)
    optimizer.set_mask(random_mask(optimizer.layout, seed=5), threshold=0.25)
    check_step(optimizer)
    after, dropped = optimizer.group_norms(), ~optimizer.mask
    torch.testing.assert_close(after[dropped], (norms[dropped] - 0.25).clamp(min=0))
    assert_same_bits(after[~dropped], norms[~dropped])
    assert_same_bits(model.scalar.detach(), before["scalar"])
    assert not optimizer._step_counts.any()


def bits() -> None:
    """Reruns, lr as a number or a tensor, kept groups beside dropped ones: the same bits."""
    lr = float(torch.tensor(0.02))
    for name in ("momentum", "adamw"):
        results = []
        for projection, rate in ((None, lr), (DHSPG(), lr), (DHSPG(), torch.tensor(0.02))):
            model, optimizer = small(BY_NAME[name], projection, lr=rate)
            drop_some(optimizer)
            for step in range(2):
                set_grads(model, step)
                optimizer.step()
            results.append(snapshot(model, optimizer))
        for key, value in results[1].items():
            assert_same_bits(results[2][key], value, key)
        layout, differ = optimizer.layout, 0
        for key in dict(model.named_parameters()):
            plain, projected = results[0][key], results[1][key]
            kept = torch.ones_like(plain, dtype=torch.bool)
            for dim in range(plain.dim()):
                groups = torch.tensor(layout.groups_of(key, dim))
                of = (groups < 0) | optimizer.mask[groups]
                kept &= of.reshape([-1 if d == dim else 1 for d in range(plain.dim())])
            differ += int((~kept).sum())
            assert_same_bits(projected[kept], plain[kept], key)
        assert differ > 100


def norms() -> None:
    """Sums of the groups of every dtype, and zeros for a gate without parameters."""
    for convert in (None, bf16, some_bf16):
        model, optimizer = small(BY_NAME["adamw"], None, convert)
        set_grads(model, 0)
        model.heads.weight.grad = None
        flat, plan = optimizer.flat, optimizer.flat.plan
        assert backend.serving("group_norms", flat.device, flat.dtypes) == "triton"
        for grads in ([], flat.gradients()):
            tables = (flat.tensors, plan.segments, plan.bundles, plan.blocks)
            arguments = (flat.buffers, grads, *tables, optimizer.layout.n_groups)
            got = ops.group_norms(*arguments)
            torch.testing.assert_close(got, group_norms_ref(*arguments), rtol=1e-12, atol=0)
            assert_same_bits(ops.group_norms(*arguments), got)
            zero = got[:, 0] == 0
            assert zero[BARE].all() and int(zero.sum()) == 2


@triton.jit
def _positions_kernel(
    out_ptr, inside_ptr, begin, n, inner, outer, stride,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place, _, visited = common.places(n, CHANNELS, BLOCK)
    begin, inner, outer = begin.to(tl.int64), inner.to(tl.int64), outer.to(tl.int64)
    base, distance, inside, reach = common.elements(begin, place, inner, outer, stride)
    channel, lane, _, _ = place
    at = out_ptr + channel * BLOCK + lane
    inside &= visited[None, :, None]
    tl.store(at, base + distance, mask=inside)
    tl.store(inside_ptr, reach)


def positions() -> None:
    """Where elements lie: pieces of every length, up to distances beyond 32 bits."""
    for n, inner, outer, stride in (
        (1, 5000, 1, 5000), (1, 1500, 3, 4000), (1, 9, 400, 18), (1, 1, 3000, 7),
        (1, 700, 4, 1 << 40), (1, 1500, 3, 1 << 40), (1, 1, 1500, (1 << 20) - 1),
        (3, 40, 1, 120), (8, 60, 4, 480), (5, 3, 80, 15), (8, 200, 1, 1 << 40), (2, 7, 30, 1 << 33),
    ):  # fmt: skip
        piece = torch.arange(outer)[:, None] * stride + torch.arange(inner)
        wanted = piece.flatten() + torch.arange(n)[:, None] * inner
        begin, found = 0, []
        while begin < inner * outer:
            out, reach = torch.full((n, 1024), -1), torch.zeros(1, dtype=torch.int64)
            _positions_kernel[(1,)](
                out, reach, begin, n, inner, outer, stride, CHANNELS=common.CHANNELS, BLOCK=1024
            )
            count = int(reach)
            assert 0 < count <= (1024 if n == 1 else 128)
            assert (out[:, count:] == -1).all()
            found.append(out[:, :count])
            begin += count
        assert torch.equal(torch.cat(found, dim=1), wanted), (n, inner, outer, stride)


def host_tables() -> None:
    """Tables are made anew only when an address or a hyperparameter changed."""
    model, optimizer = small(BY_NAME["momentum"], Prox())
    set_grads(model, 0)
    common._device_table.cache_clear()
    for _ in range(3):
        optimizer.step()
    assert common._device_table.cache_info().misses == 1
    model.conv.weight.grad = model.conv.weight.grad.clone()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    assert common._device_table.cache_info().misses == 3
    parts = common.device_tables([(1, 2, 3), (), (4,)], [(0.1,), (5.0, -6.0)], torch.device("cpu"))
    wanted = [[1, 2, 3, 0], [], [4, 0], [0.1, 0.0], [5.0, -6.0]]
    assert [part.tolist() for part in parts] == wanted


def refusals() -> None:
    """Values the kernels would misread raise before anything changes."""
    model, optimizer = small(BY_NAME["adamw"], Prox(), lr=torch.tensor(0.02))
    set_grads(model, 0)
    before = snapshot(model, optimizer)
    for place, value, message in (
        (5, [torch.zeros(g.shape, dtype=torch.float16) for g in optimizer.flat.gradients()],
         "grads[1]: expected torch.float32 on cpu, got torch.float16 on cpu"),
        (5, [torch.zeros(5)] * len(optimizer.flat.params), "grads[0]: expected 0 elements or"),
        (15, [torch.zeros((), dtype=torch.float64)], "lr[0]: expected one float32 element on cpu"),
        (16, torch.zeros(2), "grad_scale: expected one float32 element on cpu, got 2"),
        (17, torch.zeros(1, dtype=torch.int32), "found_inf: expected one float32 element"),
    ):  # fmt: skip
        arguments = list(optimizer.op_arguments())
        arguments[place] = value
        try:
            ops.group_step_(*arguments)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error: {message}")
    for key, value in snapshot(model, optimizer).items():
        assert_same_bits(value, before[key], key)
