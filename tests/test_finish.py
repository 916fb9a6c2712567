"""The end of a run: the small network, the proof that it equals the masked one, the report."""

import json
import math

import pytest
import torch

import ato_fast as ato
import ato_fast.methods.finish as finish_module
from ato_fast.methods.equality import relative_error
from ato_fast.methods.finish import mask_sha256
from ato_fast.probe import cpu_inputs
from runs import EXAMPLE, HELD, WHOLE, Net, accuracy, new_run, train


@pytest.fixture(scope="module")
def layout():
    return ato.trace(Net(), EXAMPLE)


def dropped_norms(run):
    return run.optimizer.group_norms()[~run.live.of(run.mask)]


def test_finish(layout):
    run = train(new_run(layout), 40)
    result = run.finish(accuracy)
    report = result.report
    assert json.dumps(report)
    assert report["dense"] == {"macs": layout.macs(), "params": layout.params()}
    n_params = sum(p.numel() for p in result.model.parameters())
    assert report["small"] == {"macs": layout.macs(run.mask), "params": n_params}
    assert report["budget"] == {
        "kind": "macs", "value": 0.5, "target": layout.macs() // 2,
        "achieved": layout.macs(run.mask), "met": True, "measured": None,
    }  # fmt: skip
    assert [w["before"] for w in report["widths"]] == [8, 12, 10]
    assert [w["after"] for w in report["widths"]] == run.history[-1]["kept"]
    assert result.model.body[0].out_channels == report["widths"][0]["after"]
    assert report["n_unfinished"] == 0
    assert report["accuracy_before_projection"] is None
    assert report["equality_rel_err"] <= 1e-5
    assert report["mask_sha256"] == mask_sha256(layout, result.mask)
    assert set(report["seconds"]) == {"controller", "projection", "cutting", "evaluate"}
    assert report["seconds"]["controller"] > 0
    x = HELD[0]
    torch.testing.assert_close(result.model.eval()(x), run.model.eval()(x), rtol=1e-5, atol=1e-5)


def test_unfinished_groups_are_zeroed_and_counted(layout):
    run = train(new_run(layout, schedule=WHOLE), 24)
    unfinished = int((dropped_norms(run) != 0).sum())
    assert unfinished == (~run.mask).sum() > 0
    seen = []
    result = run.finish(lambda m: (seen.append(m), accuracy(m))[1])
    assert seen == [run.model, run.model, result.model]
    assert result.report["accuracy"] == result.report["accuracy_after_projection"]
    assert repr(result).count("\n") == 0 and len(repr(result)) < 200
    assert result.report["n_unfinished"] == unfinished
    assert 0 <= result.report["accuracy_before_projection"] <= 1
    assert result.report["accuracy_after_projection"] == accuracy(result.model)
    assert (dropped_norms(run) == 0).all()


def test_finish_needs_a_frozen_mask(layout):
    run = train(new_run(layout), 20)
    with pytest.raises(
        RuntimeError, match="not frozen yet: 20 steps done, the freeze is at step 20"
    ):
        run.finish()


def test_finish_refuses_a_different_function(layout, monkeypatch):
    run = train(new_run(layout), 40)

    def broken(model, layout, mask):
        small = ato.shrink(model, layout, mask)
        with torch.no_grad():
            small.fc.bias += 1e-3
        return small

    monkeypatch.setattr(finish_module, "shrink", broken)
    with pytest.raises(RuntimeError, match="small network differs from the masked one by"):
        run.finish()
    with torch.no_grad():
        monkeypatch.setattr(finish_module, "shrink", ato.shrink)
        run.model.fc.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="differs from the masked one by nan"):
        run.finish()


def test_mask_digest(layout):
    mask = torch.ones(30, dtype=torch.bool)
    digest = mask_sha256(layout, mask)
    assert len(digest) == 64
    assert mask_sha256(layout, mask.float()) == digest
    mask[29] = False
    assert mask_sha256(layout, mask) != digest


def test_relative_error():
    a = torch.tensor([4.0, -2.0])
    assert relative_error(a, a) == 0
    assert relative_error({"x": [a]}, {"x": [a + 0.5]}) == 0.125
    assert relative_error(torch.zeros(2), torch.tensor([0, 0.25])) == 0.25
    for bad in (float("nan"), float("inf")):
        b = torch.tensor([1.0, bad])
        assert math.isnan(relative_error([a, b], [a, b]))
        assert not relative_error([a, a], [a, b]) <= 1
    with pytest.raises(ValueError, match="expected shape"):
        relative_error(a, a[:1])


def test_networks_are_compared_on_inputs_with_something_to_see():
    zeros = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    labels, picture = torch.zeros(5, dtype=torch.long), torch.rand(2, 3)
    seen = cpu_inputs((zeros, {"y": labels, "x": [picture.bfloat16()]}))
    assert seen[0].std() > 0.2 and seen[0].shape == zeros.shape
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[1]["y"], labels)
    assert torch.equal(seen[1]["x"][0], picture.bfloat16().float())
