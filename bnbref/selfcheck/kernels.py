"""Every exact kernel on the inputs that find trouble.

The inputs are all numbers of sixteen bits, NaN and infinities among them; each threshold and the floats beside it, at scales
from 2^-127 to the largest float32; all codes times all scales of sixteen bits; three steps of every optimizer.
tests/test_exactness.py derives the digests with numpy and integers. Devices agree about which results are NaN, not about the
bits of a NaN: before a digest is taken, all of them are made the same.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bnbref import blockwise, few_rows, fourbit, int8, nested
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, FP4, NF4, value_table
from bnbref.kernels import ordered
from bnbref.optim.equation import at_step
from bnbref.optim.rules import RULES, Rule
from bnbref.optim.update import directions, new_state, step
from bnbref.selfcheck import Check, Outputs, example
from bnbref.selfcheck.formats import INT8_THRESHOLDS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")

# In a block of absmax 3.77 a division by it has other codes than the product with its reciprocal; 127 / 1.455 and
# 127 * (1 / 1.455) are two floats; below 2^-126 and 2^-121 a scale is 0.
SCALES = (
    2.0**-127, 2.0**-126, 2.0**-121, 1 / 3, 1.0, 1.4554425477981567, 3.7727534770965576, 2.0**126, 3.4028234663852886e38,
)  # fmt: skip


def sixteen_bits(dtype: torch.dtype) -> Tensor:
    """All 2^16 numbers of bfloat16 or float16, in the order of their bits."""
    return torch.arange(2**16, dtype=torch.int32, device=CPU).to(torch.int16).view(dtype)


def boundaries(thresholds: Sequence[float]) -> Tensor:
    """float32 `[scales, n]`: the scale, then each threshold and the two floats beside it, with both signs, times the scale.

    >>> boundaries([0.5])[4]
    tensor([ 1.0000,  0.5000,  0.5000,  0.5000, -0.5000, -0.5000, -0.5000])
    """
    table = torch.tensor(thresholds, dtype=torch.float32, device=CPU)
    up, down = (table.nextafter(torch.tensor(end, dtype=torch.float32, device=CPU)) for end in (math.inf, -math.inf))
    points = torch.cat((table, up, down))
    row = torch.cat((torch.ones(1, dtype=torch.float32, device=CPU), points, -points))
    return row * torch.tensor(SCALES, dtype=torch.float32, device=CPU)[:, None]


def scales() -> Tensor:
    """float32 `[2^16]`: the numbers of bfloat16."""
    return sixteen_bits(torch.bfloat16).float()


def one_nan(x: Tensor) -> Tensor:
    """Every NaN the same NaN."""
    return x.masked_fill(x.isnan(), math.nan) if x.is_floating_point() else x


def _rows(thresholds: Sequence[float], width: int) -> Iterator[Tensor]:
    """The tensors that are quantized: all 16-bit numbers; and boundaries, where each scale has rows of its own that begin with
    it."""
    yield from (sixteen_bits(dtype) for dtype in (torch.bfloat16, torch.float16))
    scaled = boundaries(thresholds)
    points = torch.nn.functional.pad(scaled[:, 1:], (0, -(scaled.shape[1] - 1) % (width - 1)))
    points = points.unflatten(1, (-1, width - 1))
    yield torch.cat((scaled[:, :1, None].expand(-1, points.shape[1], 1), points), 2).reshape(-1)


def _quantize_rows(x: Tensor) -> Outputs:
    parts = [fourbit.quantize(row.to(x.device), book, 64) for book in (NF4, FP4) for row in _rows(book.thresholds, 64)]
    return tuple(t for part in parts for t in part)


def _dequantize_rows(x: Tensor) -> Outputs:
    packed = torch.arange(0x01, 0x100, 0x22, dtype=torch.uint8, device=x.device).repeat(4 * 2**16)  # 01 23 .. ef
    absmax = scales().to(x.device)
    return tuple(
        one_nan(fourbit.dequantize(packed, absmax, book, 64, (2**16, 64), dtype))
        for book, dtype in ((NF4, torch.bfloat16), (NF4, torch.float32), (FP4, torch.float16))
    )


def _quantize_blocks(x: Tensor) -> Outputs:
    books = (DYNAMIC, DYNAMIC_UNSIGNED)
    parts = [blockwise.quantize(row.to(x.device), book, 256) for book in books for row in _rows(book.thresholds, 256)]
    return tuple(t for part in parts for t in part)


def _codes_and_scales(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All 256 codes beside every seventh scale."""
    absmax = scales()[::7].to(x.device)
    codes = torch.arange(256, device=x.device).to(dtype)
    return codes.expand(len(absmax), -1).contiguous(), absmax


