"""What known backends do instead: tables and switches, to say of a wrong result whose rule it follows.

A `Dialect` is the reference with some fields replaced. A result is compared with each replaced field alone, and then with all
of them, so that an explanation is as narrow as it can be.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref import blockwise
from bnbref.blockwise import SMALLEST_NORMAL, count_below
from bnbref.codebooks import DYNAMIC, FP4, NF4, Codebook, four_bit, value_table
from bnbref.conformance import optimizers
from bnbref.conformance.cases import Case
from bnbref.conformance.check import Failure
from bnbref.conformance.judging import Expected, same, wrong_elements
from bnbref.conformance.operations import arguments
from bnbref.conformance.products import product_interval
from bnbref.kernels import eager

CPU = torch.device("cpu")

_SORTED = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

FP4_BY_MIDPOINTS = Codebook(
    "fp4",
    FP4.values,
    tuple(((torch.tensor(FP4.values)[list(_SORTED[:-1])] + torch.tensor(FP4.values)[list(_SORTED[1:])]) / 2).tolist()),
    order=_SORTED,
)
"""FP4 as sixteen sorted values: thresholds at the midpoints of the signed axis, and code 8 (-0) above code 0."""

_ULP_OFF = {0: "-0x1.b239b2p-1", 8: "0x1.ec90c6p-4", 12: "0x1.00da06p-1", 14: "0x1.b913b2p-1"}

NF4_ON_H100 = Codebook(
    "nf4",
    NF4.values,
    tuple(float.fromhex(_ULP_OFF[i]) if i in _ULP_OFF else t for i, t in enumerate(NF4.thresholds)),
)
"""NF4 as bitsandbytes 0.50.2 encoded it on an H100 (benchmarks/gpu.py, "facts"): four thresholds are an ulp off."""


@dataclass(frozen=True)
class Dialect(optimizers.Conventions):
    """Conventions of a backend, by default those of the reference; of its optimizers those inherited.

    nf4, fp4: codebook. ties: of 8-bit codes, "even", "lower", "upper" (by distances), "bins" (the table of 65,536). floor:
    the least absmax. division: x / absmax for x * (1 / absmax), in all blocks or in a partial last one. small: an absmax
    below 2^-126 is stored as 0 ("zero"), kept ("keep"), or clamped to 1e-38 ("clamp", in a partial block stored so). large:
    above 2^126 the reciprocal is 0. zero_block: the code of 0 in all-zero blocks, None for the codebook's. row_scales:
    index of the scale by row. vector_as_row: a vector comes back as a matrix; row_transposed: one packed byte as a column.
    int8_constant, int8_float32, int8_2d: 1/16129, products summed in float32, matrices only. bfloat16_nan: rounding to
    bfloat16 by adding to the bits, NaN too.
    """

    name: str
    nf4: Codebook = NF4
    fp4: Codebook = FP4
    ties: str = "even"
    floor: float = 0.0
    division: str = "never"
    small: str = "zero"
    large: bool = False
    zero_block: int | None = None
    row_scales: bool = False
    vector_as_row: bool = False
    row_transposed: bool = False
    int8_constant: float = 6.200012285262346e-05
    int8_float32: bool = False
    int8_2d: bool = False
    bfloat16_nan: bool = False


REFERENCE = Dialect("reference")
BNB_CUDA = Dialect(
    "bnb-cuda", nf4=NF4_ON_H100, zero_block=0, large=True, decay_after=True, raw_gradient=True, norm="undecayed", norm_eps=True,
    bad_gradient="infinite",
)  # fmt: skip
BNB_DEFAULT = Dialect(
    "bnb-default", fp4=FP4_BY_MIDPOINTS, ties="lower", division="tail", small="clamp", int8_constant=6.200124e-05,
    int8_float32=True, int8_2d=True, row_transposed=True, norm="undecayed", norm_eps=True, clip_8bit=False,
)  # fmt: skip
BNB_CPU = replace(
    BNB_DEFAULT,
    name="bnb-cpu",
    ties="bins",
    small="keep",
    row_scales=True,
    vector_as_row=True,
    int8_float32=False,
    bfloat16_nan=True,
    norm="biased",
    norm_eps=False,
    bad_gradient="infinite",
)
BNB_TRITON = Dialect("bnb-triton", division="always", ties="lower")

TORCHAO = Dialect("torchao", floor=1e-12, division="always", ties="upper", bad_gradient="any")

DIALECTS = (BNB_CUDA, BNB_DEFAULT, BNB_CPU, BNB_TRITON, TORCHAO)
"""Every dialect but the reference. 4-bit quantization of bnb-cpu is bnb-default's."""

