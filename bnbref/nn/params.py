"""Quantized parameters: a parameter whose data are codes, with their scales as plain attributes.

    float weight  --.to(device)-->  quantized weight  --.to(device)-->  quantized weight elsewhere

A move to a device, `.to(device)`, quantizes a weight that is not quantized yet; a move to the meta device does not. `.to` returns
a new parameter with scales of its own and does not change the old one. The Hugging Face libraries rebuild parameters as
`cls(data, **old.__dict__)`, so every attribute has the name of the constructor's keyword.

The elements of a quantized weight are bytes, in a tensor of some dtype. A cast of them would be wrong, and is refused.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnbref import int8
from bnbref.codebooks import Codebook, four_bit
from bnbref.functional import quantize_4bit
from bnbref.kernels import once, tracing
from bnbref.nn.codes import Watched
from bnbref.quant_state import QuantState

Self = TypeVar("Self", bound="QuantizedParameter")

_DATA: Any = torch.Tensor.data

_CUTS = {"chunk", "split", "split_with_sizes", "tensor_split", "narrow", "view", "reshape", "flatten", "__getitem__"}


def in_bytes(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Applies `function` to the bytes of a tensor, so that it can move or share them but not cast them; TypeError if it tries.

    >>> in_bytes(lambda t: t.half() if t.is_floating_point() else t.clone(), torch.tensor([1.5]))
    tensor([1.5000])
    """
    moved = function(tensor.detach().reshape(-1).view(torch.uint8))
    if moved.dtype != torch.uint8:
        raise TypeError(f"a quantized weight is bytes, which cannot become {moved.dtype}: dequantize it first")
    return moved.view(tensor.dtype).view(tensor.shape)


