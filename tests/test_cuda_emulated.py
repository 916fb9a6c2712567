"""The CUDA kernels on the host, in emulated thread blocks.

This checks their logic: which elements are read and written, sums, decisions, barriers, the host
functions. It does not check the GPU: memory ordering, races within a warp, the compiler's output
and everything about speed need one.
"""

import math

import pytest
import torch
from torch import nn

import emulated
from ato_fast import DHSPG, HalfSpace, Prox, backend, ops
from ato_fast.groups import GroupLayout
from ato_fast.optimizer import SGD
from emulated import (
    ADAMW,
    BY_NAME,
    RULES,
    dropped_part,
    layout_of_many,
    many_segments,
    train,
)
from numerics import assert_all_as_accurate, assert_same_bits
from samples import (
    PROJECTIONS,
    by_name,
    every_layout,
    layout_of,
    random_mask,
    set_grads,
    snapshot,
    twin,
)
from small_rates import RATES, wrong_groups

pytestmark = pytest.mark.skipif(emulated.GXX is None, reason="needs g++")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return emulated.load(emulated.build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture
def on_reference(monkeypatch):
    """Runs the reference from where it is called on."""
    return lambda: monkeypatch.setattr(
        backend, "implementation", lambda op, *_: backend._REFERENCE[op]
    )


@pytest.fixture
def order(library, monkeypatch):
    """Runs on the emulated device; call it with a seed to change the order of blocks, threads."""
    monkeypatch.setattr(backend, "implementation", emulated.implementation)
    library.emulation_set_order(1)
    yield library.emulation_set_order
    library.emulation_set_order(0)


def assert_equal_snapshots(got, expected):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_same_bits(value, expected[name], name)


@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
@pytest.mark.parametrize("variant", RULES, ids=by_name)
def test_follows_the_float64_oracle(variant, projection, order, on_reference):
    model, optimizer = train(variant, projection)
    got = snapshot(model, optimizer)
    n_zero = int(optimizer.n_zero())
    assert not optimizer._scratch.any()
    on_reference()
    other, expected = train(variant, projection)
    same = snapshot(other, expected)
    oracle = snapshot(*train(variant, projection, torch.float64))
    for key in [key for key in got if key.endswith(":step")]:
        assert got.pop(key) == same.pop(key) == oracle.pop(key)
    assert_all_as_accurate(got, same, oracle)
    assert n_zero == int(expected.n_zero())
    if projection is not None:
        # One of the dropped groups has no parameters.
        assert 1 < n_zero < int((~optimizer.mask).sum())


@pytest.mark.parametrize("projection", [Prox(), DHSPG()], ids=by_name)
@pytest.mark.parametrize("variant", [BY_NAME["momentum"], ADAMW], ids=by_name)
def test_channels_of_many_segments(variant, projection, order, on_reference):
    make, layout = many_segments, layout_of_many
    model, optimizer = train(variant, projection, make=make, layout=layout, steps=5)
    got = snapshot(model, optimizer)
    assert max(e - b for b, e, *_ in optimizer.flat.plan.bundles.tolist()) == 80
    on_reference()
    same = snapshot(*train(variant, projection, make=make, layout=layout, steps=5))
    oracle = snapshot(*train(variant, projection, torch.float64, make=make, layout=layout, steps=5))
    for key in [key for key in got if key.endswith(":step")]:
        assert got.pop(key) == same.pop(key) == oracle.pop(key)
    assert_all_as_accurate(got, same, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lr", RATES)
@pytest.mark.parametrize("variant", RULES, ids=by_name)
def test_rounding_does_not_choose_dhspgs_strength(variant, lr, dtype, order):
    assert wrong_groups(variant, lr, dtype) == 0


@pytest.mark.parametrize("variant", RULES, ids=by_name)
def test_kept_groups_have_the_bits_of_an_unprojected_run(variant, order):
    plain, _ = train(variant, None, steps=5)
    for projection in (Prox(), HalfSpace(), DHSPG()):
        model, optimizer = train(variant, projection, steps=5)
        for name, param in model.named_parameters():
            got = param.detach().clone()
            expected = plain.get_parameter(name).detach().clone()
            for dim in range(got.dim()):
                if name == "last.weight" and dim == 1:  # input columns are not projected
                    continue
                groups = torch.tensor(optimizer.layout.groups_of(name, dim))
                dropped = (groups >= 0) & ~optimizer.mask[groups]
                got.movedim(dim, 0)[dropped] = 0
                expected.movedim(dim, 0)[dropped] = 0
            assert_same_bits(got, expected, name)


@pytest.mark.parametrize("projection", PROJECTIONS[1:], ids=by_name)
@pytest.mark.parametrize("variant", RULES, ids=by_name)
def test_zero_is_exact_absorbing_and_clears_the_state(variant, projection, order):
    model = every_layout()
    layout = layout_of(model)
    optimizer = variant(model, layout, projection=projection)
    for step in range(2):
        set_grads(model, step)
        optimizer.step()
    optimizer.set_mask(random_mask(layout), threshold=math.inf)
    set_grads(model, 2)
    optimizer.step()
    optimizer.set_strength(threshold=0.0)
    for step in range(3, 5):
        for name, value in dropped_part(optimizer):
            assert_same_bits(value, torch.zeros_like(value), name)
        # A state that is not zero any more, as a loaded one may be not.
        for buffer in (*optimizer._first, *optimizer._second):
            buffer += (optimizer.flat.buffers[0] == 0).float()
        set_grads(model, step, scale=100.0)
        optimizer.step()
    for name, value in dropped_part(optimizer):
        assert_same_bits(value, torch.zeros_like(value), name)


def test_negative_zero_becomes_zero(order):
    model = every_layout()
    optimizer = ADAMW(model, layout_of(model))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(-0.0)
    optimizer.set_mask(torch.zeros(optimizer.layout.n_groups))
    set_grads(model, 0)
    optimizer.step()
    for name, value in dropped_part(optimizer):
        assert_same_bits(value, torch.zeros_like(value), name)


@pytest.mark.parametrize("variant", RULES, ids=by_name)
def test_found_inf_changes_nothing(variant, order):
    model, optimizer = train(variant, Prox(), steps=3)
    before = snapshot(model, optimizer)
    set_grads(model, 3)
    model.conv.weight.grad[0] = float("nan")
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert_equal_snapshots(snapshot(model, optimizer), before)
    assert not optimizer._scratch.any()


def test_missing_gradients_and_step_counters(order):
    model = every_layout()
    optimizer = ADAMW(model, layout_of(model))
    optimizer.set_mask(random_mask(optimizer.layout), threshold=0.25)
    norms, before = optimizer.group_norms(), snapshot(model)
    optimizer.step()
    after, dropped = optimizer.group_norms(), ~optimizer.mask
    torch.testing.assert_close(after[dropped], (norms[dropped] - 0.25).clamp(min=0))
    torch.testing.assert_close(after[~dropped], norms[~dropped], rtol=0, atol=0)
    assert_same_bits(model.free.weight.detach(), before["free.weight"])
    assert not optimizer._step_counts.any()
    set_grads(model, 0)
    model.odd.weight.grad = None
    optimizer.step()
    for name, param in model.named_parameters():
        expected = 0 if name == "odd.weight" or not param.numel() else 1
        assert optimizer.state[param]["step"] == expected, name


def test_groups_with_and_without_momentum(order, on_reference):
    """Of two parameter groups one has momentum; the other's buffer is cleared all the same."""

    def run():
        model = every_layout()
        rest = [p for p in model.parameters() if p is not model.odd.weight]
        groups = [{"params": rest}, {"params": [model.odd.weight], "momentum": 0.0, "lr": 0.5}]
        optimizer = SGD(model, layout_of(model), lr=0.1, momentum=0.9, params=groups)
        optimizer.state[model.odd.weight]["momentum_buffer"].fill_(3.0)
        optimizer.set_mask(random_mask(optimizer.layout), 2.0)
        for step in range(3):
            set_grads(model, step)
            optimizer.step()
        return snapshot(model, optimizer)

    got = run()
    on_reference()
    expected = run()
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-6)


def test_a_momentum_buffer_no_longer_used_is_cleared(order):
    model, optimizer = train(BY_NAME["momentum"], Prox(), steps=1)
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.set_mask(random_mask(optimizer.layout), threshold=math.inf)
    before = snapshot(model, optimizer)
    set_grads(model, 1)
    optimizer.step()
    for name, value in dropped_part(optimizer):
        assert_same_bits(value, torch.zeros_like(value), name)
    kept = optimizer.state[model.free.weight]["momentum_buffer"]
    assert_same_bits(kept, before["free.weight:momentum_buffer"])


@pytest.mark.parametrize("narrow", ["all", "mixed"])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=by_name)
@pytest.mark.parametrize("variant", [BY_NAME["momentum"], ADAMW], ids=by_name)
def test_bf16_parameters_keep_fp32_state(variant, projection, narrow, order, on_reference):
    """One step from the same numbers: off by one rounding to bf16."""
    model = every_layout()
    for part in [model] if narrow == "all" else [model.conv, model.huge, model.heads, model.odd]:
        part.to(torch.bfloat16)
    wide = twin(model, torch.float64)
    nets = []
    for net in (model, wide):
        optimizer = variant(net, layout_of(net), projection=projection)
        optimizer.set_mask(random_mask(optimizer.layout), threshold=0.3)
        set_grads(net, 0)
        for param in net.parameters():
            param.grad = param.grad.bfloat16().to(param.dtype)
        optimizer.step()
        nets.append(optimizer)
        on_reference()
    for got, expected in zip(nets[0].flat.params, nets[1].flat.params, strict=True):
        ulp = 2**-8 if got.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(got.double(), expected, rtol=ulp, atol=1e-5)
        for key, value in nets[0].state[got].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(
                value.double(), nets[1].state[expected][key].double(), rtol=1e-5, atol=1e-6
            )


