"""What torch may do with a quantized weight, whose elements are codes and not numbers. Everything else raises.

    weight.add_(x), weight.lerp_(..), weight[0] = 1, weight.copy_(floats), nn.init.normal_(weight), torch._foreach_mul_(..)

would leave bytes that code something else, without an error. `weight.norm()`, `weight.mean()`, `F.normalize(weight)`,
`weight * 2` would give numbers that mean nothing. So they raise a ValueError. (Not a TypeError, which torch's operators turn
into NotImplemented, so that its message is lost.) Allowed is what `bytewise` lists, and nothing else of torch: questions,
copies of codes into codes of the same scales, views, what takes the bits of integers apart, and products of integer codes with
float scales. So a function that a later torch brings is refused. Dynamo traces all this: in a compiled function the same is
refused, when it is compiled.

What moves or cuts codes gives `Codes`, which are watched like the weight. Those of `weight.detach()` have its scales: a layer
in which they stand for the weight, as torch.func puts them there, computes with these scales and not with those of the weight
before. `weight.data`, and what numpy and C++ make of a weight, are plain: nobody sees a write through these.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnbref.context import plain
from bnbref.nn import bytewise

_IN_PLACE = {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
}
_GIVES_CODES = bytewise.CUTS | bytewise.MOVES | bytewise.CASTS | bytewise.JOINS | bytewise.SCALINGS


@functools.lru_cache(maxsize=1024)
def _only_asks(func: Callable[..., Any]) -> bool:
    """Whether a function reads no codes, but asks for a size, an address, a dtype; or is an operator of ours, which decodes them.

    A CUDA graph that is recorded asks ten such questions of each weight, and a compiled model calls an operator for each layer.
    """
    return bytewise.name_of(func) in bytewise.ASKS or getattr(func, "namespace", "") == "bnbref"


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
                return _in_graph(func, args, kwargs)
            given = args
            if Codes in types and isinstance(func, torch._ops.OpOverload):
                # An operator of a graph that was given codes. Modes in which torch checks a new graph take no subclass of Tensor,
                # and only `_make_subclass` is hidden from them.
                given = tuple(Tensor._make_subclass(Tensor, v) if isinstance(v, Codes) else v for v in args)
            if not kwargs and _only_asks(func):
                return func(*given)
            name = bytewise.name_of(func)
            _check(func, name, args, kwargs)
            if name == "equal" and len(args) == 2:
                return _equal(*given)
            result = func(*given, **kwargs)
            if not bytewise.is_torchs(func) or _gives_numbers(name, args, kwargs):
                return result
            first = _first(args, kwargs)
            source = (*_codes_in(first), first)[0]
            return source.result_of(name, result) if isinstance(source, Watched) else result

    def result_of(self, name: str, result: Any) -> Any:
        """The tensor that is returned instead of `result`, which the function called `name` gave for this one."""
        if not self.holds_codes() or name not in _GIVES_CODES:
            return result
        if name == "detach":
            return self.detached(result)
        if isinstance(result, (list, tuple)):
            return type(result)(self.result_of(name, piece) for piece in result)
        return self._still_codes(name, result) if type(result) is Tensor else result

    def _still_codes(self: Any, name: str, result: Tensor) -> Tensor:
        """The result of a function that gives codes, or ValueError if it is a cast that they do not survive."""
        if result.dtype == self.dtype or "view" in name:
            return result.as_subclass(type(self) if isinstance(self, Codes) else Codes)
        if self.is_floating_point() and not isinstance(self, FloatedCodes):
            _refuse(name, [self])
        return result.as_subclass(FloatedCodes) if result.is_floating_point() else result

    def detached(self, codes: Tensor) -> "Codes":
        """The same memory as `Codes` that have the attributes of this tensor, its scales among them."""
        result = codes.as_subclass(type(self) if isinstance(self, Codes) else Codes)
        result.__dict__.update((name, value) for name, value in self.__dict__.items() if name != "_is_param")
        return result

    def __format__(self, spec: str) -> str:
        """Like Tensor's. Codes add a sentence, because torch.func prints them in its error when it is given a state dict."""
        if not self.holds_codes():
            return super().__format__(spec)
        return (
            f"{plain(self)!r} (the codes of a quantized weight, whose scales a state dict has beside them: "  # type: ignore[arg-type]
            "give torch.func.functional_call dict(module.named_parameters()) in its place)"
        )


