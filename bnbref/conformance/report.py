"""What a run found: for a terminal, as JSON, and as a table for a README."""

import datetime
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnbref.conformance import cases
from bnbref.conformance.backends import Backend
from bnbref.conformance.explain import explain, verdict
from bnbref.conformance.judge import Failure, Result
from bnbref.conformance.operations import OPERATIONS
from bnbref.conformance.shrink import shrink
from bnbref.conformance.specification import FLAGS, RULE_OF_RESULT, RULES
from bnbref.conformance.text import hex_words
from bnbref.quant_state import dtype_name


class Element(NamedTuple):
    """One wrong element: where, what came, what is allowed."""

    place: tuple[int, ...]
    got: str
    want: str


@dataclass(frozen=True)
class Finding:
    """All failures of one cause: they break the same rule, have the same flags and follow the same conventions.

    follows: whose conventions, see explain.py. original: the failure with the smallest input. example: the same, shrunk. cases:
    the ids of all cases that fail so.
    """

    operation: str
    rule: str
    flags: tuple[str, ...]
    follows: tuple[str, ...]
    example: Failure
    original: Failure
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A backend, what became of each case, and the findings."""

    backend: str
    device: str
    versions: Mapping[str, str]
    results: Sequence[Result]
    findings: Sequence[Finding]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and something ran."""
        return not self.findings and any(r.status == "passed" for r in self.results)


def report(backend: Backend, device: torch.device, results: Sequence[Result], small: bool = True) -> Report:
    """The report of a run. small: whether the input of one failure of each finding is shrunk, which runs the backend again."""
    groups: dict[tuple[Any, ...], list[Failure]] = {}
    for result in results:
        # Where a shape is wrong, wrong values of the same result are no second finding.
        shapes = {f.output for f in result.failures if f.kind in ("shape", "dtype", "missing", "raised", "crashed")}
        for failure in result.failures:
            if failure.kind == "value" and (failure.output in shapes or (shapes and not explain(failure))):
                continue
            key = (failure.case.operation, *_broken(failure), tuple(explain(failure)))
            groups.setdefault(key, []).append(failure)
    findings = []
    for (operation, rule, flags, follows), failures in groups.items():
        smallest = min(failures, key=_size)
        example = shrink(backend, smallest, device) if small else smallest
        ids = tuple(dict.fromkeys(f.case.id for f in failures))
        findings.append(Finding(operation, rule, flags, follows, example, smallest, ids))
    seconds = sum(r.seconds for r in results)
    return Report(backend.name, str(device), backend.versions, results, findings, seconds)


def _broken(failure: Failure) -> tuple[str, tuple[str, ...]]:
    """The rule that a failure breaks, and its flags."""
    case = failure.case
    if failure.kind == "mutated":
        return "G-2", ("caller-mutation",)
    own = RULE_OF_RESULT.get((case.operation, failure.output))
    if own is None and failure.kind in ("dtype", "missing"):
        return "G-1", ()  # whatever the case is about
    return own or case.rules[0], case.flags


def _size(failure: Failure) -> int:
    """How many numbers the inputs of the case have."""
    return sum(tensor.numel() for tensor in failure.case.inputs.values())


def number(x: Tensor) -> str:
    """A scalar in decimal and in the hexadecimal of its bits.

    >>> number(torch.tensor(0.1)), number(torch.tensor(131, dtype=torch.uint8))
    ('0.10000000149011612 (3dcccccd)', '131 (83)')
    """
    value = x.item()
    if x.dtype == torch.float64:
        return f"{value!r} ({struct.pack('>d', value).hex()})"
    return f"{value!r} ({hex_words(x)[0]})"


def elements(failure: Failure, most: int = 3) -> list[Element]:
    """The first wrong elements of a failure."""
    if failure.got is None or failure.kind != "value":
        return []
    expected = failure.case.expected[failure.output]
    flat, want = failure.got.reshape(-1), expected.value.reshape(-1)
    found = []
    for i in failure.wrong[:most].tolist():
        index = tuple(int(n) for n in torch.unravel_index(torch.tensor(i), failure.got.shape or (1,)))
        allowed = number(want[i])
        if expected.low is not None and expected.high is not None:
            low, high = float(expected.low.reshape(-1)[i]), float(expected.high.reshape(-1)[i])
            allowed = f"{low:.9g} .. {high:.9g}, best {allowed}"
        elif expected.also is not None:
            others = expected.also.value[expected.also.where == i]
            allowed = " or ".join([allowed, *map(number, others)])
        elif expected.pairs is not None:
            first, second = expected.pairs
            partner = int(first[second == i][0])
            allowed = f"as element {partner}, {number(flat[partner])}"
        elif expected.ulp:
            allowed += f", {expected.ulp} ulp"
        found.append(Element(index, number(flat[i]), allowed))
    return found


