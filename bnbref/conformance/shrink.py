"""The smallest input that still fails: elements, rows and columns are taken away, and what is left is made simple.

The search is greedy and has no randomness. Smaller inputs are tried in a fixed order, and the first that fails in the same way
takes the place of the input, until none of them fails.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnbref.conformance.backends import Backend
from bnbref.conformance.case import Case
from bnbref.conformance.explain import explain
from bnbref.conformance.judge import Failure, run_case
from bnbref.conformance.oracles import expect
from bnbref.conformance.oracles.steps import BLOCKSIZE
from bnbref.conformance.text import hex_words

BUDGET = 150
"""How many inputs are tried."""


def _without(size: int) -> Iterator[Tensor]:
    """The indices that stay when a run of elements is removed: of half of all, of a quarter, ... of one; the last run first."""
    every, run = torch.arange(size), size // 2
    while run > 0:
        for start in reversed(range(0, size, run)):
            if size > run:
                yield torch.cat((every[:start], every[start + run :]))
        run //= 2


def _vary(case: Case, inputs: dict[str, Tensor], **params: Any) -> Case:
    """The case with some inputs and parameters replaced, and what is expected computed anew."""
    given, chosen = {**case.inputs, **inputs}, {**case.params, **params}
    return replace(case, inputs=given, params=chosen, expected=expect(case.operation, given, chosen), layout=())


def _smaller(case: Case) -> Iterator[Case]:
    """Cases that are smaller, or simpler."""
    match case.operation:
        case "quantize_blockwise" | "quantize_4bit" | "quantize_4bit_nested":
            # One block, then fewer elements of it, or zeros for them: packages that have whole blocks alone refuse fewer. The
            # absmax is among them: the scaled values stay what they were.
            x, blocksize = case.inputs["x"].reshape(-1), case.params["blocksize"]
            if x.numel() > blocksize:
                for block in x.split(blocksize):
                    yield _vary(case, {"x": block})
            else:
                largest = int(x.float().abs().nan_to_num(0.0).argmax()) if x.numel() else 0
                for kept in _without(x.numel()):
                    if largest in kept:
                        yield _vary(case, {"x": x[kept]})
                        simple = torch.zeros_like(x).index_copy(0, kept, x[kept])
                        if not torch.equal(simple, x):
                            yield _vary(case, {"x": simple})
        case "dequantize_4bit":
            packed, absmax = case.inputs["packed"], case.inputs["absmax"]
            ones = torch.full_like(packed, 0x33 if case.params["quant_type"] == "fp4" else 0xFF)
            counted = torch.arange(1.0, absmax.numel() + 1)
            rows, *rest = case.params["shape"]
            inner = int(torch.Size(rest).numel())
            if rest and rows > 1 and (rows - 1) * inner % 2 == 0:
                n = (rows - 1) * inner
                blocks = -(-n // case.params["blocksize"])
                yield _vary(case, {"packed": packed[: n // 2], "absmax": absmax[:blocks]}, shape=[rows - 1, *rest])
            if not torch.equal(packed, ones):
                yield _vary(case, {"packed": ones})
            if not torch.equal(absmax, counted):
                yield _vary(case, {"absmax": counted})
        case "gemm_4bit" if case.inputs["a"].dim() == 2:
            blocksize, (n, k) = case.params["blocksize"], case.params["shape"]
            yield from _along(case, a=0)
            if "bias" in case.inputs:
                others = {name: x for name, x in case.inputs.items() if name != "bias"}
                yield _vary(replace(case, inputs=others), {})
            if k % blocksize == 0 and blocksize % 2 == 0:  # a row is whole blocks, and whole bytes
                packed, absmax = case.inputs["packed"].reshape(n, -1), case.inputs["absmax"].reshape(n, -1)
                for kept in _without(n):
                    biased = {"bias": case.inputs["bias"][kept]} if "bias" in case.inputs else {}
                    own = {"packed": packed[kept].reshape(-1), "absmax": absmax[kept].reshape(-1), **biased}
                    yield _vary(case, own, shape=[len(kept), k])
        case "int8_quantize" if case.inputs["x"].dim() == 2:
            yield from _along(case, x=0)
            yield from _along(case, x=1)
        case "int8_mm_dequant" if case.inputs["product"].dim() == 2:
            yield from _along(case, product=0, row=0)
            yield from _along(case, product=1, column=0, bias=0)
        case "int8_matmul" if case.inputs["a"].dim() == 2:
            yield from _along(case, a=0)
            yield from _along(case, b=0)
        case "optimizer_32bit" | "optimizer_8bit" if case.inputs["p"].dim() == 1:
            # The first block, then elements of it.
            count = case.inputs["p"].numel()
            whole = count if case.operation == "optimizer_32bit" else min(count, BLOCKSIZE)
            for kept in [torch.arange(whole)] if whole < count else _without(count):
                yield _vary(case, {name: _part(name, x, kept) for name, x in case.inputs.items()})


def _along(case: Case, **dims: int) -> Iterator[Case]:
    """The case with fewer rows or columns: of each of these inputs, if it is there, along the dimension that is given."""
    given = {name: (case.inputs[name], dim) for name, dim in dims.items() if name in case.inputs}
    first, dim = next(iter(given.values()))
    for kept in _without(first.shape[dim]):
        yield _vary(case, {name: x.index_select(along, kept) for name, (x, along) in given.items()})


def _part(name: str, x: Tensor, kept: Tensor) -> Tensor:
    """The part of an optimizer's argument that belongs to the kept elements of its first block."""
    return x if name.startswith("values") else x[:1] if name.startswith("absmax") else x[kept]


def _culprits(failure: Failure) -> set[str]:
    """The elements of x, as hexadecimal words, whose results are wrong. None unless the operation is a quantization."""
    if failure.kind != "value" or failure.got is None or not failure.case.operation.startswith("quantize"):
        return set()
    x = failure.case.inputs["x"].reshape(-1)
    of_one = -(-x.numel() // failure.got.numel())  # of a byte two elements
    if failure.output == "absmax":
        of_one = failure.case.params.get("blocksize", of_one)
    parts = x.split(of_one)
    return {word for i in failure.wrong.tolist() for word in hex_words(parts[i])}


def shrink(backend: Backend, failure: Failure, device: torch.device) -> Failure:
    """The failure of a smaller case, or the same failure if none was found. The expectation is computed anew each time."""
    best, left, why, culprits = failure, BUDGET, explain(failure), _culprits(failure)
    if not failure.case.derived or failure.kind not in ("value", "shape", "raised"):
        return failure
    candidates = _smaller(best.case)
    while left > 0 and (candidate := next(candidates, None)) is not None:
        result = run_case(backend, candidate, device)
        left -= result.status != "not implemented"
        for other in result.failures:
            # A zero in place of an element may be wrong by a rule of its own: one that was wrong before is still among them.
            another = culprits and culprits.isdisjoint(_culprits(other))
            if (other.kind, other.output) == (best.kind, best.output) and not another and explain(other) == why:
                best, candidates = other, _smaller(other.case)
                break
    return best