def test_bits_do_not_depend_on_the_order_of_blocks_and_threads(order):
    results = []
    for seed in (0, 1, 2):
        order(seed)
        results.append(snapshot(*train(ADAMW, DHSPG(), steps=5)))
    for other in results[1:]:
        assert_equal_snapshots(other, results[0])


@pytest.mark.parametrize("variant", RULES[::2], ids=by_name)
def test_padding_comes_back_untouched_and_bits_do_not_depend_on_alignment(variant, order):
    model = every_layout()
    optimizer = variant(model, layout_of(model), projection=HalfSpace(eps=0.2))
    optimizer.set_mask(random_mask(optimizer.layout), threshold=1.5)
    set_grads(model, 0)
    arguments = list(optimizer.op_arguments())
    used = torch.zeros(optimizer.flat.buffers[0].numel(), dtype=torch.bool)
    for _, offset, numel, _ in optimizer.flat.table.tolist():
        used[offset : offset + numel] = True
    guards = []

    def padded(tensor, by):
        outer = torch.full((tensor.numel() + 37,), float("nan"))
        inner = outer[by : by + tensor.numel()]
        inner.copy_(tensor)
        return inner, outer

    by = 15  # an address of 4-byte alignment only
    for place in (0, 1, 2):
        copies = [padded(torch.where(used, b, float("nan")), by) for b in arguments[place]]
        arguments[place] = [inner for inner, _ in copies]
        guards += [outer for _, outer in copies]
    flat_grads = [g.as_strided((g.numel(),), (1,)) for g in arguments[5]]
    grads = [padded(g, 3) for g in flat_grads]
    arguments[3], arguments[5] = arguments[3].clone(), [inner for inner, _ in grads]
    ops.group_step_(*arguments)
    optimizer.step()
    mine = torch.cat([torch.zeros(by).bool(), used, torch.zeros(37 - by).bool()])
    buffers = [*optimizer.flat.buffers, *optimizer._first, *optimizer._second]
    for outer, buffer in zip(guards, buffers, strict=True):
        assert outer[~mine].isnan().all()
        assert_same_bits(outer[mine], buffer[used])
    for (_, outer), grad in zip(grads, flat_grads, strict=True):
        assert int(outer.isnan().sum()) == 37
        assert_same_bits(outer[3 : 3 + grad.numel()], grad)


