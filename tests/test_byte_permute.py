"""The byte permute of NVIDIA GPUs, whose instructions are run one by one here: the value that a plain look-up finds."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

from bnbref.kernels import byte_permute
from bnbref.kernels.byte_permute import CODES, dot16, lookup16, planes

MASK = 0xFFFFFFFF


def prmt(a, b, selectors):
    """PTX's `prmt.b32` in its default mode, for one number each: every selector of four bits picks a byte of b:a, or, if its
    highest bit is set, copies the sign of that byte."""
    both, out = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = both[selector & 7]
        out |= (255 * (byte >> 7) if selector & 8 else byte) << 8 * i
    return out


def ptx(text, *operands):
    """The instructions of an inline assembly, run; $0 is the result, $1 the first operand."""
    names = {f"${i + 1}": value for i, value in enumerate(operands)}
    names["%lanemask_eq"] = 1 << 17  # as in some lane
    floats = set(re.findall(r"\w+", " ".join(re.findall(r"\.reg \.f32 ([^;]*);", text))))

    def read(name):
        return names[name] if name in names else int(name, 0)

    for line in filter(None, (part.strip() for part in text.strip("{} \n").split(";"))):
        if line.startswith(".reg"):
            continue
        if found := re.fullmatch(r"prmt\.b32 (\S+), (\S+), (\S+), (\S+)", line):
            names[found[1]] = prmt(*map(read, found.groups()[1:]))
        elif found := re.fullmatch(r"lop3\.b32 (\S+), (\S+), (\S+), (\S+), 0xca", line):
            a, b, c = map(read, found.groups()[1:])
            names[found[1]] = a & b | ~a & c
        elif found := re.fullmatch(r"(add\.s32|and\.b32|or\.b32|shl\.b32|shr\.b32) (\S+), (\S+), (\S+)", line):
            a, b = map(read, found.groups()[2:])
            results = {
                "add.s32": a + b,
                "and.b32": a & b,
                "or.b32": a | b,
                "shl.b32": a << b % 64,
                "shr.b32": a >> b % 64,
            }
            names[found[2]] = results[found[1]] & MASK
        elif found := re.fullmatch(r"fma\.rn\.f32 (\S+), (\S+), (\S+), (\S+)", line):
            a, b, c = map(read, found.groups()[1:])
            names[found[1]] = float(np.float32(a * b + c))  # of numbers for which nothing is rounded
        elif found := re.fullmatch(r"mov\.(b32|f32) (\S+), (\S+)", line):
            value = read(found[3])
            as_float = found[2] in floats and isinstance(value, int)
            names[found[2]] = float(np.uint32(value).view(np.float32)) if as_float else value
        elif found := re.fullmatch(r"mov\.b(32|64) {(\w+), (\w+)}, (\S+)", line):
            bits, whole = int(found[1]) // 2, read(found[4])
            names[found[2]], names[found[3]] = whole & (1 << bits) - 1, whole >> bits
        elif found := re.fullmatch(r"cvt\.f32\.f16 (\S+), (\w+)", line):
            names[found[1]] = float(np.uint16(read(found[2])).view(np.float16))
        else:
            raise AssertionError(f"an instruction that is not emulated: {line!r}")
    return names["$0"]


def signed(x):
    return x - 2**64 if x >= 2**63 else x


OPS = SimpleNamespace(inline_asm_elementwise=lambda *operands, asm, **rest: ptx(asm, *operands))


def found_in(word, table):
    """What `values_of` a word of codes are, as float32."""
    words = byte_permute.values_of(OPS, word, [byte_permute.own(OPS, w & MASK) for w in table.tolist()])
    if len(words) == CODES:
        return [np.uint32(bits).view(np.float32) for bits in words]
    halves = [bits for both in words for bits in (both >> 16, both & 0xFFFF)]
    return [np.float32(np.uint16(bits).view(np.float16)) for bits in halves]


@given(
    word=st.integers(0, 2**64 - 1),
    values=st.lists(st.floats(-1, 1, width=16), min_size=16, max_size=16),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
@pytest.mark.filterwarnings("ignore")
def test_it_finds_what_a_plain_look_up_finds(word, values, dtype):
    table = planes(torch.tensor(values, dtype=torch.float32).to(dtype))
    want = lookup16(torch.tensor(signed(word)), table)
    assert [value.tobytes() for value in found_in(word, table)] == [value.numpy().tobytes() for value in want]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_code_in_every_place(dtype):
    """The value of a code is a sixteenth of it, so that each code has another one."""
    table = planes((torch.arange(16.0) / 16).to(dtype))
    for code in range(16):
        for place in range(CODES):
            got = found_in(code << 4 * (place ^ 1), table)
            assert got == [code / 16 if other == place else 0.0 for other in range(CODES)]


@given(
    word=st.integers(0, 2**64 - 1),
    columns=st.lists(st.integers(-8, 8), min_size=16, max_size=16),
    table_dtype=st.sampled_from([torch.float16, torch.float32]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_the_sum_of_a_word(word, columns, table_dtype, dtype):
    """Of whole numbers: every float32 sum is exact."""
    table, packed = planes(torch.arange(16).to(table_dtype)), torch.tensor(columns, dtype=dtype).view(torch.int64)
    values = byte_permute.values_of(OPS, word, [w & MASK for w in table.tolist()])
    got = byte_permute.added(OPS, 3.0, values, [x % 2**64 for x in packed.tolist()], dtype)
    assert got == 3 + dot16([torch.tensor(signed(word))], packed.unbind(), table, dtype).item()


def test_the_plain_look_up_is_a_look_up():
    values = torch.randn(16)
    words = torch.randint(-(2**63), 2**63 - 1, (5,), dtype=torch.int64)
    codes = words.view(torch.uint8).view(5, 8)
    codes = torch.stack((codes >> 4, codes & 15), dim=-1).view(5, 16)
    assert torch.equal(torch.stack(lookup16(words, planes(values)), -1), values[codes.to(torch.int64)])


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_operator_is_whole(table_dtype, dtype):
    words = torch.randint(-(2**63), 2**63 - 1, (3, 5), dtype=torch.int64)
    columns = list(torch.rand(5, 32).to(dtype).view(torch.int64).unbind(1))
    arguments = ([words, words + 1], columns, planes(torch.rand(16).to(table_dtype)), dtype)
    library.opcheck(torch.ops.bnbref.dot16.default, arguments)


def test_the_sum_is_in_order():
    words, table = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64), planes(torch.rand(16))
    columns = torch.rand(32)
    want = torch.tensor(0.0)
    for value, column in zip([*lookup16(words[0], table), *lookup16(words[1], table)], columns, strict=True):
        want = want + value * column
    assert torch.equal(dot16(words.unbind(), columns.view(torch.int64).unbind(), table, torch.float32), want)
