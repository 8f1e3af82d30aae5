"""Which tensors of a file are one weight in bitsandbytes' layout, and whether it is whole. No file is read here.

A quantized weight is several tensors of a file:

    4 bits   W                                  the packed codes [bytes / itemsize, 1], uint8 or a float quant_storage
             W.absmax                           scales [blocks]: float32, or their uint8 codes (double quantization)
             W.quant_map                        float32 [16], the values of the codes
             W.nested_absmax                    double quantization: float32 [ceil(blocks / 256)]
             W.nested_quant_map                 double quantization: float32 [256]
             W.quant_state.bitsandbytes__nf4    JSON as uint8: quant_type, blocksize, dtype, shape
                                                (nested_blocksize, nested_dtype, nested_offset)
    int8     P.weight                           int8 codes [n, k]
             P.SCB                              float32 [n], absmax of each row
             P.weight_format                    uint8 [] = 0, the only layout left

Everything else is plain. Source: state dicts of bitsandbytes 0.50.2, files of transformers 5.23.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnbref import int8
from bnbref.arguments import check_tensors, checked, dtype_name
from bnbref.blockwise import FLOATS
from bnbref.quant_state import QuantState, present
from bnbref.state_fields import BLOB, TENSORS

STORAGES = (torch.uint8, *FLOATS, torch.int8, torch.float64)
"""The dtypes that packed codes may have in a file: those that transformers lets a `BitsAndBytesConfig` name."""

_OF_4BIT = re.compile(rf"(?s)(.+)\.({'|'.join(TENSORS)}|{re.escape(BLOB)}[^.]+)")
_OF_INT8 = re.compile(r"(?s)(|.*\.)(SCB|weight_format)")


@dataclass(frozen=True)
class Entry:
    """One weight of a checkpoint: the name, shape and format of what `read` returns, and its bytes in the file.

    format: "plain", "int8" or the 4-bit quant_type. code_bytes: of the weight itself. scale_bytes: of all beside it.

    >>> Entry("q_proj.weight", "nf4", (128, 128), torch.bfloat16, code_bytes=8192, scale_bytes=1168).bits
    4.5703125
    """

    name: str
    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    code_bytes: int
    scale_bytes: int

    @property
    def bits(self) -> float:
        """Bits per parameter, scales and tables included."""
        return 8 * (self.code_bytes + self.scale_bytes) / max(math.prod(self.shape), 1)


class Checkpoint:
    """The weights of a state dict, quantized or not: `entries` lists them, `read` gives one. ValueError if one is incomplete.

    >>> Checkpoint({"q.weight": torch.zeros(64, 64, dtype=torch.int8)})
    Traceback (most recent call last):
    ValueError: q.weight: int8 [64, 64] is a quantized weight, but its scales are missing
    """

    @checked
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        check_named_tensors(tensors)
        self.entries: dict[str, Entry] = {}
        self._tensors = tensors
        self._states: dict[str, QuantState] = {}
        beside: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, companion = _split(key)
            beside.setdefault(name, {}).update({companion: tensor} if companion else {})
        quantized = {name for name, group in beside.items() if group}
        for name, group in sorted(beside.items()):
            if name not in tensors:
                raise ValueError(f"{name} is missing, but its {sorted(group)} are there")
            weight = tensors[name]
            form, shape, dtype = "plain", weight.shape, weight.dtype
            if not group:
                _check_plain(name, weight, quantized)
            elif group.keys() & {"SCB", "weight_format"}:
                _check_int8(name, weight, group)
                form, dtype = "int8", torch.float32
            else:
                state = self._states[name] = _check_4bit(name, weight, group)
                form, dtype = present(state.quant_type, "quant_type"), present(state.dtype, "dtype")
                shape = present(state.shape, "shape")
            scale_bytes = sum(tensor.nbytes for tensor in group.values())
            self.entries[name] = Entry(name, form, tuple(shape), dtype, weight.nbytes, scale_bytes)

    @checked
    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A weight as a plain tensor, dequantized on the device.  Exact.

        4 bits: `dtype(fl(values[code] * absmax))`; int8: `dtype(fl(fl(code * SCB) * RN(1 / 127)))`.
        dtype: of floating tensors; None: the one that was quantized, float32 for int8, which does not record it.
        """
        if name not in self.entries:
            raise ValueError(f"name must be one of the {len(self.entries)} weights of the checkpoint, got {name!r}")
        if dtype not in (None, *FLOATS):
            raise ValueError(f"dtype must be float32, float16, bfloat16 or None, got {dtype!r}")
        entry, tensor = self.entries[name], self._tensors[name].to(device)
        if entry.format == "plain":
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if entry.format == "int8":
            return int8.dequantize(tensor, self._tensors[scb_key(name)].to(device), dtype or entry.dtype)
        return self._states[name].map(lambda t: t.to(device)).dequantize(tensor, dtype or entry.dtype)


