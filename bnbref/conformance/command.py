"""`python -m bnbref check` and `board`: their arguments, and what they run. Those of `vectors` are in vectors_command.py.

A function that runs a command returns its exit status: 0 no failure, 1 something failed. Where the command cannot be run as it
was given, it raises `Refused`, which ends with status 2. What a command needs is imported when it runs.
"""

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Refused(Exception):
    """Why a command cannot be run as it was given."""


_OF_CHECK = (
    "backend", "order", "list", "device", "quick", "only", "jobs", "limit", "fail_on",
    "json", "summary", "badge", "markdown", "html",
)  # fmt: skip


def refuse(args: argparse.Namespace, why: str, *allowed: str) -> None:
    """Raises Refused where another option of `check` was given than these."""
    values = {f"--{name.replace('_', '-')}": getattr(args, name) for name in _OF_CHECK if name not in allowed}
    given = [option for option, value in values.items() if value is not False and value not in (None, "", "any")]
    if given:
        raise Refused(f"{why}, got {', '.join(given)}")


def not_empty(text: str) -> str:
    """The text of an option, which is not empty: `--backend "$NAME"` where NAME is not set would otherwise mean the default."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r}")
    return text


def folder(text: str) -> Path:
    """The path of a folder. An empty one would be the folder in which the command runs."""
    return Path(not_empty(text))


def add_check(commands: Any) -> argparse.ArgumentParser:
    """Add `check` to the subparsers of `python -m bnbref`; its parser, whose `run` the caller sets."""
    check: argparse.ArgumentParser = commands.add_parser(
        "check", help="are a backend's bits right? Runs the cases of the conformance kit on it"
    )
    check.add_argument(
        "--backend",
        type=not_empty,
        metavar="NAME",
        help="what is judged: a name of --list, or your package.module[:attribute] (default: bnbref)",
    )
    check.add_argument("--order", action="store_true", help="find the order in which its products are added, instead")
    check.add_argument("--list", action="store_true", help="name the kit's backends, and what each of them needs")
    check.add_argument(
        "--device", type=not_empty, help="where it runs (default: cpu; with --self the accelerator if there is one)"
    )
    check.add_argument("--quick", action="store_true", help="run a selection of the cases")
    check.add_argument("--only", default="", metavar="TEXT", help="run only the cases whose id contains this")
    check.add_argument("--jobs", type=int, metavar="N", help="processes that run the cases (default: 1)")
    check.add_argument("--limit", type=float, metavar="S", help="seconds after which a case has failed (default: 600)")
    check.add_argument(
        "--fail-on", choices=("any", "defect"), default="any",
        help="what ends with status 1: anything that fails, or defects alone (default: %(default)s)",
    )  # fmt: skip
    check.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    check.add_argument("--summary", type=Path, metavar="FILE", help="write as JSON which rules passed and which failed")
    check.add_argument("--badge", type=Path, metavar="FILE", help="write a badge, as shields.io reads it")
    check.add_argument("--markdown", type=Path, metavar="FILE", help="write a table for a README")
    check.add_argument("--html", type=Path, metavar="FILE", help="write a web page: the rules, what failed, error maps")
    return check


def add_board(commands: Any) -> None:
    """Add `board` to the subparsers of `python -m bnbref`."""
    board = commands.add_parser("board", help="reports of `check --json`, of any number of backends, as one page")
    board.add_argument(
        "reports", type=Path, nargs="+", metavar="REPORT.json", help="of `check --json`; each becomes a column"
    )
    board.add_argument(
        "--html", type=Path, metavar="FILE", help="write the page: rules by backends, filters, what failed"
    )
    board.add_argument("--svg", type=Path, metavar="FILE", help="write the same as a drawing")
    board.set_defaults(run=run_board)


def writable(*files: Path | None, read: Sequence[Path] = ()) -> None:
    """Raises Refused where a file cannot be written, or would take the place of another one of the same command: before the work
    whose results it is to have. read: the files that the command reads."""
    taken = {file.resolve() for file in read}
    for file in filter(None, files):
        try:
            if not file.parent.is_dir():
                raise Refused(f"cannot write {file}: there is no directory {file.parent}")
            if file.is_dir():
                raise Refused(f"cannot write {file}: it is a directory")
            if not os.access(file if file.exists() else file.parent, os.W_OK):
                raise Refused(f"cannot write {file}: it is not allowed")
        except OSError as error:  # a name that is too long, say
            raise Refused(f"cannot write {file}: {error.strerror}") from error
        if file.exists() and not file.is_file():  # /dev/null takes any number
            continue
        if file.resolve() in taken:
            raise Refused(f"cannot write {file}: the command was given it twice")
        taken.add(file.resolve())


def write(file: Path | None, text: str | bytes) -> None:
    """Writes a file, if one is given. Raises Refused where that fails all the same, as on a disk that is full."""
    if file is None:
        return
    try:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    except OSError as error:
        raise Refused(f"cannot write {file}: {error.strerror}") from error


def made_folder(folder: Path | None) -> None:
    """Makes a folder, if one is given and not there. Raises Refused where that cannot be."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"cannot make the directory {folder}: {error.strerror}") from error


