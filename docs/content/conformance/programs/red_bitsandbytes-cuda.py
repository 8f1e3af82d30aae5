"""bitsandbytes on an NVIDIA GPU: what is red, `pip install bitsandbytes torch`. Each rule by itself: one that raises says so.

It ran on an H100 on 2026-11-27, where each rule was shown but I8-5, of which the tensor has had two outliers since: one does not
raise.
"""

import subprocess
import sys

import bitsandbytes as bnb
import bitsandbytes.functional as F
import torch
from rules import THRESHOLDS, codes, red, unpack

OPS, CUDA = torch.ops.bitsandbytes, torch.device("cuda")
MAP = F.create_dynamic_map().to(CUDA)
SIGNED = MAP.double().cpu()


def nearest(x):
    """The code of the nearest value of the dynamic map."""
    return (SIGNED - x).abs().argmin().item()


def shown(rule, *want):
    """A decorator: compares what a function returns, or the exception that it raises."""

    def run(function):
        try:
            got = function()
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
        red(rule, got, *want)

    return run


def tensor(*x, **options):
    return torch.tensor(x, device=CUDA, **options)


def fourbit(x, kind="nf4", **options):
    packed, state = F.quantize_4bit(x, quant_type=kind, **options)
    return packed.view(-1), state


@shown("G-1", 0)
def an_empty_tensor():
    """The exit status of a process that quantizes one: the C code ends it."""
    program = (
        "import sys, torch, bitsandbytes.functional as F; F.quantize_blockwise(torch.empty(0, device=sys.argv[1]))"
    )
    return subprocess.run([sys.executable, "-c", program, CUDA.type], capture_output=True).returncode


@shown("Q8-2", nearest(0.5))
def reciprocal_of_a_large_absmax():
    return F.quantize_blockwise(tensor(3e38, 1.5e38))[0][1].item()


@shown("Q4-2", 15)
def reciprocal_of_a_large_absmax_4bit():
    return fourbit(tensor(3e38, 3e38))[0][0].item() & 15


@shown("Q4-3", 0)
def a_threshold_that_is_an_ulp_off():
    """Exactly at the midpoint of codes 0 and 1, which is the lower one's."""
    return fourbit(torch.cat((torch.ones(1), THRESHOLDS[:1], torch.zeros(62))).to(CUDA))[0][0].item() & 15


@shown("Q4-1", 0)
def codes_of_blocks_of_eight():
    """How many of 64 are wrong."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    got = unpack(OPS.quantize_4bit(x.to(CUDA), 8, "nf4", torch.uint8)[0].view(-1).cpu())
    return (got != torch.cat([codes(block) for block in x.split(8)])).sum().item()


@shown("D8-2", 1.0)
def the_scale_of_a_block_of_100():
    """Of its element 64."""
    codes = torch.full((200,), nearest(1.0), dtype=torch.uint8, device=CUDA)
    return OPS.dequantize_blockwise(codes, tensor(1.0, 2.0), MAP, 100, torch.float32)[64].item()


@shown("QN-2", 7 * 17)
def a_block_of_zeros_among_others():
    """Its scale does not come back as 0, so that its codes must be those of 0."""
    x = torch.cat((torch.ones(64), torch.zeros(64))).to(CUDA)
    return fourbit(x, compress_statistics=True)[0][-1].item()


@shown("DN-2", [1, 2])
def the_shape_of_one_byte():
    return list(F.dequantize_4bit(*F.quantize_4bit(torch.ones(1, 2, device=CUDA), compress_statistics=True)).shape)


@shown("G-3", 0)
def what_is_not_contiguous():
    x = torch.randn(64, 32, device=CUDA).half().t()
    got, want = (OPS.int8_vectorwise_quant(one, 0.0)[0] for one in (x, x.contiguous()))
    return (got != want).sum().item()


@shown("I8-5", (2, 4, 64))
def outliers_in_three_dimensions():
    x = torch.ones(2, 4, 64, device=CUDA, dtype=torch.float16)
    x[0, 0, :2] = 8.0
    return tuple(F.int8_vectorwise_quant(x, threshold=6.0)[0].shape)


@shown("IM-1", 127 * 127 * 2081)
def a_product_of_2081_columns():
    a = torch.full((2, 2081), 127, dtype=torch.int8, device=CUDA)
    return OPS.int8_linear_matmul(a, a)[0, 0].item()


@shown("ID-1", 403.4076)
def the_constant_of_int8():
    """The result, in float32, has passed through float16."""
    product = tensor(16777215, dtype=torch.int32).view(1, 1)
    y = OPS.int8_mm_dequant(product, tensor(1.0872087), tensor(0.35671282), dtype=torch.float32)
    return round(y.item(), 4)


@shown("ID-2", 70000.0)
def a_result_beyond_float16():
    """70,000 in float32: float16 ends at 65,504."""
    product = tensor(127 * 127 * 70, dtype=torch.int32).view(1, 1)
    return round(OPS.int8_mm_dequant(product, tensor(1000.0), tensor(1.0), dtype=torch.float32).item(), -2)


@shown("ID-3", -0.03679)
def three_dimensions():
    product = torch.full((2, 3, 4), -1530, dtype=torch.int32, device=CUDA)
    row, column = torch.full((6,), 1.0872087, device=CUDA), torch.full((4,), 0.35671282, device=CUDA)
    return round(OPS.int8_mm_dequant(product, row, column, dtype=torch.float32)[0, 0, 0].item(), 5)


@shown("IB-2", True)
def the_gradient_of_a_weight():
    """Within a twentieth of grad^T @ a, whose rows have sizes of their own; int8 on the way leaves a hundredth."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat_interleave(8)[:, None]
    a, grad = ((torch.randn(32, k, generator=generator) * rows).half().to(CUDA) for k in (64, 16))
    weight = torch.ones(16, 64, device=CUDA, dtype=torch.float16, requires_grad=True)
    state = bnb.MatmulLtState()
    state.is_training = state.has_fp16_weights = True
    bnb.matmul(a, weight, state=state).backward(grad)
    want = grad.float().t() @ a.float()
    return bool((weight.grad.float() - want).norm() < want.norm() / 20)


