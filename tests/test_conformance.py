"""The conformance kit: its vectors agree with a second oracle, wrong backends do not pass, and the right one does."""

import functools
import html
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import kit_cases.__main__ as kit_cases
import kit_mutants
import kit_mutants_shapes
import kit_mutants_squares
import kit_mutants_strangers
import kit_mutants_training
import kit_mutants_version2
import kit_mutants_version3
import kit_mutants_version4
import numpy as np
import pytest
import second
import second_steps
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_board import Parsed

from bnbref.cli import main
from bnbref.conformance import backends, board, findings, judge, report, vectors, workers
from bnbref.conformance.backends import Backend
from bnbref.conformance.backends.reference import Eager
from bnbref.conformance.board import drawings, page
from bnbref.conformance.dialects import BNB_DEFAULT, PYTORCH_OPTIMIZER, TRANSFORMERS
from bnbref.conformance.expected import Also, Expected, same, wrong_elements
from bnbref.conformance.explain import explain
from bnbref.conformance.operations import OPERATIONS, arguments
from bnbref.conformance.predictions import decayed_within, predict
from bnbref.conformance.shrink import shrink
from bnbref.conformance.specification import FLAGS, RULES
from bnbref.conformance.text import parse_tensor, tensor_line
from bnbref.kernels import eager
from bnbref.subnormals import flushes_subnormals

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
STORED = vectors.read_all()
MODULES = (
    kit_mutants, kit_mutants_training, kit_mutants_strangers, kit_mutants_version2, kit_mutants_version3, kit_mutants_version4,
    kit_mutants_shapes, kit_mutants_squares,
)  # fmt: skip
MUTANTS = [mutant for module in MODULES for mutant in module.MUTANTS]
QUICK = [case for case in STORED if case.quick]
BY_ID = {case.id: case for case in STORED}
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


def of(operation):
    return [case for case in STORED if case.operation == operation]


def files_of(operation):
    """Its JSON files, of all versions."""
    return [file for folder in map(vectors.folder_of, vectors.VERSIONS) for file in folder.glob(f"{operation}.json")]


# ---- the vectors ----------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_cases_give_byte_for_byte():
    by_hand = ("README.md", "schema.json", "SHA256SUMS")
    for version, cases in kit_cases.all_cases().items():
        made = kit_cases.files(cases, version)
        folder = vectors.folder_of(version)
        stored = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in by_hand}
        assert sorted(made) == sorted(stored)
        assert [name for name in made if made[name] != stored[name]] == [], (
            "PYTHONPATH=tests python -m kit_cases bnbref/conformance"
        )


def test_the_files_are_small():
    files = (path for version in vectors.VERSIONS for path in vectors.folder_of(version).iterdir())
    assert sum(path.stat().st_size for path in files) < 8_000_000


