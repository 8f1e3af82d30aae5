# ruff: noqa: E501, the tables of messages are as long as the messages
"""The tables, bit by bit, and the rules that make thresholds out of values."""

import copy
import hashlib
import math
import operator
import pickle
import struct
from fractions import Fraction

import numpy as np
import pytest
import second
import torch
from conftest import hexes, running, same_bits
from expecttest import assert_expected_inline
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bnbref
from bnbref import fourbit
from bnbref import functional as F
from bnbref.blockwise import count_below, encode
from bnbref.codebooks import (
    AF4,
    DYNAMIC,
    DYNAMIC_UNSIGNED,
    FOUR_BIT,
    FP4,
    INT4,
    NF4,
    Codebook,
    dynamic,
    four_bit,
    fp8,
    is_table_of,
    linear,
    normal,
    value_table,
)
from bnbref.kernels.counting import code_by_table, code_by_wide_table, code_table, wide_table

CPU = torch.device("cpu")
ALL = [*FOUR_BIT.values(), DYNAMIC, DYNAMIC_UNSIGNED, linear(), linear(False), fp8(), fp8(True, 4, 3), normal()]
each_codebook = pytest.mark.parametrize("book", ALL, ids=lambda book: book.name)


def table(values) -> str:
    """Eight hexadecimal words a line."""
    listed = hexes(torch.tensor(values, dtype=torch.float32)).split()
    return "\n".join(" ".join(listed[i : i + 8]) for i in range(0, len(listed), 8))


def bits_of(values) -> list[str]:
    return hexes(torch.as_tensor(values, dtype=torch.float32)).split()


# ---- values ---------------------------------------------------------------------------------------------------------


def test_nf4():
    assert_expected_inline(
        table(NF4.values),
        """\
bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000""",
    )
    assert_expected_inline(
        table(NF4.thresholds),
        """\
bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff
3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da""",
    )


def test_fp4():
    assert_expected_inline(
        table(FP4.values),
        """\
00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000
00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000""",
    )
    assert_expected_inline(
        table(FP4.thresholds),
        """\
3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555""",
    )
    assert (FP4.order, FP4.sign_bit) == ((0, 1, 6, 7, 4, 5, 2, 3), True)


def test_af4_and_int4_run_downwards():
    for book in (AF4, INT4):
        assert bits_of(book.values) == bits_of(second.VALUES[book.name]), book.name
        assert book.order == tuple(range(15, -1, -1))
        assert bits_of(book.thresholds) == bits_of(second.midpoints(second.VALUES[book.name][::-1]))
        assert F.get_4bit_type(book.name).tolist() == list(book.values)


MAPS = {
    "dynamic_signed": lambda: F.create_dynamic_map(),
    "dynamic_unsigned": lambda: F.create_dynamic_map(signed=False),
    "dynamic_signed_e4": lambda: F.create_dynamic_map(True, 4, 8),
    "dynamic(True, 7, 7)": lambda: F.create_dynamic_map(True, 7, 7),
    "dynamic(True, 3, 4)": lambda: F.create_dynamic_map(True, 3, 4),
    "linear_signed": lambda: F.create_linear_map(),
    "linear_unsigned": lambda: F.create_linear_map(signed=False),
    "linear_signed_nozero": lambda: F.create_linear_map(add_zero=False),
    "linear_signed_4bit": lambda: F.create_linear_map(total_bits=4),
    "fp8_s_e4p3t8": lambda: F.create_fp8_map(True, 4, 3, 8),
    "fp8_s_e5p2t8": lambda: F.create_fp8_map(True, 5, 2, 8),
    "fp8_u_e4p4t8": lambda: F.create_fp8_map(False, 4, 4, 8),
    "fp8_s_e2p1t4": lambda: F.create_fp8_map(True, 2, 1, 4),
    "fp8_s_e3p2t6": lambda: F.create_fp8_map(True, 3, 2, 6),
    "nf4": lambda: F.get_4bit_type("nf4"),
    "fp4": lambda: F.get_4bit_type("fp4"),
}


def test_every_table_of_the_reference_is_tested():
    assert set(MAPS) | {"nf4_thresholds", "fp4_thresholds"} == set(second._HEX)


@pytest.mark.parametrize("name", MAPS)
def test_map_is_bitsandbytes_bit_for_bit(name):
    made = MAPS[name]()
    assert made.dtype == torch.float32
    assert bits_of(made) == second._HEX[name]


