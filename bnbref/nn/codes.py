"""What torch may do with a quantized weight, whose elements are codes and not numbers. Everything else raises.

    weight.add_(x), weight.lerp_(..), weight[0] = 1, weight.copy_(floats), nn.init.normal_(weight), torch._foreach_mul_(..)

would leave bytes that code something else, without an error. So they raise a ValueError. (Not a TypeError, which torch's
operators turn into NotImplemented, so that its message is lost.) Sums, differences, products and quotients whose result would
look like codes raise it too: all of them if the bytes are kept in a float dtype, and of integers with integers, as
nn.utils.fuse_linear_bn_eval multiplies. So do norms, powers and magnitudes, of which penalties in a loss are made. What moves or
reads bytes is allowed: copies of codes into codes of the same scales, views, comparisons, codes times float scales. Inside of
torch.compile nothing is watched.

`weight.detach()` makes `Codes`: watched like the weight, and with its scales. A layer in which they stand for the weight, as
torch.func puts them there, computes with these scales and not with those of the weight before. `weight.data`, views, and what
numpy and C++ make of a weight are plain: nobody sees a write through these.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnbref.context import plain

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_OPERATORS = {f"__i{name}__" for name in _BINARY}
_COPIES = {"copy_": 1, "module_load": 1, "_foreach_copy_": 1, "__setitem__": 2}  # by name, which argument is the source
_NO_WRITES = {"requires_grad_", "detach_", "share_memory_", "rename_"}
_NAMES = ("add", "sub", "mul", "div", "lerp", "addcmul", "addcdiv")
_ALIASES = ("subtract", "multiply", "divide", "true_divide")
_ARITHMETIC = {*_NAMES, *_ALIASES, *(f"_foreach_{name}" for name in _NAMES)}
_ARITHMETIC |= {f"__{side}{name}__" for name in _BINARY[:4] for side in ("", "r")}
# Functions that multiply by a weight without asking its layer, as nn.MultiheadAttention does with its out_proj's; the first one
# that weight_norm calls; and torch.func.stack_module_state, whose result has no scales.
_ANY_DTYPE = {"linear", "matmul", "mm", "multi_head_attention_forward", "__matmul__", "__rmatmul__"}
_ANY_DTYPE |= {"norm_except_dim", "stack"}
# How large a weight is: a penalty in a loss, or a norm that is logged, over all parameters of a model.
_ANY_DTYPE |= {"abs", "absolute", "square", "pow", "__pow__", "float_power", "norm", "dist"}
_ANY_DTYPE |= {"linalg_norm", "linalg_vector_norm", "linalg_matrix_norm"}
_ANY_DTYPE |= {"_foreach_abs", "_foreach_norm", "_foreach_pow"}
# What gives pieces of the codes, or the codes themselves.
CUTS = {"chunk", "split", "split_with_sizes", "tensor_split", "narrow", "view", "reshape", "flatten", "__getitem__"}
_NAMED = {*_OPERATORS, *_COPIES, *_ARITHMETIC, *_ANY_DTYPE, *CUTS, "detach"}


@functools.lru_cache(maxsize=1024)
def _only_asks(func: Callable[..., Any]) -> bool:
    """Whether a function of torch neither writes codes nor computes with them nor returns them: it asks for a size, an address, a
    dtype. A CUDA graph that is recorded asks ten such questions of each weight."""
    name = getattr(func, "__name__", "").partition(".")[0]
    return name not in _NAMED and (name.endswith("__") or not name.endswith("_"))


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
            if torch.compiler.is_compiling() or (not kwargs and _only_asks(func)):
                return func(*args, **kwargs)
            name = getattr(func, "__name__", "")
            _check(name.partition(".")[0], args, kwargs)
            result = func(*args, **kwargs)
            if name in _ARITHMETIC:
                given = (*args, *kwargs.values())
                _refuse(name, [t for x in given for t in _codes_in(x) if t.dtype == getattr(result, "dtype", None)])
            if not args or not isinstance(args[0], Watched):
                return result
            return args[0].result_of(name, result)

    def result_of(self, name: str, result: Any) -> Any:
        """The tensor that is returned instead of `result`, which the function called `name` gave for this one."""
        return self.detached(result) if name == "detach" and self.holds_codes() else result

    def detached(self, codes: Tensor) -> "Codes":
        """The same memory as `Codes` that have the attributes of this tensor, its scales among them."""
        result = codes.as_subclass(Codes)
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


# Where Dynamo gives up a function that uses a weight, it tries those that are called in it one by one. Compiled by itself, this
# one is wrong: no guard looks at `func`, so that what was compiled for the dtype of a weight also answers for its shape.
_leave_to_python(Watched.__torch_function__)


class Codes(Watched, Tensor):
    """The codes of a quantized weight, detached from it, with its scales. A copy or a pickle of them is a plain tensor."""

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


def _codes_in(value: Any) -> Iterator[Any]:
    for tensor in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(tensor, Watched) and tensor.holds_codes():
            yield tensor


def _check(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """ValueError if torch's function of that name would write into codes, or compute with them as numbers."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    in_place = name in _OPERATORS or name in _COPIES or (name.endswith("_") and not name.endswith("__"))
    in_place = (in_place or bool(kwargs.get("inplace"))) and not kwargs.get("assign")  # of relu; of module_load
    written = list(_codes_in(first)) if in_place and name not in _NO_WRITES else []
    written += _codes_in(kwargs.get("out"))
    if kwargs.get("max_norm") is not None:  # of F.embedding, which scales rows of its weight in place
        written += [t for value in args for t in _codes_in(value)]
    if written and name in _COPIES:
        place = _COPIES[name]
        source = args[place] if len(args) > place else kwargs.get("src", kwargs.get("other"))
        sources = source if isinstance(source, (list, tuple)) else [source]
        if all(isinstance(tensor, Tensor) and tensor.dtype == written[0].dtype for tensor in sources):
            _check_scales(name, written, sources)
            return
    if not written and name in _ARITHMETIC | _ANY_DTYPE:
        given = (*args, *kwargs.values())
        written = [t for value in given for t in _codes_in(value) if name in _ANY_DTYPE or t.is_floating_point()]
    if name == "norm_except_dim" and written:
        _put_back(written[0])
    _refuse(name, written)


def _refuse(name: str, codes: list[Any]) -> None:
    """ValueError that names the function, if it was given codes."""
    if codes:
        kind = next((type(t).__name__ for t in codes if not isinstance(t, Codes)), "weight")
        raise ValueError(
            f"{name} takes the codes of a quantized {kind} for numbers: dequantize it, compute, and quantize the result anew"
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