def check_named_tensors(tensors: Mapping[str, Tensor]) -> None:
    """TypeError or ValueError for a name that is no text, or names no dense tensor."""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors must have names, got {name!r} for one")
        check_tensors(**{name: tensor})


# ---- what a whole weight is -----------------------------------------------------------------------------------------


def _split(key: str) -> tuple[str, str]:
    """The weight that a key belongs to, and the key's name beside it, empty for the weight itself."""
    if match := _OF_4BIT.fullmatch(key):
        return match[1], match[2]
    if match := _OF_INT8.fullmatch(key):
        return match[1] + "weight", match[2]
    return key, ""


def scb_key(name: str, key: str = "SCB") -> str:
    """The key of what is beside an int8 weight of that name.

    >>> scb_key("q.weight")
    'q.SCB'
    """
    return name.removesuffix("weight") + key


def described(tensor: Tensor) -> str:
    """The dtype and the shape of a tensor, as messages have them."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _check_plain(name: str, weight: Tensor, quantized: set[str]) -> None:
    for dot in re.finditer(r"\.", name):
        if name[: dot.start()] in quantized:
            raise ValueError(f"{name}: unknown key under the quantized weight {name[: dot.start()]}")
    if name.rpartition(".")[2] == "weight" and weight.dtype in (torch.uint8, torch.int8):
        raise ValueError(f"{name}: {described(weight)} is a quantized weight, but its scales are missing")


def _check_4bit(name: str, packed: Tensor, group: Mapping[str, Tensor]) -> QuantState:
    blobs = {key for key in group if key.startswith(BLOB)}
    needed = set(TENSORS if group.keys() & set(TENSORS[:2]) else TENSORS[2:])
    if len(blobs) != 1 or group.keys() - blobs != needed:
        needs = ", ".join([*sorted(needed), f"{BLOB}<quant_type>"])
        raise ValueError(f"{name}: a 4-bit weight needs {needs} beside it, got {', '.join(sorted(group))}")
    try:
        state = QuantState.from_dict(group, device="cpu")
        n_bytes = state.code_bytes
    # The others: sizes and offsets that no int64 or float holds, JSON that is nested too deeply.
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error
    if packed.nbytes != n_bytes or packed.shape[1:] != (1,) or packed.dtype not in STORAGES:
        raise ValueError(
            f"{name} must be {n_bytes} bytes [bytes / itemsize, 1] of uint8, int8 or floats for the shape "
            f"{list(state.shape or ())}, got {packed.nbytes} bytes, {described(packed)}"
        )
    return state


def _check_int8(name: str, codes: Tensor, group: Mapping[str, Tensor]) -> None:
    if "SCB" not in group or group.keys() - {"SCB", "weight_format"}:
        raise ValueError(
            f"{name}: an int8 weight needs SCB and weight_format beside it, got {', '.join(sorted(group))}"
        )
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"{name} must be int8 [n, k], as there is {scb_key(name)}, got {described(codes)}")
    scales, layout = group["SCB"], group.get("weight_format")  # layers older than weight_format have rows too
    if scales.dtype != torch.float32 or scales.shape != codes.shape[:1]:
        raise ValueError(f"{scb_key(name)} must be float32 [{codes.shape[0]}], got {described(scales)}")
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise ValueError(f"{scb_key(name)} has scales that are NaN, infinite or negative")
    if layout is not None and (layout.dtype != torch.uint8 or layout.numel() != 1 or layout.item() != 0):
        got = f"{described(layout)} {layout.flatten()[:1].tolist()}"
        raise ValueError(f"{scb_key(name, 'weight_format')} must be uint8 0 (rows, the only layout left), got {got}")
