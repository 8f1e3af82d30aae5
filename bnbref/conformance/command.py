"""`python -m bnbref check` and `vectors`: their arguments, and what they run.

Exit status: 0 no failure, 1 something failed, 2 the command could not be run as it was given.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> argparse.ArgumentParser:
    """Add both to the subparsers of `python -m bnbref`; the parser of `check`, whose `run` the caller sets."""
    check: argparse.ArgumentParser = commands.add_parser(
        "check", help="are a backend's bits right? Every case of the conformance kit, judged"
    )
    check.add_argument(
        "--backend", metavar="NAME", help="one of the kit's, or package.module[:attribute] (default: bnbref)"
    )
    check.add_argument("--device", help="where it runs (default: cpu; with --self the accelerator if there is one)")
    check.add_argument("--quick", action="store_true", help="a selection of the cases")
    check.add_argument("--only", default="", metavar="TEXT", help="only cases whose id contains this")
    check.add_argument("--jobs", type=int, metavar="N", help="processes that run the cases (default: 1)")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    check.add_argument("--markdown", type=Path, metavar="FILE", help="write a table for a README")
    check.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page with a matrix, failures and error maps"
    )

    vectors = commands.add_parser(
        "vectors", help="the kit's cases as text for programs in any language, and their answers"
    )
    actions = vectors.add_subparsers(metavar="ACTION", required=True)
    for name, text, run in (
        ("gen", "print the cases of an operation", run_gen),
        ("check", "judge the answers to them on stdin", run_answers),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("operation", metavar="OP", help="an operation, such as quantize_4bit")
        action.add_argument("--only", default="", metavar="TEXT", help="only cases whose id contains this")
        action.set_defaults(run=run)
    write = actions.add_parser("write", help="compute all cases anew and write their files")
    write.add_argument("folder", type=Path)
    write.set_defaults(run=run_write)
    return check


def judge(args: argparse.Namespace) -> int:
    """Run `check`: 0 if nothing failed."""
    import torch

    from bnbref.conformance import backends, page, report, vectors, workers

    jobs = 1 if args.jobs is None else args.jobs
    if jobs < 1:
        return refuse(f"--jobs must be at least 1, got {jobs}")
    for file in (args.json, args.markdown, args.html):
        if file is not None and not file.parent.is_dir():
            return refuse(f"cannot write {file}: there is no directory {file.parent}")
    try:
        backend = backends.load(args.backend or "bnbref")
        device = torch.device(args.device or "cpu")
        torch.zeros(1, device=device)
    except (AssertionError, AttributeError, ImportError, RuntimeError, ValueError) as error:
        return refuse(str(error))
    cases = [c for c in vectors.read_all() if args.only in c.id and (c.quick or not args.quick)]
    results = workers.run(args.backend or "bnbref", cases, device, jobs)
    crashed = any(f.kind == "crashed" for r in results for f in r.failures)
    done = report.report(backend, device, results, small=not crashed)  # shrinking would run the backend in this process
    for file, text in (
        (args.json, report.as_json),
        (args.html, lambda r: page.as_html([r])),
        (args.markdown, lambda r: report.as_markdown([r])),
    ):
        if file is not None:
            file.write_text(text(done), encoding="utf-8")
    print(report.as_text(done))
    return 0 if done.ok else 1


def _chosen(args: argparse.Namespace) -> list[Any] | int:
    from bnbref.conformance import vectors
    from bnbref.conformance.operations import OPERATIONS

    if args.operation not in OPERATIONS:
        return refuse(f"OP must be one of {', '.join(OPERATIONS)}, got {args.operation!r}")
    return [case for case in vectors.read(args.operation) if args.only in case.id]


def run_gen(args: argparse.Namespace) -> int:
    """Prints the cases."""
    from bnbref.conformance import vectors

    cases = _chosen(args)
    if isinstance(cases, int):
        return cases
    for line in vectors.as_text(cases):
        print(line)
    return 0


def run_answers(args: argparse.Namespace) -> int:
    """0 if there were answers, and all of them are right."""
    import torch

    from bnbref.conformance import backends, check, report, vectors

    cases = _chosen(args)
    if isinstance(cases, int):
        return cases
    try:
        answers = vectors.parse_answers(sys.stdin)
    except ValueError as error:
        return refuse(str(error))
    unknown = sorted(set(answers) - {case.id for case in cases})
    if unknown:
        return refuse(f"answers to cases that were not asked: {', '.join(unknown[:3])}")
    results = []
    for case in cases:
        answer = answers.get(case.id)
        failures = () if answer is None else tuple(check.judge(case, answer))
        results.append(
            check.Result(case, "not implemented" if answer is None else "failed" if failures else "passed", failures)
        )
    program = backends.Backend("your program", {args.operation: print})
    done = report.report(program, torch.device("cpu"), results, small=False)
    print(report.as_text(done))
    return 0 if done.ok else 1


def run_write(args: argparse.Namespace) -> int:
    """Writes the files."""
    from bnbref.conformance import vectors

    if not args.folder.is_dir():
        return refuse(f"cannot write to {args.folder}: there is no such directory")
    vectors.write(args.folder)
    return 0


def refuse(message: str) -> int:
    """Say on stderr why the command does not run; exit status 2."""
    print(f"bnbref: error: {message}", file=sys.stderr)
    return 2
