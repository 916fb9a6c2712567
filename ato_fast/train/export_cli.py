"""``ato-fast export`` and ``ato-fast bench``: commands on a folder that `ato_fast.save` wrote."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .command import check_file, image_shape, refusing, write_json

if TYPE_CHECKING:
    from torch import nn

BENCH_ROUNDS = 5
BENCH_SECONDS = 2.0
"""Of one round, for both networks together."""


def add_export(export: argparse.ArgumentParser) -> None:
    """The options of ``ato-fast export``."""
    _add_network(export)
    add = export.add_argument
    add("--format", choices=("onnx", "torch-export", "state-dict"), required=True)
    add("--output", type=Path, required=True, metavar="FILE", help="the file to write")
    add("--batch", type=int, default=2, metavar="N", help="batch size that the export is tried on")
    add("--fixed-batch", action="store_true", help="take batches of --batch only, instead of any")
    add("--opset", type=int, help="version of ONNX's operators; default: torch's")
    add("--json", type=Path, metavar="FILE", help="write the report there")
    export.set_defaults(run=_export)


def add_bench(bench: argparse.ArgumentParser) -> None:
    """The options of ``ato-fast bench``."""
    _add_network(bench)
    add = bench.add_argument
    add("--batch", type=int, default=64, metavar="N", help="images per forward pass")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    bench.set_defaults(run=_bench)


def _add_network(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("folder", type=Path, metavar="DIR", help="what ato-fast train or ato_fast.save wrote")
    group = command.add_argument_group("network", "what ato-fast train wrote says all of it")
    add = group.add_argument
    add("--model", metavar="NAME", help="the dense network, as for train")
    add("--classes", type=int, metavar="N", help="number of classes")
    add("--input-size", type=image_shape, metavar="CxHxW", help="image shape, e.g. 3x224x224")


def _export(arguments: argparse.Namespace) -> int:
    with refusing(ValueError, OSError):
        from ..export import export

        check_file("--output", arguments.output)
        if arguments.json:
            check_file("--json", arguments.json)
        _, small, shape = _saved(arguments)
        report = export(
            small,
            (_images(arguments.batch, shape),),
            arguments.output,
            format=arguments.format,
            opset=arguments.opset,
            dynamic_batch=not arguments.fixed_batch,
        )
        if arguments.json:
            write_json(arguments.json, vars(report) | {"path": str(report.path)})
    print(report)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    with refusing(ValueError, OSError):
        import torch

        from .evaluate import latency
        from .machine import machine, versions
        from .settings import pick_device

        if arguments.json:
            check_file("--json", arguments.json)
        device = pick_device(arguments.device)
        build, small, shape = _saved(arguments)
        networks = [network.to(device, memory_format=torch.channels_last)
                    for network in (build(), small)]  # fmt: skip
        x = _images(arguments.batch, shape).to(device)
        rounds = [latency(networks, x, BENCH_SECONDS) for _ in range(BENCH_ROUNDS)]
        dense_ms, small_ms = ([both[i].median_ms for both in rounds] for i in (0, 1))
        ratios = [small.median_ms / dense.median_ms for dense, small in rounds]
        content = {
            "input": list(x.shape),
            "dense_ms": dense_ms,
            "small_ms": small_ms,
            "ratio": ratios,
            "machine": machine(device),
            "versions": versions(),
        }
        if arguments.json:
            write_json(arguments.json, content)
    size = "x".join(map(str, x.shape))
    print(
        f"forward pass on {size}, {content['machine']['threads']} threads on {device.type}: "
        f"dense {_spread(dense_ms, '.2f')} ms, small {_spread(small_ms, '.2f')} ms, "
        f"small/dense {_spread(ratios, '.1%')}\n"
        f"median (lowest to highest) of {BENCH_ROUNDS} rounds in which the two take turns"
    )
    return 0


def _spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _images(batch: int, shape: tuple[int, int, int]):
    import torch

    if batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {batch}")
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def _saved(
    arguments: argparse.Namespace,
) -> tuple[Callable[[], nn.Module], nn.Module, tuple[int, int, int]]:
    """What builds the dense network, the small one, and the shape of an image."""
    from .. import load
    from ..artifact import read_recipe
    from . import models

    found = _recorded(read_recipe(arguments.folder), arguments.folder)
    given = {
        "--model": arguments.model,
        "--classes": arguments.classes,
        "--input-size": arguments.input_size,
    }
    known = {name: found.get(name) if value is None else value for name, value in given.items()}
    missing = [name for name, value in known.items() if value is None]
    if missing:
        raise ValueError(
            f"{arguments.folder}: was not written by ato-fast train, which says what network it "
            f"is; give {', '.join(missing)}"
        )
    name, n_classes, shape = known.values()
    if n_classes < 1:
        raise ValueError(f"--classes: expected at least 1, got {n_classes}")
    build = partial(models.build, name, n_classes, shape[0], shape[1:])
    return build, load(arguments.folder, build), shape


def _recorded(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the recipe says about the network, by the option that would say it."""
    provenance = recipe.get("provenance")
    network = provenance.get("network") if isinstance(provenance, dict) else None
    if network is None:
        return {}
    expected = {"model": str, "n_classes": int, "input_shape": list}
    if not isinstance(network, dict) or not all(
        type(network.get(name)) is kind for name, kind in expected.items()
    ):
        raise ValueError(f"{folder}: the recipe's record of the network is damaged: {network!r}")
    shape = "x".join(map(str, network["input_shape"]))
    try:
        size = image_shape(shape)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{folder}: the recipe's record of the network: {error}") from None
    return {"--model": network["model"], "--classes": network["n_classes"], "--input-size": size}
