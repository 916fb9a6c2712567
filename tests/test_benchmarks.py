"""The benchmark runner: statistics, checks before timing, its files, and the GPU script."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ato_fast as ato
from ato_fast import backend
from benchmarks import cases, contenders, run, step, timing
from samples import every_layout, layout_of

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_backend_variable(monkeypatch):
    """Contenders write the variable; what it was comes back after the test."""
    monkeypatch.setenv(backend.VARIABLE, "auto")


@pytest.fixture(scope="module")
def tiny():
    return cases.load("tiny")


def test_spread_is_median_and_percentiles():
    assert timing.spread([5, 1, 2, 4, 3, 6]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert timing.spread([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0}


def test_ratios_are_formed_per_round():
    """A drift of the machine cancels; medians of the two columns would give 4/3."""
    found = timing.ratios({"ours": [1.0, 40.0, 3.0], "fused": [2.0, 80.0, 3.0]}, "ours")
    assert found == {"fused": {"median": 0.5, "p20": 0.5, "p80": pytest.approx(0.8)}}


def test_every_contender_has_every_place_in_the_order():
    names = ["a", "b", "c"]
    turns = [timing.order(names, turn) for turn in range(6)]
    for place in range(3):
        assert sorted(turn[place] for turn in turns) == sorted(names * 2)
    followers = {(x, y) for turn in turns for x, y in zip(turn, turn[1:], strict=False)}
    assert len(followers) == 6


def test_interleaving_times_each_once_per_round_and_forgets_the_warmup():
    calls = []

    def sampler(name):
        calls.append(name)
        return float(len(calls))

    samples = timing.interleave({n: lambda n=n: sampler(n) for n in "abc"}, rounds=4, warmup=2)
    assert [len(v) for v in samples.values()] == [4, 4, 4]
    assert len(calls) == 18 and min(min(v) for v in samples.values()) == 7.0
    assert all(sorted(calls[i : i + 3]) == ["a", "b", "c"] for i in range(0, 18, 3))


def test_a_block_that_takes_too_long_is_stopped():
    with pytest.raises(TimeoutError, match="0.05 s"), timing.at_most(0.05):
        time.sleep(5)
    with timing.at_most(0.05):
        pass
    time.sleep(0.1)


def test_summary_reports_rates_and_the_share_of_the_copy():
    samples = {"ours": [2.0] * 3, "fused": [4.0] * 3, "copy": [1.0] * 3}
    found = step.summary(samples, {"ours": 28_000_000, "fused": 14_000_000, "copy": 28_000_000})
    assert found["ours"]["gb_per_s"] == 14.0 and found["ours"]["copy_frac"] == 0.5
    assert found["fused"]["copy_frac"] == 0.125 and found["fused"]["p80_ms"] == 4.0
    assert found["fused"]["ours_over_this"] == {"median": 0.5, "p20": 0.5, "p80": 0.5}
    assert "ours_over_this" not in found["ours"] and "copy_frac" not in found["copy"]


def test_bytes_are_the_floor_of_a_step():
    fp32, bf16 = torch.float32, torch.bfloat16
    assert contenders.bytes_per_step(1, "adamw", fp32, fp32) == 28
    assert contenders.bytes_per_step(1, "sgd", fp32, fp32) == 20
    assert contenders.bytes_per_step(1, "adamw", bf16, fp32) == 22


def test_masks_drop_exactly_their_share():
    masked = step.Masked.parse("0.5:zero")
    assert masked == step.Masked(0.5, True) and str(masked) == "0.5:zero"
    assert int((~masked.keep(7616)).sum()) == 3808
    assert torch.equal(masked.keep(99), step.Masked(0.5).keep(99))
    for wrong in ("2", "half", "0.5:gone", "0:zero"):
        with pytest.raises(step.argparse.ArgumentTypeError, match="expected a share"):
            step.Masked.parse(wrong)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["fused+per_layer", "fused+scaled"])
@pytest.mark.parametrize("optimizer", contenders.OURS)
def test_the_baselines_compute_what_ours_computes(tiny, optimizer, name, channels_last):
    start = cases.values(tiny, CPU, torch.float32, channels_last)
    ours = contenders.ours("ours", "auto", tiny, start, optimizer, torch.float32)
    theirs = contenders.torchs(name, tiny, start, optimizer, torch.float32)
    keep = step.Masked(0.5).keep(tiny.layout.n_groups)
    lam = 0.2 / contenders.HYPER[optimizer]["lr"]
    for contender in (ours, theirs):
        contender.start(tiny.layout, start, keep, lam, zero=False)
    before = ours.optimizer.group_norms()
    for _ in range(5):
        ours.step()
        theirs.step()
    dropped = (before - ours.optimizer.group_norms())[~keep]
    assert (dropped > 0.1).all() and not int(ours.optimizer.n_zero())
    expected = dict(theirs.model.named_parameters())
    for key, value in ours.model.named_parameters():
        assert value.stride() == expected[key].stride() == start.params[key].stride()
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_the_published_strength_is_shared_among_gates_by_dropped_channels(tiny):
    keep = torch.ones(tiny.layout.n_groups, dtype=torch.bool)
    first, second = tiny.layout.gates[:2]
    keep[first.offset : first.offset + 3] = False
    keep[second.offset] = False
    share = contenders.shares(tiny.layout, keep)
    assert (share[first.span] == 0.75).all() and (share[second.span] == 0.25).all()


def check(case, present, start, optimizer="adamw", seconds=60.0):
    return contenders.check(present, case, start, optimizer, torch.float32, seconds)


def test_the_check_passes_what_is_right_and_leaves_all_able_to_run(tiny):
    start = cases.values(tiny, CPU, torch.float32)
    names = tuple(n for n in contenders.NAMES if n != "compile")
    args = (tiny, start, "sgd", torch.float32, CPU)
    present = list(contenders.build(*args, ["auto", "reference"], names))
    errors, left_out = check(tiny, present, start, "sgd")
    assert not left_out and max(errors.values()) <= 1
    assert {"ours", "ours:reference", "loop", "loop+per_layer", "fused+scaled"} <= errors.keys()


@pytest.mark.parametrize("fault", ["no projection", "wrong decay", "nan"])
def test_the_check_finds_a_planted_error(tiny, fault):
    start = cases.values(tiny, CPU, torch.float32)
    ours = contenders.ours("ours", "auto", tiny, start, "adamw", torch.float32)
    if fault == "no projection":
        ours.set_mask = lambda keep, lam: None
    elif fault == "wrong decay":
        ours.optimizer.param_groups[0]["weight_decay"] = 0.0
    else:
        ours.step = lambda: next(ours.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(contenders.Red, match="ours differs from fused"):
        check(tiny, [ours], start)


def test_a_compiler_that_fails_is_left_out_with_the_reason(tiny, monkeypatch):
    def broken():
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(torch, "compile", lambda step: broken)
    start = cases.values(tiny, CPU, torch.float32)
    present = [contenders.torchs("compile", tiny, start, "adamw", torch.float32)]
    assert check(tiny, present, start) == ({}, {"compile": "RuntimeError: no such compiler"})


def test_zero_rows_start_from_exact_zero(tiny):
    start = cases.values(tiny, CPU, torch.float32)
    ours = contenders.ours("ours", "auto", tiny, start, "adamw", torch.float32)
    keep = step.Masked(0.5).keep(tiny.layout.n_groups)
    ours.step()
    ours.start(tiny.layout, start, keep, 1.0, zero=True)
    for _ in range(2):
        assert int(ours.optimizer.n_zero()) == int((~keep).sum())
        assert (ours.optimizer.group_norms()[keep] > 0).all()
        ours.step()


def test_a_layout_survives_its_file():
    layout = layout_of(every_layout())
    again = cases.layout_from_json(json.loads(json.dumps(cases.layout_to_json(layout))))
    assert again.sha256 == layout.sha256 and again.shapes == layout.shapes
    assert again.parameters == layout.parameters


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_stored_layouts_are_what_tracing_finds(name):
    pytest.importorskip("torchvision")
    traced, stored = cases.load(name, "traced"), cases.load(name, "stored")
    assert traced.layout.sha256 == stored.layout.sha256 and traced.shapes == stored.shapes


@pytest.mark.parametrize("name", cases.SPECS)
def test_stored_cases_are_the_models_they_name(name):
    """Parameter counts as published with torchvision's models."""
    case = cases.load(name, "stored")
    published = {"resnet50": 25_557_032, "mobilenet_v2": 3_504_872, "vit_b_16": 86_567_656,
                 "convnext_large": 197_767_336}  # fmt: skip
    assert case.n_params == published[name] and case.layout.n_groups > 7000


