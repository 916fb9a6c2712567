"""The zoo: real architectures with random weights, nothing downloaded.

A case is a name, a kind and two functions without arguments: the network and its example inputs.
Widths are the published ones. Where a network is deep, fewer layers are asked of its constructor,
and of a language model a smaller vocabulary, which would outweigh the few layers left; images are
small where the network takes them, since a group does not depend on the resolution.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import zoo_networks as own

KINDS = ("cnn", "transformer", "other")
"""``other``: neither convolutions nor attention do most of the work (MLP-mixers)."""


@dataclass(frozen=True)
class Case:
    """One network of the zoo.

    Args:
        name: ``source:network``.
        kind: one of `KINDS`.
        build: makes the network, with random weights.
        inputs: makes the arguments of one forward call, batch 2.
        needs: packages that ``build`` imports.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    needs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why this case cannot be built here, or None."""
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        return None


def noise(*shape: int) -> tuple[Tensor, ...]:
    """One floating input, the same every time."""
    return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),)


def tokens(n: int, vocabulary: int) -> tuple[Tensor, ...]:
    """One input of token numbers, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(vocabulary, (2, n), generator=generator),)


def _torchvision(kind: str, name: str, size: int = 64, *, shape=None, **arguments: Any) -> Case:
    def build() -> nn.Module:
        from torchvision.models import get_model

        more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return get_model(name, weights=None, **more, **arguments)

    inputs = partial(noise, *(shape or (3, size, size)))
    return Case(f"torchvision:{name}", kind, build, inputs, ("torchvision",))


def _timm(kind: str, name: str, size: int = 64, **arguments: Any) -> Case:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **arguments)

    return Case(f"timm:{name}", kind, build, partial(noise, 3, size, size), ("timm",))


def _cifar(name: str) -> Case:
    def build() -> nn.Module:
        from ato_fast.train import models

        return models.build(name, 10, 3, (32, 32))

    return Case(f"cifar:{name}", "cnn", build, partial(noise, 3, 32, 32), ("torchvision",))


def _import_transformers() -> ModuleType:
    """`transformers`, told that there is no package ``kernels``; it remembers the answer.

    From the repository's root it would take the folder kernels/ for that package, and import it.
    """
    hide = "kernels" not in sys.modules
    if hide:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import transformers
        from transformers.utils import is_kernels_available

        is_kernels_available()
    finally:
        if hide:
            del sys.modules["kernels"]
    return transformers


def _transformers(name: str, vocabulary: int, **arguments: Any) -> Case:
    """``name`` is the model's class; its configuration's is named alike."""

    def build() -> nn.Module:
        transformers = _import_transformers()
        base = name.removesuffix("Model").removesuffix("LMHead").removesuffix("ForCausalLM")
        config = getattr(transformers, f"{base}Config")(
            vocab_size=vocabulary, use_cache=False, **arguments
        )
        return getattr(transformers, name)(config)

    inputs = partial(tokens, 24, vocabulary)
    return Case(f"transformers:{name}", "transformer", build, inputs, ("transformers",))


CNN, TRANSFORMER, OTHER = KINDS

TORCHVISION = [
    *(_torchvision(CNN, name) for name in (
        "alexnet", "vgg11_bn", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d",
        "wide_resnet50_2", "densenet121", "squeezenet1_1", "googlenet", "mobilenet_v2",
        "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0",
        "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf",
        "convnext_tiny",
    )),
    # The auxiliary head, which only training reads, needs the full size.
    _torchvision(CNN, "inception_v3", 299),
    _torchvision(CNN, "r3d_18", shape=(3, 4, 32, 32)),
    *(_torchvision(CNN, name, num_classes=21, weights_backbone=None) for name in (
        "fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large",
    )),
    _torchvision(TRANSFORMER, "vit_b_16", image_size=64),
    # Windows are padded on small images, and attention takes most of the work there.
    _torchvision(TRANSFORMER, "swin_t", 224),
    _torchvision(TRANSFORMER, "swin_v2_t", 256),
    # Its windows of 7 divide only multiples of 224.
    _torchvision(TRANSFORMER, "maxvit_t", 224),
]  # fmt: skip

