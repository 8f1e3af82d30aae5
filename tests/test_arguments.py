"""What users call with the wrong thing: it gives an answer, or an error of ours that names the argument, and none of torch."""

import fractions
import inspect
import itertools
import traceback

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import bnbref
from bnbref import Codebook, blockwise, codebooks, fourbit, int8, nested
from bnbref import functional as F
from bnbref.arguments import checked

pytestmark = pytest.mark.usefixtures("eager")

X = torch.linspace(-1.0, 1.0, 256).view(4, 64)
PACKED, STATE = F.quantize_4bit(X, quant_type="nf4", compress_statistics=True)
SCALES = F.quantize_4bit(X, quant_type="nf4")[1].absmax
CODES, STATE8 = F.quantize_blockwise(X)
ROWS, ABSMAX, _ = F.int8_vectorwise_quant(X)
PRODUCT = F.int8_linear_matmul(ROWS, ROWS)
LT = bnbref.MatmulLtState(CB=ROWS, SCB=ABSMAX, has_fp16_weights=False)

# The arguments of a call that is right; those that are left out have their defaults.
CALLS = {
    F.quantize_blockwise: {"A": X, "blocksize": 64},
    F.dequantize_blockwise: {"A": CODES, "quant_state": STATE8},
    F.quantize_4bit: {"A": X},
    F.dequantize_4bit: {"A": PACKED, "quant_state": STATE},
    F.quantize_fp4: {"A": X},
    F.quantize_nf4: {"A": X},
    F.dequantize_fp4: {"A": PACKED, "quant_state": STATE},
    F.dequantize_nf4: {"A": PACKED, "absmax": SCALES, "out": X.clone()},
    F.gemv_4bit: {"A": X, "B": PACKED, "state": STATE},
    F.int8_vectorwise_quant: {"A": X},
    F.int8_vectorwise_dequant: {"A": ROWS, "stats": ABSMAX},
    F.int8_double_quant: {"A": X},
    F.int8_linear_matmul: {"A": ROWS, "B": ROWS},
    F.int8_mm_dequant: {"A": PRODUCT, "row_stats": ABSMAX, "col_stats": ABSMAX},
    F.create_dynamic_map: {},
    F.create_linear_map: {},
    F.create_fp8_map: {},
    F.create_normal_map: {},
    F.get_4bit_type: {"typename": "nf4"},
    bnbref.matmul_4bit: {"A": X, "B": PACKED, "quant_state": STATE},
    bnbref.matmul: {"A": X, "B": ROWS, "state": LT},
    blockwise.quantize: {"x": X, "codebook": codebooks.DYNAMIC, "blocksize": 64},
    blockwise.dequantize: {
        "codes": CODES, "absmax": STATE8.absmax, "values": STATE8.code, "blocksize": 4096, "dtype": torch.float16
    },
    fourbit.quantize: {"x": X, "codebook": codebooks.NF4},
    fourbit.dequantize: {
        "packed": PACKED, "absmax": SCALES, "codebook": codebooks.NF4, "blocksize": 64, "shape": (4, 64), "dtype": X.dtype
    },
    int8.quantize: {"x": X},
    int8.dequantize: {"codes": ROWS, "absmax": ABSMAX},
    int8.dequantize_product: {"A": PRODUCT, "row_stats": ABSMAX, "col_stats": ABSMAX},
    int8.multiply: {"a": ROWS, "b": ROWS},
    nested.quantize: {"absmax": SCALES},
    codebooks.dynamic: {},
    codebooks.linear: {},
    codebooks.fp8: {},
    codebooks.normal: {},
    Codebook: {"name": "three", "values": (-1.0, 0.0, 1.0), "thresholds": (-0.5, 0.5)},
    bnbref.QuantState.from_dict: {"qs_dict": STATE.as_dict(packed=True), "device": "cpu"},
}  # fmt: skip


def _linear4bit(x, **kwargs):
    return bnbref.nn.Linear4bit(64, 8, **kwargs).to("cpu")(x)


def _linear8bit(x, **kwargs):
    return bnbref.nn.Linear8bitLt(64, 8, **kwargs).to("cpu")(x)


LAYERS = {
    (_linear4bit, ("x", "compute_dtype", "compress_statistics", "quant_type", "quant_storage")): {"x": X},
    (_linear8bit, ("x", "has_fp16_weights", "threshold")): {"x": X},
    (bnbref.nn.Params4bit, ("data", "compress_statistics", "quant_type", "bnb_quantized")): {"data": X},
    (bnbref.nn.Int8Params, ("data", "has_fp16_weights")): {"data": X},
}