def _dequantize_blocks(x: Tensor) -> Outputs:
    (codes, absmax), values = _codes_and_scales(x, torch.uint8), value_table(DYNAMIC, x.device)
    return tuple(one_nan(blockwise.dequantize(codes, absmax, values, 256, dtype)) for dtype in FLOATS)


def _dequantize_nested(x: Tensor) -> Outputs:
    (codes, absmax), values = _codes_and_scales(x, torch.uint8), value_table(DYNAMIC, x.device)
    offset = torch.tensor(1 / 3, dtype=torch.float32, device=x.device)
    return (one_nan(nested.dequantize(codes, absmax, values, offset)),)


def between_codes() -> Tensor:
    """float32 `[97, 382]`: a scale of 1 to 2, then the middles between the codes of int8 and the floats beside them, times it.

    Half of the scales tell fl(127 * fl(1 / absmax)) from 127 / absmax rounded once.
    """
    scale = (1 + torch.arange(97, dtype=torch.float32, device=CPU) / 97)[:, None]
    middle = torch.tensor(INT8_THRESHOLDS, dtype=torch.float32, device=CPU) * scale
    ends = (torch.tensor(end, dtype=torch.float32, device=CPU) for end in (math.inf, -math.inf))
    return torch.cat((scale, middle, *(middle.nextafter(end) for end in ends)), 1)


def _quantize_int8_rows(x: Tensor) -> Outputs:
    results = [
        int8.quantize(row.view(-1, 64).to(x.device), 6.0 * i) for i, row in enumerate(_rows(INT8_THRESHOLDS, 64))
    ]
    results.append(int8.quantize(between_codes().to(x.device)))
    return tuple(t for result in results for t in result if t is not None)


