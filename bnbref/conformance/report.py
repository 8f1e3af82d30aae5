"""The report of a run: for a terminal, as JSON, and as a table for a README."""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bnbref.conformance import case as cases
from bnbref.conformance.backends import Backend
from bnbref.conformance.explain import explain, verdict
from bnbref.conformance.findings import Finding, broken_by, by_cause, describe, elements, inputs_of, size_of
from bnbref.conformance.judge import Failure, Result, run_case
from bnbref.conformance.operations import OPERATIONS
from bnbref.conformance.pairs import plainest
from bnbref.conformance.shrink import shrink
from bnbref.conformance.specification import RULE_OF_RESULT
from bnbref.subnormals import FLUSHED, flushes_subnormals, with_subnormals


@dataclass(frozen=True)
class Report:
    """What is known after a run: the backend, the outcome of each case, and the findings."""

    backend: str
    device: str
    versions: Mapping[str, str]
    results: Sequence[Result]
    findings: Sequence[Finding]
    seconds: float
    flushes: bool = False
    """Whether the backend's process flushes subnormal floats to zero."""

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and something ran."""
        return not self.findings and any(r.status == "passed" for r in self.results)


def report(backend: Backend, device: torch.device, results: Sequence[Result], small: bool = True) -> Report:
    """The report of a run. small: whether the input of one failure of each finding is shrunk, which runs the backend again."""
    flushes = flushes_subnormals()
    with with_subnormals():
        findings = _findings(backend, device, results, small)
    return Report(
        backend.name, str(device), backend.versions, results, findings, sum(r.seconds for r in results), flushes
    )


def _findings(backend: Backend, device: torch.device, results: Sequence[Result], small: bool) -> list[Finding]:
    """What failed, together by the rule that is broken and how; with the smallest input that shows it."""
    groups: dict[tuple[Any, ...], list[tuple[str, Failure]]] = {}
    for result in results:
        # Where a shape is wrong, wrong values of the same result are no second finding.
        shapes = {f.output for f in result.failures if f.kind in ("shape", "dtype", "missing", "raised", "crashed")}
        for failure in result.failures:
            if failure.kind == "value" and (failure.output in shapes or (shapes and not explain(failure))):
                continue
            name = failure.case.id
            if failure.case.settings:
                # Settings are told as the cause, and nobody has looked which of them are where the backend must not run again.
                unknown = replace(failure, case=replace(failure.case, settings={}))
                failure = plainest(backend, failure, device) if small else unknown
            key = (failure.case.operation, *_broken(failure), tuple(explain(failure)), tuple(failure.case.settings))
            groups.setdefault(key, []).append((name, failure))
    smallest = {key: min((failure for _, failure in failures), key=size_of) for key, failures in groups.items()}
    unsteady = {
        key: small and failure.kind != "mutated" and run_case(backend, failure.case, device).status == "passed"
        for key, failure in smallest.items()
    }
    # Of what depends on the calls before, a smaller input would show nothing by itself.
    shrunk = {key[0] for key in groups} - {key[0] for key in groups if unsteady[key]} if small else set()
    findings = []
    for key, failures in groups.items():
        operation, rule, flags, follows, _ = key
        example = shrink(backend, smallest[key], device) if operation in shrunk else smallest[key]
        ids = tuple(dict.fromkeys(name for name, _ in failures))
        findings.append(Finding(operation, rule, flags, follows, example, smallest[key], ids, unsteady[key]))
    return findings


def _broken(failure: Failure) -> tuple[str, tuple[str, ...]]:
    """The rule that a failure breaks, and its flags."""
    case = failure.case
    if failure.kind == "mutated":
        return "G-2", ("caller-mutation",)
    own = RULE_OF_RESULT.get((case.operation, failure.output))
    if own is None and failure.kind in ("dtype", "missing"):
        return "G-1", ()  # whatever the case is about
    return own or case.rules[0], case.flags


def counts(results: Iterable[Result]) -> dict[str, int]:
    """How many cases passed, failed, were refused, are not implemented."""
    found = dict.fromkeys(("passed", "failed", "refused", "not implemented"), 0)
    for result in results:
        found[result.status] += 1
    return found


def as_text(done: Report) -> str:
    """The report for a terminal; the last lines name each broken rule and its flag."""
    total = ", ".join(f"{n} {status}" for status, n in counts(done.results).items() if n)
    versions = ", ".join(f"{name} {version}" for name, version in done.versions.items())
    lines = [f"{done.backend} on {done.device} ({versions})", *([FLUSHED] if done.flushes else []), ""]
    lines += [describe(first, same) + "\n" for first, *same in by_cause(done.findings)]
    lines += [matrix_text(done), f"{len(done.results)} cases in {done.seconds:.1f} s: {total}"]
    lines += [f"broken: {line}" for line in broken_by(done.findings)] or [
        "conforms" if done.ok else "nothing was checked"
    ]
    return "\n".join(lines)


def cell(results: Iterable[Result]) -> str:
    """A cell of a table: how many of the cases that ran passed.

    >>> cell([])
    '-'
    """
    total = counts(results)
    ran = total["passed"] + total["failed"]
    if ran:
        return f"{total['passed']}/{ran}"
    return "refused" if total["refused"] else "-"


DTYPES = (*cases.DTYPES, "int8")


def rows(done: Report) -> dict[str, dict[str, list[Result]]]:
    """Operation by operation, the results by dtype."""
    by_op: dict[str, dict[str, list[Result]]] = {op: {dtype: [] for dtype in DTYPES} for op in OPERATIONS}
    for result in done.results:
        by_op[result.case.operation][result.case.dtype].append(result)
    return by_op


def matrix_text(done: Report) -> str:
    """Cases passed by operation and dtype, for a terminal."""
    lines = [f"{'':24}" + "".join(f"{dtype:>10}" for dtype in DTYPES)]
    for op, by_dtype in rows(done).items():
        cells = [cell(by_dtype[dtype]) for dtype in DTYPES]
        if set(cells) != {"-"}:
            lines.append(f"{op:24}" + "".join(f"{text:>10}" for text in cells))
    return "\n".join(lines)


def as_markdown(reports: Sequence[Report]) -> str:
    """A table of operations by backends: each cell has the cases that passed, of those that ran."""
    head = " | ".join(
        f"{done.backend} {done.versions.get(done.backend.partition('-')[0], '')}".strip() for done in reports
    )
    lines = [f"| operation | {head} |", "|---|" + "---|" * len(reports)]
    tables = [rows(done) for done in reports]
    for op in OPERATIONS:
        cells = []
        for table in tables:
            text = cell([r for results in table[op].values() for r in results])
            whole = "/" in text and len(set(text.split("/"))) == 1
            cells.append(text if text == "-" or whole else f"**{text}**")
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def as_json(done: Report) -> str:
    """Everything but the tensors: versions, the day, every case's status, every finding."""
    body = {
        "backend": done.backend,
        "device": done.device,
        "versions": dict(done.versions),
        "made": datetime.date.today().isoformat(),
        **({"flushes subnormals": True} if done.flushes else {}),
        "counts": counts(done.results),
        "cases": {r.case.id: r.status for r in done.results},
        "findings": [
            {
                "operation": f.operation,
                "rule": f.rule,
                "flags": list(f.flags),
                "follows": list(f.follows),
                "verdict": verdict(f.follows),
                "cases": list(f.cases),
                **({"settings": dict(f.example.case.settings)} if f.example.case.settings else {}),
                **({"unsteady": True} if f.unsteady else {}),
                "message": f.example.message,
                "input": inputs_of(f.example, most=64),
                "elements": [e._asdict() for e in elements(f.example)],
            }
            for f in done.findings
        ],
    }
    return json.dumps(body, indent=1) + "\n"
