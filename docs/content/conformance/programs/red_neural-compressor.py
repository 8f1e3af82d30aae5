"""neural-compressor: what is red, `pip install neural-compressor-pt torch`."""

import torch
from neural_compressor.torch.algorithms.weight_only.utility import INT_MAPPING, quantize_4bit
from rules import beside, codes, red_codes, sixteen_bits


def quantize(block):
    nibbles, _, _ = quantize_4bit(block.clone().view(1, 64), dtype="nf4", return_int=True)
    return (nibbles.view(-1, 1) == torch.tensor(INT_MAPPING["nf4"])).int().argmax(-1)


# Weights of 16 bits are compared with midpoints that are rounded to 16 bits.
x = beside(dtype=torch.bfloat16)
red_codes("Q4-3", x, quantize(x), codes(x))
# They are divided in 16 bits too, so that numbers that are nowhere near a midpoint may cross it.
red_codes("Q4-1", *sixteen_bits(quantize))
