"""The codebooks: which values a format has, where one ends and the next begins, and where both come from.

A codebook is two tables. The code of x is found by counting the thresholds strictly below x, so every rounding
convention is just another threshold table: a tie that goes to the even code moves a threshold by one ulp, and the
constants of a hand-written kernel are seven other thresholds.
"""

import functools
import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from bnbref.context import kept
from bnbref.kernels import tracing


@dataclass(frozen=True, eq=False)
class Codebook:
    """A format: its values by code, and the thresholds between them. All are floats, each of them exactly a float32.

        rank = number of thresholds strictly below x            code = order[rank]

    order: the code of each rank; None if code and rank are the same. sign_bit: whether a code is a sign and a magnitude. Then
    the thresholds lie between magnitudes, and the upper half of the codes are the negative numbers:

        rank = number of thresholds strictly below |x|          code = order[rank] + (len(values) / 2 if x < 0 else 0)

    No threshold is below NaN, so its rank is 0. source: where the numbers come from. Raises ValueError for tables that break a
    rule of docs/content/codebooks.md.

    >>> Codebook.nearest("ternary", [-1, 0, 1]).thresholds
    (-0.5, 0.5)
    """

    name: str
    values: tuple[float, ...]
    thresholds: tuple[float, ...]
    order: tuple[int, ...] | None = None
    sign_bit: bool = False
    source: str = ""
    _identity: tuple[object, ...] = field(init=False, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a codebook must have a name, got {self.name!r}")
        for label in ("values", "thresholds"):
            table = _numbers(f"{label} of codebook {self.name!r}", getattr(self, label))
            if not all(math.isfinite(v) and v == float(_float32(v)) for v in table):
                raise ValueError(f"{label} of codebook {self.name!r} must be finite float32 numbers, got {table}")
            object.__setattr__(self, label, table)
        n = len(self.values)
        ranks = n // 2 if self.sign_bit else n
        if not 2 <= n <= 256:
            raise ValueError(f"codebook {self.name!r} must have 2 to 256 values, got {n}")
        if len(self.thresholds) != ranks - 1:
            raise ValueError(f"codebook {self.name!r} needs {ranks - 1} thresholds, got {len(self.thresholds)}")
        largest = max(map(abs, self.values))
        if largest > 1:
            raise ValueError(
                f"values of codebook {self.name!r} must lie in [-1, 1], as the largest magnitude of a block is scaled to 1: "
                f"divide them by {largest}"
            )
        if any(a > b for a, b in itertools.pairwise(self.thresholds)):
            raise ValueError(f"thresholds of codebook {self.name!r} must be sorted, got {self.thresholds}")
        if self.order is not None:
            object.__setattr__(self, "order", tuple(map(int, self.order)))
            if n > 16 or sorted(self.order) != list(range(ranks)):
                raise ValueError(
                    f"order of codebook {self.name!r} must be a permutation of {ranks} ranks of at most 16 values"
                )
        self._check_ranks(ranks)
        # Compared by the bits of its numbers, because -0.0 is equal to 0.0 and yet decodes to another float. The hash is kept:
        # codebooks are in the key of every kernel call, and hashing 511 floats each time would cost more than the look-up.
        identity = (self.name, *map(words, (self.values, self.thresholds)), self.order, self.sign_bit)
        object.__setattr__(self, "_identity", identity)
        object.__setattr__(self, "_hash", hash(identity))

    def _check_ranks(self, ranks: int) -> None:
        """ValueError unless each threshold lies between the values of the ranks beside it."""
        if self.sign_bit and any(-a != b for a, b in zip(self.values, self.values[ranks:], strict=False)):
            raise ValueError(f"the second half of the values of codebook {self.name!r} must be the first, negative")
        by_rank = [self.values[code] for code in self.order or range(ranks)]
        # A threshold may lie one ulp below the lower value: `ties="even"` puts it there if the values are neighbouring floats,
        # their midpoint is rounded to the lower one, and the tie goes to the upper one.
        below = _float32(by_rank[:-1]).nextafter(_float32(-math.inf)).tolist()
        for a, t, b in zip(below, self.thresholds, by_rank[1:], strict=True):
            if not a <= t <= b:
                raise ValueError(
                    f"thresholds of codebook {self.name!r} must lie between its values, in the order of their ranks: "
                    f"{t} does not lie between {a} and {b}"
                )

    def __reduce__(self) -> tuple[object, ...]:
        # A pickle holds what the codebook is made of and not its hash, which includes that of a string: another in each process.
        return type(self), (self.name, self.values, self.thresholds, self.order, self.sign_bit, self.source)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Codebook) and self._identity == other._identity)

    def __hash__(self) -> int:
        return self._hash

    @property
    def bits(self) -> int:
        """How many bits a code is stored in: 4 if it fits into a nibble, else 8."""
        return 4 if len(self.values) <= 16 else 8

    @functools.cached_property
    def code_of_zero(self) -> int:
        """The code of 0.0. All-zero blocks consist of it, and it fills the last nibble after an odd number of elements."""
        rank = sum(t < 0.0 for t in self.thresholds)
        return rank if self.order is None else self.order[rank]

    @classmethod
    def nearest(
        cls, name: str, values: Sequence[float], ties: Literal["lower", "even"] = "lower", source: str = ""
    ) -> "Codebook":
        """The codebook that rounds to the nearest value: its thresholds are the float32 midpoints `fl(fl(a + b) / 2)`.

        values: sorted numbers. ties: a number on a midpoint gets the lower code ("lower") or the even one ("even"). If the even
        code is the upper one, the threshold is one ulp below the midpoint. Raises ValueError for values that are not sorted, or
        are not in [-1, 1].

        >>> Codebook.nearest("ternary", [-1, 0, 1], ties="even").thresholds
        (-0.5, 0.4999999701976776)
        """
        values = _numbers(f"values of codebook {name!r}", values)
        table = _float32(values)
        if table.numel() < 2 or not bool((table.diff() >= 0).all()):
            raise ValueError(f"values of codebook {name!r} must be at least two, sorted, got {list(values)}")
        middle = (table[:-1] + table[1:]) / 2
        if ties == "even":
            upper_is_even = torch.arange(middle.numel(), device="cpu") % 2 == 1
            middle = torch.where(upper_is_even, middle.nextafter(_float32(-math.inf)), middle)
            middle = middle.cummax(0).values  # equal values (the zeros that pad a map of few bits) leave no room below
        elif ties != "lower":
            raise ValueError(f"ties must be 'lower' or 'even', got {ties!r}")
        return cls(name, tuple(table.tolist()), tuple(middle.tolist()), source=source)


