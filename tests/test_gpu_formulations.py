"""What is compiled for a GPU, run uncompiled on the CPU: the same bits as the definition, table by table."""

import math

import pytest
import torch
from conftest import as_on_gpu

from bnbref import blockwise, fourbit, linear4bit
from bnbref.blockwise import encode
from bnbref.codebooks import AF4, DYNAMIC, DYNAMIC_UNSIGNED, FP4, INT4, NF4, linear
from bnbref.kernels.counting import code_by_table, code_table, float_of

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


@pytest.mark.parametrize(
    ("book", "bits"), [*((b, 4) for b in FOUR_BIT), *((b, 8) for b in EIGHT_BIT)], ids=lambda x: getattr(x, "name", x)
)
def test_codes_of_cells(book, bits):
    table = code_table(book, CPU, bits)
    t = torch.tensor([*book.thresholds, 0.0, -0.0, 1.0, 1e-45, 2.0**-126])
    t = torch.cat([t, t.nextafter(torch.tensor(2.0)), t.nextafter(torch.tensor(-2.0))])
    cells = torch.arange(table.numel()) << (32 - (table.numel().bit_length() - 1))
    edges = torch.cat([float_of(cells), float_of(cells - 1)])
    x = torch.cat(
        [t, -t, edges[edges.abs() < math.inf], torch.rand(10**5) * 2 - 1, torch.tensor([math.nan, -math.nan])]
    )
    assert torch.equal(code_by_table(x, table, bits), encode(x, book).to(torch.int32))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_by_words(dtype, with_bias):
    n, k = 6, 128
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    absmax, a = torch.rand(n, k // 64), torch.randn(k).to(dtype)
    bias = torch.randn(n).to(dtype) if with_bias else None
    constants = {"blocksize": 64, "codebook": NF4, "dtype": dtype}
    weight = fourbit.dequantize_rows.definition(packed, absmax, **constants).double()
    exact, size = weight @ a.double(), weight.abs() @ a.double().abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    # k products and the bias, summed in float32 in some order, and one rounding to dtype of at most 1.01 times the size.
    bound = 1.01 * ((k + 1) * 2.0**-24 + torch.finfo(dtype).eps / 2) * size
    columns = a.view(-1, 8).t().contiguous()
    with as_on_gpu():
        on_gpu = linear4bit.multiply_row.body(columns, packed, absmax, bias, **constants)
    for run in (linear4bit.multiply_row.definition, linear4bit.multiply_row.body):
        for got in (on_gpu, run(columns, packed, absmax, bias, **constants)):
            assert got.dtype == dtype
            assert ((got.double() - exact).abs() <= bound).all()
