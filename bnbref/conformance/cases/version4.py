"""Cases that came with version 4: SOAP's refresh, squares in 8 bits that are never 0 where they were not, and what wrong backends
got past the cases before: other scales than the first weight of a shape, squares, batches, numbers that float16 has not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, NF4, value_table
from bnbref.conformance.cases import CPU, DTYPES, Case, changed, make
from bnbref.conformance.cases.inputs import (
    beside,
    cast,
    clear,
    in_blocks,
    matrix,
    nested_weight,
    noise,
    random_bytes,
    random_int8,
    scales,
    squares,
)  # fmt: skip
from bnbref.conformance.cases.version2 import OF_LEFT, OF_RIGHT
from bnbref.conformance.oracles.formula import STATES

Earlier = Mapping[str, Case]
SIGNED, UNSIGNED = (value_table(book, CPU) for book in (DYNAMIC, DYNAMIC_UNSIGNED))


# ---- formats --------------------------------------------------------------------------------------------------------


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
        yield changed(given, label, "G4-1", "float16-detour", inputs={"a": given.inputs["a"] * 2.0**40})
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
    square: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4", "shape": [64, 64]}
    weight = {"packed": random_bytes(64 * 32, 613), "absmax": scales(64)}
    for dtype in DTYPES:
        # As many rows as outputs as inputs, beyond tiles of 16 and 32 rows.
        x, bias = cast(noise(64 * 64, 614).view(64, 64), dtype), cast(noise(64, 615) * 4, dtype)
        yield make(f"nf4-square-{dtype}", "gemm_4bit", {"a": x, "bias": bias, **weight}, "G4-1", "gemm-rows", **square)
        yield make(f"nf4-square-{dtype}", "gemm_4bit_backward", {"grad": x, **weight}, "GB-1", "gemm-rows", **square)
    cube = clear(in_blocks(clear(noise(63 * 6, 616), DYNAMIC, 63) * 0.99, 64), DYNAMIC).view(2, 3, 64)
    yield make("signed-3d", "quantize_blockwise", {"x": cube, "values": SIGNED}, "Q8-1 G-1", blocksize=64)
    codes = {"codes": random_bytes(480, 617).view(2, 5, 48), "absmax": scales(8), "values": SIGNED}
    yield make("3d", "dequantize_blockwise", codes, "D8-2 G-1", blocksize=64, dtype="float32")
    for name in STATES:
        for bits in ("32bit", "8bit"):
            resumed = earlier[f"optimizer_{bits}/{name}-resumed"]
            size = resumed.inputs["p"].numel()
            shaped = {key: x.view(2, 2, size // 4) for key, x in resumed.inputs.items() if x.numel() == size}
            rules = "OS-7 G-1" if bits == "32bit" else "OB-1 OB-2 G-1"
            yield changed(resumed, f"{name}-3d", rules, inputs=shaped, quick=name in ("adam", "momentum"))
    for name in ("adam", "momentum"):
        for dtype in ("float16", "bfloat16"):
            step = earlier[f"optimizer_32bit/{name}-{dtype}"]
            yield changed(step, f"{name}-{dtype}-scaled", "OS-3", "rounding", gnorm_scale=0.3)


def _blocksizes(earlier: Earlier) -> Iterator[Case]:
    """Products in blocks that are not of 64; one kernel of them is often all that is called."""
    for blocksize in (32, 128):
        kind: dict[str, Any] = {"blocksize": blocksize, "quant_type": "nf4", "shape": [32, 256]}
        weight = {"packed": random_bytes(32 * 128, 618), "absmax": scales(32 * 256 // blocksize)}
        for rows in (1, 3):
            a, grad = noise(rows * 256, 619).view(rows, 256), noise(rows * 32, 620).view(rows, 32)
            label = f"nf4-{rows}-blocksize-{blocksize}"
            yield make(label, "gemm_4bit", {"a": a, **weight}, "G4-1", "blocksize", **kind)
            yield make(label, "gemm_4bit_backward", {"grad": grad, **weight}, "GB-1", "blocksize", **kind)
        label = f"nf4-blocksize-{blocksize}"
        yield make(label, "evaluate_then_train", {"x": a, "grad": grad, **weight}, "LE-1 LE-2 LE-3",
                   "evaluation-repacks", **kind)  # fmt: skip
        nested = earlier["dequantize_4bit_nested/nf4-matrix-float32"]
        codes = random_bytes(40 * 64 // blocksize, 621)
        yield changed(nested, label, "DN-1", "blocksize", inputs={"codes": codes}, blocksize=blocksize)


def _strides(earlier: Earlier) -> Iterator[Case]:
    """Matrices that are the transposes of others, and more dimensions than a kernel of elements needs."""
    for name, transposed, rules in (
        ("gemm_4bit/nf4-70-8x128-float32", "a", "G-3"), ("gemm_4bit_backward/nf4-5-32x64-float32", "grad", "G-3"),
        ("int8_matmul/16x16x128", "a", "G-3"), ("int8_matmul/5x3x33", "b", "G-3"),
        ("int8_mm_dequant/noise-float32", "product", "G-3"), ("dequantize_blockwise/matrix", "codes", "G-3"),
        ("int8_dequantize/noise", "codes", "G-3"), ("int8_backward/6-float32", "grad", "G-3"),
    ):  # fmt: skip
        label = f"{name.partition('/')[2]}-transposed-{transposed}"
        yield changed(earlier[name], label, rules, "noncontiguous", layout=(transposed,))
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
    yield changed(outliers, "outliers-3d", "I8-3 I8-5", "int8-3d", inputs={"x": outliers.inputs["x"].view(2, 4, 64)})
    x = nested_weight(NF4, 128, zero_block=False)
    wide = torch.cat((x[:64], x[64:] / x[64:].abs().amax(1, keepdim=True) * x[:64].abs().amax(1, keepdim=True)), 1)
    given: dict[str, Any] = {"blocksize": 128, "quant_type": "nf4"}
    yield make("nf4-blocksize-128", "quantize_4bit_nested", {"x": wide}, "QN-1", "nested-absmax", **given)
    for label, tensor, nested in (
        ("nf4-blocksize-128-nested", wide, True), ("nf4-blocksize-128", wide, False), ("nf4-3d", wide.view(4, 16, 128), False),
    ):  # fmt: skip
        written = make(label, "save_4bit", {"x": tensor}, "CW-1 CW-2", "checkpoint-bytes", **given, nested=nested)
        yield written
        file = {key: value.value for key, value in written.expected.items()}
        yield make(label, "load_4bit", file, "CR-1", "checkpoint-bytes", quant_type="nf4")


# ---- squares in 8 bits ----------------------------------------------------------------------------------------------

DECADES = torch.exp2(-(torch.arange(512) % 34).double()).float()
"""Gradients over ten decades, whose squares are over twenty: most are below the smallest value of the map."""


def _squares() -> Iterator[Case]:
    def case(label: str, x: Tensor, rules: str, flags: str = "", blocksize: int = 256) -> Case:
        return make(label, "quantize_squares", {"x": x, "values": UNSIGNED}, rules, flags, blocksize=blocksize)

    lowest = float(UNSIGNED[1])
    yield case("decades", DECADES.square(), "QS-1", "squares-lost")
    below = beside([lowest / 2, lowest, lowest / 4, lowest * 2.0**-40], (-2, -1, 0, 1, 2))
    yield case("beside-the-lowest", in_blocks(below, 256), "QS-1", "squares-lost")
    yield case("zeros", in_blocks(torch.tensor([0.0, 0.5, 0.0, lowest / 8] * 20), 64), "QS-2", "zero-block", 64)
    yield case("nothing", torch.zeros(300), "QS-2", "zero-block")
    middle = (UNSIGNED[1:-1] + UNSIGNED[2:]) / 2
    yield case("ties", in_blocks(middle[middle > 1e-3], 256), "QS-3", "tie-to-even")
    yield case("beside-midpoints", in_blocks(beside(middle.tolist(), (-2, -1, 1, 2)), 256), "QS-3")
    yield case("tail", noise(300, 621).square(), "QS-3", "tail-block")
    yield case("matrix", noise(300, 622).square().view(20, 15), "QS-3 G-1")


def _nonzero(earlier: Earlier) -> Iterator[Case]:
    """Those of optimizer_8bit in which a square is next to nothing beside the largest of its block, and others."""

    def case(of: str, label: str, rules: str, flags: str = "", **inputs: Tensor) -> Case:
        one = earlier[f"optimizer_8bit/{of}"]
        return make(label, "optimizer_8bit_nonzero", {**one.inputs, **inputs}, rules, flags, **one.params)

    for name in ("adam", "ademamix"):
        first = case(f"{name}-wide", f"{name}-wide", "ON-1", "squares-lost", g=DECADES * noise(512, 631).sign())
        yield first
        later = {key: expected.value for key, expected in first.expected.items()}
        yield case(f"{name}-step-2", f"{name}-wide-step-2", "ON-1", "squares-lost", **later, g=DECADES.flip(0))
        yield case(f"{name}-resumed", f"{name}-resumed", "ON-1", "resume")
        yield case(f"{name}-zeros", f"{name}-zeros", "ON-2", "zero-state-drift")
        yield case(f"{name}-nan", f"{name}-nan", "ON-2", "bad-gradient")
    for name in ("rmsprop", "adagrad"):
        yield case(f"{name}-unsigned", f"{name}-wide", "ON-1", "squares-lost", g=DECADES)


def _coded(names: tuple[str, str], shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Two states in 8 bits: numbers of both signs, and squares over eight decades."""
    count = torch.Size(shape).numel()
    given: dict[str, Tensor] = {}
    for i, (name, values) in enumerate(zip(names, (SIGNED, UNSIGNED), strict=True), 1):
        codes = 1 + random_bytes(count, seed + i) % 254
        given |= {name: codes.view(shape), f"absmax{i}": scales(-(-count // 256)) / 64, f"values{i}": values}
    return given


def _zero(names: tuple[str, str], shape: tuple[int, ...]) -> dict[str, Tensor]:
    given = _coded(names, shape, 0)
    for i, (name, book) in enumerate(zip(names, (DYNAMIC, DYNAMIC_UNSIGNED), strict=True), 1):
        given |= {name: torch.full_like(given[name], book.code_of_zero), f"absmax{i}": given[f"absmax{i}"] * 0}
    return given


def _schedule_free_8bit(earlier: Earlier) -> Iterator[Case]:
    names, numbers = ("difference", "squares"), earlier["schedule_free/resumed"].params

    def case(label: str, rules: str, flags: str = "", count: int = 512, states: dict[str, Tensor] | None = None,
             g: Tensor | None = None, **own: Any) -> Case:  # fmt: skip
        inputs = {"p": noise(count, 641), **(states or _coded(names, (count,), 642))}
        inputs["g"] = noise(count, 645) if g is None else g
        return make(label, "schedule_free_8bit", inputs, rules, flags, **{**numbers, **own})

    yield case("step-1", "SD-1", "bias-correction", states=_zero(names, (512,)), step=1)
    yield case("resumed", "SD-1", "resume")
    yield case("wide", "SD-2", "squares-lost", states=_zero(names, (512,)), g=DECADES, step=1)
    idle = torch.arange(512) % 2
    yield case("zeros", "SD-2", "zero-state-drift", states=_zero(names, (512,)), g=DECADES * idle, step=1)
    yield case("warmup", "SD-1", "averaging-weight", step=3, warmup_steps=8)
    yield case("decay", "SD-1", "decay-of-the-average", weight_decay=0.25)
    yield case("tail", "SD-2", "tail-block", count=300)


# ---- SOAP -----------------------------------------------------------------------------------------------------------


def _soap_8bit(earlier: Earlier) -> Iterator[Case]:
    names, shape, one = ("momentum", "squares"), (6, 5), earlier["soap/resumed"]
    fixed = {name: one.inputs[name] for name in ("p", "g", "left", "right", "of_left", "of_right")}

    def case(label: str, rules: str, flags: str = "", states: dict[str, Tensor] | None = None, **own: Any) -> Case:
        inputs = {**fixed, **_coded(names, shape, 651), **(states or {})}
        return make(label, "soap_8bit", inputs, rules, flags, **{**one.params, "eps": 2.0**-10, **own})

    yield case("step-1", "SE-1", "bias-correction", states=_zero(names, shape), step=1)
    yield case("resumed", "SE-1", "resume")
    # Of rank one in its bases: all but one of the squares are next to nothing, or the rounding of zero.
    one_direction = torch.outer(OF_LEFT[:, 1] + OF_LEFT[:, 2] * 2.0**-12, OF_RIGHT[:, 3] + OF_RIGHT[:, 0] * 2.0**-9)
    yield case("wide", "SE-2", "squares-lost", states={**_zero(names, shape), "g": one_direction}, step=1)
    yield case("nothing", "SE-2", "zero-block", states={**_zero(names, shape), "g": torch.zeros(shape)}, step=1)
    yield case("decay", "SE-1", "adam-decay-order", weight_decay=0.25)
    large = (20, 15)
    sides = {
        f"of_{name}": torch.block_diag(*(of,) * n) for name, of, n in (("left", OF_RIGHT, 4), ("right", OF_RIGHT, 3))
    }
    sides |= {name: matrix((n, n), 655 + n) for name, n in zip(("left", "right"), large, strict=True)}
    several = {**_coded(names, large, 652), "p": matrix(large, 653), "g": matrix(large, 654), **sides}
    yield case("several-blocks", "SE-2", "tail-block", states=several)


def _mean(basis: Tensor, values: tuple[float, ...], seed: int) -> Tensor:
    """A mean with about these eigenvectors and eigenvalues: those are not far from the old bases, but not they."""
    off = matrix((len(basis), len(basis)), seed) / 4
    near = basis @ torch.diag(torch.tensor(values)) @ basis.t()
    return near + off + off.t()


def _soap_refresh(earlier: Earlier) -> Iterator[Case]:
    numbers = earlier["soap/resumed"].params  # eps is next to nothing there: what it is added to is free

    def case(label: str, rules: str, flags: str = "", left: int = 0, changed: dict[str, Tensor] | None = None,
             **own: Any) -> Case:  # fmt: skip
        of_left, of_right = (OF_RIGHT.t().contiguous() if left else OF_LEFT), OF_RIGHT
        shape = (len(of_left), len(of_right))
        inputs = {
            "p": matrix(shape, 661), "g": matrix(shape, 662), "then": matrix(shape, 663), "momentum": matrix(shape, 664),
            "squares": squares(shape, 665), "left": _mean(of_left, (1.0, 3.5, 2.5, 1.75, 4.5, 6.0)[: shape[0]], 666),
            "right": _mean(of_right, (2.5, 1.5, 5.0, 3.75, 1.0), 667), "of_left": of_left, "of_right": of_right,
        }  # fmt: skip
        return make(label, "soap_refresh", {**inputs, **(changed or {})}, rules, flags, **{**numbers, **own})

    yield case("resumed", "SR-1", "refresh")
    yield case("square", "SR-1", "refresh", left=5)
    yield case("usual", "SR-1", "refresh", beta1=0.95, beta2=0.95, beta3=0.95, lr=0.003, quick=False)
    yield case("fast", "SR-2", "refresh", beta3=0.5, changed={"g": matrix((6, 5), 668) * 2})
    axes = {"of_left": torch.eye(6), "of_right": torch.eye(5), "left": _mean(torch.eye(6), (6.0, 1.0, 2.0, 5.0, 3.0, 4.0), 669),
            "right": _mean(torch.eye(5), (1.0, 5.0, 2.0, 4.0, 3.0), 670)}  # fmt: skip
    yield case("own-axes", "SR-1", "refresh", changed=axes)
    yield case("decay", "SR-1", "adam-decay-order", weight_decay=0.25)
    # The gradient that makes the bases: its singular values are apart, and its vectors those of reflections.
    of_left, of_right = OF_RIGHT.t(), OF_RIGHT
    g = of_left @ torch.diag(torch.tensor([2.0, 1.5, 3.0, 2.5, 1.0])) @ of_right.t()
    none = {name: torch.zeros(5, 5) for name in ("momentum", "squares", "left", "right", "of_left", "of_right")}
    yield case("first", "SR-3", "refresh", left=5, changed={**none, "g": g}, step=0)
    yield case("first-decay", "SR-3", "refresh", left=5, changed={**none, "g": g}, step=0, weight_decay=0.25)


def version_4_cases(earlier: Earlier) -> Iterator[Case]:
    """Every case that came with version 4. earlier: the others by id."""
    for cases in (
        _numbers,
        _shapes,
        _blocksizes,
        _strides,
        _files,
        _nonzero,
        _schedule_free_8bit,
        _soap_8bit,
        _soap_refresh,
    ):
        yield from cases(earlier)
    yield from _squares()
