"""The specification as pages: `python docs/specification.py` writes docs/content/spec from the rules."""

from collections.abc import Iterable
from pathlib import Path

import torch

from bnbref.codebooks import FP4, NF4
from bnbref.conformance import operations, vectors
from bnbref.conformance.operations import OPERATIONS
from bnbref.conformance.specification import ABOUT, FLAGS, rules_of
from bnbref.conformance.text import hex_words

FOLDER = Path(__file__).parent / "content" / "spec"

FORMULAS = """
t is step, b1, b2, b3 the betas, wd weight_decay, G = g * gnorm_scale, m = state1, v = state2, m2 = state3; of rmsprop and
adagrad v is state1. c1 = 1 - b1^t, c2 = sqrt(1 - b2^t).

    momentum, lars   g = G + wd p        m = b1 m + g                                direction = m
    rmsprop          g = G + wd p        v = b1 v + (1 - b1) g^2                     direction = g / (sqrt(v) + eps)
    adagrad          g = G + wd p        v = v + g^2                                 direction = g / (sqrt(v) + eps)
    adam, lamb       m = b1 m + (1 - b1) G       v = b2 v + (1 - b2) G^2             direction = (m / c1) / (sqrt(v) / c2 + eps)
    ademamix         and m2 = b3 m2 + (1 - b3) G                direction = (m / c1 + alpha m2) / (sqrt(v) / c2 + eps)
    lion             direction = sign(b1 m + (1 - b1) G)        m = b2 m + (1 - b2) G

    p = T(decay p - lr direction),      decay = 1 - lr wd for adam, lamb, ademamix and lion, else 1

alpha and b3 are those of the step: schedules are the caller's. AdamW is adam, with another default of wd.
"""

INDEX = """# Specification

What each operation must return, as numbered rules. A rule may leave a freedom; all else is fixed, bit for bit.
fl(x) is x rounded to float32, T(x) to the dtype of the result, both to nearest even. Subnormal numbers count
unless a freedom says otherwise. The [conformance kit](../conformance.md) judges backends by these rules.

## Every operation
"""


def signature(operation: str) -> str:
    """The line of the protocol.

    >>> signature("int8_matmul")
    'int8_matmul(a, b) -> product'
    """
    lines = (operations.__doc__ or "").splitlines()
    (line,) = (line for line in lines if line.startswith(f"    {operation}("))
    return " ".join(line.split())


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
    lines = [f"# {operation}", "", ABOUT[operation], "", f"    {signature(operation)}", ""]
    lines += ["## Rules", "", *_rules(operation)]
    if operation in ("quantize_4bit", "dequantize_4bit"):
        lines += ["## Values", "", *_values()]
    if operation == "optimizer_32bit":
        lines += ["## Formulas", *FORMULAS.splitlines(), ""]
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
