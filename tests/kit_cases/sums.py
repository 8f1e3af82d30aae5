"""Cases of float products, of their backward passes, and of what an evaluation leaves behind."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bnbref.codebooks import FP4, NF4
from bnbref.conformance.case import DTYPES, Case
from kit_cases.inputs import cast, integers, noise, random_bytes, scales
from kit_cases.oracles import make


def _packed(n: int, k: int, seed: int) -> dict[str, Tensor]:
    return {"packed": random_bytes(n * k // 2, seed), "absmax": scales(-(-n * k // 64))}


def _lead(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _gemm_4bit() -> Iterator[Case]:
    sizes: tuple[tuple[tuple[int, ...], int, int, bool], ...] = (
        ((1,), 32, 128, False), ((5,), 32, 128, True), ((2, 3), 17, 64, True), ((5,), 32, 96, False), ((3,), 16, 32, False),
        ((8,), 64, 1024, False), ((70,), 8, 128, False),
    )  # fmt: skip
    for book in (NF4, FP4):
        for dtype in DTYPES:
            for lead, n, k, biased in sizes:
                given = {"a": cast(noise(math.prod(lead) * k, 51).view(*lead, k), dtype), **_packed(n, k, 52)}
                if biased:
                    given["bias"] = cast(noise(n, 53) * 8, dtype)
                flags = "scale-index-tail-columns" if k % 64 else "gemm-rows" if lead != (1,) else ""
                name = f"{book.name}-{_lead(lead)}-{n}x{k}{'-bias' if biased else ''}-{dtype}"
                rule = "G4-2" if flags == "gemm-rows" else "G4-1"
                yield make(name, "gemm_4bit", given, rule, flags, quick=k == 96 or lead == (5,),
                           blocksize=64, quant_type=book.name, shape=[n, k])  # fmt: skip


def _gemm_4bit_backward() -> Iterator[Case]:
    sizes: tuple[tuple[tuple[int, ...], int, int], ...] = (
        ((1,), 32, 128), ((5,), 32, 64), ((2, 3), 18, 64), ((5,), 32, 96),
    )  # fmt: skip
    for book in (NF4, FP4):
        for dtype in DTYPES:
            for lead, n, k in sizes:
                given = {"grad": cast(noise(math.prod(lead) * n, 101).view(*lead, n), dtype), **_packed(n, k, 102)}
                columns = "scale-index-tail-columns" if k % 64 else ""
                rule, flag = ("GB-2", "gemm-rows") if len(lead) > 1 else ("GB-1", columns)
                name = f"{book.name}-{_lead(lead)}-{n}x{k}-{dtype}"
                yield make(name, "gemm_4bit_backward", given, rule, flag, quick=dtype == "float32",
                           blocksize=64, quant_type=book.name, shape=[n, k])  # fmt: skip


def _powers(exponents: Tensor) -> Tensor:
    return torch.exp2(exponents.double()).float()


def _int8_weight(n: int, k: int, seed: int) -> Tensor:
    """Rows of 127 times a power of two and integers below it: int8 has them exactly, whatever divides by what."""
    codes = (integers(n * k, seed, 8).view(n, k) - 128).clamp(min=-127).float()
    codes[:, 0] = 127
    return codes * _powers(torch.arange(n) % 5 - 9)[:, None]


def _int8_backward() -> Iterator[Case]:
    n, k = 16, 32
    for dtype in DTYPES:
        for lead in ((6,), (32,), (2, 3)):
            rows = math.prod(lead)
            # Columns whose sizes are far from each other and from those of the rows: scales of the wrong axis show.
            a = noise(rows * k, 111).view(*lead, k) * _powers(torch.arange(k) % 4)
            grad = noise(rows * n, 112).view(*lead, n) * _powers(torch.arange(n) % 6 - 3)
            given = {"a": cast(a, dtype), "weight": cast(_int8_weight(n, k, 113), dtype), "grad": cast(grad, dtype)}
            rules, flag = ("IB-3", "backward-3d") if len(lead) > 1 else ("IB-1 IB-2", "weight-gradient-scale")
            yield make(f"{_lead(lead)}-{dtype}", "int8_backward", given, rules, flag)


def _evaluate_then_train() -> Iterator[Case]:
    for dtype in DTYPES:
        for n, k, biased in ((32, 128, True), (32, 128, False), (48, 128, False), (32, 96, False)):
            given = {"x": cast(noise(3 * k, 121).view(3, k), dtype), "grad": cast(noise(3 * n, 122).view(3, n), dtype)}
            given |= _packed(n, k, 123)
            if biased:
                given["bias"] = cast(noise(n, 124), dtype)
            name = f"nf4-{n}x{k}{'-bias' if biased else ''}-{dtype}"
            yield make(name, "evaluate_then_train", given, "LE-1 LE-2 LE-3", "evaluation-repacks",
                       blocksize=64, quant_type="nf4", shape=[n, k])  # fmt: skip


def product_cases() -> Iterator[Case]:
    """Every case of this file."""
    for cases in (_gemm_4bit, _gemm_4bit_backward, _int8_backward, _evaluate_then_train):
        yield from cases()
