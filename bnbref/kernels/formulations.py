"""Imports every file that attaches a formulation to a kernel's name. The door imports this when it first needs one."""

from bnbref.kernels import counting, decoding, encoding, few_rows, steps

__all__ = ["counting", "decoding", "encoding", "few_rows", "steps"]