def test_the_overhead_case_keeps_tensors_and_gates_but_no_size():
    case = cases.load("resnet50", "stored")
    small = cases.shrunk(case)
    assert list(small.shapes) == list(case.shapes) and len(small.shapes) == 161
    assert len(small.layout.gates) == len(case.layout.gates)
    assert max(int(np.prod(s)) for s in small.shapes.values()) <= 8
    model = cases.bare_model(cases.values(small, CPU, torch.float32))
    optimizer = ato.SGD(model, small.layout)
    assert (optimizer.group_norms() > 0).all()


def test_the_runner_end_to_end(tmp_path, capsys):
    path = tmp_path / "deep" / "a.json"
    argv = ["--suite", "step", "overhead", "--quick", "--optimizers", "sgd", "--json", str(path)]
    assert run.main(argv) == 0
    printed = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["schema"] == run.SCHEMA and content["complete"] is True
    assert content["command"][-len(argv) :] == argv
    assert {"torch", "triton", "python"} <= content["versions"].keys() and "commit" in content
    here = content["machine"]
    assert here["processor"] and here["cores"] and here["threads"] == torch.get_num_threads()
    assert "GOMP_SPINCOUNT" in here["environment"]
    suite = content["suites"]["step"]
    assert suite["red"] == suite["skipped"] == []
    assert [r["masked"] for r in suite["rows"]] == ["0", "0.5", "1", "0.5:zero"]
    row = suite["rows"][1]
    assert row["n_params"] == sum(p.numel() for p in cases.Tiny().parameters())
    assert row["n_dropped"] == row["n_groups"] // 2 and row["mode"] == "eager"
    assert row["served"] == {"ours": "cpu"} and row["layout"] == "traced"
    assert row["skipped"] == {"compile": "not asked for"} and max(row["check"].values()) <= 1
    timed = row["contenders"]
    assert set(timed) == {"ours", *contenders.NAMES} - {"compile"}
    for name, entry in timed.items():
        assert 0 < entry["p20_ms"] <= entry["median_ms"] <= entry["p80_ms"]
        assert entry["bytes"] == 20 * row["n_params"]
        assert ("ours_over_this" in entry) == (name != "ours")
    over = content["suites"]["overhead"]["rows"]
    assert [(r["masked"], r["grads"]) for r in over] == [
        ("0", "same"), ("0", "new"), ("0.5", "same"), ("0.5", "new"),
    ]  # fmt: skip
    assert over[0]["n_tensors"] == 161 and over[0]["contenders"]["ours"]["median_us"] > 0
    ratio = timed["fused"]["ours_over_this"]
    assert f"{ratio['median']:.3f} ({ratio['p20']:.3f} to {ratio['p80']:.3f})" in printed
    assert run.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_nothing_is_reported_after_a_red_check(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(contenders.OURS, "sgd", lambda *a, **k: ato.SGD(*a, **{**k, "lr": 0.5}))
    path = tmp_path / "a.json"
    assert run.main(["--quick", "--optimizers", "sgd", "--json", str(path)]) == 1
    result = json.loads(path.read_text())["suites"]["step"]
    assert result["rows"] == [] and "ours differs from fused" in result["red"][0]["reason"]
    assert "RED tiny sgd fp32: ours differs from fused" in capsys.readouterr().out


def test_a_backend_that_cannot_serve_is_red(tmp_path, capsys):
    assert run.main(["--quick", "--backends", "cpu", "cuda", "--optimizers", "sgd"]) == 1
    assert "ATO_FAST_BACKEND=cuda cannot serve" in capsys.readouterr().out


def test_no_new_block_is_started_when_the_time_is_over(capsys):
    assert run.main(["--quick", "--seconds", "0"]) == 0
    assert "the 0 s of --seconds were over" in capsys.readouterr().out


def test_a_block_that_breaks_does_not_take_the_others_along(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("first line\nsecond line\nthird line")

    monkeypatch.setitem(contenders.OURS, "adamw", broken)
    path = tmp_path / "a.json"
    assert run.main(["--quick", "--masked", "0.5", "--json", str(path)]) == 1
    result = json.loads(path.read_text())["suites"]["step"]
    assert [r["reason"] for r in result["red"]] == ["ValueError: first line second line"]
    assert [r["optimizer"] for r in result["rows"]] == ["sgd"]


def test_graphs_leave_out_what_waits_for_the_device(monkeypatch, capsys, tmp_path):
    """The path of a graph's row, with a capture that only hands the step back."""
    seen = []
    monkeypatch.setattr(timing, "captured", lambda call: seen.append(call) or call)
    path = tmp_path / "a.json"
    argv = ["--quick", "--optimizers", "sgd", "--modes", "graph", "--masked", "0.5"]
    assert run.main([*argv, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["suites"]["step"]["rows"]
    reason = "boolean indexing waits for the device"
    assert row["skipped"]["fused+per_layer"] == row["skipped"]["loop+per_layer"] == reason
    assert len(seen) == len(row["contenders"]) == 6
    assert f"without fused+per_layer, graph: {reason} (tiny sgd fp32)" in capsys.readouterr().out


@pytest.mark.gpu
def test_the_runner_on_cuda(tmp_path):
    path = tmp_path / "a.json"
    argv = ["--quick", "--device", "cuda", "--backends", "cuda", "--suite", "step", "overhead"]
    assert run.main([*argv, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["machine"]["gpu"]["multiprocessors"] > 0
    rows = content["suites"]["step"]["rows"]
    assert {(r["mode"], r["dtype"]) for r in rows} == {
        (mode, dtype) for mode in ("eager", "graph") for dtype in ("fp32", "bf16")
    }
    for row in rows:
        assert row["served"] == {"ours": "cuda"}
        assert {"ours", "fused", "foreach", "loop", "fused+scaled", "copy"} <= set(
            row["contenders"]
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_ends_early(capsys):
    assert run.main(["--quick", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def gpu_script(*arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("OUT", "SKIP", "LIMIT", "BUILD")}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


def test_the_gpu_script_parses():
    subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / "gpu.sh")], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_refuses_to_run_without_a_gpu(tmp_path):
    done = gpu_script(PYTHON=sys.executable, OUT=str(tmp_path / "out"), BUILD=str(tmp_path / "b"))
    assert done.returncode == 2 and done.stdout == ""
    assert "no CUDA device" in done.stderr and "nothing was built or run" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "b").exists()


def test_the_gpu_script_knows_its_parts():
    done = gpu_script("racecheck", "racechek", PYTHON=sys.executable)
    assert done.returncode == 2 and "unknown part 'racechek'" in done.stderr
    assert gpu_script(SKIP="everything").returncode == 2


# Stands in for a python with a GPU: one part fails, one takes too long.
STUB = """#!/bin/bash
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *"setup.py"*) echo "built for $TORCH_CUDA_ARCH_LIST, FORCE_CUDA=$FORCE_CUDA" ;;
  *"-m pytest"*) echo "E   assert 1 == 2"; echo "1 failed"; exit 1 ;;
  *"--suite overhead"*) exec sleep 60 ;;
  *"--show"*) echo "first line"; echo "table of $4" ;;
  *"benchmarks.run"*) echo "{}" >"${@: -1}"; echo "backend $ATO_FAST_BACKEND" ;;
esac
"""


def test_the_gpu_script_goes_on_after_a_failure_and_says_so(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out = tmp_path / "out"
    done = gpu_script(
        "build", "test", "step", "overhead", "bf16",
        PYTHON=str(stub), OUT=str(out), BUILD=str(tmp_path / "b"), SKIP="bf16", LIMIT="4",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = (out / "gpu-summary.txt").read_text().splitlines()
    outcome = {line.split()[0]: line for line in lines if line.strip()}
    assert outcome["build"].split()[1] == outcome["step"].split()[1] == "ok"
    assert "FAIL, exit status 1" in outcome["test"] and "    1 failed" in lines
    assert re.search("FAIL(, stopped after|: no time left)", outcome["overhead"])
    assert "left out" in outcome["bf16"] and "left out" in outcome["memcheck"]
    assert any(line.startswith("table of ") for line in lines)
    assert "FAILED," in outcome
    log = (out / "gpu-log.txt").read_text()
    assert "built for 9.0, FORCE_CUDA=1" in log and "backend cuda" in log
    copied = tmp_path / "b" / "ato_fast-gpu" / "ato_fast"
    assert (copied / "kernels" / "__init__.py").exists() and not list(copied.glob("*.so"))
