"""No kernel without a proof: what Inductor makes of every registered kernel has the bits of its definition."""

import contextlib
import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import strategies
import torch
from conftest import difference, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import AF4, BF16, DYNAMIC, DYNAMIC_UNSIGNED, F16, F32, FP4, KERNELS, MANY, NF4, Case, linear

import bnbref
from bnbref.codebooks import INT4, fp8
from bnbref.kernels import REGISTRY, Kernel, door

PACKAGE = Path(bnbref.__file__).parent


def modules_with_kernels() -> list[str]:
    """Every module that uses the one door: a kernel counts from where it is registered, imported or not."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if re.search(r"^from bnbref.kernels(.door)? import .*\bfused\b", path.read_text(encoding="utf-8"), re.M):
            found.append(".".join(["bnbref", *path.relative_to(PACKAGE).with_suffix("").parts]))
    return found


for _module in modules_with_kernels():
    importlib.import_module(_module)

PAIRS = [(name, variant) for name in sorted(REGISTRY) for variant in KERNELS.get(name, {"no strategy": None})]
each_variant = pytest.mark.parametrize(("name", "variant"), PAIRS)
each_kernel = pytest.mark.parametrize("name", sorted(REGISTRY))


@contextlib.contextmanager
def without_definition(kernel: Kernel[..., Any]) -> Iterator[None]:
    """Inside, running the definition instead of compiled code is an error."""

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"kernel {kernel.name!r} ran its definition, uncompiled")

    definition, kernel.definition = kernel.definition, forbidden
    try:
        yield
    finally:
        kernel.definition = definition


def fresh(args: Any) -> list[Any]:
    """Copies for a kernel that may write into its arguments."""
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in args]


def strategy_of(name: str, variant: str | None = None) -> strategies.Variant:
    assert KERNELS.get(name), f"kernel {name!r} has no strategy: enter one in tests/strategies.py, KERNELS"
    return KERNELS[name][variant or next(iter(KERNELS[name]))]


def check(kernel: Kernel[..., Any], got: Any, want: Any, case: Case) -> None:
    """The same bits; for a kernel that adds up floats, within the bound that its strategy derives."""
    if kernel.exact:
        assert same_bits(got, want), difference(got, want, case)
    else:
        assert case.bound is not None, f"kernel {kernel.name!r} is not exact: its cases need a bound"
        error = (got.double() - want.double()).abs()
        assert got.dtype == want.dtype
        assert bool((error <= case.bound()).all()), (error.max(), case)


def test_every_kernel_has_a_strategy():
    assert set(REGISTRY) - set(KERNELS) == set(), "kernels without a strategy in tests/strategies.py"
    assert set(KERNELS) - set(REGISTRY) == set(), "strategies of kernels that are not there"


@each_variant
def test_compiled_is_the_definition(name, variant):
    kernel = REGISTRY[name]

    @given(strategy_of(name, variant)(MANY))
    def run(case):
        with without_definition(kernel):
            got = kernel(*fresh(case.args), **case.kwargs)
        check(kernel, got, kernel.definition(*case.args, **case.kwargs), case)

    run()


@each_variant
def test_a_definition_in_pieces_is_the_definition(name, variant, monkeypatch):
    """What loading runs on a GPU where nothing is compiled."""
    kernel = REGISTRY[name]
    monkeypatch.setattr(door, "_PIECE", 64)

    @settings(max_examples=5)
    @given(strategy_of(name, variant)(MANY))
    def run(case):
        got = kernel._definition_in_pieces(fresh(case.args), case.kwargs)
        check(kernel, got, kernel.definition(*case.args, **case.kwargs), case)

    run()


def compilations(kernel: Kernel[..., Any], cases: list[Case]) -> tuple[int, int]:
    """New variants of a kernel, and new graphs, after calls with these arguments."""
    from torch._dynamo.utils import counters

    kernel._calls.clear()  # Dynamo shall look at every size
    variants, graphs = len(kernel.variants), counters["stats"]["unique_graphs"]
    for case in cases:
        kernel(*fresh(case.args), **case.kwargs)
    return len(kernel.variants) - variants, counters["stats"]["unique_graphs"] - graphs


@each_kernel
def test_one_compilation_serves_all_sizes(name):
    """A variant for each kind of arguments, none for another size of what varies, and one graph for a variant."""

    @settings(max_examples=1)
    @given(st.tuples(*(strategy_of(name)(st.just(n)) for n in (2, 3, 5))))
    def run(cases):
        variants, graphs = compilations(REGISTRY[name], list(cases))
        assert variants <= len({tuple(x is None for x in case.args) for case in cases})
        assert graphs == variants

    run()


@each_kernel
def test_a_second_call_goes_straight_to_the_code(name):
    """Without Dynamo: nothing compiles, guards or finds its way again for tensors of a layout that was seen."""
    kernel = REGISTRY[name]

    @settings(max_examples=1)
    @given(strategy_of(name)(st.just(3)))
    def run(case):
        kernel(*fresh(case.args), **case.kwargs)
        with without_definition(kernel), mock.patch.object(kernel, "_through_dynamo", side_effect=AssertionError):
            got = kernel(*fresh(case.args), **case.kwargs)
        check(kernel, got, kernel.definition(*case.args, **case.kwargs), case)

    run()


def test_a_compilation_for_a_size_is_counted():
    kernel = Kernel(lambda x: x + x, {})
    assert compilations(kernel, [Case((torch.ones(n),)) for n in (2, 3, 5)]) == (3, 3)


@pytest.mark.cuda
@each_variant
def test_compiled_on_cuda_is_the_definition_on_cpu(name, variant):
    """The bits of another device, by another compiler."""
    kernel = REGISTRY[name]

    @settings(max_examples=20)
    @given(strategy_of(name, variant)(MANY))
    def run(case):
        on_device = [x.cuda() if isinstance(x, torch.Tensor) else x for x in case.args]
        with without_definition(kernel):
            got = kernel(*fresh(on_device), **case.kwargs)
        with bnbref.eager():
            eager = kernel(*fresh(on_device), **case.kwargs)
        want = kernel.definition(*case.args, **case.kwargs)
        for result in (got, eager):
            back = tuple(t.cpu() for t in result) if isinstance(result, tuple) else result.cpu()
            check(kernel, back, want, case)

    run()


# ---- other people's settings ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    """As while transformers loads a bfloat16 model."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def low_precision() -> Iterator[None]:
    """Float32 products may be made of bfloat16."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float32 products of less precision": low_precision,
    "deterministic algorithms": deterministic,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "default dtype bfloat16": default_dtype,
    "default device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "one thread": one_thread,
}


@pytest.mark.parametrize("context", CONTEXTS)
@each_kernel
def test_in_the_context_of(name, context):
    kernel = REGISTRY[name]

    @settings(max_examples=10)
    @given(strategy_of(name)(MANY))
    def run(case):
        want = kernel.definition(*case.args, **case.kwargs)
        with CONTEXTS[context](), without_definition(kernel):
            got = kernel(*fresh(case.args), **case.kwargs)
        check(kernel, got, want, case)
        with CONTEXTS[context](), bnbref.eager():
            got = kernel(*fresh(case.args), **case.kwargs)
        check(kernel, got, want, case)

    run()


@each_kernel
def test_inside_an_outer_compile(name):
    """Somebody else's graph, with their options: the formulation is inlined."""
    kernel = REGISTRY[name]
    outer: dict[Any, Any] = {}

    @torch._dynamo.config.patch(recompile_limit=64)  # all kernels share the code of the lambda
    @settings(max_examples=10)
    @given(strategy_of(name)(st.just(3)))
    def run(case):
        key = tuple(case.kwargs.items())
        if key not in outer:
            outer[key] = torch.compile(lambda *args: kernel(*args, **case.kwargs), fullgraph=True)
        with without_definition(kernel):
            got = outer[key](*fresh(case.args))
        check(kernel, got, kernel.definition(*case.args, **case.kwargs), case)

    run()


