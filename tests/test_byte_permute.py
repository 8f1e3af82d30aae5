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
from bnbref.kernels.byte_permute import dot, lookup8, planes
from bnbref.kernels.floats import floats_of_words, halves_of_words

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

    def read(name):
        return names[name] if name in names else int(name, 0)

    for line in filter(None, (part.strip() for part in text.strip("{} ").split(";"))):
        if line.startswith(".reg"):
            continue
        if found := re.fullmatch(r"prmt\.b32 (\S+), (\S+), (\S+), (\S+)", line):
            names[found[1]] = prmt(*map(read, found.groups()[1:]))
        elif found := re.fullmatch(r"lop3\.b32 (\S+), (\S+), (\S+), (\S+), 0xca", line):
            a, b, c = map(read, found.groups()[1:])
            names[found[1]] = a & b | ~a & c
        elif found := re.fullmatch(r"(add\.s32|and\.b32|or\.b32) (\S+), (\S+), (\S+)", line):
            a, b = map(read, found.groups()[2:])
            names[found[2]] = {"add.s32": a + b & MASK, "and.b32": a & b, "or.b32": a | b}[found[1]]
        elif found := re.fullmatch(r"mov\.b32 (\w+), (\S+)", line):
            names[found[1]] = read(found[2])
        elif found := re.fullmatch(r"mov\.b32 {(\w+), (\w+)}, (\S+)", line):
            names[found[1]], names[found[2]] = read(found[3]) & 0xFFFF, read(found[3]) >> 16
        elif found := re.fullmatch(r"cvt\.f32\.f16 (\S+), (\w+)", line):
            names[found[1]] = float(np.uint16(read(found[2])).view(np.float16))
        else:
            raise AssertionError(f"an instruction that is not emulated: {line!r}")
    return names["$0"]


def signed(x):
    return x - 2**32 if x >= 2**31 else x


OPS = SimpleNamespace(
    constant=lambda value, dtype: value & MASK,
    bitwise_and=lambda a, b: a & b,
    bitwise_left_shift=lambda a, b: a << b & MASK,
    bitwise_right_shift=lambda a, b: signed(a) >> b & MASK,  # arithmetic, as for int32
    inline_asm_elementwise=lambda *operands, asm, **rest: ptx(asm, *operands),
    to_dtype_bitcast=lambda x, dtype, source: float(np.uint32(x).view(np.float32)),
)


@given(
    word=st.integers(0, MASK),
    values=st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1e-40]), min_size=16, max_size=16
    ),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_it_finds_what_a_plain_look_up_finds(word, values, dtype):
    table = planes(torch.tensor(values, dtype=torch.float32).to(dtype))
    words = torch.tensor([signed(word)], dtype=torch.int32)
    found = byte_permute.values_of(OPS, word, [byte_permute.per_lane(OPS, w & MASK) for w in table.tolist()])
    for place, got in enumerate(found):
        want = lookup8(words, table, place)
        assert np.float32(got).tobytes() == want.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_code_in_every_place(dtype):
    """Sixteen values that all differ, which drawn ones seldom do."""
    table = [w & MASK for w in planes((torch.arange(16.0) / 16).to(dtype)).tolist()]
    for code in range(16):
        for place in range(8):
            word = code << 4 * (place ^ 1)
            got = byte_permute.values_of(OPS, word, table)
            assert got == [code / 16 if other == place else 0.0 for other in range(8)]


def test_the_plain_look_up_is_a_look_up():
    values = torch.arange(16.0) / 16
    packed = torch.randint(0, 256, (32,), dtype=torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), -1).view(8, 8).long()
    for dtype in (torch.float16, torch.float32):
        table = planes(values.to(dtype))
        got = torch.stack([lookup8(packed.view(torch.int32), table, place) for place in range(8)], -1)
        assert torch.equal(got, values[codes])


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TENSORS = SimpleNamespace(
    constant=lambda value, dtype: torch.tensor(value, dtype=dtype),
    bitwise_left_shift=lambda a, b: a << b,
    bitwise_right_shift=lambda a, b: a >> b,
    to_dtype=lambda x, dtype, src_dtype: x.to(dtype),
    to_dtype_bitcast=lambda x, dtype, source: x.view(dtype),
)
"""Operations of Inductor, on tensors."""


def words(*shape):
    return torch.randint(-(2**63), 2**63 - 1, shape)


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_taken_from_words(dtype):
    """All patterns of 16 bits, and words at random: the numbers that lie in their memory."""
    drawn = words(2**14) if dtype == torch.float32 else torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.int64)
    want = drawn.view(dtype).float()
    for floats in (byte_permute.floats_of(TENSORS, drawn, dtype), floats_of_words(drawn[None], dtype)):
        got = torch.stack(floats, -1).view(-1)
        assert ((got.view(torch.int32) == want.view(torch.int32)) | got.isnan() & want.isnan()).all()
    assert torch.equal(torch.stack(halves_of_words(drawn[None]), -1).view(-1), drawn.view(torch.int32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_operator_is_whole(dtype):
    table = planes(torch.rand(16).to(torch.float32 if dtype == torch.float32 else torch.float16))
    activations = torch.rand(2 * 5 * 16).to(dtype).view(torch.int64).view(-1, 5)
    library.opcheck(torch.ops.bnbref.dot.default, (words(2, 3, 5), activations, table, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sum_is_in_order(dtype):
    values = torch.rand(16).half().float()
    table = planes(values if dtype == torch.float32 else values.half())
    packed, a = torch.randint(0, 256, (3, 16), dtype=torch.uint8), torch.rand(32).to(dtype)
    codes = torch.stack((packed >> 4, packed & 15), -1).view(3, 32).long()
    want = torch.zeros(3)
    for i in range(32):
        want = want + values[codes[:, i]] * a[i].float()
    got = dot(packed.view(torch.int64).t()[:, :, None], a.view(torch.int64)[:, None], table, dtype)
    assert torch.equal(got, want[:, None])
