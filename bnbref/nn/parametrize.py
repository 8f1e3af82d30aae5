"""Any parameter of any module in four bits: for example the `[experts, n, k]` of a mixture of experts, which is no Linear4bit.

    replace_parameter_4bit(experts, "gate_up_proj")        experts.gate_up_proj is now dequantized whenever it is read

It is done by `torch.nn.utils.parametrize`, so that the module's code needs no change. The module's state dict has bitsandbytes'
keys (`gate_up_proj`, `gate_up_proj.absmax` and so on). It is loaded from these, or from a float parameter, which is then
quantized.

A forward may read the parameter many times, once for each expert. The values are dequantized at the first time and kept until the
forward ends, by a return or by an exception.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnbref.arguments import checked
from bnbref.blockwise import check_quantizable
from bnbref.checkpoint_weights import Checkpoint
from bnbref.codebooks import Codebook, four_bit
from bnbref.functional import quantize_4bit
from bnbref.kernels import tracing
from bnbref.nn.quantized_parameter import in_bytes
from bnbref.quant_state import QuantState, present


class Bnb4bitParametrization(nn.Module):
    """Makes values of packed codes, `dtype(fl(values[code] * absmax))`, without gradient.  Exact.

    dtype: that of the parameter that was quantized. It follows the casts of the module as the dtype of a float parameter would.
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        four_bit(quant_state.quant_type)
        self.quant_state = quant_state
        self.dtype: torch.dtype = present(quant_state.dtype, "dtype")
        self.cache: list[Tensor] | None = None
        """While the module that has the parameter runs its forward: a list, with the values once they are made.

        None at other times.
        """

    def forward(self, packed: Tensor) -> Tensor:
        """The values of the parameter, from its packed codes."""
        if not torch.compiler.is_compiling():
            owner = getattr(packed, "dequantized_by", self)
            if owner is not self:  # torch.func has put the parameter of another module here
                return owner.forward(packed)
        cache = None if tracing() else self.cache
        if cache:
            return cache[0]
        if hasattr(packed, "full_tensor"):
            raise NotImplementedError(
                "a 4-bit parameter that is spread over ranks has values only in a forward of what FSDP gathered. Its state dict, "
                "without values, is that of model.state_dict(), not of get_model_state_dict(model)"
            )
        # When accelerate offloads, it moves the module's parameters and buffers to where they are used, but not these scales.
        state = self.quant_state.map(lambda t: t.to(packed.device))
        values = state.dequantize(packed, self.dtype)
        if cache is not None:
            cache.append(values)
        elif isinstance(state.quant_type, str) and not torch.compiler.is_compiling():
            _name_parts(values, state)
        return values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Bnb4bitParametrization":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.quant_state = self.quant_state.map(lambda t: in_bytes(fn, t))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self


def _name_parts(values: Any, state: QuantState) -> None:
    """Let getattr find what is beside the codes by its key, `values.absmax`: so torch.distributed.checkpoint checks the keys of a
    state dict. All are plain tensors, since a pickle of the values has them too."""
    values.absmax, values.quant_map = state.absmax, state.code
    if state.state2 is not None:
        values.nested_absmax, values.nested_quant_map = state.state2.absmax, state.state2.code
    values.quant_state = torch.empty(0)
    setattr(values.quant_state, f"bitsandbytes__{state.quant_type}", torch.empty(0))


@checked
def replace_parameter_4bit(
    module: nn.Module, param_name: str, compress_statistics: bool = False, quant_type: str | Codebook = "nf4",
    blocksize: int | None = None,
) -> None:  # fmt: skip
    """Quantizes a parameter of a module to four bits, on its device. Reading it then gives its values in its dtype.  Exact.

    module: the one that has the parameter. param_name: its name there. compress_statistics: quantize the scales as well, in 8
    bits. quant_type: "nf4", "fp4", "af4", "int4" or a Codebook. blocksize: 64 by default. Raises AttributeError or TypeError if
    the module has no such parameter, and ValueError if the parameter has NaN or infinities.

    >>> import bnbref
    >>> experts = nn.Module()
    >>> experts.up = nn.Parameter(torch.ones(2, 4, 64))
    >>> with bnbref.eager():
    ...     replace_parameter_4bit(experts, "up")
    ...     experts.up.shape
    torch.Size([2, 4, 64])
    >>> list(experts.state_dict())
    ['up', 'up.absmax', 'up.quant_map', 'up.quant_state.bitsandbytes__nf4']
    """
    values = _parameter(module, param_name).detach()
    check_quantizable(f"parameter {param_name!r}", values, four_bit(quant_type).name)
    packed, state = quantize_4bit(
        values, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    _parametrize(module, param_name, packed, state)


@checked
def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device | str | None = None
) -> None:
    """Parametrize a parameter that holds packed codes already.

    module: the one that has the parameter. param_name: its name there.
    qs_dict: the entries of a state dict beside the codes (`absmax`, `quant_map` and so on). device: the device for codes and
    scales, by default that of the codes. Raises ValueError if the codes are too few or too many, or qs_dict is not whole.
    """
    packed = _parameter(module, param_name).detach()
    packed = packed.to(packed.device if device is None else device)
    state = QuantState.from_dict(qs_dict, device=packed.device)
    if packed.nbytes != state.code_bytes:
        raise ValueError(
            f"parameter {param_name!r} must hold {state.code_bytes} bytes for the shape {tuple(state.shape or ())}, "
            f"got {packed.nbytes}"
        )
    _parametrize(module, param_name, packed, state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r}")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"{name!r} of {type(module).__name__} must be an nn.Parameter, got {type(parameter).__name__}")
    return parameter


