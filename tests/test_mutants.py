"""A check that cannot fail is a defect: mistakes made on purpose, each of which the checks must find.

A mutant of a definition is one of eager and compiled alike, so that only a second implementation can tell: the digests of
`check --self`, which tests/test_exactness.py derives. A mutant of a formulation differs from its definition: it runs here
uncompiled in the definition's place, on the same inputs.
"""

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import strategies
import torch
from conftest import difference, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bnbref
from bnbref import blockwise, codebooks, few_rows, fourbit, int8, nested
from bnbref.kernels import REGISTRY, counting, encoding, floats, formulations, fused, lookup16, ordered
from bnbref.optim import rules
from bnbref.optim import step as optim_step
from bnbref.optim.rules import Coefficients
from bnbref.selfcheck import digest, example, formats, kernels

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CHECKS = {check.name: check for check in (*kernels.CHECKS, *formats.CHECKS)}


def survives(name: str, formulation: bool, monkeypatch) -> bool:
    """Whether a check passes, uncompiled, with the kernel's formulation in place of its definition or with that itself."""
    if formulation:
        monkeypatch.setattr(REGISTRY[name], "definition", REGISTRY[name].body)
    check = CHECKS[name]
    with bnbref.eager():
        return digest(check.run(example(CPU))) == check.golden


def up(x: float) -> float:
    return float(torch.tensor(x).nextafter(torch.tensor(math.inf)))


def moved(book: codebooks.Codebook, i: int, move: Callable[[float], float] = up) -> codebooks.Codebook:
    """A codebook with one threshold an ulp higher."""
    i %= len(book.thresholds)
    return dataclasses.replace(
        book, thresholds=(*book.thresholds[:i], move(book.thresholds[i]), *book.thresholds[i + 1 :])
    )


def replaced(function):
    """A mutant that is another function in place of the right one, which it is given first."""
    return lambda right: lambda *args, **kwargs: function(right, *args, **kwargs)


def with_book(i):
    """A formulation that is given a codebook with one threshold an ulp higher."""
    return lambda right, *args, codebook, **rest: right(*args, codebook=moved(codebook, i), **rest)


def with_body(function):
    """A formulation whose body is another, which is given the right one first."""

    def change(right):
        wrong = copy.copy(right)
        wrong.body = lambda *args, **constants: function(right.body, *args, **constants)
        return wrong

    return change


def swap_nibbles(right, rows, *tables, **constants):
    packed, absmax = right(rows, *tables, **constants)
    return packed >> 4 | packed << 4, absmax


def quotient(right, rows, *, blocksize, codebook):
    blocks = rows.float().view(len(rows), -1, blocksize)
    absmax = blockwise.magnitude(blocks).amax(-1)
    high, low = blockwise.encode(blocks / absmax[:, :, None], codebook).flatten(1).unflatten(1, (-1, 2)).unbind(-1)
    return high << 4 | low, absmax


def decay_after(right, rule, p, g, states, hyper):
    finite, _, u, new = right(rule, p, g, states, hyper)
    c = Coefficients(rule.names, hyper)
    return finite, torch.where(finite, c.decay * (p.float() - c.rate * u), p.float()), u, new


def forgetful(right, rule, p, g, states, hyper):
    """The state of an element whose gradient is not finite begins anew."""
    finite, moved, u, new = right(rule, p, g, states, hyper)
    return finite, moved, u, [torch.where(finite, x, 0.0) for x in new]


def biased(right, self, t, group):
    """Adam whose corrections know the step before."""
    return right(self, t + 1, group)


