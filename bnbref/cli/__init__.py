"""`python -m bnbref`: the commands and their arguments. What they do is elsewhere, and imported when asked for.

Exit status: 0 done, 1 something was found wrong, 2 the command could not be run as it was given, 130 interrupted.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import bnbref
from bnbref.cli import hugging_face
from bnbref.conformance import command as kit
from bnbref.conformance.command import Refused, folder, made_folder, not_empty, usable_device, writable
from bnbref.conformance.vectors_command import add_vectors


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    args = parser().parse_args(argv)
    try:
        needs_no_file = args.run in (run_info, hugging_face.run_plan)
        if not needs_no_file and not (Path(bnbref.__file__).parent / "py.typed").is_file():
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
    demo.add_argument(
        "--device", type=not_empty, help="where the model runs (default: the accelerator if there is one, else cpu)"
    )
    demo.add_argument(
        "--out", type=folder, metavar="DIR", help="keep the adapter here (default: a temporary directory)"
    )
    demo.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    demo.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses of fine-tuning (needs matplotlib)")
    demo.set_defaults(run=run_demo)

    hugging_face.add_plan(commands)
    hugging_face.add_qlora(commands)

    alias = commands.add_parser("alias", help="let every Python process that asks for it import bnbref as bitsandbytes")
    what = alias.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--enable", action="store_true", help="install a start-up hook: BNBREF_AS_BITSANDBYTES=1 turns it on"
    )
    what.add_argument("--disable", action="store_true", help="remove it")
    what.add_argument("--status", action="store_true", help="whether it is there, and what `import bitsandbytes` means")
    alias.set_defaults(run=run_alias)
    return top


def run_info(args: argparse.Namespace) -> int:
    """0 if the self-check passed."""
    if math.isnan(args.seconds):
        raise Refused("--seconds must be a number, got nan")
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
    hugging_face.needs("demo", *hugging_face.PACKAGES, *(["matplotlib"] if args.plot else []))
    if args.device:
        usable_device(args.device)
    writable(args.json)
    hugging_face.drawable(args.plot)
    made_folder(args.out)
    from bnbref.demo.formats import Mismatch
    from bnbref.demo.run import run

    try:
        run(quick=args.quick, device=args.device, out=args.out, json_file=args.json, plot_file=args.plot)
    except Mismatch as error:
        print(f"bnbref: {error}", file=sys.stderr)
        return 1
    return 0


def run_alias(args: argparse.Namespace) -> int:
    """0 when it is done."""
    from bnbref.integrations.bitsandbytes import startup

    try:
        if args.enable:
            said = f"wrote {startup.enable_hook()}: BNBREF_AS_BITSANDBYTES=1 now turns bnbref into bitsandbytes"
        elif args.disable:
            said = f"removed {startup.hook_file()}" if startup.disable_hook() else f"there is no {startup.hook_file()}"
        else:
            said = startup.status()
    except OSError as error:
        raise Refused(str(error)) from error
    print(said)  # an OSError of its own: the reader has read enough
    return 0
