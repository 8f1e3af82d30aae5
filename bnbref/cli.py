"""`python -m bnbref`: the commands and their arguments. What they do is elsewhere, and imported when asked for.

Exit status: 0 done, 1 something was found wrong, 2 the command could not be run as it was given, 130 interrupted.
"""

import argparse
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bnbref
from bnbref.conformance import command as kit
from bnbref.conformance.command import Refused, usable_device, writable
from bnbref.conformance.vectors_command import add_vectors

HUGGING_FACE = ("transformers", "peft", "accelerate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    args = parser().parse_args(argv)
    try:
        if args.run not in (run_info, run_plan) and not (Path(bnbref.__file__).parent / "py.typed").is_file():
            raise Refused(
                f"this command reads files beside the package, and there are none where {bnbref.__file__!r} is, in an archive or "
                "a frozen program: install bnbref, or unpack it"
            )
        status: int = args.run(args)
        print(end="", flush=True)
    except Refused as error:
        print(f"bnbref: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads the output, such as `head`, has read enough; what is left is written nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("bnbref: interrupted", file=sys.stderr)
        return 130
    return status


def parser() -> argparse.ArgumentParser:
    """All commands: each sets `run`, a function of the parsed arguments that returns the exit status."""
    top = argparse.ArgumentParser(
        prog="bnbref",
        description="The formats, layers and optimizers of bitsandbytes in plain PyTorch: weights and states in 4 and 8 bits.",
        epilog="COMMAND --help says more. Exit status: 0 done, 1 something was found wrong, 2 the command could not run.",
    )
    top.add_argument("--version", action="version", version=f"bnbref {bnbref.__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add_parser(name: str, help: str) -> argparse.ArgumentParser:  # noqa: A002, argparse's name
        # `bnbref COMMAND --help` begins with what `bnbref --help` says of the command.
        return subparsers.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}")

    commands = SimpleNamespace(add_parser=add_parser)

    info = commands.add_parser("info", help="versions and devices, and whether the bits are right on this machine")
    info.add_argument(
        "--seconds", type=float, default=10.0, metavar="N", help="begin no compilation after N seconds (default: 10)"
    )
    info.set_defaults(run=run_info)

    check = kit.add_check(commands)
    check.add_argument(
        "--self", action="store_true", help="judge bnbref's own exact kernels instead, eager and compiled"
    )
    check.set_defaults(run=run_check_or_self)
    kit.add_board(commands)
    add_vectors(commands)

    demo = commands.add_parser("demo", help="quantize a small language model, measure it, and fine-tune it")
    demo.add_argument(
        "--quick", action="store_true", help="use a tenth of the text and of the steps, which gives other numbers"
    )
    demo.add_argument("--device", help="where the model runs (default: the accelerator if there is one, else cpu)")
    demo.add_argument("--out", type=Path, metavar="DIR", help="keep the adapter here (default: a temporary directory)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    demo.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses of fine-tuning (needs matplotlib)")
    demo.set_defaults(run=run_demo)

    count: Any = {"type": positive, "metavar": "N"}
    plan = commands.add_parser("plan", help="what fits on which GPU: formats, QLoRA or full training, optimizers")
    plan.add_argument("model", metavar="MODEL", help="a directory, a config.json, a name on the hub, or a size like 7B")
    plan.add_argument(
        "--memory", metavar="SIZE",
        help="the memory of your GPU, like 24GiB, or of several, like 2x24GiB: prints what fits best, and code to paste",
    )  # fmt: skip
    plan.add_argument(
        "--train", choices=("qlora", "full"),
        help="plan to train an adapter, or everything (default: all uses; with --memory: to run the model)",
    )  # fmt: skip
    plan.add_argument(
        "--optimizer", metavar="NAME",
        help="an optimizer of bnbref.optim, like Lion8bit (default: several; with --memory: PagedAdamW8bit)",
    )  # fmt: skip
    plan.add_argument("--seq", **count, default=2048, help="how long each text is, in tokens (default: %(default)s)")
    plan.add_argument("--batch", **count, default=1, help="how many texts are processed at once (default: %(default)s)")
    plan.set_defaults(run=run_plan)

    qlora = commands.add_parser("qlora", help="fine-tune an adapter on a 4-bit model, from a text to a folder")
    qlora.add_argument("--model", metavar="MODEL", help="a directory or a name on the hub (default: the demo model)")
    source = qlora.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="a text file (default: the source of argparse)")
    source.add_argument("--dataset", metavar="NAME", help="instead of a text: a dataset, on the hub or in a directory")
    qlora.add_argument(
        "--column", default="text", metavar="NAME", help="the column that has the texts (default: %(default)s)"
    )
    qlora.add_argument("--split", default="train", metavar="NAME", help="the part to train on (default: %(default)s)")
    qlora.add_argument("--steps", **count, default=60, help="steps of training (default: %(default)s)")
    qlora.add_argument("--batch", **count, default=8, help="windows of text in each step (default: %(default)s)")
    qlora.add_argument("--length", **count, default=128, help="tokens in each window (default: %(default)s)")
    qlora.add_argument(
        "--lr", type=float, default=2e-3, metavar="X",
        help="learning rate (default: %(default)s, which suits the demo model; for 7B begin with 2e-4)",
    )  # fmt: skip
    qlora.add_argument("--rank", **count, default=16, help="rank, the inner size of the adapter (default: %(default)s)")
    qlora.add_argument(
        "--targets", nargs="+", metavar="NAME", help="the layers that get an adapter (default: the projections of attention)"
    )  # fmt: skip
    qlora.add_argument(
        "--out", type=Path, default=Path("adapter"), metavar="DIR", help="where the adapter is saved (default: %(default)s)"
    )  # fmt: skip
    qlora.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses (needs matplotlib)")
    qlora.set_defaults(run=run_qlora)

    alias = commands.add_parser("alias", help="let every Python process that asks for it import bnbref as bitsandbytes")
    what = alias.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--enable", action="store_true", help="install a start-up hook: BNBREF_AS_BITSANDBYTES=1 turns it on"
    )
    what.add_argument("--disable", action="store_true", help="remove it")
    what.add_argument("--status", action="store_true", help="whether it is there, and what `import bitsandbytes` means")
    alias.set_defaults(run=run_alias)
    return top


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def read_text(path: Path) -> str:
    """The text of a file. ValueError that names the file, if it is not in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be a text in UTF-8, got {str(path)!r}: {error}") from error


def needs(command: str, *packages: str) -> None:
    """Raises Refused where a package is not installed, with the line that installs it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(f"{command} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def run_info(args: argparse.Namespace) -> int:
    """0 if the self-check passed."""
    from bnbref.info import info

    return 0 if info(args.seconds) else 1


def run_check_or_self(args: argparse.Namespace) -> int:
    """0 if every kernel, or every case of the kit, gave the right bits."""
    if not args.self:
        return kit.run_check(args)
    kit.refuse(args, "--self goes with --device alone", "device")
    from bnbref.info import check_kernels, default_device

    return 0 if check_kernels(usable_device(args.device) if args.device else default_device()) else 1


def run_demo(args: argparse.Namespace) -> int:
    """0 if everything was as it must be; what was not is on stderr."""
    needs("demo", *HUGGING_FACE, *(["matplotlib"] if args.plot else []))
    if args.device:
        usable_device(args.device)
    writable(args.json, args.plot)
    from bnbref.demo.formats import Mismatch
    from bnbref.demo.run import run

    try:
        run(quick=args.quick, device=args.device, out=args.out, json_file=args.json, plot_file=args.plot)
    except Mismatch as error:
        print(f"bnbref: {error}", file=sys.stderr)
        return 1
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """0 if something fits, 1 if nothing does."""
    needs("plan", "transformers", "accelerate")
    from bnbref.integrations.hf import plan, plan_report
    from bnbref.integrations.hf.blueprint import Blueprint

    optimizers = sorted(family.__name__ for family in plan.optimizers())
    if args.optimizer not in (None, *optimizers):
        raise Refused(f"--optimizer must be one of {', '.join(optimizers)}, got {args.optimizer!r}")
    try:
        blueprint = Blueprint(plan.read_config(args.model))
        optimizer = getattr(bnbref.optim, args.optimizer) if args.optimizer else None
        if args.memory is None:
            text, fits = plan_report.cards(blueprint, args.train, optimizer, args.seq, args.batch)
        else:
            count, each = plan_report.parse_memory(args.memory)
            memory = plan_report.room(blueprint, count, each)
            optimizer = optimizer or bnbref.optim.PagedAdamW8bit
            found = plan.plans(blueprint, args.train, optimizer, args.seq, args.batch)
            name = args.model if plan.number_of_parameters(args.model) is None else "NAME OF THE MODEL"
            text = plan_report.report(name, blueprint.loader, found, memory, args.train, optimizer.__name__, count)
            fits = any(p.total <= memory for p in found)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    print(text)
    return 0 if fits else 1


def run_qlora(args: argparse.Namespace) -> int:
    """0 when the adapter is saved."""
    needs("qlora", *HUGGING_FACE, *(["matplotlib"] if args.plot else []), *(["datasets"] if args.dataset else []))
    if not args.lr > 0:
        raise Refused(f"--lr must be positive, got {args.lr}")
    writable(args.plot)
    from bnbref.demo import MODEL
    from bnbref.info import compute_dtype, default_device
    from bnbref.integrations.hf.qlora import ATTENTION, dataset_text, qlora

    try:
        if args.dataset:
            text = dataset_text(args.dataset, args.column, args.split)
        else:
            text = read_text(args.text) if args.text else inspect.getsource(argparse)
        found = qlora(
            args.model or str(MODEL), text, args.out, steps=args.steps, batch=args.batch, length=args.length, lr=args.lr,
            rank=args.rank, targets=args.targets or ATTENTION, dtype=compute_dtype(default_device()),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    print(
        f"{found.parameters:,} parameters trained; held-out perplexity {found.before:.2f} before, {found.after:.2f} after; "
        f"{args.out}: {found.nbytes / 2**20:.1f} MiB"
    )
    if args.plot:
        from bnbref.demo.report import write_plot

        write_plot(args.plot, found.losses, "QLoRA: NF4, nested scales")
    return 0


def run_alias(args: argparse.Namespace) -> int:
    """0 when it is done."""
    from bnbref.integrations.bitsandbytes import startup

    try:
        if args.enable:
            print(f"wrote {startup.enable_hook()}: BNBREF_AS_BITSANDBYTES=1 now turns bnbref into bitsandbytes")
        elif args.disable:
            print(f"removed {startup.hook_file()}" if startup.disable_hook() else f"there is no {startup.hook_file()}")
        else:
            print(startup.status())
    except OSError as error:
        raise Refused(str(error)) from error
    return 0
