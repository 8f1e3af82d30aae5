"""Is this installation right? What bnbref computes from fixed inputs, against digests that hold on every machine.

    formats.CHECKS      the five formats on one input: `python -m bnbref info`
    kernels.CHECKS      every exact kernel on the inputs that find trouble: `python -m bnbref check --self`

A check computes numbers that are exact, so that their digest is the same for every device, eager or compiled. The tests derive
each digest from the formulas, in plain Python and numpy.
"""

import ctypes
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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


class Check(NamedTuple):
    """A name, what is computed from `example`, and the digest that it must have."""

    name: str
    run: Callable[[Tensor], Outputs]
    golden: str


class Result(NamedTuple):
    """A check and the digests that were found; `compiled` is None where nothing was compiled."""

    check: Check
    eager: str
    compiled: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether all that ran gave the golden digest."""
        return {self.eager, self.compiled} <= {self.check.golden, None}


def run(checks: Sequence[Check], device: torch.device, compiled: bool, seconds: float = 10.0) -> Iterator[Result]:
    """Run the checks eagerly and, if `compiled`, compiled too, as long as `seconds` have not passed when one begins."""
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