TEXT: dict[str, Callable[[Any], str]] = {
    "nf4": lambda _: "NF4 thresholds at -0.848, 0.502 and 0.861 an ulp lower, at 0.120 an ulp higher",
    "fp4": lambda _: "FP4 thresholds at midpoints (5/12 ...) on the signed axis, code 8 above code 0",
    "ties": lambda v: {
        "lower": "a tie goes to the lower code",
        "upper": "a tie, by distances, goes to the upper code",
        "bins": "codes from a table of 65,536 bins",
    }[v],
    "floor": lambda v: f"absmax is at least {v}",
    "division": lambda v: "x / absmax" + (" in the partial last block" if v == "tail" else ""),
    "small": lambda v: (
        "a small absmax is clamped to 1e-38" if v == "clamp" else "a subnormal absmax is kept, its reciprocal is inf"
    ),
    "large": lambda _: "the reciprocal of an absmax above 2^126 is flushed to 0",
    "zero_block": lambda v: f"an all-zero block has code {v}",
    "row_scales": lambda _: "scale of row * (columns // blocksize) + column // blocksize",
    "vector_as_row": lambda _: "a vector comes back as a matrix of one row",
    "row_transposed": lambda _: "one packed byte is taken for a transposed weight",
    "int8_constant": lambda v: f"1/16129 is {v}",
    "int8_float32": lambda _: "the product is summed in float32",
    "int8_2d": lambda _: "matrices only: leading dimensions are flattened, or the wrong one is reduced",
    "bfloat16_nan": lambda _: "bfloat16 rounded by adding 0x7FFF to the bits of NaN",
    "decay_after": lambda _: "weight decay multiplies the parameter after the step",
    "coupled": lambda _: "weight decay is added to the gradient",
    "raw_gradient": lambda _: "the step has the gradient without scaling and decay, the state has it with them",
    "norm": lambda v: {
        "biased": "the norm of an update without bias correction is bounded",
        "undecayed": "the norm of an update without weight decay is bounded",
    }[v],
    "norm_eps": lambda _: "the bound of the update's norm has eps added",
    "clip_8bit": lambda _: "with 8-bit state the update's norm is not bounded",
    "bad_gradient": lambda v: {
        "infinite": "an infinite gradient becomes the scale of its block",
        "any": "a gradient that is NaN or infinite becomes the scale of its block",
    }[v],
}
"""What a field of a dialect that is not the reference's means."""


# ---- prediction -----------------------------------------------------------------------------------------------------


