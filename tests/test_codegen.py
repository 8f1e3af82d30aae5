"""What Inductor writes for an H100, on a machine without one: how many kernels, what ptxas makes of them, and their bits.

`tests/codegen` does the work in processes of its own, where torch and Triton believe in a GPU: `written` compiles and counts,
`interpreted` runs the same kernels in Triton's interpreter and compares them with the definitions. Needs triton.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bnbref.kernels import REGISTRY

TESTS = Path(__file__).parent


def missing() -> str | None:
    """What these tests lack on this machine; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "no triton: `pip install triton==3.7.1` goes with torch 2.13 (3.6.0 with 2.11), the CPU build too"
    if shutil.which("g++") is None:
        return "no g++, which the pretended GPU needs"
    return None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


# ---- claims ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """Of the configurations of a kernel, the block sizes that Inductor would time on first use."""

    kernels: int = 1
    load: int = 128
    """Bits of the widest load, in the configuration where it is widest; a look-up is narrow beside it."""
    store: int = 128
    spilling: int = 0
    """Configurations that spill registers."""
    stack: int = 0
    """Bytes that are spilled where they are fewest."""
    discarded: bool = False
    """Whether Inductor discards every configuration that spills, so that the chosen one does not. It counts the words of a row
    and not their elements, and so tries 128 rows with two warps, which is 128 elements a lane."""
    instructions: frozenset[str] = frozenset()
    """What is neither a sum nor a product of floats. Nothing is contracted: an fma would be among them."""
    by_address: bool = False
    """Whether it looks up by address."""
    conversions: int | None = None
    """How often at most a tensor changes its layout, which is by way of shared memory; None: not looked at."""


DISCARDED = 4 * 16
"""A configuration that spills more bytes is discarded by Inductor, if there are others."""

DIVIDES = frozenset({"div.rn.f32"})
ROOTS = DIVIDES | {"sqrt.rn.f32"}
NONE: frozenset[str] = frozenset()

CLAIMS = {
    "quantize_rows": Claim(load=64, spilling=1, instructions=DIVIDES),
    "quantize_rows bfloat16 64 nf4": Claim(load=64, spilling=1, discarded=True, instructions=DIVIDES, by_address=True),
    "quantize_rows float16 64 nf4": Claim(load=64, spilling=1, discarded=True, instructions=DIVIDES, by_address=True),
    "dequantize_rows": Claim(load=64),
    "quantize_blocks": Claim(load=64, spilling=1, instructions=DIVIDES),
    "quantize_blocks bfloat16": Claim(load=64, spilling=1, discarded=True, instructions=DIVIDES, by_address=True),
    "quantize_blocks float16": Claim(load=64, spilling=1, discarded=True, instructions=DIVIDES, by_address=True),
    "dequantize_blocks": Claim(load=64),
    "dequantize_nested": Claim(load=64),
    # Rows of any length: Triton does not know where they begin, and loads element by element.
    "quantize_int8_rows bfloat16 0.0": Claim(load=16, store=32, instructions=DIVIDES),
    "quantize_int8_rows float16 0.0": Claim(load=16, store=32, instructions=DIVIDES),
    "quantize_int8_rows float32 0.0": Claim(load=32, store=32, instructions=DIVIDES),
    # Which columns hold an outlier is known only after all rows, and every code depends on it.
    "quantize_int8_rows": Claim(kernels=3, load=8, store=8, instructions=DIVIDES),
    "dequantize_int8_product": Claim(load=32, store=16),
    "dequantize_int8_rows": Claim(load=32, store=16),
    # 128 numbers for 64 products, of which the compiler loads many before it needs them.
    "add_products": Claim(load=32, store=32, spilling=2, stack=40),
    # Any number of elements, of which Triton does not know that 4 divides it: coalesced, but a number a load.
    "step_elements": Claim(load=32, store=32, instructions=ROOTS),
    "direction_elements": Claim(load=32, store=32, instructions=ROOTS),
    "step_blocks": Claim(instructions=ROOTS, by_address=True),
    "step_blocks bfloat16": Claim(load=64, store=64, instructions=ROOTS, by_address=True),
    "direction_blocks": Claim(instructions=ROOTS, by_address=True),
    # Bounded, not exact: it may be contracted. It stores one number for a row. All loads have one layout:
    # with triton 3.6 nothing changes it, with 3.7 four things do, and not each of 32 values.
    "multiply_rows": Claim(load=64, store=16, conversions=4, instructions=frozenset({"fma.rn.f32"})),
    "multiply_int8_row": Claim(store=16),
    "multiply_int8_row_and_outliers": Claim(store=16, instructions=frozenset({"fma.rn.f32"})),
}
"""By the beginning of a variant's name, as `codegen/calls.py` makes it; the longest that fits counts."""


