"""`python -m bnbref`: the commands and their arguments. What they do is elsewhere, and imported when asked for.

Exit status: 0 done, 1 something was found wrong, 2 the command could not be run as it was given.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import bnbref
from bnbref.conformance.command import add_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    args = parser().parse_args(argv)
    status: int = args.run(args)
    return status


def parser() -> argparse.ArgumentParser:
    """All commands: each sets `run`, a function of the parsed arguments that returns the exit status."""
    top = argparse.ArgumentParser(prog="bnbref", description=bnbref.__doc__)
    top.add_argument("--version", action="version", version=f"bnbref {bnbref.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="versions, devices, and a self-check against golden digests")
    info.add_argument(
        "--seconds", type=float, default=10.0, metavar="N", help="begin no compilation after N seconds (default: 10)"
    )
    info.set_defaults(run=run_info)

    demo = commands.add_parser("demo", help="quantize a small language model, measure it, and fine-tune it")
    demo.add_argument("--quick", action="store_true", help="a tenth of the text and of the steps; other numbers")
    demo.add_argument("--device", help="where the model runs (default: the accelerator if there is one, else cpu)")
    demo.add_argument("--out", type=Path, metavar="DIR", help="keep the adapter here (default: a temporary directory)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    demo.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses of fine-tuning (needs matplotlib)")
    demo.set_defaults(run=run_demo)

    add_commands(commands)
    return top


def run_info(args: argparse.Namespace) -> int:
    """0 if the self-check passed."""
    from bnbref.info import info

    return 0 if info(args.seconds) else 1


def run_demo(args: argparse.Namespace) -> int:
    """0 if everything was as it must be; what was not is on stderr."""
    needed = ["transformers", "peft", "accelerate", *(["matplotlib"] if args.plot else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "bnbref[hf]" if missing != ["matplotlib"] else "matplotlib"
        return refuse(f"demo needs {', '.join(missing)}: pip install '{extra}'")
    problem = device_problem(args.device) if args.device else None
    if problem:
        return refuse(problem)
    for file in (args.json, args.plot):
        if file is not None and not file.parent.is_dir():
            return refuse(f"cannot write {file}: there is no directory {file.parent}")
    from bnbref.demo.formats import Mismatch
    from bnbref.demo.run import run

    try:
        run(quick=args.quick, device=args.device, out=args.out, json_file=args.json, plot_file=args.plot)
    except Mismatch as error:
        print(f"bnbref: {error}", file=sys.stderr)
        return 1
    return 0


def device_problem(name: str) -> str | None:
    """Why a device cannot be used; None if it can."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        return f"--device {name}: torch knows no such device"
    try:
        torch.zeros(1, device=device).tolist()
    except (
        AssertionError,
        ImportError,
        NotImplementedError,
        RuntimeError,
    ):  # torch raises an AssertionError where it has no CUDA
        return f"--device {name}: torch cannot use it here"
    return None


def refuse(message: str) -> int:
    """Say on stderr why the command does not run; exit status 2, like argparse's own."""
    print(f"bnbref: error: {message}", file=sys.stderr)
    return 2
