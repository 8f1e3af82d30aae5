"""Backends, each wrong in one way, that got past versions 1 and 2 of the vectors, or past arguments with memory of their own."""

from typing import Any

import torch
from kit_mutants import Mutant, mutant, right
from torch import Tensor

from bnbref.codebooks import DYNAMIC, value_table
from bnbref.conformance.oracles.formula import COUPLED

MUTANTS: list[Mutant] = []
"""All of them."""

STEPS = ("optimizer_32bit", "optimizer_8bit")


def _add(name: str, wrong: str, **functions: Any) -> None:
    MUTANTS.append(mutant(name, wrong, **functions))


def _changed(name: str, wrong: str, *operations: str, **change: Any) -> None:
    """The right result of other arguments: each is made of those of the case."""

    def function(op: str) -> Any:
        return lambda **k: right(op)(**{**k, **{key: make(k) for key, make in change.items()}})

    _add(name, wrong, **{op: function(op) for op in operations})


def _replaced(name: str, wrong: str, *operations: str, **change: Any) -> None:
    """The right step with other results: each is made of the results and the arguments."""

    def function(op: str) -> Any:
        def step(**k: Any) -> Any:
            made = right(op)(**k)
            return {**made, **{key: make(made, k) for key, make in change.items() if key in made}}

        return step

    _add(name, wrong, **{op: function(op) for op in operations})


# ---- memory ---------------------------------------------------------------------------------------------------------


def _from_the_start(x: Tensor, values: Tensor, blocksize: int) -> Any:
    return right("quantize_blockwise")(x.as_strided(x.shape, x.stride(), 0), values, blocksize)


def _whole_blocks(x: Tensor, values: Tensor, blocksize: int) -> Any:
    """Reads the last block to its end, as far as there is memory."""
    if not x.is_contiguous():
        return right("quantize_blockwise")(x, values, blocksize)
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    wanted = min(room, x.numel() + -x.numel() % blocksize)
    codes, absmax = right("quantize_blockwise")(x.as_strided((wanted,), (1,)), values, blocksize)
    return codes[: x.numel()].view(x.shape), absmax


def _one_more(codes: Tensor, **rest: Any) -> Any:
    """Clears a byte behind its argument."""
    made = right("dequantize_blockwise")(codes=codes, **rest)
    end = codes.storage_offset() + codes.numel()
    if codes.untyped_storage().nbytes() > end:
        codes.as_strided((1,), (1,), end).zero_()
    return made


_WORKSPACE: dict[torch.dtype, Tensor] = {}


def _again(dtype: torch.dtype, **k: Any) -> Tensor:
    """Results of a dtype are in one memory."""
    y: Tensor = right("dequantize_blockwise")(dtype=dtype, **k)
    memory = _WORKSPACE.setdefault(dtype, torch.empty(2**16, dtype=dtype))
    return memory[: y.numel()].view(y.shape).copy_(y)


def _memory_order(step: str) -> Any:
    return lambda p, g, **k: right(step)(p=p, g=g if g.is_contiguous() else g.t().contiguous().view(g.shape), **k)


_add("offset-ignored", "a slice is read from where its memory begins", quantize_blockwise=_from_the_start)
_add("last-block-overread", "the last block is read to its end", quantize_blockwise=_whole_blocks)
_add("byte-behind", "the byte behind an argument is cleared", dequantize_blockwise=_one_more)
_add("one-workspace", "a result is written where the one before lies", dequantize_blockwise=_again)
_add("gradient-in-memory-order", "strides of the gradient are ignored", **{step: _memory_order(step) for step in STEPS})


# ---- formats --------------------------------------------------------------------------------------------------------


def _flushed(below: float, x: Tensor) -> Tensor:
    return torch.where(x.float().abs() < below, torch.zeros_like(x), x)


def _float16_flushed(x: Tensor, **k: Any) -> Any:
    return right("quantize_4bit")(x=_flushed(2.0**-14, x) if x.dtype == torch.float16 else x, **k)


def _offset(middle: Any) -> Any:
    def nested(x: Tensor, blocksize: int, quant_type: str) -> Any:
        packed, absmax = right("quantize_4bit")(x, blocksize, quant_type)
        offset = middle(absmax)
        values = value_table(DYNAMIC, torch.device("cpu"))
        return packed, *right("quantize_blockwise")(absmax - offset, values, 256), offset

    return nested


def _exchanged(row: Tensor, column: Tensor, **k: Any) -> Any:
    same = row.numel() == column.numel()
    return right("int8_mm_dequant")(row=column if same else row, column=row if same else column, **k)


_add("float16-flushed", "float16 numbers below 2^-14 are taken for 0", quantize_4bit=_float16_flushed)
_add("products-flushed", "products below 2^-100 are 0",
     dequantize_blockwise=lambda **k: _flushed(2.0**-100, right("dequantize_blockwise")(**k)))  # fmt: skip
_add("offset-in-the-middle", "the offset of nested scales is between the least and the largest",
     quantize_4bit_nested=_offset(lambda absmax: (absmax.amin() + absmax.amax()) / 2))  # fmt: skip
_add("offset-in-16-bits", "the offset of nested scales is a bfloat16",
     quantize_4bit_nested=_offset(lambda absmax: absmax.mean().bfloat16().float()))  # fmt: skip
_add("square-transposed", "scales of rows and columns of a square product are exchanged", int8_mm_dequant=_exchanged)


# ---- products -------------------------------------------------------------------------------------------------------