class QuantizedParameter(Watched, nn.Parameter):
    """A parameter whose attributes follow it when it is moved, copied, pickled, shared and cut into pieces.

    products: what `products.matmul_4bit` keeps of this weight. It is a slot, because it must not follow.
    """

    __slots__ = ("products",)

    @property
    def data(self) -> Tensor:
        """The codes, or the float weight, as a plain tensor: torch asks its type. Assigning another quantized parameter, or what
        was detached from one, takes over its scales too."""
        with torch._C.DisableTorchFunctionSubclass():
            return _DATA.__get__(self)  # type: ignore[no-any-return]

    # nn.Module moves a parameter by `param.data = fn(param)`. Without the attributes that would be half a move.
    @data.setter
    def data(self, value: Tensor) -> None:
        if self.holds_codes() and not isinstance(value, Watched):
            self._check_assigned(value)
        self.products = None
        with torch._C.DisableTorchFunctionSubclass():
            _DATA.__set__(self, value)
        if isinstance(value, Watched):
            self.__dict__.update(value.__dict__)

    def _check_assigned(self, value: Tensor) -> None:
        """Raises TypeError if a plain tensor cannot take the place of the codes."""
        raise NotImplementedError

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Like the method of Tensor; but codes have no gradient and stay frozen, with a warning. It is no error, so that
        `model.requires_grad_()` works and sets all that can be trained."""
        if requires_grad and self.holds_codes():
            warnings.warn(
                "a quantized weight stays frozen: its codes are no numbers that a gradient could change. Train an adapter",
                stacklevel=2,
            )
            return self
        super().requires_grad_(requires_grad)
        return self

    def result_of(self, name: str, result: Any) -> Any:
        """The result of the function called `name`; pieces of the codes (a chunk, a slice) get the scales of their blocks."""
        if name not in _CUTS or not self.holds_codes():
            return super().result_of(name, result)
        if isinstance(result, (list, tuple)):
            return type(result)(map(self._piece, result))
        return self._piece(result)

    def _piece(self, view: Any) -> Any:
        same_dtype = isinstance(view, Tensor) and view.dtype == self.dtype
        if not same_dtype or not view.is_contiguous() or view.numel() == 0:
            return view
        if view.numel() == self.numel():
            return self._like_this(view)
        scales = self._scales_of_piece(view, view.storage_offset() - self.storage_offset())
        return view if scales is None else self._like_this(view, **scales)

    def _scales_of_piece(self, view: Tensor, first: int) -> dict[str, Any] | None:
        """The scales of a contiguous view that begins at element `first`, by attribute; None if a block is only partly in it."""
        raise NotImplementedError

    def unquantized(self: Self, weight: Tensor) -> Self:
        """A parameter with this float weight, which a move will quantize in the format of this one."""
        raise NotImplementedError

    def _quantized(self: Self, weight: Tensor) -> Self:
        raise NotImplementedError

    def _scales(self, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The attributes that hold scales, by name, with `function` applied to each tensor."""
        raise NotImplementedError

    def _like_this(self: Self, data: Tensor, **changed: Any) -> Self:
        # requires_grad replaces what may be in __dict__ under that name: accelerate writes its keywords there.
        attributes = {**self.__dict__, **changed, "requires_grad": self.requires_grad and data.is_floating_point()}
        return type(self)(data, **attributes)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Moves the parameter. A float weight that is moved to a device, the meta device excepted, is quantized there.

        Raises ValueError if that weight has NaN or infinite elements, and TypeError for a cast of a quantized weight.
        """
        # When accelerate offloads int8 weights, it moves them to device 0 and back to the CPU, even if there is no device 0.
        if args and type(args[0]) is int and not torch.accelerator.is_available():
            args = ("cpu", *args[1:])
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if self.holds_codes():
            if dtype not in (None, self.dtype):
                raise TypeError(
                    f"a quantized {type(self).__name__} cannot become {dtype}: its {self.dtype} elements are codes, "
                    "not numbers. Dequantize it, or cast the activations"
                )
            moved = self.data.to(*args, **kwargs)
            # The move to meta is how offloading frees a weight. The scales stay: they are small, and needed to load it again.
            meta = moved.device.type == "meta"
            return self._like_this(moved, **({} if meta else self._scales(lambda t: t.to(moved.device))))
        moved = self.data.to(*args, **kwargs)
        if device is None or device.type == "meta":
            return self._like_this(moved)
        with once():
            return self._quantized(moved)

    def applied(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        """The parameter, with its attributes, that `nn.Module._apply(function)` is to put in the place of this one."""
        if self.holds_codes():
            moved = in_bytes(function, self.data)
            meta = moved.device.type == "meta"
            return self._like_this(moved, **({} if meta else self._scales(lambda t: in_bytes(function, t))))
        moved = function(self)
        return moved if isinstance(moved, type(self)) else self._like_this(moved)

    def cpu(self: Self, *args: Any, **kwargs: Any) -> Self:
        """`.to("cpu")`."""
        return self.to("cpu", *args, **kwargs)

    def cuda(self: Self, device: Any = None, non_blocking: bool = False) -> Self:  # type: ignore[override]
        """`.to("cuda")`."""
        return self.to(_numbered("cuda", device), non_blocking=non_blocking)

    def xpu(self: Self, device: Any = None, non_blocking: bool = False) -> Self:  # type: ignore[override]
        """`.to("xpu")`."""
        return self.to(_numbered("xpu", device), non_blocking=non_blocking)

    def half(self: Self, *args: Any, **kwargs: Any) -> Self:
        """`.to(torch.float16)`."""
        return self.to(torch.float16)

    def bfloat16(self: Self, *args: Any, **kwargs: Any) -> Self:
        """`.to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def float(self: Self, *args: Any, **kwargs: Any) -> Self:
        """`.to(torch.float32)`."""
        return self.to(torch.float32)

    def double(self: Self, *args: Any, **kwargs: Any) -> Self:
        """`.to(torch.float64)`."""
        return self.to(torch.float64)

    def share_memory_(self: Self) -> Self:
        """Moves codes and scales to shared memory, in place."""
        super().share_memory_()  # type: ignore[no-untyped-call]
        self._scales(lambda t: t.share_memory_())
        return self

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        new = memo[id(self)] = type(self)(self.data.clone(), self.requires_grad)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.requires_grad), self.__dict__.copy()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


def _numbered(device_type: str, device: Any) -> torch.device:
    if device is None:
        return torch.device(device_type)
    return torch.device(device_type, device) if isinstance(device, int) else torch.device(device)


def _rebuild(cls: type[QuantizedParameter], data: Tensor, requires_grad: bool) -> QuantizedParameter:
    return cls(data, requires_grad)


def check_finite(name: str, weight: Tensor, quant_type: str) -> None:
    """Raises ValueError if a weight that is to be quantized has NaN or infinite elements."""
    if weight.numel() == 0 or weight.device.type == "meta" or tracing():
        return
    low, high = weight.aminmax()  # both are NaN if any element is
    if not bool(low.isfinite() & high.isfinite()):
        count = int((~weight.isfinite()).sum())
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} cannot become {quant_type}: {count} of its elements are NaN or infinite"
        )


# ---- four bits ------------------------------------------------------------------------------------------------------


def _of_state(name: str, nested: bool = False) -> Any:
    """A read-only property for a field of the quant state, because FSDP finds what a key of a state dict names by getattr."""

    def get(self: "Params4bit") -> Any:
        state = self.quant_state
        if state is not None and nested:
            state = state.state2
        if state is None:
            raise AttributeError(f"this {type(self).__name__} is not quantized{', or not twice' * nested}: no {name}")
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
        """Unknown keywords are ignored: rebuilding from `__dict__` passes whatever other libraries left there."""
        four_bit(quant_type)
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        self.products = None
        return self

    @classmethod
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
        check_finite("a weight", weight, four_bit(self.quant_type).name)
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

    def _check_assigned(self, value: Tensor) -> None:
        state = self.quant_state
        n_bytes = -(-state.shape.numel() // 2) if state is not None and state.shape is not None else value.nbytes
        # Without elements: DeepSpeed frees a weight so, until it is needed.
        if value.dtype != self.dtype or value.nbytes not in (0, n_bytes):
            raise TypeError(
                f"the data of a quantized Params4bit are codes in {self.dtype}, got {value.dtype}, {value.nbytes} bytes for "
                f"{n_bytes}: assign a Params4bit, or set bnb_quantized to False first, so that the float weight is quantized by "
                "the next move to a device"
            )

    def _scales_of_piece(self, view: Tensor, first: int) -> dict[str, Any] | None:
        state = self.quant_state
        if state is None or state.shape is None or state.blocksize is None:
            return None
        start, n = 2 * first * view.itemsize, state.shape.numel()
        stop = min(start + 2 * view.nbytes, n)
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
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad and data.is_floating_point())
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
                _DATA.__set__(self, value)

    def _check_assigned(self, value: Tensor) -> None:
        # peft merges `codes + delta` into a layer that it takes for a float one.
        raise TypeError(
            f"int8 codes are assigned with their scales: assign an Int8Params, not a tensor of {value.dtype}. peft needs to "
            "know this layer to merge an adapter into it: bnbref.register_lora(config)"
        )

    def holds_codes(self) -> bool:
        """Whether the data is int8."""
        return self.dtype == torch.int8

    def to(self, *args: Any, **kwargs: Any) -> "Int8Params":
        """As `QuantizedParameter.to`."""
        moved = super().to(*args, **kwargs)
        # accelerate calls `.to(0).to("cpu")` on codes that it has read, and then moves their `SCB`, which it sets only
        # afterwards. So codes without scales get an empty placeholder.
        if args == (0,) and moved.holds_codes() and moved.SCB is None:
            moved.SCB = torch.empty(0, device=moved.device)
        return moved

    def unquantized(self, weight: Tensor) -> "Int8Params":
        """A parameter with this float weight, without scales."""
        return self._like_this(weight, SCB=None)

    def _quantized(self, weight: Tensor) -> "Int8Params":
        if self.has_fp16_weights:
            return self._like_this(weight)
        check_finite("a weight", weight, "int8")
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
