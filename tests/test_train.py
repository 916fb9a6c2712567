"""Recipes, the training loop, evaluation, the picture and the table."""

import math

import pytest
import torch
from torch import nn

from ato_fast.train import plots
from ato_fast.train.batches import Augment, Images, MemoryBatches
from ato_fast.train.data import load
from ato_fast.train.evaluate import accuracy, as_input, latency, size_bytes
from ato_fast.train.loop import Display, NonFiniteLoss, train_epoch
from ato_fast.train.recipe import DEFAULTS, Recipe, recipe_for
from ato_fast.train.table import closing_table


def test_learning_rate_warms_up_and_ends_near_zero():
    recipe = Recipe(epochs=10, batch_size=1, lr=0.4, warmup=0.1)
    rates = [recipe.lr_at(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.4 / 100) and max(rates) == pytest.approx(0.4)
    assert rates.index(max(rates)) in (99, 100)
    assert all(a <= b for a, b in zip(rates[:99], rates[1:100], strict=True))
    assert all(a >= b for a, b in zip(rates[100:-1], rates[101:], strict=True))
    assert rates[550] == pytest.approx(0.2, rel=1e-6) and 0 < rates[-1] < 1e-5


def test_no_warm_up_starts_at_the_peak():
    assert Recipe(epochs=1, batch_size=1, lr=0.3, warmup=0).lr_at(0, 7) == 0.3


@pytest.mark.parametrize(
    "name, value", [("epochs", 0), ("lr", math.inf), ("lr", 0.0), ("weight_decay", -1e-9),
                    ("label_smoothing", 1.0), ("optimizer", "adam"), ("warmup", 1.0)]
)  # fmt: skip
def test_a_recipe_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected .* got"):
        Recipe(**{"epochs": 1, "batch_size": 1, name: value})


def test_adamw_brings_its_own_rate_unless_told():
    digits = load("digits")
    assert recipe_for(digits) == DEFAULTS["digits"]
    assert recipe_for(digits, optimizer="adamw", epochs=None).lr == 1e-3
    assert recipe_for(digits, optimizer="adamw", lr=0.01).lr == 0.01


def batches(n=20, training=True):
    images = Images(torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8), torch.arange(n) % 3)
    return MemoryBatches(
        images,
        torch.arange(n),
        5,
        seed=0,
        training=training,
        augment=Augment(),
        mean=(0,),
        std=(1,),
    )


def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3))


RECIPE = Recipe(epochs=2, batch_size=5, lr=0.1)


