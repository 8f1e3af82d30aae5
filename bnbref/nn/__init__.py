"""Layers and parameters under bitsandbytes' names."""

from bnbref.nn.embedding import Embedding, Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding
from bnbref.nn.linear import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from bnbref.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from bnbref.nn.params import Int8Params, Params4bit

__all__ = [
    "Embedding", "Embedding4bit", "Embedding8bit", "EmbeddingFP4", "EmbeddingNF4", "Int8Params", "Linear4bit", "Linear8bitLt",
    "LinearFP4", "LinearNF4", "Params4bit", "StableEmbedding", "replace_parameter_4bit", "replace_parameter_4bit_prequantized",
]  # fmt: skip