def inputs_of(failure: Failure, most: int = 8) -> list[str]:
    """A line for each input: its name, and its elements in decimal and hexadecimal if there are at most so many."""
    lines = []
    for name, tensor in failure.case.inputs.items():
        shape = list(tensor.shape)
        kind = dtype_name(tensor.dtype)
        if name == "values":
            lines.append(f"{name} = the codebook's, {kind} {shape}")
        elif tensor.numel() <= most:
            lines.append(f"{name} = {tensor.tolist()} {kind}, hex {' '.join(hex_words(tensor))}")
        elif 0 < len(places := tensor.reshape(-1).nonzero().flatten()) <= 4:
            numbers = ", ".join(f"[{int(i)}] {number(tensor.reshape(-1)[i])}" for i in places)
            lines.append(f"{name} = {kind} {shape}, zeros but for {numbers}")
        else:
            words = " ".join(hex_words(tensor.reshape(-1)[:4]))
            lines.append(f"{name} = {kind} {shape}, hex {words} ...")
    params = ", ".join(f"{k}={v}" for k, v in failure.case.params.items())
    return lines + ([params] if params else [])


def describe(finding: Finding, same: Sequence[Finding] = ()) -> str:
    """A finding on one screen: the rule, the input, what came and what is allowed, whose convention it is, the flags' stories.

    same: other findings that have the same cause.
    """
    rule, example = RULES[finding.rule], finding.example
    lines = [finding.cases[0] + (f" and {len(finding.cases) - 1} more" if len(finding.cases) > 1 else "")]
    lines += [f"  rule     {rule.id}: {rule.text}", f"  found    {example.message}"]
    if example is not finding.original:
        lines.append(f"  shrunk   from {_size(finding.original)} numbers of input")
    lines += [f"  input    {line}" for line in inputs_of(example)]
    lines += [f"  element  {example.output}{list(e.place)}: got {e.got}, want {e.want}" for e in elements(example)]
    lines += [f"  follows  {text}" for text in finding.follows]
    lines += [f"  flag     {name}: {FLAGS[name].story}{bracketed_issue(name)}" for name in finding.flags]
    if same:
        lines.append("  also     the same cause: " + "; ".join(line.replace("  ", ", ") for line in _broken_by(same)))
    return "\n".join(lines)


def by_cause(findings: Sequence[Finding]) -> list[list[Finding]]:
    """The findings of an operation that follow the same conventions, or raise the same exception, together. First stands one of
    cases that were made for no bug, if there is one."""
    found: dict[Any, list[Finding]] = {}
    for finding in findings:
        raised = finding.example.message if finding.example.kind in ("raised", "crashed") else ""
        cause = finding.follows or raised or id(finding)
        found.setdefault((finding.operation, cause), []).append(finding)
    return [sorted(together, key=lambda f: (len(f.flags), _size(f.example))) for together in found.values()]


def bracketed_issue(flag: str) -> str:
    """The number of the bug in bitsandbytes' tracker, in brackets, if it has one."""
    return f" [{FLAGS[flag].issue}]" if FLAGS[flag].issue else ""


def versions(done: Report) -> str:
    """The versions of what was tested, in a line."""
    return ", ".join(f"{name} {version}" for name, version in done.versions.items())


def counts(results: Iterable[Result]) -> dict[str, int]:
    """How many cases passed, failed, were refused, are not implemented."""
    found = dict.fromkeys(("passed", "failed", "refused", "not implemented"), 0)
    for result in results:
        found[result.status] += 1
    return found


def broken(done: Report) -> list[str]:
    """One line for each rule and flag that a finding has: `Q8-5 zero-in-nonzero-block  8 cases`."""
    return _broken_by(done.findings)


def _broken_by(findings: Iterable[Finding]) -> list[str]:
    found: dict[tuple[str, str], set[str]] = {}
    for finding in findings:
        for flag in finding.flags or ("no flag",):
            found.setdefault((finding.rule, flag), set()).update(finding.cases)
    return [f"{rule} {flag}  {len(ids)} {'case' if len(ids) == 1 else 'cases'}" for (rule, flag), ids in found.items()]


def as_text(done: Report) -> str:
    """The report for a terminal; the last lines name each broken rule and its flag."""
    total = ", ".join(f"{n} {status}" for status, n in counts(done.results).items() if n)
    lines = [f"{done.backend} on {done.device} ({versions(done)})", ""]
    lines += [describe(first, same) + "\n" for first, *same in by_cause(done.findings)]
    lines += [matrix_text(done), f"{len(done.results)} cases in {done.seconds:.1f} s: {total}"]
    lines += [f"broken: {line}" for line in broken(done)] or ["conforms" if done.ok else "nothing was checked"]
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
    """The badge table: operations by backends, a cell the cases passed of those that ran."""
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
                "message": f.example.message,
                "input": inputs_of(f.example, most=64),
                "elements": [e._asdict() for e in elements(f.example)],
            }
            for f in done.findings
        ],
    }
    return json.dumps(body, indent=1) + "\n"
