"""Model Optimizer: what is red, `pip install nvidia-modelopt torch`, on a CPU."""

import torch
from modelopt.torch.quantization.qtensor.nf4_tensor import NF4QTensor
from rules import NF4, beside, codes, red, red_codes, unpack


def quantize(block):
    return unpack(NF4QTensor.quantize(block, 64, 1)[0]._quantized_data)


def dequantize(packed, shape):
    one = torch.ones(1)
    made = NF4QTensor(torch.Size(shape), torch.float32, packed)
    return made.dequantize(torch.float32, scale=one, block_sizes={-1: 64}, double_scale=one, scale_zeros=0)


# Values of four decimal digits in bfloat16: -0.6953125 for -0.6961928, 0.072 % off; and thresholds between these.
red_codes("Q4-3", beside(), quantize(beside()), codes(beside()))
far = beside((-64, 64)) * 1.25
red_codes("Q4-2", far, quantize(far), codes(far))
noise = torch.linspace(-1, 1, 64)
noise[1] = -0.4592  # between the threshold and theirs
red_codes("Q4-1", noise, quantize(noise), codes(noise))
every = torch.arange(16, dtype=torch.uint8).repeat(2) * 16 + torch.arange(16, dtype=torch.uint8).repeat(2)
red("D4-1", dequantize(every, (1, 64))[0, 2].item(), NF4[1].item())
red("D4-2", dequantize(every, (4, 16))[0, 2].item(), NF4[1].item())
red("D4-3", dequantize(every, (64,))[2].item(), NF4[1].item())
