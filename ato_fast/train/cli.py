"""The command line: ``ato-fast train``, ``inspect``, ``export`` and ``bench``.

Exit code 0: done. 1: ``inspect --verify`` found a difference; or a defect of ours, with a
traceback. 2: something given does not work; one line on stderr says what, and nothing half-written
is left.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from .command import BadInput, Parser, check_file, image_shape, refusing, write, write_json
from .export_cli import add_bench, add_export


def _amount(text: str) -> float | int:
    """A fraction (``0.5``) or a count (``20000000``)."""
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected a fraction such as 0.5 or a whole number, got {text!r}"
            ) from None


def parser() -> argparse.ArgumentParser:
    """The argument parser, with its subcommands."""
    top = Parser(prog="ato-fast", description="Train once, get a smaller equal network.")
    top.add_argument("--version", action="store_true", help="print the version and stop")
    commands = top.add_subparsers(dest="command", parser_class=Parser)
    _add_train(commands.add_parser("train", help="train a dense twin and a network that shrinks"))
    _add_inspect(commands.add_parser("inspect", help="what of a model can be pruned, and what not"))
    add_export(commands.add_parser("export", help="write a saved network as ONNX and the like"))
    add_bench(commands.add_parser("bench", help="time a saved network against the dense one"))
    return top


def _add_train(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    add("--data", required=True, help="digits, fashion-mnist, cifar10, cifar100 or imagenet")
    add("--data-root", type=Path, help="folder that holds the dataset; nothing is downloaded")
    add("--model", required=True, help="resnet18/20/34/56, mobilenetv2, or torchvision/timm name")
    budget = train.add_mutually_exclusive_group(required=True)
    budget.add_argument("--macs", type=_amount, help="MACs to keep: fraction of the whole or count")
    budget.add_argument("--params", type=_amount, help="parameters to keep, likewise")
    budget.add_argument(
        "--latency", type=float, metavar="FRACTION", help="share of the dense network's latency"
    )
    budget.add_argument(
        "--latency-ms", type=float, metavar="MS", help="milliseconds of a forward pass, measured"
    )
    recipe = train.add_argument_group("recipe", "where not given, the dataset's own").add_argument
    recipe("--epochs", type=int, help="length of each of the two runs")
    recipe("--batch-size", type=int, help="examples per step")
    recipe("--optimizer", choices=("sgd", "adamw"), help="sgd: Nesterov momentum 0.9")
    recipe("--lr", type=float, help="peak learning rate")
    recipe("--weight-decay", type=float)
    recipe("--label-smoothing", type=float)
    add("--scope", choices=("inner", "all"), default="inner", help="all: also residual channels")
    add(
        "--schedule",
        choices=("default", "paper", "fast"),
        default="default",
        help="default: the mask freezes half-way, and the network is cut from then on; paper: as "
        "published; fast: cuts from 6%% of the run on, done at 25%%",
    )
    add("--controller-steps", type=int, help="controller steps of the whole search; default 200")
    add(
        "--fidelity",
        choices=("default", "paper"),
        default="default",
        help="paper: the published controller and strengths, and a random frozen mask",
    )
    _add_widths(train)
    add("--held-out", type=float, default=0.05, help="share of the data the controller sees")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and controller")
    add("--no-dense", action="store_true", help="do not train the dense twin")
    add("--output", type=Path, help="folder for what comes out; default runs/DATA-MODEL")
    add("--resume", choices=("never", "auto"), default="never", help="auto: go on where it stopped")
    add("--overwrite", action="store_true", help="start anew whatever --output holds")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--device", default="auto", help="auto, cpu or cuda[:N]")
    add("--workers", type=int, default=2, help="processes that read images (imagenet)")
    train.set_defaults(run=_train)


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    add = inspect.add_argument
    add("model", metavar="MODEL", help="as for train")
    add("--data", help="take image shape and number of classes from this dataset")
    add("--input-size", type=image_shape, metavar="CxHxW", help="image shape, e.g. 3x224x224")
    add("--classes", type=int, help="number of classes")
    add("--scope", choices=("inner", "all"), default="inner", help="all: also residual channels")
    add(
        "--ignore",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="modules or parameters whose channels stay whole; shell patterns such as 'layer1.*'",
    )
    _add_widths(inspect)
    add("--verify", action="store_true", help="cut every gate out of a copy and compare outputs")
    add("--json", type=Path, metavar="FILE", help="write all of it there")
    add(
        "--graph", type=Path, metavar="FILE", help="draw the gates and their coupling; .svg or .png"
    )
    inspect.set_defaults(run=_inspect)


def _add_widths(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--min-channels", type=int, default=1, help="channels every gate keeps at least")
    add(
        "--round-to", type=int, default=1, metavar="K", help="keep multiples of K channels per gate"
    )


def _train(arguments: argparse.Namespace) -> int:
    with refusing(ValueError, OSError):
        from .job import prepare
        from .table import closing_table

        if arguments.json:
            check_file("--json", arguments.json)
        job = prepare(_settings(arguments), _place(arguments))
    with refusing(FloatingPointError, OSError):
        result = job.run(tell=lambda line: print(line, file=sys.stderr))
        print(closing_table(result), flush=True)
        if arguments.json:
            write_json(arguments.json, result)
    return 0


def _settings(arguments: argparse.Namespace):
    from ..budget import Budget
    from .settings import Settings

    recipe = {
        name: getattr(arguments, name)
        for name in ("epochs", "batch_size", "optimizer", "lr", "weight_decay", "label_smoothing")
    }
    return Settings(
        data=arguments.data,
        model=arguments.model,
        budget=Budget(
            macs=arguments.macs,
            params=arguments.params,
            latency=arguments.latency,
            latency_ms=arguments.latency_ms,
        ),
        recipe=recipe,
        scope=arguments.scope,
        schedule=arguments.schedule,
        controller_steps=arguments.controller_steps,
        fidelity=arguments.fidelity,
        min_channels=arguments.min_channels,
        round_to=arguments.round_to,
        held_out=arguments.held_out,
        seed=_seed(arguments.seed),
        dense=not arguments.no_dense,
    )


def _place(arguments: argparse.Namespace):
    from .settings import Place

    default = Path("runs") / f"{arguments.data}-{arguments.model.replace(':', '-')}"
    return Place(
        output=arguments.output or default,
        data_root=arguments.data_root,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        device=arguments.device,
        workers=arguments.workers,
    )


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed: expected 0 to 2**32 - 1, got {seed}")
    return seed


def _inspect(arguments: argparse.Namespace) -> int:
    with refusing(ValueError, OSError):
        import torch

        from .. import trace
        from ..describe import describe
        from ..report import terminal_width, text_of
        from . import models

        shape, n_classes = _input_of(arguments)
        if arguments.json:
            check_file("--json", arguments.json)
        if arguments.graph:
            kind = _picture_kind(arguments.graph)
        model = models.build(arguments.model, n_classes, shape[0], shape[1:])
        inputs = (torch.zeros(2, *shape),)
        layout = trace(
            model,
            inputs,
            scope=arguments.scope,
            ignore=arguments.ignore,
            min_channels=arguments.min_channels,
            round_to=arguments.round_to,
        )
    content = {"model": arguments.model, "input": list(shape), **describe(layout)}
    size = "x".join(map(str, shape))
    lines, code = [f"input {size}", text_of(content, layout.model_name, terminal_width())], 0
    if arguments.verify:
        verified = layout.verify(model, inputs)
        failures = [str(failure) for failure in verified.failures]
        content["verify"] = {"ok": bool(verified.ok), "failures": failures}
        lines += ["", str(verified)]
        code = 0 if verified.ok else 1
    with refusing(OSError):
        if arguments.json:
            write_json(arguments.json, content)
        if arguments.graph:
            from ..picture import draw

            write("--graph", arguments.graph, draw(content, arguments.model, kind))
    print("\n".join(lines))
    return code


def _picture_kind(path: Path) -> str:
    """``svg`` or ``png``, by the name of the file."""
    from ..picture import FORMATS

    check_file("--graph", path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"--graph {path}: expected a file name that ends in .svg or .png")
    return kind


def _input_of(arguments: argparse.Namespace) -> tuple[tuple[int, int, int], int]:
    """Image shape and number of classes: as given, else the dataset's, else the model's usual."""
    from . import data, models

    if arguments.data:
        data.check_name(arguments.data)
        shape, n_classes = data.SHAPES[arguments.data]
    else:
        ours = arguments.model.removeprefix("cifar:") in models.CIFAR
        shape, n_classes = data.SHAPES["cifar10" if ours else "imagenet"]
    if arguments.classes is not None:
        if arguments.classes < 1:
            raise ValueError(f"--classes: expected at least 1, got {arguments.classes}")
        n_classes = arguments.classes
    return arguments.input_size or shape, n_classes


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.version:
        from .. import __version__

        print(f"ato-fast {__version__}")
        return 0
    if arguments.command is None:
        names = "train, inspect, export or bench"
        print(f"ato-fast: error: expected a command: {names}", file=sys.stderr)
        return 2
    # What they log about a model that they cannot take is in the error we raise.
    for name in ("torch.fx.experimental.symbolic_shapes", "torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from ..backend import BackendError, requested

    try:
        with refusing(BackendError):
            requested()
        return arguments.run(arguments)
    except BadInput as error:
        print(f"ato-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = "; --resume auto continues" if arguments.command == "train" else ""
        print(f"ato-fast: interrupted{more}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
