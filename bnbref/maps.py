"""The values of codebooks as bitsandbytes has them: tensors of 256 numbers, with zeros for the codes that a map lacks."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref import codebooks
from bnbref.arguments import check_tensors, checked
from bnbref.codebooks import DYNAMIC, Codebook, dynamic, four_bit, value_table


def _map_of_256(values: Sequence[float]) -> Tensor:
    return torch.tensor(sorted([*values, *(0.0,) * (256 - len(values))]), dtype=torch.float32, device="cpu")


@checked
def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The values of `codebooks.dynamic`, float32 `[256]`, padded by zeros and sorted.  Exact.

    signed: whether there are negative values. max_exponent_bits: how many powers of ten there are below 1. total_bits: of a code.

    >>> create_dynamic_map()[126:129]
    tensor([-5.5000e-07,  0.0000e+00,  5.5000e-07])
    """
    return _map_of_256(dynamic(signed, max_exponent_bits, total_bits).values)


@checked
def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """`codebooks.linspace` from -1 or 0 to 1, float32 `[256]`, the missing codes zero in the middle.  Exact.

    signed: from -1. total_bits: of a code. add_zero: whether a signed map spends a code to have 0 among its values.

    >>> create_linear_map(signed=False)[:2]
    tensor([0.0000, 0.0039])
    """
    codebooks.check_linear_bits(total_bits)
    spend = signed and (add_zero or total_bits < 8)
    values = codebooks.linspace(-float(signed), 1.0, 2**total_bits - spend)
    half = values.numel() // 2
    return torch.cat([values[:half], values.new_zeros(256 - values.numel()), values[half:]])


@checked
def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """The values of `codebooks.fp8`, float32 `[256]`, padded by zeros and sorted.  Exact.

    signed, exponent_bits and precision_bits: how many bits there are for each; their sum must be total_bits: ValueError.

    >>> create_fp8_map(True, 4, 3)[-1]
    tensor(1.)
    """
    if exponent_bits + precision_bits + signed != total_bits:
        raise ValueError(
            f"total_bits must be exponent_bits + precision_bits + sign = {exponent_bits + precision_bits + signed}, "
            f"got {total_bits}"
        )
    return _map_of_256(codebooks.fp8(signed, exponent_bits, precision_bits).values)


@checked
def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """The values of `codebooks.normal`, float32 `[256]`, padded by zeros and sorted.  Exact.

    offset: the probability of the largest quantile. use_extra_value: whether there is one value more above zero than below, as
    in NF4.

    >>> create_normal_map()[[0, -1]]
    tensor([-1.,  1.])
    """
    return _map_of_256(codebooks.normal(offset, use_extra_value).values)


@checked
def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The sixteen values of a 4-bit type by code, float32, on `device` (CPU by default).  Exact.

    typename: "nf4", "fp4", "af4", "int4". blocksize: af4 is defined for 64 alone: ValueError.

    >>> get_4bit_type("fp4")[3]
    tensor(1.)
    """
    if typename == "af4" and blocksize != 64:
        raise ValueError(f"af4 is defined for blocksize 64, got {blocksize}")
    return value_table(four_bit(typename), torch.device("cpu" if device is None else device)).clone()


# ---- maps that are given --------------------------------------------------------------------------------------------


def codebook_of(code: Tensor | Codebook | None) -> Codebook:
    """The codebook that an argument `code` of bitsandbytes' functions means: of sorted values, or by default the dynamic one.

    >>> codebook_of(create_dynamic_map()).thresholds == codebook_of(None).thresholds
    True
    """
    if isinstance(code, Codebook):
        return code
    if code is None:
        return DYNAMIC
    return _of_values(tuple(values_of(code).detach().float().tolist()))


def values_of(code: Tensor) -> Tensor:
    """The code, if it is a tensor of values; TypeError or ValueError if not."""
    check_tensors(code=code)
    if code.dim() != 1 or code.is_complex():
        raise ValueError(
            f"code must be a Codebook or a tensor of sorted values in one dimension, got {code.dtype} {tuple(code.shape)}"
        )
    return code


@functools.cache
def _of_values(values: tuple[float, ...]) -> Codebook:
    return Codebook.nearest("code", values, ties="even")


def padded_to_256(code: Tensor) -> Tensor:
    """The values of codes, float32, with zeros behind them up to 256. ValueError unless there are 2 to 256."""
    code = code.detach().float().reshape(-1)
    if not 2 <= code.numel() <= 256:
        raise ValueError(f"code must have 2 to 256 values, got {code.numel()}")
    return F.pad(code, (0, 256 - code.numel()))
