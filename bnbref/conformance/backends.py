"""Backends under test: bnbref itself, the real bitsandbytes in two ways, torchao, or any module of your own.

An adapter is an object whose functions are called as `operations` says. What it does not have is not implemented; for a single
case it may say so by raising `Unsupported`.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise, fourbit, functional, int8, linear4bit, linear8bit, nested, nn
from bnbref.codebooks import DYNAMIC, four_bit, value_table
from bnbref.conformance.operations import OPERATIONS, quant_state
from bnbref.conformance.optimizers import BLOCKSIZE
from bnbref.kernels import eager
from bnbref.optim import rules
from bnbref.optim import state as stepping
from bnbref.quant_state import BLOB, QuantState

Dtype = torch.dtype


class Unsupported(NotImplementedError):
    """The backend has no answer to this case, and says so: neither passed nor failed."""


class Backend:
    """A named set of functions. `versions` says what was tested.

    >>> sorted(Backend("mine", {"int8_matmul": lambda a, b: a @ b}).functions)
    ['int8_matmul']
    """

    def __init__(self, name: str, functions: object, packages: Sequence[str] = ()) -> None:
        """functions: a mapping, or an object (a module) with attributes of the operations' names."""
        find = functions.get if isinstance(functions, Mapping) else functools.partial(_attribute, functions)
        found = {op: find(op) for op in OPERATIONS}
        self.name = name
        self.functions: dict[str, Callable[..., Any]] = {op: f for op, f in found.items() if callable(f)}
        if not self.functions:
            raise ValueError(f"backend {name!r} has none of the operations {', '.join(OPERATIONS)}")
        self.versions = {package: _version(package) for package in ("torch", *packages)}


def _version(package: str) -> str:
    # The module's own word first: a fork may have the module's name under a distribution of another.
    found = getattr(importlib.import_module(package), "__version__", None)
    return str(found) if found else importlib.metadata.version(package)


def _attribute(functions: object, name: str) -> Any:
    return getattr(functions, name, None)


# ---- bnbref ---------------------------------------------------------------------------------------------------------


