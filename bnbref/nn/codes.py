"""Codes are bytes and not numbers: what torch may do to the memory of a quantized weight.

    weight.add_(x), weight.lerp_(..), weight[0] = 1, weight.copy_(floats), nn.init.normal_(weight), torch._foreach_mul_(..)

would leave bytes that code something else, without an error. So they raise a ValueError. (Not a TypeError, which torch's
operators turn into NotImplemented, so that its message is lost.) If the bytes are kept in a float dtype, arithmetic raises it
too, because the result would look like codes. What moves or reads bytes is allowed: copies of codes into codes, views,
comparisons.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bnbref.context import plain

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_OPERATORS = {f"__i{name}__" for name in _BINARY}
_COPIES = {"copy_": 1, "_foreach_copy_": 1, "__setitem__": 2}  # by name, which argument is the source
_NO_WRITES = {"requires_grad_", "detach_", "share_memory_", "rename_"}
_NAMES = ("add", "sub", "mul", "div", "lerp", "addcmul", "addcdiv")
_ARITHMETIC = {"norm_except_dim", *_NAMES, *(f"_foreach_{name}" for name in _NAMES)}
_ARITHMETIC |= {f"__{side}{name}__" for name in _BINARY[:4] for side in ("", "r")}
# What multiplies by a weight without asking its layer, as nn.MultiheadAttention does with its out_proj's.
_PRODUCTS = {"linear", "matmul", "mm", "multi_head_attention_forward", "__matmul__", "__rmatmul__"}


class Watched:
    """A mixin for subclasses of Tensor whose memory may be codes."""

    def holds_codes(self) -> bool:
        """Whether the data is codes and not floats."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():
                return func(*args, **kwargs)
            name = getattr(func, "__name__", "")
            if name != "__get__":
                _check(name.partition(".")[0], args, kwargs)
            result = func(*args, **kwargs)
            if not args or not isinstance(args[0], Watched):
                return result
            return args[0].result_of(name, result)

    def result_of(self, name: str, result: Any) -> Any:
        """What the function called `name`, applied to this tensor, is to return in place of `result`."""
        if name == "detach" and self.holds_codes():
            return result.as_subclass(Codes)  # so that writes to what was detached are noticed too
        return result


class Codes(Watched, Tensor):
    """The codes of a quantized weight, detached from it. A copy or a pickle of them is a plain tensor."""

    def holds_codes(self) -> bool:
        """Always True."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return plain(self).__deepcopy__(memo)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)


def _codes_in(value: Any) -> Iterator[Any]:
    for tensor in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(tensor, Watched) and tensor.holds_codes():
            yield tensor


def _check(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    first = args[0] if args else next(iter(kwargs.values()), None)
    in_place = name in _OPERATORS or name in _COPIES or (name.endswith("_") and not name.endswith("__"))
    written = list(_codes_in(first)) if in_place and name not in _NO_WRITES else []
    written += _codes_in(kwargs.get("out"))
    if written and name in _COPIES:
        place = _COPIES[name]
        source = args[place] if len(args) > place else kwargs.get("src", kwargs.get("other"))
        sources = source if isinstance(source, (list, tuple)) else [source]
        if all(isinstance(tensor, Tensor) and tensor.dtype == written[0].dtype for tensor in sources):
            return
    if not written and name in _ARITHMETIC | _PRODUCTS:
        of_any_dtype = name in _PRODUCTS or name == "norm_except_dim"  # the first function that weight_norm calls
        written = [t for value in args for t in _codes_in(value) if of_any_dtype or t.is_floating_point()]
    if written:
        kind = next((type(t).__name__ for t in written if not isinstance(t, Codes)), "weight")
        raise ValueError(
            f"{name} takes the codes of a quantized {kind} for numbers: dequantize it, compute, and quantize the result anew"
        )
