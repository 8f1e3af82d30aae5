"""The codebooks of bnbref, and where their numbers come from: NF4 and FP4, dynamic trees, equal steps, small floats.

Each is a `Codebook`. A format of four bits is an entry of `FOUR_BIT`; a family of eight bits is a function of its parameters.
"""

import functools
import itertools
import struct
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from bnbref.arguments import checked
from bnbref.codebook import Codebook, float32, is_table_of, threshold_table, value_table
from bnbref.formats import Formats

__all__ = [
    "AF4", "DYNAMIC", "DYNAMIC_UNSIGNED", "FOUR_BIT", "FP4", "INT4", "NF4", "Codebook", "Formats", "dynamic", "four_bit", "fp8",
    "is_table_of", "linear", "linspace", "normal", "registered_name", "threshold_table", "value_table",
]  # fmt: skip


# ---- four bits ------------------------------------------------------------------------------------------------------

_NF4_BITS = bytes.fromhex(
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
NF4 = Codebook.nearest(
    "nf4",
    [number for (number,) in struct.iter_unpack(">f", _NF4_BITS)],
    source="Dettmers et al., QLoRA (2305.14314), appendix E: quantiles of N(0, 1), see `normal`",
)
"""NormalFloat 4: the float32 table that every implementation shares; ties go to the lower code."""

_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)  # by code

FP4 = Codebook(
    "fp4",
    tuple(float32([*_FP4_MAGNITUDES, 0.0, *(-v for v in _FP4_MAGNITUDES[1:])]).tolist()),
    # The literals of bitsandbytes' CUDA kernel; five of the seven are not the float32 midpoints.
    tuple(float32([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]).tolist()),
    order=(0, 1, 6, 7, 4, 5, 2, 3),
    sign_bit=True,
    source="bitsandbytes csrc/kernels.cu dQuantizeFP4: sign, two exponent bits, one mantissa bit, scaled to 1",
)
"""bitsandbytes' 4-bit float: sign and magnitude; -0.0 and everything that rounds to 0 from above is code 0."""


def _descending(name: str, ascending: Sequence[float], source: str) -> Codebook:
    """The codebook that rounds to the nearest of these values, whose codes count from the largest value down."""
    nearest = Codebook.nearest(name, ascending)
    n = len(nearest.values)
    return Codebook(name, nearest.values[::-1], nearest.thresholds, order=tuple(reversed(range(n))), source=source)


AF4 = _descending(
    "af4",
    [-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
     0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0],
    source="Yoshida, NF4 Isn't Information Theoretically Optimal (2306.06965), blocksize 64",
)  # fmt: skip
"""AbnormalFloat 4. bitsandbytes lists it from +1 down, so code 0 is +1."""

INT4 = _descending(
    "int4",
    float32([i / 7 for i in (-7, -6, -5, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 5, 6, 7)]).tolist(),
    source="bitsandbytes get_4bit_type('int4'): sixteen codes from +7/7 down to -7/7, zero twice",
)
"""Symmetric integers over 7, from +1 down. Zero has two codes, 7 and 8; quantization uses 8, or 7 for numbers above 0."""

FOUR_BIT = Formats(NF4, FP4, AF4, INT4)
"""4-bit codebooks by `quant_type`. A new format is an entry here."""


def four_bit(quant_type: str | Codebook) -> Codebook:
    """The 4-bit codebook called `quant_type`; a codebook is returned as it is. ValueError if there is none, or it has 8 bits.

    >>> four_bit("nf4") is NF4
    True
    """
    book = FOUR_BIT.get(quant_type) if isinstance(quant_type, str) else quant_type
    if not isinstance(book, Codebook) or book.bits != 4:
        got = f"codebook {book.name!r} of {len(book.values)} values" if isinstance(book, Codebook) else repr(quant_type)
        raise ValueError(f"quant_type must be one of {sorted(FOUR_BIT)} or a Codebook of at most 16 values, got {got}")
    return book


