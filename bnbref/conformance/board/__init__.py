"""The board: backends by rules, from the JSON reports that `check --json` writes, of this machine or of somebody else's.

page.py shows it as a page, picture.py as a drawing, summary.py as a few lines. The column of a run that has just ended has what
no JSON has, too: drawings of how far off results are (drawings.py), and the cases by dtypes.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from bnbref.conformance import made, report, vectors
from bnbref.conformance.board.drawings import of_finding
from bnbref.conformance.explain import verdict
from bnbref.conformance.specification import FLAGS, RULES

STATES = {
    "passed": "every case of the rule that ran keeps it",
    "dialect": "another choice, and no mistake: a tie, a threshold an ulp off, another paper's formula",
    "defect": "a result that the rule does not allow, and no paper asks for",
    "refused": "an exception says that it is not supported, where the rules allow that",
    "not offered": "the backend has no such function, or none for these arguments",
    "not judged": "the report has no case that tells: they did not run, or failed by another rule first",
}
"""The states of a cell of the board, each with its meaning."""

_TEXTS, _TEXT_BY_NAME = (list, str), (dict, str)
_OF_ELEMENT = {"place": list, "got": str, "want": str}
_OF_FINDING = {
    "rule": str, "cases": _TEXTS, "follows": _TEXTS, "flags": _TEXTS, "message": str, "input": _TEXTS,
    "elements": (list, _OF_ELEMENT),
}  # fmt: skip
_OF_REPORT = {
    "backend": str, "device": str, "versions": _TEXT_BY_NAME, "made": str, "cases": _TEXT_BY_NAME,
    "findings": (list, _OF_FINDING),
}  # fmt: skip
"""What a report must have, by name: a type; the type of a container and what each thing in it must be; or names again."""


class Cell(NamedTuple):
    """One rule in one report: whether the backend keeps it.

    state: one of STATES. counts: the cases of the rule by their status, those aside that fail by another rule. findings: those of
    the report that break the rule, as its JSON has them.
    """

    state: str
    counts: Mapping[str, int]
    findings: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Column:
    """One report.

    file: where it is. made: the day. cells: by rule. drawings: by what `key` says of a finding. matrix: cases passed by operation
    and dtype, in lines.
    """

    file: Path
    backend: str
    device: str
    versions: Mapping[str, str]
    made: str
    cells: Mapping[str, Cell]
    drawings: Mapping[Any, str] = field(default_factory=dict)
    matrix: str = ""

    @property
    def name(self) -> str:
        """The name of the file, which no other column of a board has."""
        return self.file.stem

    @property
    def program(self) -> str:
        """The program beside the report that shows its failures without bnbref, `programs/red_NAME.py`, or empty."""
        file = self.file.parent / "programs" / f"red_{self.name}.py"
        return f"programs/{file.name}" if file.exists() else ""

    @property
    def title(self) -> str:
        """The backend, the version of its package without the build's name, and the device: `torchao 0.18.0, cpu`."""
        own = [version for package, version in self.versions.items() if package != "torch"] or [""]
        return f"{self.backend} {re.split('[-+]', own[0])[0]}".strip() + f", {self.device}"

    def count(self, state: str) -> int:
        """How many rules are in this state."""
        return sum(cell.state == state for cell in self.cells.values())


def cases_of_rules() -> dict[str, list[str]]:
    """The ids of the cases of each rule. G-2 is judged in every case; G-5 only says what is not compared, and is left out."""
    listed = {name: case["rules"] for name, case in vectors.stored().items()}
    listed |= {name: [rule] for name, rule in made.listed().items()}
    found = {rule: [name for name, rules in listed.items() if rule in rules or rule == "G-2"] for rule in RULES}
    return {rule: cases for rule, cases in found.items() if cases}


def _cell(rule: str, cases: Sequence[str], body: Mapping[str, Any]) -> Cell:
    findings = [finding for finding in body["findings"] if finding["rule"] == rule]
    broken = {case for finding in findings for case in finding["cases"]}
    counts = Counter(body["cases"][case] for case in cases if case in body["cases"])
    counts["failed"] = len(broken)
    if findings:
        state = "defect" if any(verdict(f["follows"]) == "defect" for f in findings) else "dialect"
    else:
        named = {"passed": "passed", "refused": "refused", "not implemented": "not offered"}
        state = next((state for status, state in named.items() if counts[status]), "not judged")
    return Cell(state, counts, findings)


def _wrong(x: Any, kind: Any, name: str) -> str | None:
    """The name of the first part of x that is not of its kind, see `_OF_REPORT`; None if there is none. name: of x itself."""
    if isinstance(kind, type):
        return None if isinstance(x, kind) else name
    if isinstance(kind, tuple):
        whole, each = kind
        inside = x.values() if isinstance(x, dict) else x
        return next((found for y in inside if (found := _wrong(y, each, name))), None) if isinstance(x, whole) else name
    if not isinstance(x, dict):
        return name
    return next((found for key, each in kind.items() if (found := _wrong(x.get(key), each, f"{name}.{key}"))), None)


def column(file: Path, text: str) -> Column:
    """The column of a report, whose text is that of the file. Raises ValueError where it is none, or of other rules or cases."""
    try:
        body = json.loads(text)
        json.dumps(body, ensure_ascii=False).encode()  # a page in UTF-8 cannot have the half of a pair, which JSON can
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON of texts: {error}") from error
    wrong = _wrong(body, _OF_REPORT, "report")
    if wrong:
        raise ValueError(
            f"{file} is no report of `check --json`: it has no {wrong}, or one of another kind than such reports have"
        )
    cases = cases_of_rules()
    unknown = sorted({finding["rule"] for finding in body["findings"]} - set(cases))
    unknown += sorted(
        {*body["cases"], *(case for finding in body["findings"] for case in finding["cases"])} - set(cases["G-2"])
    )
    unknown += sorted({flag for finding in body["findings"] for flag in finding["flags"]} - set(FLAGS))
    if unknown:
        raise ValueError(
            f"{file} has rules, cases or flags that this version of the kit has not: {', '.join(unknown[:3])}"
        )
    if not all(finding["cases"] for finding in body["findings"]):
        raise ValueError(f"{file} has a finding without a case")
    cells = {rule: _cell(rule, ids, body) for rule, ids in cases.items()}
    return Column(file, body["backend"], body["device"], body["versions"], body["made"], cells)


def key(finding: Mapping[str, Any]) -> Any:
    """A key of a finding, which no other finding of the report has."""
    return finding["cases"][0], finding["rule"], *finding["follows"]


def of_run(done: report.Report, file: Path) -> Column:
    """The column of a run. file: where its JSON is, or would be."""
    text = report.as_json(done)
    drawn = {
        key(f): of_finding(done, made) for f, made in zip(json.loads(text)["findings"], done.findings, strict=True)
    }
    return replace(column(file, text), drawings=drawn, matrix=report.matrix_text(done))


def board(files: Sequence[Path]) -> list[Column]:
    """The columns of the board, a report each.

    Raises ValueError where two files have one name, and as `column` does; OSError where a file cannot be read.
    """
    repeated = [name for name, count in Counter(file.stem for file in files).items() if count > 1]
    if repeated:
        raise ValueError(f"reports must have names of their own, got {', '.join(repeated)} twice")
    return [column(file, file.read_text(encoding="utf-8", errors="replace")) for file in files]
