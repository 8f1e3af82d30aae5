# ruff: noqa: E501, the tables of messages are as long as the messages
"""bitsandbytes' functional surface: signatures, out= and absmax=, quantization states and what they refuse."""

import copy
import inspect
import json
import pickle

import pytest
import second
import torch
from conftest import difference, running, same_bits
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

import bnbref
from bnbref import blockwise, fourbit, nested
from bnbref import functional as F
from bnbref.codebooks import DYNAMIC, FOUR_BIT, NF4, Codebook, value_table
from bnbref.quant_state import QuantState

CPU = torch.device("cpu")
F32 = torch.float32


def ramp(*shape: int) -> torch.Tensor:
    return torch.linspace(-3, 2, torch.Size(shape).numel()).view(shape)


def message(function, *args, error=(TypeError, ValueError), **kwargs) -> str:
    """What the error says; any other outcome fails the test."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value).replace(str(sorted(FOUR_BIT)), "[formats]")


# ---- arguments of another kind --------------------------------------------------------------------------------------

_x = ramp(4, 64)
_packed, _state = F.quantize_4bit(_x, quant_type="nf4")
_codes, _state8 = F.quantize_blockwise(_x)
_int8, _rows, _ = F.int8_vectorwise_quant(_x)
_product = F.int8_linear_matmul(_int8, _int8)

CALLS = {
    F.quantize_4bit: {"A": _x, "absmax": None, "out": None, "compress_statistics": False},
    F.dequantize_4bit: {"A": _packed, "quant_state": _state, "out": None},
    F.quantize_blockwise: {"A": _x, "code": None, "absmax": None, "out": None, "nested": False},
    F.dequantize_blockwise: {"A": _codes, "quant_state": _state8, "out": None},
    F.int8_vectorwise_quant: {"A": _x},
    F.int8_vectorwise_dequant: {"A": _int8, "stats": _rows},
    F.int8_double_quant: {"A": _x},
    F.int8_linear_matmul: {"A": _int8, "B": _int8, "out": None},
    F.int8_mm_dequant: {"A": _product, "row_stats": _rows, "col_stats": _rows, "out": None, "bias": None},
}
"""Functions and arguments with which they run."""


@pytest.mark.parametrize(
    ("function", "name"),
    [pytest.param(f, name, id=f"{f.__name__}-{name}") for f, names in CALLS.items() for name in names],
)
@settings(max_examples=15)
@given(
    junk=st.one_of(
        st.text(),
        st.floats(),
        st.lists(st.floats()),
        st.binary(),
        st.builds(object),
        st.just(torch.int8),
        st.just(_x.to_sparse()),
    )
)
def test_an_argument_of_another_kind_is_named(function, name, junk):
    if name in ("compress_statistics", "nested") and isinstance(junk, torch.Tensor):
        junk = "False"
    with bnbref.eager(), pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        function(**CALLS[function] | {name: junk})


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
def test_those_calls_run(function):
    function(**CALLS[function])


def test_values_that_are_no_numbers_of_a_line_are_refused_in_decoding():
    complex_values = torch.linspace(-1, 1, 16) * 1j
    assert "code must be a Codebook or a tensor" in message(
        F.dequantize_blockwise, _codes, absmax=_state8.absmax, code=complex_values
    )


# ---- signatures -----------------------------------------------------------------------------------------------------


def signature(function) -> str:
    """Names, kinds and defaults of the arguments, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    return f"{function.__name__}{bare}"


def test_signatures_are_bitsandbytes():
    """The table is that of bitsandbytes 0.50.2."""
    functions = [getattr(F, name) for name in F.__all__] + [bnbref.matmul, bnbref.matmul_4bit]
    functions += [QuantState.as_dict, QuantState.from_dict, QuantState.to]
    assert_expected_inline(
        "\n".join(map(signature, functions)),
        """\
QuantState(absmax, shape=None, code=None, blocksize=None, quant_type=None, dtype=None, offset=None, state2=None)
create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)
create_fp8_map(signed=True, exponent_bits=5, precision_bits=2, total_bits=8)
create_linear_map(signed=True, total_bits=8, add_zero=True)
create_normal_map(offset=0.9677083, use_extra_value=True)
dequantize_4bit(A, quant_state=None, absmax=None, out=None, blocksize=None, quant_type='fp4')
dequantize_blockwise(A, quant_state=None, absmax=None, code=None, out=None, blocksize=4096, nested=False)
dequantize_fp4(A, quant_state=None, absmax=None, out=None, blocksize=None)
dequantize_nf4(A, quant_state=None, absmax=None, out=None, blocksize=None)
gemv_4bit(A, B, out=None, transposed_A=False, transposed_B=False, state=None)
get_4bit_type(typename, device=None, blocksize=64)
int8_double_quant(A, col_stats=None, row_stats=None, out_col=None, out_row=None, threshold=0.0)
int8_linear_matmul(A, B, out=None, dtype=torch.int32)
int8_mm_dequant(A, row_stats, col_stats, out=None, bias=None)
int8_vectorwise_dequant(A, stats)
int8_vectorwise_quant(A, threshold=0.0)
quantize_4bit(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_type='fp4', quant_storage=torch.uint8)
quantize_blockwise(A, code=None, absmax=None, out=None, blocksize=4096, nested=False)
quantize_fp4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8)
quantize_nf4(A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8)
matmul(A, B, out=None, state=None, threshold=0.0, bias=None)
matmul_4bit(A, B, quant_state, out=None, bias=None)
as_dict(self, packed=False)
from_dict(qs_dict, device)
to(self, device)""",
    )


# ---- four bits ------------------------------------------------------------------------------------------------------


def test_defaults_of_4_bits(mode):
    """FP4, blocks of 64, bytes, no double quantization."""
    x = ramp(3, 50).half()
    packed, state = F.quantize_4bit(x)
    want, absmax = second.quantize_4bit("fp4", second.floats(x), 64)
    assert packed.flatten().tolist() == want
    assert state.absmax.tolist() == absmax.tolist()
    assert (state.quant_type, state.blocksize, state.dtype, state.shape) == ("fp4", 64, torch.float16, (3, 50))
    assert not state.nested
    decoded = second.dequantize(second.VALUES["fp4"], second.unpack(want, 150), absmax, 64, torch.float16)
    assert same_bits(F.dequantize_4bit(packed, state), decoded.view(3, 50))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_named_functions(quant_type):
    x = ramp(300)
    quantize, dequantize = getattr(F, f"quantize_{quant_type}"), getattr(F, f"dequantize_{quant_type}")
    with running("eager"):
        for kwargs in ({}, {"blocksize": 32}, {"compress_statistics": True}, {"quant_storage": torch.bfloat16}):
            packed, state = quantize(x, **kwargs)
            want, want_state = F.quantize_4bit(x, quant_type=quant_type, **kwargs)
            assert same_bits(packed, want)
            assert state == want_state
            assert same_bits(dequantize(packed, state), F.dequantize_4bit(packed, state))
        packed, state = quantize(x)
        out = torch.empty(300)
        assert same_bits(dequantize(packed, absmax=state.absmax, out=out), F.dequantize_4bit(packed, state))


