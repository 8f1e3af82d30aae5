"""Operations by the names that bitsandbytes documents: of its own package, or of bnbref, which has the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref.codebooks import four_bit, value_table
from bnbref.state_fields import BLOB, TENSORS


class PublicNames:
    """The operations that call `functional`, `nn`, `matmul_4bit`, `matmul` and `MatmulLtState` of a package."""

    def __init__(self, package: Any) -> None:
        self.package = package

    def quantize_4bit_nested(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        packed, state = self.package.functional.quantize_4bit(
            x, blocksize=blocksize, quant_type=quant_type, compress_statistics=True
        )
        return packed.view(-1), state.absmax, state.state2.absmax, state.offset

    def dequantize_4bit_nested(
        self, packed: Tensor, codes: Tensor, absmax2: Tensor, offset: Tensor, values: Tensor, **weight: Any
    ) -> Any:
        inner = self.package.functional.QuantState(absmax=absmax2, code=values, blocksize=256, dtype=torch.float32)
        state = self._state(absmax=codes, offset=offset, state2=inner, **weight)
        return self.package.functional.dequantize_4bit(packed.view(-1, 1), state)

    def save_4bit(self, x: Tensor, blocksize: int, quant_type: str, nested: bool) -> dict[str, Tensor]:
        packed, state = self.package.functional.quantize_4bit(
            x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        return file_tensors(packed, state.as_dict(packed=True), quant_type)

    def load_4bit(self, packed: Tensor, state: Tensor, quant_type: str, **tensors: Tensor | None) -> Any:
        file = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        found = self.package.functional.QuantState.from_dict({**file, BLOB + quant_type: state}, device=packed.device)
        return self.package.functional.dequantize_4bit(packed.view(-1, 1), found)

    def gemm_4bit_backward(
        self, grad: Tensor, packed: Tensor, absmax: Tensor, shape: Sequence[int], **weight: Any
    ) -> Any:
        state = self._state(absmax, shape=shape, dtype=grad.dtype, **weight)
        a = grad.new_zeros(*grad.shape[:-1], shape[1]).requires_grad_()
        self.package.matmul_4bit(a, packed.view(-1, 1), state).backward(grad)
        return a.grad

    def int8_backward(self, a: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, weight = a.requires_grad_(), weight.requires_grad_()
        state = self.package.MatmulLtState()
        state.is_training = state.has_fp16_weights = True
        self.package.matmul(a, weight, state=state).backward(grad)
        return a.grad, weight.grad

    def evaluate_then_train(
        self, x: Tensor, grad: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, quant_type: str,
        shape: Sequence[int], blocksize: int,
    ) -> dict[str, Any]:  # fmt: skip
        (n, k), nn = shape, self.package.nn
        layer = nn.Linear4bit(k, n, bias=bias is not None, compute_dtype=x.dtype, quant_type=quant_type, device="meta")
        values = value_table(four_bit(quant_type), absmax.device)
        state = self._state(absmax, quant_type, blocksize, shape, x.dtype, code=values)
        # Repacking writes to what it was given.
        stats = {name: tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
        layer.weight = nn.Params4bit.from_prequantized(
            data=packed.clone().view(-1, 1), quantized_stats=stats, requires_grad=False, device=x.device
        )
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.clone())
        with torch.no_grad():
            y = layer.eval()(x)
        given = x.clone().requires_grad_()
        layer.train()(given).backward(grad)
        file = layer.state_dict()
        saved = {"packed": file["weight"].view(torch.uint8).view(-1), "absmax": file["weight.absmax"]}
        return {"y": y, "grad_x": given.grad, **saved}

    def _state(
        self, absmax: Tensor, quant_type: str, blocksize: int, shape: Sequence[int], dtype: torch.dtype, **rest: Any
    ) -> Any:
        return self.package.functional.QuantState(
            absmax=absmax, shape=torch.Size(shape), blocksize=blocksize, quant_type=quant_type, dtype=dtype, **rest
        )


def file_tensors(packed: Tensor, file: Mapping[str, Tensor], quant_type: str) -> dict[str, Tensor]:
    """The tensors of a quantized weight in a file, by the kit's names."""
    tensors = {"packed": packed.view(torch.uint8).view(-1), "state": file[BLOB + quant_type]}
    return {**tensors, **{name: file[name] for name in (*TENSORS[2:], *TENSORS[:2]) if name in file}}
