"""Backends under test: bnbref itself, the real bitsandbytes in two ways, other packages, or any module of your own.

A backend is a module, an object or a mapping with functions that are called as `operations` says. A function that is missing is
not implemented; where one has no answer to a single case it raises `Unsupported`.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from bnbref.conformance.operations import OPERATIONS

KNOWN = {
    "bnbref": "reference:Reference",
    "bnbref-eager": "reference:Eager",
    "bnbref-invariant": "reference:Invariant",
    "bitsandbytes": "bitsandbytes:BitsAndBytes",
    "bitsandbytes-default": "bitsandbytes_default:BitsAndBytesDefault",
    "bitsandbytes-cpu-fork": "bitsandbytes:Fork",
    "mps-bitsandbytes": "mps_bitsandbytes:MpsBitsAndBytes",
    "muon-optimizer": "optimizers:MuonOptimizer",
    "neural-compressor": "neural_compressor:NeuralCompressor",
    "nncf": "nncf:OpenVINO",
    "nvidia-modelopt": "modelopt:ModelOptimizer",
    "onnxruntime": "onnxruntime:OnnxRuntime",
    "optax": "optax:Optax",
    "pytorch-optimizer": "optimizers:PytorchOptimizer",
    "qwix": "qwix:Qwix",
    "schedulefree": "optimizers:ScheduleFree",
    "tinygrad": "tinygrad:TinyGrad",
    "torch-optim": "optimizers:TorchOptim",
    "torchao": "torchao:TorchAO",
    "torchao-nf4": "torchao_nf4:TorchAONF4",
    "transformers": "optimizers:Transformers",
}
"""The backends that come with the kit: a file of this folder, and the class in it whose methods are the operations.

The class has `packages`, the modules that it needs, and perhaps `within`, which makes the context of each call.
"""


class Unsupported(NotImplementedError):
    """The backend has no answer to this case, and says so: neither passed nor failed."""


class Backend:
    """A named set of functions. `versions` says what was tested.

    >>> sorted(Backend("mine", {"int8_matmul": lambda a, b: a @ b}).functions)
    ['int8_matmul']
    """

    def __init__(
        self, name: str, functions: object, packages: Sequence[str] = (),
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:  # fmt: skip
        """functions: a mapping, or an object (a module), of the operations' names; of an object, `product_of_ones(n, k)` is for
        order.py, where there is no `gemm_4bit`. within: makes the context of each call.

        Raises ValueError where there is none of the operations.
        """
        table = functions if isinstance(functions, Mapping) else {op: getattr(functions, op, None) for op in OPERATIONS}
        self.name = name
        found = {op: table.get(op) for op in OPERATIONS}
        self.product_of_ones: Callable[[int, int], Any] | None = getattr(functions, "product_of_ones", None)
        self.functions = {op: _in_context(function, within) for op, function in found.items() if callable(function)}
        if not self.functions:
            raise ValueError(f"backend {name!r} has none of the operations {', '.join(OPERATIONS)}")
        self.returned: list[tuple[Any, Any]] = []
        """The tensors that the last call returned, and copies of them: a later call may not write to them."""
        self.versions = {package: _version(package) for package in ("torch", *packages)}


def _in_context(function: Callable[..., Any], within: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with within():
            return function(*args, **kwargs)

    return run


def _version(package: str) -> str:
    # The module's own word first: a fork may have the module's name under a distribution of another.
    found = getattr(importlib.import_module(package), "__version__", None)
    if found:
        return str(found)
    # neural-compressor-pt has the module neural_compressor.
    names = importlib.metadata.packages_distributions().get(package, [package])
    return importlib.metadata.version(names[0])


def require(package: str) -> Any:
    """The module of that name. Raises ValueError where it is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"backend {package!r} needs the package {package}, which is not installed")
    return importlib.import_module(package)


def load(name: str) -> Backend:
    """A backend of the kit by its name, or the module `package.module`, or `package.module:attribute`. Of a class, an object.

    Raises ValueError for a name that is neither, or that has no operations; ImportError where the module cannot be imported.

    >>> load("bnbref").name
    'bnbref'
    """
    if name in KNOWN:
        file, _, adapter = KNOWN[name].partition(":")
        made = getattr(importlib.import_module(f"{__name__}.{file}"), adapter)
        for package in made.packages:
            require(package)
        return Backend(name, made(), made.packages, getattr(made, "within", nullcontext))
    module_name, _, attribute = name.partition(":")
    if not all(module_name.split(".")):  # importlib takes ".mine" for a part of another package
        raise ValueError(f"backend must be one of {sorted(KNOWN)} or a module, got {name!r}")
    if module_name.endswith(".py"):
        raise ValueError(f"backend must be the name of a module, as after import, got a file: {name!r}")
    try:
        module: ModuleType = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise
        raise ValueError(f"backend must be one of {sorted(KNOWN)} or a module, got {name!r}: {error}") from error
    found = getattr(module, attribute) if attribute else module
    found = found() if isinstance(found, type) else found
    return found if isinstance(found, Backend) else Backend(name, found)