def _arguments():
    for function, given_ in CALLS.items():
        for name in inspect.signature(function).parameters:
            if name != "device":  # torch says which devices there are
                yield function, given_, name
    for (function, names), given_ in LAYERS.items():
        for name in names:
            yield function, given_, name


ARGUMENTS = {f"{call[0].__module__}.{call[0].__qualname__}({call[2]})": call for call in _arguments()}

sizes = st.lists(st.integers(0, 5), max_size=3)
dtypes = st.sampled_from([
    torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.float8_e4m3fn,
])  # fmt: skip
tensors = st.one_of(
    st.builds(lambda size, dtype: torch.ones(size).to(dtype), sizes, dtypes),
    st.builds(lambda size, dtype: torch.empty(size, dtype=dtype, device="meta"), sizes, dtypes),
    st.builds(lambda size: torch.ones(size).to_sparse(), sizes.filter(bool)),
    st.builds(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
)
numbers = st.one_of(
    st.integers(), st.floats(), st.complex_numbers(), st.booleans(), st.fractions(), st.decimals(),
    # No float is so large, and Python writes no more than 4300 digits.
    st.sampled_from([10**400, -(10**400), 10**5000, fractions.Fraction(10**400), 2**63, -(2**63)]),
    st.sampled_from([np.float16(0.5), np.float32(0.5), np.int64(64), np.uint8(4), np.bool_(True), np.array(0.5)]),
)  # fmt: skip
junk = st.one_of(
    st.none(), numbers, st.text(max_size=3), st.binary(max_size=3), st.lists(numbers, max_size=3), dtypes, tensors,
    st.builds(tuple, st.lists(numbers, max_size=3)), st.builds(dict), st.builds(object), st.just(int),
    st.builds(lambda size: np.ones(size, "float32"), sizes), st.builds(lambda: nn.Linear(2, 2)), st.just(codebooks.NF4),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:the weight was quantized as")  # an A as wide as the weight has rows
@settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@example(call="bnbref.fourbit.dequantize(shape)", value="0")
@given(call=st.sampled_from(list(ARGUMENTS)), value=junk)
def test_no_argument_ends_in_an_error_of_torch(call, value):
    function, right, name = ARGUMENTS[call]
    error = None
    try:
        function(**{**right, name: value})
    except (TypeError, ValueError, NotImplementedError) as raised:
        error = raised
    if error is not None:
        assert "bnbref" in traceback.extract_tb(error.__traceback__)[-1].filename, error
    if isinstance(error, TypeError):
        assert name in str(error)


def _freed(value):
    tensor = value.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    "call", [name for name, (_, right, key) in ARGUMENTS.items() if torch.is_tensor(right.get(key))]
)
def test_a_tensor_without_its_memory_is_named(call):
    """As FSDP1 leaves it. Compiled code would read from nowhere."""
    function, right, name = ARGUMENTS[call]
    with pytest.raises(ValueError, match=r"^[a-z]* ?[a-zA-Z0-9_.]+ of shape .* bytes, and its storage has 0"):
        function(**{**right, name: _freed(right[name])})


def test_every_function_of_the_surface_is_called():
    assert set(map(F.__dict__.get, F.__all__)) - {F.QuantState} <= set(CALLS)


def test_what_is_said():
    for value, said in (
        ("False", "must be a bool, got 'False'"),
        (2, "must be a bool, got 2"),
        (torch.ones(2), "must be a bool, got Tensor"),
        (np.bool_(True), r"must be a bool, got numpy\.bool"),
    ):
        with pytest.raises(TypeError, match=f"compress_statistics {said}"):
            F.quantize_4bit(X, compress_statistics=value)
    with pytest.raises(TypeError, match="quant_state must be a QuantState or None, got list"):
        bnbref.matmul_4bit(X, PACKED, [SCALES])
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        bnbref.matmul(X, ROWS, state=LT, threshold=float("nan"))
    with pytest.raises(TypeError, match=r"bias must be a torch\.Tensor, got 'x'"):
        bnbref.matmul_4bit(X, PACKED, STATE, bias="x")
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        bnbref.nn.LinearNF4(64, 8).to("cpu")([1.0])
    with pytest.raises(TypeError, match=r"compute_dtype must be a torch\.dtype or None, got 'bfloat16'"):
        bnbref.nn.LinearNF4(64, 8, compute_dtype="bfloat16")


def test_a_layer_refuses_settings_that_no_product_and_no_file_has():
    """When it is made: a product, or loading what was saved, may be hours later."""
    floats = "float32, float16, bfloat16"
    layer = bnbref.nn.LinearNF4(64, 8)
    for dtype in (torch.float64, torch.int8, torch.complex64):
        with pytest.raises(ValueError, match=f"compute_dtype must be {floats} or None, got {dtype}"):
            bnbref.nn.LinearNF4(64, 8, compute_dtype=dtype)
        with pytest.raises(ValueError, match=f"compute_dtype must be {floats} or None, got {dtype}"):
            layer.compute_dtype = dtype
    for dtype, make in itertools.product((torch.int16, torch.complex64), (bnbref.nn.LinearNF4, bnbref.nn.EmbeddingNF4)):
        with pytest.raises(
            ValueError, match=f"quant_storage must be one of uint8, {floats}, int8, float64, .* got {dtype}"
        ):
            make(64, 8, quant_storage=dtype)
    assert layer.compute_dtype is None
    with pytest.raises(ValueError, match=r"threshold must be 0 \(off\) or positive, got -1"):
        bnbref.nn.Linear8bitLt(64, 8, threshold=-1)


def test_numbers_of_numpy_are_numbers():
    codes, absmax, columns = F.int8_vectorwise_quant(X, threshold=np.float32(0.5))
    assert all(map(torch.equal, (codes, absmax, columns), F.int8_vectorwise_quant(X, 0.5)))


def test_a_signature_stays_what_it_is():
    def function(x: int, *, names: dict[str, int] | None = None, **others: int) -> int:
        return x

    judged = checked(function)
    assert inspect.signature(judged) == inspect.signature(function)
    assert judged(1, names={}, other="not judged") == 1
    with pytest.raises(TypeError, match="names must be a dict or None, got list"):
        judged(1, names=[])


def test_a_code_without_a_value_is_zero():
    """Compiled code would read the memory behind the values."""
    codes = torch.tensor([0, 2, 3, 255], dtype=torch.uint8)
    values = torch.tensor([-1.0, 0.0, 1.0])
    decoded = blockwise.dequantize(codes, torch.tensor([2.0]), values, 4, torch.float32)
    assert decoded.tolist() == [-2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: STATE.map(torch.clone).to(torch.float64),
            "device must be a torch.device or str or None, got torch.float64",
        ),
        (lambda: STATE.map(torch.clone).to(True), "device must be a torch.device or str or None, got True"),
        (lambda: STATE.as_dict(packed="False"), "packed must be a bool, got 'False'"),
        (lambda: codebooks.linspace(0.0, 1.0, 2.5), "points must be an integer, got 2.5"),
        (lambda: codebooks.linspace(0.0, 1.0, -1), "points must not be negative, got -1"),
        (lambda: codebooks.value_table("nf4", torch.device("cpu")), "codebook must be a Codebook, got 'nf4'"),
        (lambda: codebooks.value_table(codebooks.NF4, None), "device must be a torch.device, got None"),
        (lambda: int8.dequantize(ROWS, ABSMAX, torch.int32), "dtype must be float32, .* got torch.int32"),
        (
            lambda: int8.dequantize_product(PRODUCT, ABSMAX, ABSMAX, dtype=torch.float64),
            "dtype must be float32, .*float64",
        ),
        (lambda: bnbref.install_as_bitsandbytes(force="False"), "force must be a bool, got 'False'"),
        (lambda: bnbref.install_as_bitsandbytes(patch_hf="no"), "patch_hf must be a bool, got 'no'"),
        (lambda: bnbref.nn.Params4bit(X, quant_state=SCALES), "quant_state must be a QuantState or None, got Tensor"),
        (lambda: bnbref.nn.Params4bit.from_prequantized([1], {}), "data must be a torch.Tensor, got list"),
        (lambda: bnbref.nn.Int8Params(X, SCB=[1.0]), "SCB must be a torch.Tensor or None, got list"),
        (lambda: bnbref.nn.replace_parameter_4bit(None, "w"), "module must be a Module, got None"),
        (lambda: bnbref.nn.replace_parameter_4bit(nn.Linear(2, 2), 0), "param_name must be a str, got 0"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_device_may_be_its_number_and_nothing_else_that_is_no_device():
    @checked
    def of(device: torch.device | str) -> object:
        return device

    assert [of(device) for device in (0, "cpu", torch.device("cpu"))] == [0, "cpu", torch.device("cpu")]
    for wrong in (True, 0.0, torch.float32, None):
        with pytest.raises(TypeError, match="device must be"):
            of(wrong)
