"""pytorch_optimizer's SOAP: what is red, `pip install pytorch-optimizer torch`."""

import torch
from pytorch_optimizer import SOAP
from rules import red


def stepped(weight_decay):
    """A diagonal matrix after two steps; the first one makes the bases alone."""
    p = torch.nn.Parameter(torch.eye(2))
    optimizer = SOAP([p], lr=0.25, weight_decay=weight_decay)
    for _ in range(2):
        p.grad = torch.diag(torch.tensor([1.0, 0.5]))
        optimizer.step()
    return p[0, 0].item()


# Decay by 1 - 0.25 * 0.5 belongs to the old p, which is 1: what a step takes is not decayed.
taken = 1 - stepped(0.0)
red("SO-3", round(stepped(0.5), 4), round((1 - 0.25 * 0.5) - taken, 4))
