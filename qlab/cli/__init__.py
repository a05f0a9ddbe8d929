"""The command line: `qlab methods, describe, fit, test, pack, diagnose, attack, reproduce, bench`.

This file reads the command and hands on. It imports neither torch nor Lightning, so that `--help`, `methods` and every
mistyped name are answered at once; `qlab.cli.training` (on LightningCLI) and the others are imported when they are needed.

Exit status: 0 done (for `reproduce`: the claim holds; for `bench`: all goals are kept), 2 an error that the user can act on,
3 the claim fails, a goal is missed, packed backends differ, or `attack` finds masked gradients, 4 the claim is undecided,
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from qlab.errors import QlabError

__all__ = ["main"]

TRAINING = ("fit", "test")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
        prog="qlab",
        description="A lab for quantized and binary neural networks.",
        epilog="qlab COMMAND --help says more.",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    methods = commands.add_parser("methods", help="list the training methods", description="List the training methods.")
    methods.add_argument("--json", action="store_true", help="as JSON")

    describe = commands.add_parser(
        "describe",
        help="show a method, data set, model or experiment",
        description="Show what the lab knows of a name: what it is, its paper, its options with types and defaults.",
    )
    describe.add_argument("name", help="a method, data set, model or experiment")

    commands.add_parser("fit", help="train a network", add_help=False)
    commands.add_parser("test", help="test a checkpoint", add_help=False)

    pack = commands.add_parser(
        "pack",
        help="put a trained net on packed bits",
        description="Compile a checkpoint's deployed net to packed bits, compare every backend on a batch, and write the net. "
        "Exit status: 0 all backends gave the same bits, 3 they differ.",
    )
    _checkpoint_options(pack)
    pack.add_argument("--out", metavar="FILE", help="default: the checkpoint's name with .safetensors")
    pack.add_argument("--onnx", metavar="FILE", help="also write the simulation as ONNX (needs the extra onnx)")
    pack.add_argument(
        "--product",
        choices=("unpack", "sums"),
        default="unpack",
        help="how sign weights weigh floats: as the original net sums, or with less memory traffic; default: unpack",
    )

    diagnose = commands.add_parser(
        "diagnose",
        help="say what is wrong with a trained net",
        description="Examine a checkpoint's deployed and training-time net on test data, and name what is wrong with them, the "
        "likeliest cause first. Exit status: 0, whatever is found.",
    )
    _checkpoint_options(diagnose)
    diagnose.add_argument("--examples", type=int, default=256, metavar="N", help="of the batch; default: 256")
    diagnose.add_argument("--json", metavar="FILE", help="also write the findings here")

    attack = commands.add_parser(
        "attack",
        help="measure how robust a trained net is, and whether the figure can be believed",
        description="Attack a checkpoint's deployed net on test data by the worst case over a suite, and examine whether its "
        "gradients are masked. An interrupted run goes on where it stopped. Exit status: 0, or 3 where masking is found.",
    )
    _checkpoint_options(attack)
    attack.add_argument("--suite", default="standard", metavar="S", help="standard, quick or search; default: standard")
    attack.add_argument(
        "--eps", default="0.1,0.2", metavar="E", help="radii, in the units of the data; default: 0.1,0.2"
    )
    attack.add_argument("--norm", default="linf", metavar="P", help="linf, l2 or l1; default: linf")
    attack.add_argument("--samples", type=int, default=1000, metavar="N", help="test examples; default: 1000")
    attack.add_argument("--twin", metavar="CKPT", help="a float net's checkpoint, for the transfer attack")
    attack.add_argument("--seed", type=int, default=0, metavar="N", help="of all attacks; default: 0")
    attack.add_argument("--budget", type=float, metavar="S", help="seconds after which no further attack is started")
    attack.add_argument("--root", metavar="DIR", help="where finished attacks are kept; default: beside the checkpoint")
    attack.add_argument("--html", metavar="FILE", help="write a report with figures here")
    attack.add_argument("--json", metavar="FILE", help="write the figures here")

    reproduce = commands.add_parser(
        "reproduce",
        help="judge a paper's claim",
        description="Run a paper's claim and judge it. Exit status: 0 it holds, 3 it fails, 4 undecided. "
        "An interrupted run goes on where it stopped.",
    )
    which = reproduce.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", help="an experiment")
    which.add_argument("--list", action="store_true", help="list the experiments")
    reproduce.add_argument(
        "--scale", choices=("laptop", "workstation", "paper"), default="laptop", help="default: laptop"
    )
    reproduce.add_argument(
        "--seeds", type=int, metavar="N", help="how many seeds; default: the experiment's own number"
    )
    reproduce.add_argument("--data", metavar="D", help="a data set that the experiment accepts; default: its first")
    reproduce.add_argument(
        "--workers", type=int, metavar="N", help="processes; default: one per core where that is faster"
    )
    reproduce.add_argument("--fresh", action="store_true", help="run again what is kept from an earlier run")
    reproduce.add_argument("--json", metavar="FILE", help="write the result here")

    bench = commands.add_parser(
        "bench",
        help="time against what one would use instead",
        description="Run a benchmark of a checkout. Exit status: 0 all goals are kept, 3 one is missed.",
    )
    which = bench.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", help="a benchmark")
    which.add_argument("--list", action="store_true", help="list the benchmarks")
    bench.add_argument(
        "--json", metavar="FILE", help="write the result here; {device} in the name becomes the device's"
    )
    return parser


def _checkpoint_options(command: argparse.ArgumentParser) -> None:
    """Add the options of a command that takes a checkpoint and its data."""
    command.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of `qlab fit`; nothing in it is executed")
    command.add_argument("--data", metavar="NAME", help="default: what the net was trained on, if config.yaml says it")


def _dispatch(arguments: list[str]) -> int:
    # fit and test have options that only the chosen method and data set define, so they are not argparse's.
    if arguments and arguments[0] in TRAINING:
        from qlab.cli.choice import main as training

        return training(arguments[0], arguments[1:])

    parser = _parser()
    options = parser.parse_args(arguments)
    if options.version:
        import qlab

        print(f"qlab {qlab.__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    if options.command in ("methods", "describe"):
        from qlab.cli import shelves

        return shelves.methods(options.json) if options.command == "methods" else shelves.describe(options.name)

    if options.command == "pack":
        from qlab.cli.packing import pack

        return pack(options)
    if options.command == "diagnose":
        from qlab.cli.diagnose import diagnose

        return diagnose(options)
    if options.command == "attack":
        from qlab.cli.attack import attack

        return attack(options)

    from qlab.cli import judging

    return (judging.reproduce if options.command == "reproduce" else judging.bench)(options, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        arguments: the words after `qlab`; None for those of the process.
    """
    try:
        status = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return status
    except QlabError as error:
        print(f"qlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qlab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `qlab methods | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