def _scaled(x: Tensor, blocksize: int, d: Dialect, pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled elements, stored absmax, and which elements are in an all-zero block."""
    flat = F.pad(x.reshape(-1).float(), (0, pad))
    count = -(-x.numel() // blocksize)
    blocks = F.pad(flat, (0, count * blocksize - flat.numel())).view(count, blocksize)
    absmax = blocks.abs().nan_to_num(0.0, posinf=torch.inf).amax(-1)
    partial = torch.arange(count) == (count - 1 if x.numel() % blocksize else count)
    absmax = absmax.clamp(min=d.floor)
    stored, divisor = absmax, absmax
    if d.small == "zero":
        stored = divisor = torch.where(absmax >= SMALLEST_NORMAL, absmax, 0.0)
    elif d.small == "clamp":
        divisor = absmax.clamp(min=1e-38)
        stored = torch.where(partial, divisor, absmax)
    inverse = 1 / divisor
    if d.small == "zero":
        inverse = torch.where(divisor > 0, inverse, 0.0)
    if d.large:
        inverse = torch.where(inverse < SMALLEST_NORMAL, 0.0, inverse)
    scaled = blocks * inverse[:, None]
    by_division = partial[:, None] if d.division == "tail" else torch.tensor(d.division == "always")
    divided = torch.where(divisor[:, None] > 0, blocks / divisor[:, None], scaled)
    scaled = torch.where(by_division, divided, scaled)
    zero = (absmax == 0)[:, None].expand(blocks.shape)
    return scaled.reshape(-1)[: flat.numel()], stored, zero.reshape(-1)[: flat.numel()]


def _eight_bit(scaled: Tensor, values: Tensor, ties: str) -> Tensor:
    middle = (values[:-1] + values[1:]) / 2
    if ties == "bins":
        i = ((((scaled.clamp(-1, 1) + 1) * 0.5) * 65535) + 0.5).nan_to_num(0.0).floor()
        return count_below(-1 + (2 * i) / 65535, middle).to(torch.uint8)
    if ties == "upper":
        down = (torch.searchsorted(values, scaled, right=True) - 1).clamp(min=0)
        up = (down + 1).clamp(max=values.numel() - 1)
        return torch.where(scaled - values[down] >= (values[up] - values[down]) * 0.5, up, down).to(torch.uint8)
    if ties == "even":
        upper = torch.arange(middle.numel()) % 2 == 1
        middle = torch.where(upper, middle.nextafter(torch.tensor(-torch.inf)), middle)
    return count_below(scaled, middle).to(torch.uint8)


def _quantize_blockwise(d: Dialect, x: Tensor, values: Tensor, blocksize: int) -> dict[str, Tensor]:
    scaled, absmax, zero = _scaled(x, blocksize, d)
    codes = _eight_bit(scaled, values, d.ties)
    codes = codes if d.zero_block is None else torch.where(zero, d.zero_block, codes)
    return {"codes": codes.to(torch.uint8).view(x.shape), "absmax": absmax}


def _quantize_4bit(d: Dialect, x: Tensor, blocksize: int, quant_type: str) -> dict[str, Tensor]:
    book = d.fp4 if quant_type == "fp4" else d.nf4
    scaled, absmax, zero = _scaled(x, blocksize, d, pad=x.numel() % 2)
    codes = blockwise.encode(scaled, book)
    codes = codes if d.zero_block is None else torch.where(zero, d.zero_block, codes).to(torch.uint8)
    return {"packed": codes[0::2] << 4 | codes[1::2], "absmax": absmax}


def _quantize_4bit_nested(d: Dialect, x: Tensor, blocksize: int, quant_type: str) -> dict[str, Tensor]:
    outer = _quantize_4bit(d, x, blocksize, quant_type)
    offset = outer["absmax"].mean()
    inner = _quantize_blockwise(d, outer["absmax"] - offset, value_table(DYNAMIC, CPU), 256)
    return {"packed": outer["packed"], "codes": inner["codes"], "absmax2": inner["absmax"], "offset": offset}


def _per_element(d: Dialect, absmax: Tensor, blocksize: int, shape: tuple[int, ...]) -> Tensor:
    """The scale of each element, in the shape."""
    total = int(torch.Size(shape).numel())
    i = torch.arange(total)
    columns = shape[-1]
    if d.row_scales and columns % 16 == 0 and blocksize < 2048:
        i = (i // columns) * (columns // blocksize) + i % columns // blocksize
    else:
        i = i // blocksize
    return absmax[i].view(shape)


def _weight(
    d: Dialect,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    codes = torch.stack((packed >> 4, packed & 15), -1).view(-1)[: torch.Size(shape).numel()]
    values = value_table(four_bit(quant_type), CPU)[codes.long()].view(shape)
    return (values * _per_element(d, absmax, blocksize, shape)).to(dtype)


def _dequantize_4bit(
    d: Dialect,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    y = _weight(d, packed, absmax, blocksize, quant_type, shape, dtype)
    return {"y": y.view(1, -1) if d.vector_as_row and len(shape) == 1 and shape[0] % 2 == 0 else y}


def _dequantize_4bit_nested(
    d: Dialect, packed: Tensor, codes: Tensor, absmax2: Tensor, offset: Tensor, values: Tensor, **rest: Any
) -> dict[str, Tensor]:
    absmax = values[codes.long()] * absmax2.repeat_interleave(256)[: codes.numel()] + offset
    y = _dequantize_4bit(d, packed, absmax, **rest)["y"]
    return {"y": y.t() if d.row_transposed and packed.numel() == 1 else y}


def _dequantize_blockwise(
    d: Dialect, codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    y = values[codes.long()] * absmax.repeat_interleave(blocksize)[: codes.numel()].view(codes.shape)
    if d.bfloat16_nan and dtype == torch.bfloat16:
        bits = y.view(torch.int32).long() & 0xFFFFFFFF
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF
        return {"y": torch.where(rounded >= 2**15, rounded - 2**16, rounded).to(torch.int16).view(dtype)}
    return {"y": y.to(dtype)}


def _int8_mm_dequant(
    d: Dialect, product: Tensor, row: Tensor, column: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> dict[str, Tensor]:
    flat = product.reshape(-1, product.shape[-1])
    y = flat * (row[:, None] * column) * d.int8_constant
    y = (y if bias is None else y + bias).to(dtype)
    return {"y": y if d.int8_2d else y.view(product.shape)}


def _int8_matmul(d: Dialect, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    if d.int8_float32:
        return {"product": (a.float() @ b.float().t()).to(torch.int32)}
    return {"product": (a.long() @ b.long().t()).to(torch.int32)}


def _int8_quantize(d: Dialect, x: Tensor, threshold: float) -> dict[str, Tensor]:
    absmax = x.abs().amax(1).float() if d.int8_2d and x.dim() > 2 else x.abs().amax(-1).float().view(-1)
    scale = absmax.unsqueeze(-1) if d.int8_2d and x.dim() > 2 else absmax.view(*x.shape[:-1], 1)
    return {"codes": (x * (127.0 / scale)).round().to(torch.int8), "absmax": absmax}


def _load_4bit(
    d: Dialect, packed: Tensor, absmax: Tensor, quant_map: Tensor, state: Tensor, quant_type: str, **nested: Tensor
) -> dict[str, Tensor]:
    stored = arguments(json.loads(bytes(state.tolist())))
    if "nested_absmax" in nested:
        inner = (
            nested["nested_quant_map"][absmax.long()] * nested["nested_absmax"].repeat_interleave(256)[: absmax.numel()]
        )
        absmax = inner + stored["nested_offset"]
    return _dequantize_4bit(d, packed, absmax, stored["blocksize"], quant_type, stored["shape"], stored["dtype"])


def _within(d: Dialect, operation: str, **given: Any) -> dict[str, Expected]:
    """What a step with these conventions may return."""
    if operation == "optimizer_32bit":
        return optimizers.step_32bit(c=d, **given)
    floor = float(torch.tensor(d.floor, dtype=torch.float32))
    return optimizers.step_8bit(c=d, encode=lambda x, values: _eight_bit(x, values, d.ties), floor=floor, **given)


def _optimizer(operation: str) -> Callable[..., dict[str, Tensor]]:
    return lambda d, **given: {name: found.value for name, found in _within(d, operation, **given).items()}


PREDICT: dict[str, Callable[..., dict[str, Tensor]]] = {
    "quantize_blockwise": _quantize_blockwise,
    "quantize_4bit": _quantize_4bit,
    "quantize_4bit_nested": _quantize_4bit_nested,
    "dequantize_blockwise": _dequantize_blockwise,
    "dequantize_4bit": _dequantize_4bit,
    "dequantize_4bit_nested": _dequantize_4bit_nested,
    "int8_quantize": _int8_quantize,
    "int8_matmul": _int8_matmul,
    "int8_mm_dequant": _int8_mm_dequant,
    "load_4bit": _load_4bit,
    "optimizer_32bit": _optimizer("optimizer_32bit"),
    "optimizer_8bit": _optimizer("optimizer_8bit"),
}

"""The operations of which dialects say something; each returns its results by name."""


def predict(dialect: Dialect, case: Case) -> Mapping[str, Tensor]:
    """What a backend with these conventions returns; empty where its conventions say nothing of the operation."""
    with eager():
        keywords = {**case.inputs, **arguments(case.params)}
        try:
            return PREDICT[case.operation](dialect, **keywords) if case.operation in PREDICT else {}
        except RuntimeError:  # shapes that the dialect cannot do at all
            return {}


# ---- explanation ----------------------------------------------------------------------------------------------------


_OF_OPTIMIZERS = {f.name for f in fields(optimizers.Conventions)}


def _concern(case: Case) -> set[str]:
    """The fields of a dialect that can change the results of a case."""
    if case.operation in ("gemm_4bit", "gemm_4bit_backward"):
        return {"row_scales"}
    if case.operation not in ("optimizer_32bit", "optimizer_8bit"):
        return set(TEXT) - _OF_OPTIMIZERS
    k = case.params
    eight = case.operation == "optimizer_8bit"
    clipped = k["optimizer"] in optimizers.CLIPPED and k["max_unorm"] > 0
    when = {
        "decay_after": k["weight_decay"] > 0,
        "coupled": k["weight_decay"] > 0,
        "raw_gradient": eight and k["optimizer"] in ("rmsprop", "adagrad"),
        "norm": clipped,
        "norm_eps": clipped,
        "clip_8bit": clipped and eight,
        "bad_gradient": not bool(case.inputs["g"].isfinite().all()),
        "ties": eight,
        "floor": eight,
    }
    return {name for name, can in when.items() if can}


def _changes(dialect: Dialect, case: Case) -> Iterator[tuple[str, Dialect]]:
    """The reference with one field of the dialect that concerns the case, and at last with all of them."""
    concern = _concern(case)
    different = [name for name in TEXT if name in concern and getattr(dialect, name) != getattr(REFERENCE, name)]
    for name in different:
        value = getattr(dialect, name)
        changed: dict[str, Any] = {name: value}
        yield TEXT[name](value), replace(REFERENCE, **changed)
    if len(different) > 1:
        yield "all of its conventions together", dialect


@functools.lru_cache(maxsize=32)  # asked again for each result of a case, and for each dialect that has the convention
def _step_allowed(dialect: Dialect, case: Case) -> dict[str, Expected]:
    with eager():
        return _within(dialect, case.operation, **case.inputs, **arguments(case.params))


def _matches(failure: Failure, dialect: Dialect) -> bool:
    got, case = failure.got, failure.case
    if got is None:
        return False
    if case.operation in ("gemm_4bit", "gemm_4bit_backward"):
        k = {**case.inputs, **arguments(case.params)}
        weight = _weight(dialect, k["packed"], k["absmax"], k["blocksize"], k["quant_type"], k["shape"], got.dtype)
        left, right = (k["a"], weight) if case.operation == "gemm_4bit" else (k["grad"], weight.t())
        return wrong_elements(got, product_interval(left, right, k.get("bias"))).numel() == 0
    if case.operation in ("optimizer_32bit", "optimizer_8bit"):
        allowed = _step_allowed(dialect, case)
        return failure.kind == "value" and wrong_elements(got, allowed[failure.output]).numel() == 0
    y = predict(dialect, case).get(failure.output)
    if y is None or y.dtype != got.dtype or y.shape != got.shape:
        return False
    if failure.kind == "shape":
        return True
    return bool(same(y.reshape(-1)[failure.wrong], got.reshape(-1)[failure.wrong]).all())


def explain(failure: Failure) -> list[str]:
    """Whose rule a wrong result follows: "bnb-cpu: codes from a table of 65,536 bins". Empty if nobody's is known."""
    found: dict[str, list[str]] = {}
    for dialect in DIALECTS:
        for text, changed in _changes(dialect, failure.case):
            if _matches(failure, changed):
                found.setdefault(text, []).append(dialect.name)
                break
    return [f"{', '.join(names)}: {text}" for text, names in found.items()]
