"""A report on every parameter of a model: whether it is quantized, how, in how many bytes, or why not."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from bnbref.arguments import dtype_name
from bnbref.nn import Int8Params, Params4bit
from bnbref.nn.quantized_layer import QuantizedLayer
from bnbref.quant_state import QuantState

REASONS = "bnbref_reasons"
"""Attribute of a model: by the name of a module or parameter, why loading left it as it is."""

ON_META = ", on meta"
"""The end of the reason of a parameter that is offloaded, or has no values yet."""


@dataclass(frozen=True)
class ParameterReport:
    """One parameter: its shape before quantization, its format, and the bytes of codes and scales."""

    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int
    quantized: bool
    reason: str

    @property
    def elements(self) -> int:
        """Its elements; none if they are another parameter's, to which it is tied."""
        return 0 if self.format == "tied" else math.prod(self.shape)


@dataclass(frozen=True)
class Report:
    """Every parameter of a model, in the model's order. `str()` is a table; layers that are alike share a line."""

    parameters: tuple[ParameterReport, ...]

    @property
    def quantized(self) -> tuple[ParameterReport, ...]:
        """The parameters that are quantized."""
        return tuple(p for p in self.parameters if p.quantized)

    @property
    def skipped(self) -> tuple[ParameterReport, ...]:
        """The parameters that are not quantized."""
        return tuple(p for p in self.parameters if not p.quantized)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters, scales included; buffers are not."""
        return sum(p.bytes for p in self.parameters)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "format", "bytes", "")]
        for names, p in _alike(self.parameters):
            times = "" if len(names) == 1 else f"{len(names)} x "
            shape = " x ".join(map(str, p.shape))
            rows.append((_merged(names), times + shape, p.format, f"{p.bytes * len(names):,}", p.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {form:<{widths[2]}}  {size:>{widths[3]}}  {reason}".rstrip()
            for name, shape, form, size, reason in rows
        ]
        count = sum(p.elements for p in self.parameters)
        inside = sum(p.elements for p in self.quantized)
        share = f"{100 * inside / max(count, 1):.1f} % of {count:,} parameters quantized"
        bits = f"{8 * self.total_bytes / max(count, 1):.2f} bits a parameter"
        return "\n".join([*lines, f"{share}, {self.total_bytes:,} bytes, {bits}"])


def report(model: nn.Module) -> Report:
    """The report on every parameter of a model.

    >>> import bnbref
    >>> from bnbref.nn import LinearNF4
    >>> with bnbref.eager():
    ...     model = nn.Sequential(LinearNF4(64, 64), nn.LayerNorm(64)).to("cpu")
    >>> print(report(model))
    parameter    shape  format   bytes
    0.weight   64 x 64  nf4      2,120  blocksize 64, scales in 8 bits
    0.bias          64  float32    256  bias
    1.weight        64  float32    256  vector of LayerNorm
    1.bias          64  float32    256  bias
    95.5 % of 4,288 parameters quantized, 2,888 bytes, 5.39 bits a parameter
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    reasons: dict[str, str] = getattr(model, REASONS, {})
    seen: dict[int, str] = {}
    found: list[ParameterReport] = []
    for path, module in model.named_modules():
        for place, parameter in module.named_parameters(prefix=path, recurse=False, remove_duplicate=False):
            name = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", place)
            first = seen.setdefault(id(parameter), name)
            if first != name:
                found.append(ParameterReport(name, tuple(parameter.shape), "tied", 0, False, f"to {first}"))
                continue
            found.append(_one(name, path, module, parameter, reasons))
    return Report(tuple(found))


def _one(name: str, path: str, module: nn.Module, parameter: nn.Parameter, reasons: dict[str, str]) -> ParameterReport:
    where = ON_META if parameter.is_meta else ""
    state = _state(module, parameter)
    if state is not None:
        nested = ", scales in 8 bits" if state.nested else ""
        how = f"blocksize {state.blocksize}{nested}{where}"
        size = parameter.nbytes + sum(t.nbytes for t in _scales(state))
        return ParameterReport(name, tuple(state.shape or ()), str(state.quant_type), size, True, how)
    absmax = getattr(parameter, "SCB", None)
    if isinstance(parameter, Int8Params) and parameter.holds_codes():
        size = parameter.nbytes + (0 if absmax is None else absmax.nbytes)
        return ParameterReport(name, tuple(parameter.shape), "int8", size, True, f"row by row{where}")
    left = reasons.get(name) or (reasons.get(path) if parameter.dim() > 1 else None)
    reason = left or _why(name, module, parameter)
    return ParameterReport(
        name, tuple(parameter.shape), dtype_name(parameter.dtype), parameter.nbytes, False, reason + where
    )


def _state(module: nn.Module, parameter: nn.Parameter) -> QuantState | None:
    if isinstance(parameter, Params4bit) or (isinstance(module, QuantizedLayer) and parameter is module.weight):
        return getattr(module, "quant_state", None) or getattr(parameter, "quant_state", None)
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return getattr(module[0], "quant_state", None)
    return None


def _scales(state: QuantState) -> Iterator[Tensor]:
    """The tensors that a weight has for itself; the tables of values are shared by all."""
    yield state.absmax
    if state.state2 is not None and state.offset is not None:
        yield state.state2.absmax
        yield state.offset


def _why(name: str, module: nn.Module, parameter: nn.Parameter) -> str:
    kind, leaf = type(module).__name__, name.rpartition(".")[2]
    if "lora_" in name:
        return "adapter"
    if isinstance(module, QuantizedLayer) and leaf == "weight":
        return f"{kind}, to be quantized by .to(device)"
    if leaf.endswith("bias"):
        return "bias"
    if parameter.dim() < 2:
        return f"vector of {kind}"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        return "linear layer that was not replaced" if type(module) is nn.Linear else f"{kind}, not an nn.Linear itself"
    return f"{parameter.dim()}-dimensional parameter of {kind}, which is no linear layer"


def _alike(parameters: tuple[ParameterReport, ...]) -> list[tuple[list[str], ParameterReport]]:
    """Groups of parameters whose names differ in numbers alone, and that are the same in all else."""
    groups: dict[ParameterReport, tuple[list[str], ParameterReport]] = {}
    for p in parameters:
        groups.setdefault(replace(p, name=_without_numbers(p.name)), ([], p))[0].append(p.name)
    return list(groups.values())


def merged(names: Iterable[str]) -> list[str]:
    """The names, of which those that differ in numbers alone are merged into one.

    >>> merged(["layers.0.mlp", "layers.1.mlp", "head"])
    ['layers.[0-1].mlp', 'head']
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_without_numbers(name), []).append(name)
    return [_merged(group) for group in groups.values()]


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _merged(names: list[str]) -> str:
    """`a.[0-2].b` for a.0.b, a.1.b, a.2.b."""
    parts = [list(dict.fromkeys(column)) for column in zip(*(name.split(".") for name in names), strict=True)]
    return ".".join(part[0] if len(part) == 1 else f"[{_ranges(sorted(map(int, part)))}]" for part in parts)


def _ranges(numbers: list[int]) -> str:
    runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0][1]}" if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)