def _dequantize_int8_product(x: Tensor) -> Outputs:
    words = torch.arange(-(2**31), 2**31, 2**20 + 1, device=x.device)
    product = torch.cat((words, words >> 8, words >> 16, words % 3 - 1)).to(torch.int32).view(256, 64)
    row, column, bias, outliers = scales()[5::256].to(x.device), x[:64].abs(), x[64:128], x.view(256, 64)
    plain = int8.dequantize_int8_product(product, row, column, None, None, dtype=torch.float32)
    sums = [
        int8.dequantize_int8_product(product, row, column, bias, outliers.to(dtype), dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    return tuple(map(one_nan, (plain, *sums)))


def _multiply_int8_row(x: Tensor) -> Outputs:
    """All 256 codes, times themselves in 64 orders."""
    q = torch.arange(256, device=x.device).to(torch.int8)
    codes = torch.stack([q.roll(i) for i in range(64)])
    row = torch.full((1,), 1 / 3, dtype=torch.float32, device=x.device)
    column, bias = x[:64].abs(), x[64:128]
    return tuple(few_rows.multiply_int8_row(q[None], row, codes, column, bias, dtype=dtype) for dtype in FLOATS)


def _dequantize_int8_rows(x: Tensor) -> Outputs:
    codes, absmax = _codes_and_scales(x, torch.int8)
    return tuple(one_nan(int8.dequantize(codes, absmax, dtype)) for dtype in FLOATS)


def _add_products(x: Tensor) -> Outputs:
    a, b = x[: 8 * 130].view(8, 130), x[-130 * 24 :].view(130, 24)
    return ordered.product(a, b, x[:24]), ordered.product(a[3:4], b)


# Two whole blocks and a part of one.
STEPPED = 700
GROUP = {
    "lr": 2.0**-5, "betas": (0.9, 0.95, 0.999), "eps": 1e-7, "weight_decay": 0.1, "alpha": 3.0, "t_alpha": 3, "t_beta3": 4,
}  # fmt: skip
GRADIENTS = (0.0, -0.0, 2.0**-149, -(2.0**-130), 2.0**-70, -(2.0**-20), math.nan, math.inf, -math.inf)
LARGEST = 2.0**63  # of a gradient: what is beyond changes nothing
FIRST_BLOCK = (0.0, 2.0**-50, 1.0)


def gradients() -> Iterator[Tensor]:
    """Three float32 `[700]`: numbers of 2^-40 to 4 with `GRADIENTS` in every third place; in the last also `LARGEST` and more.

    The first block's are times `FIRST_BLOCK`: zeros, then so small that the scale of their squares is below 2^-126.
    """
    i = torch.arange(STEPPED, device=CPU)
    special = torch.tensor(GRADIENTS, dtype=torch.float32, device=CPU)
    x = example(CPU)[STEPPED:].split(STEPPED)
    for t in range(3):
        g = x[t].ldexp(i // 64 * 4 - 40)
        g = torch.where(i % 3 == t, special[(i // 3 + t) % len(GRADIENTS)], g)
        g = torch.where(i < 256, g * FIRST_BLOCK[t], g)
        if t == 2:
            g[600], g[601] = LARGEST, -LARGEST * (1 + 2.0**-23)
        yield g


def _steps(x: Tensor, bits: int) -> Outputs:
    results: list[Tensor] = []
    for rule in RULES.values():
        p, state = _fresh(x, rule, bits)
        for t, g in enumerate(gradients(), 1):
            step(*at_step(rule, t, GROUP, x.device), p, g.to(x.device), state, blocksize=256)
            results += [p.clone(), *(y.clone() for y in state.values())]
    return tuple(results)


def _directions(x: Tensor, bits: int) -> Outputs:
    """The directions of the rules that are clipped: the others never ask for their direction alone."""
    results = []
    for rule in (rule for rule in RULES.values() if rule.clipped):
        p, state = _fresh(x, rule, bits)
        for t, g in enumerate(gradients(), 1):
            given = (*at_step(rule, t, GROUP, x.device), p, g.to(x.device), state)
            results.append(directions(*given, blocksize=256))
            step(*given, blocksize=256)
    return tuple(results)


def _fresh(x: Tensor, rule: Rule, bits: int) -> tuple[Tensor, dict[str, Tensor]]:
    p = x[:STEPPED].clone()
    return p, new_state(rule, p.shape, bits, 256, lambda _, shape, dtype: p.new_empty(shape, dtype=dtype))


# By the name of the kernel. Each is run by way of the function for any shape, so that a GPU reads its tables.
CHECKS = (
    Check("quantize_rows", _quantize_rows, "1e207ce73f994262"),
    Check("dequantize_rows", _dequantize_rows, "5f2ebe7802f5755e"),
    Check("quantize_blocks", _quantize_blocks, "e7ae29887cac5005"),
    Check("dequantize_blocks", _dequantize_blocks, "1bc2d2ac509aa30d"),
    Check("dequantize_nested", _dequantize_nested, "6182f18ce78beddd"),
    Check("quantize_int8_rows", _quantize_int8_rows, "988699cedbb9587c"),
    Check("dequantize_int8_product", _dequantize_int8_product, "b15db76aebd980bb"),
    Check("multiply_int8_row", _multiply_int8_row, "ce7be832e19812c1"),
    Check("dequantize_int8_rows", _dequantize_int8_rows, "5afd93b9ca598dc7"),
    Check("add_products", _add_products, "0b20a99df7f91450"),
    Check("step_elements", lambda x: _steps(x, 32), "d817efbb865227ea"),
    Check("step_blocks", lambda x: _steps(x, 8), "2e4d319d343f9cb2"),
    Check("direction_elements", lambda x: _directions(x, 32), "0318d4b44402cb92"),
    Check("direction_blocks", lambda x: _directions(x, 8), "4fbc1de1e300a308"),
)
