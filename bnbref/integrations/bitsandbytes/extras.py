"""What bitsandbytes has and bnbref has no use for: old names of its functional module, its utils, its constants.

Served by the alias alone, see `surface.py`. Thin: each is a line or two over the rooms below.
"""

import ctypes
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, library, nn

from bnbref import int8
from bnbref.blockwise import block_count, check_blocksize
from bnbref.codebooks import value_table
from bnbref.linear4bit import matmul_4bit
from bnbref.linear8bit import matmul
from bnbref.optim import rules
from bnbref.optim.rules import absmax_key
from bnbref.optim.update import step

# ---- constants ------------------------------------------------------------------------------------------------------

features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "hpu", "mps", "npu", "xpu"}
BNB_BACKEND = "PyTorch"
HIP_ENVIRONMENT = torch.version.hip is not None
C = 127.0
register_fake, register_kernel = library.register_fake, library.register_kernel
name2qmap: dict[str, Tensor] = {}
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {value: name for name, value in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}

# ---- autograd -------------------------------------------------------------------------------------------------------


class MatMul4Bit:
    """`matmul_4bit` in the order of its class in bitsandbytes."""

    @staticmethod
    def apply(
        A: Tensor, B: Tensor, out: Tensor | None = None, bias: Tensor | None = None, quant_state: Any = None
    ) -> Tensor:
        """`matmul_4bit(A, B, quant_state, out, bias)`.  Bounded."""
        return matmul_4bit(A, B, quant_state, out, bias)


class MatMul8bitLt:
    """`matmul` in the order of its class in bitsandbytes."""

    @staticmethod
    def apply(A: Tensor, B: Tensor, out: Tensor | None = None, bias: Tensor | None = None, state: Any = None) -> Tensor:
        """`matmul(A, B, out, state, bias=bias)`.  Exact without outliers, else bounded."""
        return matmul(A, B, out, state, bias=bias)


MatMul8bitFp = MatMul8bitLt

