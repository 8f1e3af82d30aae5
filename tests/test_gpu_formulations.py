"""What is compiled for a GPU, run uncompiled on the CPU: the same bits as the definition, table by table."""

import math
from unittest import mock

import pytest
import torch
from conftest import as_on_gpu, same_bits
from einops import rearrange

from bnbref import blockwise, few_rows, fourbit
from bnbref import nested as nested_scales
from bnbref.blockwise import encode
from bnbref.codebooks import AF4, DYNAMIC, DYNAMIC_UNSIGNED, FP4, INT4, NF4, linear, value_table
from bnbref.kernels import multiplying
from bnbref.kernels.counting import code_by_table, code_by_wide_table, code_table, float_of, wide_table
from bnbref.optim import rules
from bnbref.optim import step as steps
from bnbref.optim.equation import at_step
from bnbref.selfcheck.kernels import GROUP

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOUR_BIT = (NF4, FP4, INT4, AF4)
EIGHT_BIT = (DYNAMIC, DYNAMIC_UNSIGNED, linear())


def nasty(rows, width, dtype, thresholds):
    """Thresholds and their neighbours in a block whose largest magnitude is 1, and blocks that break scales."""
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    points = torch.tensor(thresholds)
    points = torch.cat([p * s for p in (points, points.nextafter(up), points.nextafter(down)) for s in (1, -1)])
    x = torch.randn(rows * width, generator=torch.Generator().manual_seed(0))
    x[: points.numel()] = points
    x = x.view(rows, width)
    x[: points.numel() // width + 1, 0] = 1
    x[-7:, :] = torch.tensor([0.0, -0.0, math.nan, math.inf, 1e-39, 1e-45, 3e38])[:, None]
    x[-9, 1::3], x[-8, 2] = math.nan, -math.inf
    x[-10] *= 1e-37
    return x.to(dtype)


def bits(x):
    return x.contiguous().view(torch.uint8)


def special(book, bits):
    """Thresholds, the edges of 2^bits cells, and NaN, with their neighbours and of both signs; and numbers at random."""
    t = torch.tensor([*book.thresholds, 0.0, -0.0, 1.0, 1e-45, 2.0**-126])
    t = torch.cat([t, t.nextafter(torch.tensor(2.0)), t.nextafter(torch.tensor(-2.0))])
    cells = torch.arange(2**bits) << (32 - bits)
    edges = torch.cat([float_of(cells), float_of(cells - 1)])
    ends = torch.tensor([math.nan, -math.nan, math.inf, -math.inf])
    return torch.cat([t, -t, edges, torch.rand(10**5) * 2 - 1, ends])


@pytest.mark.parametrize(
    ("book", "bits"), [*((b, 4) for b in FOUR_BIT), *((b, 8) for b in EIGHT_BIT)], ids=lambda x: getattr(x, "name", x)
)
def test_codes_of_cells(book, bits):
    table = code_table(book, CPU, bits)
    x = special(book, table.numel().bit_length() - 1)
    assert torch.equal(code_by_table(x, table, bits), encode(x, book).to(torch.int32))


@pytest.mark.parametrize("book", [NF4, *EIGHT_BIT], ids=lambda book: book.name)
def test_codes_of_wide_cells(book):
    table = wide_table(book, CPU)
    x = special(book, table.numel().bit_length() - 1)
    x = x * 1.0  # a product is no signalling NaN
    assert torch.equal(code_by_wide_table(x, table), encode(x, book).to(torch.int32))


def test_which_tables_there_are():
    """A wide one for elements of 16 bits, in blocks of whole lanes; the others, and orders and signs, as ever."""
    with as_on_gpu():
        for book, dtype, blocksize, want in (
            (NF4, torch.bfloat16, 64, torch.int64), (NF4, torch.float16, 12, torch.int64), (NF4, torch.bfloat16, 6, None),
            (NF4, torch.float32, 64, torch.int32), (FP4, torch.bfloat16, 64, torch.int32), (AF4, torch.bfloat16, 12, None),
        ):  # fmt: skip
            x = torch.ones(2, blocksize, dtype=dtype)
            tables = fourbit.quantize_rows.tables(x, blocksize=blocksize, codebook=book)
            assert [t.dtype for t in tables] == ([] if want is None else [want])
        for dtype, blocksize, want in ((torch.float16, 256, torch.int64), (torch.float16, 6, torch.int32)):
            (table,) = blockwise.quantize_blocks.tables(torch.ones(2, blocksize, dtype=dtype), codebook=DYNAMIC)
            assert table.dtype == want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", FOUR_BIT, ids=lambda book: book.name)
@pytest.mark.parametrize("blocksize", [64, 24, 2])
def test_four_bit(book, dtype, blocksize):
    width = blocksize * fourbit.row_blocks(blocksize)
    x = nasty(40, width, dtype, book.thresholds)
    constants = {"blocksize": blocksize, "codebook": book}
    want = fourbit.quantize_rows.definition(x, **constants)
    with as_on_gpu():
        got = fourbit.quantize_rows.body(x, **constants)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    packed = torch.arange(256, dtype=torch.uint8).repeat(blocksize)[: 8 * width].view(-1, width // 2)
    scales = torch.rand(packed.shape[0], fourbit.row_blocks(blocksize)) * 2
    scales[:3] = torch.tensor([math.nan, math.inf, 1e-41])[:, None]
    want = fourbit.dequantize_rows.definition(packed, scales, **constants, dtype=dtype)
    with as_on_gpu():
        got = fourbit.dequantize_rows.body(packed, scales, **constants, dtype=dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(bits(got.nan_to_num(1.5)), bits(want.nan_to_num(1.5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("book", EIGHT_BIT, ids=lambda book: book.name)
@pytest.mark.parametrize("blocksize", [256, 24])
def test_eight_bit(book, dtype, blocksize):
    x = nasty(200, blocksize, dtype, book.thresholds)
    want = blockwise.quantize_blocks.definition(x, codebook=book)
    with as_on_gpu():
        got = blockwise.quantize_blocks.body(x, codebook=book)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("rule", [rules.Adam(), rules.Lion()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps(rule, dtype):
    """By tables of 64 bits and the maximum of bits; scales may be anything, a negative NaN too."""
    equation, hyper = at_step(rule, 1, GROUP)
    blocks = 60
    p, g = nasty(blocks, 256, dtype, DYNAMIC.thresholds), nasty(blocks, 256, dtype, DYNAMIC.thresholds).flip(0)
    scales = torch.tensor([0.0, 1.0, 1e-3, math.nan, -math.nan, math.inf, 1e-41, -1.0, 3e38]).repeat(blocks)
    states = []
    for i in range(len(rule.states)):
        states += [torch.arange(256, dtype=torch.uint8).roll(7 * i).repeat(blocks, 1), scales[i : i + blocks].clone()]
    want = steps.step_blocks.definition(p, g, hyper, None, *states, rule=equation)
    with as_on_gpu():
        assert all(t.dtype == torch.int64 for t in steps.step_blocks.tables(p, g, hyper, None, *states, rule=equation))
        got = steps.step_blocks.body(p, g, hyper, None, *states, rule=equation)
    assert all(same_bits(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("m", "n"), [(3, 6), (3, 1024), (6, 1024)])  # enough rows of the weight for groups of four
def test_rows_by_words(dtype, nested, m, n):
    k = 128
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    absmax, a, bias = torch.rand(n, k // 64), torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    second = ()
    if nested:
        codes, absmax2, offset = nested_scales.quantize(absmax.view(-1))
        second = absmax2, value_table(DYNAMIC, CPU), offset
        absmax = nested_scales.dequantize(codes, *second).view(n, k // 64)
    weight = fourbit.dequantize_rows.definition(packed, absmax, blocksize=64, codebook=NF4, dtype=torch.float32)
    weight = weight.double()
    exact = a.double() @ weight.t() + bias.double()
    size = a.double().abs() @ weight.abs().t() + bias.double().abs()
    # k products of three factors and the bias, summed in float32 in some order: k + 5 roundings. Values of codes are float16 for
    # 16-bit activations. One rounding to dtype of at most 1.01 times the size.
    values = 0.0 if dtype == torch.float32 else 2.0**-11
    bound = 1.01 * ((k + 5) * 2.0**-24 + values + torch.finfo(dtype).eps / 2) * size
    columns = rearrange(a, "m k -> m 1 k")
    scales = codes.view(n, k // 64) if nested else absmax
    arguments = (columns, packed.view(torch.int32), scales, bias, *second)
    constants = {"blocksize": 64, "blocksize2": 256, "codebook": NF4, "dtype": dtype}
    with as_on_gpu(), mock.patch.object(multiplying, "is_gpu", return_value=True):
        on_gpu = few_rows.multiply_rows.body(*arguments, **constants)
    for got in (on_gpu, few_rows.multiply_rows.definition(*arguments, **constants)):
        assert got.dtype == dtype
        assert ((got.squeeze(1).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("m", "columns", "warps"), [(1, 64, 2), (2, 64, 2), (3, 32, 1), (8, 32, 1)])
def test_few_rows_have_the_configuration_that_was_timed(m, columns, warps):
    """The table "configurations of few rows" of docs/content/reading.md."""
    own = few_rows.multiply_rows.formulation.options("cuda", [torch.empty(m, 1, 64)], {})
    assert own["inductor_choices_class"].args == (1, warps, columns, None)
