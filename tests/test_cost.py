"""MACs and parameters against torch's counters and the published figures."""

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import ato_fast as ato
from ato_fast.cost import Cost
from ato_fast.groups import Gate, GroupLayout, MacTerm, Slice
from nets import Residual, random_mask


def counted(model, x) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2 // x.shape[0]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("scope", ["inner", "all"])
def test_macs_and_parameters_equal_an_independent_count(name, scope):
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(2, 3, 224, 224)
    layout = ato.trace(model, (x,), scope=scope)
    assert layout.macs() == counted(model, x)
    assert layout.params() == sum(p.numel() for p in model.parameters())
    mask = random_mask(layout)
    small = ato.shrink(model, layout, mask)
    assert layout.macs(mask) == counted(small, x)
    assert layout.params(mask) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize(
    ("name", "ignore", "gates", "groups", "giga"),
    [("resnet50", ["conv1"], 32, 7552, 3.63588), ("resnet34", [], 16, 3776, 3.53425)],
)
def test_published_count_of_the_gated_part(name, ignore, gates, groups, giga):
    """ATO's own figures; its gates leave ResNet-50's stem out (on ResNet-34 an add couples it)."""
    model = torchvision.models.get_model(name, weights=None)
    layout = ato.trace(model, (torch.randn(1, 3, 224, 224),), ignore=ignore)
    assert (len(layout.gates), layout.n_groups) == (gates, groups)
    assert round(Cost(layout, "paper").macs() / 1e9, 5) == giga


def test_published_count_of_a_masked_bottleneck():
    """C_in·m1·S1 + 3·m1·S1 + 9·m1·m2·S2 + 3·m2·S2 + m2·C_out·S3 + 3·C_out·S3, first block."""
    model = torchvision.models.resnet50(weights=None)
    layout = ato.trace(model, (torch.randn(1, 3, 224, 224),), ignore=["conv1"])
    first, second = layout.gates[:2]
    mask = torch.ones(layout.n_groups, dtype=torch.bool)
    mask[first.offset : first.offset + 20] = False
    mask[second.offset : second.offset + 50] = False

    def block(m1, m2):
        s = 56 * 56
        return 64 * m1 * s + 3 * m1 * s + 9 * m1 * m2 * s + 3 * m2 * s + m2 * 256 * s + 3 * 256 * s

    cost = Cost(layout, "paper")
    assert cost.macs() - cost.macs(mask) == block(64, 64) - block(44, 14)


def test_soft_masks_are_differentiable_and_agree_at_the_corners():
    layout = ato.trace(Residual(), (torch.randn(1, 3, 8, 8),), scope="all")
    mask = random_mask(layout)
    soft = mask.double().requires_grad_()
    for count in (layout.macs, layout.params):
        total = count(soft)
        assert total.item() == count(mask)
        (gradient,) = torch.autograd.grad(total, soft)
        assert (gradient > 0).all()
    assert torch.autograd.gradcheck(
        layout.macs, torch.rand(layout.n_groups, dtype=torch.float64, requires_grad=True)
    )


def test_integer_and_missing_masks_give_ints():
    layout = ato.trace(Residual(), (torch.randn(1, 3, 8, 8),))
    for mask in (None, torch.ones(layout.n_groups, dtype=torch.long), [True] * layout.n_groups):
        assert isinstance(layout.macs(mask), int)


def test_bad_arguments():
    layout = ato.trace(Residual(), (torch.randn(1, 3, 8, 8),))
    with pytest.raises(ValueError, match=r"mask: expected shape \(6,\)"):
        layout.macs(torch.ones(3))
    with pytest.raises(ValueError, match="counting: expected one of"):
        Cost(layout, "flops")


def test_batch_size_does_not_count():
    model = Residual()
    counts = {ato.trace(model, (torch.randn(n, 3, 8, 8),)).macs() for n in (1, 2, 7)}
    assert len(counts) == 1


def test_products_of_activations_are_counted():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.softmax(q @ k.transpose(1, 2), -1) @ v

    model, x = Attention(), torch.randn(2, 10, 8)
    assert ato.trace(model, (x,)).macs() == counted(model, x)


def test_coverage_counts_operations_in_full_and_parameters_entry_by_entry():
    """The inner gate narrows inner's rows and outer's columns, and nothing of stem and head."""
    layout = ato.trace(Residual(), (torch.randn(1, 3, 8, 8),))
    stem, inner, outer, head = 3 * 8 * 9 * 64, 8 * 6 * 9 * 64, 6 * 8 * 9 * 64, 8 * 5
    total = stem + inner + outer + head
    assert layout.macs() == total
    assert layout.coverage().macs == pytest.approx((inner + outer) / total, rel=1e-12)
    reached = (8 * 6 * 9 + 2 * 6) + 6 * 8 * 9
    assert layout.coverage().params == pytest.approx(reached / layout.params(), rel=1e-12)


def test_coverage_of_a_tensor_that_is_in_a_gate_in_part():
    """5 of 8 rows and 2 of 4 columns: 8 * 4 - 3 * 2 entries; another tensor is outside."""
    rows = np.array([0, 1, 2, 3, 4, -1, -1, -1])
    columns = np.array([-1, 0, 1, -1])
    gates = (
        Gate("a", 5, (Slice("w", 0, rows, "row"),), 0),
        Gate("b", 2, (Slice("w", 1, columns, "input"),), 5),
    )
    terms = (
        MacTerm("w", 3, (("w", 0), ("w", 1))),
        MacTerm("v", 4, ()),
        MacTerm("s", 10, (("s", 0),)),
    )
    shapes = {"w": (8, 4), "s": (6,), "buffer": (100,)}
    layout = GroupLayout(gates, (), shapes, ("w", "s"), terms)
    assert layout.coverage() == (96 / (96 + 4 + 60), 26 / 38)


def test_coverage_without_gates_and_without_parameters():
    assert GroupLayout((), (), {}, (), ()).coverage() == (0.0, 0.0)
    layout = ato.trace(torch.nn.Linear(4, 2), (torch.randn(1, 4),))
    assert layout.coverage() == (0.0, 0.0)
