"""What every layer with a quantized weight does when it is moved, saved and loaded; what it computes is elsewhere.

FSDP replaces a weight by a view or a DTensor, which loses the weight's attributes and the scales among them. So the layer
remembers the scales that its weight came with, and uses them when the weight has none.

A weight is loaded whole or not at all. `load_state_dict`, strict or not, makes of the weight

    checkpoint      layer is float          layer is quantized          layer is on meta, assign=True
    float           copied                  quantized, as by `.to`      float
    quantized       quantized, as there     quantized, as there         quantized, as there

and raises for a quantized weight without its scales, for scales without the weight, and for scales that do not fit it.
"As there": the quant_type, blocksize, nesting and storage of the checkpoint hold, not those of the constructor.
"""

import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bnbref.nn.params import Int8Params, Params4bit, QuantizedParameter, in_bytes
from bnbref.quant_state import QuantState
from bnbref.stored import Checkpoint


class QuantizedLayer(nn.Module):
    """A layer whose parameter `weight` is a `QuantizedParameter`."""

    weight: Tensor

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
        """As of `nn.Module`. torch's parametrizations and spectral_norm, which remove a weight first, are refused here, where the
        layer is still whole. FSDP removes it too, and puts a view of the same codes in its place."""
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(self._parameters.get(name), QuantizedParameter) and asking.startswith("torch.nn.utils."):
            raise TypeError(f"the {name} of {self} cannot be parametrized: it holds codes, or will")
        super().__delattr__(name)

    def _fqn_modifiers(self) -> dict[str, str]:
        """torch.distributed.checkpoint's question, by what attribute it comes to the object that a key of the state dict names.

        It walks along the key, and `weight.absmax` is an attribute of a quantized weight, but of no DTensor in its place.
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
        """The shape of the float weight."""
        raise NotImplementedError

    def _is_of_weight(self, name: str) -> bool:
        """Whether a key of a state dict, without the layer's prefix, belongs to the weight or its scales."""
        raise NotImplementedError

    def _read(self, entries: Mapping[str, Tensor]) -> QuantizedParameter | None:
        """The quantized weight that the entries of a state dict make; None if they are a float weight. ValueError if something
        is missing or does not fit."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the layer from a pickle. In bitsandbytes' pickles the weight is a plain parameter that has the attributes of a
        quantized one."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        weight = self._parameters.get("weight")
        if weight is not None and not isinstance(weight, QuantizedParameter):
            self._restore(weight)

    def _restore(self, weight: nn.Parameter) -> None:
        """Makes the weight a quantized parameter again, from a plain one that has the attributes of one."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLayer":
        weight = self._parameters.get("weight")
        if not isinstance(weight, QuantizedParameter):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._move_remembered(fn)
            return self
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            with torch.no_grad():
                new = weight.applied(fn)
                grad = None if weight.grad is None or new.holds_codes() else fn(weight.grad)
        finally:
            self._parameters["weight"] = weight
        self._replace(new)
        self.weight.grad = grad
        return self

    def _replace(self, new: QuantizedParameter) -> None:
        """Makes `new` the weight. If torch allows, the parameter stays the same object, which other modules may share."""
        weight = self.weight
        if torch._has_compatible_shallow_copy_type(weight, new):
            weight.grad = None
            weight.data = new
            self._remember(weight)
        else:
            self.weight = new

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        weight = self._parameters["weight"]
        self._parameters["weight"] = None
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._parameters["weight"] = weight
        entries = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix) and self._is_of_weight(key.removeprefix(prefix))
        }
        unexpected_keys[:] = [key for key in unexpected_keys if key.removeprefix(prefix) not in entries]
        if not entries:
            if strict:
                missing_keys.append(f"{prefix}weight")
            return
        try:
            self._load_weight(entries, assign=local_metadata.get("assign_to_params_buffers", False))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")

    def _load_weight(self, entries: Mapping[str, Tensor], assign: bool) -> None:
        old = self.weight
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


