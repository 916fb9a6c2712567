"""A small model with the ways a group can lie in memory, and a step of it checked on Triton.

Smaller than `samples.every_layout`: the interpreter takes milliseconds per program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ato_fast import backend, ops
from ato_fast.group_optimizer import GroupOptimizer
from ato_fast.groups import GroupLayout
from ato_fast.reference import group_step_ref
from numerics import assert_all_as_accurate, assert_same_bits
from samples import VARIANTS, Variant, layout_from, random_mask

BY_NAME = {variant.name: variant for variant in VARIANTS}
WIDENED = (0, 1, 2, 5, 15)
"""Arguments of the step that the float64 oracle takes in float64: values, states, gradients, lr."""


class Small(nn.Module):
    """Short channels that share a block, long ones over several loads, pieces far from contiguous.

    And entries in no group, groups over several tensors, tensors of 0 and 1 elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.up = nn.ConvTranspose2d(3, 4, 3)  # [3, 4, 3, 3]: 3 pieces of 9, the last in no group
        self.heads = nn.Linear(5, 4)  # a channel = 2 rows
        self.mixed = nn.Linear(4, 8, bias=False)  # two gates and rows in none
        self.wide = nn.Linear(1100, 2)
        self.tall = nn.ConvTranspose2d(120, 2, 3, bias=False)  # 120 pieces of 9
        self.columns = nn.Embedding(600, 2)  # 600 pieces of 1
        self.single = nn.Linear(1, 1, bias=False)
        self.nothing = nn.Parameter(torch.empty(0))
        self.scalar = nn.Parameter(torch.tensor(0.5))


BARE = slice(9, 11)
"""The groups of a `Small` without parameters."""


def small_layout(model: nn.Module) -> GroupLayout:
    """Layout of a `Small`."""
    a, b = [-1, -1, 0, 1, -1, -1, -1, -1], [*[-1] * 5, 1, 0, 1]
    specs = [
        ("coupled", 3, [("conv.weight", 0, None), ("conv.bias", 0, None),
                        ("norm.weight", 0, None), ("norm.bias", 0, None),
                        ("up.weight", 1, [0, 1, 2, -1])]),
        ("heads", 2, [("heads.weight", 0, [0, 0, 1, 1]), ("heads.bias", 0, [0, 0, 1, 1])]),
        ("mixed_a", 2, [("mixed.weight", 0, a)]),
        ("mixed_b", 2, [("mixed.weight", 0, b)]),
        ("bare", 2, []),
        ("wide", 2, [("wide.weight", 0, None), ("wide.bias", 0, None),
                     ("tall.weight", 1, None)]),
        ("columns", 2, [("columns.weight", 1, None)]),
        ("single", 1, [("single.weight", 0, None)]),
    ]  # fmt: skip
    return layout_from(
        model, [(name, n, [(*part, "row") for part in parts]) for name, n, parts in specs]
    )


def bf16(model: nn.Module) -> None:
    """All parameters."""
    model.to(torch.bfloat16)


def some_bf16(model: nn.Module) -> None:
    """Weights of two layers, as beside fp32 norms; their groups lie in both buffers."""
    for layer in (model.conv, model.tall, model.columns):
        layer.to(torch.bfloat16)


def small(
    variant: Variant, projection: object, convert: Callable | None = None, **more
) -> tuple[nn.Module, GroupOptimizer]:
    """A `Small` with random parameters and its optimizer."""
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape))
    if convert is not None:
        convert(model)
    return model, variant(model, small_layout(model), projection=projection, **more)


def drop_some(optimizer: GroupOptimizer) -> None:
    """Drop half the groups, some of these by more than their norm; strength and threshold mixed."""
    n = optimizer.layout.n_groups
    share = torch.tensor([0.2, 0.002, 1.6])[torch.arange(n) % 3] * optimizer.group_norms()
    lr = float(optimizer.param_groups[0]["lr"])
    by_strength = torch.arange(n) % 2 == 0
    optimizer.set_mask(
        random_mask(optimizer.layout, seed=5),
        torch.where(by_strength, share / lr, 0.0),
        threshold=torch.where(by_strength, 0.0, share),
    )


def cloned(arguments: Sequence, dtype: torch.dtype | None = None) -> list:
    """Arguments that share no memory with these, floating ones in ``dtype``."""

    def copy(value: object, wanted: torch.dtype | None) -> object:
        if isinstance(value, Tensor):
            return value.detach().to(wanted or value.dtype, copy=True)
        return [copy(v, wanted) for v in value] if isinstance(value, list) else value

    return [copy(v, dtype if at in WIDENED else None) for at, v in enumerate(arguments)]


def named(arguments: Sequence, used: Sequence[Tensor]) -> dict[str, Tensor]:
    """The buffers' elements without padding, one kind of values per name."""
    return {
        f"{index}:{kind}{index}": buffer[used[index]]
        for kind, buffers in zip(("param", "first", "second"), arguments[:3], strict=True)
        for index, buffer in enumerate(buffers)
    }


def check_step(optimizer: GroupOptimizer) -> None:
    """One step with Triton: as accurate as the reference; zeros, steps and padding exact."""
    used = [torch.zeros(buffer.numel(), dtype=torch.bool) for buffer in optimizer.flat.buffers]
    for buffer, offset, numel, _ in optimizer.flat.table.tolist():
        used[buffer][offset : offset + numel] = True
    arguments = optimizer.op_arguments()
    for buffers in arguments[:3]:
        for buffer, mine in zip(buffers, used, strict=bool(buffers)):
            buffer[~mine] = float("nan")
    same, oracle = cloned(arguments), cloned(arguments, torch.float64)
    gradients = cloned(arguments)[5]
    group_step_ref(*same)
    group_step_ref(*oracle)
    assert backend.serving("group_step_", optimizer.flat.device, optimizer.flat.dtypes) == "triton"
    ops.group_step_(*arguments)
    got, expected = named(arguments, used), named(same, used)
    assert_all_as_accurate(got, expected, named(oracle, used))
    for name, value in got.items():
        assert torch.equal(value == 0, expected[name] == 0), name
    assert torch.equal(arguments[3], same[3])
    for gradient, before in zip(arguments[5], gradients, strict=True):
        assert_same_bits(gradient, before)
    for buffers in arguments[:3]:
        for buffer, mine in zip(buffers, used, strict=bool(buffers)):
            assert buffer[~mine].isnan().all()
            buffer[~mine] = 0