def _parametrize(module: nn.Module, name: str, packed: Tensor, state: QuantState) -> None:
    first = not any(quantized_in(module))
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    step = Bnb4bitParametrization(state)
    parametrize.register_parametrization(module, name, step, unsafe=True)
    original: Any = module.parametrizations[name].original  # type: ignore[index, union-attr]
    original.dequantized_by = step
    if first:
        module.register_forward_pre_hook(_begin_forward)
        # Always called, because activation checkpointing ends a forward by an exception, which must not leave the values behind.
        module.register_forward_hook(_end_forward, always_call=True)
        module.register_state_dict_post_hook(_save)
        module.register_load_state_dict_pre_hook(_load)
        module.register_load_state_dict_post_hook(_name_missing)


def quantized_in(module: nn.Module) -> Iterator[tuple[str, Any, Bnb4bitParametrization]]:
    """For each parameter of a module that is quantized so: its name, its ParametrizationList, and the parametrization that
    dequantizes it."""
    for name, steps in getattr(module, "parametrizations", {}).items():
        for step in steps:
            if isinstance(step, Bnb4bitParametrization):
                yield name, steps, step


def _begin_forward(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        for _, _, step in quantized_in(module):
            step.cache = []


def _end_forward(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for _, _, step in quantized_in(module):
            step.cache = None


# ---- state dicts ----------------------------------------------------------------------------------------------------


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, _, step in quantized_in(module):
        packed = state_dict.pop(f"{prefix}parametrizations.{name}.original", None)
        if packed is not None:
            state_dict[f"{prefix}{name}"] = packed
            stats = step.quant_state.as_dict(packed=True)
            state_dict |= {f"{prefix}{name}.{key}": value for key, value in stats.items()}


def _load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
    missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
) -> None:  # fmt: skip
    """Renames the keys to those that the parametrization looks for; an error message for each parameter that is not whole."""
    assign = local_metadata.get("assign_to_params_buffers", False)
    for name, steps, step in quantized_in(module):
        keys = [key for key in state_dict if key == f"{prefix}{name}" or key.startswith(f"{prefix}{name}.")]
        entries = {key.removeprefix(prefix): state_dict.pop(key) for key in keys}
        if not entries:
            continue
        try:
            packed, state = _read(name, entries, step, steps.original, assign)
        except ValueError as error:
            error_msgs.append(f"{prefix}{error}")
            continue
        state_dict[f"{prefix}parametrizations.{name}.original"] = packed
        step.quant_state, step.cache = state, None
        step.dtype = present(state.dtype, "dtype") if assign else step.dtype


def _name_missing(module: nn.Module, incompatible: Any) -> None:
    for name, *_ in quantized_in(module):
        missing = [key.replace(f"parametrizations.{name}.original", name) for key in incompatible.missing_keys]
        incompatible.missing_keys[:] = missing


def _read(
    name: str, entries: Mapping[str, Tensor], step: Bnb4bitParametrization, original: Tensor, assign: bool
) -> tuple[Tensor, QuantState]:
    if original.device.type == "meta" and not assign:
        raise ValueError(f"{name} is on the meta device: load_state_dict needs assign=True")
    old = step.quant_state
    if entries.keys() == {name} and entries[name].is_floating_point() and entries[name].shape == old.shape:
        values = entries[name].detach().to(entries[name].device if assign else original.device)
        check_quantizable(name, values, old.codebook.name)
        packed, state = quantize_4bit(
            values, blocksize=old.blocksize, compress_statistics=old.nested, quant_type=old.quant_type
        )
    else:
        found = Checkpoint(entries).entries[name]
        if found.shape != old.shape or len(entries) == 1:
            raise ValueError(
                f"{name} must have the shape {list(old.shape or ())}, got {found.format} {list(found.shape)}"
            )
        packed = entries[name].detach()
        stats = {key: value for key, value in entries.items() if key != name}
        state = QuantState.from_dict(stats, device=packed.device if assign else original.device)
    return packed.contiguous().view(-1).view(original.dtype).view(original.shape), state