def test_out_and_absmax_receive_the_results(mode):
    x = ramp(2, 128)
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    absmax, out = torch.full((4,), 9.0), torch.full((128, 1), 9, dtype=torch.uint8)
    again, other = F.quantize_4bit(x, absmax=absmax, out=out, quant_type="nf4")
    assert again is out
    assert other.absmax is absmax
    assert same_bits((out, absmax), (packed, state.absmax))
    decoded = torch.full((2, 128), 9.0)
    assert F.dequantize_4bit(packed, state, out=decoded) is decoded
    assert same_bits(decoded, F.dequantize_4bit(packed, state))
    half = torch.empty(2, 128, dtype=torch.bfloat16)  # without a state, out says the shape and the dtype
    F.dequantize_4bit(packed, absmax=state.absmax, out=half, quant_type="nf4")
    assert same_bits(half, fourbit.dequantize(packed, state.absmax, NF4, 64, (2, 128), torch.bfloat16))

    codes, state8 = F.quantize_blockwise(x, blocksize=256)
    absmax, out = torch.full((1,), 9.0), torch.full((2, 128), 9, dtype=torch.uint8)
    again, other = F.quantize_blockwise(x, absmax=absmax, out=out, blocksize=256)
    assert again is out
    assert other.absmax is absmax
    assert same_bits((out, absmax), (codes, state8.absmax))
    decoded = torch.full((2, 128), 9.0)
    assert F.dequantize_blockwise(codes, state8, out=decoded) is decoded
    assert same_bits(decoded, F.dequantize_blockwise(codes, absmax=absmax, blocksize=256))


def test_a_row_of_packed_bytes_gives_the_transpose():
    packed, state = F.quantize_4bit(ramp(4, 32), quant_type="nf4")
    plain = F.dequantize_4bit(packed, state)
    assert plain.shape == (4, 32)
    assert same_bits(F.dequantize_4bit(packed.t(), state), plain.t())
    one, state = F.quantize_4bit(torch.tensor([[1.0, -1.0]]), quant_type="nf4")
    assert F.dequantize_4bit(one, state).shape == (1, 2), "one byte is no row: bitsandbytes transposes this one"


def test_a_users_codebook():
    mine = Codebook.nearest("mine", [-1, -0.25, 0, 0.25, 1])
    x = ramp(100)
    with running("eager"):
        packed, state = F.quantize_4bit(x, quant_type=mine, compress_statistics=True)
        decoded = F.dequantize_4bit(packed, state)
    largest = 3.0 * 0.75 / 2 * 1.01  # half the widest gap between values, and the error of the scales
    assert decoded.unique().numel() <= 2 * 5
    assert bool((decoded - x).abs().max() <= largest)
    assert (
        message(state.as_dict, packed=True) == "codebook 'mine' must be entered in FOUR_BIT to be saved under its name"
    )


def _filled(name):
    """A function that fills a tensor of the caller's, and one that is just right for it."""
    x, codes = ramp(4, 64), torch.ones(4, 64, dtype=torch.int8)
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    bytes_, state8 = F.quantize_blockwise(x, blocksize=64)
    inner = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)[1].absmax
    product, ones = codes.int() @ codes.int().t(), torch.ones(4)
    matmul_8bit = lambda out: bnbref.matmul(x, x, out=out)  # noqa: E731
    return {
        "quantize_4bit": (lambda out: F.quantize_4bit(x, out=out, quant_type="nf4"), packed),
        "its absmax": (lambda out: F.quantize_4bit(x, absmax=out, quant_type="nf4"), state.absmax),
        "its codes of absmax": (
            lambda out: F.quantize_4bit(x, absmax=out, quant_type="nf4", compress_statistics=True),
            inner,
        ),
        "quantize_blockwise": (lambda out: F.quantize_blockwise(x, out=out), bytes_),
        "absmax of that": (lambda out: F.quantize_blockwise(x, absmax=out, blocksize=64), state8.absmax),
        "dequantize_4bit": (lambda out: F.dequantize_4bit(packed, state, out=out), x),
        "dequantize_blockwise": (lambda out: F.dequantize_blockwise(bytes_, state8, out=out), x),
        "matmul": (matmul_8bit, matmul_8bit(None)),
        "matmul_4bit": (lambda out: bnbref.matmul_4bit(x, packed, state, out=out), x @ x.t()),
        "gemv_4bit": (lambda out: F.gemv_4bit(x, packed, out=out, state=state), x @ x.t()),
        "int8_linear_matmul": (lambda out: F.int8_linear_matmul(codes, codes, out=out), product),
        "int8_mm_dequant": (lambda out: F.int8_mm_dequant(product, ones, ones, out=out), product.half()),
    }[name]


FILLED = [
    "quantize_4bit",
    "its absmax",
    "its codes of absmax",
    "quantize_blockwise",
    "absmax of that",
    "dequantize_4bit",
]
FILLED += ["dequantize_blockwise", "matmul", "matmul_4bit", "gemv_4bit", "int8_linear_matmul", "int8_mm_dequant"]
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
]
LIKE = [
    lambda x: x,
    lambda x: x[None],
    lambda x: torch.stack([x, x]),
    lambda x: x[:1],
    lambda x: x.view(-1),
    lambda x: x[..., None],
]


@given(st.sampled_from(FILLED), st.sampled_from(DTYPES), st.sampled_from(LIKE))
def test_what_is_filled_is_just_like_the_result(name, dtype, like):
    """What torch would do instead: repeat the result over a larger tensor, and round or wrap it to another dtype."""
    with running("eager"):
        fill, right = _filled(name)
        given = like(torch.zeros_like(right)).to(dtype)
        if (given.shape, given.dtype) == (right.shape, right.dtype):
            fill(given)
            assert bool(given.any())
        else:
            must = f"{right.dtype} {tuple(right.shape)} on cpu, got {dtype} {tuple(given.shape)} on cpu"
            argument = "absmax" if "absmax" in name else "out"
            assert message(fill, given) == f"{argument} must be {must}"