def claim_of(variant: str) -> Claim:
    return CLAIMS[max((key for key in CLAIMS if f"{variant} ".startswith(f"{key} ")), key=len)]


def faults(made: list[dict[str, Any]], claim: Claim) -> list[str]:
    """What is otherwise than claimed, in words."""
    found = []
    kernels = {m["kernel"] for m in made}
    if len(kernels) != claim.kernels:
        found.append(f"{len(kernels)} kernels, not {claim.kernels}")
    for kernel in kernels:
        configurations = [m for m in made if m["kernel"] == kernel]
        stacks = [m["stack"] for m in configurations]
        chosen = [stack for stack in stacks if 0 < stack <= DISCARDED]
        if sum(map(bool, stacks)) > claim.spilling or min(stacks) > claim.stack or (claim.discarded and chosen):
            found.append(f"configurations spill {stacks} bytes")
        for operation, least in (("loads", claim.load), ("stores", claim.store)):
            widest = max(widest_of(m, operation) for m in configurations)
            if widest < least:
                found.append(f"{operation} of {widest} bits, not {least}")
    for m in made:
        others = set(m["floats"]) - claim.instructions
        if others:
            found.append(f"{sorted(others)} in {m['config']}")
        if claim.conversions is not None and m["conversions"] > claim.conversions:
            found.append(f"{m['conversions']} conversions of layouts, not {claim.conversions}, in {m['config']}")
        if m["masked"]:
            found.append(f"{m['masked']} numbers are masked in {m['config']}")
        if m["by_address"] != claim.by_address:
            found.append(f"{'' if m['by_address'] else 'not '}by address in {m['config']}")
        # Told not to, ptxas contracts nothing either; its quotients and roots are made of fmas.
        exact = "fma.rn.f32" not in claim.instructions
        if exact and (m["fusion"] or (m["ffma"] and not m["floats"])):
            found.append(f"{m['ffma']} FFMA, contraction {'allowed' if m['fusion'] else 'forbidden'}, in {m['config']}")
    return found


def widest_of(made: dict[str, Any], operation: str) -> int:
    return max(map(int, made[operation]), default=0)


# ---- processes ------------------------------------------------------------------------------------------------------


def run(tool: str, what: str) -> list[dict[str, Any]]:
    """The lines that a tool prints."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "codegen" / f"{tool}.py"), what]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def row(variant: str, made: list[dict[str, Any]]) -> str:
    """A line of the table: the configurations' least and most."""

    def span(values: list[int]) -> str:
        return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"

    widths = [span([widest_of(m, key) for m in made]) for key in ("loads", "stores")]
    spills = f"{sum(m['stack'] > 0 for m in made)} of {len(made)}"
    instructions = ", ".join(sorted({name for m in made for name in m["floats"]}))
    kernels, registers = len({m["kernel"] for m in made}), span([m["registers"] for m in made])
    return f"{variant:<44} {kernels:>7} {registers:>9} {spills:>7} {widths[0]:>7} {widths[1]:>7}  {instructions}"


HEAD = f"{'kernel':<44} {'kernels':>7} {'registers':>9} {'spills':>7} {'load':>7} {'store':>7}  divisions, roots, fma"


def test_every_kernel_is_written_as_claimed(theorems):
    lines = run("written", "calls")
    assert {line["kernel"] for line in lines} == set(REGISTRY), "kernels that nothing in codegen/calls.py calls"
    assert {key.split()[0] for key in CLAIMS} == set(REGISTRY)
    theorems.say("written for an H100", [HEAD, *(row(line["variant"], line["made"]) for line in lines)])
    wrong = {line["variant"]: faults(line["made"], claim_of(line["variant"])) for line in lines}
    assert not {variant: found for variant, found in wrong.items() if found}


def test_every_kernel_has_its_bits_in_the_interpreter(theorems):
    begun = time.perf_counter()
    lines = run("interpreted", "calls")
    assert {line["kernel"] for line in lines} == set(REGISTRY)
    assert not [line for line in lines if line["difference"]]
    theorems.record("Triton kernels, interpreted", sum(line["numbers"] for line in lines), time.perf_counter() - begun)


def test_mistakes_are_found():
    """Kernels with one mistake each, by the words that say so; the right one has none."""
    claim = Claim(instructions=DIVIDES)
    found = {line["kernel"]: " ".join(faults(line["made"], claim)) for line in run("written", "mistakes")}
    assert found["right"] == ""
    assert "fma.rn.f32" in found["contracted"]
    assert "div.full.f32" in found["approximate"]
    assert "kernels, not 1" in found["in_two"]
    assert "loads of 32 bits" in found["narrow"]
    assert "configurations spill" in found["spilled"]


def test_other_bits_are_found():
    found = {line["kernel"]: line["difference"] for line in run("interpreted", "mistakes")}
    assert {kernel for kernel, difference in found.items() if difference} == {"other_bits"}
    assert "expected" in found["other_bits"]
