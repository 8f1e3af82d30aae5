"""`bitsandbytes.utils`: dicts as tensors, layers replaced by others, and which columns hold outliers."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def pack_dict_to_tensor(source_dict: Mapping[str, Any]) -> Tensor:
    """A dict as the uint8 bytes of its JSON.

    >>> unpack_tensor_to_dict(pack_dict_to_tensor({"blocksize": 64}))
    {'blocksize': 64}
    """
    return torch.frombuffer(bytearray(json.dumps(source_dict).encode()), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> Any:
    """The dict that `pack_dict_to_tensor` has packed."""
    return json.loads(bytes(tensor_data.cpu().tolist()).decode())


def sync_gpu(t: Tensor) -> None:
    """Wait for the tensor's device."""
    if t.device.type in ("cuda", "xpu"):
        torch.accelerator.synchronize(t.device)


def replace_linear(
    model: nn.Module, linear_replacement: Callable[[int, int, bool], nn.Module],
    skip_modules: Iterable[str] = ("lm_head",), copy_weights: bool = False, post_processing_function: str | None = None,
) -> nn.Module:  # fmt: skip
    """Replaces every `nn.Linear` below a model by `linear_replacement(in_features, out_features, has_bias)`. Returns the model.

    skip_modules: last parts of the names that stay. copy_weights: give the new layer the old parameters.
    post_processing_function: a method of the old layer to call, if it has one.

    >>> replace_linear(nn.Sequential(nn.Linear(2, 2)), lambda k, n, bias: nn.Identity())
    Sequential(
      (0): Identity()
    )
    """
    skip = tuple(skip_modules)
    for name, old in list(model.named_children()):
        replace_linear(old, linear_replacement, skip, copy_weights, post_processing_function)
        if not isinstance(old, nn.Linear) or name in skip:
            continue
        new: Any = linear_replacement(old.in_features, old.out_features, old.bias is not None)
        if copy_weights:
            new.weight, new.bias = old.weight, old.bias
        setattr(model, name, new)
        if post_processing_function is not None and hasattr(old, post_processing_function):
            getattr(old, post_processing_function)(old)
    return model


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """Columns whose standard deviation is `zscore` deviations above the mean of all, or the topk largest; rdm: at random.

    Bounded: standard deviations are float sums.
    """
    if rdm:
        if topk is None:
            raise ValueError("topk is required with rdm=True, got None")
        return torch.randint(0, weight.shape[1], size=(topk,), device=weight.device)
    std = weight.std(reduction_dim)
    if topk is not None:
        return std.topk(topk).indices
    return torch.where((std - std.mean()) / std.std() > zscore)[0]


class OutlierTracer:
    """Which input columns of each linear layer hold outliers: `get_instance().initialize(model)`, then run the model once."""

    _instance: ClassVar["OutlierTracer | None"] = None
    initialized = False

    def __init__(self) -> None:
        raise RuntimeError("OutlierTracer has one instance: call OutlierTracer.get_instance()")

    @classmethod
    def get_instance(cls) -> "OutlierTracer":
        """The tracer of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance

    def initialize(self, model: nn.Module) -> None:
        """Hook every linear layer of a model."""
        self.outliers: list[Tensor] = []
        self.hvalues: list[int] = []
        self.hvalue2outlier_idx: dict[int, Tensor] = {}
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.hooks = [module.register_forward_pre_hook(outlier_hook) for module in linears]
        self.initialized = True

    def is_initialized(self) -> bool:
        """Whether a model is traced."""
        return self.initialized

    def get_hvalue(self, weight: Tensor) -> int:
        """The key of a weight in `hvalue2outlier_idx`: its address."""
        return weight.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """The outlier columns of a weight's input, None before the model ran."""
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight)) if self.initialized else None


def outlier_hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """The hook of `OutlierTracer`: notes the outlier columns of a layer's weight; of the first layer, those of its input."""
    if not isinstance(module, nn.Linear):
        raise TypeError(f"module must be an nn.Linear, got {type(module).__name__}")
    tracer = OutlierTracer.get_instance()
    key = tracer.get_hvalue(module.weight)
    if key in tracer.hvalue2outlier_idx:
        for hook in tracer.hooks:
            hook.remove()
        return
    columns = find_outlier_dims(module.weight)
    tracer.outliers.append(columns)
    tracer.hvalues.append(key)
    if len(tracer.outliers) == 1:
        rows = args[0].flatten(0, -2)
        beyond = (rows.abs() > 6).any(0).nonzero().view(-1)
        columns = torch.cat([find_outlier_dims(rows, zscore=3), beyond]).unique()
    tracer.hvalue2outlier_idx[key] = columns