@pytest.mark.parametrize(
    ("name", "book"),
    [("dynamic_signed", DYNAMIC), ("dynamic_unsigned", DYNAMIC_UNSIGNED), ("linear_signed", linear()),
     ("linear_unsigned", linear(False)), ("linear_signed_nozero", linear(add_zero=False)), ("fp8_s_e4p3t8", fp8(True, 4, 3)),
     ("fp8_s_e5p2t8", fp8()), ("fp8_u_e4p4t8", fp8(False, 4, 4)), ("dynamic_signed_e4", dynamic(True, 4))],
)  # fmt: skip
def test_codebook_of_256_is_the_map(name, book):
    assert bits_of(book.values) == second._HEX[name]


def test_dynamic_has_the_published_digest():
    """numerics.md 1.3: sha256 of the little-endian float32 bytes."""

    def digest(book: Codebook) -> str:
        return hashlib.sha256(struct.pack("<256f", *book.values)).hexdigest()

    assert digest(DYNAMIC) == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert digest(DYNAMIC_UNSIGNED) == "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"
    assert DYNAMIC is dynamic()
    assert DYNAMIC_UNSIGNED is dynamic(signed=False)


def test_normal_is_nf4():
    assert bits_of(normal().values) == second._HEX["nf4"]
    without = normal(use_extra_value=False)
    assert len(without.values) == 15
    assert bits_of(without.values) == bits_of(sorted(0.0 - v for v in without.values))


# ---- thresholds -----------------------------------------------------------------------------------------------------


@each_codebook
def test_thresholds_are_midpoints(book):
    """All but those that second.py writes down, as FP4's: the float32 midpoint, found in rational arithmetic; one ulp lower where the tie goes up to an even code."""
    written = second.THRESHOLDS.get(book.name)
    assert written is None or bits_of(book.thresholds) == bits_of(written)
    if written is not None and book is not NF4:  # whose written ones are midpoints
        return
    ties_even = len(book.values) > 16
    values = sorted(book.values)
    for i, (a, b, t) in enumerate(zip(values[:-1], values[1:], book.thresholds, strict=True)):
        middle = second.nearest_float32((Fraction(a) + Fraction(b)) / 2)
        lowered = np.nextafter(middle, np.float32(-np.inf)) if ties_even and i % 2 == 1 else middle
        assert np.float32(t) == lowered, (i, a, b)


def test_six_of_nf4s_thresholds_are_exact_midpoints():
    pairs = zip(NF4.values, NF4.values[1:], NF4.thresholds, strict=False)
    exact = [i for i, (a, b, t) in enumerate(pairs) if (Fraction(a) + Fraction(b)) / 2 == Fraction(t)]
    assert exact == [2, 6, 7, 9, 11, 13]


def test_fp4s_distance_from_the_midpoints():
    """numerics.md 1.2: CUDA's literals against the float32 midpoints of the magnitudes, in ulp."""
    magnitudes = second.midpoints(np.sort(second.VALUES["fp4"][:8]))
    literal = np.array(FP4.thresholds, dtype=np.float32)
    assert (literal.view(np.int32) - magnitudes.view(np.int32)).tolist() == [14, 0, -1, -1, 0, -6, -1]


def test_ties():
    lower = Codebook.nearest("lower", [0.0, 0.5, 1.0])
    even = Codebook.nearest("even", [0.0, 0.5, 1.0], ties="even")
    x = torch.tensor([0.25, 0.75])
    assert count_below(x, torch.tensor(lower.thresholds)).tolist() == [0, 1]
    assert count_below(x, torch.tensor(even.thresholds)).tolist() == [0, 2]


def test_equal_values_are_allowed():
    """bitsandbytes pads a map of few bits with zeros to 256 entries."""
    book = Codebook.nearest("padded", F.create_dynamic_map(True, 3, 4).tolist(), ties="even")
    x = torch.tensor([-1.0, -1e-3, 0.0, 1e-3, 0.55, 1.0])
    ranks = count_below(x, torch.tensor(book.thresholds)).tolist()
    distances = (torch.tensor(book.values) - x[:, None]).abs()
    assert [book.values[r] for r in ranks] == [book.values[d.argmin()] for d in distances]


