"""Is this installation right? Every format on one fixed input, against digests that hold on every machine.

The input is made of integers, powers of two and numbers beside the formats' thresholds, where a rule of rounding shows. All
that is computed from it is exact, so that a digest is one number for every device, eager or compiled.
tests/test_selfcheck.py derives each in plain Python, and shows that other rules of rounding give others.
"""

import ctypes
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnbref import functional, int8
from bnbref.codebooks import DYNAMIC, FP4, NF4, Codebook
from bnbref.kernels import REGISTRY, eager

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


def beside_thresholds(x: Tensor, thresholds: Sequence[float], blocksize: int) -> Tensor:
    """`x` with numbers at a threshold, or an ulp from it, in every odd place: fl(threshold * absmax) of the block.

    The thresholds take turns, as do one ulp below, none, one above, and the signs; absmax is put first in each block.

    >>> beside_thresholds(torch.tensor([[0.0, 0.0, 2.0, 0.0]]), [0.25], 4)
    tensor([[2.0000, 0.5000, 2.0000, 0.5000]])
    """
    blocks = x.view(-1, blocksize).cpu()
    absmax = blocks.abs().amax(1, keepdim=True)
    i = torch.arange(blocks.numel()).view(blocks.shape)
    near = torch.tensor(thresholds, dtype=torch.float32)[i // 2 % len(thresholds)] * absmax
    direction = torch.tensor([-torch.inf, 0.0, torch.inf])[i // 2 % 3]
    near = torch.where(direction == 0, near, near.nextafter(direction)) * torch.where(i // 2 % 4 < 2, 1.0, -1.0)
    mixed = torch.where(i % 2 == 1, near, blocks)
    mixed = torch.where(i % blocksize == 0, absmax, torch.where(absmax > 0, mixed, 0.0))
    return mixed.view(x.shape).to(x.device)


def digest(outputs: Iterable[Tensor]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the tensors' bytes.

    >>> digest([torch.zeros(1, dtype=torch.uint8)])
    '6e340b9cffb37a98'
    """
    sha = hashlib.sha256()
    for tensor in outputs:
        flat = tensor.detach().cpu().contiguous()
        sha.update(ctypes.string_at(flat.data_ptr(), flat.nbytes))
    return sha.hexdigest()[:16]


def _four_bit(x: Tensor, codebook: Codebook) -> Outputs:
    x = beside_thresholds(x, codebook.thresholds, 64)
    packed, state = functional.quantize_4bit(x, quant_type=codebook)
    return packed, state.absmax, functional.dequantize_4bit(packed, state).bfloat16()


def _nested(x: Tensor) -> Outputs:
    packed, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    state2 = state.state2
    if state2 is None or state.offset is None:
        raise RuntimeError("compress_statistics=True gave a quant state that is not nested")
    return packed, state.absmax, state2.absmax, state.offset, state.scales()


def _eight_bit(x: Tensor) -> Outputs:
    x = beside_thresholds(x, DYNAMIC.thresholds, 256)
    codes, state = functional.quantize_blockwise(x, blocksize=256)
    return codes, state.absmax, functional.dequantize_blockwise(codes, state)


def _int8(x: Tensor) -> Outputs:
    """64 rows of 256; in some columns an element reaches the threshold."""
    x = beside_thresholds(x, INT8_THRESHOLDS, 256)
    codes, absmax, columns = int8.quantize(x.view(64, 256), threshold=3.99)
    if columns is None:
        raise RuntimeError("a threshold above 0 gave no outlier columns")
    product = int8.multiply(codes, codes)
    y = int8.dequantize_int8_product(product, absmax, absmax, None, None, dtype=torch.float32)
    return codes, absmax, columns, int8.dequantize(codes, absmax), product, y


INT8_THRESHOLDS = [(code + 0.5) / 127 for code in range(127)]


class Check(NamedTuple):
    """What is computed from `example`, and the digest that it must have."""

    name: str
    run: Callable[[Tensor], Outputs]
    golden: str


CHECKS = (
    Check("nf4", lambda x: _four_bit(x, NF4), "635e372d78067bf8"),
    Check("fp4", lambda x: _four_bit(x, FP4), "a91e0e11005d5f6d"),
    Check("nf4, double quantization", _nested, "d3f6b855cc763952"),
    Check("8-bit, dynamic codebook", _eight_bit, "5b7a7614de1f3925"),
    Check("LLM.int8()", _int8, "c6ffe95105d1f514"),
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


def self_check(
    device: torch.device, compiled: bool, seconds: float = 10.0, checks: Sequence[Check] = CHECKS
) -> Iterator[Result]:
    """Run the checks eagerly, and compiled as long as `seconds` have not passed when one begins."""
    start = time.monotonic()
    for check in checks:
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
