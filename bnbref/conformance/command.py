"""`python -m bnbref check`, `board` and `vectors`: their arguments, and what they run.

A function that runs a command returns its exit status: 0 no failure, 1 something failed. Where the command cannot be run as it
was given, it raises `Refused`, which ends with status 2. What a command needs is imported when it runs.
"""

import argparse
import sys
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


def add_check(commands: Any) -> argparse.ArgumentParser:
    """Add `check` to the subparsers of `python -m bnbref`; its parser, whose `run` the caller sets."""
    check: argparse.ArgumentParser = commands.add_parser(
        "check", help="are a backend's bits right? Every case of the conformance kit, judged"
    )
    check.add_argument(
        "--backend", metavar="NAME", help="one of the kit's, or package.module[:attribute] (default: bnbref)"
    )
    check.add_argument("--order", action="store_true", help="find the order in which its products add up, instead")
    check.add_argument("--list", action="store_true", help="name the kit's backends, and what each of them needs")
    check.add_argument("--device", help="where it runs (default: cpu; with --self the accelerator if there is one)")
    check.add_argument("--quick", action="store_true", help="a selection of the cases")
    check.add_argument("--only", default="", metavar="TEXT", help="only cases whose id contains this")
    check.add_argument("--jobs", type=int, metavar="N", help="processes that run the cases (default: 1)")
    check.add_argument("--limit", type=float, metavar="S", help="seconds after which a case has failed (default: 600)")
    check.add_argument(
        "--fail-on", choices=("any", "defect"), default="any",
        help="what ends with status 1: anything that fails, or defects alone (default: %(default)s)",
    )  # fmt: skip
    check.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    check.add_argument("--summary", type=Path, metavar="FILE", help="write the rules by what became of them, as JSON")
    check.add_argument("--badge", type=Path, metavar="FILE", help="write a badge, as shields.io reads it")
    check.add_argument("--markdown", type=Path, metavar="FILE", help="write a table for a README")
    check.add_argument("--html", type=Path, metavar="FILE", help="write one page: the rules, what failed, error maps")
    return check


def add_board(commands: Any) -> None:
    """Add `board` to the subparsers of `python -m bnbref`."""
    board = commands.add_parser("board", help="reports of `check --json`, of any number of backends, as one page")
    board.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json", help="a column each, in this order")
    board.add_argument("--html", type=Path, metavar="FILE", help="the page: rules by backends, filters, what failed")
    board.add_argument("--svg", type=Path, metavar="FILE", help="the same as a drawing")
    board.set_defaults(run=run_board)


def add_vectors(commands: Any) -> None:
    """Add `vectors` to the subparsers of `python -m bnbref`."""
    vectors = commands.add_parser(
        "vectors", help="the kit's cases as text for programs in any language, and their answers"
    )
    actions = vectors.add_subparsers(metavar="ACTION", required=True)
    for name, help_, run in (
        ("gen", "print the cases of an operation", run_gen),
        ("check", "judge the answers to them on stdin", run_answers),
    ):
        action = actions.add_parser(name, help=help_)
        action.add_argument("operation", metavar="OP", help="an operation, such as quantize_4bit")
        action.add_argument("--only", default="", metavar="TEXT", help="only cases whose id contains this")
        action.set_defaults(run=run)
    write = actions.add_parser("write", help="compute all cases anew and write their files")
    write.add_argument("folder", type=Path)
    write.set_defaults(run=run_write)
    pack = actions.add_parser("archive", help="the published vectors as one .tar.gz, with a digest of all of it")
    pack.add_argument("file", type=Path)
    pack.add_argument("--version", type=int, default=1, help="which of them (default: %(default)s)")
    pack.set_defaults(run=run_archive)


def writable(*files: Path | None) -> None:
    """Raises Refused where the folder of a file does not exist."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise Refused(f"cannot write {file}: there is no directory {file.parent}")


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
    from bnbref.conformance import backends, board, report, vectors, workers
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
    cases = [c for c in vectors.read_all() if args.only in c.id and (c.quick or not args.quick)]
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
        if file is not None:
            file.write_text(text, encoding="utf-8")
    if args.html is not None:
        args.html.write_text(page.as_page([column]), encoding="utf-8")
    print(report.as_text(done))
    failed = column.count("defect") + (column.count("dialect") if args.fail_on == "any" else 0)
    return 1 if failed or not column.count("passed") else 0


def run_board(args: argparse.Namespace) -> int:
    """Write the board of the reports, and print how many rules each backend keeps."""
    from bnbref.conformance import board
    from bnbref.conformance.board import page, picture

    writable(args.html, args.svg)
    try:
        columns = board.board(args.reports)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    for file, form in ((args.html, page.as_page), (args.svg, picture.as_picture)):
        if file is not None:
            file.write_text(form(columns), encoding="utf-8")
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
    if file is not None:
        file.write_text(order.as_json(backend, device, found), encoding="utf-8")
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


def _chosen(args: argparse.Namespace) -> list[Any]:
    from bnbref.conformance import vectors
    from bnbref.conformance.operations import OPERATIONS

    if args.operation not in OPERATIONS:
        raise Refused(f"OP must be one of {', '.join(OPERATIONS)}, got {args.operation!r}")
    return [case for case in vectors.read(args.operation) if args.only in case.id]


def run_gen(args: argparse.Namespace) -> int:
    """Print the cases of an operation."""
    from bnbref.conformance import text

    for line in text.as_text(_chosen(args)):
        print(line)
    return 0


def run_answers(args: argparse.Namespace) -> int:
    """Judge the answers on stdin: 0 if there were answers, and all of them are right."""
    import torch

    from bnbref.conformance import backends, judge, report, text

    cases = _chosen(args)
    try:
        answers = text.parse_answers(sys.stdin)
    except ValueError as error:
        raise Refused(str(error)) from error
    unknown = sorted(set(answers) - {case.id for case in cases})
    if unknown:
        raise Refused(f"answers to cases that were not asked: {', '.join(unknown[:3])}")
    silent = [case.id for case in cases if case.id not in answers]
    if silent and answers:
        raise Refused(
            f"{len(silent)} of {len(cases)} cases have no answer, {silent[0]} first: a program answers each that was asked "
            f"(`--only` says which, here too), by `unsupported` what it has not"
        )
    results = [judge.of_answer(case, answers.get(case.id)) for case in cases]
    program = backends.Backend("your program", {args.operation: print})
    done = report.report(program, torch.device("cpu"), results, small=False)
    print(report.as_text(done))
    return 0 if done.ok else 1


def run_write(args: argparse.Namespace) -> int:
    """Compute all cases and write their files, their sums, and print the digest of each version."""
    from bnbref.conformance import archive, vectors

    if not args.folder.is_dir():
        raise Refused(f"cannot write to {args.folder}: there is no such directory")
    vectors.write(args.folder)
    for version in vectors.VERSIONS:
        folder = vectors.folder_of(version, args.folder)
        (folder / archive.SUMS).write_text(archive.sums(folder), encoding="utf-8")
        print(archive.digest(folder))
    return 0


def run_archive(args: argparse.Namespace) -> int:
    """Write the archive of the published vectors, and print their digest."""
    from bnbref.conformance import archive, vectors

    writable(args.file)
    if args.version not in archive.DIGESTS:
        raise Refused(f"--version must be one of {', '.join(map(str, archive.DIGESTS))}, got {args.version}")
    try:
        args.file.write_bytes(archive.tar_gz(vectors.folder_of(args.version)))
    except ValueError as error:
        raise Refused(str(error)) from error
    print(archive.DIGESTS[args.version])
    return 0
