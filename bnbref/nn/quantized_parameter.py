"""A quantized parameter: its data are codes, and their scales are plain attributes.

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

from bnbref.arguments import check_tensors
from bnbref.kernels import once
from bnbref.nn.bytewise import CUTS
from bnbref.nn.codes import Watched
from bnbref.nn.graph_arguments import Owner

Self = TypeVar("Self", bound="QuantizedParameter")

DATA: Any = torch.Tensor.data
"""The attribute `data` as every tensor has it. That of a quantized parameter also checks what is assigned."""


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

    products: what `products.matmul_4bit` keeps of this weight. beside: what its last state dict had beside the codes. owner: of
    what a graph reads of it. They are slots, because they must not follow.
    """

    __slots__ = ("beside", "owner", "products")
    beside: Mapping[str, Tensor | None]
    owner: Owner
    products: Any

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("quant_state", "SCB"):
            self.owner.known.clear()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.owner.known.clear()

    @property
    def data(self) -> Tensor:
        """The codes, or the float weight, as a plain tensor: torch asks its type. Assigning another quantized parameter, or what
        was detached from one, takes over its scales too."""
        if torch.compiler.is_dynamo_compiling():
            return self.detach()  # Dynamo would look for this property in the attribute of Tensor, again and again
        with torch._C.DisableTorchFunctionSubclass():
            return DATA.__get__(self)  # type: ignore[no-any-return]

    # nn.Module moves a parameter by `param.data = fn(param)`. Without the attributes that would be half a move.
    @data.setter
    def data(self, value: Tensor) -> None:
        # Other codes than those that were detached from a weight, as copies of them, have no scales.
        scaled = isinstance(value, Watched) and not value.__dict__.keys().isdisjoint(("quant_state", "SCB"))
        if self.holds_codes() and not scaled:
            self._take(value)
        self.products = None
        with torch._C.DisableTorchFunctionSubclass():
            DATA.__set__(self, value)
        if scaled:
            self.beside = dict.fromkeys(self.beside)  # the names, and not the old scales
            self.owner.known.clear()
            self.__dict__.update(value.__dict__)

    def _take(self, value: Tensor) -> None:
        """Called before a plain tensor takes the place of the codes. Raises TypeError if it cannot; forgets what is not of it."""
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
        if name not in CUTS or not self.holds_codes() or not isinstance(result, Tensor):
            return super().result_of(name, result)
        piece = self._piece(result)
        return super().result_of(name, result) if piece is None else piece

    def _piece(self: Self, view: Tensor) -> Self | None:
        """A view of the codes as a parameter with the scales of its blocks; None if it has none of its own."""
        if view.dtype != self.dtype or not view.is_contiguous() or view.numel() == 0:
            return None
        if view.numel() == self.numel():
            return self._like_this(view)
        scales = self._scales_of_piece(view, int(view.storage_offset()) - int(self.storage_offset()))
        return None if scales is None else self._like_this(view, **scales)

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
        where = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, *_ = torch._C._nn._parse_to(*args, **where)
        if self.holds_codes():
            if dtype not in (None, self.dtype):
                raise TypeError(
                    f"a quantized {type(self).__name__} cannot become {dtype}: its {self.dtype} elements are codes, "
                    "not numbers. Dequantize it, or cast the activations"
                )
            moved = self.data.to(*args, **kwargs)
            # The move to meta is how offloading frees a weight. The scales stay: they are small, and needed to load it again.
            meta = moved.device.type == "meta"
            return self._like_this(
                moved, **({} if meta else self._scales(lambda t: t.to(moved.device, copy=kwargs.get("copy", False))))
            )
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

    # Not partial methods of this class's `to`: a subclass may have one of its own.
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
        return self.to(torch.float16, *args, **kwargs)

    def bfloat16(self: Self, *args: Any, **kwargs: Any) -> Self:
        """`.to(torch.bfloat16)`."""
        return self.to(torch.bfloat16, *args, **kwargs)

    def float(self: Self, *args: Any, **kwargs: Any) -> Self:
        """`.to(torch.float32)`."""
        return self.to(torch.float32, *args, **kwargs)

    def double(self: Self, *args: Any, **kwargs: Any) -> Self:
        """`.to(torch.float64)`."""
        return self.to(torch.float64, *args, **kwargs)

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


def made(cls: type[Self], data: Tensor, requires_grad: bool) -> Self:
    """The memory of data as a parameter. TypeError for a tensor that has none, as a FakeTensor or a DTensor."""
    check_tensors(data=data)
    try:
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
    except RuntimeError as error:
        if type(data) in (Tensor, nn.Parameter):
            raise
        raise TypeError(
            f"data of a {cls.__name__} must be a tensor with memory of its own, got a {type(data).__name__}: quantize plain "
            "tensors, and distribute or trace the layers then; a model without memory is built on the meta device"
        ) from error
    self.beside, self.owner, self.products = {}, Owner(), None
    return self


def _numbered(device_type: str, device: Any) -> torch.device:
    if device is None:
        return torch.device(device_type)
    return torch.device(device_type, device) if isinstance(device, int) else torch.device(device)


def _rebuild(cls: type[QuantizedParameter], data: Tensor, requires_grad: bool) -> QuantizedParameter:
    return cls(data, requires_grad)
