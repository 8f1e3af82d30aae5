"""bitsandbytes on a CPU with AVX512: what is red, `pip install bitsandbytes torch`. Of a fork that has this name too."""

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from rules import red

OPS = torch.ops.bitsandbytes
MAP = F.create_dynamic_map()


def nearest(x):
    """The code of the nearest value of the dynamic map."""
    return (MAP.double() - x).abs().argmin().item()


def blockwise(*x):
    codes, state = F.quantize_blockwise(torch.tensor(x))
    return codes.tolist(), state


def fourbit(x, kind="nf4", **options):
    packed, state = F.quantize_4bit(x, quant_type=kind, **options)
    return packed.view(-1), state


def raised(call):
    try:
        return call()
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


# A subnormal absmax has an infinite reciprocal: a tenth of it has the code of 1.
red("Q8-1", blockwise(1e-39, 1e-40)[0][1], nearest(0.1), nearest(0.0))
# A table of 65,536 bins: ties, small numbers and zero have other codes.
red("Q8-4", blockwise(1.0, -0.9859374761581421)[0][1], 0)  # exactly between the values of codes 0 and 1
red("Q8-3", blockwise(1.0, 1e-5)[0][1], nearest(1e-5))
red("Q8-5", blockwise(1.0, 0.0)[0][1], nearest(0.0))
nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
got = OPS.dequantize_blockwise(torch.full((1,), 200, dtype=torch.uint8), nan, MAP, 64, torch.bfloat16)
red("D8-3", str(got.item()), "nan")

red("Q4-1", fourbit(torch.zeros(1))[1].absmax.item(), 0.0)  # a partial block of zeros stores the clamp of its divisor
part = torch.tensor([3.7727534770965576, 1.468780279159546])
packed = fourbit(torch.cat((part, torch.zeros(62), part)))[0]
red("Q4-8", packed[-1].item(), packed[0].item())
red("Q4-4", fourbit(torch.tensor([1.0, 0.002604168]), "fp4")[0][0].item(), 0x30)  # below 0.00260417
red("Q4-5", fourbit(torch.tensor([1.0, 0.001]), "fp4")[0][0].item(), 0x30)
weight = torch.ones(4, 32)
weight[2:] = 100  # two blocks of 64: absmax 1 and 100
packed, state = fourbit(weight)
red("D4-2", F.dequantize_4bit(packed.view(-1, 1), state)[:, 0].tolist(), [1.0, 1.0, 100.0, 100.0])
red("D4-3", list(F.dequantize_4bit(*F.quantize_4bit(torch.ones(64), quant_type="nf4")).shape), [64])
three = torch.cat([torch.full((64,), scale) for scale in (2.0, 1.0, 3.0)])
red("QN-3", fourbit(three, compress_statistics=True)[1].absmax[0].item(), nearest(0.0))
red("DN-2", list(F.dequantize_4bit(*F.quantize_4bit(torch.ones(1, 2), compress_statistics=True)).shape), [1, 2])
a = torch.zeros(1, 32)
a[0, 0] = 1
y = OPS.gemm_4bit(a, packed.view(-1, 1), [4, 32], state.absmax, 64, "nf4", None)
red("G4-1", y.view(-1).tolist(), [1.0, 1.0, 100.0, 100.0])
a.requires_grad_()
bnb.matmul_4bit(a, packed.view(-1, 1), state).backward(torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
red("GB-1", a.grad[0, 0].item(), 100.0)
# A file of a vector: the state as it is read.
packed, state = fourbit(torch.ones(66))
again = F.QuantState.from_dict(state.as_dict(packed=True), device="cpu")
red("CR-1", list(F.dequantize_4bit(packed.view(-1, 1), again).shape), [66])

red("I8-5", raised(lambda: list(OPS.int8_vectorwise_quant(torch.ones(2, 8, 8))[1].shape)), [16])
a, b = torch.full((2, 1), 3, dtype=torch.int8), torch.full((4, 1), 5, dtype=torch.int8)
red("IM-1", OPS.int8_linear_matmul(a, b).view(-1).tolist(), [15] * 8)
one = torch.ones(1)
y = OPS.int8_mm_dequant(torch.tensor([[127 * 127]], dtype=torch.int32), one, one, dtype=torch.float32)
red("ID-1", y.item(), 1.0)
y = OPS.int8_mm_dequant(torch.ones(2, 3, 4, dtype=torch.int32), torch.ones(6), torch.ones(4))
red("ID-3", list(y.shape), [2, 3, 4])
state = bnb.MatmulLtState()
state.is_training = state.has_fp16_weights = True
a, weight = torch.ones(2, 3, 32, requires_grad=True), torch.ones(16, 32, requires_grad=True)
y = bnb.matmul(a, weight, state=state)
red("IB-3", raised(lambda: y.backward(torch.ones_like(y))), None)


def linear(outputs):
    layer = bnb.nn.Linear4bit(128, outputs, bias=False)
    layer.weight = bnb.nn.Params4bit(
        torch.ones(outputs, 128), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    return layer.to("cpu")


x, layer = torch.ones(1, 128), linear(32)
with torch.no_grad():
    layer.eval()(x)
    red("LE-1", raised(lambda: linear(48).eval()(x)[0, 0].item()), 128.0)
x.requires_grad_()
y = layer.train()(x).sum()
raised(lambda: y.backward())
red("LE-2", x.grad is not None, True)
red("LE-3", layer.state_dict()["weight.absmax"].dtype, torch.float32)


def stepped(name, p, *gradients, **options):
    """The parameter after a step for each gradient, and the state."""
    p = torch.nn.Parameter(p.clone())
    optimizer = getattr(bnb.optim, name)([p], **options)
    for p.grad in gradients:
        optimizer.step()
    return p.detach(), optimizer.state[p]


two = torch.tensor([2.0])
p, _ = stepped("LAMB", two, torch.tensor([1.0]), lr=0.1, max_unorm=0.2, eps=0.0)
red("OS-5", round(p.item(), 4), 1.96)  # the step is lr * 0.2 * |p|
ones = torch.ones(4096)
small = torch.full((4096,), 1e-5)
small[::256] = 1
_, state = stepped("SGD8bit", ones, small, lr=0.1, momentum=0.9)
red("OB-2", state["state1"][1].item(), nearest(1e-5))
_, state = stepped("SGD8bit", ones, small * (small > 0.5), lr=0.1, momentum=0.9)
red("OB-4", MAP[state["state1"][1].long()].item(), 0.0)
bad = ones.clone()
bad[7] = float("inf")
_, state = stepped("SGD8bit", ones, ones, bad, lr=0.1, momentum=0.9)
red("OB-6", state["absmax1"][0].isfinite().item(), True)
p, _ = stepped("LARS8bit", ones, ones, lr=1.0, momentum=0.9, max_unorm=0.02)
red("OB-7", round(p[0].item(), 4), 0.98)
# RMSprop in 8 bits divides the gradient with its decay: 1 + 1 * 1, whose root of the mean square is 0.1 * 2.
p, _ = stepped("RMSprop8bit", ones, ones, lr=0.1, alpha=0.99, eps=0.0, weight_decay=1.0)
red("OB-3", round(p[0].item(), 2), 0.0)