@each_codebook
def test_every_value_has_its_own_code(book):
    """Decoding and encoding a value gives a code of the same value; zeros excepted, all codes are reached."""
    values = torch.tensor(book.values)
    if book.bits == 4:
        codes = encode(values, book).tolist()
    else:
        codes = count_below(values, torch.tensor(book.thresholds)).tolist()
    assert [book.values[c] for c in codes] == list(book.values)
    twins = len(book.values) - len(set(book.values))
    assert len(set(codes)) == len(book.values) - twins


@each_codebook
def test_code_of_zero_decodes_to_zero(book):
    has_zero = 0.0 in book.values
    assert (book.values[book.code_of_zero] == 0.0) == has_zero
    zero = torch.tensor([0.0, -0.0])
    if book.bits == 4:
        assert encode(zero, book).tolist() == [book.code_of_zero] * 2
    else:
        assert count_below(zero, torch.tensor(book.thresholds)).tolist() == [book.code_of_zero] * 2


def test_codes_of_zero():
    assert [(b.name, b.code_of_zero) for b in (NF4, FP4, AF4, INT4, DYNAMIC, DYNAMIC_UNSIGNED)] == [
        ("nf4", 7), ("fp4", 0), ("af4", 8), ("int4", 8), ("dynamic-signed-7-8", 127), ("dynamic-unsigned-7-8", 0)
    ]  # fmt: skip


SEVENTEEN = [i / 16 for i in range(17)]


def test_value_table_is_padded_by_zeros():
    assert value_table(Codebook.nearest("three", [-1, 0, 1]), CPU).tolist() == [-1.0, 0.0, 1.0] + [0.0] * 13
    assert value_table(Codebook.nearest("seventeen", SEVENTEEN), CPU).tolist() == SEVENTEEN + [0.0] * 239


# ---- a user's codebook ----------------------------------------------------------------------------------------------


@st.composite
def codebooks(draw, most: int = 256):
    """Any sorted float32 values, neighbours and equal ones too; now and then a descending order or a sign bit."""
    tiny = st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-149)])
    finite = st.floats(-(2.0**-100), 2.0**-100, width=32) | st.floats(-1, 1, width=32) | tiny
    values = sorted(draw(st.lists(finite, min_size=2, max_size=most)))
    ties = draw(st.sampled_from(["lower", "even"]))
    return Codebook.nearest("mine", values, ties)


@example(Codebook("minus zero", (-1.0, 0.0, 1.0), (-0.0, 0.5)), [])
@example(Codebook.nearest("ternary", [-1.0, 0.0, 1.0]), [float("nan"), -float("nan")])
@example(Codebook.nearest("few thresholds, few cells", [0.0, 0.5]), [math.nan, -math.nan])
@given(codebooks(), st.lists(st.floats(width=32), max_size=20))
def test_any_codebook_counts_its_thresholds(book, xs):
    """The definition and, where their tables exist, the look-ups that stand in for it, against a plain loop."""
    near = [np.nextafter(np.float32(t), np.float32(d)) for t in book.thresholds for d in (np.inf, -np.inf)]
    x = torch.tensor([*xs, *book.thresholds, *map(float, near), 0.0, -0.0])
    want = [sum(t < v for t in book.thresholds) for v in x.tolist()]
    assert count_below(x, torch.tensor(book.thresholds)).tolist() == want
    table = code_table(book, CPU)
    if table is not None:
        assert code_by_table(x, table).tolist() == encode(x, book).tolist()
    wide, x = wide_table(book, CPU), x[~x.isinf()]
    if wide is not None:
        assert code_by_wide_table(x, wide).tolist() == encode(x, book).tolist()


