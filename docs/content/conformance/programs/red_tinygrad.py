"""tinygrad's example: what is red. `pip install tinygrad torch`, and TINYGRAD=a clone of its repository."""

import ast
import os
from pathlib import Path

import torch
from rules import beside, codes, red, red_codes, unpack
from tinygrad import Tensor, dtypes  # noqa: F401 (the example names it)

example = (Path(os.environ["TINYGRAD"]) / "examples" / "llama3.py").read_text()
tree = ast.parse(example)
tree.body = [node for node in tree.body if getattr(node, "name", "") == "NF4Linear"]
exec(compile(tree, "llama3.py", "exec"))
Linear = NF4Linear(64)  # noqa: F821


def quantize(block):
    made = Linear.quantize({"feed_forward.weight": Tensor(block.view(1, -1).numpy())}, None)
    return unpack(torch.from_numpy(made["feed_forward.weight"].numpy().copy()))


def multiply(a, weight, scale):
    layer = Linear(64, 1)
    layer.weight, layer.scale = Tensor(weight.numpy()), Tensor(scale.half().view(-1, 1).numpy())
    return layer(Tensor(a.numpy())).numpy()


# 0 / 0 is NaN, no distance is least, and the index is 16: it overflows into the other nibble.
red("Q4-7", quantize(torch.zeros(64))[:2].tolist(), [7, 7], [0, 0])
# Values rounded to float16, and thresholds between these.
red_codes("Q4-3", beside(), quantize(beside()), codes(beside()))
far = beside((-64, 64)) * 1.25
red_codes("Q4-2", far, quantize(far), codes(far))
# A scale of 1.0001 becomes 1 in float16, whatever the dtype of the product.
ones, scale = torch.full((32,), 0xFF, dtype=torch.uint8), torch.tensor([1.0001])
red("G4-1", round(float(multiply(torch.ones(1, 64), ones, scale)[0, 0]), 4), 64.0064)
red("G4-2", round(float(multiply(torch.ones(70, 64), ones, scale)[69, 0]), 4), 64.0064)
# A row of activations that lies in memory as a column is multiplied by the same weight.
red("G-3", round(float(multiply(torch.ones(64, 1).t(), ones, scale)[0, 0]), 4), 64.0064)