def stepped(name, p, *gradients, **options):
    """The parameter after a step for each gradient, and the state."""
    p = torch.nn.Parameter(p.clone())
    optimizer = getattr(bnb.optim, name)([p], **options)
    for p.grad in gradients:
        optimizer.step()
    return p.detach(), optimizer.state[p]


ONES = torch.ones(4096, device=CUDA)


@shown("OS-2", 0.4)
def the_decay_of_adam():
    """Decoupled: 1 * (1 - 0.1 * 5) - 0.1, and not (1 - 0.1) * (1 - 0.5)."""
    p, _ = stepped("AdamW32bit", ONES[:1], ONES[:1], lr=0.1, eps=0.0, weight_decay=5.0)
    return round(p.item(), 3)


@shown("OS-1", 0.8705)
def the_decay_of_adam_late():
    """1 * (1 - 0.1 * 0.5) - 0.1 * direction, all averages 1 and the square's corrected by 1 - 0.999^1000."""
    p, g, m, v = (torch.ones(1, device=CUDA) for _ in range(4))
    F.optimizer_update_32bit("adam", g, p, m, 0.9, 0.0, 1000, 0.1, v, 0.999, weight_decay=0.5)
    return round(p.item(), 4)


@shown("OS-3", 0.3)
def the_scale_of_a_gradient_in_16_bits():
    """What the first step leaves in float32 of a gradient of 1 that is scaled by 0.3."""
    p, g = (torch.ones(1, device=CUDA, dtype=torch.float16) for _ in range(2))
    average = torch.zeros(1, device=CUDA)
    F.optimizer_update_32bit("momentum", g, p, average, 0.9, 0.0, 1, 0.1, gnorm_scale=0.3)
    return round(average.item(), 6)


@shown("OS-5", 1.96)
def the_norm_of_an_update():
    p, _ = stepped("LAMB32bit", tensor(2.0), tensor(1.0), lr=0.1, max_unorm=0.2, eps=0.0)
    return round(p.item(), 4)


@shown("OB-6", True)
def an_infinite_gradient():
    bad = ONES.clone()
    bad[7] = float("inf")
    _, state = stepped("SGD8bit", ONES, ONES, bad, lr=0.1, momentum=0.9)
    return state["absmax1"][0].isfinite().item()


@shown("OB-3", 0.4)
def the_decay_of_adam_in_8_bits():
    p, _ = stepped("AdamW8bit", ONES, ONES, lr=0.1, eps=0.0, weight_decay=5.0)
    return round(p[0].item(), 3)


@shown("OB-5", 1)
def the_scales_of_two_averages():
    """How many numbers 4097 equal ones become by equal gradients: the two averages share a scale, which is wrong for one."""
    ones = torch.ones(4097, device=CUDA)
    p, _ = stepped("AdEMAMix8bit", ones, ones, ones, lr=0.1, weight_decay=0.0)
    return p.unique().numel()


@shown("OB-1", 1)
def a_step_by_two_averages():
    """How many numbers 4100 equal ones become, in three dimensions: the last four are stepped with another scale."""
    ones = torch.ones(2, 2, 1025, device=CUDA)
    p, _ = stepped("AdEMAMix8bit", ones, ones, ones, lr=0.1, weight_decay=0.0)
    return p.unique().numel()