class Reference:
    """bnbref, compiled where it can be."""

    def quantize_blockwise(self, x: Tensor, values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        codes, state = functional.quantize_blockwise(x, values, blocksize=blocksize)
        return codes, state.absmax

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: Dtype
    ) -> Tensor:
        return blockwise.dequantize(codes, absmax, values, blocksize, dtype)

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
        packed, absmax = fourbit.quantize(x, four_bit(quant_type), blocksize)
        return packed.view(-1), absmax

    def dequantize_4bit(
        self, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: Dtype
    ) -> Tensor:
        return fourbit.dequantize(packed, absmax, four_bit(quant_type), blocksize, shape, dtype)

    def quantize_4bit_nested(self, x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        packed, absmax = fourbit.quantize(x, four_bit(quant_type), blocksize)
        return packed.view(-1), *nested.quantize(absmax)

    def dequantize_4bit_nested(
        self, packed: Tensor, codes: Tensor, absmax2: Tensor, offset: Tensor, values: Tensor, blocksize: int, quant_type: str,
        shape: Sequence[int], dtype: Dtype,
    ) -> Tensor:  # fmt: skip
        absmax = nested.dequantize(codes, absmax2, values, offset)
        return fourbit.dequantize(packed, absmax, four_bit(quant_type), blocksize, shape, dtype)

    def gemm_4bit(
        self,
        a: Tensor,
        packed: Tensor,
        absmax: Tensor,
        bias: Tensor | None,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
    ) -> Tensor:
        state = QuantState(absmax, shape=torch.Size(shape), blocksize=blocksize, quant_type=quant_type, dtype=a.dtype)
        return linear4bit.matmul_4bit(a, packed.view(-1, 1), state, bias=bias)

    def int8_quantize(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        codes, absmax, mask = int8.quantize(x, threshold)
        return codes, absmax, torch.empty(0, dtype=torch.int64) if mask is None else mask.nonzero().view(-1)

    def int8_matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return int8.multiply(a, b)

    def int8_mm_dequant(
        self, product: Tensor, row: Tensor, column: Tensor, bias: Tensor | None, dtype: Dtype
    ) -> Tensor:
        y = int8.dequantize_int8_product(int8.in_rows(product), row, column, bias, None, dtype=dtype)
        return y.view(product.shape)

    def int8_dequantize(self, codes: Tensor, absmax: Tensor) -> Tensor:
        return int8.dequantize(codes, absmax)

    def save_4bit(self, x: Tensor, blocksize: int, quant_type: str, nested: bool) -> dict[str, Tensor]:
        packed, state = functional.quantize_4bit(
            x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        return file_tensors(packed, state.as_dict(packed=True), quant_type)

    def load_4bit(
        self, packed: Tensor, absmax: Tensor, quant_map: Tensor, state: Tensor, quant_type: str,
        nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    ) -> Tensor:  # fmt: skip
        found = quant_state(absmax, quant_map, state, quant_type, nested_absmax, nested_quant_map)
        return functional.dequantize_4bit(packed.view(-1, 1), found)

    def gemm_4bit_backward(
        self, grad: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int]
    ) -> Tensor | None:
        state = QuantState(
            absmax, shape=torch.Size(shape), blocksize=blocksize, quant_type=quant_type, dtype=grad.dtype
        )
        a = grad.new_zeros(*grad.shape[:-1], shape[1]).requires_grad_()
        linear4bit.matmul_4bit(a, packed.view(-1, 1), state).backward(grad)
        return a.grad

    def int8_backward(self, a: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, weight = a.requires_grad_(), weight.requires_grad_()
        linear8bit.matmul(a, weight).backward(grad)
        return a.grad, weight.grad

    def evaluate_then_train(
        self, x: Tensor, grad: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, blocksize: int,
        quant_type: str, shape: Sequence[int],
    ) -> dict[str, Any]:  # fmt: skip
        return evaluate_then_train(nn, x, grad, packed, absmax, bias, blocksize, quant_type, shape)

    def optimizer_32bit(self, p: Tensor, g: Tensor, optimizer: str, **arguments: Any) -> dict[str, Tensor]:
        return self._step(RULES[optimizer], p, g, **arguments)

    def optimizer_8bit(
        self, p: Tensor, g: Tensor, optimizer: str, values1: Tensor, values2: Tensor | None, **arguments: Any
    ) -> dict[str, Tensor]:
        rule = RULES[optimizer]
        if optimizer in ("rmsprop", "adagrad") and bool((values1 < 0).any()):
            rule = SIGNED_SQUARES[optimizer]
        return self._step(rule, p, g, **arguments)

    def _step(self, rule: rules.Rule, p: Tensor, g: Tensor, *, step: int, max_unorm: float, gnorm_scale: float,
              **arguments: Any) -> dict[str, Tensor]:  # fmt: skip
        state = {key: x for key, x in arguments.items() if isinstance(x, Tensor)}
        betas = tuple(arguments[f"beta{i}"] for i in (1, 2, 3))
        group = {**arguments, "betas": betas, "t_alpha": None, "t_beta3": None}
        numbers = rule.coefficients(step, group)
        hyper = torch.tensor(list(numbers.values()), dtype=torch.float32, device=p.device)
        # A step is made in place: of copies.
        made = {"p": p.clone(), **{key: x.clone() for key, x in state.items()}}
        g = g if gnorm_scale == 1 else g * gnorm_scale
        max_norm = max_unorm if rule.clipped else 0.0
        stepping.step(rule, made["p"], g, made, numbers, hyper, blocksize=BLOCKSIZE, max_norm=max_norm)
        return made


RULES: dict[str, rules.Rule] = {
    "momentum": rules.SGD(), "lars": rules.LARS(), "adam": rules.Adam(), "lamb": rules.LAMB(), "lion": rules.Lion(),
    "rmsprop": rules.RMSprop(), "adagrad": rules.Adagrad(), "ademamix": rules.AdEMAMix(),
}  # fmt: skip


class _SignedRMSprop(rules.RMSprop):
    codebooks = (DYNAMIC, DYNAMIC)


class _SignedAdagrad(rules.Adagrad):
    codebooks = (DYNAMIC, DYNAMIC)


SIGNED_SQUARES: dict[str, rules.Rule] = {"rmsprop": _SignedRMSprop(), "adagrad": _SignedAdagrad()}
"""With the codebook that bitsandbytes has for them."""


def evaluate_then_train(
    module: Any, x: Tensor, grad: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, blocksize: int,
    quant_type: str, shape: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """The operation of that name, of a module that has bitsandbytes' Linear4bit and Params4bit."""
    values = value_table(four_bit(quant_type), absmax.device)
    state = QuantState(
        absmax, shape=torch.Size(shape), code=values, blocksize=blocksize, quant_type=quant_type, dtype=x.dtype
    )
    n, k = shape
    layer = module.Linear4bit(k, n, bias=bias is not None, compute_dtype=x.dtype, quant_type=quant_type, device="meta")
    # Repacking writes to what it was given.
    stats = {name: tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
    layer.weight = module.Params4bit.from_prequantized(
        data=packed.clone().view(-1, 1), quantized_stats=stats, requires_grad=False, device=x.device
    )
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.clone())
    with torch.no_grad():
        y = layer.eval()(x)
    given = x.clone().requires_grad_()
    layer.train()(given).backward(grad)
    file = layer.state_dict()
    return {
        "y": y, "grad_x": given.grad, "packed": file["weight"].view(torch.uint8).view(-1), "absmax": file["weight.absmax"],
    }  # fmt: skip


def file_tensors(packed: Tensor, file: Mapping[str, Tensor], quant_type: str) -> dict[str, Tensor]:
    """The tensors of a quantized weight in a file, by the kit's names."""
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    tensors = {"packed": packed.view(torch.uint8).view(-1), "state": file[BLOB + quant_type]}
    return {**tensors, **{name: file[name] for name in names if name in file}}


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with every kernel of bnbref eager."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with eager():
            return function(*args, **kwargs)

    return run


def _bnbref() -> Backend:
    return Backend("bnbref", Reference(), ("bnbref",))


def _bnbref_eager() -> Backend:
    made = Backend("bnbref-eager", Reference(), ("bnbref",))
    made.functions = {op: uncompiled(f) for op, f in made.functions.items()}
    return made


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"backend {package!r} needs the package {package}, which is not installed")


class BitsAndBytes:
    """The operators torch.ops.bitsandbytes, whatever kernel the device has for them; files by bitsandbytes.functional."""

    def __init__(self) -> None:
        self.package: Any = importlib.import_module("bitsandbytes")
        self.functional: Any = importlib.import_module("bitsandbytes.functional")

    def op(self, name: str, *args: Any, **kwargs: Any) -> Any:
        # Where a kernel falls back to torch code, bitsandbytes compiles that anew for every shape: minutes, the same results.
        with torch.compiler.set_stance("force_eager"):
            return getattr(torch.ops.bitsandbytes, name).default(*args, **kwargs)

    def quantize_blockwise(self, x: Tensor, values: Tensor, blocksize: int) -> Any:
        return self.op("quantize_blockwise", x, values, blocksize)

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: Dtype) -> Any:
        return self.op("dequantize_blockwise", codes, absmax, values, blocksize, dtype)

    def quantize_4bit(self, x: Tensor, blocksize: int, quant_type: str) -> Any:
        packed, absmax = self.op("quantize_4bit", x, blocksize, quant_type, torch.uint8)
        return packed.view(-1), absmax

    def dequantize_4bit(
        self, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: Dtype
    ) -> Any:
        return self.op("dequantize_4bit", packed.view(-1, 1), absmax, blocksize, quant_type, shape, dtype)

    def quantize_4bit_nested(self, x: Tensor, blocksize: int, quant_type: str) -> Any:
        packed, state = self.functional.quantize_4bit(
            x, blocksize=blocksize, quant_type=quant_type, compress_statistics=True
        )
        return packed.view(-1), state.absmax, state.state2.absmax, state.offset

    def dequantize_4bit_nested(
        self, packed: Tensor, codes: Tensor, absmax2: Tensor, offset: Tensor, values: Tensor, blocksize: int, quant_type: str,
        shape: Sequence[int], dtype: Dtype,
    ) -> Any:  # fmt: skip
        made = self.functional.QuantState
        inner = made(absmax=absmax2, code=values, blocksize=256, dtype=torch.float32)
        state = made(absmax=codes, shape=torch.Size(shape), blocksize=blocksize, quant_type=quant_type, dtype=dtype,
                     offset=offset, state2=inner)  # fmt: skip
        with torch.compiler.set_stance("force_eager"):
            return self.functional.dequantize_4bit(packed.view(-1, 1), state)

    def gemm_4bit(
        self,
        a: Tensor,
        packed: Tensor,
        absmax: Tensor,
        bias: Tensor | None,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
    ) -> Any:
        return self.op("gemm_4bit", a, packed.view(-1, 1), shape, absmax, blocksize, quant_type, bias)

    def int8_quantize(self, x: Tensor, threshold: float) -> Any:
        codes, absmax, columns = self.op("int8_vectorwise_quant", x, threshold)
        return codes, absmax, torch.empty(0, dtype=torch.int64) if columns is None else columns

    def int8_matmul(self, a: Tensor, b: Tensor) -> Any:
        return self.op("int8_linear_matmul", a, b)

    def int8_mm_dequant(self, product: Tensor, row: Tensor, column: Tensor, bias: Tensor | None, dtype: Dtype) -> Any:
        return self.op("int8_mm_dequant", product, row, column, dtype, bias)

    def int8_dequantize(self, codes: Tensor, absmax: Tensor) -> Any:
        return self.op("int8_vectorwise_dequant", codes, absmax)

    def save_4bit(self, x: Tensor, blocksize: int, quant_type: str, nested: bool) -> Any:
        packed, state = self.functional.quantize_4bit(
            x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        return file_tensors(packed, state.as_dict(packed=True), quant_type)

    def load_4bit(
        self, packed: Tensor, absmax: Tensor, quant_map: Tensor, state: Tensor, quant_type: str,
        nested_absmax: Tensor | None, nested_quant_map: Tensor | None,
    ) -> Any:  # fmt: skip
        file = {"absmax": absmax, "quant_map": quant_map, BLOB + quant_type: state}
        if nested_absmax is not None and nested_quant_map is not None:
            file |= {"nested_absmax": nested_absmax, "nested_quant_map": nested_quant_map}
        found = self.functional.QuantState.from_dict(file, device=absmax.device)
        with torch.compiler.set_stance("force_eager"):
            return self.functional.dequantize_4bit(packed.view(-1, 1), found)

    def gemm_4bit_backward(
        self, grad: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int]
    ) -> Any:
        state = self.functional.QuantState(
            absmax=absmax, shape=torch.Size(shape), blocksize=blocksize, quant_type=quant_type, dtype=grad.dtype
        )
        a = grad.new_zeros(*grad.shape[:-1], shape[1]).requires_grad_()
        with torch.compiler.set_stance("force_eager"):
            self.package.matmul_4bit(a, packed.view(-1, 1), state).backward(grad)
        return a.grad

    def int8_backward(self, a: Tensor, weight: Tensor, grad: Tensor) -> Any:
        a, weight = a.requires_grad_(), weight.requires_grad_()
        state = self.package.MatmulLtState()
        state.is_training = state.has_fp16_weights = True
        self.package.matmul(a, weight, state=state).backward(grad)
        return a.grad, weight.grad

    def evaluate_then_train(
        self, x: Tensor, grad: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, blocksize: int,
        quant_type: str, shape: Sequence[int],
    ) -> Any:  # fmt: skip
        with torch.compiler.set_stance("force_eager"):
            return evaluate_then_train(self.package.nn, x, grad, packed, absmax, bias, blocksize, quant_type, shape)

    def optimizer_32bit(
        self, p: Tensor, g: Tensor, state1: Tensor, state2: Tensor | None, state3: Tensor | None, optimizer: str,
        max_unorm: float, gnorm_scale: float, **k: Any,
    ) -> dict[str, Any]:  # fmt: skip
        p, first, second = p.clone(), _stacked(state1, state3), None if state2 is None else state2.clone()
        # As its classes do.
        norm = float(p.float().norm()) if max_unorm > 0 else 0.0
        room = torch.zeros(1, device=p.device) if max_unorm > 0 else None
        self.op("optimizer_update_32bit", optimizer, g, p, first, second, room, max_unorm, norm, k["beta1"], k["beta2"],
                k["beta3"], k["alpha"], k["eps"], k["weight_decay"], k["step"], k["lr"], gnorm_scale, False)  # fmt: skip
        return {"p": p, **_unstacked(first, second, state3, "state")}

    def optimizer_8bit(
        self, p: Tensor, g: Tensor, state1: Tensor, absmax1: Tensor, values1: Tensor, state2: Tensor | None,
        absmax2: Tensor | None, values2: Tensor | None, state3: Tensor | None, absmax3: Tensor | None, optimizer: str,
        max_unorm: float, gnorm_scale: float, **k: Any,
    ) -> dict[str, Any]:  # fmt: skip
        # As its classes do: LAMB8bit and LARS8bit too leave max_unorm out, for which the operator has no argument.
        p, first, scale1 = p.clone(), _stacked(state1, state3), _stacked(absmax1, absmax3)
        second, scale2 = (None if x is None else x.clone() for x in (state2, absmax2))
        self.op("optimizer_update_8bit_blockwise", optimizer, g, p, first, second, k["beta1"], k["beta2"], k["beta3"],
                k["alpha"], k["eps"], k["step"], k["lr"], values1, values2, scale1, scale2, k["weight_decay"], gnorm_scale,
                False)  # fmt: skip
        states = _unstacked(first, second, state3, "state")
        return {"p": p, **states, **_unstacked(scale1, scale2, absmax3, "absmax")}


def _stacked(first: Tensor, third: Tensor | None) -> Tensor:
    """A copy; bitsandbytes has AdEMAMix' two averages in one tensor."""
    return first.clone() if third is None else torch.stack((first, third))


def _unstacked(first: Tensor, second: Tensor | None, third: Tensor | None, name: str) -> dict[str, Tensor]:
    made = {f"{name}1": first if third is None else first[0]}
    made |= {} if second is None else {f"{name}2": second}
    return made | ({} if third is None else {f"{name}3": first[1]})


class _Recorder:
    """Runs the module of bitsandbytes' default kernels anew and keeps what it would register: on CPU others shadow them."""

    def __init__(self) -> None:
        registry: Any = importlib.import_module("bitsandbytes._ops")
        name = "bitsandbytes.backends.default.ops"
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            raise ValueError(f"this bitsandbytes has no {name}: backend 'bitsandbytes-default' is for 0.46 and later")
        self.kernels: dict[str, Callable[..., Any]] = {}
        register, registry.register_kernel = registry.register_kernel, self._record
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        finally:
            registry.register_kernel = register

    def _record(self, name: str, key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def keep(kernel: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels[name.partition("::")[2]] = kernel
            return kernel

        return keep


class BitsAndBytesDefault(BitsAndBytes):
    """The kernels in torch that bitsandbytes falls back to, where the device has others too."""

    # These reach other operators by torch.ops, which gives the device's own kernels.
    gemm_4bit = quantize_4bit_nested = dequantize_4bit_nested = save_4bit = load_4bit = None  # type: ignore[assignment]
    gemm_4bit_backward = int8_backward = evaluate_then_train = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.kernels = _Recorder().kernels

    def op(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name not in self.kernels:
            raise Unsupported(f"bitsandbytes has no default kernel {name}")
        with torch.compiler.set_stance("force_eager"):
            return self.kernels[name](*args, **kwargs)


def _bitsandbytes() -> Backend:
    _require("bitsandbytes")
    return Backend("bitsandbytes", BitsAndBytes(), ("bitsandbytes",))


def _bitsandbytes_default() -> Backend:
    _require("bitsandbytes")
    return Backend("bitsandbytes-default", BitsAndBytesDefault(), ("bitsandbytes",))


# ---- torchao --------------------------------------------------------------------------------------------------------


class TorchAO:
    """torchao's optimizers: the blockwise 8 bits, and AdamW with them. (Its NF4 tensor left the package before 0.18.)"""

    def __init__(self) -> None:
        self.quant: Any = importlib.import_module("torchao.optim.quant_utils")
        self.adam: Any = importlib.import_module("torchao.optim.adam")
        self.state: Any = importlib.import_module("torchao.optim.subclass_8bit")

    def quantize_blockwise(self, x: Tensor, values: Tensor, blocksize: int) -> Any:
        if x.numel() % blocksize or x.numel() == 0:
            raise Unsupported("torchao keeps states of whole blocks alone in 8 bits")
        # Optimizer states are float32, and contiguous.
        scaled, absmax = self.quant.scale_tensor(x.float().contiguous(), blocksize)
        return self.quant.quantize_8bit_with_qmap(scaled, values), absmax

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, values: Tensor, blocksize: int, dtype: Dtype) -> Any:
        if codes.numel() % blocksize:
            raise Unsupported("torchao keeps states of whole blocks alone in 8 bits")
        return self.quant.dequant_with_qmap(codes, values, absmax).to(dtype)

    def optimizer_32bit(
        self, p: Tensor, g: Tensor, state1: Tensor, state2: Tensor | None, state3: Tensor | None, **k: Any
    ) -> dict[str, Any]:
        if k["optimizer"] != "adam" or state2 is None:
            raise Unsupported("torchao has Adam")
        made = {"p": p.clone(), "state1": state1.clone(), "state2": state2.clone()}
        self._adamw(made["p"], g, made["state1"], made["state2"], k)
        return made

    def optimizer_8bit(
        self, p: Tensor, g: Tensor, state1: Tensor, absmax1: Tensor, values1: Tensor, state2: Tensor | None,
        absmax2: Tensor | None, values2: Tensor | None, state3: Tensor | None, absmax3: Tensor | None, **k: Any,
    ) -> dict[str, Any]:  # fmt: skip
        if k["optimizer"] != "adam" or state2 is None or absmax2 is None or p.numel() % BLOCKSIZE:
            raise Unsupported("torchao has Adam, and states of whole blocks alone in 8 bits")
        p = p.clone()
        first = self.state.OptimState8bit(state1.clone(), absmax1.clone(), values1, True)
        second = self.state.OptimState8bit(state2.clone(), absmax2.clone(), values2, False)
        self._adamw(p, g, first, second, k)
        return {"p": p, "state1": first.codes, "absmax1": first.scale, "state2": second.codes, "absmax2": second.scale}

    def _adamw(self, p: Tensor, g: Tensor, first: Tensor, second: Tensor, k: Mapping[str, Any]) -> None:
        if k["gnorm_scale"] != 1:
            raise Unsupported("torchao's step does not scale the gradient")
        step, lr = (torch.tensor(float(k[name]), device=p.device) for name in ("step", "lr"))
        self.adam.single_param_adam(p, g, step, first, second, None, lr, k["beta1"], k["beta2"], k["weight_decay"], k["eps"],
                                    IS_ADAMW=True, BF16_STOCHASTIC_ROUND=False)  # fmt: skip


def _torchao() -> Backend:
    _require("torchao")
    return Backend("torchao", TorchAO(), ("torchao",))


# ---- the list -------------------------------------------------------------------------------------------------------

BACKENDS: dict[str, Callable[[], Backend]] = {
    "bnbref": _bnbref,
    "bnbref-eager": _bnbref_eager,
    "bitsandbytes": _bitsandbytes,
    "bitsandbytes-default": _bitsandbytes_default,
    "torchao": _torchao,
}
"""Backends that come with the kit."""


def load(name: str) -> Backend:
    """A backend of the kit by its name, or the module `package.module`, or `package.module:attribute`.

    >>> load("bnbref").name
    'bnbref'
    """
    if name in BACKENDS:
        return BACKENDS[name]()
    module_name, _, attribute = name.partition(":")
    try:
        module: ModuleType = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise
        raise ValueError(f"backend must be one of {sorted(BACKENDS)} or a module, got {name!r}: {error}") from error
    made = getattr(module, attribute) if attribute else module
    return made if isinstance(made, Backend) else Backend(name, made)