def _whole_tiles(tile: int) -> Any:
    def product(a: Tensor, shape: Any, **k: Any) -> Any:
        whole = shape[1] // tile * tile
        if whole:
            a = torch.cat((a[..., :whole], torch.zeros_like(a[..., whole:])), -1)
        return right("gemm_4bit")(a=a, shape=shape, **k)

    return product


def _whole_outputs(tile: int) -> Any:
    def product(shape: Any, **k: Any) -> Any:
        y, whole = right("gemm_4bit")(shape=shape, **k), shape[0] // tile * tile
        if whole:
            y[..., whole:] = 0
        return y

    return product


def _summed_in_dtype(grad: Tensor, **k: Any) -> Any:
    n, columns = k["shape"]
    weight = right("dequantize_4bit")(dtype=grad.dtype, **k)
    total = torch.zeros(*grad.shape[:-1], columns, dtype=grad.dtype)
    for row in range(n):
        total = total + grad[..., row, None] * weight[row]
    return total


def _unquantized(a: Tensor, weight: Tensor, grad: Tensor) -> Any:
    _, of_weight = right("int8_backward")(a, weight, grad)
    return (grad.float() @ weight.float()).to(a.dtype), of_weight


_add("columns-of-256", "columns beyond whole tiles of 256 are left out", gemm_4bit=_whole_tiles(256))
_add("outputs-of-256", "outputs beyond whole tiles of 256 are left out", gemm_4bit=_whole_outputs(256))
_add("gradient-summed-in-16-bits", "backwards a product is summed in its dtype", gemm_4bit_backward=_summed_in_dtype)
_add("weight-not-quantized", "the input's gradient is of the weight before int8", int8_backward=_unquantized)


# ---- steps ----------------------------------------------------------------------------------------------------------


def _in_16_bits(key: str, dtype: torch.dtype) -> Any:
    return lambda k: None if k[key] is None else float(torch.tensor(k[key]).to(dtype))


def _by_blocks(p: Tensor, **k: Any) -> Any:
    """A ratio of norms for each 256 elements."""
    step = right("optimizer_32bit")
    if k["max_unorm"] == 0 or p.dim() != 1:
        return step(p=p, **k)
    names = [name for name, x in k.items() if isinstance(x, Tensor)]
    blocks = [step(p=part, **{**k, **{name: k[name][i * 256 : i * 256 + 256] for name in names}})
              for i, part in enumerate(p.split(256))]  # fmt: skip
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _one_element(**k: Any) -> Any:
    return {name: x.reshape(1) if x.dim() == 0 else x for name, x in right("optimizer_32bit")(**k).items()}


def _scaled_decay(k: dict[str, Any]) -> float:
    return float(k["weight_decay"] * (k["gnorm_scale"] if k["optimizer"] in COUPLED else 1))


def _by_columns(made: Any, k: dict[str, Any]) -> Tensor:
    codes: Tensor = made["state1"]
    return codes.t().contiguous().view(codes.shape) if codes.dim() == 2 else codes


_changed("scale-in-16-bits", "gnorm_scale is a float16", *STEPS, gnorm_scale=_in_16_bits("gnorm_scale", torch.float16))
_changed("alpha-in-16-bits", "AdEMAMix' alpha is a bfloat16", *STEPS, alpha=_in_16_bits("alpha", torch.bfloat16))
_changed(
    "bound-in-16-bits", "max_unorm is a bfloat16", "optimizer_32bit", max_unorm=_in_16_bits("max_unorm", torch.bfloat16)
)
_changed(
    "thousand-steps", "bias corrections are those of at most 1000 steps", *STEPS, step=lambda k: min(k["step"], 1000)
)
_changed("decay-scaled", "gnorm_scale multiplies the decay of the gradient, too", *STEPS, weight_decay=_scaled_decay)
_add("ratio-of-blocks", "norms are those of 256 elements", optimizer_32bit=_by_blocks)
_add("no-scalars", "a scalar comes back as a vector", optimizer_32bit=_one_element)
_replaced("codes-by-columns", "codes of a matrix are in the order of its columns", "optimizer_8bit", state1=_by_columns)
_changed("corrected-scale-lost", "gnorm_scale is dropped", "corrected_step", gnorm_scale=lambda k: 1.0)


# ---- matrices and weights -------------------------------------------------------------------------------------------


def _split_flushed(x: Tensor, dtype: torch.dtype, bits: int) -> Any:
    return right("split_weight")(_flushed(2.0**-14, x) if dtype == torch.float16 else x, dtype, bits)


_changed("muon-rate-in-16-bits", "the rate is a bfloat16", "muon", lr=_in_16_bits("lr", torch.bfloat16))
_replaced(
    "muon-momentum-in-16-bits",
    "the momentum is a bfloat16",
    "muon",
    momentum=lambda made, k: made["momentum"].bfloat16().float(),
)
_changed("muon-8bit-decay-lost", "weight decay is dropped", "muon_8bit", weight_decay=lambda k: 0.0)
_changed(
    "muon-8bit-original", "the step is scaled by its shape in one way alone", "muon_8bit", adjust=lambda k: "original"
)
_changed("soap-eps-lost", "eps is dropped", "soap", eps=lambda k: 0.0)
_replaced("adafactor-bounded-decay", "weight decay is by the bounded rate", "adafactor",
          p=lambda made, k: made["p"] + max(0, k["lr"] - k["step"] ** -0.5) * k["weight_decay"] * k["p"])  # fmt: skip
_add("split-flushed", "weights below 2^-126 are taken for 0",
     split_weight=lambda x, **k: right("split_weight")(_flushed(2.0**-126, x), **k))  # fmt: skip
_add("split-float16-flushed", "float16 weights below 2^-14 are taken for 0", split_weight=_split_flushed)