@each_operation
def test_the_files_follow_their_schema(operation):
    jsonschema = pytest.importorskip("jsonschema")
    for file in files_of(operation):
        schema = json.loads((file.parent / "schema.json").read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(json.loads(file.read_text()), schema)


@each_operation
def test_safetensors_itself_reads_the_files(operation):
    safetensors = pytest.importorskip("safetensors.torch")
    for file in (file.with_suffix(".safetensors") for file in files_of(operation)):
        theirs, ours = safetensors.load_file(file), vectors.load_safetensors(file.read_bytes())
        assert theirs.keys() == ours.keys()
        for name, tensor in ours.items():
            assert theirs[name].dtype == tensor.dtype
            assert theirs[name].shape == tensor.shape
            assert vectors.raw(theirs[name]) == vectors.raw(tensor)


def test_every_rule_and_every_flag_has_a_case():
    # These are judged in every case, not in some.
    everywhere = {"G-2", "G-5"}
    assert {rule for case in STORED for rule in case.rules} >= set(RULES) - everywhere
    assert {flag for case in STORED for flag in case.flags} == set(FLAGS) - {"caller-mutation"}


def test_the_pages_of_the_specification_are_what_the_rules_say():
    spec = importlib.util.spec_from_file_location("specification", ROOT / "docs" / "specification.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder, pages = script.FOLDER, script.pages()
    assert sorted(pages) == sorted(path.name for path in folder.iterdir())
    stale = [name for name, text in pages.items() if (folder / name).read_text(encoding="utf-8") != text]
    assert stale == [], "python docs/specification.py"


# ---- the second oracle ----------------------------------------------------------------------------------------------


def flat(x):
    return [int(v) for v in x.reshape(-1).tolist()]


def eight_bit_name(values):
    for name in ("dynamic_signed", "dynamic_unsigned"):
        if np.array_equal(second.VALUES[name], second.floats(values)):
            return name
    raise AssertionError("an unknown codebook")


def second_4bit(x, blocksize, quant_type):
    packed, absmax = second.quantize_4bit(quant_type, second.floats(x), blocksize)
    return torch.tensor(packed, dtype=torch.uint8), torch.from_numpy(absmax)


def second_weight(packed, absmax, blocksize, quant_type, shape, dtype):
    codes = second.unpack(flat(packed), int(np.prod(shape)))
    return second.dequantize(second.VALUES[quant_type], codes, second.floats(absmax), blocksize, dtype).view(shape)


def second_scales(codes, absmax2, offset):
    return torch.from_numpy(second.nested_dequantize(flat(codes), second.floats(absmax2), np.float32(offset.item())))


def second_nested(x, blocksize, quant_type):
    packed, absmax = second_4bit(x, blocksize, quant_type)
    offset = second.nearest_float32(sum((Fraction(float(a)) for a in absmax), Fraction(0)) / len(absmax))
    codes, absmax2 = second.nested_quantize(absmax.numpy(), offset)
    return packed, torch.tensor(codes, dtype=torch.uint8), torch.from_numpy(absmax2), torch.tensor(float(offset))


def second_product(a, weight, bias):
    """Exact up to the rounding of float64, whose error is far below the bounds."""
    y = a.double().numpy() @ weight.double().numpy().T
    return torch.from_numpy(y if bias is None else y + bias.double().numpy())


def second_mm_dequant(product, row, column, bias, dtype):
    matrix = product.reshape(-1, product.shape[-1]).numpy()
    offset = None if bias is None else second.floats(bias)
    return second.int8_dequantize_product(matrix, second.floats(row), second.floats(column), offset, None, dtype).view(
        product.shape
    )


def second_int8(x, threshold):
    rows = second.floats(x).reshape(-1, x.shape[-1])
    codes, absmax, outlier = second.int8_quantize(rows, threshold)
    columns = [i for i, found in enumerate(outlier) if found]
    made = torch.tensor(codes, dtype=torch.int8).view(x.shape)
    return made, torch.from_numpy(absmax), torch.tensor(columns, dtype=torch.int64)


def second_file(x, blocksize, quant_type, nested):
    state = {"quant_type": quant_type, "blocksize": blocksize, "dtype": str(x.dtype)[6:], "shape": list(x.shape)}
    made = {"quant_map": torch.from_numpy(second.VALUES[quant_type].copy())}
    if nested:
        made["packed"], made["absmax"], made["nested_absmax"], offset = second_nested(x, blocksize, quant_type)
        made["nested_quant_map"] = torch.from_numpy(second.VALUES["dynamic_signed"].copy())
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
    else:
        made["packed"], made["absmax"] = second_4bit(x, blocksize, quant_type)
    return {**made, "state": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def second_load(packed, absmax, quant_map, state, quant_type, nested_absmax=None, nested_quant_map=None):
    fields = json.loads(bytes(state.tolist()))
    if nested_absmax is not None:
        absmax = second_scales(absmax, nested_absmax, torch.tensor(fields["nested_offset"]))
    dtype = getattr(torch, fields["dtype"])
    return second_weight(packed, absmax, fields["blocksize"], quant_type, fields["shape"], dtype)


def second_blockwise(x, values, blocksize):
    codes, absmax = second.quantize(eight_bit_name(values), second.floats(x), blocksize)
    return torch.tensor(codes, dtype=torch.uint8).view(x.shape), torch.from_numpy(absmax)


def second_deblockwise(codes, absmax, values, blocksize, dtype):
    return second.dequantize(second.floats(values), flat(codes), second.floats(absmax), blocksize, dtype).view(
        codes.shape
    )


# By the kit's names: those of the second implementation, and the order in which it has the states.
OPTIMIZERS = {
    "momentum": ("SGD", (1,)), "lars": ("LARS", (1,)), "adam": ("Adam", (1, 2)), "lamb": ("LAMB", (1, 2)),
    "lion": ("Lion", (1,)), "rmsprop": ("RMSprop", (1,)), "adagrad": ("Adagrad", (1,)), "ademamix": ("AdEMAMix", (1, 3, 2)),
}  # fmt: skip


def second_step(p, g, states, optimizer, step, gnorm_scale, max_unorm, beta1, beta2, beta3, signs=None, **group):
    """(new p, new states): `states` are arrays, or pairs of codes and scales in blocks of 256."""
    name, _ = OPTIMIZERS[optimizer]
    # Schedules that end with this step.
    group |= {"betas": (beta1, beta2, beta3), "t_alpha": step, "t_beta3": step}
    old, g = second.floats(p), second.floats(g) * np.float32(gnorm_scale)
    if signs is None:
        new, u, states = second.step(name, step, group, old, g, states)
    else:
        new, u, states = second.step_blocks(name, step, group, old, g, states, 256, signs)
    if max_unorm > 0 and name in ("LARS", "LAMB"):  # in float64: within the rule's interval, not bit for bit
        u = u.astype(np.float64)
        ratio = min(1.0, max_unorm * np.linalg.norm(old.astype(np.float64)) / np.linalg.norm(u))
        decay = 1 - group["lr"] * group["weight_decay"] if name == "LAMB" else 1
        new = (decay * old.astype(np.float64) - group["lr"] * ratio * u).astype(np.float32)
    return second.rounded(new, p.dtype).view(p.shape), states


def second_32bit(p, g, optimizer, **k):
    order = OPTIMIZERS[optimizer][1]
    states = [second.floats(k.pop(f"state{i}")) for i in order]
    new, states = second_step(p, g, states, optimizer, **k)
    return {"p": new} | {f"state{i}": torch.from_numpy(x).view(p.shape) for i, x in zip(order, states, strict=True)}


def second_8bit(p, g, optimizer, values1, values2=None, **k):
    order = OPTIMIZERS[optimizer][1]
    signed = eight_bit_name(values1) == "dynamic_signed"
    states = [(np.array(flat(k.pop(f"state{i}"))), second.floats(k.pop(f"absmax{i}"))) for i in order]
    new, states = second_step(p, g, states, optimizer, signs=[signed and i != 2 for i in order], **k)
    made = {"p": new}
    for i, (codes, scales) in zip(order, states, strict=True):
        codes = torch.from_numpy(codes).to(torch.uint8).view(p.shape)
        made |= {f"state{i}": codes, f"absmax{i}": torch.from_numpy(scales)}
    return made


def second_nonzero(values1, **k):
    """The states of an unsigned map as quantize_squares codes them: of what the step leaves in 32 bits."""
    made = second_8bit(values1=values1, **k)
    for i in (1, 2):
        values = values1 if i == 1 else k.get("values2")
        if values is not None and values[0] == 0:
            zero = made[f"state{i}"] == 0
            made[f"state{i}"] = torch.where(zero & ~still(k, i), torch.ones_like(made[f"state{i}"]), made[f"state{i}"])
    return made


def still(k, i):
    """Where an average of squares stays 0: the gradient is 0, and so was the average. A bad gradient keeps it."""
    return (~k["g"].isfinite() | (k["g"] == 0)) & (k[f"state{i}"] == 0)


def second_int8_weight(weight):
    codes, absmax, _ = second_int8(weight, 0.0)
    return second.int8_dequantize(codes.numpy(), second.floats(absmax), weight.dtype)


def second_int8_backward(a, weight, grad):
    rows, inputs = grad.reshape(-1, grad.shape[-1]), a.reshape(-1, a.shape[-1])
    grad_a = second_product(grad, second_int8_weight(weight).t(), None)
    return grad_a, second_product(rows.t(), inputs.t(), None)


def second_layer(x, grad, packed, absmax, blocksize, quant_type, shape, bias=None):
    weight = second_weight(packed, absmax, blocksize, quant_type, shape, x.dtype)
    return second_product(x, weight, bias), second_product(grad, weight.t(), None), packed, absmax


SECOND = {
    "gemm_4bit_backward": lambda grad, packed, absmax, blocksize, quant_type, shape: second_product(
        grad, second_weight(packed, absmax, blocksize, quant_type, shape, grad.dtype).t(), None
    ),
    "int8_backward": second_int8_backward,
    "evaluate_then_train": second_layer,
    "optimizer_32bit": second_32bit,
    "optimizer_8bit": second_8bit,
    "quantize_blockwise": second_blockwise,
    "dequantize_blockwise": second_deblockwise,
    "quantize_4bit": second_4bit,
    "dequantize_4bit": second_weight,
    "quantize_4bit_nested": second_nested,
    "dequantize_4bit_nested": lambda packed, codes, absmax2, offset, values, **rest: second_weight(
        packed, second_scales(codes, absmax2, offset), **rest
    ),
    "gemm_4bit": lambda a, packed, absmax, blocksize, quant_type, shape, bias=None: second_product(
        a, second_weight(packed, absmax, blocksize, quant_type, shape, a.dtype), bias
    ),
    "int8_quantize": second_int8,
    "int8_matmul": lambda a, b: torch.tensor(second.int8_product(a.reshape(-1, a.shape[-1]).tolist(), b.tolist())).view(
        *a.shape[:-1], len(b)
    ),
    "int8_mm_dequant": lambda product, row, column, dtype, bias=None: second_mm_dequant(
        product, row, column, bias, dtype
    ),
    "int8_dequantize": lambda codes, absmax: second.int8_dequantize(
        codes.numpy(), second.floats(absmax), torch.float32
    ),
    "save_4bit": second_file,
    "load_4bit": second_load,
    "quantize_squares": lambda x, values, blocksize: second_steps.tensors_of(
        *second_steps.quantize_squares(second.floats(x), blocksize), x.shape
    ),
    "optimizer_8bit_nonzero": second_nonzero,
    **second_steps.STEPS,
}


# Sums, whose order is free.
SUMS = {
    ("gemm_4bit", "y"), ("gemm_4bit_backward", "grad_a"), ("int8_backward", "grad_a"), ("int8_backward", "grad_weight"),
    ("evaluate_then_train", "y"), ("evaluate_then_train", "grad_x"),
}  # fmt: skip


@each_operation
def test_a_second_oracle_agrees_on_every_vector(operation):
    """Value by value, not within what the rules allow; a product lies within its interval."""
    for case in of(operation):
        made = SECOND[operation](**case.inputs, **arguments(case.params))
        named = (
            made
            if isinstance(made, dict)
            else dict(zip(case.expected, made if isinstance(made, tuple) else (made,), strict=True))
        )
        assert named.keys() == case.expected.keys(), case.id
        for name, expected in case.expected.items():
            value, want = named[name], expected.value
            assert value.shape == want.shape, (case.id, name)
            if operation in second_steps.STEPS:
                assert wrong_elements(value.to(want.dtype), expected).numel() == 0, (case.id, name)
                if want.is_floating_point():  # nearer than the rules ask: these are float64, too
                    torch.testing.assert_close(value.float(), want.float(), rtol=2e-6, atol=1e-7)
            elif (operation, name) in SUMS or (name == "p" and case.params["max_unorm"] > 0):
                assert bool((value >= expected.low).all() & (value <= expected.high).all()), case.id
                assert wrong_elements(value.to(want.dtype), expected).numel() == 0, case.id
            elif name != "product":
                assert value.dtype == want.dtype, (case.id, name)
                free = torch.zeros(want.numel(), dtype=torch.bool)
                if expected.free is not None and expected.pairs is None and not operation.startswith("optimizer"):
                    free[expected.free] = True  # blocks that are not finite
                right = same(value.reshape(-1), want.reshape(-1)) | free
                assert bool(right.all()), (case.id, name, (~right).nonzero().view(-1)[:5])
            else:
                assert flat(value) == flat(want), case.id


UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def test_intervals_are_as_wide_as_their_rules_say():
    """The bounds of G4-1 and ID-1 from the second oracle's numbers; a wider one would let wrong constants pass."""
    v = 2.0**-24
    for case in of("gemm_4bit"):
        a, bias, k = case.inputs["a"].double().abs(), case.inputs.get("bias"), case.params["shape"][1]
        weight = second_weight(
            **{name: case.inputs[name] for name in ("packed", "absmax")},
            **arguments(case.params),
            dtype=case.inputs["a"].dtype,
        ).double()
        y, u = second_product(case.inputs["a"], weight, bias), UNIT[case.dtype]
        added = 0.0 if bias is None else bias.double().abs()
        bound = (4.1 * u + 2 * k * v) * (a @ weight.abs().t()) + 2 * u * (y.abs() + added)
        torch.testing.assert_close((case.expected["y"].high - case.expected["y"].low) / 2, bound, rtol=1e-6, atol=0)
    for case in of("int8_mm_dequant"):
        product, bias = case.inputs["product"].double(), case.inputs.get("bias")
        rows, u = product.view(-1, product.shape[-1]), UNIT[case.dtype]
        scaled = rows * case.inputs["row"].double()[:, None] * case.inputs["column"].double() / 16129
        added = torch.zeros(()).double() if bias is None else bias.double()
        y = scaled + added
        bound = 5 * v * scaled.abs() + 2 * v * y.abs() + 2 * u * (y.abs() + added.abs())
        bound = bound if case.derived else bound + 1e-4 * y.abs()  # cases on shapes and ranges
        width = (case.expected["y"].high - case.expected["y"].low).view(rows.shape) / 2
        torch.testing.assert_close(width, bound, rtol=1e-4 if not case.derived else 1e-6, atol=0)


def fused(a, b, c):
    """fl(a * b + c): a product of two float32 is exact in float64, whose second rounding is far below float32's."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def cuda_adam(p, g, state1, state2, **k):
    """Adam in the order of bitsandbytes' CUDA kernel: eps times c2, multiplied and added in one, a reciprocal for a division."""
    f = np.float32
    b1, b2, eps = f(k["beta1"]), f(k["beta2"]), f(k["eps"])
    c1, c2 = f(1 - k["beta1"] ** k["step"]), f(np.sqrt(1 - k["beta2"] ** k["step"]))
    g = g * f(k["gnorm_scale"])
    v = fused(state2, b2, (f(1) - b2) * (g * g))
    m = fused(state1, b1, g * (f(1) - b1))
    size = f(f(c2 * f(k["lr"])) * -f(f(1) / c1))
    root = fused(np.full_like(v, c2), eps, np.sqrt(v))
    return fused(np.full_like(m, size), m * (f(1) / root), p), m, v


def test_steps_in_another_order_are_allowed():
    seen = 0
    for case in of("optimizer_32bit"):
        k = case.params
        if k["optimizer"] != "adam" or k["weight_decay"] or case.dtype != "float32" or "not-finite" in case.id:
            continue
        made = cuda_adam(*(second.floats(x) for x in case.inputs.values()), **k)
        for name, value in zip(("p", "state1", "state2"), made, strict=True):
            got = torch.from_numpy(value).view(case.inputs["p"].shape)
            assert wrong_elements(got, case.expected[name]).numel() == 0, (case.id, name)
        seen += 1
    assert seen >= 10


def test_the_intervals_of_a_step_are_no_wider_than_their_rule():
    """Of momentum's and Adam's averages: 2^-22 for each of the products that are added, and for the sum of both."""
    slack, seen = 2.0**-22, 0
    for case in of("optimizer_32bit"):
        k, p, g = case.params, case.inputs["p"].double(), case.inputs["g"].double() * case.params["gnorm_scale"]
        exact = all(k[name] == float(np.float32(k[name])) for name in ("beta1", "beta2"))
        if (
            k["optimizer"] not in ("adam", "momentum")
            or case.dtype != "float32"
            or "not-finite" in case.id
            or not exact
        ):
            continue
        m, expected = case.inputs["state1"].double() * k["beta1"], case.expected["state1"]
        new = g * (1 - k["beta1"]) if k["optimizer"] == "adam" else g + k["weight_decay"] * p
        rounded = 3 if k["weight_decay"] else 2  # wd p, and its sum with g, are two more of which one is small
        most = rounded * slack * 1.001 * (m.abs() + new.abs() + k["weight_decay"] * p.abs()) + 2.0**-125
        assert bool(((expected.high - expected.low) / 2 <= most).all()), case.id
        if k["optimizer"] == "adam":
            # sqrt, its quotient by c2, eps, the quotient, the rate and their product, the difference from p: ten roundings at
            # most, half of those of v, and the corrections by (step + 2) 2^-22.
            t, y, step = k["step"], case.expected["p"], (case.expected["p"].value.double() - p).abs()
            off = sum((t + 2) * slack * b**t / (1 - b**t) for b in (k["beta1"], k["beta2"]))
            decayed = k["lr"] * k["weight_decay"] * p.abs()
            m_off = (2 * slack * (m.abs() + new.abs()) / (m + new).abs()).nan_to_num(0.0)  # 0 / 0: nothing moves
            most = (step + decayed) * (14 * slack + off + m_off) * 1.01 + 4 * slack * p.abs() + 2.0**-60
            assert bool(((y.high - y.low) / 2 <= most).all()), case.id
        seen += 1
    assert seen >= 20


# ---- judging --------------------------------------------------------------------------------------------------------


def verdict(got, **expected):
    return wrong_elements(torch.tensor(got), Expected(torch.tensor([1.0, 2.0]), **expected)).tolist()


def test_what_is_allowed_is_allowed_and_nothing_else():
    assert verdict([1.0, 2.0]) == []
    assert verdict([1.0, 3.0]) == [1]
    assert verdict([float("nan"), 2.0]) == [0]
    also = Also(torch.tensor([1, 1]), torch.tensor([3.0, 4.0]))
    assert verdict([1.0, 3.0], also=also) == verdict([1.0, 4.0], also=also) == verdict([1.0, 2.0], also=also) == []
    assert verdict([3.0, 5.0], also=also) == [0, 1]
    assert verdict([7.0, 7.0], free=torch.tensor([0])) == [1]
    pairs = torch.tensor([[0], [1]])
    assert verdict([7.0, 7.0], free=torch.tensor([0, 1]), pairs=pairs) == []
    assert verdict([7.0, 8.0], free=torch.tensor([0, 1]), pairs=pairs) == [1]
    one_up = torch.tensor(2.0).nextafter(torch.tensor(3.0)).item()
    assert verdict([1.0, one_up], ulp=1) == []
    assert verdict([1.0, one_up]) == [1]
    bounds = {"low": torch.tensor([0.0, 0.0]).double(), "high": torch.tensor([1.0, 2.5]).double()}
    assert verdict([0.5, 2.6], **bounds) == [1]
    assert verdict([float("nan"), 2.5], **bounds) == [0]


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_wrong_byte_is_found_wherever_it_is(pairs):
    got, want = (torch.tensor(side, dtype=torch.uint8) for side in zip(*pairs, strict=True))
    assert wrong_elements(got, Expected(want)).tolist() == [i for i, (a, b) in enumerate(pairs) if a != b]


def outcome(function, name="int8_matmul/1x8x16"):
    operation = name.partition("/")[0]
    return judge.run_case(Backend("b", {operation: function}), BY_ID[name], CPU)


@each_operation
def test_a_signature_is_that_of_the_cases(operation):
    results, optional = OPERATIONS[operation].results, OPERATIONS[operation].optional
    call = OPERATIONS[operation].signature.partition(" -> ")[0]
    named = {name.removesuffix("=None") for name in call.partition("(")[2].strip(")").split(", ")}
    for case in of(operation):
        wanted = [name for name in results if name in case.expected]
        assert set(wanted) == case.expected.keys()
        assert case.inputs.keys() <= named
        assert named - case.inputs.keys() - case.params.keys() - {"HYPER", "NUMBERS"} <= set(optional)
        got = judge.by_name(case, tuple(case.expected[name].value for name in wanted))
        assert [f.message for f in judge.failures_of(case, got)] == []


def test_results_that_are_not_results():
    def right(a, b):
        return (a.long() @ b.long().t()).to(torch.int32)

    assert outcome(right).status == "passed"
    assert outcome(lambda a, b: {"product": right(a, b)}).status == "passed"
    assert outcome(lambda a, b: right(a, b).long()).failures[0].kind == "dtype"
    assert outcome(lambda a, b: right(a, b).view(-1)).failures[0].kind == "shape"
    assert outcome(lambda a, b: None).failures[0].message == "product is None, must be a torch.Tensor"
    assert outcome(lambda a, b: {"y": right(a, b)}).failures[0].kind == "missing"
    assert outcome(lambda a, b: a.zero_()).failures[0].message == "the argument a was modified, or memory beside it"
    assert outcome(lambda a, b: 1 / 0).failures[0].message == "raised ZeroDivisionError: division by zero"

    def unsupported(a, b):
        raise backends.Unsupported("no")

    assert outcome(unsupported).status == "not implemented"
    assert (
        judge.run_case(Backend("b", {"int8_quantize": right}), BY_ID["int8_matmul/1x8x16"], CPU).status
        == "not implemented"
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_a_result_of_a_dtype_that_no_case_expects_fails_and_the_next_case_runs(dtype):
    """What a call returned is compared after the next call, whatever its dtype is."""
    backend = Backend("b", {"int8_matmul": lambda a, b: torch.full((len(a), len(b)), float("nan")).to(dtype)})
    cases = [BY_ID["int8_matmul/1x8x16"]] * 2
    assert [[f.kind for f in r.failures] for r in judge.run(backend, cases, CPU)] == [["dtype"]] * 2


@pytest.fixture
def flushed():
    """As it is after a library was loaded that GCC linked with -ffast-math: subnormal floats are zeros to this thread."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def test_a_backend_that_flushes_subnormal_floats_is_judged_as_if_it_did_not(flushed):
    """Its results are compared as IEEE 754 has them, and the report says what is the matter."""
    ids = ["split_weight/bfloat16-24-subnormal", "join_weight/bfloat16-24-zero", "quantize_blockwise/signed-scale-3e38"]
    backend = backends.load("bnbref")
    with eager():
        results = [judge.run_case(backend, BY_ID[i], CPU) for i in [*ids, "int8_matmul/1x8x16"]]
        done = report.report(backend, CPU, results, small=False)
    assert [r.status for r in results] == ["failed"] * 3 + ["passed"]
    assert report.as_text(done).splitlines()[1].startswith("this process flushes subnormal floats to zero (")
    assert json.loads(report.as_json(done))["flushes subnormals"]
    assert flushes_subnormals()


def test_a_backend_may_change_the_default_dtype():
    """Each of its workers ended, and was begun anew, for ever."""
    before = torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert not flushes_subnormals()
            assert {r.status for r in judge.run(backends.load("bnbref-eager"), QUICK[:1], CPU)} == {"passed"}
        finally:
            torch.set_default_dtype(before)


@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.data())
def test_a_subnormal_number_is_no_zero_whatever_is_flushed(dtype, data):
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    any_bits = st.integers(torch.iinfo(kind).min, torch.iinfo(kind).max)
    one, other = (torch.tensor([data.draw(any_bits | st.integers(0, 3))], dtype=kind).view(dtype) for _ in range(2))
    want = [one.item() == other.item() or (one.isnan().item() and other.isnan().item())]
    torch.set_flush_denormal(True)
    try:
        assert same(one, other).tolist() == want
        assert same(one, one).tolist() == [True]
    finally:
        torch.set_flush_denormal(False)


def test_a_blocksize_may_be_refused_and_a_common_one_not():
    def refuse(**arguments):
        raise ValueError("blocksize")

    assert outcome(refuse, "quantize_4bit/nf4-blocksize-100").status == "refused"
    assert outcome(refuse, "quantize_4bit/nf4-blocksize-64").status == "failed"


# ---- backends -------------------------------------------------------------------------------------------------------


def test_the_reference_conforms():
    done = report.report(backends.load("bnbref-eager"), CPU, judge.run(backends.load("bnbref-eager"), STORED, CPU))
    assert {result.status for result in done.results} == {"passed"}
    assert done.ok
    assert report.as_text(done).endswith("conforms")


@pytest.mark.parametrize("operation", ["gemm_4bit_backward", "int8_backward", "evaluate_then_train"])
def test_a_package_that_switches_gradients_off(operation):
    with torch.no_grad():
        assert judge.run_case(backends.load("bnbref-eager"), of(operation)[0], CPU).status == "passed"


def test_the_compiled_reference_conforms():
    """On what compiles the fewest kernels: every rule that a formulation could break, in blocks of 64."""
    chosen = [c for c in STORED if c.params.get("blocksize", 64) == 64 and c.dtype == "float32" and c.quick]
    chosen = [c for c in chosen if c.operation in ("quantize_4bit", "quantize_blockwise", "int8_mm_dequant")]
    assert {r.status for r in judge.run(backends.load("bnbref"), chosen, CPU)} == {"passed"}


ENDS_ITS_PROCESS = """
import os
from bnbref.conformance import backends

def quantize_4bit(x, **options):
    if x.numel() == 0:
        os._exit(3)
    return backends.load("bnbref-eager").functions["quantize_4bit"](x=x, **options)
"""


def test_a_backend_that_ends_its_process_fails_one_case(tmp_path, monkeypatch, capsys):
    (tmp_path / "ends_its_process.py").write_text(ENDS_ITS_PROCESS)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["check", "--backend", "ends_its_process", "--quick", "--only", "quantize_4bit/nf4", "--jobs", "2"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "quantize_4bit/nf4-empty" in said
    assert "the process ended: exit status 3" in said
    chosen = [c for c in STORED if c.quick and "quantize_4bit/nf4" in c.id]
    want = {r.case.id: r.status for r in judge.run(backends.load("bnbref-eager"), chosen, CPU)}
    results = workers.run("ends_its_process", chosen, CPU, jobs=2)
    got = {r.case.id: r.status for r in results if r.case.operation == "quantize_4bit"}
    assert [r.case.id for r in results] == [c.id for c in chosen]
    assert [id_ for id_, status in got.items() if status != want[id_]] == ["quantize_4bit/nf4-empty"]


SLOW = """
import os, time, torch
from pathlib import Path

def int8_matmul(a, b):
    time.sleep(0.3)
    Path(__file__).with_name(f"by-{os.getpid()}").touch()
    return (a.long() @ b.long().mT).to(torch.int32)
"""


def test_cases_of_one_kind_are_shared_by_workers(tmp_path, monkeypatch):
    """All of them need the same kernel, and go to one worker first."""
    (tmp_path / "slow_backend.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = [c for c in of("int8_matmul") if c.quick]
    results = workers.run("slow_backend", chosen, CPU, jobs=2)
    assert [r.case.id for r in results] == [c.id for c in chosen]
    assert {r.status for r in results} == {"passed"}
    assert len(list(tmp_path.glob("by-*"))) == 2


def test_a_case_reaches_its_worker_as_it_is():
    empty = next(c for c in STORED if 0 in next(iter(c.inputs.values())).shape)
    for case in (BY_ID["quantize_4bit/nf4-noise-bfloat16"], BY_ID["quantize_blockwise/signed-transposed"], empty):
        came = pickle.loads(workers._pickled(case))
        assert (came.id, came.params, came.rules, came.layout) == (case.id, case.params, case.rules, case.layout)
        for name, tensor in case.inputs.items():
            assert came.inputs[name].dtype == tensor.dtype
            assert torch.equal(came.inputs[name], tensor)
        for name, expected in case.expected.items():
            assert torch.equal(came.expected[name].value, expected.value)


@pytest.mark.parametrize("unread", [False, True])
def test_a_process_that_ended_after_its_answer_fails_the_next_case(unread, monkeypatch):
    """As by a thread that it has left behind: the command took its closed pipe for that of a reader who has read enough."""
    worker = workers._Worker.__new__(workers._Worker)
    worker.connection, other = multiprocessing.Pipe()
    worker.process, worker.todo = SimpleNamespace(join=lambda: None, exitcode=-6), deque()
    case = BY_ID["int8_matmul/1x8x16"]
    if not unread:  # it is gone before the case is sent, or before it has read it
        other.close()
    worker.begin(deque([deque([0])]), [case], [worker])
    other.close()
    monkeypatch.setattr(worker, "_start", lambda: None)
    monkeypatch.setattr(worker, "loaded", lambda: None)
    (failure,) = worker.result(case, ended=False).failures
    assert (failure.kind, failure.message) == ("crashed", "the process ended: SIGABRT")


def test_workers_that_cannot_work():
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        workers.run("bnbref-eager", [], CPU, jobs=0)
    with pytest.raises(RuntimeError, match="could not load backend 'no_such_module'"):
        workers.run("no_such_module", [BY_ID["int8_matmul/1x8x16"]], CPU)
    assert main(["check", "--jobs", "0"]) == 2


def test_at_least_a_hundred_backends_are_wrong():
    assert len(MUTANTS) >= 100
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_backend_does_not_pass(mutant):
    """Not even the quick run."""
    results = judge.run(mutant.backend, QUICK, CPU)
    raised = [f.message for result in results for f in result.failures if f.kind == "raised"]
    assert not raised, f"{mutant.name} must be wrong, not broken: {raised[0]}"
    assert any(result.status == "failed" for result in results), f"{mutant.name}: {mutant.wrong}"


def test_the_mutants_page_is_up_to_date():
    text = (ROOT / "docs/content/kit.md").read_text(encoding="utf-8")
    for mutant in MUTANTS:
        assert f"| {mutant.name} | {mutant.wrong} |" in text


def test_a_convention_is_recognized():
    for name, follows in (
        (
            "fp4-midpoints",
            "bnb-default, bnb-cpu: FP4 thresholds at midpoints (5/12 ...) on the signed axis, code 8 above code 0",
        ),
        ("binned-codes", "bnb-cpu: codes from a table of 65,536 bins"),
        ("scale-index-by-row", "bnb-cpu: scale of row * (columns // blocksize) + column // blocksize"),
        ("constant-of-int8", "bnb-default, bnb-cpu: 1/16129 is 6.200124e-05"),
        ("nibbles-swapped", "mps-bitsandbytes: the first of two elements is in the low nibble"),
    ):
        (mutant,) = (m for m in MUTANTS if m.name == name)
        failures = [
            f for result in judge.run(mutant.backend, STORED, CPU) for f in result.failures if f.kind == "value"
        ]
        assert any(follows in explain(f) for f in failures), name
    (mutant,) = (m for m in MUTANTS if m.name == "half-away")
    assert not any(explain(f) for result in judge.run(mutant.backend, STORED, CPU) for f in result.failures)


def test_conventions_that_explain_together_are_named():
    """Those of a dialect that it takes, and no others."""
    case = BY_ID["quantize_4bit/fp4-tail-formula"]
    (failure,) = judge.failures_of(case, predict(BNB_DEFAULT, case))
    thresholds = "FP4 thresholds at midpoints (5/12 ...) on the signed axis, code 8 above code 0"
    # Other dialects reach the same codes by the least distance.
    assert explain(failure)[0] == f"bnb-default, bnb-cpu: {thresholds}; x / absmax in the partial last block"


@pytest.mark.parametrize(
    ("operation", "dialect"),
    [("adafactor", TRANSFORMERS), ("soap", PYTORCH_OPTIMIZER), ("soap_refresh", PYTORCH_OPTIMIZER)],
)
def test_another_decay_follows_from_what_is_allowed(operation, dialect):
    """Of steps without decay the same is made by the formulas of the packages."""
    step, told_apart = {op: getattr(Eager(), op) for op in (operation, "soap")}, []
    for case in of(operation):
        k = {**case.inputs, **arguments(case.params), "weight_decay": 0.0}
        decay, t, p0 = case.params["weight_decay"], k["step"], k["p"].double()
        with eager():
            undecayed = step[operation](**k)["p"].double()
            k.pop("then", None)
            first = step["soap"](**k)["p"].double() if "soap" in operation and t else p0
        if operation == "adafactor":
            rate = min(k["lr"], t**-0.5) * max(float(p0.pow(2).mean().sqrt()), k["eps2"])
            wanted = undecayed - rate * decay * p0
        elif operation == "soap":
            wanted = (1 - k["lr"] * decay) * undecayed
        else:
            own = 1 - k["lr"] * decay
            moved = own * first if t else p0
            wanted = own * (moved + undecayed - first)
        allowed = decayed_within(dialect, case)
        assert not wrong_elements(wanted.float(), allowed["p"]).numel(), case.id
        told_apart.append(decay > 0 and wrong_elements(wanted.float(), case.expected["p"]).numel() > 0)
    assert any(told_apart)


def test_a_failure_is_shrunk_to_the_elements_that_matter():
    (mutant,) = (m for m in MUTANTS if m.name == "ties-to-lower")
    (failure,) = judge.run_case(mutant.backend, BY_ID["quantize_blockwise/signed-ties"], CPU).failures
    small = shrink(mutant.backend, failure, CPU)
    assert small.case.inputs["x"].tolist() == [1.0, -0.971875011920929]
    (element,) = findings.elements(small)
    assert (element.got, element.want) == ("1 (01)", "2 (02)")
    assert explain(small) == explain(failure)


def test_a_failure_is_not_shrunk_to_that_of_another_rule():
    """Codes by a table of bins are wrong for 0, too, which stands in the place of what is taken away: the tie stays."""
    (mutant,) = (m for m in MUTANTS if m.name == "binned-codes")
    (failure,) = judge.run_case(mutant.backend, BY_ID["quantize_blockwise/signed-ties"], CPU).failures
    small = shrink(mutant.backend, failure, CPU)
    ties = failure.case.inputs["x"][failure.wrong]
    assert any(x in ties for x in small.case.inputs["x"][small.wrong])
    assert small.case.inputs["x"].numel() <= 3


def test_what_takes_whole_blocks_alone_is_shrunk_to_zeros():
    """A package that refuses a part of a block."""
    (mutant,) = (m for m in MUTANTS if m.name == "fp4-midpoints")
    wrong = mutant.backend.functions["quantize_4bit"]

    def quantize_4bit(x, blocksize, quant_type):
        if x.numel() % blocksize:
            raise NotImplementedError
        return wrong(x=x, blocksize=blocksize, quant_type=quant_type)

    backend = Backend("mine", {"quantize_4bit": quantize_4bit})
    case = next(c for c in STORED if c.operation == "quantize_4bit" and judge.run_case(backend, c, CPU).failures)
    (failure,) = judge.run_case(backend, case, CPU).failures
    small = shrink(backend, failure, CPU)
    x = small.case.inputs["x"]
    assert x.numel() == small.case.params["blocksize"]
    assert 1 <= int((x != 0).sum()) <= 2
    assert explain(small) == explain(failure)


def test_products_are_shrunk_to_a_row_of_each():
    (mutant,) = (m for m in MUTANTS if m.name == "bias-lost")
    (failure,) = judge.run_case(mutant.backend, BY_ID["gemm_4bit/nf4-5-32x128-bias-float32"], CPU).failures
    small = shrink(mutant.backend, failure, CPU)
    assert small.case.inputs["a"].shape == (1, 128)
    assert small.case.inputs["bias"].shape == (1,)
    assert small.case.params["shape"] == [1, 128]


def low_first(x, blocksize, quant_type):
    """NF4 with the first element in the low nibble."""
    if quant_type != "nf4":
        raise NotImplementedError("no FP4 here")
    packed, absmax = kit_mutants.right("quantize_4bit")(x=x, blocksize=blocksize, quant_type=quant_type)
    return packed << 4 | packed >> 4, absmax


def test_one_cause_is_told_once_and_what_is_not_implemented_is_no_failure():
    backend = Backend("mine", {"quantize_4bit": low_first})
    cases = [c for c in STORED if c.operation == "quantize_4bit" and c.dtype == "float32"]
    results = judge.run(backend, cases, CPU)
    assert {r.status for r in results if r.case.params["quant_type"] == "fp4"} <= {"not implemented", "refused"}
    done = report.report(backend, CPU, results)
    told = [together for together in findings.by_cause(done.findings) if together[0].follows]
    assert len(told) <= 2 < len(done.findings)
    assert sorted(f.cases for together in findings.by_cause(done.findings) for f in together) == sorted(
        f.cases for f in done.findings
    )
    text = report.as_text(done)
    assert text.count("the first of two elements is in the low nibble") == 1
    assert "also     the same cause: " in text
    assert "odd-size, " in text


def test_a_product_that_is_summed_in_float16_is_told_so():
    def gemm_4bit(a, **rest):
        return kit_mutants.right("gemm_4bit")(a=a, **rest).half().to(a.dtype)

    case = BY_ID["gemm_4bit/nf4-1-32x128-float32"]
    (failure,) = judge.run_case(Backend("mine", {"gemm_4bit": gemm_4bit}), case, CPU).failures
    assert explain(failure) == ["no backend: all elements are numbers of float16, as sums in it are"]


def test_what_the_reference_is_predicted_to_do_is_nobodys_convention():
    """Outliers that are quantized too; and sums beyond float16, whose bytes in the other order are next to nothing."""
    right = kit_mutants.right("int8_quantize")
    kept = Backend(
        "mine", {"int8_quantize": lambda x, threshold: (*right(x, 0.0)[:2], right(x, threshold)[2])}, within=eager
    )
    (codes, absmax) = judge.run_case(kept, BY_ID["int8_quantize/outliers-float16"], CPU).failures
    assert explain(codes) == explain(absmax) == []
    assert explain(replace(codes, got=codes.case.expected["codes"].value)) == []
    endless = Backend("mine", {"gemm_4bit": lambda **k: kit_mutants.right("gemm_4bit")(**k) * torch.inf}, within=eager)
    (failure,) = judge.run_case(endless, BY_ID["gemm_4bit/nf4-cancelling-float16"], CPU).failures
    assert not any("other order" in line for line in explain(failure))


def test_a_package_whose_module_has_another_name_has_a_version(monkeypatch):
    """As neural-compressor-pt, which says no version in its module neural_compressor."""
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"colorsys": ["hypothesis"]})
    found = Backend("mine", {"int8_matmul": torch.matmul}, ("colorsys",)).versions["colorsys"]
    assert found == importlib.metadata.version("hypothesis")


def test_an_input_that_is_zeros_but_for_a_few_numbers_says_which():
    case = BY_ID["quantize_4bit/nf4-noise-float32"]
    x = torch.zeros(64)
    x[[0, 7]] = torch.tensor([1.0, -0.5])
    failure = judge.Failure(replace(case, inputs={"x": x}), "packed", "value", "")
    assert findings.inputs_of(failure)[0] == "x = float32 [64], zeros but for [0] 1.0 (3f800000), [7] -0.5 (bf000000)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "backend must be one of"),
        ("json", "has none of the operations"),
        (".mine", "backend must be one of"),
        (":mine", "backend must be one of"),
    ],
)
def test_backends_that_are_none_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        backends.load(name)


def test_a_class_is_a_backend(tmp_path, monkeypatch):
    """As its author writes it, with methods and no object of it."""
    text = "class Mine:\n    def quantize_blockwise(self, x, values, blocksize):\n        return self, x\n"
    (tmp_path / "of_a_class.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (function,) = backends.load("of_a_class:Mine").functions.values()
    assert function(x=1, values=None, blocksize=64)[1] == 1


# ---- the real bitsandbytes ------------------------------------------------------------------------------------------

RESULTS = ROOT / "docs" / "content" / "conformance"


@functools.cache
def found_by(name):
    """What the kit finds, by rule and flag: here and now if that package is installed, else as it was published."""
    package = name.partition("-")[0]
    if importlib.util.find_spec(package) is not None:
        backend = backends.load(name)
        done = report.report(backend, CPU, judge.run(backend, STORED, CPU), small=False)
        return json.loads(report.as_json(done))
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "bug", "rule", "flag"),
    [
        ("bitsandbytes", "B2", "Q8-5", "zero-in-nonzero-block"),
        ("bitsandbytes", "B9", "ID-1", "int8-constant"),
        ("bitsandbytes", "B14", "Q4-5", "fp4-zero-sign"),
        ("bitsandbytes", "B14", "Q4-5", "fp4-negative-tie"),
        ("bitsandbytes", "B16", "D4-3", "one-dimensional-shape"),
        ("bitsandbytes", "B16", "DN-2", "packed-length-one"),
        ("bitsandbytes", "B16", "ID-3", "int8-3d"),
        ("bitsandbytes", "B16", "I8-5", "int8-3d"),
        ("bitsandbytes", "B2", "OB-4", "zero-state-drift"),
        ("bitsandbytes", "B12", "OS-5", "update-norm"),
        ("bitsandbytes", "B18", "IB-3", "backward-3d"),
        ("bitsandbytes", "T8", "OB-6", "bad-gradient"),
        ("bitsandbytes", "9.3", "OB-7", "clip-lost"),
        ("bitsandbytes-default", "B12", "OS-5", "update-norm"),
        ("bitsandbytes-default", "B9", "ID-1", "int8-constant"),
        ("bitsandbytes-default", "B14", "Q4-5", "fp4-zero-sign"),
    ],
)
def test_known_bugs_are_found(name, bug, rule, flag):
    assert any(f["rule"] == rule and flag in f["flags"] for f in found_by(name)["findings"]), bug


@pytest.mark.parametrize(
    ("name", "bug", "rule", "flag"),
    [
        ("statistics-of-the-other-axis", "B4", "IB-2", "weight-gradient-scale"),
        ("raw-gradient", "B5", "OB-3", "raw-gradient"),
        ("scale-overwritten", "B6", "OB-5", "second-average-scale"),
        ("decay-after", "T1", "OS-2", "adam-decay-order"),
    ],
)
def test_bugs_of_cuda_are_found_in_a_model_of_them(name, bug, rule, flag):
    (mutant,) = (m for m in MUTANTS if m.name == name)
    done = report.report(mutant.backend, CPU, judge.run(mutant.backend, STORED, CPU), small=False)
    assert any(f.rule == rule and flag in f.flags for f in done.findings), bug


def test_what_an_evaluation_does_to_a_layer_is_found():
    """B10 needs a CPU that has AVX512-BF16."""
    done = found_by("bitsandbytes")
    if not torch.cpu._is_avx512_bf16_supported():
        done = json.loads((RESULTS / "bitsandbytes.json").read_text(encoding="utf-8"))
    assert {f["rule"] for f in done["findings"] if "evaluation-repacks" in f["flags"]} == {"LE-1", "LE-2", "LE-3"}


def test_the_scale_index_of_avx512_is_found():
    """B1 needs a CPU that has it."""
    done = found_by("bitsandbytes")
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        done = json.loads((RESULTS / "bitsandbytes.json").read_text(encoding="utf-8"))
    operations = {f["operation"] for f in done["findings"] if "scale-index-tail-columns" in f["flags"]}
    assert operations == {"dequantize_4bit", "dequantize_4bit_nested", "gemm_4bit", "gemm_4bit_backward"}


@pytest.mark.parametrize("name", ["bitsandbytes", "bitsandbytes-default", "torchao"])
def test_every_red_cell_has_a_cause(name):
    """A convention that predicts the wrong elements, or one of five that no convention can: each has its bug report."""
    raised = (
        "raised RuntimeError: The size of tensor", "raised RuntimeError: t() expects a tensor with <= 2",
        "raised RuntimeError: view size is not compatible",
    )  # fmt: skip
    for finding in found_by(name)["findings"]:
        known = finding["flags"] in (["int8-one-column"], ["evaluation-repacks"])
        assert finding["follows"] or known or finding["message"].startswith(raised), finding


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("mps-bitsandbytes", ("raised RuntimeError: shape '[",)),  # rows are padded to whole blocks
        ("bitsandbytes-cpu-fork", ("raised RuntimeError: The size of tensor", "raised RuntimeError: t() expects")),
        *((name, ()) for name in ("neural-compressor", "nncf", "nvidia-modelopt", "onnxruntime", "qwix", "tinygrad")),
        ("torchao-nf4", ()),
    ],
)
def test_every_published_failure_has_a_cause(name, others):
    """A convention that predicts the wrong elements, or what no convention can: an exception, or memory that was not written."""
    for finding in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["findings"]:
        memory = finding["flags"] in (["int8-one-column"], ["evaluation-repacks"]) or (
            name == "bitsandbytes-cpu-fork" and finding["rule"] == "G4-1"
        )
        assert finding["follows"] or memory or finding["message"].startswith(tuple(others)), finding


@pytest.mark.parametrize("name", ["bitsandbytes", "bitsandbytes-default", "torchao"])
def test_what_is_published_is_what_is_found(name):
    published = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    package = name.partition("-")[0]
    if (
        importlib.util.find_spec(package) is None
        or importlib.metadata.version(package) != published["versions"][package]
    ):
        pytest.skip(f"{package} {published['versions'][package]} is not installed")
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("published on a CPU with AVX512")
    # 1042 * 127^2 is a float32, but not every sum on the way to it: whether one is rounded depends on how a CPU's BLAS adds.
    by_order = {"int8_matmul/k-1042-127x127"} if name == "bitsandbytes-default" else set()
    found, published = (
        {case: status for case, status in report["cases"].items() if case not in by_order}
        for report in (found_by(name), published)
    )
    assert found == published


# ---- commands -------------------------------------------------------------------------------------------------------


def test_check_names_what_is_broken_in_its_last_lines(capsys, monkeypatch, tmp_path):
    (tmp_path / "wrong.py").write_text(
        'from kit_mutants import MUTANTS\nbackend = next(m.backend for m in MUTANTS if m.name == "ties-to-lower")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    files = {"--json": "r.json", "--markdown": "r.md", "--html": "r.html"}
    arguments = [word for option, name in files.items() for word in (option, str(tmp_path / name))]
    assert main(["check", "--backend", "wrong:backend", *arguments]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "broken: Q8-4 tie-to-even  2 cases"
    body = json.loads((tmp_path / "r.json").read_text())
    assert body["counts"]["failed"] == 2
    assert any("/pair-" in name for name in body["cases"])
    assert body["findings"][0]["elements"][0]["got"] == "1 (01)"
    assert "| quantize_blockwise | **" in (tmp_path / "r.md").read_text()
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_check_passes_the_reference_quickly(capsys):
    assert main(["check", "--backend", "bnbref-eager", "--quick"]) == 0
    assert capsys.readouterr().out.endswith("conforms\n")


def test_running_twice_gives_the_same_bytes():
    backend = MUTANTS[0].backend
    first, again = (report.report(backend, CPU, judge.run(backend, STORED, CPU)) for _ in range(2))
    assert report.as_json(first) == report.as_json(again)
    assert page.as_page([board.of_run(first, ROOT)]) == page.as_page([board.of_run(again, ROOT)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check", "--backend", "nobody"], "backend must be one of"),
        (["check", "--device", "abacus"], "abacus"),
        (["check", "--json", "no/such/dir/r.json"], "there is no directory no/such/dir"),
        (["vectors", "gen", "multiply"], "OP must be one of"),
    ],
)
def test_commands_that_cannot_be_run(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("bnbref: error: ")
    assert message in error


def answers(operation, wrong=None):
    """What a program that uses the reference would print, which has other last elements in a case if that is to be wrong."""
    lines = []
    for case in of(operation):
        change = last_word_changed if case.id == wrong else str
        lines.append(f"case {case.id}")
        lines += [change(tensor_line(name, expected.value)) for name, expected in case.expected.items()]
        lines.append("end")
    return "\n".join(lines)


def last_word_changed(line):
    """The line of a tensor with another last element, by the upper digit, which shows in an interval too."""
    _, _, _, dims, *rest = line.split()
    if len(rest) == int(dims):
        return line  # no elements
    word = rest[-1]
    return line[: -len(word)] + ("0" if word[0] != "0" else "4") + word[1:]


@each_operation
def test_answers_through_the_pipe(operation, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(answers(operation)))
    assert main(["vectors", "check", operation]) == 0
    strict = [case for case in of(operation) if all(expected.free is None for expected in case.expected.values())]
    monkeypatch.setattr(sys, "stdin", io.StringIO(answers(operation, wrong=strict[-1].id)))
    assert main(["vectors", "check", operation]) == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "case int8_matmul/1x8x16\ntensor product int32 2 1 8 0\nend\n",
            "line 2: tensor product of shape [1, 8] must have 8",
        ),
        ("case int8_matmul/1x8x16\ntensor product int7 1 0\nend\n", "line 2: dtype of tensor product must be"),
        ("case x/y\nend\n", "answers to cases that were not asked: x/y"),
        ("hello\n", "line 1: expected case, tensor, unsupported or end, got 'hello'"),
        ("case\nend\n", "line 1: a case must be `case OPERATION/NAME`, got 'case'"),
        ("end\n", "line 1: end must stand after the line of its case"),
        ("tensor product int32 0 1\n", "line 1: tensor must stand after the line of its case"),
        (
            "case int8_matmul/1x8x16\ntensor product int32 0 00000001\ntensor product int32 0 00000001\nend\n",
            "line 3: int8_matmul/1x8x16 has two tensors product",
        ),
    ],
)
def test_answers_that_are_none(text, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["vectors", "check", "int8_matmul"]) == 2
    assert message in capsys.readouterr().err


def test_no_answer_is_no_success(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["vectors", "check", "int8_matmul"]) == 1
    assert capsys.readouterr().out.endswith("nothing was checked\n")


@pytest.mark.parametrize(
    "case", [BY_ID["quantize_4bit/nf4-empty"], BY_ID["int8_quantize/ties-bfloat16"], BY_ID["int8_matmul/3d"]]
)
def test_text_gives_tensors_back(case):
    for name, tensor in case.inputs.items():
        again = parse_tensor(tensor_line(name, tensor))
        assert again[0] == name
        assert again[1].dtype == tensor.dtype
        assert torch.equal(again[1].view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_an_exception_is_reported_whatever_it_says(tmp_path):
    """As one of a file whose name is not in UTF-8."""
    backend = backends.Backend("mine", {"int8_matmul": mock.Mock(side_effect=OSError("no \udcff\n"))})
    result = judge.run_case(backend, BY_ID["int8_matmul/1x8x16"], CPU)
    assert [failure.message for failure in result.failures] == [r"raised OSError: no \udcff"]
    done = report.report(backend, CPU, [result], small=False)
    assert report.as_text(done).encode()
    assert board.of_run(done, tmp_path / "mine.json").count("defect") == 1


@given(st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**63 - 1, 2**63, 10**30]), max_size=4))
def test_an_answer_has_a_shape_that_torch_can_have(sizes):
    words = ["00"] * min(math.prod(sizes), 81)
    line = " ".join(["tensor y int8", str(len(sizes)), *map(str, sizes), *words])
    if len(words) == math.prod(sizes) and math.prod(max(n, 1) for n in sizes) < 2**63:
        assert parse_tensor(line)[1].shape == tuple(sizes)
    else:
        with pytest.raises(ValueError, match=r"tensor y (of|must have a) shape"):
            parse_tensor(line)


def passed_through_the_pipe(command, operation, capsys, monkeypatch):
    """What `vectors check` prints of a program's answers to all cases of an operation."""
    assert main(["vectors", "gen", operation]) == 0
    asked = capsys.readouterr().out
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(done.stdout))
    assert main(["vectors", "check", operation]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_a_program_in_javascript_passes_through_the_pipe(capsys, monkeypatch):
    program = ["node", ROOT / "docs" / "examples" / "fourbit.js"]
    for operation in ("quantize_4bit", "dequantize_4bit"):
        printed = passed_through_the_pipe(program, operation, capsys, monkeypatch)
        assert f": {len(of(operation))} passed\n" in printed


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_program_in_c_passes_through_the_pipe(tmp_path, capsys, monkeypatch):
    source = ROOT / "docs" / "examples" / "nf4.c"
    assert len(source.read_text().splitlines()) < 150
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-ffp-contract=off"]
    subprocess.run(["gcc", *flags, "-o", tmp_path / "nf4", source, "-lm"], check=True)
    for operation, passed in (("quantize_4bit", 41), ("dequantize_4bit", 31)):
        printed = passed_through_the_pipe([tmp_path / "nf4"], operation, capsys, monkeypatch)
        assert f" {passed} passed" in printed


# ---- pytest ---------------------------------------------------------------------------------------------------------


def run_pytest(tmp_path, *arguments):
    installed = any(e.value == "pytest_bnbref" for e in importlib.metadata.entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "pytest_bnbref"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *plugin,
        "--pyargs",
        "bnbref.conformance",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "bnbref" / "conformance" / "plugin")))},
    )


