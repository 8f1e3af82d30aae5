"""The two quantized parameters, of four and of eight bits. What they have in common is in `bnbref.nn.quantized_parameter`."""

from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from bnbref import int8
from bnbref.arguments import check_bool, check_one_of, check_tensors, checked, dtype_name
from bnbref.blockwise import check_quantizable
from bnbref.checkpoint_weights import STORAGES
from bnbref.codebooks import Codebook, four_bit
from bnbref.functional import quantize_4bit
from bnbref.nn.quantized_parameter import DATA, QuantizedParameter, made
from bnbref.quant_state import QuantState


def _of_state(name: str, nested: bool = False) -> Any:
    """A read-only property for a field of the quant state, because FSDP finds what a key of a state dict names by getattr."""

    def get(self: "Params4bit") -> Any:
        state = self.quant_state
        if state is not None and nested:
            state = state.state2
        if state is None:
            needs = "has no scales in 8 bits (compress_statistics=False)" if nested else "is not quantized"
            raise AttributeError(f"this {type(self).__name__} {needs}: no {name}")
        return getattr(state, name)

    return property(get, doc=f"{name} of the {'nested ' * nested}quant state.")


class Params4bit(QuantizedParameter):
    """A weight in four bits: packed codes, `[bytes / itemsize, 1]` in the dtype `quant_storage`, and their `quant_state`.

    bnb_quantized: whether the data is packed codes. If it is False, the next `.to(device)` quantizes. blocksize: 64 by default.
    module: a layer whose attribute `quant_state` is set when this weight is quantized.

    >>> weight = Params4bit(torch.eye(8), quant_type="nf4", compress_statistics=False).to("cpu")
    >>> weight.shape, weight.dtype, weight.quant_state.shape, weight.absmax
    (torch.Size([32, 1]), torch.uint8, torch.Size([8, 8]), tensor([1.]))
    """

    quant_state: QuantState | None = None
    blocksize: int = 64
    compress_statistics: bool = True
    quant_type: str | Codebook = "fp4"
    quant_storage: torch.dtype = torch.uint8
    module: nn.Module | None = None
    bnb_quantized: bool = False

    def __new__(
        cls, data: Tensor | None = None, requires_grad: bool = False, quant_state: QuantState | None = None,
        blocksize: int | None = None, compress_statistics: bool = True, quant_type: str | Codebook = "fp4",
        quant_storage: torch.dtype = torch.uint8, module: nn.Module | None = None, bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> "Params4bit":  # fmt: skip
        """Unknown keywords are ignored: rebuilding from `__dict__` passes whatever other libraries left there.

        Raises ValueError for a quant_type that is no 4-bit codebook, and for a quant_storage other than uint8, int8 and the
        floats of 16 bits or more.

        Libraries merge an adapter by `Params4bit(merged, **old.__dict__).to(device)`. So data of the shape of the quant_state
        is a float weight and not quantized, whatever the other arguments say: codes have half a byte for each element.
        """
        four_bit(quant_type)
        check_one_of("quant_state", quant_state, QuantState, NoneType)
        check_bool("compress_statistics", compress_statistics)
        check_bool("bnb_quantized", bnb_quantized)
        if not bnb_quantized and quant_storage not in STORAGES:
            names = ", ".join(map(dtype_name, STORAGES))
            raise ValueError(
                f"quant_storage must be one of {names}, which a state dict may have, got {quant_storage!r}"
            )
        data = torch.empty(0) if data is None else data
        self = made(cls, data, requires_grad)
        if quant_state is not None and data.shape == quant_state.shape and data.nbytes != quant_state.code_bytes:
            quant_state, bnb_quantized = None, False
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    @checked
    def from_prequantized(
        cls, data: Tensor, quantized_stats: Mapping[str, Any], requires_grad: bool = False,
        device: torch.device | str | None = None, module: nn.Module | None = None, **kwargs: Any,
    ) -> "Params4bit":  # fmt: skip
        """A weight from its packed codes, `data`, and what is beside them in a state dict, `quantized_stats`.

        device: where both are to be; by default where the codes are. quant_type, blocksize, nesting and shape are those of
        quantized_stats. Raises ValueError if they are not whole, or do not fit the number of bytes.
        """
        data = data.detach().to(data.device if device is None else device)
        state = QuantState.from_dict(quantized_stats, device=data.device)
        if state.shape is not None and data.nbytes != state.code_bytes:
            raise ValueError(
                f"data must hold {state.code_bytes} bytes for a weight of shape {tuple(state.shape)}, got {data.nbytes}"
            )
        if module is not None:
            module.quant_state = state  # type: ignore[assignment]
        return cls.of_codes(data, state, requires_grad, module)

    @classmethod
    def of_codes(
        cls, data: Tensor, state: QuantState, requires_grad: bool = False, module: nn.Module | None = None
    ) -> "Params4bit":
        """A weight from its packed codes and the state that they are decoded by."""
        return cls(
            data, requires_grad, state, state.blocksize, state.nested, state.quant_type, data.dtype, module, bnb_quantized=True
        )  # fmt: skip

    def holds_codes(self) -> bool:
        """Whether the data is packed codes."""
        return self.bnb_quantized

    def unquantized(self, weight: Tensor) -> "Params4bit":
        """A parameter with this float weight, and the quant_type, blocksize, nesting and storage of this one."""
        return self._like_this(weight, quant_state=None, bnb_quantized=False)

    def _quantized(self, weight: Tensor) -> "Params4bit":
        check_quantizable("a weight", weight, four_bit(self.quant_type).name)
        packed, state = quantize_4bit(
            weight,
            blocksize=self.blocksize,
            compress_statistics=bool(self.compress_statistics),
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        if self.module is not None:
            self.module.quant_state = state  # type: ignore[assignment]
        return self._like_this(packed, quant_state=state, bnb_quantized=True)

    def _scales(self, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {"quant_state": None if self.quant_state is None else self.quant_state.map(function)}

    def _take(self, value: Tensor) -> None:
        state, given = self.quant_state, value.numel() * value.itemsize  # `nbytes` fails in a graph whose sizes vary
        n_bytes = -(-state.shape.numel() // 2) if state is not None and state.shape is not None else given
        # Without elements: DeepSpeed frees a weight so, until it is needed. A row of fewer floats: FSDP1, which flattens floats
        # alone, leaves so much of a weight on a rank between its forward passes.
        freed = given == 0 or (value.dim() == 1 and given < n_bytes and value.is_floating_point())
        if value.dtype != self.dtype or not (freed or given == n_bytes):
            raise TypeError(
                f"the data of a quantized Params4bit are codes in {self.dtype}, got {value.dtype}, {given} bytes for "
                f"{n_bytes}: assign a Params4bit, or set bnb_quantized to False first, so that the float weight is quantized by "
                "the next move to a device"
            )

    def _scales_of_piece(self, view: Tensor, first: int) -> dict[str, Any] | None:
        state = self.quant_state
        if state is None or state.shape is None or state.blocksize is None:
            return None
        start, n = 2 * first * view.itemsize, state.shape.numel()
        # Not `nbytes`, which in a graph of torch 2.15 is an error where sizes vary.
        stop = min(start + 2 * view.numel() * view.itemsize, n)
        if start % state.blocksize != 0 or (stop % state.blocksize != 0 and stop != n):
            return None
        row = state.shape[1:].numel()
        rows = (start % row, stop % row) == (0, 0)
        shape = torch.Size([(stop - start) // row, *state.shape[1:]] if rows else [stop - start])
        absmax = state.scales()[start // state.blocksize : -(-stop // state.blocksize)].clone()
        own = QuantState(absmax, shape, state.code, state.blocksize, state.quant_type, state.dtype)
        return {"quant_state": own, "compress_statistics": False}

    absmax = _of_state("absmax")
    code = _of_state("code")
    quant_map = _of_state("code")
    offset = _of_state("offset")
    state2 = _of_state("state2")
    nested_absmax = _of_state("absmax", nested=True)
    nested_quant_map = _of_state("code", nested=True)
    nested_blocksize = _of_state("blocksize", nested=True)
    nested_dtype = _of_state("dtype", nested=True)
    nested_offset = _of_state("offset")


# ---- eight bits -----------------------------------------------------------------------------------------------------


class Int8Params(QuantizedParameter):
    """A weight in eight bits: int8 codes `[n, k]`, and `SCB`, the float32 absmax of each row `[n]`.

    CB: the codes, which are the data if that is int8. has_fp16_weights: whether the weight stays float when it is moved.

    >>> weight = Int8Params(torch.tensor([[1.0, -0.5]]), requires_grad=False).to("cpu")
    >>> weight.CB, weight.SCB
    (tensor([[127, -64]], dtype=torch.int8), tensor([1.]))
    """

    SCB: Tensor | None = None
    has_fp16_weights: bool = False

    def __new__(
        cls, data: Tensor | None = None, requires_grad: bool = True, has_fp16_weights: bool = False,
        CB: Tensor | None = None, SCB: Tensor | None = None, **kwargs: Any,
    ) -> "Int8Params":  # fmt: skip
        """The argument CB is not looked at: the codes are `data`, wherever that is int8. Unknown keywords are ignored."""
        check_bool("has_fp16_weights", has_fp16_weights)
        data = torch.empty(0) if data is None else data
        check_tensors(data=data)
        check_one_of("SCB", SCB, Tensor, NoneType)
        self = made(cls, data, requires_grad and data.is_floating_point())
        self.has_fp16_weights = has_fp16_weights
        self.SCB = SCB
        return self

    @property
    def CB(self) -> Tensor | None:
        """The codes; None if the weight is float. Assigning codes sets the data; assigning None does nothing."""
        return self.data if self.dtype == torch.int8 else None

    @CB.setter
    def CB(self, value: Tensor | None) -> None:
        if value is not None:
            if value.dtype != torch.int8:
                raise TypeError(f"CB must be int8 codes, got {value.dtype}")
            with torch._C.DisableTorchFunctionSubclass():
                DATA.__set__(self, value)

    def _take(self, value: Tensor) -> None:
        # DeepSpeed assigns the codes to themselves, frees them by data without elements, and gives them back.
        freed = value.numel() == 0 or (self.numel() == 0 and self.SCB is not None and value.shape[:1] == self.SCB.shape)
        if value.dtype == self.dtype and (freed or torch.equal(value.to(self.device), self.data)):
            return
        if value.dtype == self.dtype and value.shape == self.shape:
            # Lightning quantizes a weight anew by `.data = codes` and then `.SCB = scales`. In between no product is computed.
            self.SCB = torch.empty(0, device=self.device)
            return
        # peft merges `codes + delta` into a layer that it takes for a float one.
        raise TypeError(
            f"int8 codes are assigned with their scales: assign an Int8Params, not a tensor of {value.dtype} {list(value.shape)}."
            " peft needs to know this layer to merge an adapter into it: bnbref.register_lora(config)"
        )

    def holds_codes(self) -> bool:
        """Whether the data is int8."""
        return self.dtype == torch.int8

    def to(self, *args: Any, **kwargs: Any) -> "Int8Params":
        """Like `QuantizedParameter.to`."""
        moved = super().to(*args, **kwargs)
        # accelerate calls `.to(0).to("cpu")` on codes that it has read, and then moves their `SCB`, which it sets only
        # afterwards. So codes without scales get the empty ones, which stand for those that are still to be set.
        if args == (0,) and moved.holds_codes() and moved.SCB is None:
            moved.SCB = torch.empty(0, device=moved.device)
        return moved

    def unquantized(self, weight: Tensor) -> "Int8Params":
        """A parameter with this float weight, without scales."""
        return self._like_this(weight, SCB=None)

    def _quantized(self, weight: Tensor) -> "Int8Params":
        if self.has_fp16_weights:
            return self._like_this(weight)
        check_quantizable("a weight", weight, "int8")
        codes, absmax, _ = int8.quantize(weight)
        return self._like_this(codes, SCB=absmax)

    def _scales(self, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {"SCB": None if self.SCB is None else function(self.SCB)}

    def _scales_of_piece(self, view: Tensor, first: int) -> dict[str, Any] | None:
        columns = self.shape[-1]
        if self.SCB is None or first % columns != 0 or view.shape[1:] != self.shape[1:]:
            return None
        row = first // columns
        return {"SCB": self.SCB[row : row + view.shape[0]].clone()}
