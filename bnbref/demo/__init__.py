"""A model of 5.6 million parameters that comes with the package, and a tour of what quantization does to it."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""What `from_pretrained` reads; its README.md is the model card."""
