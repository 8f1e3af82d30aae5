"""Kernels inside other people's graphs, with default options, between operations of theirs that Inductor would fuse; and in
graphs that a GPU replays."""

import os
import subprocess
import sys

import pytest
import strategies
import torch
from codegen.calls import calls, calls_go_to
from conftest import difference, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_map

import bnbref
from bnbref import blockwise, fourbit, int8
from bnbref.codebooks import DYNAMIC, NF4
from bnbref.kernels import REGISTRY, Kernel

BF16 = torch.bfloat16


def operands():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    with bnbref.eager():
        return x, fourbit.quantize(x.flatten()[:448], NF4, 7), blockwise.quantize(x, DYNAMIC, 64), int8.quantize(x)


X, FOUR, EIGHT, INT8 = operands()
TABLE = torch.tensor(DYNAMIC.values)

GRAPHS = {
    "4 bits, then float32": lambda x: fourbit.dequantize(*FOUR, NF4, 7, (448,), BF16).float() * 3,
    "8 bits, then float32": lambda x: blockwise.dequantize(*EIGHT, TABLE, 64, BF16).float() * 3,
    "int8, then float32": lambda x: int8.dequantize(*INT8[:2], BF16).float() * 3,
    "rounded, then 4 bits": lambda x: fourbit.quantize((x * 1.1).to(BF16), NF4, 64),
    "rounded, then 8 bits": lambda x: blockwise.quantize((x * 1.1).to(BF16), DYNAMIC, 64),
    "rounded, then int8": lambda x: int8.quantize((x * 1.1).to(BF16))[:2],
    "an int8 product between": lambda x: bnbref.matmul((x * 1.1).to(BF16), X) * 1.3,
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_neighbours_change_no_bits(graph):
    with bnbref.eager():
        want = GRAPHS[graph](X)
    got = torch.compile(GRAPHS[graph], fullgraph=True)(X)
    assert same_bits(got, want), difference(got, want)


def test_their_own_roundings_are_theirs():
    """What the seal is for: torch alone, by default, has other bits compiled. When this fails it can go."""

    def theirs(x):
        return (x * 1.1).to(BF16).float() * 3

    assert not same_bits(torch.compile(theirs, fullgraph=True)(X), theirs(X))


# ---- without data ---------------------------------------------------------------------------------------------------
# A kernel that looks at a number to decide what to do waits for the device, and is nothing that a CUDA graph can replay. On
# tensors without data that is an error.


def traced_on_cpu(kernel, args, constants):
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        return kernel.body(*fakes, **constants)


def traced_on_gpu(kernel, args, constants):
    """As on a device that is not the CPU, with the tables that it would be given."""
    return kernel.body(*(None if x is None else x.to("meta") for x in args), **constants)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_no_kernel_looks_at_its_data(name):
    for variant in strategies.KERNELS[name].values():

        @settings(max_examples=1)
        @given(variant(st.just(3)))
        def run(case):
            traced_on_cpu(REGISTRY[name], case.args, case.kwargs)

        run()


def test_no_kernel_looks_at_its_data_on_a_gpu():
    seen = set()

    def run(kernel, tensors, constants):
        seen.add(kernel.name)
        return tree_map(lambda y: torch.zeros_like(y, device="cpu"), traced_on_gpu(kernel, tensors, constants))

    for _, call in calls():
        with calls_go_to(run):
            call()
    assert seen == set(REGISTRY)


HOST_READS = {
    "a number": lambda x: x * x.amax().item(),
    "a condition": lambda x: x if bool((x > 0).any()) else -x,
    "a mask": lambda x: x[x > 0],
    "indices": lambda x: x.nonzero(),
    "a list": lambda x: x + len(x.tolist()),
}


@pytest.mark.parametrize("read", HOST_READS)
def test_a_kernel_that_looks_is_found(read):
    kernel = Kernel(HOST_READS[read], {})
    x = torch.ones(4)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        traced_on_cpu(kernel, [x], {})
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|Meta"):
        traced_on_gpu(kernel, [x], {})


CHECK = (
    "import sys, torch, bnbref.cli; torch.set_num_threads({threads}); "
    "sys.exit(bnbref.cli.main(['check', '--self', '--device', 'cpu']))"
)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_kernel_on_other_instruction_sets(isa, threads):
    """ATen's and Inductor's vectors of no, 256 and 512 bits: the same digests. Compiled code is kept apart by its options."""
    if isa != "default" and isa not in torch.backends.cpu.get_cpu_capability().lower() + " avx2":
        pytest.skip(f"this CPU has no {isa}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": isa}
    done = subprocess.run(
        [sys.executable, "-c", CHECK.format(threads=threads)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = sum(kernel.exact for kernel in REGISTRY.values())
    assert f"in {count} of {count} exact kernels" in done.stdout
