"""A tiny network, data and run that the tests of `ato_fast.methods` share."""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import ato_fast as ato


class Net(nn.Module):
    """conv-BN-ReLU three times and a linear layer: 8 + 12 + 10 groups."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(10, 3)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def examples(n, seed):
    """Images of three classes that differ in where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 2, 6, 6, generator=generator)
    x[torch.arange(n), :, 2 * y] += 1.5
    return x, y


TRAIN = examples(48, 1)
HELD = examples(24, 2)
EXAMPLE = (TRAIN[0][:2],)
STEPS_PER_EPOCH = 4
SGD = partial(ato.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
ADAMW = partial(ato.AdamW, lr=2e-3)
SCHEDULE = ato.Schedule(10, STEPS_PER_EPOCH, freeze=0.5, zero_by=0.7, controller_steps=60)
WHOLE = ato.Schedule(**{**SCHEDULE.state(), "shrink_every": 0.0})
"""As `SCHEDULE`, but nothing is cut before the end."""
PAPER = ato.Schedule.paper(12, STEPS_PER_EPOCH, controller_interval=1)


def new_run(layout, *, model_seed=0, **changes):
    torch.manual_seed(model_seed)
    arguments = {
        "optimizer": SGD,
        "budget": ato.Budget(macs=0.5),
        "schedule": SCHEDULE,
        "controller_data": [(HELD[0][:12], HELD[1][:12]), (HELD[0][12:], HELD[1][12:])],
        "layout": layout,
    }
    return ato.ATO(Net(), EXAMPLE, **{**arguments, **changes})


@contextmanager
def one_thread():
    """Tensors here are tiny: on busy cores most time would go into waiting for another thread."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


@one_thread()
def train(run, n_steps):
    """``n_steps`` of training; batch and dropout depend on the step's number only."""
    for _ in range(n_steps):
        torch.manual_seed(run._step)
        i = run._step % STEPS_PER_EPOCH
        x, y = (part[12 * i : 12 * (i + 1)] for part in TRAIN)
        F.cross_entropy(run.model(x), y).backward()
        run.step()
        run.zero_grad()
    return run


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return (model(HELD[0]).argmax(1) == HELD[1]).float().mean().item()