@given(st.sampled_from(sorted(FOUR_BIT)), st.integers(0, 200), st.booleans(), st.sampled_from([1, 7, 64, 100]))
def test_functional_is_the_room_below(quant_type, n, double, blocksize):
    x = ramp(n)
    with running("eager"):
        packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=double, blocksize=blocksize)
        want, absmax = fourbit.quantize(x, FOUR_BIT[quant_type], blocksize)
        assert same_bits(packed, want)
        if double:
            assert same_bits((state.absmax, state.state2.absmax, state.offset), nested.quantize(absmax))
        else:
            assert same_bits(state.absmax, absmax)
        got = F.dequantize_4bit(packed, state)
        assert same_bits(got, fourbit.dequantize(packed, state.scales(), FOUR_BIT[quant_type], blocksize, (n,), F32))


@given(
    st.integers(0, 300), st.booleans(), st.sampled_from([1, 7, 64]), st.sampled_from([torch.uint8, torch.int16, F32])
)
def test_results_own_exactly_their_bytes(n, double, blocksize, storage):
    """No view of padded memory: torch.save writes whole storages, safetensors refuses such views."""
    x = ramp(n if (n + 1) // 2 % storage.itemsize == 0 else 8 * n)
    with running("eager"):
        packed, state = F.quantize_4bit(
            x, quant_type="nf4", compress_statistics=double, blocksize=blocksize, quant_storage=storage
        )
        codes, state8 = F.quantize_blockwise(x, blocksize=blocksize, nested=double)
        results = [packed, *state.tensors(), state.scales(), F.dequantize_4bit(packed, state)]
        results += [codes, *state8.tensors(), state8.scales(), F.dequantize_blockwise(codes, state8)]
        results += [t for t in F.int8_vectorwise_quant(x.view(-1, 1)) if t is not None]
    assert [t.untyped_storage().nbytes() for t in results] == [t.nbytes for t in results]


def test_compiled_results_own_exactly_their_bytes():
    x = ramp(5, 13)
    with running("compiled"):
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        codes, state8 = F.quantize_blockwise(x, blocksize=64)
        results = [packed, *state.tensors(), F.dequantize_4bit(packed, state)]
        results += [codes, *state8.tensors(), F.dequantize_blockwise(codes, state8)]
    assert [t.untyped_storage().nbytes() for t in results] == [t.nbytes for t in results]


# ---- eight bits -----------------------------------------------------------------------------------------------------


def test_defaults_of_8_bits(mode):
    """The signed dynamic map, blocks of 4096; without a state: float32."""
    x = ramp(5000)
    codes, state = F.quantize_blockwise(x)
    want, absmax = second.quantize("dynamic_signed", second.floats(x), 4096)
    assert codes.tolist() == want.tolist()
    assert state.absmax.tolist() == absmax.tolist()
    assert (state.blocksize, state.dtype, state.nested) == (4096, F32, False)
    assert same_bits(state.code, value_table(DYNAMIC, CPU))
    decoded = F.dequantize_blockwise(codes, state)
    assert same_bits(F.dequantize_blockwise(codes, absmax=state.absmax), decoded)


def test_nested_8_bits():
    """The scales less their mean, in the blocksize of the tensor (not 256), by the signed dynamic map."""
    x = ramp(1000).bfloat16()
    with running("eager"):
        codes, state = F.quantize_blockwise(x, blocksize=64, nested=True)
        plain, plain_state = F.quantize_blockwise(x, blocksize=64)
        inner, absmax2 = blockwise.quantize(plain_state.absmax - plain_state.absmax.mean(), DYNAMIC, 64)
        assert same_bits((codes, state.absmax, state.state2.absmax), (plain, inner, absmax2))
        assert (state.state2.blocksize, state.state2.dtype) == (64, F32)
        scales = second.nested_dequantize(inner.tolist(), absmax2.numpy(), state.offset.numpy()[()], 64)
        got = F.dequantize_blockwise(codes, state)
        want = second.dequantize(second.VALUES["dynamic_signed"], codes.tolist(), scales, 64, torch.bfloat16)
        assert same_bits(got, want), difference(got, want)


@pytest.mark.parametrize("n", [2, 3, 15, 100, 256])
def test_a_users_code(n):
    """Sorted values, 2 to 256; the nearest by the float32 midpoint, a tie to the even code; decoded with the same values."""
    code = torch.linspace(-1, 1, n) ** 3
    x = ramp(300)
    with running("eager"):
        codes, state = F.quantize_blockwise(x, code=code, blocksize=100)
        assert int(codes.max()) == n - 1
        assert same_bits(state.code[:n], code)
        decoded = F.dequantize_blockwise(codes, state)
        assert same_bits(F.dequantize_blockwise(codes, absmax=state.absmax, code=code, blocksize=100), decoded)
    table, middle = code.tolist(), second.midpoints(code.numpy())
    for i in range(0, 300, 7):
        v = x[i] * (1 / state.absmax[i // 100])
        want = sum(bool(v > m) or (bool(v == m) and (j + 1) % 2 == 0) for j, m in enumerate(middle))
        assert codes[i].item() == want
        assert decoded[i] == table[want] * state.absmax[i // 100]


@pytest.mark.parametrize("bits", range(2, 9))
def test_maps_of_few_bits(bits):
    """bitsandbytes' own maps of fewer bits, padded by zeros to 256 entries: each element gets a nearest value."""
    makers = [F.create_dynamic_map(True, bits, bits), F.create_fp8_map(True, max(bits - 3, 1), min(bits - 2, 2), bits)]
    x = torch.randn(64, generator=torch.Generator().manual_seed(bits))
    for code in makers:
        with running("eager"):
            codes, state = F.quantize_blockwise(x, code=code, blocksize=64)
        scaled = x / state.absmax
        error = (code[codes.long()] - scaled).abs()
        nearest = (code[:, None] - scaled).abs().min(0).values
        assert bool((error <= nearest + 1e-6).all())


# ---- int8 -----------------------------------------------------------------------------------------------------------


def test_int8_functions(mode):
    a = ramp(4, 30) * 2
    codes, stats, outliers = F.int8_vectorwise_quant(a, threshold=5.5)
    want, want_stats, columns = second.int8_quantize(a.numpy(), 5.5)
    assert codes.tolist() == want.tolist()
    assert stats.tolist() == want_stats.tolist()
    assert outliers.dtype == torch.int64
    assert outliers.tolist() == [j for j, c in enumerate(columns) if c] != []
    assert F.int8_vectorwise_quant(a)[2] is None
    with pytest.raises(ValueError, match="A must be float32, float16 or bfloat16"):
        F.int8_vectorwise_quant(codes)
    with pytest.raises(ValueError, match=r"A must be \[rows, columns\], got \(1, 4, 30\)"):
        F.int8_double_quant(a[None])
    assert F.int8_vectorwise_quant(a, threshold=100.0)[2].shape == (0,)
    decoded = F.int8_vectorwise_dequant(codes, stats)
    assert same_bits(decoded, F.int8_vectorwise_dequant(codes, stats[:, None]))
    assert decoded.dtype == F32
    assert same_bits(decoded, second.int8_dequantize(codes.numpy(), stats.numpy(), F32))

    b = torch.randint(-128, 128, (7, 30), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    product = F.int8_linear_matmul(codes, b)
    out = torch.empty(4, 7, dtype=torch.int32)
    assert F.int8_linear_matmul(codes, b, out=out) is out
    assert same_bits(out, product)
    assert product.tolist() == second.int8_product(codes.tolist(), b.tolist())
    column = torch.linspace(0.5, 2, 7)
    bias = torch.linspace(-1, 1, 7).half()
    for shape in ((4, 7), (2, 2, 7)):
        got = F.int8_mm_dequant(product.view(shape), stats, column, bias=bias)
        want = second.int8_dequantize_product(
            product.numpy(), stats.numpy(), column.numpy(), second.floats(bias), None, torch.float16
        )
        assert same_bits(got, want.view(shape)), difference(got, want)
    out = torch.empty(4, 7, dtype=torch.float16)
    assert F.int8_mm_dequant(product, stats, column, out=out) is out


def test_gemv():
    """Any number of rows, and the packed weight as it is or transposed."""
    w, a = ramp(6, 64), ramp(5, 64)
    packed, state = F.quantize_4bit(w, quant_type="nf4")
    want = torch.nn.functional.linear(a, F.dequantize_4bit(packed, state))
    assert same_bits(F.gemv_4bit(a, packed.t(), state=state), want)
    assert same_bits(F.gemv_4bit(a, packed, state=state), want)
    out = torch.empty(5, 6)
    assert F.gemv_4bit(a, packed, out=out, state=state) is out
    assert same_bits(out, want)


# ---- states ---------------------------------------------------------------------------------------------------------


def states() -> dict[str, QuantState]:
    with running("eager"):
        return {
            "plain": F.quantize_4bit(ramp(5, 26).bfloat16(), quant_type="nf4")[1],
            "double": F.quantize_4bit(ramp(40, 64).half(), quant_type="fp4", compress_statistics=True)[1],
            "empty": F.quantize_4bit(torch.zeros(0, 3), quant_type="nf4", compress_statistics=True)[1],
            "0-d": F.quantize_4bit(torch.tensor(2.0), quant_type="int4", blocksize=7)[1],
        }


each_state = pytest.mark.parametrize("name", ["plain", "double", "empty", "0-d"])


def test_list_access():
    """The list that bitsandbytes had before 0.40."""
    plain, double = states()["plain"], states()["double"]
    assert plain[0] is plain.absmax
    assert plain[1:5] == [(5, 26), torch.bfloat16, 64, None]
    assert plain[5] == plain[-1] == "nf4"
    assert double[4][0] is double.offset
    assert double[4][1] is double.state2
    with pytest.raises(IndexError):
        plain[6]


@each_state
@pytest.mark.parametrize("packed", [False, True])
def test_to_a_dict_and_back(name, packed):
    state = states()[name]
    as_dict = state.as_dict(packed=packed)
    before = dict(as_dict)
    for prefix in ("", "model.layers.0.q_proj.weight."):
        # Module state dicts have `weight.quant_state.bitsandbytes__nf4` and `weight.absmax`.
        prefixed = {prefix + key: value for key, value in as_dict.items()}
        back = QuantState.from_dict(prefixed, device="cpu")
        assert back == state
        assert back.nested == state.nested
        assert type(back.shape) is torch.Size
    assert before.keys() == as_dict.keys(), "the caller's dict is not emptied"


@given(
    st.integers(0, 300), st.sampled_from([1, 64, 4096, 5000]), st.booleans(), st.sampled_from([F32, torch.float16]),
    st.sampled_from([None, F.create_fp8_map(True, 4, 3), F.create_linear_map(), torch.tensor([-1.0, 0.0, 1.0])]),
)  # fmt: skip
def test_a_state_of_8_bits_to_a_dict_and_back(n, blocksize, double, dtype, code):
    with running("eager"):
        codes, state = F.quantize_blockwise(ramp(n).to(dtype), code=code, blocksize=blocksize, nested=double)
        for packed in (False, True):  # without a quant_type there is nothing to pack it under
            as_dict = {f"exp_avg.{key}": value for key, value in state.as_dict(packed=packed).items()}
            again = QuantState.from_dict(as_dict, device="cpu")
            assert again == state
            assert same_bits(F.dequantize_blockwise(codes, again), F.dequantize_blockwise(codes, state))


@given(st.integers(1, 9000), st.sampled_from([4096, 4097, 8192, 2**40, 10**30]), st.booleans())
def test_a_block_of_more_than_the_tensor_to_a_dict_and_back(n, blocksize, double):
    """A file has no such blocksize; that of the whole tensor makes the same block."""
    with running("eager"):
        packed, state = F.quantize_4bit(ramp(n), blocksize=blocksize, compress_statistics=double)
        again = QuantState.from_dict(state.as_dict(packed=True), device="cpu")
        assert same_bits(F.dequantize_4bit(packed, again), F.dequantize_4bit(packed, state))
        assert again.as_dict(packed=True).keys() == state.as_dict(packed=True).keys()


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.int8, "float32"])
def test_a_state_of_a_dtype_that_no_reader_takes_is_not_saved(dtype):
    state = F.quantize_4bit(torch.ones(64))[1]
    state.dtype = dtype
    said = r"a file has a dtype of \['bfloat16', 'float16', 'float32'\]; that of this state is "
    with pytest.raises(ValueError, match=said):
        state.as_dict(packed=True)


def test_a_state_of_8_bits_is_none_of_a_4_bit_weight():
    with running("eager"):
        codes, state = F.quantize_blockwise(ramp(64, 64), blocksize=8192)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(codes, requires_grad=False)
    stats = {**state.as_dict(), "shape": (64, 128)}
    refusals = [
        message(bnbref.nn.Params4bit.from_prequantized, codes, state.as_dict()),
        message(bnbref.nn.parametrize.replace_parameter_4bit_prequantized, module, "weight", stats),
        message(bnbref.matmul_4bit, ramp(1, 128), codes, QuantState.from_dict(stats, "cpu")),
    ]
    assert_expected_inline(
        "\n".join(refusals),
        """\
quant_type must be one of [formats] or a Codebook of at most 16 values, got None
quant_type must be one of [formats] or a Codebook of at most 16 values, got None
quant_type is None: this QuantState is not one of a 4-bit tensor""",
    )


def test_the_keys_and_the_blob():
    plain, double = (states()[name].as_dict(packed=True) for name in ("plain", "double"))
    assert list(plain) == ["absmax", "quant_map", "quant_state.bitsandbytes__nf4"]
    assert list(double) == ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__fp4"]
    blob = bytes(double["quant_state.bitsandbytes__fp4"].tolist()).decode()
    offset = states()["double"].offset.item()
    assert blob == (
        '{"quant_type": "fp4", "blocksize": 64, "dtype": "float16", "shape": [40, 64], '
        f'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset!r}}}'
    )
    unpacked = states()["double"].as_dict()
    assert unpacked.pop("nested_offset") == offset
    shown = {k: (str(v.dtype), tuple(v.shape)) if isinstance(v, torch.Tensor) else v for k, v in unpacked.items()}
    assert_expected_inline(
        "\n".join(f"{key}: {value}" for key, value in shown.items()),
        """\
quant_type: fp4
absmax: ('torch.uint8', (40,))
blocksize: 64
quant_map: ('torch.float32', (16,))
dtype: float16
shape: (40, 64)
nested_absmax: ('torch.float32', (1,))
nested_blocksize: 256
nested_quant_map: ('torch.float32', (256,))
nested_dtype: float32""",
    )


def test_maps_are_not_shared_between_dicts():
    """safetensors refuses two names for one memory."""
    state = states()["double"]
    first, other = state.as_dict(packed=True), states()["double"].as_dict(packed=True)
    for key in ("quant_map", "nested_quant_map"):
        assert first[key].data_ptr() != other[key].data_ptr()


def test_a_map_of_a_state_is_its_own():
    """Whoever writes to it changes what this state decodes, and no other."""
    x = torch.linspace(-1, 1, 512)
    for quantize, dequantize in (
        (lambda: F.quantize_4bit(x, quant_type="nf4", compress_statistics=True), F.dequantize_4bit),
        (lambda: F.quantize_blockwise(x, nested=True), F.dequantize_blockwise),
    ):
        (codes, state), (_, written) = quantize(), quantize()
        want = dequantize(codes, state)
        for values in (written.code, written.state2.code):
            values.zero_()
        again = quantize()
        assert same_bits(again[0], codes)
        assert again[1] == state
        assert same_bits(dequantize(*again), want)


@each_state
def test_copies(name):
    state = states()[name]
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state.map(lambda t: t.clone())):
        assert other == state
        assert not {t.data_ptr() for t in other.tensors() if t.numel()} & {
            t.data_ptr() for t in state.tensors() if t.numel()
        }
    moved = copy.deepcopy(state)
    moved.to("meta")
    assert all(t.device.type == "meta" for t in moved.tensors())


def test_equality_is_of_bits():
    a, b = states()["plain"], states()["plain"]
    assert a == b
    assert a != "plain"
    b.absmax[0] = b.absmax[0].nextafter(torch.tensor(9.0))
    assert a != b
    c = states()["plain"]
    c.shape = torch.Size((26, 5))
    assert a != c


def test_attributes_for_fsdp():
    state = states()["double"]
    assert same_bits(state.bitsandbytes__fp4, state.as_dict(packed=True)["quant_state.bitsandbytes__fp4"])
    for name in ("bitsandbytes__nf4", "nothing"):
        with pytest.raises(AttributeError):
            getattr(state, name)


# ---- hostile states -------------------------------------------------------------------------------------------------


def blob(**fields) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def changed(name: str = "plain", packed: bool = False, **changes) -> dict:
    """The dict of a good state with some values replaced, or removed where the new value is `...`."""
    fields = states()[name].as_dict(packed=packed) | changes
    return {key: value for key, value in fields.items() if value is not ...}


def refusal(qs_dict) -> str:
    return message(QuantState.from_dict, qs_dict, device="cpu")


KEY = "quant_state.bitsandbytes__nf4"
PLAIN = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [5, 26]}
NAN, INF = float("nan"), float("inf")


def test_hostile_fields():
    table = states()["plain"].code
    wrong = table.clone()
    wrong[3] += 1e-3
    messages = [
        refusal({}),
        refusal(changed(absmax=...)),
        refusal(changed(extra=1)),
        refusal(changed(nested_absmax=torch.ones(1))),
        refusal(changed(quant_type="nf5")),
        refusal(changed(quant_type=["nf4"])),
        refusal(changed(quant_type=None)),
        refusal(changed(blocksize=0)),
        refusal(changed(blocksize=64.0)),
        refusal(changed(blocksize=True)),
        refusal(changed(blocksize=32)),
        refusal(changed(dtype="float64")),
        refusal(changed(dtype=["float32"])),
        refusal(changed(dtype=torch.float32)),
        refusal(changed(shape=5)),
        refusal(changed(shape=[5, -26])),
        refusal(changed(shape=[5.0, 26])),
        refusal(changed(shape=[5, "26"])),
        refusal(changed(shape=[2**62, 4])),
        refusal(changed(shape=[10**30])),
        refusal(changed(shape=[5, 2600])),
        refusal(changed(absmax=[1.0, 2.0, 3.0])),
        refusal(changed(absmax=torch.ones(2))),
        refusal(changed(absmax=torch.ones(3).double())),
        refusal(changed(absmax=torch.tensor([1.0, NAN, 1.0]))),
        refusal(changed(absmax=torch.tensor([1.0, INF, 1.0]))),
        refusal(changed(quant_map=table[:15])),
        refusal(changed(quant_map=table * NAN)),
        refusal({5: 1, **changed()}),
        refusal({"a.absmax": torch.ones(3), **changed()}),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
a quant state needs exactly one key 'quant_state.bitsandbytes__<quant_type>' or unpacked fields, got []
keys of a quant state must be ['absmax', 'blocksize', 'dtype', 'quant_map', 'quant_type', 'shape'], got ['blocksize', 'dtype', 'quant_map', 'quant_type', 'shape']
keys of a quant state must be ['absmax', 'blocksize', 'dtype', 'quant_map', 'quant_type', 'shape'], got ['absmax', 'blocksize', 'dtype', 'extra', 'quant_map', 'quant_type', 'shape']
keys of a quant state must be ['absmax', 'blocksize', 'dtype', 'nested_absmax', 'nested_blocksize', 'nested_dtype', 'nested_offset', 'nested_quant_map', 'quant_map', 'quant_type', 'shape'], got ['absmax', 'blocksize', 'dtype', 'nested_absmax', 'quant_map', 'quant_type', 'shape']
quant_type must be [formats] or None, for 8 bits (a codebook of your own has to be entered in bnbref.codebooks.FOUR_BIT first), got 'nf5'
quant_type must be [formats] or None, for 8 bits (a codebook of your own has to be entered in bnbref.codebooks.FOUR_BIT first), got ['nf4']
quant_map must be torch.float32 with 256 elements, got torch.float32 (16,)
blocksize must be an integer from 1 to 4096, got 0
blocksize must be an integer from 1 to 4096, got 64.0
blocksize must be an integer from 1 to 4096, got True
absmax must be torch.float32 with 5 elements, got torch.float32 (3,)
dtype must be ['bfloat16', 'float16', 'float32'], got 'float64'
dtype must be ['bfloat16', 'float16', 'float32'], got ['float32']
dtype must be ['bfloat16', 'float16', 'float32'], got torch.float32
shape must be a list of sizes, got 5
shape must be a list of sizes, got [5, -26]
shape must be a list of sizes, got [5.0, 26]
shape must be a list of sizes, got [5, '26']
shape must be a list of sizes, got [4611686018427387904, 4]
shape must be a list of sizes, got [1000000000000000000000000000000]
absmax must be torch.float32 with 204 elements, got torch.float32 (3,)
absmax must be torch.float32 with 3 elements, got [1.0, 2.0, 3.0]
absmax must be torch.float32 with 3 elements, got torch.float32 (2,)
absmax must be torch.float32 with 3 elements, got torch.float64 (3,)
absmax has NaN or infinite elements
absmax has NaN or infinite elements
quant_map must be torch.float32 with 16 elements, got torch.float32 (15,)
quant_map has NaN or infinite elements
keys of a quant state must be strings, got 5
'absmax' is given twice""",
    )
    assert refusal(changed(quant_map=wrong)).startswith("quant_map is not the codebook 'nf4': [-1.0, ")
    assert refusal(changed(quant_map=FOUR_BIT["fp4"] and states()["double"].code)).startswith(
        "quant_map is not the codebook"
    )


def test_hostile_double_quantization():
    messages = [
        refusal(changed("double", nested_absmax=...)),
        refusal(changed("double", absmax=torch.ones(40))),
        refusal(changed("double", absmax=torch.ones(41, dtype=torch.uint8))),
        refusal(changed("double", nested_absmax=torch.ones(2))),
        refusal(changed("double", nested_absmax=torch.tensor([NAN]))),
        refusal(changed("double", nested_blocksize=0)),
        refusal(changed("double", nested_blocksize=39)),
        refusal(changed("double", nested_blocksize="256")),
        refusal(changed("double", nested_dtype="float16")),
        refusal(changed("double", nested_offset=NAN)),
        refusal(changed("double", nested_offset=INF)),
        refusal(changed("double", nested_offset=1e39)),
        refusal(changed("double", nested_offset=10**400))[:60],
        refusal(changed("double", nested_offset=True)),
        refusal(changed("double", nested_offset="1")),
        refusal(changed("double", nested_quant_map=torch.ones(16))),
        refusal(changed("double", nested_quant_map=torch.full((256,), NAN))),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
keys of a quant state must be ['absmax', 'blocksize', 'dtype', 'nested_absmax', 'nested_blocksize', 'nested_dtype', 'nested_offset', 'nested_quant_map', 'quant_map', 'quant_type', 'shape'], got ['absmax', 'blocksize', 'dtype', 'nested_blocksize', 'nested_dtype', 'nested_offset', 'nested_quant_map', 'quant_map', 'quant_type', 'shape']
absmax must be torch.uint8 with 40 elements, got torch.float32 (40,)
absmax must be torch.uint8 with 40 elements, got torch.uint8 (41,)
nested_absmax must be torch.float32 with 1 elements, got torch.float32 (2,)
nested_absmax has NaN or infinite elements
nested_blocksize must be an integer from 1 to 4096, got 0
nested_blocksize must be 256, got 39
nested_blocksize must be an integer from 1 to 4096, got '256'
nested_dtype must be float32, got 'float16'
nested_offset must be a finite float32 number, got nan
nested_offset must be a finite float32 number, got inf
nested_offset must be a finite float32 number, got 1e+39
nested_offset must be a finite float32 number, got 100000000
nested_offset must be a finite float32 number, got True
nested_offset must be a finite float32 number, got '1'
nested_quant_map must be torch.float32 with 256 elements, got torch.float32 (16,)
nested_quant_map has NaN or infinite elements""",
    )


def test_hostile_blobs():
    good = changed(packed=True)
    text = json.dumps(PLAIN)

    def of(raw: bytes) -> dict:
        return good | {KEY: torch.tensor(list(raw), dtype=torch.uint8)}

    messages = [
        refusal(changed(packed=True, **{KEY: ...})),
        refusal(good | {"b.quant_state.bitsandbytes__nf4": good[KEY]}),
        refusal(good | {"quant_state.bitsandbytes__fp4": good[KEY]}),
        refusal({**changed(packed=True, **{KEY: ...}), "quant_state.bitsandbytes__fp4": good[KEY]}),
        refusal({**changed(packed=True, **{KEY: ...}), "quant_state.bitsandbytes__": good[KEY]}),
        refusal(of(b"")),
        refusal(of(b"{")),
        refusal(of(b"\xff\xfe")),
        refusal(of(b"[]")),
        refusal(of(b"null")),
        refusal(of(b"[" * 60000))[:60],
        refusal(of(b'{"shape": ' + b"9" * 5000 + b"}"))[:60],
        refusal(of(text.replace('"blocksize": 64', '"blocksize": 1e999').encode())),
        refusal(of(text.replace('"blocksize": 64', '"blocksize": NaN').encode())),
        refusal(of(text.replace("[5, 26]", '[5, 26], "shape": [1]').encode())),
        refusal(of(text.replace("[5, 26]", '[5, 26], "absmax": 1').encode())),
        refusal(of(text.replace("[5, 26]", '[5, 26], "code": 1').encode())),
        refusal(of(text.replace("[5, 26]", "{}").encode())),
        refusal(good | {KEY: good[KEY].float()}),
        refusal(good | {KEY: good[KEY][None]}),
        refusal(good | {KEY: torch.zeros(10**6, dtype=torch.uint8)}),
        refusal(good | {KEY: text}),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
a quant state needs exactly one key 'quant_state.bitsandbytes__<quant_type>' or unpacked fields, got ['absmax', 'quant_map']
a quant state needs exactly one key 'quant_state.bitsandbytes__<quant_type>' or unpacked fields, got ['absmax', 'b.quant_state.bitsandbytes__nf4', 'quant_map', 'quant_state.bitsandbytes__nf4']
a quant state needs exactly one key 'quant_state.bitsandbytes__<quant_type>' or unpacked fields, got ['absmax', 'quant_map', 'quant_state.bitsandbytes__fp4', 'quant_state.bitsandbytes__nf4']
quant_state.bitsandbytes__fp4 must be a JSON object of that quant_type, got {'quant_type': 'nf4', 'blocksize': 64, 'dtype': 'bfloat16', 'shape': [5, 26]}
quant_state.bitsandbytes__ must be a JSON object of that quant_type, got {'quant_type': 'nf4', 'blocksize': 64, 'dtype': 'bfloat16', 'shape': [5, 26]}
quant_state.bitsandbytes__nf4 is not UTF-8 JSON: Expecting value: line 1 column 1 (char 0)
quant_state.bitsandbytes__nf4 is not UTF-8 JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)
quant_state.bitsandbytes__nf4 is not UTF-8 JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte
quant_state.bitsandbytes__nf4 must be a JSON object of that quant_type, got []
quant_state.bitsandbytes__nf4 must be a JSON object of that quant_type, got None
quant_state.bitsandbytes__nf4 is not UTF-8 JSON: maximum rec
quant_state.bitsandbytes__nf4 is not UTF-8 JSON: Exceeds the
blocksize must be an integer from 1 to 4096, got inf
blocksize must be an integer from 1 to 4096, got nan
quant_state.bitsandbytes__nf4 is not UTF-8 JSON: 'shape' is given twice
['absmax'] are in the JSON of quant_state.bitsandbytes__nf4 and beside it
keys of a quant state must be ['absmax', 'blocksize', 'dtype', 'quant_map', 'quant_type', 'shape'], got ['absmax', 'blocksize', 'code', 'dtype', 'quant_map', 'quant_type', 'shape']
shape must be a list of sizes, got {}
quant_state.bitsandbytes__nf4 must be one-dimensional uint8 of a few bytes, got torch.float32 (77,)
quant_state.bitsandbytes__nf4 must be one-dimensional uint8 of a few bytes, got torch.uint8 (1, 77)
quant_state.bitsandbytes__nf4 must be one-dimensional uint8 of a few bytes, got torch.uint8 (1000000,)
a quant state needs exactly one key 'quant_state.bitsandbytes__<quant_type>' or unpacked fields, got ['absmax', 'quant_map', 'quant_state.bitsandbytes__nf4']""",
    )
    assert QuantState.from_dict(of(text.encode()), device="cpu") == states()["plain"]


@given(st.dictionaries(st.sampled_from([*PLAIN, "absmax", "quant_map", KEY, "nested_absmax", "nested_offset", "other"]),
                       st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
                       | st.sampled_from([torch.ones(3), torch.zeros(0), torch.zeros(3, dtype=torch.uint8)])))  # fmt: skip
def test_random_states_are_refused_with_a_value_error(changes):
    """Or accepted, where the changes happen to be harmless: then the state is whole."""
    for packed in (False, True):
        try:
            state = QuantState.from_dict(changed(packed=packed, **changes), device="cpu")
        except ValueError:
            continue
        assert state.scales().numel() == 3 or state.shape is None


# ---- other errors ---------------------------------------------------------------------------------------------------


def test_errors():
    x = ramp(8)
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    codes = torch.zeros(8, dtype=torch.uint8)
    a, b = torch.ones(2, 4, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8)
    messages = [
        message(F.quantize_4bit, x, quant_type="nf3"),
        message(F.quantize_4bit, x, blocksize=0),
        message(F.quantize_4bit, x.double()),
        message(F.quantize_4bit, torch.ones(6), quant_storage=F32),
        message(F.dequantize_4bit, packed),
        message(F.dequantize_4bit, packed, absmax=state.absmax),
        message(F.dequantize_4bit, packed, QuantState(state.absmax, blocksize=64, quant_type="nf4", dtype=F32)),
        message(F.dequantize_4bit, packed, QuantState(state.absmax, shape=(8,), blocksize=64, dtype=F32)),
        message(F.dequantize_4bit, packed, QuantState(state.absmax, shape=(8,), blocksize=64, quant_type="nf4")),
        message(F.quantize_blockwise, x, blocksize=-1),
        message(F.quantize_blockwise, x.int()),
        message(F.quantize_blockwise, x, code=torch.tensor([1.0, 0.0])),
        message(F.dequantize_blockwise, codes),
        message(F.dequantize_blockwise, x, absmax=torch.ones(1)),
        message(F.dequantize_blockwise, codes, absmax=torch.ones(1), code=torch.ones(300)),
        message(F.dequantize_blockwise, codes, absmax=torch.ones(1), code=[0.0, 1.0]),
        message(F.dequantize_blockwise, codes, absmax=torch.ones(1, dtype=torch.uint8)),  # the codes of scales
        message(F.dequantize_4bit, packed, absmax=torch.ones(1, dtype=torch.uint8), out=torch.ones(8)),
        message(F.quantize_4bit, torch.eye(2).to_sparse()),
        message(F.quantize_blockwise, torch.nested.nested_tensor([x, x], layout=torch.jagged)),
        message(F.get_4bit_type, "nf8"),
        message(F.get_4bit_type, "af4", blocksize=128),
        message(F.create_fp8_map, True, 4, 3, 7),
        message(F.gemv_4bit, x, packed),
        message(F.gemv_4bit, x, packed, transposed_A=True, state=state),
        message(F.int8_linear_matmul, a, b, dtype=F32),
        message(F.int8_double_quant, x[None], row_stats=x),
        message(F.int8_mm_dequant, a, torch.ones(2), torch.ones(4)),
        message(F.int8_mm_dequant, a.int(), torch.ones(2).half(), torch.ones(4)),
        message(F.quantize_4bit, [1.0, 2.0], error=TypeError),
        message(F.quantize_4bit, x.numpy(), error=TypeError),
        message(F.quantize_4bit, x, quant_storage="uint8", error=TypeError),
        message(F.dequantize_4bit, state, packed, error=TypeError),
        message(F.dequantize_4bit, *F.quantize_blockwise(x)),
        message(F.dequantize_blockwise, *F.quantize_4bit(ramp(64))),  # as many scales as if it were one of 8 bits
        message(F.dequantize_blockwise, codes, codes, error=TypeError),
        message(blockwise.dequantize, codes, torch.ones(1), torch.ones(256), 64, "float16"),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
quant_type must be one of [formats] or a Codebook of at most 16 values, got 'nf3'
blocksize must be a positive integer, got 0
A must be float32, float16 or bfloat16, got torch.float64
quant_storage torch.float32 has 4 bytes, which do not divide the 3 bytes of 6 packed elements
dequantize_4bit needs quant_state, or both absmax and out
dequantize_4bit needs quant_state, or both absmax and out
this operation needs the quant state's shape, which is None
quant_type is None: this QuantState is not one of a 4-bit tensor
this operation needs the quant state's dtype, which is None
blocksize must be a positive integer, got -1
A must be float32, float16 or bfloat16, got torch.int32
values of codebook 'code' must be at least two, sorted, got [1.0, 0.0]
dequantize_blockwise needs quant_state or absmax, got neither
codes must be uint8, got torch.float32
code must have 2 to 256 values, got 300
code must be a torch.Tensor or Codebook or None, got list
absmax must be float32, float16 or bfloat16, got torch.uint8
absmax must be float32, float16 or bfloat16, got torch.uint8
A must be dense, got torch.sparse_coo
A must be dense, got a nested tensor
quant_type must be one of [formats] or a Codebook of at most 16 values, got 'nf8'
af4 is defined for blocksize 64, got 128
total_bits must be exponent_bits + precision_bits + sign = 8, got 7
state is required: it holds the scales and the shape of B
transposed_A and transposed_B must be False: B is a weight [n, k] and multiplies from the right
dtype must be torch.int32, got torch.float32
row_stats must be None: results are returned, not written into tensors of the caller
A must be int32 [..., n], got torch.int8 (2, 4)
row_stats must be float32 [2], got torch.float16 (2,)
A must be a torch.Tensor, got list
A must be a torch.Tensor, got numpy.ndarray
quant_storage must be a torch.dtype, got 'uint8'
A must be a torch.Tensor, got QuantState
quant_type is None: this QuantState is not one of a 4-bit tensor
quant_state is one of 4-bit codes, 'fp4': dequantize_4bit undoes these
quant_state must be a QuantState or None, got Tensor
dtype must be a torch.dtype, got 'float16'""",
    )


