"""A model of 5.6 million parameters that comes with the package, and a tour of what quantization does to it."""

from pathlib import Path
from typing import NamedTuple

MODEL = Path(__file__).parent / "model"
"""The folder of the model, for `from_pretrained`. Its README.md is the model card."""


class Settings(NamedTuple):
    """Windows of held-out text, tokens to generate, steps of fine-tuning.

    Perplexities are comparable between runs over the same number of windows.
    """

    windows: int
    tokens: int
    steps: int


FULL = Settings(windows=60, tokens=64, steps=60)
"""All of the held-out text: the protocol of the model card."""

QUICK = Settings(windows=4, tokens=8, steps=12)
