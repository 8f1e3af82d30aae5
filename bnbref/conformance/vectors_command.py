"""`python -m bnbref vectors`: the cases for programs in any language, as command.py has them for backends in Python."""

import argparse
import sys
from pathlib import Path
from typing import Any

from bnbref.conformance.command import Refused, writable, write


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
    pack = actions.add_parser("archive", help="the published vectors as one .tar.gz, with a digest of all of it")
    pack.add_argument("file", type=Path, metavar="FILE", help="the archive that is written")
    pack.add_argument("--version", type=int, default=1, metavar="N", help="which of them (default: %(default)s)")
    pack.set_defaults(run=run_archive)


def _chosen(args: argparse.Namespace) -> list[Any]:
    from bnbref.conformance import vectors
    from bnbref.conformance.operations import OPERATIONS

    if args.operation not in OPERATIONS:
        raise Refused(f"OP must be one of {', '.join(OPERATIONS)}, got {args.operation!r}")
    found = [case for case in vectors.read(args.operation) if args.only in case.id]
    if not found:
        raise Refused(f"--only must be a part of the id of a case of {args.operation}, got {args.only!r}")
    return found


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


def run_archive(args: argparse.Namespace) -> int:
    """Write the archive of the published vectors, and print their digest."""
    from bnbref.conformance import archive, vectors

    writable(args.file)
    if args.version not in archive.DIGESTS:
        raise Refused(f"--version must be one of {', '.join(map(str, archive.DIGESTS))}, got {args.version}")
    try:
        packed = archive.tar_gz(vectors.folder_of(args.version))
    except ValueError as error:
        raise Refused(str(error)) from error
    write(args.file, packed)
    print(archive.DIGESTS[args.version])
    return 0