def test_lr_and_grad_scale_on_the_device(order):
    results = []
    for on_device in (False, True):
        model = every_layout()
        lr = torch.tensor([0.02]) if on_device else 0.02
        optimizer = ADAMW(model, layout_of(model), lr=float(torch.tensor(0.02)))
        optimizer.param_groups[0]["lr"] = lr if on_device else float(torch.tensor(0.02))
        optimizer.set_mask(random_mask(optimizer.layout), 2.0)
        if on_device:
            optimizer.grad_scale = torch.tensor([1024.0])
            optimizer.found_inf = torch.zeros(1)
        for step in range(2):
            set_grads(model, step, scale=1024.0 if on_device else 1.0)
            optimizer.step()
        results.append(snapshot(model, optimizer))
    assert_equal_snapshots(*results)


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "mixed"])
@pytest.mark.parametrize("with_grads", [False, True])
def test_group_norms(with_grads, narrow, order):
    for make, layout in ((every_layout, layout_of), (many_segments, layout_of_many)):
        model = make()
        if narrow:
            for parameter_owner in list(model.modules())[2:9:2]:
                parameter_owner.to(torch.bfloat16)
        optimizer = ADAMW(model, layout(model))
        set_grads(model, 0)
        next(iter(model.parameters())).grad = None
        flat, plan = optimizer.flat, optimizer.flat.plan
        grads = flat.gradients() if with_grads else []
        arguments = (flat.buffers, grads, flat.tensors, plan.segments, plan.bundles, plan.blocks)
        got = ops.group_norms(*arguments, optimizer.layout.n_groups)
        expected = backend._REFERENCE["group_norms"](*arguments, optimizer.layout.n_groups)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert_same_bits(ops.group_norms(*arguments, optimizer.layout.n_groups), got)


