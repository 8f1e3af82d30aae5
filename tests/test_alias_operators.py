"""torch.ops.bitsandbytes and what only the alias serves: against bnbref's own functions, torch, and the real bitsandbytes."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

import bnbref
from bnbref import functional, int8
from bnbref.codebooks import FOUR_BIT, Codebook
from bnbref.integrations.bitsandbytes import extras, finder, ops, updates, utils
from bnbref.optim import rules

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("eager")

torch.manual_seed(0)
A = torch.randn(6, 128)
W = torch.randn(64, 128)
PACKED, STATE = bnbref.functional.quantize_4bit(W, quant_type="nf4")
NESTED_PACKED, NESTED = bnbref.functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
CODES, EIGHT = functional.quantize_blockwise(A, blocksize=64)
CA, SCA, _ = int8.quantize(A)
CB, SCB, _ = int8.quantize(W)
BIAS = torch.randn(64)
COLUMNS = torch.tensor([3, 77])
PRODUCT = int8.multiply(CA, CB)
SIGNED, UNSIGNED = functional.create_dynamic_map(True), functional.create_dynamic_map(False)

DOUBLE = {"absmax_8bit": NESTED.absmax, "absmax_code": NESTED.state2.code, "absmax_offset": NESTED.offset}
SHAPE = list(W.shape)
# A result whose dtype is not the input's shows with these alone.
HALF, BF16 = A.half(), W.bfloat16()
HALF_CODES, HALF_SCALES, _ = int8.quantize(HALF)
CALLS = {
    "dequantize_4bit": [(PACKED, STATE.absmax, 64, "nf4", SHAPE, torch.bfloat16)],
    "dequantize_blockwise": [(CODES, EIGHT.absmax, EIGHT.code, 64, dtype) for dtype in (torch.float32, torch.float16)],
    "gemm_4bit": [(A, PACKED, SHAPE, STATE.absmax, 64, "nf4", BIAS), (HALF, PACKED, SHAPE, STATE.absmax, 64, "nf4")],
    "gemv_4bit": [(x, PACKED, SHAPE, STATE.absmax, STATE.code, 64) for x in (A, HALF)],
    "int8_double_quant": [(A, 2.0), (HALF, 0.0)],
    "int8_linear_matmul": [(CA, CB)],
    "int8_mixed_scaled_mm": [(A, CA, CB, SCA, SCB, COLUMNS, BIAS), (HALF, HALF_CODES, CB, HALF_SCALES, SCB)],
    "int8_mm_dequant": [(PRODUCT, SCA, SCB), (PRODUCT, SCA, SCB, torch.float32, BIAS)],
    "int8_scaled_mm": [(CA, CB, SCA, SCB, BIAS, torch.bfloat16)],
    "int8_vectorwise_dequant": [(CB, SCB)],
    "int8_vectorwise_quant": [(A,), (HALF, 2.0)],
    "quantize_4bit": [(W, 64, "nf4", torch.uint8), (BF16, 64, "fp4", torch.uint8)],
    "quantize_blockwise": [(A, SIGNED, 256), (HALF, SIGNED, 256)],
}
G, P, FIRST, SECOND = torch.randn(4, 300)
_codes = torch.full((300,), 127, dtype=torch.uint8), torch.zeros(300, dtype=torch.uint8)
OPTIMIZERS = {
    "optimizer_update_32bit": [
        ("adam", G, P, FIRST, SECOND.abs(), None, 0.0, 0.0, 0.9, 0.999, 0.0, 0.0, 1e-8, 0.01, 1, 1e-3, 1.0),
        ("lion", G, P, FIRST, None, None, 0.0, 0.0, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0, 1, 1e-3, 1.0),
    ],
    "optimizer_update_8bit_blockwise": [
        ("adam", G, P, *_codes, 0.9, 0.999, 0.0, 0.0, 1e-8, 1, 1e-3, SIGNED, UNSIGNED, *torch.zeros(2, 2), 0.01, 1.0),
    ],
}
CASES = [
    pytest.param(name, args, id=f"{name}-{i}")
    for name, all_args in (CALLS | OPTIMIZERS).items()
    for i, args in enumerate(all_args)
]


def test_every_operator_is_tried():
    assert ops.SCHEMAS.keys() == CALLS.keys() | OPTIMIZERS.keys()
    assert ops.KERNELS.keys() == ops.FAKES.keys() == ops.SCHEMAS.keys() | {f"{name}.out" for name in ops.WITH_OUT}
    assert len(ops.KERNELS) == 19


@pytest.mark.parametrize(("name", "args"), CASES)
def test_operators_pass_torchs_checks(bitsandbytes, name, args):
    library.opcheck(getattr(torch.ops.bitsandbytes, name).default, args)


@pytest.mark.parametrize("name", ops.WITH_OUT)
def test_results_are_written_into_out(bitsandbytes, name):
    args = CALLS[name][0]
    operator = getattr(torch.ops.bitsandbytes, name)
    want = operator(*args)
    out = torch.empty_like(want)
    library.opcheck(operator.out, args, {"out": out.clone()})
    assert operator.out(*args, out=out) is None
    assert torch.equal(out, want)
    with pytest.raises(ValueError, match="out must be"):
        operator.out(*args, out=torch.empty(1))


def test_operators_are_the_functions(bitsandbytes):
    call = torch.ops.bitsandbytes
    with torch.no_grad():
        want = bnbref.matmul_4bit(A, PACKED, STATE, bias=BIAS)
        double = bnbref.matmul_4bit(A, NESTED_PACKED, NESTED)
    assert torch.equal(call.gemm_4bit(A, PACKED, SHAPE, STATE.absmax, 64, "nf4", bias=BIAS), want)
    found = call.gemm_4bit(A, NESTED_PACKED, SHAPE, NESTED.state2.absmax, 64, "nf4", **DOUBLE)
    assert torch.equal(found, double)
    codes, absmax, columns = call.int8_vectorwise_quant(A, 2.0)
    mixed, _ = call.int8_mixed_scaled_mm(A, codes, CB, absmax, SCB, columns, BIAS)
    assert torch.equal(mixed, bnbref.matmul(A, W, threshold=2.0, bias=BIAS))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("quantize_4bit", (W, 64, "nf5", torch.uint8), "quant_type must be one of"),
        ("dequantize_4bit", (PACKED, STATE.absmax, 64, "nf4", [64, 127], torch.float32), "packed must hold"),
        ("dequantize_4bit", (PACKED, STATE.absmax, 64, "nf4", SHAPE, torch.int32), "dtype must be"),
        ("quantize_4bit", (W.double(), 64, "nf4", torch.uint8), "dtype must be one of .*, got torch.float64"),
        ("gemm_4bit", (A[:, :5], PACKED, SHAPE, STATE.absmax, 64, "nf4"), "shapeB must be"),
        ("gemv_4bit", (A, PACKED, SHAPE, STATE.absmax, torch.arange(16.0), 64), "code must be the values of one of"),
        ("int8_mm_dequant", (CA, SCA, SCB), "A must be int32"),
        ("int8_linear_matmul", (A, CB), "must be int8"),
    ],
)
def test_operators_refuse(bitsandbytes, name, args, message):
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.bitsandbytes, name)(*args)


@pytest.mark.parametrize("name", ["quantize_4bit", "dequantize_4bit"])
def test_fakes_refuse_the_dtypes_that_kernels_refuse(bitsandbytes, name):
    """So that torch.compile says so, before it runs."""
    args = (
        (W.double(), 64, "nf4", torch.uint8)
        if name == "quantize_4bit"
        else (PACKED, STATE.absmax, 64, "nf4", SHAPE, torch.float64)
    )
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got torch\.float64"):
        getattr(torch.ops.bitsandbytes, name)(*meta)


def test_a_codebook_of_another_size_beside_those_of_sixteen(bitsandbytes, monkeypatch):
    """The operator is given the values of a format, and looks for it among all that were entered."""
    want = torch.ops.bitsandbytes.gemv_4bit(A, PACKED, SHAPE, STATE.absmax, STATE.code, 64)
    small = Codebook.nearest("small", [-1, -0.5, 0, 0.25, 0.5, 0.75, 0.875, 1])
    monkeypatch.setattr(ops, "FOUR_BIT", {"small": small, **FOUR_BIT})
    found = torch.ops.bitsandbytes.gemv_4bit(A, PACKED, SHAPE, STATE.absmax, STATE.code, 64)
    assert torch.equal(found, want)


# ---- optimizers -----------------------------------------------------------------------------------------------------

FAMILIES = {
    "adagrad": (bnbref.optim.Adagrad, {"lr": 0.01}),
    "adam": (bnbref.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "ademamix": (bnbref.optim.AdEMAMix, {"lr": 0.01, "alpha": 5.0}),
    "lamb": (bnbref.optim.LAMB, {"lr": 0.01}),
    "lars": (bnbref.optim.LARS, {"lr": 0.01, "momentum": 0.9}),
    "lion": (bnbref.optim.Lion, {"lr": 0.01}),
    "momentum": (bnbref.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "rmsprop": (bnbref.optim.RMSprop, {"lr": 0.01}),
}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_updates_are_those_of_the_classes(name, bits):
    cls, options = FAMILIES[name]
    p = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
    optimizer = cls([p], optim_bits=bits, **options)
    mine = p.detach().clone()
    stacked = name == "ademamix"
    group = optimizer.settings(p, optimizer.param_groups[0])
    betas = (*group["betas"], 0.0, 0.0)[:3]
    numbers = (*betas, group.get("alpha") or 0.0)
    dtype, shape = (torch.uint8 if bits == 8 else torch.float32), ((2, 8192) if stacked else (8192,))
    signed = name not in ("adagrad", "rmsprop")
    zero = {True: SIGNED, False: UNSIGNED}
    fill = (zero[signed] == 0).nonzero().item() if bits == 8 else 0
    state1 = torch.full(shape, fill, dtype=dtype)
    state2 = torch.zeros(8192, dtype=dtype)
    absmax1, absmax2 = torch.zeros(*shape[:-1], 32), torch.zeros(32)
    for t in (1, 2, 3):
        g = torch.sin(torch.arange(8192.0) * t)
        p.grad = g.clone()
        optimizer.step()
        decay, lr, eps = group["weight_decay"], group["lr"], group["eps"]
        if bits == 32:
            updates.optimizer_update_32bit(
                name, g, mine, state1, numbers[0], eps, t, lr, state2, *numbers[1:], decay,
                max_unorm=group["max_unorm"],
            )  # fmt: skip
        elif group["max_unorm"] > 0:
            pytest.skip("the 8-bit function has no max_unorm")
        else:
            updates.optimizer_update_8bit_blockwise(
                name, g, mine, state1, state2, *numbers, eps, t, lr, zero[signed], UNSIGNED, absmax1, absmax2, decay
            )
        assert torch.equal(mine, p), t


@pytest.mark.parametrize("name", rules.SIGNED_RULES)
def test_bitsandbytes_own_classes_code_a_sum_of_squares_with_a_sign(name):
    """The same step; the state is coded by the map with a sign, whose zero is code 127."""
    cls, options = FAMILIES[name]
    p, g = torch.nn.Parameter(torch.linspace(-1, 1, 8192)), torch.sin(torch.arange(8192.0))
    mine, codes, absmax = p.detach().clone(), torch.zeros(8192, dtype=torch.uint8), torch.zeros(32)
    optimizer = cls([p], optim_bits=8, **options)
    p.grad = g.clone()
    optimizer.step()
    group = optimizer.param_groups[0]
    numbers = ((*group["betas"], 0.0, 0.0)[:3], 0.0, group["eps"], 1, group["lr"])
    updates.optimizer_update_8bit_blockwise(
        name, g, mine, codes, None, *numbers[0], *numbers[1:], SIGNED, None, absmax, None
    )
    assert torch.equal(mine, p)
    assert torch.equal(absmax, optimizer.state[p]["absmax1"])
    assert codes.min() == 127  # the square of sin(0)
    state = functional.QuantState(absmax, code=SIGNED, blocksize=256, dtype=torch.float32)
    again, _ = functional.quantize_blockwise(functional.dequantize_blockwise(codes, state), SIGNED, blocksize=256)
    assert torch.equal(again, codes)


def test_updates_refuse():
    p, g, state = torch.ones(8), torch.ones(8), torch.zeros(8)
    numbers = {"beta1": 0.9, "eps": 1e-8, "step": 1, "lr": 0.1}
    for error, arguments, message in (
        (ValueError, ("nadam", g, p, state), "optimizer_name must be one of"),
        (ValueError, ("lion", g[:4], p, state), "g must be like p"),
        (ValueError, ("adam", g, p, state), "state2 must be contiguous"),
        (ValueError, ("lion", g, torch.ones(8, 2)[:, 0], state), "p must be contiguous"),
        (ValueError, ("lion", g, p, state.half()), r"state1 must be contiguous torch\.float32 .* got torch\.float16"),
    ):
        with pytest.raises(error, match=message):
            updates.optimizer_update_32bit(*arguments, **numbers)
    with pytest.raises(NotImplementedError, match="skip_zeros"):
        updates.optimizer_update_32bit("lion", g, p, state, **numbers, skip_zeros=True)
    codes = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="qmap1 must be create_dynamic_map"):
        updates.optimizer_update_8bit_blockwise(
            "lion", g, p, codes, None, 0.9, 0.9, 0, 0, 0, 1, 0.1, UNSIGNED, None, torch.zeros(1), None
        )
    with pytest.raises(ValueError, match=r"absmax1 must be contiguous torch\.float32 .* got torch\.float64"):
        updates.optimizer_update_8bit_blockwise(
            "lion", g, p, codes, None, 0.9, 0.9, 0, 0, 0, 1, 0.1, SIGNED, None, torch.zeros(1).double(), None
        )
    with pytest.raises(ValueError, match=r"qmap2 must be create_dynamic_map.*, got None"):
        updates.optimizer_update_8bit_blockwise(
            "adam", g, p, codes, codes, 0.9, 0.9, 0, 0, 0, 1, 0.1, SIGNED, None, torch.zeros(1), torch.zeros(1)
        )
    assert torch.equal(p, torch.ones(8))
    updates.optimizer_update_32bit("lion", g, p, state, gnorm_scale=0.5, **numbers)
    assert torch.equal(p, torch.full((8,), 0.9))


# ---- old functions --------------------------------------------------------------------------------------------------


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 4), dims=st.sampled_from([(2, 2), (3, 2), (3, 3)]),
    turns=st.tuples(st.booleans(), st.booleans()), seed=st.integers(0, 99),
)  # fmt: skip
def test_igemm_is_the_integer_product(sizes, dims, turns, seed):
    b, m, k, n = sizes
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape, transposed, dim):
        shape = shape if dim == 3 else shape[1:]
        x = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        return x.transpose(-1, -2).contiguous() if transposed else x

    left, right = codes(b, m, k, transposed=turns[0], dim=dims[0]), codes(b, k, n, transposed=turns[1], dim=dims[1])
    whole = [
        (x.transpose(-1, -2) if transposed else x).long() for x, transposed in zip((left, right), turns, strict=True)
    ]
    found = extras.igemm(left, right, None, *turns)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), whole[0] @ whole[1])
    out = torch.empty_like(found)
    assert extras.igemm(left, right, out, *turns) is out
    assert torch.equal(out, found)


def test_igemm_over_rows_is_the_gradient_of_a_weight():
    x = torch.randint(-9, 9, (2, 5, 3), dtype=torch.int8)
    y = torch.randint(-9, 9, (2, 5, 4), dtype=torch.int8)
    out = torch.empty(3, 4, dtype=torch.int32)
    extras.igemm(x, y, out)
    assert torch.equal(out, torch.einsum("bsi,bso->io", x.int(), y.int()))
    with pytest.raises(ValueError, match="A and B must multiply"):
        extras.igemm(x, y)
    with pytest.raises(TypeError, match=r"A and B must be torch\.int8"):
        extras.igemm(x.float(), y)
    with pytest.raises(ValueError, match="three dimensions"):
        extras.batched_igemm(x[0], y)


def test_outliers_are_traced():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 8))
    with torch.no_grad():
        model[1].weight[:, 5] *= 1000
    tracer = utils.OutlierTracer.get_instance()
    assert tracer.get_outliers(model[0].weight) is None
    tracer.initialize(model)
    x = torch.randn(4, 16).clamp(-2, 2)
    x[2, 7] = 50
    for _ in range(2):
        model(x)
    assert 7 in tracer.get_outliers(model[0].weight)
    assert tracer.get_outliers(model[1].weight).tolist() == []  # one of 16 is no more than sqrt(15) deviations away
    assert utils.find_outlier_dims(model[1].weight, topk=1).tolist() == [5]
    assert not model[0]._forward_pre_hooks
    with pytest.raises(TypeError, match=r"module must be an nn\.Linear"):
        utils.outlier_hook(torch.nn.ReLU(), (x,))
    with pytest.raises(RuntimeError, match="get_instance"):
        utils.OutlierTracer()


def test_linear_layers_are_replaced():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)))
    model.lm_head = torch.nn.Linear(2, 2)
    old = model[0]
    utils.replace_linear(model, lambda k, n, bias: bnbref.nn.LinearNF4(k, n, bias), copy_weights=True)
    assert type(model[0]) is type(model[1][0]) is bnbref.nn.LinearNF4
    assert model[0].weight is old.weight
    assert model[1][0].bias is None
    assert type(model.lm_head) is torch.nn.Linear


# ---- as a backend of bitsandbytes -----------------------------------------------------------------------------------

BACKEND = """
import json, torch, warnings
warnings.simplefilter("ignore")
import bitsandbytes as bnb
torch.manual_seed(0)
# where bitsandbytes' own kernel is wrong: rows that are not whole blocks
W = torch.randn(3, 80)
packed, state = bnb.functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
print(json.dumps([W.tolist(), packed.flatten().tolist(), bnb.functional.dequantize_4bit(packed, state).tolist()]))
"""


def test_the_entry_point_is_installed(monkeypatch):
    """What `import bitsandbytes` looks for, and calls: nothing where the variable is not set."""
    found = next(iter(importlib.metadata.entry_points(group="bitsandbytes.backends", name="bnbref")), None)
    if found is None and not any(x.metadata["Name"] == "bnbref" for x in importlib.metadata.distributions()):
        pytest.skip("bnbref runs from its sources, and is not installed")
    monkeypatch.delenv("BNBREF_BACKEND_FOR", raising=False)
    monkeypatch.setattr(library, "register_kernel", None)
    assert found is not None
    found.load()()


@pytest.mark.skipif(not finder.is_installed(), reason="bitsandbytes is not installed")
def test_kernels_in_the_real_bitsandbytes():
    """By the entry point alone: the program never names bnbref."""
    if not any(x.metadata["Name"] == "bnbref" for x in importlib.metadata.distributions()):
        pytest.skip("bnbref runs from its sources, and is not installed")
    env = {**os.environ, "BNBREF_COMPILE": "0", "BNBREF_BACKEND_FOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", BACKEND], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    weight, packed, values = json.loads(done.stdout.splitlines()[-1])
    expected, state = functional.quantize_4bit(torch.tensor(weight), quant_type="nf4")
    assert packed == expected.flatten().tolist()
    assert torch.equal(torch.tensor(values), functional.dequantize_4bit(expected, state))


@pytest.mark.parametrize("devices", ["gpu9", "cpu,cuda:0"])
def test_a_backend_for_a_device_that_there_is_not(monkeypatch, devices):
    from bnbref.integrations.bitsandbytes.backend import register

    monkeypatch.setenv("BNBREF_BACKEND_FOR", devices)
    with pytest.raises(ValueError, match="BNBREF_BACKEND_FOR must name types of devices"):
        register()
