"""A packed 4-bit weight as a product sees it: what depends on the weight alone is done once.

A GPU multiplies one row by a weight in ten microseconds. Python takes a hundred to check the arguments, to view codes and scales
as the kernels want them, and to look up the compiled code; and a token is two hundred products. So a weight keeps the functions
in which its products ended, with its codes and scales bound to them. The next product with activations of the same layout is one
look-up and a call of compiled code.

What depends on the scales is kept with the quant state, also for codes that come from elsewhere each time, as FSDP gathers them;
the rest with the weight's parameter. It is void once an attribute of the state is assigned, and neither copied nor saved.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnbref import few_rows, fourbit, nested
from bnbref.arguments import bytes_needed, check_memory, check_tensors
from bnbref.blockwise import FLOATS, check_count, check_device, check_scales, in_rows
from bnbref.context import as_bytes, is_lazy, not_a_view, plain
from bnbref.joined_scales import memory_of
from bnbref.kernels import compile_enabled, tracing
from bnbref.quant_state import QuantState, present

Product = Callable[[Tensor, Tensor | None], Tensor]
"""`a @ W^T + bias`, of a and bias."""


class PackedWeight:
    """The codes of a weight, as a plain tensor, and the state that decodes them."""

    def __init__(self, codes: Tensor, state: QuantState) -> None:
        self.codes, self.state = codes, state
        self._of_state = None if tracing() else state.cache()
        # None stands for `multiply`, whose bound method would keep this object, and the codes, alive.
        self._products: dict[Any, Product | None] = {}
        self._rows: Tensor | None = None
        self._memory = [] if tracing() else _memory_of(self._tensors().values())

    def is_of(self, state: QuantState | None) -> bool:
        """Whether this is what was prepared from the state as it is now."""
        return state is self.state and state.cache() is self._of_state

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype, in the shape that was quantized: `QuantState.dequantize`."""
        self._check_memory()
        if tracing() or not compile_enabled() or type(self.codes) is not Tensor:
            return self.state.dequantize(self.codes, dtype)
        return self._decoded(dtype)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        """`decoded` where nobody traces and kernels are compiled, as where a product is prepared."""
        cache, key = self.state.cache(), (dtype, self.codes.device, self.codes.nbytes, torch.get_num_threads())
        decode = cache.get(key)
        if decode is not None:
            return decode(self)  # type: ignore[no-any-return]
        weight = self.state.dequantize(self.codes, dtype)
        if not captured(self.codes):
            # At the second call, as the state that an operator of a graph makes has only one.
            cache[key] = self._decoder(dtype) if key in cache else None
        return weight

    def multiply(self, a: Tensor, bias: Tensor | None) -> Tensor:
        """`a @ W^T + bias` without a gradient, in the order of the device's product."""
        if few_rows.are_few(a, self.state, bias):
            self._check_memory()
            self._check()
            return few_rows.multiply_few(a, self.codes, self.state, bias)
        weight = self.decoded(a.dtype)
        return not_a_view(F.linear(a, weight if weight.shape[1] == a.shape[-1] else weight.t(), bias))

    def _tensors(self) -> dict[str, Tensor]:
        """All that a product reads of the weight, by name."""
        state, second = self.state, self.state.state2
        scales = {"absmax": state.absmax, "offset": state.offset}
        if second is not None:
            scales |= {"state2.absmax": second.absmax, "state2.code": second.code}
        named = {f"quant_state.{name}": x for name, x in scales.items() if isinstance(x, Tensor)}
        return {"a quantized weight": self.codes, **named}

    def _check_memory(self) -> None:
        """ValueError if codes or scales have lost their memory, see `check_memory`."""
        for storage, needed in self._memory:  # and not their tensors, which takes longer
            if storage.nbytes() < needed:
                for name, x in self._tensors().items():
                    check_memory(name, x)

    def _check(self) -> None:
        """ValueError if the state is not one of these codes, as `fourbit.dequantize` says it, which few rows go without."""
        shape, absmax = present(self.state.shape, "shape"), self.state.absmax
        n, size = math.prod(shape), self.codes.nbytes
        if size != -(-n // 2):
            raise ValueError(f"packed must hold {-(-n // 2)} bytes for shape {tuple(shape)}, got {size}")
        check_tensors(absmax=absmax)
        check_device("packed", self.codes, absmax=absmax)
        blocksize, second = present(self.state.blocksize, "blocksize"), self.state.state2
        if second is None:
            check_scales("absmax", absmax, n, blocksize)
        else:
            check_count("absmax", absmax, n, blocksize)
            values, offset = present(second.code, "state2.code"), present(self.state.offset, "offset")
            nested.check(absmax, second.absmax, values, offset, present(second.blocksize, "state2.blocksize"))

    # ---- what is kept -----------------------------------------------------------------------------------------------

    def find_or_prepare(self, a: Tensor, bias: Tensor | None) -> Product | None:
        """The product that is prepared, and kept, for activations and a bias of this layout. None if they do not fit."""
        self._check_memory()
        if not a.data_ptr():  # none has been freed that has an address, nor all without one: some have no elements
            check_memory("A", a)
        if bias is not None and not bias.data_ptr():
            check_memory("bias", bias)
        try:
            return self._products[_product_key(a, bias)] or self.multiply
        except KeyError:
            return self._prepare(a, bias)

    def _prepare(self, a: Tensor, bias: Tensor | None) -> Product | None:
        shape = present(self.state.shape, "shape")
        others = self.codes if bias is None else bias
        fits = len(shape) == 2 and a.dim() > 0 and a.shape[-1] == shape[1] and a.dtype in FLOATS
        fits = fits and a.device == self.codes.device == others.device and not is_lazy(a)
        fits = fits and (bias is None or (_is_plain(bias) and bias.dtype == a.dtype and bias.shape == shape[:1]))
        if not fits or captured(a):
            return None
        self._check()
        if few_rows.are_few(a, self.state, bias):
            product = few_rows.prepared(a, self.codes, self.state, bias, self._scales())
        else:  # of an object of its own: a product that held this one would keep it, and the codes, alive
            product = _by_decoding(PackedWeight(self.codes, self.state), a.dtype)
            few_rows.compile_ahead(a, self.codes, self.state, bias)
        self._products[_product_key(a, bias)] = product
        return product or self.multiply

    def _scales(self) -> Callable[[], Tensor]:
        """The scales as float32 `[blocks]`, by `QuantState.scales`, but prepared where they are nested."""
        state, second = self.state, self.state.state2
        if second is None:
            return state.absmax.float
        values, blocksize = present(second.code, "state2.code"), present(second.blocksize, "state2.blocksize")
        rows, absmax2 = in_rows(state.absmax, blocksize), in_rows(second.absmax, 1).view(-1)
        arguments = (rows, absmax2, values, present(state.offset, "offset"))
        state.scales()  # which checks them
        code, blocks = nested.dequantize_nested.ready(arguments, {}), state.absmax.numel()
        given, given2 = state.absmax, second.absmax
        plainly = functools.partial(nested.dequantize, given, given2, values, arguments[3], blocksize)

        def in_place() -> bool:
            # A copy would not see a change in place, and `absmax.data = ` may give the scales other memory.
            return rows.data_ptr() == given.data_ptr() and absmax2.data_ptr() == given2.data_ptr()

        if code is None or not in_place():
            return plainly
        return lambda: code(arguments).view(-1)[:blocks] if in_place() else plainly()

    def _decoder(self, dtype: torch.dtype) -> Callable[["PackedWeight"], Tensor]:
        """`decoded` for a dtype, of any weight with this state and so many codes, prepared."""
        # The result is cached with the state, and so must not refer to it.
        state = self.state
        shape, blocksize = present(state.shape, "shape"), present(state.blocksize, "blocksize")
        n, width = shape.numel(), fourbit.row_blocks(blocksize)
        if n % (2 * width * blocksize) != 0:  # a padded row, or a single one
            return lambda weight: weight.state.dequantize(weight.codes, dtype)
        scales, bytes_of_row = self._scales(), width * blocksize // 2
        constants = {"blocksize": blocksize, "codebook": state.codebook, "dtype": dtype}
        code = fourbit.dequantize_rows.ready((self._in_rows(bytes_of_row), scales().view(-1, width)), constants)
        if code is None:
            return lambda weight: weight.state.dequantize(weight.codes, dtype)
        return lambda weight: code((weight._in_rows(bytes_of_row), scales().view(-1, width))).view(shape)

    def _in_rows(self, width: int) -> Tensor:
        if self._rows is not None:
            return self._rows
        rows = in_rows(as_bytes(self.codes), width)
        if rows.data_ptr() == self.codes.data_ptr():  # a copy would not see a change in place
            self._rows = rows
        return rows


def _memory_of(tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """The storages of tensors, each once, and how many bytes of it they need."""
    found: dict[int, tuple[torch.UntypedStorage, int]] = {}
    for tensor in tensors:
        storage, needed = tensor.untyped_storage(), bytes_needed(tensor)
        found[storage._cdata] = storage, max(needed, found.get(storage._cdata, (storage, 0))[1])
    return list(found.values())


def _by_decoding(weight: PackedWeight, dtype: torch.dtype) -> Product:
    """The product of more than a few rows of a dtype."""
    return lambda a, bias: not_a_view(F.linear(a, weight._decoded(dtype), bias))


def kept_weight(packed: Any, state: QuantState) -> PackedWeight:
    """The weight of a parameter of ours, which keeps it with all that is prepared of its products."""
    weight: PackedWeight | None = packed.products
    if weight is None or not weight.is_of(state):
        weight = packed.products = PackedWeight(plain(packed), state)
    return weight


def operator_arguments(state: QuantState) -> tuple[Any, ...]:
    """A quant state as the arguments of `torch.ops.bnbref.linear_4bit`. Dynamo traces every call in here, perhaps once for each
    layer of a model: so there are few calls."""
    second: tuple[Tensor, ...] = ()
    blocksize2, state2, book = 0, state.state2, present(state.quant_type, "quant_type")
    if state2 is not None:
        second = (state2.absmax, present(state2.code, "state2.code"), present(state.offset, "offset"))
        blocksize2 = present(state2.blocksize, "state2.blocksize")
    values = book if isinstance(book, str) else " ".join([str(value) for value in book.values])
    return state.absmax, second, tuple(state.shape or ()), present(state.blocksize, "blocksize"), blocksize2, values


def layer_arguments(state: QuantState) -> tuple[Any, ...]:
    """`operator_arguments` of a layer's weight, where the memory that nested scales share stands for all three tensors."""
    memory, arguments = memory_of(state), operator_arguments(state)
    return arguments if memory is None else (arguments[0], (memory,), *arguments[2:])


def _product_key(a: Tensor, bias: Tensor | None) -> Any:
    """All that the product of a weight depends on, but for the elements. That of many rows takes any number of them."""
    k = a.shape[-1] if a.dim() else 0
    rows = a.shape if a.numel() <= few_rows.MOST * k else k
    other = None if bias is None else (type(bias), is_lazy(bias), bias.dtype, bias.device, bias.shape, bias.stride())
    return rows, is_lazy(a), a.dtype, a.device, torch.get_num_threads(), other


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter) and not is_lazy(x)


def captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: what is made now has no values before the graph is replayed."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