@given(codebooks(16), st.booleans(), st.randoms(use_true_random=False))
def test_any_order_and_sign(book, sign_bit, random):
    """Four bits: codes are a permutation of ranks, and the sign is the upper half."""
    magnitudes = sorted(map(abs, book.values))[: len(book.values) // 2]
    sign_bit = sign_bit and len(magnitudes) > 1
    by_rank, thresholds = book.values, book.thresholds
    if sign_bit:
        by_rank, thresholds = magnitudes, Codebook.nearest("half", magnitudes).thresholds
    ranks = len(by_rank)
    order = list(range(ranks))
    random.shuffle(order)
    values = [by_rank[order.index(code)] for code in range(ranks)]
    values += [-v for v in values] if sign_bit else []
    mine = Codebook("mine", tuple(values), thresholds, order=tuple(order), sign_bit=sign_bit)
    x = torch.tensor(
        [*thresholds, *(-t for t in thresholds), 0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.5]
    )
    want = []
    for v in x.tolist():
        rank = sum(t < (abs(v) if sign_bit else v) for t in thresholds)
        want.append(order[rank] + (ranks if sign_bit and v < 0 else 0))
    assert encode(x, mine).tolist() == want


@given(codebooks(16), st.integers(1, 70), st.booleans())
def test_any_codebook_goes_through_the_kernels(book, n, even):
    blocksize = 24 if even else 5
    width = blocksize * fourbit.row_blocks(blocksize)
    rows = torch.nn.functional.pad(torch.linspace(-2, 2, n), (0, -n % width)).view(-1, width)
    kernel = fourbit.quantize_rows
    packed, absmax = kernel.body(rows, blocksize=blocksize, codebook=book)
    want, want_absmax = kernel.definition(rows, blocksize=blocksize, codebook=book)
    assert torch.equal(packed, want)
    assert torch.equal(absmax, want_absmax)


def judged_by_values(book, downwards):
    """second.py needs nothing but these for a format of the package: CONTRIBUTING, Adding a codebook."""
    mine = Codebook.nearest("added", book.values)
    if downwards and mine.values[0] < mine.values[-1]:
        order = tuple(reversed(range(len(mine.values))))
        mine = Codebook("added", mine.values[::-1], mine.thresholds, order=order)
    second.add_four_bit("added", mine.values)
    try:
        near = [np.nextafter(np.float32(t), np.float32(d)) for t in mine.thresholds for d in (np.inf, -np.inf)]
        x = np.array([*mine.thresholds, *near, *mine.values, 0.0, -0.0, np.nan, 1.0, 0.3], dtype=np.float32)
        packed, absmax = fourbit.quantize(torch.from_numpy(x), mine, 16)
        want, scales = second.quantize_4bit("added", x, 16)
        assert packed.flatten().tolist() == want
        assert absmax.tolist() == scales.tolist()
        codes = second.unpack(want, len(x))
        decoded = second.dequantize(second.VALUES["added"], codes, scales, 16, torch.float32)
        assert same_bits(fourbit.dequantize(packed, absmax, mine, 16, (len(x),), torch.float32), decoded)
    finally:
        del second.FOUR_BIT["added"], second.VALUES["added"]


@given(codebooks(16), st.booleans())
def test_a_format_that_is_added_is_judged_by_its_values(book, downwards):
    with bnbref.eager():
        judged_by_values(book, downwards)


@settings(max_examples=5)
@given(codebooks(16), st.booleans())
def test_a_format_that_is_added_is_judged_by_its_values_compiled(book, downwards):
    """Each has kernels of its own, which take seconds to compile."""
    judged_by_values(book, downwards)


@pytest.mark.slow
@settings(max_examples=50)
@given(codebooks(16), st.booleans())
def test_many_formats_that_are_added_are_judged_compiled(book, downwards):
    judged_by_values(book, downwards)


def test_two_to_256_values():
    for n in (2, 3, 15, 16, 17, 255, 256):
        book = Codebook.nearest("n", [i / n for i in range(n)])
        assert (len(book.thresholds), book.bits) == (n - 1, 4 if n <= 16 else 8)


def test_codebooks_are_compared_by_value():
    again = Codebook(NF4.name, NF4.values, NF4.thresholds, source="elsewhere")
    assert hash(again) == hash(NF4)
    assert {NF4: 1}.get(Codebook(NF4.name, NF4.values, NF4.thresholds, source=NF4.source)) == 1
    other = Codebook(NF4.name, NF4.values, tuple(np.nextafter(np.float32(t), np.float32(1)) for t in NF4.thresholds))
    assert other != NF4
    ints = Codebook("ints", (-1, 0, 1), [-0.5, 0.5])  # as the kernels' constants they are floats
    assert ints == Codebook("ints", (-1.0, 0.0, 1.0), (-0.5, 0.5))
    assert {type(v) for v in ints.values + ints.thresholds} == {float}


def test_minus_zero_is_another_value(mode):
    """It is equal to 0.0, and decodes to another float: neither table nor kernel is shared."""
    books = [Codebook.nearest("zero", [-1.0, zero, 1.0]) for zero in (0.0, -0.0)]
    assert books[0] != books[1]
    with running(mode):
        for book, sign in zip(books, (0, 1), strict=True):
            packed, state = F.quantize_4bit(torch.tensor([0.0, 1.0]), quant_type=book)
            assert torch.signbit(F.dequantize_4bit(packed, state)).tolist() == [sign, 0]
            assert torch.signbit(value_table(book, CPU)[1]) == sign


# ---- errors ---------------------------------------------------------------------------------------------------------


def error(function, *args, **kwargs) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*args, **kwargs)
    return str(caught.value).replace(str(sorted(FOUR_BIT)), "[formats]")