def test_pytest_runs_the_kit(tmp_path):
    backend = "import torch\ndef int8_matmul(a, b):\n    return (a.float() @ b.float().t()).to(torch.int32)\n"
    (tmp_path / "mine.py").write_text(backend)
    done = run_pytest(tmp_path, "--backend", "mine", "-k", "int8_matmul")
    assert done.returncode == 1, done.stdout + done.stderr
    # 7 where no sum on the way to 1042 * 127^2 is rounded, as some BLAS add.
    assert re.fullmatch("broken: IM-1 int8-k-over-1040  [78] cases", done.stdout.splitlines()[-1])
    assert "follows  bnb-default: the product is summed in float32" in done.stdout
    (tmp_path / "xfails.txt").write_text("int8_matmul/k-*  # float32\n")
    done = run_pytest(tmp_path, "--backend", "mine", "-k", "int8_matmul", "--xfails", "xfails.txt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 xfailed" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "hpu:7", "--device hpu:7: torch cannot use it here"),
        ("--device", "gpu", "--device gpu: torch knows no such device"),
        ("--backend", "math:nothing", "module 'math' has no attribute 'nothing'"),
        ("--xfails", "nowhere.txt", "No such file or directory: 'nowhere.txt'"),
    ],
)
def test_pytest_says_what_it_cannot_run_as_the_command_does(option, value, message, tmp_path):
    """In one line, before any case: every case would fail by what torch says of a device that is not there."""
    done = run_pytest(tmp_path, option, value)
    assert done.returncode != 0
    assert message in done.stdout
    assert " failed" not in done.stdout


