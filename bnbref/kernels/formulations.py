"""Imports every file that attaches a formulation to a kernel's name: what the door does before it first compiles."""

from bnbref.kernels import counting, decoding, encoding, few_rows, steps

__all__ = ["counting", "decoding", "encoding", "few_rows", "steps"]
