"""transformers' Adafactor: what is red, `pip install transformers torch`."""

import torch
from rules import red
from transformers.optimization import Adafactor

# p = 1/8 without a gradient, lr = 0.5 and weight_decay = 0.5: 1 - lr wd is 3/4. It decays by lr wd times the size of p.
p = torch.nn.Parameter(torch.full((4, 4), 0.125))
p.grad = torch.zeros(4, 4)
Adafactor([p], lr=0.5, relative_step=False, scale_parameter=True, weight_decay=0.5).step()
red("AF-4", p[0, 0].item(), 0.09375)