# ---- the page -------------------------------------------------------------------------------------------------------


def test_a_histogram_counts_every_element_once():
    (mutant,) = (m for m in MUTANTS if m.name == "constant-of-int8")
    name = "int8_mm_dequant/noise-float32"
    (failure,) = judge.run_case(mutant.backend, BY_ID[name], CPU).failures
    rows = drawings.distances([failure, failure])
    assert sum(wrong for _, wrong, _ in rows) == 2 * failure.wrong.numel()
    assert sum(wrong + allowed for _, wrong, allowed in rows) == 2 * failure.got.numel()
    # 1.8e-5 is between 2^-16 and 2^-15: of a float32, whose unit is 2^-23 to 2^-24 of it, 2^7 to 2^9 steps.
    assert {label for label, wrong, _ in rows if wrong} <= {"128", "256"}
    drawn = drawings.histogram([failure, failure])
    assert "256 ulp off: " in drawn
    assert "http" not in drawn


def test_a_histogram_has_a_place_for_nan():
    case = BY_ID["dequantize_blockwise/nan-scale-float32"]
    got = torch.zeros_like(case.expected["y"].value)
    (failure,) = judge.failures_of(case, {"y": got})
    assert drawings.distances([failure])[-1] == ("NaN", failure.wrong.numel(), 0)


