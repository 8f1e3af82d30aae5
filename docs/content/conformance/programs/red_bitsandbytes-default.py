"""bitsandbytes' torch kernels, which other kernels shadow on a CPU: what is red, `pip install bitsandbytes torch`."""

import importlib.util

import bitsandbytes._ops as registry
import torch
from bitsandbytes.functional import create_dynamic_map
from rules import red

KERNELS = {}
spec = importlib.util.find_spec("bitsandbytes.backends.default.ops")
registry.register_kernel = lambda name, key: lambda kernel: KERNELS.setdefault(name.partition("::")[2], kernel)
with torch.compiler.set_stance("force_eager"):
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
torch.compiler.set_stance("force_eager")
MAP = create_dynamic_map()


def blockwise(*x):
    return KERNELS["quantize_blockwise"](torch.tensor(x), MAP, 64)


def fourbit(x, kind):
    return KERNELS["quantize_4bit"](x, 64, kind, torch.uint8)[0].view(-1)


red("Q8-1", blockwise(0.0)[1].item(), 0.0)  # a partial block of zeros stores the clamp of its divisor
red("Q8-4", blockwise(*[1.0, -0.971875011920929] * 32)[0][1].item(), 2)
part = [3.7727534770965576, 1.468780279159546]
near = torch.tensor([p * 3.7727534770965576 for p in ((MAP[1:] + MAP[:-1]) / 2).tolist() if p > 0.01])
for x in torch.cat((near, near.nextafter(torch.tensor(9.0)), near.nextafter(torch.tensor(0.0)))).tolist():
    codes = blockwise(part[0], x, *[0.0] * 62, part[0], x)[0]
    if codes[1] != codes[65]:
        break
red("Q8-7", codes[65].item(), codes[1].item())  # the same two numbers, in a full block and in a partial one
red("Q4-1", KERNELS["quantize_4bit"](torch.zeros(1), 64, "nf4", torch.uint8)[1].item(), 0.0)
packed = fourbit(torch.tensor([*part, *[0.0] * 62, *part]), "nf4")
red("Q4-8", packed[-1].item(), packed[0].item())
red("Q4-4", fourbit(torch.tensor([1.0, 0.002604168]), "fp4")[0].item(), 0x30)
red("Q4-5", fourbit(torch.tensor([1.0, 0.001]), "fp4")[0].item(), 0x30)
red("I8-5", list(KERNELS["int8_vectorwise_quant"](torch.ones(2, 8, 8))[1].shape), [16])
a = torch.full((1, 2048), 127, dtype=torch.int8)
b = a.clone()
b[0, -1] = 2
red("IM-1", KERNELS["int8_linear_matmul"](a, b).item(), 127 * 127 * 2047 + 127 * 2)  # odd, and above 2^24
one = torch.ones(1)
y = KERNELS["int8_mm_dequant"](torch.tensor([[127 * 127]], dtype=torch.int32), one, one, torch.float32)
red("ID-1", y.item(), 1.0)
y = KERNELS["int8_mm_dequant"](torch.ones(2, 3, 4, dtype=torch.int32), torch.ones(6), torch.ones(4))
red("ID-3", list(y.shape), [2, 3, 4])
p, state, room = torch.tensor([2.0]), torch.zeros(1), torch.zeros(1)
step = KERNELS["optimizer_update_32bit"]
step("lars", torch.tensor([1.0]), p, state, None, room, 0.2, 2.0, 0.9, 0.0, 0.0, 0.0, 0.0, 1.0, 1, 0.1, 1.0, False)
red("OS-5", round(p.item(), 4), 1.96)  # the step is lr * 0.2 * |p|, with the decay in it
state = torch.zeros(1)
step(
    "momentum",
    torch.ones(1).half(),
    p.half(),
    state,
    None,
    None,
    0.0,
    0.0,
    0.0,
    0.0,
    0.0,
    0.0,
    0.0,
    0.0,
    1,
    0.1,
    0.3,
    False,
)
red("OS-3", state.item(), torch.tensor(0.3).item())  # gnorm_scale times a gradient of 16 bits, rounded to 16 bits
