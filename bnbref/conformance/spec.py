"""The specification as pages: `python -m bnbref.conformance.spec docs/content/spec` writes them from the rules."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from bnbref.codebooks import FP4, NF4
from bnbref.conformance import operations, vectors
from bnbref.conformance.report import hex_words
from bnbref.conformance.rules import FLAGS, rules_of

INTRODUCTION = {
    "quantize_blockwise": "A tensor in blocks of consecutive elements, each scaled by its largest magnitude and "
    "coded in 8 bits: "
    "codes uint8 in the shape of x, absmax float32, one a block.",
    "dequantize_blockwise": "The values of 8-bit codes times the scales of their blocks, in float32, float16 or "
    "bfloat16.",
    "quantize_4bit": "A tensor in blocks, scaled as in 8 bits, coded in NF4 or FP4, two codes a byte: packed uint8 "
    "[(numel + 1) / 2], absmax float32, one a block.",
    "dequantize_4bit": "The values of packed 4-bit codes times the scales of their blocks, in a given shape and dtype.",
    "quantize_4bit_nested": "4-bit quantization whose scales are quantized themselves: their mean, and 8-bit codes "
    "of what is "
    "left, in blocks of 256.",
    "dequantize_4bit_nested": "The scales decoded from their 8-bit codes, then the weight by them.",
    "gemm_4bit": "A product with a 4-bit weight [n, k]: a [..., k] in float32, float16 or bfloat16, y [..., n] in "
    "the same.",
    "int8_quantize": "LLM.int8(): rows of x scaled to 127 and rounded, columns with outliers left out.",
    "int8_matmul": "The int32 product a @ b^T of int8 a [..., k] and b [n, k].",
    "int8_mm_dequant": "An int32 product scaled by the absmax of its rows and columns, over 127^2.",
    "int8_dequantize": "int8 rows scaled back.",
    "save_4bit": "The tensors that bitsandbytes writes for a 4-bit weight, byte for byte.",
    "load_4bit": "The weight from such tensors.",
    "gemm_4bit_backward": "The gradient of a product's input: grad [..., n] in float32, float16 or bfloat16, grad_a "
    "[..., k] in the same.",
    "int8_backward": "The gradients of y = a @ W^T by LLM.int8(), whose weight is a float tensor that is quantized "
    "on the way: "
    "a [..., k], weight [n, k] and grad [..., n] of one dtype.",
    "evaluate_then_train": "A Linear4bit of a packed weight, evaluated without gradients (y), then trained on the "
    "same input "
    "(grad_x), then saved (packed, absmax).",
    "optimizer_32bit": "One step of an optimizer with float32 states, p and g float32, float16 or bfloat16. Nothing "
    "is updated in "
    "place: the new p and states are the results.",
    "optimizer_8bit": "The same with states as uint8 codes and float32 absmax of blocks of 256 consecutive elements. "
    "values1 is "
    "the signed dynamic map, also of the squares of rmsprop and adagrad, as bitsandbytes has it, or the unsigned "
    "one; values2 is "
    "the unsigned one.",
}


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
    lines = [f"# {operation}", "", INTRODUCTION[operation], "", f"    {signature(operation)}", ""]
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


def index() -> str:
    """The page of the rules that hold everywhere."""
    lines = [
        "# Specification",
        "",
        "What each operation must return, as numbered rules. A rule may leave a freedom; all else is fixed, bit for "
        "bit.",
        "fl(x) is x rounded to float32, T(x) to the dtype of the result, both to nearest even. Subnormal numbers count",
        "unless a freedom says otherwise. The [conformance kit](../conformance.md) judges backends by these rules.",
        "",
        "## Every operation",
        "",
        *_rules("every operation"),
        "## Operations",
        "",
    ]
    lines += [f"- [{op}]({op}.md): {INTRODUCTION[op]}" for op in operations.OPERATIONS]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """All pages by file name."""
    return {"index.md": index(), **{f"{op}.md": page(op) for op in operations.OPERATIONS}}


if __name__ == "__main__":
    for _name, _text in pages().items():
        (Path(sys.argv[1]) / _name).write_text(_text, encoding="utf-8")