def of_runs(backends):
    done = [report.report(backend, CPU, judge.run(backend, STORED, CPU), small=False) for backend in backends]
    return done, [board.of_run(one, Path(f"{one.backend}.json")) for one in done]


def test_every_finding_of_a_run_is_drawn_and_nothing_is_loaded():
    reports, columns = of_runs([MUTANTS[i].backend for i in (0, 9, 12, 40)])
    text = page.as_page(columns)
    parser = Parsed(text)
    assert parser.links == []
    opened = {target for target in parser.targets if "/" in target}
    assert opened == {f"{done.backend}/{found.rule}" for done in reports for found in done.findings}
    drawn = [drawings.of_finding(done, found) for done in reports for found in done.findings]
    assert sum(map(bool, drawn)) >= len(columns)
    for one in drawn:
        assert text.count(one) >= drawn.count(one)
    for done in reports:
        assert report.matrix_text(done) in html.unescape(text)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Opens every cell that failed, and every backend; what is seen is the text of an element that is printed with the page.
CLICKS = """<script>
const look = target => {
  const one = document.getElementById(target);
  one.showPopover();
  const bars = [...one.querySelectorAll('svg.histogram rect')].map(r => r.getBoundingClientRect().width);
  const facts = {findings: one.querySelectorAll('h3').length, maps: one.querySelectorAll('svg:not(.histogram)').length,
    bars: bars.length, drawn: bars.every(width => width >= 1), wide: one.scrollWidth > one.clientWidth};
  one.hidePopover();
  return [target, facts];
};
const targets = [...document.querySelectorAll('#board button[popovertarget]')].map(b => b.getAttribute('popovertarget'));
const seen = Object.fromEntries(targets.filter(t => t.includes('/')).map(look));
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth
  || Object.values(seen).some(facts => facts.wide);
document.body.insertAdjacentHTML('beforeend', '<output id=facts>' + JSON.stringify({seen, wide}) + '</output>');
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_in_a_browser(tmp_path, width):
    chosen = [MUTANTS[i].backend for i in (0, 9, 12)]
    chosen.append(next(m.backend for m in MUTANTS if m.name == "decay-after"))
    reports, columns = of_runs(chosen)
    text = page.as_page(columns).replace("</html>", CLICKS + "</html>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    flags += [f"--window-size={width},800", "--dump-dom"]
    url = (tmp_path / "page.html").as_uri()
    done = subprocess.run([CHROMIUM, *flags, url], capture_output=True, text=True, timeout=120, check=True)
    (printed,) = re.findall(r"<output id=\"facts\">(.*?)</output>", done.stdout)
    facts = json.loads(printed)
    seen = facts["seen"].values()
    assert sum(one["findings"] for one in seen) == sum(len(r.findings) for r in reports)
    assert sum(one["maps"] for one in seen) >= 3
    assert sum(one["bars"] for one in seen) >= 10
    assert all(one["drawn"] for one in seen)
    assert not facts["wide"], f"the page scrolls sideways at {width} pixels"
