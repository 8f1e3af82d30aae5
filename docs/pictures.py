"""The pictures of README.md and of the pages, drawn from the codebooks, from `python -m bnbref plan` and from `errors.json`.

    python docs/pictures.py            writes docs/content/pictures/*.svg

`tests/test_pictures.py` compares the files with what this draws.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist

import errors
import lessons
from svg import WIDTH, Picture
from timeline import timeline

from bnbref.codebooks import FP4, NF4, Codebook, dynamic, linear

FOLDER = Path(__file__).parent / "content" / "pictures"
OVERLAP = Path(__file__).parent.parent / "benchmarks" / "results" / "overlap.json"
BLOCK = 64
CARDS = (8, 12, 16, 24, 40, 80)
"""Memory of usual GPUs, in GiB."""

LLAMA2 = {
    "7 B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13 B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70 B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
"""The published shapes."""


def thresholds(book: Codebook) -> list[float]:
    """All thresholds of a codebook, those of a negative sign included."""
    return [*book.thresholds, *(-t for t in book.thresholds if book.sign_bit)]


def expected_absmax(n: int) -> float:
    """The mean of the largest magnitude of n normal numbers: the integral of 1 - P(all are below t)."""
    step, normal = 0.001, NormalDist()
    return step * sum(1 - (2 * normal.cdf(i * step) - 1) ** n for i in range(8000))


def density(picture: Picture, x: Callable[[float], float], base: float, height: float) -> None:
    """The bell curve of a block of normal numbers that was divided by its absmax."""
    curve = NormalDist(0, 1 / expected_absmax(BLOCK))
    points = [(x(i / 100), base - height * curve.pdf(i / 100) / curve.pdf(0)) for i in range(-100, 101)]
    picture.path([(x(-1), base), *points, (x(1), base)], "fill")


def formats() -> Picture:
    """NF4 and FP4: where the sixteen values lie, and the thresholds between them."""
    picture = Picture(
        "The values of NF4 and FP4 over a normal density",
        "NF4 has its sixteen values close together around zero, where most weights are, and wider apart outside. "
        "FP4 has a gap on both sides of its smallest values and few values beyond one half.",
        345,
    )

    def x(value: float) -> float:
        return WIDTH / 2 + 260 * value

    for top, book in ((40, NF4), (190, FP4)):
        base = top + 85
        density(picture, x, base, 75)
        picture.line(x(-1), base, x(1), base)
        for value in book.values:
            picture.line(x(value), base, x(value), base - 24, "first", 2.5)
        for threshold in thresholds(book):
            picture.line(x(threshold), base + 2, x(threshold), base + 12, "second", 1.5)
        for value, words in ((-1, "−1"), (0, "0"), (1, "1")):
            picture.text(x(value), base + 30, words, "small quiet", "middle")
        picture.text(x(-1), top, book.name.upper(), "bold")
    picture.line(150, 335, 150, 323, "first", 2.5)
    picture.text(158, 335, "value", "small")
    picture.line(230, 335, 230, 323, "second", 1.5)
    picture.text(238, 335, "threshold between two values", "small")
    return picture


def dynamic_maps() -> Picture:
    """The positive values of five codebooks on a logarithmic axis."""
    picture = Picture(
        "The positive values of five formats on a logarithmic axis",
        "Apart from zero, NF4, FP4 and the linear map have no value below one two-hundredth. The dynamic maps reach down to a "
        "millionth, which is why the states of an optimizer are kept in them.",
        370,
    )
    left, decades = 30.0, 7

    def x(value: float) -> float:
        return left + (WIDTH - left - 20) * (math.log10(value) + decades) / decades

    rows = (
        ("4 bits: NF4", NF4), ("4 bits: FP4", FP4), ("8 bits: linear", linear()),
        ("8 bits: dynamic, signed (Adam's first state)", dynamic()),
        ("8 bits: dynamic, unsigned (Adam's second state)", dynamic(signed=False)),
    )  # fmt: skip
    for number, (name, book) in enumerate(rows):
        base = 48.0 + 62 * number
        picture.text(left, base - 24, name, "small")
        picture.line(left, base, x(1), base)
        for value in sorted({v for v in book.values if v >= 10**-decades}):
            picture.line(x(value), base, x(value), base - 16, "first")
        for threshold in sorted({t for t in thresholds(book) if t >= 10**-decades}):
            picture.line(x(threshold), base + 2, x(threshold), base + 9, "second")
    for power in range(-decades, 1):
        words = "1" if power == 0 else f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
        picture.text(x(10.0**power), 330, words, "small quiet", "middle")
    picture.text(left, 358, "blue: values; orange: thresholds between them", "small quiet")
    return picture


def weights(shape: dict[str, int]) -> dict[str, int]:
    """Bytes of a Llama's weights and scales in each format."""
    from transformers import LlamaConfig

    from bnbref.integrations.hf.blueprint import FORMATS, Blueprint

    blueprint = Blueprint(LlamaConfig(vocab_size=32000, **shape))
    found = {name: blueprint.weights(name) for name in FORMATS}
    return {name: 2 * weights.floats + weights.codes + weights.scales for name, weights in found.items()}


