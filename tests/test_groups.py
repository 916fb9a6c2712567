"""GroupLayout: plain data and its checks."""

import numpy as np
import pytest
import torch

import ato_fast as ato
from ato_fast.groups import Gate, GroupLayout, Slice
from nets import Plain, Residual


@pytest.fixture(scope="module")
def layout():
    return ato.trace(Residual(), (torch.randn(1, 3, 8, 8),), scope="all")


def test_gates_lie_one_after_the_other(layout):
    assert [g.offset for g in layout.gates] == [0, layout.gates[0].n]
    assert layout.n_groups == sum(g.n for g in layout)
    assert layout.gate("inner.0").n == 6


def test_unknown_gate_lists_the_known(layout):
    with pytest.raises(KeyError, match=r"no gate 'nope'; gates: stem\.0, inner\.0"):
        layout.gate("nope")


def test_groups_of_is_minus_one_outside(layout):
    assert (layout.groups_of("head.weight", 0) == -1).all()
    offset = layout.gate("inner.0").offset
    assert layout.groups_of("outer.0.weight", 1).tolist() == list(range(offset, offset + 6))


@pytest.mark.parametrize("size", [0, 13, 15])
def test_mask_of_the_wrong_size(layout, size):
    with pytest.raises(ValueError, match=rf"mask: expected shape \(14,\).*got \({size},\)"):
        layout.check_mask(torch.ones(size))


@pytest.mark.parametrize("bad", [-0.5, 1.5, float("nan")])
def test_mask_values_out_of_range(layout, bad):
    mask = torch.ones(layout.n_groups)
    mask[3] = bad
    with pytest.raises(ValueError, match=r"mask: expected values in \[0, 1\]"):
        layout.check_mask(mask)


def test_soft_mask_cannot_be_cut(layout):
    with pytest.raises(ValueError, match="expected only 0"):
        layout.check_keep(torch.full((layout.n_groups,), 0.5))


def test_mask_that_empties_a_gate_names_it(layout):
    mask = torch.ones(layout.n_groups, dtype=torch.bool)
    mask[layout.gate("inner.0").span] = False
    with pytest.raises(ValueError, match=r"drops all 6 channels of gate inner\.0"):
        layout.check_keep(mask)


def test_channel_map_of_the_wrong_length():
    part = Slice("w", 0, np.arange(3), "row")
    with pytest.raises(ValueError, match="expected a channel map of length 4, got 3"):
        GroupLayout((Gate("w", 3, (part,), 0),), (), {"w": (4, 2)}, ("w",), ())


def test_unknown_role():
    with pytest.raises(ValueError, match="role: expected one of"):
        Slice("w", 0, np.arange(3), "column")


def test_digest_tells_layouts_apart(layout):
    again = ato.trace(Residual(), (torch.randn(1, 3, 8, 8),), scope="all")
    assert layout.sha256 == again.sha256
    assert layout.sha256 != ato.trace(Plain(), (torch.randn(1, 3, 8, 8),)).sha256


def small_layout(n=20, **options):
    return GroupLayout(
        (Gate("w", n, (Slice("w", 0, np.arange(n), "row"),), 0),), (), {"w": (n, 2)}, ("w",), (),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({}, list(range(1, 21))),
        ({"min_channels": 17}, [17, 18, 19, 20]),
        ({"round_to": 8}, [8, 16, 20]),
        ({"round_to": 8, "min_channels": 9}, [16, 20]),
        ({"round_to": 10}, [10, 20]),
        ({"round_to": 16, "min_channels": 17}, [20]),
        ({"round_to": 64}, [20]),
        ({"min_channels": 21}, [20]),
    ],
    ids=str,
)
def test_widths(options, widths):
    layout = small_layout(**options)
    assert layout.widths(layout.gates[0]) == widths


@pytest.mark.parametrize("name", ["min_channels", "round_to"])
@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "8", None])
def test_bad_widths(name, bad):
    with pytest.raises(ValueError, match=rf"{name}: expected an int >= 1, got {bad!r}"):
        small_layout(**{name: bad})
    with pytest.raises(ValueError, match=rf"{name}: expected an int >= 1, got {bad!r}"):
        small_layout().tightened(**{name: bad})
    with pytest.raises(ValueError, match=rf"{name}: expected an int >= 1, got {bad!r}"):
        ato.trace(Plain(), (torch.randn(1, 3, 8, 8),), **{name: bad})


def test_tightened_never_loosens():
    layout = small_layout(min_channels=3, round_to=4)
    assert layout.tightened() is layout
    assert layout.tightened(2, 2) is layout
    both = layout.tightened(min_channels=5, round_to=6)
    assert (both.min_channels, both.round_to) == (5, 12)
    assert both.sha256 == layout.sha256 and both.widths(both.gates[0]) == [12, 20]


def test_trace_hands_the_widths_on():
    layout = ato.trace(Plain(), (torch.randn(1, 3, 8, 8),), min_channels=3, round_to=2)
    assert layout.widths(layout.gate("a.0")) == [4, 6, 8]


def test_print_shows_gates_coverage_and_reasons():
    layout = ato.trace(Residual(), (torch.randn(1, 3, 8, 8),))
    text = " ".join(str(layout).split())
    assert "1 gates, 6 groups" in text
    assert "inner.0" in text and "outer.0" in text
    assert "gates can remove from" in text
    assert "a residual add couples these channels" in text
    assert "reaches the model output: head.weight, head.bias" in text
