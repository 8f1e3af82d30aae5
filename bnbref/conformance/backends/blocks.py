"""What adapters of packages need that have NF4 in a layout of their own: whole blocks as rows, codes in bytes."""

import torch
from torch import Tensor

from bnbref.conformance.backends import Unsupported
from bnbref.conformance.oracles.values import unpack


def nf4_alone(quant_type: str) -> None:
    """Raises Unsupported for FP4."""
    if quant_type != "nf4":
        raise Unsupported(f"the package has NF4 and no {quant_type}")


def rows(x: Tensor, blocksize: int) -> Tensor:
    """The blocks of a tensor, `[blocks, blocksize]`. Raises Unsupported where the last one is not whole.

    >>> rows(torch.arange(4), 2).tolist()
    [[0, 1], [2, 3]]
    """
    if x.numel() % blocksize or x.numel() == 0:
        raise Unsupported(f"the package has whole blocks alone, got {x.numel()} elements in blocks of {blocksize}")
    return x.reshape(-1, blocksize)


def code_rows(packed: Tensor, blocksize: int, numel: int) -> Tensor:
    """The codes in packed bytes, int64 `[blocks, blocksize]`. Raises Unsupported where the last block is not whole."""
    return rows(unpack(packed, numel), blocksize)


def pack(codes: Tensor) -> Tensor:
    """Codes of an even number of elements in bytes, the first of two in the high nibble.

    >>> pack(torch.tensor([1, 2, 15, 0])).tolist()
    [18, 240]
    """
    flat = codes.reshape(-1).to(torch.uint8)
    return flat[0::2] << 4 | flat[1::2]


def exactly(absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales in a dtype. Raises Unsupported where one of them is not a number of it."""
    scale = absmax.to(dtype)
    if not torch.equal(scale.float(), absmax):
        raise Unsupported("the package has scales of the dtype of the weight")
    return scale
