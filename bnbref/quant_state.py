"""QuantState: what is needed to undo a quantization, under bitsandbytes' names, in memory and in a state dict."""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnbref import fourbit, nested
from bnbref.arguments import checked, dtype_name
from bnbref.blockwise import check_float
from bnbref.codebooks import DYNAMIC, Codebook, four_bit, registered_name, value_table
from bnbref.state_fields import BLOB, DTYPES, checked_fields, largest_blocksize

T = TypeVar("T")


class QuantState:
    """The scales of a quantized tensor and what it was: bitsandbytes' attributes.

    absmax: float32 scales `[blocks]`, or their uint8 codes where `nested`. code: the values `[16]` or `[256]`.
    shape, dtype: of the original. blocksize. quant_type: a name, or a Codebook, which a dict holds once it is in
    `FOUR_BIT`. offset `[]` and state2 (itself a QuantState): double quantization.
    """

    _version: dict[str, bool] | None = None
    _cache: Any = None

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
        tracing = torch.compiler.is_dynamo_compiling()
        if tracing and "_version" in self.__dict__:
            torch._dynamo.graph_break("an attribute of a QuantState is assigned")  # so that the version is another
        super().__setattr__(name, value)
        if not tracing and self._version is not None:
            self._version["current"], self.__dict__["_version"] = False, None

    def version(self) -> dict[str, bool]:
        """`{"current": True}`, of which True becomes False as soon as an attribute is assigned (but not through `__dict__`)."""
        if self._version is None:
            self.__dict__["_version"] = {"current": True}
        return self._version  # type: ignore[return-value]

    def cache(self) -> dict[Any, Any]:
        """A dictionary for what is prepared from the state. It becomes another, empty one with another version of the state or of
        its state2. It is neither copied nor saved with the state."""
        version, version2 = self.version(), None if self.state2 is None else self.state2.version()
        if self._cache is None or self._cache[0] is not version or self._cache[1] is not version2:
            self.__dict__["_cache"] = version, version2, {}
        return self._cache[2]  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_version", "_cache")}

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

    def __repr__(self) -> str:
        """What it is of, without the numbers.

        >>> QuantState(torch.ones(2), torch.Size([4, 32]), blocksize=64, quant_type="nf4", dtype=torch.float16)
        QuantState(quant_type='nf4', shape=(4, 32), dtype=torch.float16, blocksize=64, nested=False)
        """
        kind = getattr(self.quant_type, "name", self.quant_type)
        shape = None if self.shape is None else tuple(self.shape)
        fields = f"quant_type={kind!r}, shape={shape}, dtype={self.dtype}, blocksize={self.blocksize}"
        return f"{type(self).__name__}({fields}, nested={self.nested})"

    @property
    def codebook(self) -> Codebook:
        """The 4-bit codebook that `quant_type` names."""
        if self.quant_type is None:
            raise ValueError("quant_type is None: this QuantState is not one of a 4-bit tensor")
        return four_bit(self.quant_type)

    @property
    def code_bytes(self) -> int:
        """The size in bytes of the packed 4-bit codes of the tensor."""
        return -(-present(self.shape, "shape").numel() // 2)

    def scales(self) -> Tensor:
        """The scales as float32 `[blocks]`, reconstructed where they are nested.  Exact."""
        if self.state2 is None:
            return check_float("absmax", self.absmax).float()
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
        codebook = self.codebook
        blocksize, shape = present(self.blocksize, "blocksize"), present(self.shape, "shape")
        return fourbit.dequantize(packed, self.scales(), codebook, blocksize, shape, dtype)

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

    @checked
    def to(self, device: torch.device | str | None) -> None:
        """Move to a device, in place, as bitsandbytes does; None moves nothing, as of a tensor.

        `map(lambda t: t.to(device))` leaves this one alone.
        """
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)

    @checked
    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state by bitsandbytes' keys; packed: tensors only, the rest as a JSON blob of uint8 bytes.

        A blocksize beyond the whole tensor is said as a smaller one, which makes the same single block: `from_dict` takes no
        other. Packed, ValueError for what no file has: a codebook that is not in `FOUR_BIT`, another dtype than float32, float16
        and bfloat16, nested scales in blocks of other sizes than 256.

        >>> from bnbref.functional import quantize_4bit
        >>> state = quantize_4bit(torch.ones(64), quant_type="nf4")[1]
        >>> bytes(state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].tolist()).decode()
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64]}'
        """
        quant_type, blocksize = registered_name(self.quant_type), self.blocksize
        if blocksize is not None and self.shape is not None:
            blocksize = min(blocksize, largest_blocksize(math.prod(self.shape)))
        full: dict[str, Any] = {
            "quant_type": quant_type,
            "absmax": self.absmax,
            "blocksize": blocksize,
            # The maps are one tensor for every layer; safetensors would refuse the shared memory.
            "quant_map": None if self.code is None else self.code.clone(),
            "dtype": dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            full |= {
                # In a layer it is a view of a longer piece of memory (`joined_scales`), which safetensors would refuse.
                "nested_absmax": self.state2.absmax.clone(),
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": present(self.state2.code, "state2.code").clone(),
                "nested_dtype": dtype_name(self.state2.dtype),
                "nested_offset": present(self.offset, "offset").item(),
            }
        if not packed or quant_type is None:
            return full
        if not isinstance(quant_type, str):
            raise ValueError(f"codebook {quant_type.name!r} must be entered in FOUR_BIT to be saved under its name")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"a file has a dtype of {sorted(DTYPES)}; that of this state is {self.dtype}")
        if self.state2 is not None and self.state2.blocksize != nested.BLOCKSIZE:
            raise ValueError(
                f"a file has scales in blocks of {nested.BLOCKSIZE}; state2.blocksize is {self.state2.blocksize}"
            )
        tensors = {key: value for key, value in full.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in full.items() if not isinstance(value, Tensor)}
        blob = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
        return {**tensors, BLOB + quant_type: blob}

    @classmethod
    @checked
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
        own, second = checked_fields(qs_dict)
        state = cls(**own, state2=None if second is None else cls(**second))
        state.to(device)
        return state


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
        scales, offset, state2 = quantize_scales(scales)
    name, code = registered_name(book), value_table(book, x.device).clone()  # a state's own, which may be written to
    return packed, QuantState(scales, x.shape, code, blocksize, name, x.dtype, offset, state2)


def quantize_scales(scales: Tensor, blocksize: int = nested.BLOCKSIZE) -> tuple[Tensor, Tensor, QuantState]:
    """The codes of scales, `nested.quantize`, and the two fields of a QuantState that undo it: offset and state2."""
    codes, absmax2, offset = nested.quantize(scales, blocksize)
    values = value_table(DYNAMIC, scales.device).clone()
    return codes, offset, QuantState(absmax2, code=values, blocksize=blocksize, dtype=torch.float32)


def present(value: T | None, name: str) -> T:
    """The value of a field of a QuantState that this operation cannot do without."""
    if value is None:
        raise ValueError(f"this operation needs the quant state's {name}, which is None")
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return bool(a == b)
