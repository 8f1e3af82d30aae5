"""Two pictures of the lessons: what becomes of a block of weights, and what of a text. `docs/pictures.py` writes them."""

import torch
from svg import WIDTH, Picture

from bnbref.codebooks import NF4


def block() -> Picture:
    """Weights of a block in NF4: each goes to the nearest of sixteen levels."""
    picture = Picture(
        "Twenty-four weights of a block, and the level of NF4 to which each goes",
        "The largest weight in magnitude lies on the outermost level exactly. Near zero, where most weights are, levels are "
        "close together and the way to one is short; outside they are wide apart and the way is long.",
        330,
    )
    torch.manual_seed(4)
    scaled = torch.randn(24)
    scaled = scaled / scaled.abs().max()
    codes = torch.bucketize(scaled, torch.tensor(NF4.thresholds)).tolist()

    def y(value: float) -> float:
        return 150 - 130 * value

    for number, value in enumerate(NF4.values):
        picture.line(40, y(value), WIDTH - 40, y(value), "grid")
        if number in (0, 2, 4, 7, 10, 12, 14, 15):
            picture.text(WIDTH - 34, y(value) + 4, f"{number}", "small quiet")
    for value, words in ((-1, "−1"), (0, "0"), (1, "1")):
        picture.text(32, y(value) + 4, words, "small quiet", "end")
    for number, (value, code) in enumerate(zip(scaled.tolist(), codes, strict=True)):
        x = 56 + 19.5 * number
        picture.line(x, y(value), x, y(NF4.values[code]), "second", 2)
        picture.dot(x, y(value), "first")
    picture.dot(60, 316, "first")
    picture.text(72, 321, "weight / absmax", "small")
    picture.line(205, 308, 205, 324, "second", 2)
    picture.text(213, 321, "error", "small")
    picture.text(WIDTH - 34, 321, "code, on the right", "small quiet", "end")
    return picture


def adapter() -> Picture:
    """QLoRA: what is frozen, what learns, and what is saved."""
    picture = Picture(
        "From a text by a frozen model and an adapter to a folder of some megabytes",
        "The text is cut into windows. The model, frozen in 4 bits, and the adapter beside each of its layers, in floats, "
        "predict the next word. The error changes the adapter alone, which is all that is saved.",
        250,
    )
    picture.box(10, 85, 110, 62, ["mine.txt", "in windows"], "quiet")
    picture.arrow(122, 116, 158, 116)
    picture.box(160, 30, 240, 62, ["the model, 4 bits", "frozen: 3.6 GiB of 7 B"], "first")
    picture.box(160, 140, 240, 62, ["the adapter, floats", "learns: some megabytes"], "second")
    picture.text(280, 121, "added, layer by layer", "small quiet", "middle")
    picture.arrow(402, 116, 438, 116)
    picture.box(440, 85, 110, 62, ["next word", "and its error"], "quiet")
    picture.line(495, 149, 495, 171, "second", 1.5)
    picture.arrow(495, 171, 402, 171, "second")
    picture.arrow(280, 204, 280, 226, "second")
    picture.text(280, 243, "adapter/, the folder that is saved", "small", "middle")
    return picture
