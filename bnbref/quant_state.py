"""QuantState: what is needed to undo a quantization, under bitsandbytes' names, in memory and in a state dict."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnbref import fourbit, nested
from bnbref.blockwise import block_count
from bnbref.codebooks import DYNAMIC, FOUR_BIT, Codebook, four_bit, is_table_of, value_table

T = TypeVar("T")

BLOB = "quant_state.bitsandbytes__"
"""Key of the JSON blob, followed by the quant_type."""

TENSORS = ("nested_absmax", "nested_quant_map", "absmax", "quant_map")
"""Keys of what a state dict has as tensors; the first two if the scales are quantized."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LARGEST = torch.finfo(torch.float32).max
_ANY_SIZE = 2**63 - 1
_NESTED_KEYS = ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset")
_PLAIN_KEYS = ("absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape")


class QuantState:
    """The scales of a quantized tensor and what it was: bitsandbytes' attributes.

    absmax: float32 scales `[blocks]`, or their uint8 codes where `nested`. code: the values `[16]` or `[256]`.
    shape, dtype: of the original. blocksize. quant_type: a name, or a Codebook that is not in `FOUR_BIT`, which a dict
    cannot hold. offset `[]` and state2 (itself a QuantState): double quantization.
    """

    _changed: object = None
    """Another object after each assignment of an attribute."""
    _kept: Any = None

    def __init__(
        self, absmax: Tensor, shape: torch.Size | None = None, code: Tensor | None = None, blocksize: int | None = None,
        quant_type: str | Codebook | None = None, dtype: torch.dtype | None = None, offset: Tensor | None = None,
        state2: "QuantState | None" = None,
    ) -> None:  # fmt: skip
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type: Any = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if not torch.compiler.is_dynamo_compiling():
            self.__dict__["_changed"] = object()

    def kept(self) -> dict[Any, Any]:
        """For who prepares something from the state: a dictionary that is kept with it until an attribute of the state, or of
        its state2, is assigned (not through `__dict__`). It is neither copied nor saved."""
        version = self._changed, None if self.state2 is None else self.state2._changed
        if self._kept is None or self._kept[0] != version:
            self.__dict__["_kept"] = version, {}
        return self._kept[1]  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_changed", "_kept")}

    def __getattr__(self, name: str) -> Any:
        # FSDP resolves the state dict's key `weight.quant_state.bitsandbytes__nf4` by getattr.
        if name.startswith("bitsandbytes__"):
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: Any) -> Any:
        """The list that bitsandbytes had before 0.40: absmax, shape, dtype, blocksize, [offset, state2], quant_type."""
        second = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, second, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        """Equal bit for bit, wherever the tensors are."""
        if not isinstance(other, QuantState):
            return NotImplemented
        return all(
            _equal(getattr(self, name), getattr(other, name))
            for name in ("absmax", "shape", "code", "dtype", "blocksize", "quant_type", "offset", "state2")
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def codebook(self) -> Codebook:
        """The 4-bit codebook that `quant_type` names."""
        if self.quant_type is None:
            raise ValueError("quant_type is None: this QuantState is not one of a 4-bit tensor")
        return four_bit(self.quant_type)

    @property
    def code_bytes(self) -> int:
        """How many bytes the packed 4-bit codes of the tensor have."""
        return -(-present(self.shape, "shape").numel() // 2)

    def scales(self) -> Tensor:
        """The scales as float32 `[blocks]`, reconstructed where they are nested.  Exact."""
        if self.state2 is None:
            return self.absmax.float()
        code, blocksize = present(self.state2.code, "state2.code"), present(self.state2.blocksize, "state2.blocksize")
        return nested.dequantize(self.absmax, self.state2.absmax, code, present(self.offset, "offset"), blocksize)

    def dequantize(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype: one rounding from the float32 product of value and scale.  Exact.

        Raises ValueError where the state does not say what that needs: blocksize, shape or 4-bit quant_type.

        >>> from bnbref.functional import quantize_4bit
        >>> packed, state = quantize_4bit(torch.tensor([1.0, -2.0]), quant_type="nf4")
        >>> state.dequantize(packed, torch.float32)
        tensor([ 0.8814, -2.0000])
        """
        blocksize, shape = present(self.blocksize, "blocksize"), present(self.shape, "shape")
        return fourbit.dequantize(packed, self.scales(), self.codebook, blocksize, shape, dtype)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state."""
        own = [t for t in (self.absmax, self.code, self.offset) if t is not None]
        return own + (self.state2.tensors() if self.state2 is not None else [])

    def map(self, function: Any) -> "QuantState":
        """A new state with `function` applied to every tensor; nothing is shared but what `function` returns."""

        def apply(tensor: Tensor | None) -> Any:
            return None if tensor is None else function(tensor)

        state2 = None if self.state2 is None else self.state2.map(function)
        absmax, code, offset = map(apply, (self.absmax, self.code, self.offset))
        return QuantState(absmax, self.shape, code, self.blocksize, self.quant_type, self.dtype, offset, state2)

    def to(self, device: Any) -> None:
        """Move to a device, in place, as bitsandbytes does. `map(lambda t: t.to(device))` leaves this one alone."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state by bitsandbytes' keys; packed: tensors only, the rest as a JSON blob of uint8 bytes.

        >>> from bnbref.functional import quantize_4bit
        >>> state = quantize_4bit(torch.ones(64), quant_type="nf4")[1]
        >>> bytes(state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].tolist()).decode()
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64]}'
        """
        full: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            # The maps are one tensor for every layer; safetensors would refuse the shared memory.
            "quant_map": None if self.code is None else self.code.clone(),
            "dtype": dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            full |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": present(self.state2.code, "state2.code").clone(),
                "nested_dtype": dtype_name(self.state2.dtype),
                "nested_offset": present(self.offset, "offset").item(),
            }
        if not packed or self.quant_type is None:
            return full
        if not isinstance(self.quant_type, str):
            raise ValueError(
                f"codebook {self.quant_type.name!r} must be entered in FOUR_BIT to be saved under its name"
            )
        tensors = {key: value for key, value in full.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in full.items() if not isinstance(value, Tensor)}
        blob = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
        return {**tensors, BLOB + self.quant_type: blob}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> "QuantState":
        """A state from its dict, packed or not; prefixes of keys up to the last dot are dropped.

        Everything is checked: keys, types, block counts, scales that no magnitude can be, and that both tables are those of the
        codebooks that quantize so: `quant_type` for the weight, the dynamic map for its scales. ValueError says what is wrong.
        What nothing else in the dict contradicts is believed: a blocksize that gives as many blocks, the value of the offset.
        quant_type None is a state of `quantize_blockwise`, whose 256 values may be any.

        >>> from bnbref.functional import quantize_blockwise
        >>> state = quantize_blockwise(torch.ones(64))[1]
        >>> QuantState.from_dict(state.as_dict(), device="cpu") == state
        True
        """
        fields = _unpack(qs_dict)
        nested_keys = [key for key in _NESTED_KEYS if key in fields]
        expected = set(_PLAIN_KEYS) | (set(_NESTED_KEYS) if nested_keys else set())
        _require(set(fields) == expected, "keys of a quant state", sorted(expected), sorted(fields))

        quant_type, blocksize, shape = fields["quant_type"], fields["blocksize"], fields["shape"]
        known_type = quant_type is None or (isinstance(quant_type, str) and quant_type in FOUR_BIT)
        _require(known_type, "quant_type", f"{sorted(FOUR_BIT)} or None, for 8 bits", quant_type)
        if shape is not None:
            ok = isinstance(shape, (list, tuple, torch.Size)) and all(type(n) is int and n >= 0 for n in shape)
            _require(ok and math.prod(shape) < 2**63, "shape", "a list of sizes", shape)
            shape = torch.Size(shape)
        known_dtype = isinstance(fields["dtype"], str) and fields["dtype"] in _DTYPES
        _require(known_dtype, "dtype", sorted(_DTYPES), fields["dtype"])

        code = _tensor(fields, "quant_map", torch.float32, 256 if quant_type is None else 16)
        if quant_type is not None:
            known = value_table(four_bit(quant_type), torch.device("cpu"))
            # By value, not by bits: writers differ in the sign of FP4's second zero.
            if code.device.type != "meta" and not bool((code.cpu() == known).all()):
                raise ValueError(f"quant_map is not the codebook {quant_type!r}: {code.tolist()}")

        # A state of 8 bits does not say of how many elements it is.
        of_any = _ANY_SIZE if quant_type is None else 0
        _check_blocksize("blocksize", blocksize, of_any if shape is None else math.prod(shape))
        blocks = None if shape is None else block_count(math.prod(shape), blocksize)
        absmax = _tensor(fields, "absmax", torch.uint8 if nested_keys else torch.float32, blocks)
        offset, state2 = None, None
        if nested_keys:
            inner_size = fields["nested_blocksize"]
            _check_blocksize("nested_blocksize", inner_size, max(of_any, absmax.numel()))
            _require(quant_type is None or inner_size == nested.BLOCKSIZE, "nested_blocksize", 256, inner_size)
            _require(fields["nested_dtype"] == "float32", "nested_dtype", "float32", fields["nested_dtype"])
            value = fields["nested_offset"]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(is_number and abs(value) <= _LARGEST, "nested_offset", "a finite float32 number", value)
            _require(value >= 0, "nested_offset", "the mean of magnitudes, at least 0", value)
            offset = torch.tensor(float(value), dtype=torch.float32, device=device)
            inner = _tensor(fields, "nested_absmax", torch.float32, block_count(absmax.numel(), inner_size))
            _check_scales("nested_absmax", inner)
            code2 = _tensor(fields, "nested_quant_map", torch.float32, 256)
            if code2.device.type != "meta" and not is_table_of(code2, DYNAMIC):
                raise ValueError(
                    "nested_quant_map is not the dynamic map, by which scales are coded: codes mean other scales"
                )
            if inner.numel() and not inner.is_meta and not (inner.max() * code2.max()).item() + value <= _LARGEST:
                raise ValueError("nested_absmax and nested_offset give scales that overflow float32")
            state2 = cls(inner.to(device), code=code2.to(device), blocksize=inner_size, dtype=torch.float32)
        else:
            _check_scales("absmax", absmax)
        dtype = _DTYPES[fields["dtype"]]
        return cls(absmax.to(device), shape, code.to(device), blocksize, quant_type, dtype, offset, state2)


def quantize_with_state(
    x: Tensor, quant_type: str | Codebook, blocksize: int, double_quant: bool, quant_storage: torch.dtype
) -> tuple[Tensor, QuantState]:
    """The packed 4-bit codes of a tensor, and the state that decodes them: `fourbit.quantize`.  Exact.

    double_quant: whether the scales are quantized too, by `nested.quantize`.
    """
    book = four_bit(quant_type)
    packed, scales = fourbit.quantize(x, book, blocksize, quant_storage)
    offset = state2 = None
    if double_quant:
        scales, absmax2, offset = nested.quantize(scales)
        values = value_table(DYNAMIC, x.device)
        state2 = QuantState(absmax2, code=values, blocksize=nested.BLOCKSIZE, dtype=torch.float32)
    name = book.name if FOUR_BIT.get(book.name) == book else book
    return packed, QuantState(scales, x.shape, value_table(book, x.device), blocksize, name, x.dtype, offset, state2)


def present(value: T | None, name: str) -> T:
    """The value of a field of a QuantState that this operation cannot do without."""
    if value is None:
        raise ValueError(f"this operation needs the quant state's {name}, which is None")
    return value


def _unpack(qs_dict: Mapping[str, Any]) -> dict[str, Any]:
    for key in qs_dict:
        _require(isinstance(key, str), "keys of a quant state", "strings", key)
    blobs = [key for key, value in qs_dict.items() if BLOB in f".{key}" and isinstance(value, Tensor)]
    fields = _without_repetition((key.rpartition(".")[2], qs_dict[key]) for key in qs_dict if key not in blobs)
    if "quant_type" in fields and not blobs:
        return fields
    if len(blobs) != 1:
        raise ValueError(
            f"a quant state needs exactly one key '{BLOB}<quant_type>' or unpacked fields, got {sorted(qs_dict)}"
        )
    blob = qs_dict[blobs[0]]
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() > 65536:
        raise ValueError(
            f"{blobs[0]} must be one-dimensional uint8 of a few bytes, got {blob.dtype} {tuple(blob.shape)}"
        )
    try:
        text = bytes(blob.cpu().tolist()).decode("utf-8")
        rest = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{blobs[0]} is not UTF-8 JSON: {error}") from error
    if not isinstance(rest, dict) or rest.get("quant_type") != blobs[0].rpartition("__")[2]:
        raise ValueError(f"{blobs[0]} must be a JSON object of that quant_type, got {rest!r}")
    twice = sorted(set(rest) & set(fields))
    if twice:
        raise ValueError(f"{twice} are in the JSON of {blobs[0]} and beside it")
    return {**fields, **rest}


def _without_repetition(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"{key!r} is given twice")
        fields[key] = value
    return fields


def _tensor(fields: Mapping[str, Any], name: str, dtype: torch.dtype, numel: int | None) -> Tensor:
    value = fields[name]
    if not isinstance(value, Tensor) or value.dtype != dtype or (numel is not None and value.numel() != numel):
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be {dtype} with {numel} elements, got {found}")
    if dtype.is_floating_point and value.device.type != "meta" and not bool(value.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinite elements")
    return value


def _check_scales(name: str, scales: Tensor) -> None:
    if scales.device.type != "meta" and not bool((scales >= 0).all()):
        raise ValueError(f"{name} has scales that are negative")


def _require(condition: bool, name: str, allowed: Any, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _check_blocksize(name: str, blocksize: Any, numel: int) -> None:
    # Kernels pad to whole blocks: a size beyond bitsandbytes' largest and all there is to scale only asks for memory.
    most = max(4096, numel)
    _require(type(blocksize) is int and 1 <= blocksize <= most, name, f"an integer from 1 to {most}", blocksize)


def dtype_name(dtype: torch.dtype | None) -> str:
    """A dtype as files and reports write it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return bool(a == b)
