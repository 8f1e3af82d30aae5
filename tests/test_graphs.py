"""Kernels inside other people's graphs, with default options, between operations of theirs that Inductor would fuse."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import difference, same_bits

import bnbref
from bnbref import blockwise, fourbit, int8
from bnbref.codebooks import DYNAMIC, NF4
from bnbref.fused import REGISTRY

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
