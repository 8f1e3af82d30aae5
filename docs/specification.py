"""The specification as pages: `python docs/specification.py` writes docs/content/spec from the rules."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from bnbref.codebooks import FP4, NF4
from bnbref.conformance import operations, vectors
from bnbref.conformance.operations import OPERATIONS
from bnbref.conformance.specification import ABOUT, FLAGS, rules_of
from bnbref.conformance.text import hex_words

FOLDER = Path(__file__).parent / "content" / "spec"

_BLOCKS = re.split(
    rf"^({'|'.join(OPERATIONS)})\n",
    Path(operations.__file__).with_name("formulas.txt").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)
FORMULAS = dict(zip(_BLOCKS[1::2], _BLOCKS[2::2], strict=True))
"""The formulas of an operation, in the order in which they are rounded."""

INDEX = """# Specification

What each operation must return, as numbered rules. A rule may leave a freedom; all else is fixed, bit for bit.
fl(x) is x rounded to float32, T(x) to the dtype of the result, both to nearest even. Subnormal numbers count
unless a freedom says otherwise. The [conformance kit](../conformance.md) judges backends by these rules.

## Every operation
"""


def _rules(operation: str) -> Iterable[str]:
    for rule in rules_of(operation):
        yield f"- **{rule.id}**: {rule.text}" + (f" *Freedom:* {rule.freedom}" if rule.freedom else "")
    yield ""


def _values() -> Iterable[str]:
    yield "By code, as the hexadecimal of their float32 bits; the sign of FP4's code 8 is free."
    yield ""
    yield "| code | " + " | ".join(map(str, range(16))) + " |"
    yield "|---|" + "---|" * 16
    for book in (NF4, FP4):
        yield f"| {book.name} | " + " | ".join(hex_words(torch.tensor(book.values))) + " |"
    yield ""


def page(operation: str) -> str:
    """One operation: what it is, its rules with their freedoms, and the bugs that its cases were made from."""
    cases = vectors.read(operation)
    flags = dict.fromkeys(flag for case in cases for flag in case.flags)
    lines = [f"# {operation}", "", ABOUT[operation], "", f"    {OPERATIONS[operation].signature}", ""]
    lines += ["## Rules", "", *_rules(operation)]
    if operation in ("quantize_4bit", "dequantize_4bit"):
        lines += ["## Values", "", *_values()]
    if operation in FORMULAS:
        lines += ["## Formulas", *FORMULAS[operation].rstrip().splitlines(), ""]
    if flags:
        lines += ["## Bugs that its cases catch", "", "| flag | what went wrong | issue |", "|---|---|---|"]
        lines += [f"| `{name}` | {FLAGS[name].story} | {FLAGS[name].issue} |" for name in flags]
        lines.append("")
    lines.append(f"{len(cases)} cases: `python -m bnbref vectors gen {operation}`.")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """All pages by file name."""
    links = [f"- [{op}]({op}.md): {ABOUT[op]}" for op in OPERATIONS]
    index = "\n".join([INDEX, *_rules("every operation"), "## Operations", "", *links]) + "\n"
    return {"index.md": index, **{f"{op}.md": page(op) for op in OPERATIONS}}


if __name__ == "__main__":
    for _name, _text in pages().items():
        (FOLDER / _name).write_text(_text, encoding="utf-8")