def test_limits_of_a_launch_are_named(order):
    model = every_layout()
    optimizer = ADAMW(model, layout_of(model))
    set_grads(model, 0)
    arguments = list(optimizer.op_arguments())
    for place, value, message in (
        (14, arguments[14] * 241, "hyper: expected at most 240 parameter groups, got 241"),
        (4, torch.zeros(1), "scratch"),
        (4, torch.zeros(0, dtype=torch.int32), "scratch: expected one element"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.group_step_(*arguments[:place], value, *arguments[place + 1 :])
    many = 2049
    arguments[0:3] = [[torch.zeros(many)] for _ in range(3)]
    arguments[3], arguments[5] = torch.zeros(many), [torch.zeros(1)] * many
    rows = torch.arange(many)
    arguments[6] = torch.stack([rows * 0, rows, rows * 0 + 1, rows * 0], dim=1)
    with pytest.raises(RuntimeError, match="grads: expected at most 2048 tensors, got 2049"):
        ops.group_step_(*arguments)


def test_no_blocks_is_no_launch(order):
    model = nn.Module()
    model.nothing = nn.Parameter(torch.empty(0))
    layout = GroupLayout(
        gates=(), unprunable=(), shapes={"nothing": (0,)}, parameters=("nothing",), mac_terms=()
    )
    optimizer = ADAMW(model, layout)
    model.nothing.grad = torch.empty(0)
    optimizer.step()
    assert not optimizer._step_counts.any()
