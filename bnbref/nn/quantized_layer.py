"""The base of layers with a quantized weight: how they are moved, saved and loaded. What they compute is elsewhere.

FSDP replaces a weight by a view or a DTensor, which loses the weight's attributes and the scales among them. So the layer
remembers the scales that its weight came with, and uses them when the weight has none.

A weight is loaded whole or not at all. `load_state_dict`, strict or not, makes of the weight

    checkpoint      layer is float          layer is quantized          layer is on meta, assign=True
    float           copied                  quantized, as by `.to`      float
    quantized       quantized, as there     quantized, as there         quantized, as there

and raises for a quantized weight without its scales, for scales without the weight, and for scales that do not fit it. The scales
that the layer has already may come without the weight, which is then missing.
A weight that FSDP2 has spread over ranks takes the codes of a quantized one, in a tensor of its shape and dtype, and no floats.
"As there": the quant_type, blocksize, nesting and storage of the checkpoint hold, not those of the constructor.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from bnbref.nn.graph_arguments import Known
from bnbref.nn.quantized_parameter import QuantizedParameter

Self = TypeVar("Self", bound="QuantizedLayer")


class QuantizedLayer(nn.Module):
    """A layer whose parameter `weight` is a `QuantizedParameter`."""

    weight: Tensor
    in_features: int
    out_features: int
    _remembered: Any = None
    _known: Known | None = None
    _settings: Mapping[str, Any] | None = None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Like the method of `nn.Module`, but it remembers the scales of a weight. `layer.weight = ...` calls it too."""
        if name != "weight" and isinstance(param, QuantizedParameter) and param.holds_codes():
            raise TypeError(
                f"the weight of {self} holds codes and cannot be pruned or normalized: {name} would be codes"
            )
        super().register_parameter(name, param)
        if name == "weight":
            self._remember(param)

    def __delattr__(self, name: str) -> None:
        """Like the method of `nn.Module`. torch's parametrizations and spectral_norm, which remove a weight first, are refused
        here, where the layer is still whole. FSDP removes it too, and puts a view of the same codes in its place."""
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(self._parameters.get(name), QuantizedParameter) and asking.startswith("torch.nn.utils."):
            raise TypeError(f"the {name} of {self} cannot be parametrized: it holds codes, or will")
        super().__delattr__(name)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Called by torch.distributed.checkpoint, which follows each key of a state dict from attribute to attribute.

        Returns by which attribute to follow a key that begins so. For `weight.absmax` it is `_saved`, because a quantized weight
        has the attribute `absmax`, but a DTensor in its place has not.
        """
        return dict.fromkeys(("weight", "weight_format"), "_saved")

    @property
    def _saved(self) -> SimpleNamespace:
        """An object that has an attribute for all that is beside the weight in a state dict."""
        raise NotImplementedError

    def _remember(self, weight: Tensor | None) -> None:
        """Keeps the scales of the weight, if it has some."""
        raise NotImplementedError

    def _move_remembered(self, function: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError

    def _shape(self) -> tuple[int, int]:
        """The shape of the float weight. An embedding has another one."""
        return self.out_features, self.in_features

    def _is_of_weight(self, name: str) -> bool:
        """Whether a key of a state dict, without the layer's prefix, belongs to the weight or its scales."""
        raise NotImplementedError

    def _read(self, entries: Mapping[str, Tensor]) -> QuantizedParameter | None:
        """The quantized weight that the entries of a state dict make; None if they are a float weight. ValueError if something
        is missing or does not fit."""
        raise NotImplementedError

    def _entries_beside(self, keep_vars: bool) -> dict[str, Tensor]:
        """What a state dict has beside the codes, without the layer's prefix: nothing if the weight is a float one."""
        raise NotImplementedError

    def _beside(self, keep_vars: bool) -> dict[str, Tensor]:
        """`_entries_beside`, the same tensors as last time where they are equal. So layers that share a weight have state dicts
        that share memory, by which safetensors knows what is tied."""
        weight, entries = self.weight, self._entries_beside(keep_vars)
        if entries and isinstance(weight, QuantizedParameter):
            weight.beside = entries = {name: _kept(weight.beside.get(name), value) for name, value in entries.items()}
        return entries

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {f"{prefix}{name}": value for name, value in self._beside(keep_vars).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the layer from a pickle. In bitsandbytes' pickles the weight is a plain parameter that has the attributes of a
        quantized one."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        weight = self._parameters.get("weight")
        if weight is not None and not isinstance(weight, QuantizedParameter):
            self._restore(weight)
        else:
            self._remember(weight)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_known", "_settings")}

    def _restore(self, weight: nn.Parameter) -> None:
        """Makes the weight a quantized parameter again, from a plain one that has the attributes of one."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLayer":
        weight = self._parameters.get("weight")
        if not isinstance(weight, QuantizedParameter):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._move_remembered(fn)
            return self
        with torch.no_grad():  # first, as a weight may refuse what the others would take
            new = weight.applied(fn)
            grad = None if weight.grad is None or new.holds_codes() else fn(weight.grad)
        others = self._without_weight()
        super(QuantizedLayer, others)._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._parameters.update(others._parameters)
        self._replace(new)
        self.weight.grad = grad
        return self

    def _without_weight(self: Self) -> Self:
        """The same layer without its weight, for what torch does to all others. This one stays whole meanwhile, as another thread
        may use it. Of what it holds the parameters alone are its own."""
        others = object.__new__(type(self))
        parameters = {name: value for name, value in self._parameters.items() if name != "weight"}
        others.__dict__ = {**self.__dict__, "_parameters": parameters}
        return others

    def _replace(self, new: QuantizedParameter) -> None:
        """Makes `new` the weight. If torch allows, the parameter stays the same object, which other modules may share."""
        weight = self.weight
        if torch._has_compatible_shallow_copy_type(weight, new):
            weight.grad = None
            weight.requires_grad = new.requires_grad  # first, as torch puts no codes into what has a gradient
            weight.data = new
            self._remember(weight)
        else:
            self.weight = new

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        # Hooks are called here, because they may look at the weight, or replace it, which torch is not to load.
        given = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(*given)
        others = self._without_weight()
        others._load_state_dict_pre_hooks = OrderedDict()
        extra_states: list[Any] = []
        others.__dict__["set_extra_state"] = extra_states.append
        super(QuantizedLayer, others)._load_from_state_dict(*given)
        self._parameters.update(others._parameters)
        for state in extra_states:  # here, as what this assigns belongs to the layer itself
            self.set_extra_state(state)
        entries = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix) and self._is_of_weight(key.removeprefix(prefix))
        }
        unexpected_keys[:] = [key for key in unexpected_keys if key.removeprefix(prefix) not in entries]
        if not entries or self._has(entries):
            if strict:
                # `load_model` of safetensors asks for the state dict first, and wants to hear all of it that was tied.
                own = ("weight", *getattr(self.weight, "beside", ()))
                missing_keys.extend(f"{prefix}{name}" for name in own if name not in entries)
            return
        try:
            self._load_weight(entries, assign=local_metadata.get("assign_to_params_buffers", False))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")

    def _has(self, entries: Mapping[str, Any]) -> bool:
        """Whether the entries of a state dict are a part of this layer's own weight: what is beside its codes, bit for bit, or
        the very codes.

        Those who save adapters alone leave out all frozen parameters: Trainer under DeepSpeed, and torch where it is told to.
        What is beside the codes is no parameter, and stays in the file. If torch loads a full state dict that lacks the frozen
        parameters, it adds those of the model."""
        if "weight" in entries:
            return len(entries) == 1 and entries["weight"] is self.weight and self._remembered is not None
        beside = self._beside(keep_vars=False)
        return entries.keys() == beside.keys() and all(
            isinstance(value, Tensor) and _kept(beside[name], value.to(beside[name].device)) is beside[name]
            for name, value in entries.items()
        )

    def _load_weight(self, entries: Mapping[str, Tensor], assign: bool) -> None:
        old = self.weight
        if hasattr(old, "device_mesh") and self._remembered is not None and not assign:
            self._load_shards(entries)
            return
        if not isinstance(old, QuantizedParameter):
            data = entries.get("weight", old).detach()
            if len(entries) > 1 or not data.is_floating_point() or not data.shape == old.shape == self._shape():
                raise TypeError(
                    f"weight is a {type(old).__name__}, not a quantized parameter: load before it is wrapped or tied"
                )
            if assign:  # the weight is tied to a float one, and loaded as such
                self.weight = nn.Parameter(data, old.requires_grad)
            else:
                with torch.no_grad():
                    old.copy_(data)
            return
        if old.device.type == "meta" and not assign:
            raise ValueError("weight is on the meta device: load_state_dict needs assign=True")
        for name, value in entries.items():
            if not isinstance(value, Tensor) and name != "weight_format":  # in old files that one is a string
                raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
        new = self._read(entries)
        if new is None:
            data = entries["weight"].detach()
            if data.shape != self._shape() or not data.is_floating_point():
                raise ValueError(
                    f"weight must be float {list(self._shape())} or quantized with its scales beside it, "
                    f"got {data.dtype} {list(data.shape)}"
                )
            if not assign and not old.holds_codes():
                with torch.no_grad():
                    old.copy_(data)
                return
            new = old.unquantized(data)
            new = new if assign else new.to(old.device)
        elif not assign:
            # A copy, as load_state_dict makes of every tensor that is not assigned.
            new = new.applied(lambda t: t.to(old.device, copy=True))
        if assign:
            self.weight = new
        else:
            self._replace(new)

    def _load_shards(self, entries: Mapping[str, Tensor]) -> None:
        """Loads codes, whole ones or shards, into a weight that FSDP2 has spread over ranks. Scales are whole on each rank."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        old: Any = self.weight
        if "weight" not in entries:
            raise ValueError(f"weight is missing, but its {sorted(entries)} are there")
        codes = entries["weight"].detach()
        # Only scales are read. Shards are not gathered: a rank that refuses its state dict would keep the others waiting.
        whole = torch.empty(codes.shape, dtype=codes.dtype, device="cpu") if isinstance(codes, DTensor) else codes
        new = self._read({**entries, "weight": whole})
        if new is None or (codes.dtype, codes.shape) != (old.dtype, old.shape):
            raise ValueError(
                f"weight is spread over ranks as codes in {old.dtype} {list(old.shape)} and takes such codes with their scales, "
                f"got {sorted(entries)}, weight in {codes.dtype} {list(codes.shape)}"
            )
        new = new.applied(lambda t: t.to(old.device, copy=True))
        if not isinstance(codes, DTensor):
            codes = distribute_tensor(new.data, old.device_mesh, old.placements, src_data_rank=None)
        with torch.no_grad():
            old.copy_(codes)
        self._remember(new)


def node_of(layer: nn.Module, forward: Callable[..., Any], x: Any) -> Any:
    """A call of the layer as one node of the graph that `torch.fx.symbolic_trace` records; None if x is no stand-in of torch.fx.

    torch.fx records what a forward does with a stand-in, which has neither dtype nor shape to choose a product by. It records a
    layer of torch.nn as one node, which calls the layer; here `forward`, which is running, does the same. TypeError if a call of
    the layer is more than this forward: the rest, such as hooks, has been recorded already, and the node would repeat it.
    """
    if not isinstance(x, fx.Proxy):
        return None
    if layer._forward_pre_hooks or layer._forward_hooks or getattr(layer.forward, "__func__", None) is not forward:
        raise TypeError(f"torch.fx cannot trace {layer} with hooks or a forward of its own: it would run them twice")
    name = x.tracer.path_of_module(layer) if isinstance(x.tracer, fx.Tracer) else ""
    if not name:
        raise TypeError(f"torch.fx traces a model that contains layers like {layer}, not such a layer alone")
    return x.tracer.create_proxy("call_module", name, (x,), {})


def _kept(old: Tensor | None, new: Tensor) -> Tensor:
    """The old tensor if it is known to be the same as the new one."""
    if type(old) is not Tensor or type(new) is not Tensor or new.is_meta:
        return new
    alike = (old.dtype, old.shape, old.device) == (new.dtype, new.shape, new.device)
    return old if alike and torch.equal(old, new) else new
