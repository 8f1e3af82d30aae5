"""mps-bitsandbytes on a CPU: what is red, `pip install mps-bitsandbytes torch`. It says that it has bitsandbytes' interface."""

import mps_bitsandbytes.functional as F
import torch
from rules import beside, codes, red


def quantize(x, kind="nf4"):
    packed, state = F.quantize_4bit(x, quant_type=kind)
    return packed, state.absmax


def raised(call):
    try:
        return call()
    except RuntimeError as error:
        return f"RuntimeError: {error}"


x = torch.zeros(64)
x[0] = 1.0  # the codes of 1 and 0: f7, in bitsandbytes' bytes
red("Q4-1", hex(quantize(x)[0][0].item()), "0xf7")
red("Q4-2", hex(quantize(x * 4)[0][0].item()), "0xf7")
red("Q4-3", hex(quantize(beside())[0][0].item()), "0x" + "".join(f"{c:x}" for c in codes(beside())[:2].tolist()))
red("Q4-4", hex(quantize(x, "fp4")[0][0].item()), "0x30")
red("Q4-5", hex(quantize(-x, "fp4")[0][0].item()), "0xb0")
red("Q4-6", len(quantize(torch.ones(3))[0]), 2)
red("Q4-7", quantize(torch.zeros(64))[1].item(), 0.0)
red("Q4-8", len(quantize(torch.ones(66))[0]), 33)
matrix = torch.stack((x, x), 1).t()  # rows that are not contiguous
red("G-3", hex(F.quantize_4bit(matrix, quant_type="nf4")[0][0].item()), "0xf7")
packed, one = torch.full((32,), 0xF7, dtype=torch.uint8), torch.ones(1)


def dequantize(packed, absmax, shape):
    state = F.QuantState(absmax=absmax, shape=torch.Size(shape), quant_type="nf4", dtype=torch.float32)
    return state, F.dequantize_4bit(packed, state)


red("D4-1", dequantize(packed, one, (1, 64))[1][0, :2].tolist(), [1.0, 0.0])
red("D4-2", raised(lambda: list(dequantize(packed, one, (2, 32))[1].shape)), [2, 32])  # blocks run on from row to row
red("D4-3", dequantize(packed, one, (64,))[1][:2].tolist(), [1.0, 0.0])
a = torch.zeros(5, 64)
a[:, 0] = 1
red("G4-1", F.matmul_4bit(a[:1], packed, dequantize(packed, one, (1, 64))[0]).item(), 1.0)
red("G4-2", F.matmul_4bit(a, packed, dequantize(packed, one, (1, 64))[0]).view(-1).tolist(), [1.0] * 5)
red("I8-4", F.quantize_rowwise(torch.zeros(1, 8, dtype=torch.float16))[1].item(), 0.0)
red("I8-1", F.quantize_rowwise(torch.tensor([[1e-20]]))[1].item(), 9.999999682655225e-21)
