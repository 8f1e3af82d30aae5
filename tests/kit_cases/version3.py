"""Cases that came with version 3: what wrong backends got past the cases of both versions before.

Most are a case of theirs with something changed: another shape, numbers that float16 and bfloat16 have not, two arguments at once
that were alone before.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bnbref.codebooks import DYNAMIC, NF4
from bnbref.conformance.case import DTYPES, Case
from bnbref.conformance.oracles.formula import CLIPPED, COUPLED, STATES
from kit_cases.inputs import cast, changed, clear, in_blocks, noise, random_bytes, scales
from kit_cases.oracles import make
from kit_cases.steps import USUAL


def _codes(earlier: Mapping[str, Case]) -> Iterator[Case]:
    # Numbers that float16 has below 2^-14, multiples of 2^-24, far from every threshold.
    for book, name, rules in (
        (NF4, "quantize_4bit/nf4", "Q4-1 Q4-2"),
        (DYNAMIC, "quantize_blockwise/signed", "Q8-1 Q8-2"),
    ):
        small = clear(in_blocks(noise(63, 501).mul(512).round() / 512, 64), book).mul(512).round() * 2.0**-24
        label = f"{name.partition('/')[2]}-subnormal-float16"
        yield changed(earlier[f"{name}-noise-float16"], label, rules, inputs={"x": small.half()})
    every = earlier["dequantize_blockwise/signed-every-code-float32"]
    absmax = torch.full_like(every.inputs["absmax"], 2.0**-110)
    yield changed(every, "signed-small-scale", "D8-1", inputs={"absmax": absmax})
    # Scales whose mean, 2 + 2^-19, is exact, no number of 16 bits, and not in the middle between the least and the largest.
    steps = torch.tensor([-1, -1, -1, -1, -1, -1, 3, 3.0]).repeat(32) / 4 + 2.0**-19
    x = in_blocks(clear(noise(63 * 256, 502), NF4, 63) * 0.99, 64).view(256, 64) * (2 + steps)[:, None]
    yield make("nf4-offset", "quantize_4bit_nested", {"x": x}, "QN-1", "nested-absmax", blocksize=64, quant_type="nf4")
    square = earlier["int8_mm_dequant/noise-float32"]
    product, row, column = (square.inputs[name] for name in ("product", "row", "column"))
    n = min(product.shape)
    inputs = {"product": product[:n, :n].contiguous(), "row": row[:n], "column": column[:n]}
    yield changed(square, "square", "ID-1", inputs=inputs)


def _products(earlier: Mapping[str, Case]) -> Iterator[Case]:
    # Beyond tiles of 256 rows and columns of the weight, with a rest of 17 and of 64.
    n, k = 273, 576
    weight = {"packed": random_bytes(n * k // 2, 511), "absmax": scales(n * k // 64)}
    kind: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4", "shape": [n, k]}
    for dtype in DTYPES:
        for rows in (1, 3):
            a, grad = (cast(noise(rows * size, 512).view(rows, size), dtype) for size in (k, n))
            label = f"nf4-{rows}-{n}x{k}-{dtype}"
            yield make(label, "gemm_4bit", {"a": a, **weight}, "G4-1", quick=dtype == "bfloat16", **kind)
            yield make(label, "gemm_4bit_backward", {"grad": grad, **weight}, "GB-1", quick=dtype == "bfloat16", **kind)
    # Ones, of which a sum in bfloat16 never gets above 256.
    ones = {"packed": torch.full((16 * 512 // 2,), 0xFF, dtype=torch.uint8), "absmax": torch.ones(128)}
    for name, operation, shape in (("a", "gemm_4bit", [16, 512]), ("grad", "gemm_4bit_backward", [512, 16])):
        inputs = {name: torch.ones(2, 512, dtype=torch.bfloat16), **ones}
        yield make(
            "nf4-ones-bfloat16", operation, inputs, "G4-1" if name == "a" else "GB-1", **{**kind, "shape": shape}
        )
    # Weights a quarter of a code beside what int8 has.
    exact = earlier["int8_backward/6-float16"]
    beside = exact.inputs["weight"].clone()
    beside[:, 1:] += beside[:, :1] / 508
    yield changed(exact, "rounded-float16", "IB-1", inputs={"weight": beside})


def _steps(earlier: Mapping[str, Case]) -> Iterator[Case]:
    awkward = {**USUAL, "step": 5000, "alpha": 5.3, "weight_decay": 0.013, "gnorm_scale": 0.3}
    for name in STATES:
        resumed, matrix = earlier[f"optimizer_32bit/{name}-resumed"], earlier[f"optimizer_32bit/{name}-matrix"]
        yield changed(resumed, f"{name}-late", "OS-1 OS-3", **awkward)
        yield changed(matrix, f"{name}-transposed", "G-3", "noncontiguous", layout=("p", "g"))
        one = {key: x[0] for key, x in resumed.inputs.items()}
        yield changed(resumed, f"{name}-scalar", "OS-7 G-1", inputs=one)
        if name in COUPLED:
            yield changed(
                resumed, f"{name}-decay-scaled", "OS-2 OS-3", "coupled-decay", weight_decay=0.25, gnorm_scale=0.25
            )
        if name in CLIPPED:
            large = earlier[f"optimizer_32bit/{name}-size-257"]
            yield changed(large, f"{name}-clipped-257", "OS-5", "update-norm", max_unorm=0.07, eps=0.0)
    for name in ("adam", "momentum"):
        resumed = earlier[f"optimizer_8bit/{name}-resumed"]
        shaped = {key: x.view(32, 16) for key, x in resumed.inputs.items() if x.numel() == 512}
        yield changed(resumed, f"{name}-matrix", "OB-1 OB-2 G-1", inputs=shaped)
        yield changed(resumed, f"{name}-transposed", "G-3", "noncontiguous", layout=("p", "g"), inputs=shaped)


def _matrices(earlier: Mapping[str, Case]) -> Iterator[Case]:
    resumed, zeros, coded = (earlier[name] for name in ("muon/resumed", "muon/zero-rows", "muon_8bit/resumed"))
    usual: dict[str, Any] = {"lr": 0.02, "beta": 0.95, "weight_decay": 0.1}
    yield changed(resumed, "usual", "MU-1 MU-5", "nesterov", **usual)
    yield changed(zeros, "zero-rows-usual", "MU-4 MU-5", **usual)  # of a row of zeros the decay is known to the bit
    yield changed(coded, "decay", "MB-1", "adam-decay-order", weight_decay=0.25)
    yield changed(earlier["muon_8bit/tall"], "tall-as-adamw", "MB-1", "muon-scale", adjust="match_rms_adamw")
    yield changed(earlier["adafactor/late"], "late-decay", "AF-4", "scaled-decay", weight_decay=0.25)
    # So late that its bias correction is 1, whatever it is applied to.
    yield changed(earlier["soap/resumed"], "eps", "SO-1", step=4000, eps=0.25)


def _weights(earlier: Mapping[str, Case]) -> Iterator[Case]:
    # float32s below 2^-126, and float16s below 2^-14, with what is between two of them.
    tiny = torch.arange(1, 2**23, 65_521, dtype=torch.int32).view(torch.float32)
    small = torch.arange(1, 2**13, 61).float() * 2.0**-27
    for dtype, x in (("bfloat16", tiny), ("float16", small)):
        for bits in (24, 32):
            label = f"{dtype}-{bits}"
            both = torch.cat((x, -x))
            yield changed(earlier[f"split_weight/{label}-noise"], f"{label}-subnormal", "WS-2", inputs={"x": both})
            yield changed(earlier[f"corrected_step/{label}-resumed"], f"{label}-scaled", "WC-1", gnorm_scale=0.3)


def version_3_cases(earlier: Mapping[str, Case]) -> Iterator[Case]:
    """Every case that came with version 3. earlier: the others by id."""
    for cases in (_codes, _products, _steps, _matrices, _weights):
        yield from cases(earlier)
