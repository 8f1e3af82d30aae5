"""The dialects: where known backends differ from the reference, as tables and switches, and in words.

A `Dialect` is the reference with some fields replaced. predictions.py computes what a backend with these conventions returns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from bnbref.codebooks import FP4, NF4, Codebook
from bnbref.conformance.oracles.formula import Conventions

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
    "nf4", NF4.values, tuple(float.fromhex(_ULP_OFF[i]) if i in _ULP_OFF else t for i, t in enumerate(NF4.thresholds))
)
"""NF4 as bitsandbytes 0.50.2 encoded it on an H100 (benchmarks/gpu.py, "facts"): four thresholds are an ulp off."""

_FOUR_DIGITS = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
                0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)  # fmt: skip


def _nf4_in(dtype: torch.dtype, values: tuple[float, ...]) -> Codebook:
    return Codebook.nearest("nf4", torch.tensor(values, dtype=dtype).float().tolist())


NF4_FOUR_DIGITS = _nf4_in(torch.float32, _FOUR_DIGITS)
NF4_FOUR_DIGITS_BFLOAT16 = _nf4_in(torch.bfloat16, _FOUR_DIGITS)
NF4_FLOAT16 = _nf4_in(torch.float16, NF4.values)

FP4_OF_EIGHTHS = Codebook(
    "fp4",
    (0.0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, -0.0, -0.0625, -0.125, -0.25, -0.375, -0.5, -0.75, -1.0),
    (0.03125, 0.09375, 0.1875, 0.3125, 0.4375, 0.625, 0.875),
    sign_bit=True,
)
"""A table called FP4 whose values are not those of bitsandbytes."""


@dataclass(frozen=True)
class Dialect(Conventions):
    """The conventions of a backend, by default those of the reference. Those of its optimizers are inherited fields.

    `TEXT` below says what each field means that is not the reference's. Beside that: floor counts before small, by which an
    absmax below 2^-126 becomes 0 ("zero"), stays ("keep"), or is clamped to 1e-38 ("clamp"; only a partial block stores that
    number). large: the reciprocal of an absmax above 2^126 is 0. zero_block: None for the codebook's code of 0. nearest: of codes
    at the least distance the first one. float16_weight: the product of value and scale is "rounded" to float16 or, in a fused
    kernel, "kept".
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
    nearest: bool = False
    in_dtype: bool = False
    tiny_is_one: bool = False
    float16_weight: str = ""
    low_first: bool = False
    whole_blocks: bool = False


REFERENCE = Dialect("reference")
BNB_CUDA = Dialect(
    "bnb-cuda", nf4=NF4_ON_H100, zero_block=0, large=True, decay_after=True, raw_gradient=True, norm="undecayed", norm_eps=True,
    bad_gradient="infinite",
)  # fmt: skip
BNB_DEFAULT = Dialect(
    "bnb-default", fp4=FP4_BY_MIDPOINTS, ties="lower", division="tail", small="clamp", int8_constant=6.200124e-05,
    int8_float32=True, int8_2d=True, row_transposed=True, norm="undecayed", norm_eps=True, clip_8bit=False,
    scaled_in_16=True,
)  # fmt: skip
BNB_CPU = replace(
    BNB_DEFAULT, name="bnb-cpu", ties="bins", small="keep", row_scales=True, vector_as_row=True, int8_float32=False,
    bfloat16_nan=True, norm="biased", norm_eps=False, bad_gradient="infinite", scaled_in_16=False,
)  # fmt: skip
BNB_TRITON = Dialect("bnb-triton", division="always", ties="lower")

TORCHAO = Dialect("torchao", floor=1e-12, division="always", ties="upper", bad_gradient="any")
_BY_DISTANCES = Dialect("", nearest=True, division="always")
TORCHAO_NF4 = replace(_BY_DISTANCES, name="torchao-nf4", nf4=NF4_FOUR_DIGITS, in_dtype=True, zero_block=0)
MODELOPT = replace(TORCHAO_NF4, name="nvidia-modelopt", nf4=NF4_FOUR_DIGITS_BFLOAT16)
QWIX = replace(_BY_DISTANCES, name="qwix", tiny_is_one=True, large=True)
TINYGRAD = replace(
    _BY_DISTANCES, name="tinygrad", nf4=NF4_FLOAT16, in_dtype=True, float16_weight="rounded", zero_block=16,
)  # fmt: skip
TINYGRAD_FUSED = replace(TINYGRAD, name="tinygrad-fused", float16_weight="kept")
MPS = replace(
    _BY_DISTANCES, name="mps-bitsandbytes", fp4=FP4_OF_EIGHTHS, floor=1e-8, low_first=True, whole_blocks=True,
)  # fmt: skip
NEURAL_COMPRESSOR = Dialect("neural-compressor", in_dtype=True, division="always")
ONNXRUNTIME = Dialect("onnxruntime", nf4=NF4_ON_H100, small="keep")
NNCF = Dialect("nncf", nf4=NF4_ON_H100, floor=2.0**-23, division="always")