def usable_device(name: str) -> Any:
    """The torch.device of that name. Raises Refused where torch does not know it, or cannot use it here."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise Refused(f"--device {name}: torch knows no such device") from None
    try:
        torch.zeros(1, device=device).tolist()
    # torch raises an AssertionError where it has no CUDA
    except (AssertionError, ImportError, NotImplementedError, RuntimeError):
        raise Refused(f"--device {name}: torch cannot use it here") from None
    return device


def run_check(args: argparse.Namespace) -> int:
    """Run the cases on a backend, and write the reports."""
    from bnbref.conformance import backends, board, made, report, vectors, workers
    from bnbref.conformance.board import page, summary

    if args.list:
        refuse(args, "--list goes alone", "list")
        return _list(backends)
    if args.order:
        refuse(args, "--order goes with --backend, --device and --json", "order", "backend", "device", "json")
    jobs = 1 if args.jobs is None else args.jobs
    if jobs < 1:
        raise Refused(f"--jobs must be at least 1, got {jobs}")
    limit = 600.0 if args.limit is None else args.limit
    if not 0 < limit <= 1e6:
        raise Refused(f"--limit must be above 0 seconds and at most a million, got {limit:g}")
    writable(args.json, args.summary, args.badge, args.markdown, args.html)
    device = usable_device(args.device or "cpu")
    try:
        backend = backends.load(args.backend or "bnbref")
    except (AttributeError, ImportError, RuntimeError, ValueError) as error:
        raise Refused(str(error)) from error
    if args.order:
        return _order(backend, device, args.json)
    every = itertools.chain(vectors.read_all(), () if args.quick else made.cases(backend, args.only))
    cases = [c for c in every if args.only in c.id and (c.quick or not args.quick)]
    results = workers.run(args.backend or "bnbref", cases, device, jobs, limit)
    crashed = any(f.kind == "crashed" for r in results for f in r.failures)
    done = report.report(backend, device, results, small=not crashed)  # shrinking would run the backend in this process
    column = board.of_run(done, args.json or Path(f"{done.backend}.json"))
    for file, text in (
        (args.json, report.as_json(done)),
        (args.summary, summary.as_summary(column)),
        (args.badge, summary.as_badge(column)),
        (args.markdown, report.as_markdown([done])),
    ):
        write(file, text)
    if args.html is not None:
        write(args.html, page.as_page([column]))
    print(report.as_text(done))
    failed = column.count("defect") + (column.count("dialect") if args.fail_on == "any" else 0)
    return 1 if failed or not column.count("passed") else 0


def run_board(args: argparse.Namespace) -> int:
    """Write the board of the reports, and print how many rules each backend keeps."""
    from bnbref.conformance import board
    from bnbref.conformance.board import page, picture

    writable(args.html, args.svg, read=args.reports)
    try:
        columns = board.board(args.reports)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    for file, form in ((args.html, page.as_page), (args.svg, picture.as_picture)):
        if file is not None:
            write(file, form(columns))
    for column in columns:
        print(f"{column.title}: {', '.join(f'{column.count(s)} {s}' for s in board.STATES if column.count(s))}")
    return 0


def _order(backend: Any, device: Any, file: Path | None) -> int:
    """Find the order of the sums of a backend."""
    from bnbref.conformance import order

    try:
        found = order.report(backend, device)
    except ValueError as error:
        raise Refused(str(error)) from error
    write(file, order.as_json(backend, device, found))
    print(order.as_text(backend, device, found))
    return 0


def _list(backends: Any) -> int:
    """Print the backends of the kit: whether each can be run here, and if not what it needs."""
    for name in backends.KNOWN:
        try:
            backends.load(name)
            state = "ready"
        except (ImportError, RuntimeError, ValueError) as error:
            state = str(error)
        print(f"{name:24}{state}")
    return 0