def _leave_to_python(function: Callable[..., Any]) -> None:
    """Tells Dynamo not to compile a function by itself; inside of a graph it still traces it.

    `torch._dynamo.skip` does the same, but imports torch._dynamo.
    """
    from torch._C._dynamo import eval_frame

    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)


def _in_graph(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What Dynamo traces of a function that was given a weight. The product of a layer is not among these functions.

    A ValueError makes Dynamo leave the function to Python, where it is raised again; with fullgraph=True Dynamo raises its own,
    which names it.
    """
    if not any(map(_codes_in, (*args, *kwargs.values()))):
        return func(*args, **kwargs)
    name = bytewise.name_of(func)
    if name not in bytewise.ASKS:
        _check(func, name, args, kwargs)
    result = func(*args, **kwargs)
    gives_codes = name in _GIVES_CODES and bytewise.is_torchs(func) and not _gives_numbers(name, args, kwargs)
    if not gives_codes or not _codes_in(_first(args, kwargs)):
        return result
    # Detached, as Dynamo makes no subclass of what it knows as an attribute, such as `weight.T`.
    if isinstance(result, (list, tuple)):
        return tuple([piece.detach().as_subclass(Codes) for piece in result])
    return result.detach().as_subclass(Codes) if isinstance(result, Tensor) else result


# Where Dynamo gives up a function that uses a weight, it tries those that are called in it one by one. Compiled by itself, this
# one is wrong: no guard looks at `func`, so that what was compiled for the dtype of a weight also answers for its shape.
_leave_to_python(Watched.__torch_function__)


class Codes(Watched, Tensor):
    """The codes of a quantized weight, detached from it, with its scales. A copy or a pickle of them is a plain tensor."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "Codes":
        """A parameter of these codes. nn.Parameter makes one of this class from codes, and accelerate, which moves what is
        offloaded, then makes the next one by `type(parameter)(data, requires_grad=...)`."""
        codes = plain(data)
        result: Any = data.detached(codes) if isinstance(data, Watched) else codes.as_subclass(cls)
        result.requires_grad_(requires_grad)
        result.__dict__["_is_param"] = True
        return result  # type: ignore[no-any-return]

    def holds_codes(self) -> bool:
        """Always True."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        codes = plain(self)
        # torch remembers the copy by the id of this tensor. Kept, as the copy module keeps what it copies, no other gets the id.
        memo.setdefault(id(memo), []).append(codes)
        return codes.__deepcopy__(memo)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)


class FloatedCodes(Codes):
    """Codes that were integers, in a float dtype: one product with scales away from numbers, and none yet."""


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of torch is to move or to cut, also by name."""
    return args[0] if args else kwargs.get("input", kwargs.get("tensors"))


def _codes_in(value: Any) -> list[Any]:
    """The codes among the values of an argument. (A list: Dynamo of torch 2.11 adds no generator to one.)"""
    values = value if isinstance(value, (list, tuple)) else (value,)
    return [tensor for tensor in values if isinstance(tensor, Watched) and tensor.holds_codes()]


def _check(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """ValueError if a function of torch would write into codes, or compute with them as numbers."""
    given = (*args, *kwargs.values())
    codes = [tensor for value in given for tensor in _codes_in(value)]
    if not codes:
        return
    first = given[0]
    in_place = name in _IN_PLACE or name in bytewise.COPIES or (name.endswith("_") and not name.endswith("__"))
    in_place = (in_place or bool(kwargs.get("inplace"))) and not kwargs.get("assign")  # of relu; of module_load
    written = _codes_in(first) if in_place and name not in bytewise.ASKS else []
    written += _codes_in(kwargs.get("out"))
    if name in bytewise.COPIES:
        place = bytewise.COPIES[name]
        source = args[place] if len(args) > place else kwargs.get("src", kwargs.get("other"))
        sources = source if isinstance(source, (list, tuple)) else [source]
        target = first[0] if isinstance(first, (list, tuple)) else first
        if all(isinstance(tensor, Tensor) and tensor.dtype == target.dtype for tensor in sources):
            _check_scales(name, written, sources)
            return
        written += _codes_in(source)
    elif not written and _computes(func, name, args, kwargs, codes):
        written = codes
    if name == "norm_except_dim" and written:
        _put_back(written[0])
    _refuse(name, written)


def _computes(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], codes: list[Any]
) -> bool:
    """Whether a function that writes into no codes takes those that are among its arguments for numbers."""
    given = (*args, *kwargs.values())
    others = [value for value in given if not any(value is tensor for tensor in codes)]
    if name in bytewise.OF_INTEGERS:
        integers = not any(tensor.is_floating_point() for tensor in codes)
        tensors = all(isinstance(other, Tensor) and not other.is_floating_point() for other in others)
        return not integers or (name in bytewise.EQUALITIES and not tensors)
    if name in bytewise.SCALINGS:
        kept = any(tensor.is_floating_point() and not isinstance(tensor, FloatedCodes) for tensor in codes)
        return kept or len(codes) > 1 or not all(_is_scale(name, other) for other in others)
    if name in bytewise.JOINS:
        joined = list(given[0])
        parameters = any(not isinstance(tensor, Codes) for tensor in codes)
        alike = all(tensor.dtype == codes[0].dtype for tensor in joined)
        return not alike or (parameters and len(codes) < len(joined))
    return name not in bytewise.ALLOWED and bytewise.is_torchs(func)


def _gives_numbers(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the result is not codes alone: a product or quotient with a tensor of scales, and not with a single Python number;
    or codes joined with other tensors. FSDP1 cuts the latter apart again, and the norm that was in it is numbers."""
    if name in bytewise.JOINS:
        joined = _first(args, kwargs)
        return len(_codes_in(joined)) < len(joined)
    return name in bytewise.SCALINGS and sum(isinstance(value, Tensor) for value in (*args, *kwargs.values())) > 1


def _is_scale(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, (int, float) if "div" in name else float)  # the quotient of two integers is a float


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors have the same bytes. As floats, codes that look like NaN would differ from themselves."""
    alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
    if alike and one.shape == other.shape and one.is_floating_point() and one.device == other.device:
        one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def _refuse(name: str, codes: list[Any]) -> None:
    """ValueError that names the function, if it was given codes."""
    if codes:
        kind = next((type(t).__name__ for t in codes if not isinstance(t, Codes)), "weight")
        raise ValueError(
            f"{name} takes the codes of a quantized {kind} for numbers: dequantize it, compute, and quantize the result anew "
            "(Linear4bit and Linear8bitLt have such weights; parameters that require a gradient are numbers)"
        )


def _check_scales(name: str, written: list[Any], sources: Any) -> None:
    """ValueError if codes are copied into codes that have other scales."""
    if len(written) != len(sources):
        return  # several to one, which torch refuses
    for target, source in zip(written, sources, strict=True):
        for scales in ("quant_state", "SCB"):
            here, there = getattr(target, scales, None), getattr(source, scales, None)
            if here is there or here is None or there is None:
                continue
            if not (torch.equal(here, there) if isinstance(here, Tensor) else here == there):
                raise ValueError(
                    f"{name} copies codes without their scales, and the {scales} of the two weights differs: assign the "
                    "parameter, or load the state dict of its layer"
                )


def _put_back(weight: Any) -> None:
    """Puts a weight back into its layer. torch's old weight_norm has removed it before it asks for the norm, which is refused."""
    asking = sys._getframe(3).f_locals  # beyond this function, `_check` and `__torch_function__`
    if asking.get("weight") is weight and isinstance(asking.get("module"), nn.Module):
        asking["module"]._parameters[asking["name"]] = weight
