"""Is this installation right? Every format on one fixed input, against hashes that hold on every machine.

The input is integers times powers of two and all that is computed is exact, so that a digest is one number for every
device, eager or compiled. tests/test_selfcheck.py derives each from the formulas in plain Python.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bnbref import functional, int8
from bnbref.fused import REGISTRY, eager

Outputs = tuple[Tensor, ...]


def example(device: torch.device) -> Tensor:
    """float32 `[16384]`: integers below 4096 times 2^-10 to 2^-14 by block of 64, and one block of zeros.

    Any sum of the 256 absmax is a multiple of 2^-14 below 2^10: their mean is exact, whatever the order of summation.

    >>> example(torch.device("cpu"))[:4] * 2**14
    tensor([-4095., -4047., -3937., -3765.])
    """
    i = torch.arange(16384, dtype=torch.int64)
    block = i // 64
    x = ((31 * i * i + 17 * i) % 8191 - 4095) << (block % 5)
    return (torch.where(block == 5, 0, x).float() * 2.0**-14).to(device)


def digest(outputs: Iterable[Tensor]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the tensors' bytes.

    >>> digest([torch.zeros(1, dtype=torch.uint8)])
    '6e340b9cffb37a98'
    """
    sha = hashlib.sha256()
    for tensor in outputs:
        sha.update(bytes(tensor.detach().cpu().reshape(-1).view(torch.uint8).tolist()))
    return sha.hexdigest()[:16]


def _four_bit(x: Tensor, quant_type: str) -> Outputs:
    packed, state = functional.quantize_4bit(x, quant_type=quant_type)
    return packed, state.absmax, functional.dequantize_4bit(packed, state).bfloat16()


def _nested(x: Tensor) -> Outputs:
    packed, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    state2 = state.state2
    if state2 is None or state.offset is None:
        raise RuntimeError("compress_statistics=True gave a quant state that is not nested")
    return packed, state.absmax, state2.absmax, state.offset, state.scales()


def _eight_bit(x: Tensor) -> Outputs:
    codes, state = functional.quantize_blockwise(x, blocksize=256)
    return codes, state.absmax, functional.dequantize_blockwise(codes, state)


def _int8(x: Tensor) -> Outputs:
    """64 rows of 256; in some columns an element reaches the threshold."""
    codes, absmax, columns = int8.quantize(x.view(64, 256), threshold=3.99)
    if columns is None:
        raise RuntimeError("a threshold above 0 gave no outlier columns")
    product = int8.multiply(codes, codes)
    y = int8.dequantize_int8_product(product, absmax, absmax, None, None, dtype=torch.float32)
    return codes, absmax, columns, int8.dequantize(codes, absmax), product, y


class Check(NamedTuple):
    """What is computed from `example`, and the digest that it must have."""

    name: str
    run: Callable[[Tensor], Outputs]
    golden: str


CHECKS = (
    Check("nf4", lambda x: _four_bit(x, "nf4"), "88a785ac6371d304"),
    Check("fp4", lambda x: _four_bit(x, "fp4"), "2f7b7600fed1d1ca"),
    Check("nf4, double quantization", _nested, "d3f6b855cc763952"),
    Check("8-bit, dynamic codebook", _eight_bit, "4a15f1da0778ca9b"),
    Check("LLM.int8()", _int8, "f93d018166520fe1"),
)


class Result(NamedTuple):
    """A check and the digests found; `compiled` is None where nothing was compiled."""

    check: Check
    eager: str
    compiled: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether all that ran gave the golden digest."""
        return {self.eager, self.compiled} <= {self.check.golden, None}


def self_check(device: torch.device, compiled: bool, seconds: float = 10.0) -> Iterator[Result]:
    """Run the checks eagerly, and compiled as long as `seconds` have not passed when one begins."""
    start = time.monotonic()
    for check in CHECKS:
        begin = time.monotonic()
        x = example(device)
        with eager():
            plain = digest(check.run(x))
        fast = digest(check.run(x)) if compiled and begin - start < seconds else None
        yield Result(check, plain, fast, time.monotonic() - begin)


def kernels_compiled() -> tuple[list[str], list[str]]:
    """Names of the exact kernels that were compiled in this process, and of those that were not."""
    exact = {name: bool(kernel.variants) for name, kernel in REGISTRY.items() if kernel.exact}
    return [name for name in exact if exact[name]], [name for name in exact if not exact[name]]