def _numbers(what: str, values: Any) -> tuple[float, ...]:
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a sequence of numbers, got {values!r}") from error


def words(values: Sequence[float]) -> bytes:
    """The float32 bits of numbers, which tell -0.0 from 0.0."""
    return struct.pack(f"{len(values)}f", *values)


def _float32(values: float | Sequence[float]) -> Tensor:
    """A float32 tensor on the CPU. Both are named, because models are loaded under other default devices and dtypes."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def linspace(start: float, end: float, points: int) -> Tensor:
    """What float32 `torch.linspace` returns on CPUs with AVX, computed so that every CPU gives the same: float32 `[points]`.

    The lower half is counted from the start and the upper half from the end, each point by one fused multiply-add. On a CPU
    without that instruction torch itself rounds once more, and 42 values of the dynamic map are others.

    >>> linspace(0.0, 1.0, 3)
    tensor([0.0000, 0.5000, 1.0000])
    """
    edges = _float32([start, end])
    step = ((edges[1] - edges[0]) / max(points - 1, 1)).double()  # in float64 products are exact, and sums nearly so
    index = torch.arange(points, dtype=torch.float64, device="cpu")
    upper = edges[1].double() - step * (points - 1 - index)
    return torch.where(index < points // 2, edges[0].double() + step * index, upper).float()


def _from_hex(words: str) -> tuple[float, ...]:
    bits = torch.tensor([int(w, 16) - (int(w, 16) >> 31 << 32) for w in words.split()], dtype=torch.int32, device="cpu")
    return tuple(bits.view(torch.float32).tolist())


def value_table(codebook: Codebook, device: torch.device) -> Tensor:
    """`codebook.values` as a float32 tensor, padded by zeros to one entry for each of the 16 or 256 codes.

    >>> value_table(NF4, torch.device("cpu"))[7:9]
    tensor([0.0000, 0.0796])
    """
    return _table(codebook, True, device)


def is_table_of(values: Tensor, codebook: Codebook) -> bool:
    """Whether a table of values that was stored with codes is that of a codebook: each value within a relative 2^-19 of its own.

    It need not have the same bits, because the writer's torch may have computed the dynamic map without fused multiply-adds. Its
    linspace on [0.1, 1] then differs by 2^-23 at most, which relative to 0.1 is less than 2^-19. Neighbouring values of a map
    differ by 1 % or more.

    >>> is_table_of(value_table(NF4, torch.device("cpu")), NF4), is_table_of(value_table(NF4, torch.device("cpu")).flip(0), NF4)
    (True, False)
    """
    own = value_table(codebook, torch.device("cpu"))
    found = values.detach().to("cpu", torch.float32)
    return found.shape == own.shape and bool(((found - own).abs() <= own.abs() * 2.0**-19).all())


def threshold_table(codebook: Codebook, device: torch.device) -> Tensor:
    """`codebook.thresholds` as a float32 tensor on a device."""
    return _table(codebook, False, device)


def _table(codebook: Codebook, values: bool, device: torch.device) -> Tensor:
    return (_new_table if tracing() else _kept_table)(codebook, values, device)


def _new_table(codebook: Codebook, values: bool, device: torch.device) -> Tensor:
    padding = (0.0,) * (2**codebook.bits - len(codebook.values))
    numbers = codebook.values + padding if values else codebook.thresholds
    return torch.tensor(numbers, dtype=torch.float32, device=device)


_kept_table = kept()(_new_table)


# ---- four bits ------------------------------------------------------------------------------------------------------

NF4 = Codebook.nearest(
    "nf4",
    _from_hex(
        "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
        "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
    ),
    source="Dettmers et al., QLoRA (2305.14314), appendix E: quantiles of N(0, 1), see `normal`",
)
"""NormalFloat 4: the float32 table that every implementation shares; ties go to the lower code."""

_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)  # by code

FP4 = Codebook(
    "fp4",
    tuple(_float32([*_FP4_MAGNITUDES, 0.0, *(-v for v in _FP4_MAGNITUDES[1:])]).tolist()),
    # The literals of bitsandbytes' CUDA kernel; five of the seven are not the float32 midpoints.
    tuple(_float32([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]).tolist()),
    order=(0, 1, 6, 7, 4, 5, 2, 3),
    sign_bit=True,
    source="bitsandbytes csrc/kernels.cu dQuantizeFP4: sign, two exponent bits, one mantissa bit, scaled to 1",
)
"""bitsandbytes' 4-bit float: sign and magnitude; -0.0 and everything that rounds to 0 from above is code 0."""