def epoch_of(model, epoch, step=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    display = Display("test", 2, 4)
    return train_epoch(model, data, epoch, RECIPE, optimizer, step or optimizer.step, display)


data = batches()


def test_an_epoch_depends_on_seed_and_epoch_alone():
    """Dropout too: a resumed run must draw what the uninterrupted one drew."""
    outcomes = []
    for disturb in (0, 17):
        torch.manual_seed(3)
        model = classifier()
        torch.rand(disturb)
        outcomes.append((epoch_of(model, 1), model[1].weight.detach().clone()))
    assert outcomes[0][0] == outcomes[1][0] and torch.equal(outcomes[0][1], outcomes[1][1])
    torch.manual_seed(3)
    model = classifier()
    epoch_of(model, 0)
    assert not torch.equal(model[1].weight, outcomes[0][1])


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = classifier()
    with torch.no_grad():
        model[3].bias[1] = math.nan
    steps = []
    with pytest.raises(NonFiniteLoss, match=r"training loss is nan in epoch 2, step 5 of 8 .*--lr"):
        epoch_of(model, 1, step=lambda: steps.append(1))
    assert not steps


def test_accuracy_counts_every_image_once_in_eval_mode():
    test = batches(23, training=False)
    model = classifier().train()
    expected = model.eval()(torch.cat([x for x, _ in test])).argmax(1) == torch.arange(23) % 3
    model.train()
    assert accuracy(model, test) == expected.double().mean().item() and model.training


@pytest.mark.parametrize("channels", [1, 3])
def test_inputs_are_channels_last_and_the_same_values(channels):
    x = torch.randn(2, channels, 5, 4)
    y = as_input(x)
    assert torch.equal(x, y) and y.stride() == (20 * channels, 1, 4 * channels, channels)


def test_latency_tells_a_slow_network_from_a_fast_one():
    fast, slow = (nn.Conv2d(1, n, 3).train() for n in (1, 64))
    a, b = latency([fast, slow], torch.randn(8, 1, 64, 64), seconds=0.2)
    assert a.low_ms <= a.median_ms <= a.high_ms and a.median_ms < b.median_ms
    assert fast.training and slow.training


def test_size_is_that_of_the_file(tmp_path):
    from safetensors.torch import save_file

    model = classifier()
    save_file(model.state_dict(), tmp_path / "m")
    assert size_bytes(model) == (tmp_path / "m").stat().st_size


def result(n_gates=3, dense_accuracy=0.9):
    network = {"macs": 2_000_000, "params": 3000, "bytes": 2**21, "accuracy": 0.91, "wall_s": 10.0,
               "latency_ms": 2.0, "latency_p20_ms": 1.5, "latency_p80_ms": 2.5}  # fmt: skip
    wall = None if dense_accuracy is None else 12.5
    small = {**network, "macs": 1_000_000, "latency_ms": 1.0, "bytes": 2000}
    widths = [{"gate": f"layer{i}.conv", "before": 64, "after": 1 + i % 64} for i in range(n_gates)]
    phases = ["warmup"] * 2 + ["search"] * 2 + ["project", "zeroing", "finetune"]
    ato = [{"epoch": i + 1, "accuracy": 0.8 + i / 100, "phase": p, "macs_frac": 1 - i / 14,
            "network_macs_frac": 1 - i / 20, "kept": [64 - i] * n_gates}
           for i, p in enumerate(phases)]  # fmt: skip
    return {
        "model": "m", "data": "d", "epochs": 7, "seed": 0,
        "dense": {**network, "accuracy": dense_accuracy, "wall_s": wall}, "small": small,
        "budget": {"kind": "macs", "target": 1_000_100, "achieved": 1_000_000,
                   "measured": None},
        "overhead_frac": {"controller": 0.1, "projection": 0.02, "cutting": 0.01},
        "cuts": [{}] * 3, "equality_rel_err": 1e-7,
        "latency_input": [64, 1, 8, 8], "machine": {"threads": 2, "device": "CPU"},
        "widths": widths, "history": {"dense": ato if wall else [], "ato": ato},
    }  # fmt: skip


@pytest.mark.parametrize("n_gates, dense", [(1, 0.9), (30, 0.9), (80, None)])
def test_the_picture_is_drawn_for_any_network(tmp_path, n_gates, dense):
    from PIL import Image

    content = result(n_gates, dense)
    plots.draw(tmp_path / "p.png", content, content["widths"], content["history"])
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (1430, 1430)
        colours = image.convert("RGB").resize((143, 96)).getcolors(143 * 96)
        assert len(colours) > 100


def test_the_table_shows_both_networks():
    text = closing_table(result())
    assert "90.00%" in text and "91.00%" in text and "+1.00 points" in text
    assert "2.000 M" in text and "1.000 M" in text and "50.0%" in text
    assert "2.00 MiB" in text and "2.0 KiB" in text
    assert "2.00 (1.50 to 2.50) ms" in text and "12.5 s" in text and "80.0%" in text
    assert "10.0% was the controller's, 2.0% the projection's, 1.0% the cuts' (3)" in text


def test_the_table_shows_a_measured_budget():
    content = result()
    content["budget"] = {"kind": "latency", "target": 2.5, "achieved": 2.25, "measured": {}}
    assert "latency <= 2.5 ms, measured 2.25 ms at the freeze" in closing_table(content)


def test_the_table_without_a_dense_twin_leaves_gaps():
    rows = [x.split() for x in closing_table(result(dense_accuracy=None)).splitlines()]
    assert ["accuracy", "-", "91.00%"] in rows
