"""Networks, optimizers and training steps that the tests of `ato_fast.shrink_` share."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

import ato_fast as ato
from ato_fast.train import models
from nets import Plain, randomise_norms


def cnn():
    torch.manual_seed(0)
    return randomise_norms(models.build("resnet20", 5, 3, (16, 16))), torch.randn(4, 3, 16, 16)


def vit():
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64,
        num_classes=5,
    )  # fmt: skip
    nn.init.normal_(model.heads.head.weight, std=0.3)
    return model, torch.randn(4, 3, 16, 16)


def plain():
    torch.manual_seed(0)
    return randomise_norms(Plain()), torch.randn(4, 3, 8, 8)


MODELS = {"cnn": cnn, "vit": vit}
SGD = partial(ato.SGD, lr=0.02, momentum=0.9, weight_decay=1e-3)
ADAMW = partial(ato.AdamW, lr=1e-3, weight_decay=1e-2)
MAKERS = {"sgd": SGD, "adamw": ADAMW}


def close(a, b, limit=1e-5):
    return (a - b).abs().max() <= limit * a.abs().max()


def targets(n):
    return torch.arange(n) % 5


def loss_of(model, x, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return F.cross_entropy(model(x), targets(len(x)))


def step(model, optimizer, x, autocast=False):
    loss_of(model, x, autocast).backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(named):
    return torch.cat([tensor.detach().double().flatten() for _, tensor in named])