def test_errors():
    messages = [
        error(Codebook, "one", (0.0,), ()),
        error(Codebook, "many", (0.0,) * 257, (0.0,) * 256),
        error(Codebook, "few", (0.0, 1.0), ()),
        error(Codebook, "signed", (0.0, 1.0), (0.5,), sign_bit=True),
        error(Codebook, "double", (0.0, 0.1), (0.5,)),
        error(Codebook, "nan", (0.0, 1.0), (float("nan"),)),
        error(Codebook, "inf", (0.0, float("inf")), (0.5,)),
        error(Codebook, "unsorted", (0.0, 0.5, 1.0), (0.75, 0.25)),
        error(Codebook, "order", (0.0, 1.0), (0.5,), order=(0, 0)),
        error(Codebook, "long", tuple(SEVENTEEN), tuple(SEVENTEEN[1:]), order=tuple(range(17))),
        error(Codebook, "", (0.0, 1.0), (0.5,)),
        error(Codebook, "large", (-4.0, 0.0, 1.0), (-2.0, 0.5)),
        error(Codebook.nearest, "hundreds", range(-127, 128)),
        error(Codebook, "outside", (0.0, 0.5, 1.0), (0.25, 1.5)),
        error(Codebook, "beside", (0.0, 0.5, 1.0), (0.625, 0.75)),
        error(Codebook, "not by rank", (0.0, 0.5, 1.0), (0.25, 0.75), order=(0, 2, 1)),
        error(Codebook, "signs", (0.0, 1.0, 0.0, 1.0), (0.5,), sign_bit=True),
        error(F.quantize_blockwise, torch.ones(3), torch.tensor([-2.0, 0.0, 2.0])),
        error(F.quantize_blockwise, torch.ones(3), torch.zeros(2, 3)),
        error(F.quantize_blockwise, torch.ones(3), "nf4"),
        error(Codebook.nearest, "strings", ["a", "b"]),
        error(Codebook.nearest, "nothing", None),
        error(Codebook, "lists", [[0.0], [1.0]], (0.5,)),
        error(Codebook.nearest, "complex", torch.tensor([0j, 1 + 1j])),
        error(Codebook.nearest, "meta", torch.ones(2, device="meta")),
        error(Codebook.nearest, "huge", [0, 10**39, 10**400])[:70],
        error(Codebook.nearest, "down", [1, 0]),
        error(Codebook.nearest, "alone", [1]),
        error(Codebook.nearest, "nan", [0.0, float("nan")]),
        error(Codebook.nearest, "tie", [0, 1], ties="upper"),
        error(four_bit, "nf5"),
        error(four_bit, DYNAMIC),
        error(four_bit, None),
        error(dynamic, True, 8, 7),
        error(dynamic, True, 7, 9),
        error(linear, True, 1),
        error(fp8, True, 5, 3),
        error(fp8, True, 0, 2),
        error(normal, 0.5),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
codebook 'one' must have 2 to 256 values, got 1
codebook 'many' must have 2 to 256 values, got 257
codebook 'few' needs 1 thresholds, got 0
codebook 'signed' needs 0 thresholds, got 1
values of codebook 'double' must be finite float32 numbers, got 0.1: the nearest is 0.10000000149011612
thresholds of codebook 'nan' must be finite float32 numbers, got nan
values of codebook 'inf' must be finite float32 numbers, got inf
thresholds of codebook 'unsorted' must be sorted, got (0.75, 0.25)
order of codebook 'order' must be a permutation of 2 ranks of at most 16 values
order of codebook 'long' must be a permutation of 17 ranks of at most 16 values
a codebook must have a name, got ''
values of codebook 'large' must lie in [-1, 1], as the largest magnitude of a block is scaled to 1: divide them by 4.0
values of codebook 'hundreds' must lie in [-1, 1], as the largest magnitude of a block is scaled to 1: divide them by 127.0
thresholds of codebook 'outside' must lie between its values, in the order of their ranks: 1.5 does not lie between 0.4999999701976776 and 1.0
thresholds of codebook 'beside' must lie between its values, in the order of their ranks: 0.625 does not lie between -1.401298464324817e-45 and 0.5
thresholds of codebook 'not by rank' must lie between its values, in the order of their ranks: 0.75 does not lie between 0.9999999403953552 and 0.5
the second half of the values of codebook 'signs' must be the first, negative
values of codebook 'code' must lie in [-1, 1], as the largest magnitude of a block is scaled to 1: divide them by 2.0
code must be a Codebook or a tensor of sorted values in one dimension, got torch.float32 (2, 3)
code must be a torch.Tensor or Codebook or None, got 'nf4'
values of codebook 'strings' must be a sequence of numbers, got ['a', 'b']
values of codebook 'nothing' must be a sequence of numbers, got None
values of codebook 'lists' must be a sequence of numbers, got [[0.0], [1.0]]
values of codebook 'complex' must be a sequence of numbers, got tensor([0.+0.j, 1.+1.j])
values of codebook 'meta' must be a sequence of numbers, got tensor(..., device='meta', size=(2,))
values of codebook 'huge' must be a sequence of numbers, got [0, 10000
values of codebook 'down' must be at least two, sorted, got [1.0, 0.0]
values of codebook 'alone' must be at least two, sorted, got [1.0]
values of codebook 'nan' must be at least two, sorted, got [0.0, nan]
ties must be 'lower' or 'even', got 'upper'
quant_type must be one of [formats] or a Codebook of at most 16 values, got 'nf5'
quant_type must be one of [formats] or a Codebook of at most 16 values, got codebook 'dynamic-signed-7-8' of 256 values
quant_type must be one of [formats] or a Codebook of at most 16 values, got None
dynamic codebook needs 2 <= total_bits <= 8 and 1 <= max_exponent_bits <= total_bits, got total_bits=7, max_exponent_bits=8
dynamic codebook needs 2 <= total_bits <= 8 and 1 <= max_exponent_bits <= total_bits, got total_bits=9, max_exponent_bits=7
linear codebook needs 2 <= total_bits <= 8, got 1
fp8 codebook needs 1 <= exponent_bits <= 7 and at most 8 bits with the sign, got exponent_bits=5, precision_bits=3, signed=True
fp8 codebook needs 1 <= exponent_bits <= 7 and at most 8 bits with the sign, got exponent_bits=0, precision_bits=2, signed=True
offset must lie between 0.5 and 1, got 0.5""",
    )


def test_a_name_keeps_its_codebook(monkeypatch):
    """What was quantized under a name would decode to the values of another codebook."""
    mine = Codebook.nearest("mine", [-1, 0, 1])
    monkeypatch.setitem(FOUR_BIT, "mine", mine)
    FOUR_BIT["mine"] = Codebook.nearest("mine", [-1, 0, 1])  # the same again
    with pytest.raises(ValueError, match="another codebook already"):
        FOUR_BIT["mine"] = Codebook.nearest("mine", [-1, 0, 0.5, 1])
    del FOUR_BIT["mine"]  # as in a notebook whose cell is run again: layers of the first are still there
    with pytest.raises(ValueError, match="another codebook already"):
        FOUR_BIT["mine"] = Codebook.nearest("mine", [-1, 0, 0.5, 1])
    FOUR_BIT["mine"] = mine
    with pytest.raises(ValueError, match="has the name of its codebook"):
        FOUR_BIT["yours"] = mine
    with pytest.raises(ValueError, match="letters, digits"):
        FOUR_BIT["my-own"] = Codebook.nearest("my-own", [-1, 0, 1])
    with pytest.raises(ValueError, match="at most 16 values"):
        FOUR_BIT["dynamic"] = DYNAMIC
    with pytest.raises(ValueError, match="and not 'int8' or 'plain', got 'int8'"):  # LLM.int8() in a configuration
        FOUR_BIT["int8"] = Codebook.nearest("int8", [-1, 0, 1])


def test_a_codebook_of_the_package_stays():
    for way in (lambda: FOUR_BIT.pop("nf4"), FOUR_BIT.clear, lambda: operator.delitem(FOUR_BIT, "nf4")):
        with pytest.raises(ValueError, match="a codebook of bnbref's own, which stays"):
            way()
    assert repr(FOUR_BIT).startswith("Formats(nf4, fp4, ")


def test_no_way_of_a_dict_passes_the_checks():
    other = {"nf4": Codebook.nearest("nf4", [-1, 0, 1])}
    bad = Codebook.nearest("a/b", [-1, 0, 1])
    for change in (FOUR_BIT.update, lambda x: operator.ior(FOUR_BIT, x)):
        with pytest.raises((ValueError, TypeError)):
            change(other)
    with pytest.raises(ValueError, match="got 'a/b'"):
        FOUR_BIT.setdefault("a/b", bad)
    assert FOUR_BIT["nf4"] is NF4
    assert "a/b" not in FOUR_BIT


@given(st.from_regex(r"\A\w{1,12}\Z").filter(lambda name: name not in {*FOUR_BIT, "int8", "plain"}), st.booleans())
@example("a__b", True)
@example("_", False)
@example("quant_map", True)
def test_a_state_of_a_codebook_of_any_name_is_saved_and_read(name, double):
    """By its key alone and by that of a weight; and one that is made before its codebook has a name."""
    book = Codebook.nearest(name, [-1, -0.3, 0, 0.5, 1])
    with running("eager"):
        _, early = F.quantize_4bit(torch.linspace(-1, 2, 300), quant_type=book, compress_statistics=double)
        try:
            FOUR_BIT[name] = book
        except ValueError:  # \w has more than letters, digits and underscores
            assert not name.replace("_", "x").isalnum()
            return
        try:
            _, state = F.quantize_4bit(torch.linspace(-1, 2, 300), quant_type=name, compress_statistics=double)
            for packed in (True, False):
                saved = state.as_dict(packed)
                assert F.QuantState.from_dict(saved, "cpu") == state
                assert F.QuantState.from_dict({f"a.weight.{key}": x for key, x in saved.items()}, "cpu") == state
                assert F.QuantState.from_dict(early.as_dict(packed), "cpu") == state
        finally:
            del FOUR_BIT[name]


@settings(max_examples=2)
@given(codebooks(), st.integers(1, 300), st.sampled_from([1, 5, 24]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_codebook_has_the_same_bits_in_compiled_blocks(book, n, blocksize, dtype):
    x = (torch.linspace(-2, 2, n) ** 3).to(dtype)
    found = []
    for how in ("eager", "compiled"):
        with running(how):
            codes, state = F.quantize_blockwise(x, code=book, blocksize=blocksize)
            found.append((codes, state.absmax, F.dequantize_blockwise(codes, state)))
    assert same_bits(*found)
    alone = F.dequantize_blockwise(codes, absmax=state.absmax, code=book, blocksize=blocksize)
    assert same_bits(alone.to(dtype), found[0][2])


def test_a_codebook_is_pickled_by_what_it_is_made_of():
    data = pickle.dumps(NF4)
    assert b"_hash" not in data  # which is that of one process
    assert pickle.loads(data) == NF4 == copy.deepcopy(NF4)
    assert hash(pickle.loads(data)) == hash(NF4)


def test_four_bit_by_name():
    assert {"nf4": NF4, "fp4": FP4, "af4": AF4, "int4": INT4}.items() <= FOUR_BIT.items()
    assert all(four_bit(name) is book and four_bit(book) is book for name, book in FOUR_BIT.items())


@pytest.mark.parametrize("book", [DYNAMIC, DYNAMIC_UNSIGNED, linear(False), fp8()], ids=lambda book: book.name)
def test_nonzero_moves_one_threshold(book):
    """Between 0 and the first threshold above it a code is one higher, by the definition and by both tables; else it is the same."""
    other = book.nonzero()
    first = min(t for t in book.thresholds if t > 0)
    points = torch.tensor([*book.thresholds, 2.0**-149, 2.0**-126, first, 0.0, -0.0, 1.0, -1.0, math.inf, -math.inf])
    x = torch.cat([points, *(points.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))])
    x = torch.cat([x, torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()])
    want = encode(x, book) + ((x > 0) & (x <= first))
    assert torch.equal(encode(x, other), want)
    assert torch.equal(code_by_table(x, code_table(other, CPU)), want.int())
    finite = x.isfinite()
    assert torch.equal(code_by_wide_table(x[finite], wide_table(other, CPU)), want[finite].int())
    assert other != book
    assert (other.values, other.code_of_zero) == (book.values, book.code_of_zero)
    assert is_table_of(value_table(book, CPU), other)
    with pytest.raises(ValueError, match="'fp4' must have its codes in the order of its values"):
        FP4.nonzero()