def _descending(name: str, ascending: Sequence[float], source: str) -> Codebook:
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
    _float32([i / 7 for i in (-7, -6, -5, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 5, 6, 7)]).tolist(),
    source="bitsandbytes get_4bit_type('int4'): sixteen codes from +7/7 down to -7/7, zero twice",
)
"""Symmetric integers over 7, from +1 down. Zero has two codes, 7 and 8; quantization uses 8, or 7 for numbers above 0."""


class Formats(dict[str, Codebook]):
    """4-bit codebooks by name. Setting another codebook under a name that has one raises ValueError: what was quantized under
    that name would decode to other values."""

    def __setitem__(self, name: str, book: Codebook) -> None:
        if four_bit(book).name != name or not name.replace("_", "x").isalnum():
            raise ValueError(f"a format has the name of its codebook, of letters, digits and underscores, got {name!r}")
        if self.get(name, book) != book:
            raise ValueError(f"the name {name!r} has another codebook already: give this one another name")
        super().__setitem__(name, book)


FOUR_BIT: dict[str, Codebook] = Formats({book.name: book for book in (NF4, FP4, AF4, INT4)})
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


# ---- families -------------------------------------------------------------------------------------------------------


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


@functools.cache
def linear(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Codebook:
    """Values in equal steps, by `linspace`: from -1 to 1, or from 0 to 1 if unsigned.

    add_zero: whether one code of a signed map of 8 bits is spent on 0; of fewer bits it always is. bitsandbytes' signed map has
    beside that 0 a 3.7e-9, which is what float32 linspace gives for the middle. Raises ValueError unless 2 <= total_bits <= 8.

    >>> linear(signed=False, total_bits=2).thresholds
    (0.1666666716337204, 0.4999999701976776, 0.8333333134651184)
    """
    if not 2 <= total_bits <= 8:
        raise ValueError(f"linear codebook needs 2 <= total_bits <= 8, got {total_bits}")
    spend = signed and (add_zero or total_bits < 8)
    values = linspace(-1.0 if signed else 0.0, 1.0, 2**total_bits - spend)
    listed = sorted(values.tolist() + [0.0] * spend)
    sign = "signed" if signed else "unsigned"
    return Codebook.nearest(f"linear-{sign}-{total_bits}", listed, "even", "linspace")


@functools.cache
def fp8(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2) -> Codebook:
    """The small floats of e = exponent_bits and p = precision_bits, scaled so that the largest is 1. With E and M the two fields:

        2^(bias + 1 - E) * (1 + M / 2^p)   for E > 0,        2^-bias * M / 2^p   for E = 0,      bias = 2^(e - 1)

    So a larger exponent field is a smaller value: this is bitsandbytes' convention, and not an OCP FP8 format. Raises ValueError
    for more than 8 bits, the sign included.

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
    scaled = _float32(sorted(values))
    sign = "s" if signed else "u"
    return Codebook.nearest(f"fp8-{sign}-e{exponent_bits}p{precision_bits}", (scaled / scaled.max()).tolist(), "even")


@functools.cache
def normal(offset: float = 0.9677083, use_extra_value: bool = True) -> Codebook:
    """The derivation of NF4 (QLoRA, 2305.14314, equation 4): zero, and quantiles of N(0, 1), scaled so that the largest is 1.

    offset: the probability of the largest quantile; ValueError unless it is between 0.5 and 1. use_extra_value: the positive side
    has eight values and the negative one seven; otherwise both have seven, 15 values in all.

    >>> normal().values == NF4.values
    True
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset must lie between 0.5 and 1, got {offset}")
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        return [quantile(p) for p in linspace(offset, 0.5, count).tolist()[:-1]]

    values = _float32(sorted([-v for v in side(8)] + [0.0] + side(9 if use_extra_value else 8)))
    return Codebook.nearest("normal", (values / values.max()).tolist(), source="2305.14314")
