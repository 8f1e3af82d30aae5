"""Calls as bitsandbytes' documentation has them, unchanged: each runs, and gives a tensor of that shape and dtype."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("eager")

SETUP = """
import torch
import bitsandbytes as bnb
import bitsandbytes.functional as F
torch.manual_seed(0)
A = torch.randn(64, 128)
W = torch.randn(32, 128)
p = torch.nn.Parameter(torch.randn(64, 128))
p.grad = torch.randn(64, 128)
"""

SNIPPETS = {
    "q, state = F.quantize_4bit(A)": ("q", (4096, 1), torch.uint8),
    "q, state = F.quantize_4bit(A, blocksize=128, compress_statistics=True, quant_type='nf4')": ("q", (4096, 1), torch.uint8),
    "q, state = F.quantize_4bit(A, quant_type='fp4', quant_storage=torch.bfloat16)": ("q", (2048, 1), torch.bfloat16),
    "q, state = F.quantize_nf4(A); x = F.dequantize_nf4(q, state)": ("x", (64, 128), torch.float32),
    "q, state = F.quantize_fp4(A); x = F.dequantize_fp4(q, quant_state=state)": ("x", (64, 128), torch.float32),
    "out = torch.empty_like(A); q, state = F.quantize_4bit(A); F.dequantize_4bit(q, state, out=out)": (
        "out", (64, 128), torch.float32,
    ),
    "q, s = F.quantize_4bit(A); x = F.dequantize_4bit(q, absmax=s.absmax, out=torch.empty_like(A), blocksize=64)": (
        "x", (64, 128), torch.float32,
    ),
    "q, state = F.quantize_blockwise(A)": ("q", (64, 128), torch.uint8),
    "q, state = F.quantize_blockwise(A, blocksize=256, nested=True); x = F.dequantize_blockwise(q, state)": (
        "x", (64, 128), torch.float32,
    ),
    "q, state = F.quantize_blockwise(A, code=F.create_fp8_map(True, 5, 2), blocksize=64)": ("q", (64, 128), torch.uint8),
    "out = torch.empty_like(A, dtype=torch.uint8); F.quantize_blockwise(A, out=out)": ("out", (64, 128), torch.uint8),
    "code = F.create_linear_map(signed=True, total_bits=8)": ("code", (256,), torch.float32),
    "code = F.create_normal_map()": ("code", (256,), torch.float32),
    "code = F.get_4bit_type('nf4', device='cpu')": ("code", (16,), torch.float32),
    "q, scale, outliers = F.int8_vectorwise_quant(A, threshold=3.0)": ("outliers", None, torch.int64),
    "q, scale, _ = F.int8_vectorwise_quant(A); x = F.int8_vectorwise_dequant(q, scale)": ("x", (64, 128), torch.float32),
    "a, _, rows, _, _ = F.int8_double_quant(A)": ("rows", (64,), torch.float32),
    "a, s, _ = F.int8_vectorwise_quant(A); b, t, _ = F.int8_vectorwise_quant(W); c = F.int8_linear_matmul(a, b)\n"
    "y = F.int8_mm_dequant(c, s, t)": ("y", (64, 32), torch.float16),
    "q, state = F.quantize_4bit(W, quant_type='nf4'); y = F.gemv_4bit(A[:1], q.t(), state=state)": (
        "y", (1, 32), torch.float32,
    ),
    "q, state = F.quantize_4bit(W, quant_type='nf4'); y = bnb.matmul_4bit(A, q.t(), quant_state=state)": (
        "y", (64, 32), torch.float32,
    ),
    "y = bnb.matmul(A, W, threshold=6.0)": ("y", (64, 32), torch.float32),
    "state = bnb.MatmulLtState(); state.threshold = 6.0; y = bnb.matmul(A, W, state=state)": ("y", (64, 32), torch.float32),
    "linear_q = bnb.nn.Linear4bit(128, 32, compute_dtype=torch.bfloat16, quant_type='nf4').to('cpu'); y = linear_q(A)": (
        "y", (64, 32), torch.float32,
    ),
    "fp = torch.nn.Sequential(torch.nn.Linear(128, 32)); q = torch.nn.Sequential(bnb.nn.LinearNF4(128, 32))\n"
    "q.load_state_dict(fp.state_dict()); q = q.to('cpu'); y = q(A)": ("y", (64, 32), torch.float32),
    "fp = torch.nn.Sequential(torch.nn.Linear(128, 32)); q = torch.nn.Sequential("
    "bnb.nn.Linear8bitLt(128, 32, has_fp16_weights=False)); q.load_state_dict(fp.state_dict()); q = q.to('cpu'); y = q(A)": (
        "y", (64, 32), torch.float32,
    ),
    "w = bnb.nn.Params4bit(W, requires_grad=False, quant_type='nf4').to('cpu')": ("w", (2048, 1), torch.uint8),
    "w = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False).to('cpu')": ("w", (32, 128), torch.int8),
    "e = bnb.nn.StableEmbedding(100, 64); y = e(torch.tensor([1, 2]))": ("y", (2, 64), torch.float32),
    "e = bnb.nn.Embedding4bit(128, 64, dtype=torch.float16).to('cpu'); y = e(torch.tensor([1, 2]))": (
        "y", (2, 64), torch.float16,
    ),
    "bnb.optim.Adam8bit([p], lr=0.001, betas=(0.9, 0.995)).step()": ("p", (64, 128), torch.float32),
    "bnb.optim.AdamW([p], lr=0.001, optim_bits=8, is_paged=True).step()": ("p", (64, 128), torch.float32),
    "bnb.optim.Lion8bit([p], lr=1e-4, weight_decay=0.1).step()": ("p", (64, 128), torch.float32),
    "bnb.optim.LARS8bit([p], lr=0.1, momentum=0.9).step()": ("p", (64, 128), torch.float32),
    "mng = bnb.optim.GlobalOptimManager.get_instance(); mng.register_parameters([p])\n"
    "mng.override_config(p, 'optim_bits', 32); o = bnb.optim.Adam8bit([p]); o.step(); s = o.state[p]['state1']": (
        "s", (64, 128), torch.float32,
    ),
    "mng = bnb.optim.GlobalOptimManager.get_instance(); l = torch.nn.Linear(64, 64)\n"
    "mng.register_module_override(l, 'weight', {'optim_bits': 32}); x = l.weight": ("x", (64, 64), torch.float32),
    "q, state = F.quantize_4bit(W, compress_statistics=True); x = state[4][0]": ("x", (), torch.float32),
    "d = F.quantize_4bit(W)[1].as_dict(packed=True); x = F.QuantState.from_dict(d, device='cpu').absmax": (
        "x", (64,), torch.float32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run_unchanged(bitsandbytes, code):
    name, shape, dtype = SNIPPETS[code]
    names = {}
    exec(SETUP + code, names)
    assert names[name].dtype == dtype
    assert shape is None or names[name].shape == shape


def test_there_are_enough():
    assert len(SNIPPETS) >= 30