# ---- devices --------------------------------------------------------------------------------------------------------

_A, _W = torch.ones(4, 64), torch.ones(8, 64)
_CODES, _SCALES = torch.ones(8, 64, dtype=torch.int8), torch.ones(8)


def _elsewhere(x):
    return x.to("meta")


def _states():
    packed, state = F.quantize_4bit(_W, quant_type="nf4")
    codes, scales = F.quantize_blockwise(_W)
    return packed, state, codes, scales


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p, s, c, b: F.dequantize_4bit(_elsewhere(p), s),
            "absmax must be on the device of packed, meta, got cpu",
        ),
        (
            lambda p, s, c, b: F.dequantize_4bit(p, s.map(_elsewhere)),
            "absmax must be on the device of packed, cpu, got meta",
        ),
        (
            lambda p, s, c, b: F.dequantize_blockwise(_elsewhere(c), b),
            "absmax must be on the device of codes, meta, got cpu",
        ),
        (lambda p, s, c, b: bnbref.matmul_4bit(_elsewhere(_A), p, s), "B must be on the device of A, meta, got cpu"),
        (
            lambda p, s, c, b: bnbref.matmul_4bit(_A, p, s.map(_elsewhere)),
            "absmax must be on the device of packed, cpu",
        ),
        (
            lambda p, s, c, b: bnbref.matmul_4bit(_A, p, s, bias=_elsewhere(_SCALES)),
            "bias must be on the device of A, cpu",
        ),
        (lambda p, s, c, b: F.gemv_4bit(_elsewhere(_A[:1]), p, state=s), "B must be on the device of A, meta, got cpu"),
        (lambda p, s, c, b: bnbref.matmul(_A, _elsewhere(_W)), "B must be on the device of A, cpu, got meta"),
        (
            lambda p, s, c, b: F.int8_linear_matmul(_CODES, _elsewhere(_CODES)),
            "b must be on the device of a, cpu, got meta",
        ),
        (
            lambda p, s, c, b: F.int8_vectorwise_dequant(_CODES, _elsewhere(_SCALES)),
            "must be on the device of codes, cpu",
        ),
        (
            lambda p, s, c, b: F.int8_mm_dequant(_CODES.int(), _SCALES, _elsewhere(_SCALES)),
            "col_stats must be on the device of A, cpu, got meta",
        ),
        (lambda p, s, c, b: bnbref.nn.LinearNF4(64, 8).to("cpu")(_elsewhere(_A)), "B must be on the device of A, meta"),
        (
            lambda p, s, c, b: bnbref.nn.Linear8bitLt(64, 8, has_fp16_weights=False).to("cpu")(_elsewhere(_A)),
            "B must be on the device of A, meta, got cpu",
        ),
    ],
)
def test_tensors_of_two_devices_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(*_states())


def test_scales_in_blocks_that_no_reader_takes_are_not_saved():
    state = F.quantize_4bit(torch.ones(4, 64), quant_type="nf4", compress_statistics=True)[1]
    state.state2.blocksize = 128
    assert state.as_dict()["nested_blocksize"] == 128
    with pytest.raises(ValueError, match=r"blocks of 256; state2\.blocksize is 128"):
        state.as_dict(packed=True)


def test_a_state_that_is_moved_to_none_stays():
    """As a tensor, and as bitsandbytes' states."""
    _, state = F.quantize_4bit(torch.ones(64), compress_statistics=True)
    absmax = state.absmax
    state.to(None)
    assert state.absmax is absmax