TIMM = [
    *(_timm(CNN, name) for name in (
        "resnet18d", "resnetv2_50x1_bit", "regnetx_002", "regnety_002", "efficientnet_b0",
        "mobilenetv3_small_100", "mobilenetv4_conv_small", "convnext_atto", "convnextv2_atto",
        "poolformer_s12", "convformer_s18", "fastvit_t8", "ghostnet_100", "hrnet_w18_small",
        "dla34", "repvgg_a0", "nfnet_l0", "ese_vovnet19b_dw", "inception_next_atto",
        "res2net50_26w_4s", "resnest14d", "skresnet18", "dpn48b", "cspresnet50", "rexnet_100",
        "repvit_m0_9", "starnet_s1", "mambaout_femto", "focalnet_tiny_srf", "tf_mixnet_s",
    )),
    *(_timm(TRANSFORMER, name, img_size=64) for name in (
        "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256", "maxvit_pico_rw_256", "coatnet_nano_rw_224",
        "efficientformerv2_s0", "levit_128s", "volo_d1_224", "hiera_tiny_224",
        "eva02_tiny_patch14_224", "gcvit_xxtiny", "pit_ti_224", "convit_tiny",
    )),
    _timm(TRANSFORMER, "cait_xxs24_224", img_size=64, depth=6),
    _timm(TRANSFORMER, "beit_base_patch16_224", img_size=64, depth=4),
    _timm(TRANSFORMER, "xcit_nano_12_p16_224", depth=4),
    *(_timm(TRANSFORMER, name) for name in (
        "pvt_v2_b0", "caformer_s18", "edgenext_xx_small", "mobilevit_xxs", "mobilevitv2_050",
        "mobilenetv4_hybrid_medium", "tiny_vit_5m_224", "crossvit_tiny_240", "mvitv2_tiny",
        "efficientvit_b0",
    )),
    *(_timm(TRANSFORMER, name, 224) for name in (
        "twins_svt_small", "davit_tiny", "efficientvit_m0",
    )),
    # Its attention's table of offsets is made for 7x7 tokens whatever the image.
    _timm(TRANSFORMER, "efficientformer_l1", 224),
    *(_timm(OTHER, name, img_size=64) for name in (
        "mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224",
    )),
]  # fmt: skip

OWN = [
    _cifar("resnet20"),
    _cifar("resnet56"),
    Case("own:carn", CNN, own.CARN, partial(noise, 3, 24, 24)),
    Case("own:carn_m", CNN, partial(own.CARN, groups=4, scale=4), partial(noise, 3, 16, 16)),
    Case("own:unet", CNN, own.UNet, partial(noise, 3, 64, 64)),
    Case("own:stacked_unet", CNN, own.StackedUNet, partial(noise, 3, 32, 32)),
    Case("own:dcgan_generator", CNN, own.Generator, partial(noise, 100)),
    Case("own:audio_m5", CNN, own.AudioNet, partial(noise, 1, 4000)),
    Case("own:transformer_encoder", TRANSFORMER, own.Encoder, partial(noise, 20, 80)),
    Case("own:transformer_encoder_pre", TRANSFORMER, partial(own.Encoder, norm_first=True),
         partial(noise, 20, 80)),
]  # fmt: skip

LANGUAGE = [
    _transformers("BertModel", 30522, num_hidden_layers=3),
    _transformers("GPT2LMHeadModel", 8192, n_layer=6, bos_token_id=0, eos_token_id=0),
    # The widths of SmolLM-135M: 9 heads read 3 heads of keys and values.
    _transformers("LlamaForCausalLM", 8192, hidden_size=576, intermediate_size=1536,
                  num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3,
                  tie_word_embeddings=True),
]  # fmt: skip

CASES = [*OWN, *TORCHVISION, *TIMM, *LANGUAGE]


def case(name: str) -> Case:
    """The case of this name; KeyError lists the names there are."""
    for found in CASES:
        if found.name == name:
            return found
    raise KeyError(f"no case {name!r}; cases: {', '.join(c.name for c in CASES)}")