# ---- functional -----------------------------------------------------------------------------------------------------


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """True if all tensors are on one device; RuntimeError, as in bitsandbytes, if not.

    >>> is_on_gpu([torch.zeros(1), None])
    True
    """
    found = {str(t.device) for t in tensors if t is not None}
    if len(found) > 1:
        raise RuntimeError(f"tensors must be on one device, got {sorted(found)}")
    return True


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """The address of a tensor's data."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def has_avx512bf16() -> bool:
    """False: it asks whether weights may be repacked for a CPU."""
    return False


def fill(A: Tensor, value: float, device: Any = None, prefetch: bool = True) -> None:
    """Fill in place."""
    A.fill_(value)


def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    """The shape of the product, or of `out`. TypeError for other dtypes, ValueError for shapes that do not multiply.

    >>> check_matmul(torch.zeros(2, 3, dtype=torch.int8), torch.zeros(4, 3, dtype=torch.int8), None, False, True)
    (2, 4)
    """
    if A.dtype != expected_type or B.dtype != expected_type:
        raise TypeError(f"A and B must be {expected_type}, got {A.dtype} and {B.dtype}")
    left, right = _turned(A, transposed_A), _turned(B, transposed_B)
    same_rows = A.dim() == B.dim() == 3 and A.shape[:2] == B.shape[:2]
    if same_rows and out is not None and out.shape == (A.shape[2], B.shape[2]):
        return tuple(out.shape)
    if A.dim() not in (2, 3) or B.dim() not in (2, A.dim()) or left.shape[-1] != right.shape[-2]:
        raise ValueError(
            f"A and B must multiply, got {tuple(A.shape)} and {tuple(B.shape)}, "
            f"transposed_A={transposed_A}, transposed_B={transposed_B}"
        )
    return tuple(out.shape) if out is not None else (*left.shape[:-1], right.shape[-1])


def _turned(x: Tensor, transposed: bool) -> Tensor:
    return x.transpose(-1, -2) if transposed else x


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """The int32 product of int8 matrices `[.., m, k]`, `[k, n]` or of stacks of them.  Exact.

    With `out [i, o]`: the sum over b and s of `[b, s, i]` times `[b, s, o]`, the gradient of a weight.

    >>> igemm(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3], [4]], dtype=torch.int8))
    tensor([[11]], dtype=torch.int32)
    """
    shape = check_matmul(A, B, out, transposed_A, transposed_B)
    if A.dim() == 3 and out is not None and len(shape) == 2:
        return out.copy_(int8.multiply(A.flatten(0, 1).t(), B.flatten(0, 1).t()))
    left, right = _turned(A, transposed_A), _turned(B, transposed_B)
    if right.dim() == 2:
        product = int8.multiply(left, right.t().contiguous())
    else:
        product = torch.stack([int8.multiply(a, b.t().contiguous()) for a, b in zip(left, right, strict=True)])
    return product if out is None else out.copy_(product)


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """The int32 products of int8 `[b, m, k]` and `[b, k, n]`.  Exact."""
    if A.dim() != 3 or B.dim() != 3:
        raise ValueError(f"A and B must have three dimensions, got {tuple(A.shape)} and {tuple(B.shape)}")
    return igemm(A, B, out, transposed_A, transposed_B)


BLOCKSIZE = 256
"""Of the 8-bit states of bitsandbytes."""


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step in place of p, state1 and state2, float32, by the rule of that name: see `bnbref.optim.rules`.  Exact.

    g is multiplied by gnorm_scale in float32. unorm_vec is not written. skip_zeros must be False.
    """
    numbers = {"lr": lr, "betas": (beta1, beta2, beta3), "eps": eps, "weight_decay": weight_decay, "alpha": alpha}
    _update(optimizer_name, g, p, (state1, state2), None, numbers, step, gnorm_scale, max_unorm, skip_zeros)


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One step in place of p and of the uint8 codes and float32 absmax of its states, blocks of 256.  Exact.

    qmap1 and qmap2 must be the dynamic maps, with a sign where the state has one: ValueError if not. The one state of adagrad
    and rmsprop has none; bitsandbytes' classes give them the map with a sign all the same, so that is taken too.
    """
    numbers = {"lr": lr, "betas": (beta1, beta2, beta3), "eps": eps, "weight_decay": weight_decay, "alpha": alpha}
    scales = ((absmax1, qmap1), (absmax2, qmap2))
    _update(optimizer_name, g, p, (state1, state2), scales, numbers, step, gnorm_scale, 0.0, skip_zeros)


def _update(
    name: str,
    g: Tensor,
    p: Tensor,
    states: tuple[Tensor, Tensor | None],
    scales: tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]] | None,
    numbers: Mapping[str, Any],
    t: int,
    gnorm_scale: float,
    max_norm: float,
    skip_zeros: bool,
) -> None:
    if name not in rules.RULES:
        raise ValueError(f"optimizer_name must be one of {sorted(rules.RULES)}, got {name!r}")
    if skip_zeros:
        raise NotImplementedError("skip_zeros must be False: a zero gradient is a gradient, here as in bitsandbytes")
    if g.shape != p.shape or g.device != p.device:
        raise ValueError(f"g must be like p, {tuple(p.shape)} on {p.device}, got {tuple(g.shape)} on {g.device}")
    if not p.is_contiguous():
        raise ValueError(f"p must be contiguous, as it is updated in place, got strides {p.stride()}")
    if p.numel() == 0:
        return
    rule = rules.RULES[name]
    if (
        scales is not None
        and name in rules.SIGNED_RULES
        and _is_map(scales[0][1], rules.SIGNED_RULES[name], rule.states[0])
    ):
        rule = rules.SIGNED_RULES[name]
    state: dict[str, Tensor] = {}
    for s in rule.states:
        stacked = s.key in rule.stacked
        own = int(not stacked and s.key == "state2")
        dtype = torch.float32 if scales is None else torch.uint8
        state[s.key] = _part(rule, s.key, states[own], f"state{own + 1}", p.numel(), dtype)
        if scales is not None:
            absmax, qmap = scales[own]
            _check_map(f"qmap{own + 1}", qmap, rule, s)
            blocks = block_count(p.numel(), check_blocksize(BLOCKSIZE, p.numel()))
            state[absmax_key(s.key)] = _part(rule, s.key, absmax, f"absmax{own + 1}", blocks, torch.float32)
    if gnorm_scale != 1.0:
        g = g.float() * gnorm_scale
    coefficients = {
        key: float(x) for key, x in rule.coefficients(t, {"t_alpha": None, "t_beta3": None, **numbers}).items()
    }
    hyper = torch.tensor(list(coefficients.values()), dtype=torch.float32, device=p.device)
    step(
        rule, p.detach(), g, state, coefficients, hyper, blocksize=BLOCKSIZE, max_norm=max_norm if rule.clipped else 0.0
    )


def _part(rule: rules.Rule, key: str, tensor: Tensor | None, name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """A state, or its place among those that are stacked in one tensor."""
    stacked = key in rule.stacked
    expected = numel * (len(rule.stacked) if stacked else 1)
    if tensor is None or tensor.dtype != dtype or tensor.numel() != expected or not tensor.is_contiguous():
        found = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} must be contiguous {dtype} of {expected} elements for {rule!r}, got {found}")
    return tensor.view(-1, numel)[rule.stacked.index(key) if stacked else 0]


def _is_map(qmap: Tensor | None, rule: rules.Rule, state: rules.State) -> bool:
    return qmap is not None and torch.equal(qmap.float(), value_table(rule.codebook(state), qmap.device))


def _check_map(name: str, qmap: Tensor | None, rule: rules.Rule, state: rules.State) -> None:
    if not _is_map(qmap, rule, state):
        raise ValueError(
            f"{name} must be create_dynamic_map(signed={state.signed}), got {None if qmap is None else 'another map'}"
        )


# ---- nn -------------------------------------------------------------------------------------------------------------


def maybe_rearrange_weight(*args: Any) -> None:
    """Nothing: pickled layers name it as what is to be done before loading. Layouts of old GPUs are refused by loading."""


# ---- utils ----------------------------------------------------------------------------------------------------------


def pack_dict_to_tensor(source_dict: Mapping[str, Any]) -> Tensor:
    """A dict as the uint8 bytes of its JSON.

    >>> unpack_tensor_to_dict(pack_dict_to_tensor({"blocksize": 64}))
    {'blocksize': 64}
    """
    return torch.frombuffer(bytearray(json.dumps(source_dict).encode()), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> Any:
    """What `pack_dict_to_tensor` packed."""
    return json.loads(bytes(tensor_data.cpu().tolist()).decode())


def sync_gpu(t: Tensor) -> None:
    """Wait for the tensor's device."""
    if t.device.type in ("cuda", "xpu"):
        torch.accelerator.synchronize(t.device)


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[[int, int, bool], nn.Module],
    skip_modules: Iterable[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Replace every `nn.Linear` below a model by `linear_replacement(in_features, out_features, has_bias)`; the model.

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
        """By which a weight is known: its address."""
        return weight.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """The outlier columns of a weight's input, None before the model ran."""
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight)) if self.initialized else None


def outlier_hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Of `OutlierTracer`: columns by the weight's deviations, of the first layer by its input, too (any beyond 6)."""
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
