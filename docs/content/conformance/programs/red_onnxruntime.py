"""ONNX Runtime: what is red, `pip install onnxruntime onnx torch`."""

import onnx
import torch
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from rules import beside, codes, red, red_codes, unpack

quantizer = MatMulBnb4Quantizer(onnx.ModelProto(), MatMulBnb4Quantizer.NF4, 64)


def quantize(x):
    packed, absmax = quantizer.bnb4_block_quant(x.view(-1, 1).numpy())
    return unpack(torch.from_numpy(packed)), float(absmax[0])


# The reciprocal of a subnormal absmax is infinite: an element of a seventh of it has the code of 1, not of 1/7 (or of 0).
red("Q4-1", quantize(torch.tensor([1e-39, 1.4e-40]))[0][1].item(), 9, 7)
# The literals of four thresholds are an ulp off.
red_codes("Q4-3", beside(), quantize(beside())[0], codes(beside()))