# what goes wrong: (where, name, the mutant, the check that finds it, whether the formulation runs)
MUTANTS = {
    "reciprocal an ulp low": (
        fourbit,
        "reciprocal",
        replaced(lambda f, x: f(x).nextafter(torch.tensor(0.0))),
        "quantize_rows",
        False,
    ),
    "reciprocal of a subnormal scale": (
        fourbit,
        "magnitude",
        replaced(lambda f, x: torch.where(x == x, x.abs(), 0.0)),
        "quantize_rows",
        False,
    ),
    "NaN takes part in absmax": (fourbit, "magnitude", replaced(lambda f, x: x.abs()), "quantize_rows", False),
    "absmax is a maximum without abs": (
        fourbit,
        "magnitude",
        replaced(lambda f, x: f(x.clamp_min(0))),
        "quantize_rows",
        False,
    ),
    "4-bit tie goes up": (
        blockwise,
        "count_below",
        replaced(lambda f, x, t: f(x.nextafter(torch.tensor(math.inf)), t)),
        "quantize_rows",
        False,
    ),
    "4-bit NaN is the highest": (
        blockwise,
        "count_below",
        replaced(lambda f, x, t: torch.bucketize(x, t)),
        "quantize_rows",
        False,
    ),
    "x / absmax": (fourbit.quantize_rows, "definition", replaced(quotient), "quantize_rows", False),
    "swapped nibbles": (
        formulations.ATTACHED,
        "quantize_rows",
        with_body(swap_nibbles),
        "quantize_rows",
        True,
    ),
    "tree: first threshold an ulp off": (
        formulations.ATTACHED,
        "quantize_rows",
        with_body(with_book(0)),
        "quantize_rows",
        True,
    ),
    "tree: last threshold an ulp off": (
        formulations.ATTACHED,
        "quantize_rows",
        with_body(with_book(-1)),
        "quantize_rows",
        True,
    ),
    "tree: even element gets the odd one's place": (
        encoding,
        "in_pairs",
        replaced(lambda f, x: f(x)[::-1]),
        "quantize_rows",
        True,
    ),
    "float16 subnormals flushed": (
        floats,
        "widen",
        replaced(lambda f, w, dtype: torch.where(w & 0x7C00 == 0, 0.0, f(w, dtype)) if dtype == F16 else f(w, dtype)),
        "quantize_rows",
        True,
    ),
    "a dropped sign": (
        encoding,
        "select",
        replaced(lambda f, bit, high, low: f(bit & (high != 8.0), high, low)),
        "quantize_rows",
        True,
    ),
    "decode truncates to bfloat16": (
        lookup16,
        "rounded_bits",
        replaced(lambda f, x, dtype: x.view(torch.int32) >> 16 & 0xFFFF if dtype == BF16 else f(x, dtype)),
        "dequantize_rows",
        True,
    ),
    "decode reads nibbles low first": (
        fourbit.dequantize_rows,
        "definition",
        replaced(lambda f, packed, *rest, **constants: f(packed >> 4 | packed << 4, *rest, **constants)),
        "dequantize_rows",
        False,
    ),
    "decode rounds the scale first": (
        fourbit.dequantize_rows,
        "definition",
        replaced(lambda f, packed, absmax, **constants: f(packed, absmax.half().float(), **constants)),
        "dequantize_rows",
        False,
    ),
    "8-bit tie to the lower code": (
        blockwise,
        "count_below",
        replaced(
            lambda f, x, t: f(x, torch.where(torch.arange(len(t)) % 2 == 1, t.nextafter(torch.tensor(math.inf)), t))
        ),
        "quantize_blocks",
        False,
    ),
    "nested: one rounding": (
        nested.dequantize_nested,
        "definition",
        replaced(
            lambda f, codes, absmax, values, offset: (
                values.double()[codes.long()] * absmax.double()[:, None] + offset
            ).float()
        ),
        "dequantize_nested",
        False,
    ),
    "nested: no offset": (
        nested.dequantize_nested,
        "definition",
        replaced(lambda f, codes, absmax, values, offset: f(codes, absmax, values, offset * 0)),
        "dequantize_nested",
        False,
    ),
    "int8 scale in float64": (
        int8,
        "reciprocal",
        replaced(lambda f, x: torch.where(x > 0, 1 / x.double(), 0.0)),
        "LLM.int8()",
        False,
    ),
    "int8 threshold not included": (
        int8.quantize_int8_rows,
        "definition",
        replaced(lambda f, x, threshold, **kw: f(x, threshold=up(threshold) if threshold else 0.0, **kw)),
        "quantize_int8_rows",
        False,
    ),
    "int8 smallest absmax": (int8, "SMALLEST_ABSMAX", lambda right: 2.0**-120, "quantize_int8_rows", False),
    "int8: 1 / 127 an ulp off": (int8, "RECIPROCAL_127", up, "dequantize_int8_rows", False),
    "int8: bitsandbytes' typo": (
        int8,
        "RECIPROCAL_127_SQUARED",
        lambda right: 6.200124e-05,
        "dequantize_int8_product",
        False,
    ),
    "int8: bias rounded to float16": (
        int8.dequantize_int8_product,
        "definition",
        replaced(lambda f, p, r, c, bias, o, dtype: f(p, r, c, bias if bias is None else bias.half(), o, dtype=dtype)),
        "dequantize_int8_product",
        False,
    ),
    "int8: product rounded before the bias": (
        int8.dequantize_int8_product,
        "definition",
        replaced(
            lambda f, p, r, c, bias, o, dtype: (
                f(p, r, c, None, None, dtype=dtype)
                if bias is None
                else f(p, r, c, None, None, dtype=dtype) + bias.to(dtype) + o
            )
        ),
        "dequantize_int8_product",
        False,
    ),
    "a sum without its roundings": (
        ordered.add_products,
        "definition",
        replaced(lambda f, total, a, b: total + (a.double() @ b.double()).float()),
        "add_products",
        False,
    ),
    "optimizer: decay after the step": (optim_step, "advance", replaced(decay_after), "step_elements", False),
    "optimizer: NaN forgets": (optim_step, "advance", replaced(forgetful), "step_elements", False),
    "optimizer: the largest gradient is too large": (
        optim_step,
        "LARGEST_GRADIENT",
        lambda right: float(torch.tensor(right).nextafter(torch.tensor(0.0))),
        "step_elements",
        False,
    ),
    "optimizer: a larger gradient is none too large": (optim_step, "LARGEST_GRADIENT", up, "step_elements", False),
    "optimizer: direction of NaN": (
        optim_step,
        "advance",
        replaced(
            lambda f, *args: (
                *f(*args)[:2],
                args[0].direction(args[1], args[2], *args[3], Coefficients(args[0].names, args[4]))[0],
                f(*args)[3],
            )
        ),
        "direction_elements",
        False,
    ),
    "optimizer: corrections a step ahead": (rules.Adam, "coefficients", replaced(biased), "step_elements", False),
    "optimizer: no schedule of beta3": (
        rules.AdEMAMix,
        "coefficients",
        replaced(lambda f, self, t, group: f(self, t, {**group, "t_beta3": None})),
        "step_blocks",
        False,
    ),
    "optimizer: LAMB's direction is not corrected": (
        rules.LAMB,
        "coefficients",
        replaced(lambda f, self, t, group: f(self, t, group) | {"unbias": 1.0}),
        "direction_blocks",
        False,
    ),
    "8-bit state: scale of a subnormal": (
        optim_step,
        "magnitude",
        replaced(lambda f, x: torch.where(x == x, x.abs(), 0.0)),
        "step_blocks",
        False,
    ),
    "8-bit state: a held element lets the scale fall": (
        optim_step,
        "magnitude",
        replaced(lambda f, x: f(x) * (1 - 2.0**-23)),
        "step_blocks",
        False,
    ),
    "8-bit state: decoded with its reciprocal": (
        optim_step,
        "decoded",
        replaced(lambda f, states, values: f([x if i % 2 == 0 else 1 / (1 / x) for i, x in enumerate(states)], values)),
        "direction_blocks",
        False,
    ),
    "8-bit state: squares have a sign": (
        rules.Rule,
        "codebooks",
        lambda right: (codebooks.DYNAMIC, codebooks.DYNAMIC),
        "step_blocks",
        False,
    ),
    "a tree of strides instead of neighbours": (
        ordered.add_products,
        "definition",
        replaced(
            lambda f, total, a, b: f(
                total, a.view(-1, 2, 32).mT.reshape(-1, 64), b.view(2, 32, -1).transpose(0, 1).reshape(64, -1)
            )
        ),
        "add_products",
        False,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_killed(mutant, monkeypatch):
    where, name, change, check, formulation = MUTANTS[mutant]
    if isinstance(where, dict):
        monkeypatch.setitem(where, name, change(where[name]))
    else:
        monkeypatch.setattr(where, name, change(getattr(where, name)))
    assert not survives(check, formulation, monkeypatch), f"{check} does not notice: {mutant}"


@pytest.mark.parametrize("name", [check.name for check in kernels.CHECKS])
@pytest.mark.parametrize("formulation", [False, True])
def test_without_a_mutant_all_is_well(name, formulation, monkeypatch):
    assert survives(name, formulation, monkeypatch)


# ---- the strategies of the proofs -----------------------------------------------------------------------------------


def failure_of(variant, mutant):
    """What the property of tests/test_proof.py says of a wrong formulation, `mutant(case)`; None if nothing."""

    @settings(max_examples=100, database=None, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
    @given(variant(st.integers(2, 5)))
    def run(case):
        got, want = mutant(case)
        assert same_bits(got, want), difference(got, want, case)

    try:
        run()
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize("book", [codebooks.NF4, codebooks.FP4], ids=lambda book: book.name)
def test_strategies_find_each_threshold_that_is_an_ulp_off(book):
    """And print the input so that it can be pasted back."""
    kernel, variant = fourbit.quantize_rows, strategies._quantize_rows(F32, book, 64)
    for i in range(len(book.thresholds)):

        def mutant(case, i=i):
            wrong = {**case.kwargs, "codebook": moved(book, i)}
            return kernel.body(*case.args, **wrong), kernel.definition(*case.args, **case.kwargs)

        message = failure_of(variant, mutant)
        assert message is not None, f"threshold {i} of {book.name} may be an ulp too high, and nobody notices"
        assert "Case(bits(torch.float32, (" in message


def test_strategies_find_a_switch_that_is_an_ulp_off():
    """One entry in sixteen of the table for 8 bits: its threshold is below itself."""
    kernel, variant = blockwise.quantize_blocks, strategies._quantize_blocks(F32, codebooks.DYNAMIC, 256)
    table = counting.code_table(codebooks.DYNAMIC, CPU)
    changes = (table >> 24 != table << 8 >> 24).nonzero().view(-1)
    assert len(changes) > 200  # a negative threshold of few digits lies between two cells
    for cell in changes[::16].tolist():

        def mutant(case, cell=cell):
            wrong = table.index_add(0, torch.tensor([cell]), torch.tensor([-1], dtype=table.dtype))
            got = kernel.formulation(case.args, (wrong,), case.kwargs)
            return got, kernel.definition(*case.args, **case.kwargs)

        assert failure_of(variant, mutant) is not None, f"entry {cell}"


def test_a_pasted_failure_is_the_input():
    from conftest import bits, pasted

    x = torch.tensor([[-0.0, math.nan, 1e-45], [math.inf, 1.0, -2.5]])
    again = eval(pasted(x), {"bits": bits, "torch": torch})
    assert torch.equal(again.view(torch.int32), x.view(torch.int32))


def test_a_kernel_without_a_strategy_is_noticed():
    from test_proof import test_every_kernel_has_a_strategy

    kernel = fused(dynamic={"x": (0,)})
    try:

        @kernel
        def unproven(x):
            return x

        with pytest.raises(AssertionError, match="kernels without a strategy"):
            test_every_kernel_has_a_strategy()
    finally:
        REGISTRY.pop("unproven", None)
    assert few_rows.multiply_rows.exact is False
