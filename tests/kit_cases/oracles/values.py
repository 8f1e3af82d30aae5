"""What undoes a quantization, and files."""

from typing import Any

from torch import Tensor

from bnbref import functional, int8
from bnbref.conformance.backends.public_names import file_tensors
from bnbref.conformance.expected import Expected, also
from bnbref.conformance.oracles.values import each, weight
from bnbref.quant_state import QuantState
from bnbref.state_fields import BLOB


def dequantize_4bit_nested(
    packed: Tensor, codes: Tensor, absmax2: Tensor, offset: Tensor, values: Tensor, **rest: Any
) -> dict[str, Expected]:
    """Rules DN."""
    value2, scale2 = values[codes.long()], each(absmax2, 256, codes.numel())
    y, fused = (
        weight(packed, absmax, **rest)
        # A product of two float32 is exact in float64, so that the second has one rounding to float32.
        for absmax in (value2 * scale2 + offset, (value2.double() * scale2.double() + offset.double()).float())
    )
    return {"y": Expected(y, also=also(y, [fused]))}


def int8_dequantize(codes: Tensor, absmax: Tensor) -> dict[str, Expected]:
    """Rules IV."""
    return {"y": Expected(int8.dequantize(codes, absmax), ulp=4)}


def save_4bit(x: Tensor, blocksize: int, quant_type: str, nested: bool) -> dict[str, Expected]:
    """Rules CW."""
    packed, state = functional.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    tensors = file_tensors(packed, state.as_dict(packed=True), quant_type)
    return {name: Expected(tensor) for name, tensor in tensors.items()}


def load_4bit(
    packed: Tensor, state: Tensor, quant_type: str, absmax: Tensor, quant_map: Tensor,
    nested_absmax: Tensor | None = None, nested_quant_map: Tensor | None = None,
) -> dict[str, Expected]:  # fmt: skip
    """Rules CR."""
    file = {"absmax": absmax, "quant_map": quant_map, BLOB + quant_type: state}
    if nested_absmax is not None and nested_quant_map is not None:
        file |= {"nested_absmax": nested_absmax, "nested_quant_map": nested_quant_map}
    return {"y": Expected(functional.dequantize_4bit(packed.view(-1, 1), QuantState.from_dict(file, packed.device)))}