def memory() -> Picture:
    """Bytes of the weights of Llama 2 by format, beside the memory of usual cards."""
    sizes = {name: weights(shape) for name, shape in LLAMA2.items()}
    said = "; ".join(
        f"{model}: " + ", ".join(f"{size / 2**30:.1f} GiB in {name}" for name, size in found.items())
        for model, found in sizes.items()
    )
    picture = Picture("Memory of the weights of three models, by format, beside the memory of usual GPUs", said, 410)
    left, right, low, high = 150, WIDTH - 20, math.log(3), math.log(140)

    def x(gib: float) -> float:
        return left + (right - left) * (math.log(gib) - low) / (high - low)

    for card in CARDS:
        picture.line(x(card), 30, x(card), 375, "grid")
        picture.text(x(card), 22, str(card), "small quiet", "middle")
    picture.text(left - 10, 22, "GPU with GiB:", "small quiet", "end")
    y = 52.0
    for model, found in sizes.items():
        picture.text(8, y + 5, model, "bold")
        for name, size in found.items():
            picture.text(left - 10, y + 5, name.replace("nf4, double", "nf4, scales 8 bit"), "small", "end")
            picture.dot(x(size / 2**30), y, "second" if name == "bfloat16" else "first")
            side = -1 if size > 100 * 2**30 else 1
            picture.text(
                x(size / 2**30) + 9 * side, y + 5, f"{size / 2**30:.1f}", "small", "start" if side > 0 else "end"
            )
            y += 25
        y += 12
    picture.text(
        8, 400, "Weights alone, logarithmic axis. What a run needs on top: python -m bnbref plan", "small quiet"
    )
    return picture


def boxes(
    picture: Picture, y: float, height: float, rows: Sequence[list[str]], style: str, left: float = 10, right: float = 10
) -> None:  # fmt: skip
    """Boxes of equal width beside each other, `left` and `right` from the edges."""
    width = (WIDTH - left - right - 10 * (len(rows) - 1)) / len(rows)
    for number, lines in enumerate(rows):
        picture.box(left + number * (width + 10), y, width, height, lines, style)


def house() -> Picture:
    """The rooms of the package, and who imports whom."""
    picture = Picture(
        "The parts of bnbref, from those that users see to those that compute",
        "Integrations and commands use the layers, optimizers, functions and the file reader. These use the definitions of the "
        "formats. Definitions are compiled through one door, and the conformance kit judges any implementation by them.",
        430,
    )
    picture.text(10, 20, "who visits", "small quiet")
    boxes(picture, 28, 60, [["transformers, peft", "integrations/hf"], ["bitsandbytes", "its import, answered"],
                            ["command line", "python -m bnbref"]], "quiet")  # fmt: skip
    picture.arrow(WIDTH / 2, 90, WIDTH / 2, 122)
    picture.text(10, 116, "what is called", "small quiet")
    boxes(picture, 124, 60, [["functions", "functional"], ["layers", "nn"], ["optimizers", "optim"],
                             ["files", "checkpoint"]], "first")  # fmt: skip
    picture.arrow(WIDTH / 2, 186, WIDTH / 2, 218)
    picture.text(10, 212, "the definitions: what is true", "small quiet")
    boxes(picture, 220, 60, [["values", "codebooks"], ["blocks", "blockwise"], ["4 bits", "fourbit, nested"],
                             ["8 bits", "int8"]], "second")  # fmt: skip
    picture.arrow(145, 282, 145, 332)
    picture.text(155, 312, "compiled by", "small quiet")
    picture.arrow(417, 332, 417, 282)
    picture.text(427, 312, "judges by", "small quiet")
    picture.box(
        10,
        334,
        262,
        78,
        ["one door to torch.compile", "kernels: formulations that are", "faster and proven equal"],
        "third",
    )
    picture.box(
        288, 334, 262, 78, ["conformance kit", "your backend, bitsandbytes, torchao:", "are the bytes right?"], "third"
    )
    return picture


def adam() -> Picture:
    """One step of Adam with its two states in 8 bits."""
    picture = Picture(
        "A step of Adam with 8-bit states: decode, update, encode, in one kernel",
        "For each block of 256 elements the codes of both states are decoded with the scale of the block, updated in float32 by "
        "the gradient, scaled by their new largest magnitude and encoded again. The parameter takes the step.",
        440,
    )
    picture.text(10, 20, "in memory, for each block of 256 elements", "small quiet")
    state = "256 bytes, 1 scale"
    kept = [["state m", state], ["state v", state], ["parameter p", "its own dtype"]]
    boxes(picture, 28, 62, [["gradient g", "its own dtype"], *kept], "first")
    for centre in (73, 211, 349, 487):
        picture.arrow(centre, 92, centre, 124)
    picture.parts.append(
        '<rect class="second" x="10" y="126" width="540" height="190" rx="8" fill="none" stroke-dasharray="5 4"/>'
    )
    picture.text(20, 144, "one kernel, float32", "small quiet")
    boxes(picture, 152, 42, [["decode: m = values[code] × scale, v alike"]], "quiet", 20, 20)
    picture.arrow(WIDTH / 2, 196, WIDTH / 2, 208)
    boxes(picture, 210, 42, [["m ← β₁m + (1−β₁)g"], ["v ← β₂v + (1−β₂)g²"]], "quiet", 20, 20)
    picture.arrow(WIDTH / 2, 254, WIDTH / 2, 266)
    boxes(picture, 268, 42, [["new scale, encode"], ["p ← p − rate·m̂/(√v̂+ε)"]], "quiet", 20, 20)
    for centre in (211, 349, 487):
        picture.arrow(centre, 318, centre, 350)
    boxes(picture, 352, 62, kept, "first", 148)
    picture.text(10, 434, "2.03 bytes a parameter for both states instead of 8", "small quiet")
    return picture


PICTURES = {
    "formats": formats, "dynamic": dynamic_maps, "errors": errors.picture, "memory": memory, "house": house, "adam": adam,
    "adapter": lessons.adapter, "block": lessons.block,
}  # fmt: skip
if OVERLAP.exists():  # benchmarks/overlap.py has run on a GPU
    PICTURES["overlap"] = lambda: timeline(json.loads(OVERLAP.read_text(encoding="utf-8")))

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