class FourBitLayer(QuantizedLayer):
    """A layer with a `Params4bit`."""

    _remembered: QuantState | None = None
    _stored: torch.dtype | None = None
    """The dtype that the codes had when they were remembered."""

    @property
    def quant_state(self) -> QuantState | None:
        """What the weight is dequantized by, its scales among it; None while the weight is not quantized."""
        weight = self.weight
        state: QuantState | None = getattr(weight, "quant_state", None)
        if state is not None:
            return state
        # A float weight has no scales, even if the weight before it had some. A packed one without attributes is `[bytes, 1]`.
        lost = not isinstance(weight, Params4bit) and weight.shape[-1:] == (1,)
        if lost and self._stored is not None and weight.dtype != self._stored:
            raise TypeError(
                f"codes that are stored as {self._stored} have become {weight.dtype}, a cast that loses them: under the mixed "
                f"precision of FSDP, quant_storage must be its param_dtype, or torch.uint8"
            )
        return self._remembered if lost else None

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self._remembered = state

    @property
    def _saved(self) -> SimpleNamespace:
        state = self.quant_state
        return SimpleNamespace(weight=self.weight if state is None else Params4bit.of_codes(torch.empty(0), state))

    def _remember(self, weight: Tensor | None) -> None:
        if isinstance(weight, Params4bit) and weight.quant_state is not None:
            self._remembered, self._stored = weight.quant_state, weight.dtype

    def _restore(self, weight: nn.Parameter) -> None:
        if hasattr(weight, "quant_state"):
            self.weight = Params4bit(weight.data, weight.requires_grad, **weight.__dict__)

    def _move_remembered(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._remembered is not None:
            self._remembered = self._remembered.map(lambda t: in_bytes(function, t))

    def _is_of_weight(self, name: str) -> bool:
        return name == "weight" or name.startswith("weight.")

    def _read(self, entries: Mapping[str, Tensor]) -> Params4bit | None:
        if entries.keys() == {"weight"} and entries["weight"].shape == self._shape():
            return None
        found = Checkpoint(entries).entries["weight"]
        if found.shape != self._shape():
            raise ValueError(f"weight must have the shape {list(self._shape())}, got {list(found.shape)}")
        stats = {name: value for name, value in entries.items() if name != "weight"}
        return Params4bit.from_prequantized(entries["weight"], stats) if stats else None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.quant_state
        if state is not None:
            destination |= {f"{prefix}weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def _scales_of(weight: Tensor) -> Tensor | None:
    """The absmax of each row of an int8 weight. None if it has none, or has the empty placeholder of `Int8Params.to`."""
    absmax: Tensor | None = getattr(weight, "SCB", None)
    return None if absmax is None or absmax.shape != weight.shape[:1] else absmax


class EightBitLayer(QuantizedLayer):
    """A layer with an `Int8Params`."""

    _remembered: Tensor | None = None

    @property
    def _absmax(self) -> Tensor | None:
        """The absmax of each row of an int8 weight: the weight's own or, if it lost them, those that are remembered."""
        own = _scales_of(self.weight)
        return self._remembered if own is None and self.weight.dtype == torch.int8 else own

    @property
    def SCB(self) -> Tensor | None:
        """What a state dict has under this name. torch.func assigns it, and uses it if the codes beside it are a plain tensor."""
        return self._absmax

    @SCB.setter
    def SCB(self, value: Tensor | None) -> None:
        self._remembered = value

    @property
    def _saved(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.weight, weight_format=None)

    def _remember(self, weight: Tensor | None) -> None:
        if isinstance(weight, Int8Params) and _scales_of(weight) is not None:
            self._remembered = weight.SCB

    def _restore(self, weight: nn.Parameter) -> None:
        if hasattr(weight, "SCB"):
            self.weight = Int8Params(weight.data, weight.requires_grad, **weight.__dict__)

    def _move_remembered(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._remembered is not None:
            self._remembered = in_bytes(function, self._remembered)

    def _is_of_weight(self, name: str) -> bool:
        return name in ("weight", "SCB", "weight_format")

    def _read(self, entries: Mapping[str, Tensor]) -> Int8Params | None:
        entries = dict(entries)
        layout: Any = entries.pop("weight_format", 0)
        if isinstance(layout, Tensor):
            layout = layout.item() if layout.numel() == 1 else layout.tolist()
        if layout not in (0, "row"):
            raise ValueError(f"weight_format must be 0 or 'row', the only layout left, got {layout!r}")
        if entries.keys() == {"weight"} and entries["weight"].is_floating_point():
            return None
        found = Checkpoint(entries).entries["weight"]
        if found.shape != self._shape():
            raise ValueError(f"weight must have the shape {list(self._shape())}, got {list(found.shape)}")
        if isinstance(self.weight, Int8Params) and self.weight.has_fp16_weights:
            raise ValueError("weight is int8, but this layer keeps a float weight (has_fp16_weights=True)")
        return Int8Params(entries["weight"], requires_grad=False, SCB=entries["SCB"])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        absmax = self._absmax
        if self.weight.dtype == torch.int8 and absmax is not None:
            destination[f"{prefix}SCB"] = absmax if keep_vars else absmax.detach()
            destination[f"{prefix}weight_format"] = torch.zeros((), dtype=torch.uint8, device="cpu")
