"""bnbref, compiled where it can be ("bnbref"), not at all ("-eager"), or with products in a fixed order ("-invariant")."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise, codebooks, fourbit, functional, int8, nn, products
from bnbref.conformance.backends.public_names import PublicNames
from bnbref.conformance.backends.reference_training import Training, nonzero
from bnbref.conformance.oracles.steps import BLOCKSIZE
from bnbref.kernels import eager
from bnbref.kernels.ordered import batch_invariant
from bnbref.optim import rules, update
from bnbref.optim.equation import at_step
from bnbref.optim.master_weights import CORRECTIONS
from bnbref.quant_state import QuantState


class Reference(Training, PublicNames):
    """Every operation, by bnbref's functions."""

    packages = ("bnbref",)

    def __init__(self) -> None:
        super().__init__(
            SimpleNamespace(
                functional=functional, nn=nn, matmul_4bit=products.matmul_4bit, matmul=products.matmul,
                MatmulLtState=products.MatmulLtState,
            )
        )  # fmt: skip

    def quantize_blockwise(self, x: Tensor, values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        codes, state = functional.quantize_blockwise(x, values, blocksize=blocksize)
        return codes, state.absmax

    def quantize_squares(self, x: Tensor, values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        return blockwise.quantize(x, codebooks.DYNAMIC_UNSIGNED.nonzero(), blocksize)

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        return blockwise.dequantize(codes, absmax, values, blocksize, dtype)

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        packed, absmax = fourbit.quantize(x, codebooks.four_bit(quant_type), blocksize)
        return packed.view(-1), absmax

    def dequantize_4bit(self, packed: Tensor, absmax: Tensor, quant_type: str, **arguments: Any) -> Tensor:
        return fourbit.dequantize(packed, absmax, codebooks.four_bit(quant_type), **arguments)

    def gemm_4bit(
        self, a: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, shape: Sequence[int], **arguments: Any
    ) -> Tensor:
        state = QuantState(absmax, shape=torch.Size(shape), dtype=a.dtype, **arguments)
        return products.matmul_4bit(a, packed.view(-1, 1), state, bias=bias)

    def int8_quantize(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        codes, absmax, mask = int8.quantize(x, threshold)
        return codes, absmax, torch.empty(0, dtype=torch.int64) if mask is None else mask.nonzero().view(-1)

    def int8_matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return int8.multiply(a, b)

    def int8_mm_dequant(
        self, product: Tensor, row: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        y = int8.dequantize_int8_product(int8.as_matrix(product), row, column, bias, None, dtype=dtype)
        return y.view(product.shape)

    def int8_dequantize(self, codes: Tensor, absmax: Tensor) -> Tensor:
        return int8.dequantize(codes, absmax)

    def optimizer_32bit(self, p: Tensor, g: Tensor, optimizer: str, **arguments: Any) -> dict[str, Tensor]:
        return self._step(rules.RULES[optimizer], p, g, **arguments)

    def optimizer_8bit(
        self, p: Tensor, g: Tensor, optimizer: str, values1: Tensor, values2: Tensor | None, **arguments: Any
    ) -> dict[str, Tensor]:
        return self._step(_rule(optimizer, values1), p, g, **arguments)

    def optimizer_8bit_nonzero(
        self, p: Tensor, g: Tensor, optimizer: str, values1: Tensor, values2: Tensor | None, **arguments: Any
    ) -> dict[str, Tensor]:
        return self._step(nonzero(_rule(optimizer, values1)), p, g, **arguments)

    def corrected_step(
        self, p: Tensor, g: Tensor, optimizer: str, correction: Tensor, **arguments: Any
    ) -> dict[str, Tensor]:
        key = CORRECTIONS[p.dtype]
        made = self._step(rules.RULES[optimizer], p, g, **(arguments | {key: correction}))
        made["correction"] = made.pop(key)
        return made

    def _step(self, rule: rules.Rule, p: Tensor, g: Tensor, *, step: int, max_unorm: float, gnorm_scale: float,
              **arguments: Any) -> dict[str, Tensor]:  # fmt: skip
        state = {key: x for key, x in arguments.items() if isinstance(x, Tensor)}
        betas = tuple(arguments[f"beta{i}"] for i in (1, 2, 3))
        planned = at_step(rule, step, {**arguments, "betas": betas, "t_alpha": None, "t_beta3": None}, p.device)
        # A step is made in place, of memory in order: of copies.
        made = {"p": p.clone(memory_format=torch.contiguous_format), **{key: x.clone() for key, x in state.items()}}
        g = g if gnorm_scale == 1 else g.float() * gnorm_scale
        max_norm = max_unorm if rule.clipped else 0.0
        update.step(*planned, made["p"], g, made, blocksize=BLOCKSIZE, max_norm=max_norm)
        return made


def _rule(optimizer: str, values: Tensor) -> rules.Rule:
    """The rule whose first state has this codebook."""
    of_squares = rules.RULES[optimizer]
    return rules.SIGNED_RULES.get(optimizer, of_squares) if bool((values < 0).any()) else of_squares


class Eager(Reference):
    """Uncompiled."""

    within = staticmethod(eager)


class Invariant(Reference):
    """With products in a fixed order."""

    within = staticmethod(batch_invariant)
