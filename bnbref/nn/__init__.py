"""Layers and parameters under bitsandbytes' names."""

from bnbref.nn.linear import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from bnbref.nn.params import Int8Params, Params4bit

__all__ = ["Int8Params", "Linear4bit", "Linear8bitLt", "LinearFP4", "LinearNF4", "Params4bit"]
