"""A codebook: the values of a format, and the thresholds between them. NF4 and the others are in `bnbref.codebooks`.

It is two tables. The code of x is found by counting the thresholds strictly below x, so every rounding
convention is just another threshold table: a tie that goes to the even code moves a threshold by one ulp, and the
constants of a hand-written kernel are seven other thresholds.
"""

import functools
import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bnbref.arguments import check_bool, check_one_of
from bnbref.context import cached


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
        check_bool(f"sign_bit of codebook {self.name!r}", self.sign_bit)
        for label in ("values", "thresholds"):
            table = _numbers(f"{label} of codebook {self.name!r}", getattr(self, label))
            wrong = next((v for v in table if not (math.isfinite(v) and v == float(float32(v)))), None)
            if wrong is not None:
                near = f": the nearest is {float(float32(wrong))!r}" if math.isfinite(wrong) else ""
                raise ValueError(
                    f"{label} of codebook {self.name!r} must be finite float32 numbers, got {wrong!r}{near}"
                )
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
            order = _numbers(f"order of codebook {self.name!r}", self.order)
            if n > 16 or sorted(order) != list(range(ranks)):
                raise ValueError(
                    f"order of codebook {self.name!r} must be a permutation of {ranks} ranks of at most 16 values"
                )
            object.__setattr__(self, "order", tuple(map(int, order)))
        self._check_ranks(ranks)
        # Compared by the bits of its numbers, because -0.0 is equal to 0.0 and yet decodes to another float. The hash is kept:
        # codebooks are in the key of every kernel call, and hashing 511 floats each time would cost more than the look-up.
        tables = (struct.pack(f"{len(table)}f", *table) for table in (self.values, self.thresholds))
        identity = (self.name, *tables, self.order, self.sign_bit)
        object.__setattr__(self, "_identity", identity)
        object.__setattr__(self, "_hash", hash(identity))

    def _check_ranks(self, ranks: int) -> None:
        """ValueError unless each threshold lies between the values of the ranks beside it."""
        if self.sign_bit and any(-a != b for a, b in zip(self.values, self.values[ranks:], strict=False)):
            raise ValueError(f"the second half of the values of codebook {self.name!r} must be the first, negative")
        by_rank = [self.values[code] for code in self.order or range(ranks)]
        # A threshold may lie one ulp below the lower value: `ties="even"` puts it there if the values are neighbouring floats,
        # their midpoint is rounded to the lower one, and the tie goes to the upper one.
        below = float32(by_rank[:-1]).nextafter(float32(-math.inf)).tolist()
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
        """The number of bits that a code is stored in: 4 if it fits into a nibble, else 8."""
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
        table = float32(values)
        if table.numel() < 2 or not bool((table.diff() >= 0).all()):
            raise ValueError(f"values of codebook {name!r} must be at least two, sorted, got {list(values)}")
        middle = (table[:-1] + table[1:]) / 2
        if ties == "even":
            upper_is_even = torch.arange(middle.numel(), device="cpu") % 2 == 1
            middle = torch.where(upper_is_even, middle.nextafter(float32(-math.inf)), middle)
            middle = middle.cummax(0).values  # equal values (the zeros that pad a map of few bits) leave no room below
        elif ties != "lower":
            raise ValueError(f"ties must be 'lower' or 'even', got {ties!r}")
        return cls(name, tuple(table.tolist()), tuple(middle.tolist()), source=source)

    def nonzero(self) -> "Codebook":
        """The same values with another rule of rounding: a number above 0 never gets the code of 0, but that of the next value.

        Codes decode as before, and `is_table_of` does not tell the two apart. ValueError for codes that are not in the order of
        their values.

        >>> book = Codebook.nearest("quarters", [0, 0.25, 0.5, 0.75, 1])
        >>> book.thresholds, book.nonzero().thresholds
        ((0.125, 0.375, 0.625, 0.875), (0.0, 0.375, 0.625, 0.875))
        """
        if self.order is not None or self.sign_bit:
            raise ValueError(f"codebook {self.name!r} must have its codes in the order of its values")
        last = sum(v <= 0 for v in self.values) - 1
        thresholds = tuple(0.0 if i == last else t for i, t in enumerate(self.thresholds))
        return Codebook(f"{self.name}_nonzero", self.values, thresholds, source=self.source)


def _numbers(what: str, values: Any) -> tuple[float, ...]:
    try:
        # A tensor goes as a list, in which complex numbers stay what they are: float() takes their real part.
        return tuple(map(float, values.tolist() if isinstance(values, Tensor) else values))
    # The last of these: a meta or sparse tensor has no numbers.
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{what} must be a sequence of numbers, got {values!r}") from error


def float32(values: float | Sequence[float]) -> Tensor:
    """A float32 tensor on the CPU. Both are named, because models are loaded under other default devices and dtypes."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def value_table(codebook: Codebook, device: torch.device) -> Tensor:
    """`codebook.values` as a float32 tensor, padded by zeros to one entry for each of the 16 or 256 codes.  Exact.

    >>> from bnbref.codebooks import NF4
    >>> value_table(NF4, torch.device("cpu"))[7:9]
    tensor([0.0000, 0.0796])
    """
    return _table(codebook, True, device)


def is_table_of(values: Tensor, codebook: Codebook) -> bool:
    """Whether a table of values that was stored with codes is that of a codebook: each value within a relative 2^-19 of its own.

    It need not have the same bits, because the writer's torch may have computed the dynamic map without fused multiply-adds. Its
    linspace on [0.1, 1] then differs by 2^-23 at most, which relative to 0.1 is less than 2^-19. Neighbouring values of a map
    differ by 1 % or more.

    >>> from bnbref.codebooks import NF4
    >>> is_table_of(value_table(NF4, torch.device("cpu")), NF4), is_table_of(value_table(NF4, torch.device("cpu")).flip(0), NF4)
    (True, False)
    """
    if not values.is_floating_point():  # a cast takes the real part of a complex number
        return False
    own = value_table(codebook, torch.device("cpu"))
    found = values.detach().to("cpu", torch.float32)
    return found.shape == own.shape and bool(((found - own).abs() <= own.abs() * 2.0**-19).all())


def threshold_table(codebook: Codebook, device: torch.device) -> Tensor:
    """`codebook.thresholds` as a float32 tensor on a device.  Exact.

    >>> from bnbref.codebooks import NF4
    >>> threshold_table(NF4, torch.device("cpu"))[6:8]
    tensor([-0.0455,  0.0398])
    """
    return _table(codebook, False, device)


@cached()
def _table(codebook: Codebook, values: bool, device: torch.device) -> Tensor:
    check_one_of("codebook", codebook, Codebook)
    # One that is kept under None would be on the default device of its first call.
    check_one_of("device", device, torch.device)
    padding = (0.0,) * (2**codebook.bits - len(codebook.values))
    numbers = codebook.values + padding if values else codebook.thresholds
    return torch.tensor(numbers, dtype=torch.float32, device=device)
