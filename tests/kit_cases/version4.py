"""Cases that came with version 4: what wrong backends got past the cases before. Other scales than those of the first weight of a
shape, square matrices, batches, products in blocks that are not of 64, transposes, numbers that float16 has not.
"""

from collections.abc import Iterator
from typing import Any

import torch

from bnbref.codebooks import DYNAMIC, NF4
from bnbref.conformance.case import DTYPES, Case
from bnbref.conformance.oracles.formula import STATES
from kit_cases.inputs import cast, changed, clear, in_blocks, nested_weight, noise, random_bytes, random_int8, scales
from kit_cases.oracles import make
from kit_cases.squares import SIGNED, Earlier, squares_and_refresh_cases
from kit_cases.values import loosened


def _numbers(earlier: Earlier) -> Iterator[Case]:
    """What float16 has not, and what a kernel keeps of the call before."""
    for name, label, rules in (
        ("quantize_4bit/nf4-noise-bfloat16", "nf4-large-bfloat16", "Q4-1 Q4-2"),
        ("quantize_blockwise/signed-noise-bfloat16", "signed-large-bfloat16", "Q8-1 Q8-2"),
        ("int8_quantize/noise-bfloat16", "large-bfloat16", "I8-1 I8-2"),
    ):
        yield changed(earlier[name], label, rules, inputs={"x": earlier[name].inputs["x"] * 2.0**40})
    for name in ("gemm_4bit/nf4-1-32x128-bfloat16", "gemm_4bit/nf4-5-32x96-bfloat16"):
        given = earlier[name]
        label = f"{name.partition('/')[2]}-large"
        flag = given.flags[0] if given.flags else "float16-detour"
        yield changed(given, label, "G4-1", flag, inputs={"a": given.inputs["a"] * 2.0**40})
    weight = earlier["dequantize_4bit/nf4-shape-4x64"]
    others = {"packed": weight.inputs["packed"].flip(0), "absmax": weight.inputs["absmax"].flip(0) * 3}
    yield changed(weight, "nf4-shape-4x64-again", "D4-2", inputs=others)
    # Parts of the sum are far beyond float16, all of it is not.
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(256)
    ones = {"packed": torch.full((16 * 512 // 2,), 0xFF, dtype=torch.uint8), "absmax": torch.ones(128)}
    inputs = {"a": (1024 * sign + noise(512, 601)).half().view(1, 512), **ones}
    yield make("nf4-cancelling-float16", "gemm_4bit", inputs, "G4-1", blocksize=64, quant_type="nf4", shape=[16, 512])


def _shapes(earlier: Earlier) -> Iterator[Case]:
    a, b = random_int8((5, 24), 611), random_int8((24, 24), 612)
    yield make("square", "int8_matmul", {"a": a, "b": b}, "IM-1")
    square: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4", "shape": [24, 24]}
    weight = {"packed": random_bytes(24 * 12, 613), "absmax": scales(9)}
    for dtype in DTYPES:
        # As many rows as outputs as inputs, beyond tiles of 16.
        x, bias = cast(noise(24 * 24, 614).view(24, 24), dtype), cast(noise(24, 615) * 4, dtype)
        yield make(f"nf4-square-{dtype}", "gemm_4bit", {"a": x, "bias": bias, **weight}, "G4-1", "gemm-rows", **square)
        yield make(f"nf4-square-{dtype}", "gemm_4bit_backward", {"grad": x, **weight}, "GB-1", "gemm-rows", **square)
    cube = clear(in_blocks(clear(noise(63 * 6, 616), DYNAMIC, 63) * 0.99, 64), DYNAMIC).view(2, 3, 64)
    yield make("signed-3d", "quantize_blockwise", {"x": cube, "values": SIGNED}, "Q8-1 G-1", blocksize=64)
    codes = {"codes": random_bytes(480, 617).view(2, 5, 48), "absmax": scales(8), "values": SIGNED}
    yield make("3d", "dequantize_blockwise", codes, "D8-2 G-1", blocksize=64, dtype="float32")
    for name in STATES:
        for bits in ("32bit", "8bit"):
            resumed = earlier[f"optimizer_{bits}/{name}-resumed"]
            size, kept = resumed.inputs["p"].numel(), 100 if bits == "32bit" else 260
            shaped = {key: x[:kept].view(2, 2, kept // 4) for key, x in resumed.inputs.items() if x.numel() == size}
            rules = "OS-7 G-1" if bits == "32bit" else "OB-1 OB-2 G-1"
            yield changed(resumed, f"{name}-3d", rules, inputs=shaped, quick=name in ("adam", "momentum"))
    for name in ("adam", "momentum"):
        for dtype in ("float16", "bfloat16"):
            step = earlier[f"optimizer_32bit/{name}-{dtype}"]
            yield changed(step, f"{name}-{dtype}-scaled", "OS-3", "rounding", gnorm_scale=0.3)


def _blocksizes(earlier: Earlier) -> Iterator[Case]:
    """Products in blocks that are not of 64; one kernel of them is often all that is called."""
    for blocksize in (32, 128):
        kind: dict[str, Any] = {"blocksize": blocksize, "quant_type": "nf4", "shape": [16, 128]}
        weight = {"packed": random_bytes(16 * 64, 618), "absmax": scales(16 * 128 // blocksize)}
        for rows in (1, 3):
            a, grad = noise(rows * 128, 619).view(rows, 128), noise(rows * 16, 620).view(rows, 16)
            label = f"nf4-{rows}-blocksize-{blocksize}"
            yield make(label, "gemm_4bit", {"a": a, **weight}, "G4-1", "blocksize", **kind)
            yield make(label, "gemm_4bit_backward", {"grad": grad, **weight}, "GB-1", "blocksize", **kind)
        label = f"nf4-blocksize-{blocksize}"
        yield make(label, "evaluate_then_train", {"x": a, "grad": grad, **weight}, "LE-1 LE-2 LE-3",
                   "evaluation-repacks", **kind)  # fmt: skip
        nested = earlier["dequantize_4bit_nested/nf4-matrix-float32"]
        codes = random_bytes(40 * 64 // blocksize, 621)
        rule, flag = ("DN-2", "scale-index-tail-columns") if blocksize > 64 else ("DN-1", "blocksize")
        yield changed(nested, label, rule, flag, inputs={"codes": codes}, blocksize=blocksize)


def _strides(earlier: Earlier) -> Iterator[Case]:
    """Matrices that are the transposes of others, and more dimensions than a kernel of elements needs."""
    for name, transposed, rules in (
        ("gemm_4bit/nf4-70-8x128-float32", "a", "G-3"), ("gemm_4bit_backward/nf4-5-32x64-float32", "grad", "G-3"),
        ("int8_matmul/16x16x128", "a", "G-3"), ("int8_matmul/5x3x33", "b", "G-3"),
        ("int8_mm_dequant/noise-float32", "product", "G-3"), ("dequantize_blockwise/matrix", "codes", "G-3"),
        ("int8_dequantize/noise", "codes", "G-3"), ("int8_backward/6-float32", "grad", "G-3"),
    ):  # fmt: skip
        label = f"{name.partition('/')[2]}-transposed-{transposed}"
        made = changed(earlier[name], label, rules, "noncontiguous", layout=(transposed,))
        yield loosened(made) if "product" in made.inputs else made
    for operation, name, rule in (
        ("split_weight", "noise", "WS-1"), ("join_weight", "one", "WJ-1"), ("corrected_step", "resumed", "WC-1"),
    ):  # fmt: skip
        one = earlier[f"{operation}/bfloat16-24-{name}"]
        shaped = {key: x.view(4, -1) for key, x in one.inputs.items()}
        yield changed(one, "bfloat16-24-matrix", f"{rule} G-1", inputs=shaped)


def _files(earlier: Earlier) -> Iterator[Case]:
    outliers = earlier["int8_quantize/outliers-float16"]
    yield changed(outliers, "outliers-of-4.5", "I8-1 I8-3", "outlier-columns", threshold=4.5,
                  inputs={"x": outliers.inputs["x"] * 0.75})  # fmt: skip
    yield changed(outliers, "outliers-3d", "I8-5 I8-3", "int8-3d", inputs={"x": outliers.inputs["x"].view(2, 4, 64)})
    x = nested_weight(NF4, 32, zero_block=False)
    wide = torch.cat((x[:16], x[16:] / x[16:].abs().amax(1, keepdim=True) * x[:16].abs().amax(1, keepdim=True)), 1)
    given: dict[str, Any] = {"blocksize": 128, "quant_type": "nf4"}
    yield make("nf4-blocksize-128", "quantize_4bit_nested", {"x": wide}, "QN-1", "nested-absmax", **given)
    for label, tensor, nested in (
        ("nf4-blocksize-128-nested", wide, True), ("nf4-blocksize-128", wide, False), ("nf4-3d", wide.view(4, 4, 128), False),
    ):  # fmt: skip
        written = make(label, "save_4bit", {"x": tensor}, "CW-1 CW-2", "checkpoint-bytes", **given, nested=nested)
        yield written
        file = {key: value.value for key, value in written.expected.items()}
        yield make(label, "load_4bit", file, "CR-1", "checkpoint-bytes", quant_type="nf4")


def version_4_cases(earlier: Earlier) -> Iterator[Case]:
    """Every case that came with version 4. earlier: the others by id."""
    for cases in (_numbers, _shapes, _blocksizes, _strides, _files, squares_and_refresh_cases):
        yield from cases(earlier)
