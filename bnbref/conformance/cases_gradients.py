"""Cases of the products' backward passes, and of what an evaluation leaves behind."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bnbref.codebooks import FP4, NF4
from bnbref.conformance.cases import DTYPES, Case, cast, integers, make, noise, random_bytes, scales


def _gemm_4bit_backward() -> Iterator[Case]:
    sizes: tuple[tuple[tuple[int, ...], int, int], ...] = (
        ((1,), 32, 128),
        ((5,), 32, 64),
        ((2, 3), 18, 64),
        ((5,), 32, 96),
    )
    for book in (NF4, FP4):
        for dtype in DTYPES:
            for lead, n, k in sizes:
                given = {
                    "grad": cast(noise(math.prod(lead) * n, 101).view(*lead, n), dtype),
                    "packed": random_bytes(n * k // 2, 102), "absmax": scales(-(-n * k // 64)),
                }  # fmt: skip
                name = f"{book.name}-{'x'.join(map(str, lead))}-{n}x{k}-{dtype}"
                rule, flag = (
                    ("GB-2", "gemm-rows") if len(lead) > 1 else ("GB-1", "scale-index-tail-columns" if k % 64 else "")
                )
                made = make(
                    name, "gemm_4bit_backward", given, rule, flag, blocksize=64, quant_type=book.name, shape=[n, k]
                )
                yield replace(made, quick=dtype == "float32")


def _int8_weight(n: int, k: int, seed: int) -> Tensor:
    """Rows of 127 times a power of two and integers below it: int8 has them exactly, whatever divides by what."""
    codes = (integers(n * k, seed, 8).view(n, k) - 128).clamp(min=-127).float()
    codes[:, 0] = 127
    return codes * torch.exp2((torch.arange(n) % 5 - 9).double()).float()[:, None]


def _int8_backward() -> Iterator[Case]:
    for dtype in DTYPES:
        for lead in ((6,), (32,), (2, 3)):
            n, k = 16, 32
            # Columns whose sizes are far from each other and from those of the rows: scales of the wrong axis show.
            a = noise(math.prod(lead) * k, 111).view(*lead, k) * torch.exp2((torch.arange(k) % 4).double()).float()
            grad = (
                noise(math.prod(lead) * n, 112).view(*lead, n) * torch.exp2((torch.arange(n) % 6 - 3).double()).float()
            )
            given = {"a": cast(a, dtype), "weight": cast(_int8_weight(n, k, 113), dtype), "grad": cast(grad, dtype)}
            rules, flag = ("IB-3", "backward-3d") if len(lead) > 1 else ("IB-1 IB-2", "weight-gradient-scale")
            name = f"{'x'.join(map(str, lead))}-{dtype}"
            yield make(name, "int8_backward", given, rules, flag)


def _evaluate_then_train() -> Iterator[Case]:
    for dtype in DTYPES:
        for n, k, biased in ((32, 128, True), (32, 128, False), (48, 128, False), (32, 96, False)):
            given = {
                "x": cast(noise(3 * k, 121).view(3, k), dtype), "grad": cast(noise(3 * n, 122).view(3, n), dtype),
                "packed": random_bytes(n * k // 2, 123), "absmax": scales(-(-n * k // 64)),
            }  # fmt: skip
            if biased:
                given["bias"] = cast(noise(n, 124), dtype)
            name = f"nf4-{n}x{k}{'-bias' if biased else ''}-{dtype}"
            yield make(name, "evaluate_then_train", given, "LE-1 LE-2 LE-3", "evaluation-repacks",
                       blocksize=64, quant_type="nf4", shape=[n, k])  # fmt: skip


def all_gradients() -> Iterator[Case]:
    """Every case."""
    yield from _gemm_4bit_backward()
    yield from _int8_backward()
    yield from _evaluate_then_train()
