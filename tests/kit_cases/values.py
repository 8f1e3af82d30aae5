"""Cases of what undoes a quantization, of int8 products, and of files."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnbref.checkpoint import BLOCKSIZES
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, FP4, NF4, Codebook, linear, value_table
from bnbref.conformance.case import CPU, DTYPES, Case
from kit_cases.inputs import (
    cast,
    clear,
    in_blocks,
    integers,
    nested_weight,
    noise,
    random_bytes,
    random_int8,
    scales,
)
from kit_cases.oracles import make

EXTREME = torch.tensor([2.0**-126, 2.0**-149, 2.0**127, 65504.0, 131008.0, 2.0**-24, 0.0, 1e-40])
"""Scales at the ends of float32 and float16."""


def _dequantize_4bit(book: Codebook) -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], rules: str, flags: str = "", blocksize: int = 64, dtype: str = "float32",
             packed: Tensor | None = None, absmax: Tensor | None = None, quick: bool = True) -> Case:  # fmt: skip
        n = math.prod(shape)
        given = {
            "packed": random_bytes(-(-n // 2), n) if packed is None else packed,
            "absmax": scales(-(-n // blocksize)) if absmax is None else absmax,
        }
        return make(f"{book.name}-{name}", "dequantize_4bit", given, rules, flags, quick=quick,
                    blocksize=blocksize, quant_type=book.name, shape=list(shape), dtype=dtype)  # fmt: skip

    for dtype in DTYPES:
        every = torch.arange(256).to(torch.uint8).repeat(2)
        yield case(f"every-byte-{dtype}", (8, 128), "D4-1", "rounding", 64, dtype, every)
    for shape in ((4, 32), (2, 96), (3, 80), (5, 16), (6, 160)):
        for dtype in DTYPES:
            name = f"columns-{shape[1]}-{dtype}"
            yield case(name, shape, "D4-2", "scale-index-tail-columns", 64, dtype, quick=dtype == "float32")
    others: tuple[tuple[int, ...], ...] = ((4, 64), (2, 192), (3, 33), (5, 7), (1, 96), (2, 3, 64))
    for other in others:
        flags = "odd-size" if math.prod(other) % 2 else ""
        yield case("shape-" + "x".join(map(str, other)), other, "D4-2 G-1", flags)
    for n in (1, 2, 63, 64, 96, 128):
        yield case(f"vector-{n}", (n,), "D4-3", "one-dimensional-shape")
    yield case("shape-1x2", (1, 2), "D4-3", "packed-length-one")
    for blocksize in BLOCKSIZES:
        flags = "blocksize" if blocksize >= 1024 else ""
        yield case(f"blocksize-{blocksize}", (4, blocksize), "D4-2", flags, blocksize, quick=blocksize in (32, 4096))
    for blocksize in (1024, 2048):
        yield case(f"blocksize-{blocksize}-rows", (64, 64), "D4-2", "scale-index-tail-columns", blocksize)
    for dtype in DTYPES:
        yield case(f"extreme-scales-{dtype}", (8, 64), "D4-1", "rounding", 64, dtype, absmax=EXTREME)


def _dequantize_blockwise() -> Iterator[Case]:
    def case(name: str, values: Tensor, codes: Tensor, absmax: Tensor, rules: str, flags: str = "", blocksize: int = 64,
             dtype: str = "float32", **options: Any) -> Case:  # fmt: skip
        given = {"codes": codes, "absmax": absmax, "values": values}
        return make(name, "dequantize_blockwise", given, rules, flags, blocksize=blocksize, dtype=dtype, **options)

    every = torch.arange(256).to(torch.uint8)
    for label, book in (("signed", DYNAMIC), ("unsigned", DYNAMIC_UNSIGNED), ("linear", linear())):
        for dtype in DTYPES:
            name = f"{label}-every-code-{dtype}"
            yield case(name, value_table(book, CPU), every, scales(4), "D8-1", "rounding", 64, dtype)
    values = value_table(DYNAMIC, CPU)
    for blocksize in BLOCKSIZES:
        codes = random_bytes(2 * blocksize + 5, 2 * blocksize + 5)
        options: dict[str, Any] = {"blocksize": blocksize, "quick": blocksize in (32, 4096)}
        flags = "blocksize" if blocksize >= 1024 else ""
        yield case(f"blocksize-{blocksize}", values, codes, scales(3), "D8-2", flags, **options)
    yield case("blocksize-100", values, random_bytes(250, 1), scales(3), "D8-2 G-4", "blocksize", 100, may_refuse=True)
    for n in (1, 7, 63, 65):
        yield case(f"size-{n}", values, random_bytes(n, n), scales(-(-n // 64)), "D8-2", "tail-block")
    yield case("matrix", values, random_bytes(480, 2).view(5, 96), scales(8), "D8-2 G-1")
    # Three NaN: the usual one, one whose lower half is all ones, one that is negative.
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        yield case(f"extreme-scales-{dtype}", values, every.repeat(2), EXTREME, "D8-1 D8-3", "rounding", 64, dtype)
        yield case(f"nan-scale-{dtype}", values, every[100:].repeat(2)[:192], nan, "D8-3", "nan-scale", 64, dtype)


def _dequantize_4bit_nested(book: Codebook) -> Iterator[Case]:
    def case(name: str, seed: int, shape: tuple[int, int], absmax2: Tensor, offset: float, rules: str, flags: str,
             dtype: str = "float32") -> Case:  # fmt: skip
        n = math.prod(shape)
        given = {
            "packed": random_bytes(n // 2, seed), "codes": random_bytes(-(-n // 64), seed + 1), "absmax2": absmax2,
            "offset": torch.tensor(offset), "values": value_table(DYNAMIC, CPU),
        }  # fmt: skip
        return make(f"{book.name}-{name}", "dequantize_4bit_nested", given, rules, flags, quick=dtype == "float32",
                    blocksize=64, quant_type=book.name, shape=list(shape), dtype=dtype)  # fmt: skip

    for dtype in DTYPES:
        for name, shape in (("matrix", (40, 64)), ("columns-96", (20, 96)), ("many", (320, 64))):
            absmax2 = scales(-(-math.prod(shape) // 64 // 256)) / 90
            rules, flags = ("DN-2", "scale-index-tail-columns") if shape[1] % 64 else ("DN-1", "nested-absmax")
            yield case(f"{name}-{dtype}", 41, shape, absmax2, 2.54351806640625, rules, flags, dtype)
    yield case("shape-1x2", 5, (1, 2), scales(1), 2.0, "DN-2", "packed-length-one")


def _int8_matmul() -> Iterator[Case]:
    def case(name: str, a: Tensor, b: Tensor, rules: str, flags: str = "", quick: bool = True) -> Case:
        return make(name, "int8_matmul", {"a": a, "b": b}, rules, flags, quick=quick)

    for m, n, k in ((1, 8, 16), (3, 5, 64), (16, 16, 128), (2, 4, 1), (2, 4, 2), (5, 3, 33), (1, 1, 1040)):
        a, b = random_int8((m, k), 71), random_int8((n, k), 72)
        yield case(f"{m}x{n}x{k}", a, b, "IM-1", "int8-one-column" if k == 1 else "")
    for k in (1024, 1040, 1041, 1042, 2048, 4099):
        for left, right in ((127, 127), (-128, -128), (127, -128)):
            a = torch.full((2, k), left, dtype=torch.int8)
            b = torch.full((2, k), right, dtype=torch.int8)
            # Odd sums, of which float32 has only every other one above 2^24.
            a[1, 1::2], b[1, -1] = 126, 1
            yield case(f"k-{k}-{left}x{right}", a, b, "IM-1", "int8-k-over-1040" if k > 1024 else "", quick=k == 2048)
    yield case("3d", random_int8((2, 3, 32), 73), random_int8((5, 32), 74), "IM-2", "int8-3d")


def _int8_mm_dequant() -> Iterator[Case]:
    def case(name: str, product: Tensor, rules: str, flags: str = "", dtype: str = "float32", bias: Tensor | None = None,
             row: Tensor | None = None, column: Tensor | None = None) -> Case:  # fmt: skip
        rows, columns = math.prod(product.shape[:-1]), product.shape[-1]
        given = {
            "product": product.to(torch.int32),
            "row": noise(rows, 81).abs() + 0.5 if row is None else row,
            "column": noise(columns, 82).abs() + 0.25 if column is None else column,
        }
        if bias is not None:
            given["bias"] = bias
        return make(name, "int8_mm_dequant", given, rules, flags, dtype=dtype)

    random = integers(6 * 9, 83, 22).view(6, 9) - 2**21
    one = torch.ones(1)
    yield case("one", torch.tensor([[16129]]), "ID-1", "int8-constant", row=one, column=one)
    for dtype in DTYPES:
        flags = "int8-constant" if dtype == "float32" else ""
        yield case(f"noise-{dtype}", random, "ID-1", flags, dtype)
        yield case(f"bias-{dtype}", random, "ID-1", flags, dtype, cast(noise(9, 84) * 4, dtype))
    wide = torch.tensor([[2**24 - 1, -(2**24), 2**30, 1, 0]])
    yield case("large-product", wide, "ID-1", "int8-constant")
    row, column = torch.full((6,), 100.0), torch.full((9,), 50.0)
    for dtype in ("float32", "bfloat16"):
        name = f"beyond-float16-{dtype}"
        yield loosened(case(name, random * 16, "ID-2", "float16-detour", dtype, row=row, column=column))
    cube = (integers(2 * 3 * 4, 85, 12) - 2048).view(2, 3, 4)
    for dtype in DTYPES:
        yield loosened(case(f"3d-{dtype}", cube, "ID-3", "int8-3d", dtype))


def loosened(case: Case) -> Case:
    """The case with a relative error of 1e-4 allowed: it is about shapes or ranges, others are about the last digits."""
    y = case.expected["y"]
    if y.low is None or y.high is None:
        raise ValueError(f"case {case.id} has no interval to widen")
    low, high = y.low - 1e-4 * y.low.abs(), y.high + 1e-4 * y.high.abs()
    return replace(case, expected={"y": replace(y, low=low, high=high)}, derived=False)


def _int8_dequantize() -> Iterator[Case]:
    every, absmax = torch.arange(-128, 128).to(torch.int8).view(4, 64), torch.tensor([1.0, 3.3, 65504.0, 1e-5])
    yield make("every-code", "int8_dequantize", {"codes": every, "absmax": absmax}, "IV-1")
    yield make("noise", "int8_dequantize", {"codes": random_int8((7, 33), 91), "absmax": scales(7)}, "IV-1")


def _files(book: Codebook) -> Iterator[Case]:
    for dtype in DTYPES:
        # bfloat16 rounds the elements, never the absmax.
        halves = [in_blocks(clear(noise(63 * 4, seed), book, 63) * 0.99, 64, s) for seed, s in ((95, 1.0), (96, 4.0))]
        plain = cast(clear(cast(torch.cat(halves), dtype).float(), book).view(8, 64), dtype)
        nested = cast(clear(cast(nested_weight(book, 128, False), dtype).float(), book), dtype)
        vector = plain.view(-1)[:66].clone()
        for label, x, flag in (
            ("plain", plain, "checkpoint-bytes"), ("nested", nested, "nested-absmax"),
            ("vector", vector, "one-dimensional-shape"),
        ):  # fmt: skip
            name = f"{book.name}-{label}-{dtype}"
            options: dict[str, Any] = {"blocksize": 64, "quant_type": book.name, "nested": x is nested}
            written = make(name, "save_4bit", {"x": x}, "CW-1 CW-2", "checkpoint-bytes", **options)
            yield written
            file = {key: value.value for key, value in written.expected.items()}
            yield make(name, "load_4bit", file, "CR-1", flag, quant_type=book.name)


def dequantization_cases() -> Iterator[Case]:
    """Every case of this file."""
    yield from _dequantize_blockwise()
    for cases in (_dequantize_4bit, _dequantize_4bit_nested, _files):
        for book in (NF4, FP4):
            yield from cases(book)
    for others in (_int8_matmul, _int8_mm_dequant, _int8_dequantize):
        yield from others()