# ---- formulations, uncompiled: many more variants -------------------------------------------------------------------

WIDE: list[tuple[str, strategies.Variant]] = [
    *(
        (kernel, build(dtype, book, blocksize))
        for kernel, build in (
            ("quantize_rows", strategies._quantize_rows),
            ("dequantize_rows", strategies._dequantize_rows),
        )
        for dtype in (F32, BF16, F16)
        for book, blocksize in ((NF4, 64), (FP4, 2), (AF4, 1), (INT4, 24), (NF4, 7), (FP4, 100), (NF4, 256), (FP4, 15))
    ),
    *(
        ("quantize_blocks", strategies._quantize_blocks(dtype, book, blocksize))
        for dtype in (F32, BF16, F16)
        for book, blocksize in ((DYNAMIC, 100), (DYNAMIC_UNSIGNED, 256), (linear(), 24), (fp8(), 7), (linear(False), 1))
    ),
    *(
        ("step_blocks", strategies._step_blocks(rule, dtype, dtype == BF16, blocksize))
        for dtype in (F32, BF16, F16)
        for rule, blocksize in zip(strategies.RULES, itertools.cycle((256, 64, 100, 1, 7, 2048, 256, 16)), strict=False)
    ),
]


def test_every_formulation_is_its_definition_on_many_variants():
    for name, variant in WIDE:
        kernel = REGISTRY[name]

        @settings(max_examples=6)
        @given(variant(MANY), st.just(kernel))
        def run(case, kernel):
            check(kernel, kernel.body(*case.args, **case.kwargs), kernel.definition(*case.args, **case.kwargs), case)

        run()


def test_a_formulation_that_is_not_compiled_is_noticed():
    """The guard of the proofs above, on a kernel that runs its definition."""
    kernel = REGISTRY["dequantize_int8_rows"]
    args = (torch.ones(2, 2, dtype=torch.int8), torch.ones(2))
    with bnbref.eager(), without_definition(kernel), pytest.raises(AssertionError, match="uncompiled"):
        kernel(*args, dtype=torch.float32)