PYTORCH_OPTIMIZER = Dialect("pytorch-optimizer", decay_after=True)
TRANSFORMERS = Dialect("transformers", scaled_decay=True)

DIALECTS = (
    BNB_CUDA, BNB_DEFAULT, BNB_CPU, BNB_TRITON, TORCHAO, TORCHAO_NF4, MODELOPT, NEURAL_COMPRESSOR, QWIX, TINYGRAD, TINYGRAD_FUSED,
    ONNXRUNTIME, NNCF, MPS, PYTORCH_OPTIMIZER, TRANSFORMERS,
)  # fmt: skip
"""Every dialect but the reference. 4-bit quantization of bnb-cpu is bnb-default's."""

TEXT: dict[str, str | dict[Any, str]] = {
    "nf4": {
        NF4_ON_H100: "NF4 thresholds at -0.848, 0.502 and 0.861 an ulp lower, at 0.120 an ulp higher",
        NF4_FOUR_DIGITS: "NF4 values of four decimal digits",
        NF4_FOUR_DIGITS_BFLOAT16: "NF4 values of four decimal digits, rounded to bfloat16",
        NF4_FLOAT16: "NF4 values rounded to float16",
    },
    "fp4": {
        FP4_BY_MIDPOINTS: "FP4 thresholds at midpoints (5/12 ...) on the signed axis, code 8 above code 0",
        FP4_OF_EIGHTHS: "other values by the name of FP4: 0, 1/16, 1/8, 1/4, 3/8, 1/2, 3/4, 1",
    },
    "ties": {
        "lower": "a tie goes to the lower code",
        "upper": "a tie, by distances, goes to the upper code",
        "bins": "codes from a table of 65,536 bins",
    },
    "floor": "absmax is at least {}",
    "division": {"always": "x / absmax", "tail": "x / absmax in the partial last block"},
    "small": {
        "clamp": "a small absmax is clamped to 1e-38", "keep": "a subnormal absmax is kept, its reciprocal is inf",
    },
    "large": "the reciprocal of an absmax above 2^126 is flushed to 0",
    "zero_block": "an all-zero block has code {}",
    "row_scales": "scale of row * (columns // blocksize) + column // blocksize",
    "vector_as_row": "a vector comes back as a matrix of one row",
    "row_transposed": "one packed byte is taken for a transposed weight",
    "int8_constant": "1/16129 is {}",
    "int8_float32": "the product is summed in float32",
    "int8_2d": "matrices only: leading dimensions are flattened, or the wrong one is reduced",
    "bfloat16_nan": "bfloat16 rounded by adding 0x7FFF to the bits of NaN",
    "nearest": "the code of the least distance, computed in floating point",
    "in_dtype": "elements of 16 bits are scaled and compared in 16 bits",
    "tiny_is_one": "an absmax below 2^-63, of float16 below 2^-7, becomes 1",
    "float16_weight": {
        "rounded": "the weight is a float16 product of float16 values and scales",
        "kept": "values and scales of the weight are rounded to float16",
    },
    "low_first": "the first of two elements is in the low nibble",
    "whole_blocks": "packed codes are as many as whole blocks have",
    "decay_after": "weight decay multiplies the parameter after the step",
    "coupled": "weight decay is added to the gradient",
    "raw_gradient": "the step has the gradient without scaling and decay, the state has it with them",
    "norm": {
        "biased": "the norm of an update without bias correction is bounded",
        "undecayed": "the norm of an update without weight decay is bounded",
    },
    "norm_eps": "the bound of the update's norm has eps added",
    "scaled_decay": "weight decay is by the rate times the size of the parameter",
    "scaled_in_16": "a gradient of 16 bits is scaled in 16 bits",
    "clip_8bit": "with 8-bit state the update's norm is not bounded",
    "bad_gradient": {
        "infinite": "an infinite gradient becomes the scale of its block",
        "any": "a gradient that is NaN or infinite becomes the scale of its block",
    },
}  # fmt: skip
"""The meaning of each field of a dialect where it is not that of the reference; of some fields, the meaning of each value."""


def in_words(field: str, value: Any) -> str:
    """The meaning of a field of a dialect that has this value.

    >>> in_words("floor", 1e-12)
    'absmax is at least 1e-12'
    """
    text = TEXT[field]
    return text[value] if isinstance(text, dict) else text.format(value)


_CHOSEN = {
    "nf4": (NF4_ON_H100, NF4_FOUR_DIGITS, NF4_FLOAT16), "fp4": (FP4_BY_MIDPOINTS,), "nearest": None,
    "ties": ("lower", "upper"), "division": ("always",), "decay_after": None, "coupled": None, "norm_eps": None,
    "scaled_decay": None,
}  # fmt: skip


def _choices() -> Iterator[str]:
    for field, values in _CHOSEN.items():
        text = TEXT[field]
        yield from [text] if isinstance(text, str) else [text[value] for value in values or text]


CHOICES = frozenset(_choices())
"""Conventions, in words, that are another choice, and no mistake: as near to the paper, or another paper's formula."""
