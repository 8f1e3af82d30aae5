"""qwix: what is red, `pip install qwix torch`."""

import jax
import numpy
import qwix
import torch
from rules import beside, codes, red, red_codes


def quantize(block):
    made = qwix.quantize(jax.numpy.asarray(block.view(1, 64).numpy()), "nf4", channelwise_axes=(0,))
    return torch.from_numpy(numpy.asarray(made.qvalue).astype("int64")).view(-1), float(made.scale[0, 0])


# A scale below 2^-63, of float16 below 2^-7, becomes 1: all codes are that of 0.
red("Q4-2", quantize(torch.full((64,), 2.0**-100))[0][0].item(), 15)
red("Q4-2", quantize(torch.full((64,), 0.007, dtype=torch.float16))[0][0].item(), 15)
red("Q4-1", quantize(torch.full((64,), 1e-39))[1], 0.0, 1.0000002153053333e-39)
red("Q4-7", quantize(torch.zeros(64))[1], 0.0)
# The code of the least distance, computed in float32: distances are rounded.
red_codes("Q4-3", beside(), quantize(beside())[0], codes(beside()))
