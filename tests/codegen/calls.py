"""Calls that use every registered kernel: those of `python -m bnbref check --self`, and of what it leaves out.

Each goes by way of a public function, so that a kernel is given what it is given on a GPU.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from conftest import as_on_gpu

import bnbref
from bnbref import few_rows, functional
from bnbref.kernels import Kernel
from bnbref.optim import rules
from bnbref.optim.equation import at_step
from bnbref.optim.master_weights import CORRECTIONS, split
from bnbref.optim.update import new_state, step
from bnbref.selfcheck import example
from bnbref.selfcheck.kernels import CHECKS, GROUP

CPU = torch.device("cpu")
X = example(CPU)


def _rows_times_weight() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for nested in (False, True):
            packed, state = functional.quantize_4bit(X.view(64, 256), quant_type="nf4", compress_statistics=nested)
            bnbref.matmul_4bit(X[:256].to(dtype), packed, state, bias=X[:64].to(dtype))


def _row_times_int8_weight() -> None:
    for threshold in (0.0, 1.0):
        bnbref.matmul(X[None, :256].half(), X.view(64, 256).half(), threshold=threshold, bias=X[:64].half())


def _bfloat16_parameters() -> None:
    """Rounded at random: all rules but the first take the same way."""
    for rule in (rules.Adam(), rules.AdEMAMix()):
        for bits in (8, 32):
            p = X[:700].bfloat16()
            state = new_state(rule, p.shape, bits, 256, lambda _, shape, dtype: torch.empty(shape, dtype=dtype))
            noise = (X[700:1400] * 2**14).to(torch.int16)
            step(*at_step(rule, 1, GROUP), p, X[1400:2100].bfloat16(), state, blocksize=256, noise=noise)


def _corrected_parameters() -> None:
    """Of 24 and 32 bits, in both dtypes and both kernels: all rules take the same way."""
    for dtype in (torch.bfloat16, torch.float16):
        for bits, correction in ((8, torch.int8), (32, torch.int16)):
            rule, (p, rest) = rules.Lion(), split(X[:700], dtype, correction)
            state = new_state(rule, p.shape, bits, 256, lambda _, shape, dtype: torch.empty(shape, dtype=dtype))
            step(
                *at_step(rule, 1, GROUP), p, X[1400:2100].to(dtype), {**state, CORRECTIONS[dtype]: rest}, blocksize=256
            )


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is called, by name."""
    for check in CHECKS:
        yield check.name, lambda run=check.run: run(X)
    yield "multiply_rows", _rows_times_weight
    yield "multiply_int8_row", _row_times_int8_weight
    yield "bfloat16 parameters", _bfloat16_parameters
    yield "corrected parameters", _corrected_parameters


@contextlib.contextmanager
def calls_go_to(run: Callable[[Kernel[..., Any], list[Any], Any], Any]) -> Iterator[None]:
    """Inside, what a function would give a kernel on a GPU is given to `run`.

    The tensors stay on the CPU. Nothing is compiled, but functions choose their kernels as where it is.
    """

    def call(kernel: Kernel[..., Any], *args: Any, **constants: Any) -> Any:
        result = run(kernel, list(args), constants)
        return tuple(kernel.parameters.written(args)) if kernel.parameters.written(args) else result

    with (
        as_on_gpu(),
        mock.patch.object(few_rows, "compile_enabled", return_value=True),
        mock.patch.object(few_rows, "missing_compiler", return_value=None),
        mock.patch.object(Kernel, "__call__", call),
    ):
        yield


def run_asked(run: Callable[[Kernel[..., Any], list[Any], Any], Any]) -> None:
    """The calls of the module that the command line names, or those of its calls that it names after it."""
    asked, *names = sys.argv[1:]
    for name, call in importlib.import_module(asked).calls():
        if not names or name in names:
            with calls_go_to(run):
                call()


def variant(name: str, args: Sequence[Any], constants: Mapping[str, Any]) -> str:
    """A kernel's name, the dtypes that it reads and its constants, as in "quantize_rows float32 nf4 64"."""
    floats = [t.dtype for t in args if t is not None and t.dim() > 0][:1]
    seen = [*floats, *(value for key, value in constants.items() if key != "names")]
    optional = [f"{sum(t is not None for t in args)} tensors"]
    words = [str(getattr(value, "name", value)).removeprefix("torch.") for value in seen]
    return " ".join([name, *words, *optional])
