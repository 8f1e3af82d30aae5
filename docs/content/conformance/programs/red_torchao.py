"""torchao's 8-bit states: what is red, `pip install torchao torch`. The map is bitsandbytes' dynamic one, or any other."""

import torch
from rules import red
from torchao.optim import AdamW8bit
from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap, scale_tensor

qmap = torch.tensor(create_dynamic_map(True))


def quantize(x):
    scaled, scale = scale_tensor(x, 256)
    return quantize_8bit_with_qmap(scaled, qmap), scale


# absmax is at least 1e-12.
red("Q8-1", quantize(torch.full((256,), 1e-39))[1].item(), 0.0, 1.0000002153053333e-39)
red("Q8-2", quantize(torch.full((256,), 1e-20))[0][0].item(), 255)
red("Q8-3", round(quantize(torch.full((256,), 2.0**-60))[1].item() / 2.0**-60), 1)
red("Q8-6", quantize(torch.zeros(256))[1].item(), 0.0)
# A tie between codes 1 and 2 goes to the upper, one between 2 and 3 too; CUDA, and the rule, take the even one of both.
middle = (qmap[2:4].sum() / 2).item()
red("Q8-4", quantize(torch.tensor([1.0, middle] * 128))[0][1].item(), 2)


def step(gradient):
    p = torch.nn.Parameter(torch.ones(4096))
    optimizer = AdamW8bit([p], lr=0.1)
    p.grad = gradient
    optimizer.step()
    return p, optimizer.state[p]


# A gradient of 1e-10 has a second moment of 1e-23: its block's scale is 1e-12 and its codes are 0.
red("OB-2", step(torch.full((4096,), 1e-10))[1]["exp_avg_sq"].dequantize()[0].item() > 0, True)
bad = torch.ones(4096)
bad[7] = float("inf")
red("OB-6", step(bad)[1]["exp_avg"].dequantize()[1].isfinite().item(), True)
