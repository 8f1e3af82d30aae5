"""NNCF: what is red, `pip install nncf openvino torch`."""

import nncf
import openvino
import torch
from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
from nncf.quantization.algorithms.weight_compression.weight_lowering import do_float_quantization
from nncf.tensor import Tensor
from rules import NF4, beside, codes, red, red_codes


def quantize(block):
    config = WeightCompressionConfig(nncf.CompressWeightsMode.NF4, 64)
    made = do_float_quantization(Tensor(openvino.Tensor(block.view(1, 64).numpy())), config, reduction_axes=1)
    values = torch.from_numpy(made.tensor.as_numpy_tensor().data.astype("float32")).view(-1)
    return (values[:, None] - NF4).abs().argmin(-1), float(made.scale.as_numpy_tensor().data.reshape(-1)[0])


# A scale below 2^-23 becomes 2^-23: of a block of smaller weights nothing is left.
red("Q4-2", quantize(torch.full((64,), 2.0**-100))[0][0].item(), 15)
red("Q4-1", quantize(torch.full((64,), 1e-39))[1], 0.0, 1.0000002153053333e-39)
red("Q4-7", quantize(torch.zeros(64))[1], 0.0)
# Four of fifteen thresholds are an ulp off, as bitsandbytes' CUDA kernel has them.
red_codes("Q4-3", beside(), quantize(beside())[0], codes(beside()))
