"""Failures in words: the input, the wrong elements, and the cause that several failures share."""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnbref.arguments import dtype_name
from bnbref.conformance.judge import Failure
from bnbref.conformance.pairs import plain
from bnbref.conformance.specification import FLAGS, RULES
from bnbref.conformance.text import hex_words


class Element(NamedTuple):
    """One wrong element: where, what came, what is allowed."""

    place: tuple[int, ...]
    got: str
    want: str


@dataclass(frozen=True)
class Finding:
    """All failures of one cause: they break the same rule, have the same flags and follow the same conventions.

    follows: whose conventions, see explain.py. original: the failure with the smallest input. example: the same, shrunk. cases:
    the ids of all cases that fail so. unsteady: the original passed when it was run once more.
    """

    operation: str
    rule: str
    flags: tuple[str, ...]
    follows: tuple[str, ...]
    example: Failure
    original: Failure
    cases: tuple[str, ...]
    unsteady: bool = False


def size_of(failure: Failure) -> int:
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


def _only(failure: Failure) -> str:
    """The settings that a failure of pairs.py takes, and what they are where the case passes, or fails in another way."""
    settings, usual = failure.case.settings, plain(failure.case.operation)
    together = " and ".join(f"{name} {value}" for name, value in settings.items())
    others = " or ".join(f"{name} {usual[name]}" for name in settings)
    return f"with {together}: with {others} it does not fail so"


def describe(finding: Finding, same: Sequence[Finding] = ()) -> str:
    """A finding on one screen: the rule, the input, what came and what is allowed, whose convention it is, the flags' stories.

    same: other findings that have the same cause.
    """
    rule, example = RULES[finding.rule], finding.example
    lines = [finding.cases[0] + (f" and {len(finding.cases) - 1} more" if len(finding.cases) > 1 else "")]
    lines += [f"  rule     {rule.id}: {rule.text}", f"  found    {example.message}"]
    if example is not finding.original:
        lines.append(f"  shrunk   from {size_of(finding.original)} numbers of input")
    if finding.unsteady:
        lines.append(
            "  again    the same call was right when it was made again: the result depends on more than its arguments"
        )
    elif example.case.settings:
        lines.append(f"  only     {_only(example)}")
    lines += [f"  input    {line}" for line in inputs_of(example)]
    lines += [f"  element  {example.output}{list(e.place)}: got {e.got}, want {e.want}" for e in elements(example)]
    lines += [f"  follows  {text}" for text in finding.follows]
    for flag in (FLAGS[name] for name in finding.flags):
        lines.append(f"  flag     {flag.name}: {flag.story}" + (f" [{flag.issue}]" if flag.issue else ""))
    if same:
        lines.append("  also     the same cause: " + "; ".join(line.replace("  ", ", ") for line in broken_by(same)))
    return "\n".join(lines)


def by_cause(findings: Sequence[Finding]) -> list[list[Finding]]:
    """The findings of an operation that follow the same conventions, or raise the same exception, together. The first of
    each list is one whose cases were made for no known bug, if there is one."""
    found: dict[Any, list[Finding]] = {}
    for finding in findings:
        raised = finding.example.message if finding.example.kind in ("raised", "crashed") else ""
        cause = finding.follows or raised or id(finding)
        found.setdefault((finding.operation, cause), []).append(finding)
    return [sorted(together, key=lambda f: (len(f.flags), size_of(f.example))) for together in found.values()]


def broken_by(findings: Iterable[Finding]) -> list[str]:
    """One line for each rule and flag: `Q8-5 zero-in-nonzero-block  8 cases`."""
    found: dict[tuple[str, str], set[str]] = {}
    for finding in findings:
        for flag in finding.flags or ("no flag",):
            found.setdefault((finding.rule, flag), set()).update(finding.cases)
    return [f"{rule} {flag}  {len(ids)} {'case' if len(ids) == 1 else 'cases'}" for (rule, flag), ids in found.items()]
