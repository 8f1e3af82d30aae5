"""`python -m bnbref plan` and `qlora`: their arguments, and what they run, which is imported when it runs.

What a function that runs a command returns and raises: `bnbref.conformance.command`.
"""

import argparse
import importlib.util
import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import bnbref
from bnbref.conformance.command import Refused, folder, not_empty, writable

PACKAGES = ("transformers", "peft", "accelerate")

MOST = 10**18
"""Of tokens, steps and the like: more have no place in an index of 64 bits."""


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    if int(text) > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST:.0e}, got {text!r}")
    return int(text)


_COUNT: Any = {"type": positive, "metavar": "N"}


def add_plan(commands: Any) -> None:
    """Add `plan` to the subparsers of `python -m bnbref`."""
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
    plan.add_argument("--seq", **_COUNT, default=2048, help="how long each text is, in tokens (default: %(default)s)")
    plan.add_argument(
        "--batch", **_COUNT, default=1, help="how many texts are processed at once (default: %(default)s)"
    )
    plan.set_defaults(run=run_plan)


def add_qlora(commands: Any) -> None:
    """Add `qlora` to the subparsers of `python -m bnbref`."""
    qlora = commands.add_parser("qlora", help="fine-tune an adapter on a 4-bit model, from a text to a folder")
    qlora.add_argument(
        "--model", type=not_empty, metavar="MODEL", help="a directory or a name on the hub (default: the demo model)"
    )
    source = qlora.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="a text file (default: the source of argparse)")
    source.add_argument(
        "--dataset", type=not_empty, metavar="NAME", help="instead of a text: a dataset, on the hub or in a directory"
    )
    qlora.add_argument(
        "--column",
        type=not_empty,
        metavar="NAME",
        help="with --dataset: the column that has the texts (default: text)",
    )
    qlora.add_argument(
        "--split", type=not_empty, metavar="NAME", help="with --dataset: the part to train on (default: train)"
    )
    qlora.add_argument("--steps", **_COUNT, default=60, help="steps of training (default: %(default)s)")
    qlora.add_argument("--batch", **_COUNT, default=8, help="windows of text in each step (default: %(default)s)")
    qlora.add_argument("--length", **_COUNT, default=128, help="tokens in each window (default: %(default)s)")
    qlora.add_argument(
        "--lr", type=float, default=2e-3, metavar="X",
        help="learning rate (default: %(default)s, which suits the demo model; for 7B begin with 2e-4)",
    )  # fmt: skip
    qlora.add_argument(
        "--rank", **_COUNT, default=16, help="rank, the inner size of the adapter (default: %(default)s)"
    )
    qlora.add_argument(
        "--targets", nargs="+", type=not_empty, metavar="NAME",
        help="the layers that get an adapter, or all-linear (default: the projections of attention)",
    )  # fmt: skip
    qlora.add_argument(
        "--out", type=folder, default=Path("adapter"), metavar="DIR", help="where the adapter is saved (default: %(default)s)"
    )  # fmt: skip
    qlora.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses (needs matplotlib)")
    qlora.set_defaults(run=run_qlora)


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


def drawable(file: Path | None) -> None:
    """Raises Refused where matplotlib draws no such kind of file, or it cannot be written."""
    writable(file)
    if file is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = sorted(FigureCanvasBase.filetypes)
        if file.suffix.removeprefix(".").lower() not in kinds:
            raise Refused(f"--plot must be a file that ends in .{', .'.join(kinds)}, got {file}")


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
    needs("qlora", *PACKAGES, *(["matplotlib"] if args.plot else []), *(["datasets"] if args.dataset else []))
    if not 0 < args.lr < math.inf:
        raise Refused(f"--lr must be positive and finite, got {args.lr}")
    if not args.dataset and (args.column or args.split):
        raise Refused("--column and --split go with --dataset, which was not given")
    drawable(args.plot)
    # peft reads an attribute of the model by the name that it had in older versions of transformers.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    from bnbref.demo import MODEL
    from bnbref.info import compute_dtype, default_device
    from bnbref.integrations.hf.qlora import ALL_LINEAR, ATTENTION, dataset_text, qlora

    targets = args.targets or ATTENTION
    if targets == [ALL_LINEAR]:  # peft takes a list for names of layers
        targets = ALL_LINEAR
    try:
        if args.dataset:
            text = dataset_text(args.dataset, args.column or "text", args.split or "train")
        else:
            text = read_text(args.text) if args.text else inspect.getsource(argparse)
        found = qlora(
            args.model or str(MODEL), text, args.out, steps=args.steps, batch=args.batch, length=args.length, lr=args.lr,
            rank=args.rank, targets=targets, dtype=compute_dtype(default_device()),
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