def registered_name(quant_type: str | Codebook) -> str | Codebook:
    """The name of a quant_type that is a codebook in `FOUR_BIT`; what is not there, a name too, is returned as it is.

    >>> registered_name(NF4)
    'nf4'
    """
    book = FOUR_BIT.get(quant_type.name) if isinstance(quant_type, Codebook) else None
    return book.name if book is not None and book == quant_type else quant_type


# ---- families -------------------------------------------------------------------------------------------------------


@checked
def linspace(start: float, end: float, points: int) -> Tensor:
    """What float32 `torch.linspace` returns on CPUs with AVX, the same on every CPU: float32 `[points]`.  Exact.

    The lower half is counted from the start and the upper half from the end, each point by one fused multiply-add. On a CPU
    without that instruction torch itself rounds once more, and 42 values of the dynamic map are others. ValueError for a negative
    number of points.

    >>> linspace(0.0, 1.0, 3)
    tensor([0.0000, 0.5000, 1.0000])
    """
    if points < 0:
        raise ValueError(f"points must not be negative, got {points}")
    edges = float32([start, end])
    step = ((edges[1] - edges[0]) / max(points - 1, 1)).double()  # in float64 products are exact, and sums nearly so
    index = torch.arange(points, dtype=torch.float64, device="cpu")
    upper = edges[1].double() - step * (points - 1 - index)
    return torch.where(index < points // 2, edges[0].double() + step * index, upper).float()


@checked
@functools.cache
def dynamic(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Codebook:
    """Dynamic tree quantization: the number of exponent bits varies, and the bits that remain are a linear fraction.

        10^(i - e + 1) * midpoints of linspace(0.1, 1, 2^(i + total - 1 - e) + 1),    i = 0 .. e - 1,   and 0 and 1

    with e = max_exponent_bits and total = total_bits, and both signs. Unsigned, the sign bit is one more bit of the fraction.
    Raises ValueError unless 1 <= max_exponent_bits <= total_bits and 2 <= total_bits <= 8.

    Source: Dettmers, 8-Bit Approximations for Parallelism in Deep Learning (1511.04561), section 2.2; Dettmers et al.
    (2110.02861), section 1.3.

    >>> dynamic().values[127], dynamic().values[255], dynamic(signed=False).values[0]
    (0.0, 1.0, 0.0)
    """
    if not 2 <= total_bits <= 8 or not 1 <= max_exponent_bits <= total_bits:
        raise ValueError(
            f"dynamic codebook needs 2 <= total_bits <= 8 and 1 <= max_exponent_bits <= total_bits, "
            f"got total_bits={total_bits}, max_exponent_bits={max_exponent_bits}"
        )
    fraction_bits = total_bits - 1 - max_exponent_bits
    values = [0.0, 1.0]

    def extend(exponent: int, points: int) -> None:
        edges = linspace(0.1, 1.0, points)
        fractions = 10 ** (exponent - (max_exponent_bits - 1)) * ((edges[:-1] + edges[1:]) / 2)
        values.extend(fractions.tolist())
        if signed:
            values.extend((-fractions).tolist())

    for exponent in range(max_exponent_bits):
        extend(exponent, int(2 ** (exponent + fraction_bits + (not signed)) + 1))
    if fraction_bits > 0:  # the codes that spend no bit on an exponent
        extend(max_exponent_bits - 1, 2**fraction_bits)
    sign = "signed" if signed else "unsigned"
    return Codebook.nearest(f"dynamic-{sign}-{max_exponent_bits}-{total_bits}", sorted(values), "even", "1511.04561")


DYNAMIC = dynamic()
"""The 8-bit codebook of signed states, of nested scales and of `quantize_blockwise` by default."""

DYNAMIC_UNSIGNED = dynamic(signed=False)
"""The 8-bit codebook of states that are never negative."""
# Both are made at import, because code that is traced by Dynamo or runs under fake tensors can read a codebook but not make one.


def check_linear_bits(total_bits: int) -> None:
    """ValueError for a number of bits that a codebook of equal steps does not have."""
    if not 2 <= total_bits <= 8:
        raise ValueError(f"linear codebook needs 2 <= total_bits <= 8, got {total_bits}")


@checked
@functools.cache
def linear(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Codebook:
    """Values in equal steps, by `linspace`: from -1 to 1, or from 0 to 1 if unsigned.

    add_zero: whether one code of a signed map of 8 bits is spent on 0; of fewer bits it always is. bitsandbytes' signed map has
    beside that 0 a 3.7e-9, which is what float32 linspace gives for the middle. Raises ValueError unless 2 <= total_bits <= 8.

    >>> linear(signed=False, total_bits=2).thresholds
    (0.1666666716337204, 0.4999999701976776, 0.8333333134651184)
    """
    check_linear_bits(total_bits)
    spend = signed and (add_zero or total_bits < 8)
    values = linspace(-1.0 if signed else 0.0, 1.0, 2**total_bits - spend)
    listed = sorted(values.tolist() + [0.0] * spend)
    sign = "signed" if signed else "unsigned"
    return Codebook.nearest(f"linear-{sign}-{total_bits}", listed, "even", "linspace")


@checked
@functools.cache
def fp8(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2) -> Codebook:
    """The small floats of e = exponent_bits and p = precision_bits, scaled so that the largest is 1. With E and M the two fields:

        2^(bias + 1 - E) * (1 + M / 2^p)   for E > 0,        2^-bias * M / 2^p   for E = 0,      bias = 2^(e - 1)

    So a larger exponent field is a smaller value: this is bitsandbytes' convention, and not an OCP FP8 format. signed: whether
    each has its negative beside it. Raises ValueError for more than 8 bits, the sign included.

    >>> len(fp8(True, 4, 3).values), fp8(True, 4, 3).values[-1]
    (256, 1.0)
    """
    total_bits = exponent_bits + precision_bits + signed
    if not (1 <= exponent_bits <= 7 and 0 <= precision_bits and 2 <= total_bits <= 8):
        raise ValueError(
            f"fp8 codebook needs 1 <= exponent_bits <= 7 and at most 8 bits with the sign, "
            f"got exponent_bits={exponent_bits}, precision_bits={precision_bits}, signed={signed}"
        )
    bias = 2 ** (exponent_bits - 1)
    values: list[float] = []
    for exponent, mantissa in itertools.product(range(2**exponent_bits), range(2**precision_bits)):
        fraction = mantissa / 2**precision_bits
        value = fraction * 2.0**-bias if exponent == 0 else (1 + fraction) * 2.0 ** (bias + 1 - exponent)
        values += [value, -value] if signed else [value]
    scaled = float32(sorted(values))
    sign = "s" if signed else "u"
    return Codebook.nearest(f"fp8-{sign}-e{exponent_bits}p{precision_bits}", (scaled / scaled.max()).tolist(), "even")


@checked
@functools.cache
def normal(offset: float = 0.9677083, use_extra_value: bool = True) -> Codebook:
    """How the values of NF4 are made: zero, and quantiles of N(0, 1) on both sides of it, scaled so that the largest is 1.

        8 positive values    Q(p), p in 9 equal steps from offset to 0.5, which is 0 itself and left out
        7 negative values   -Q(p), p in 8 equal steps likewise

    It is the construction of QLoRA (2305.14314), section 3, an asymmetric type with an exact zero, as its authors programmed it.
    (Equation 4 there gives other values: docs/content/reading.md.) Their offset is the mean of 1 - 1/30 and 1 - 1/32.

    offset: the probability of the largest quantile; ValueError unless it is between 0.5 and 1. use_extra_value: whether the
    positive side has an eighth value. Without it both sides have seven, and there are 15 values in all.

    >>> normal().values == NF4.values
    True
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset must lie between 0.5 and 1, got {offset}")
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        return [quantile(p) for p in linspace(offset, 0.5, count).tolist()[:-1]]

    values = float32(sorted([-v for v in side(8)] + [0.0] + side(9 if use_extra_value else 8)))
    return Codebook.nearest("normal", (values / values.max()).tolist(), source="2305.14314")
