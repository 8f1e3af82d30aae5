"""Names of bitsandbytes that bnbref itself has no use for: old functions of its functional module, and constants.

Served by the alias alone, see `surface.py`. Each is a line or two over a function of bnbref.
"""

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, library

from bnbref import int8
from bnbref.blockwise import into
from bnbref.products import matmul, matmul_4bit

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
    A: Tensor, B: Tensor, out: Tensor | None, transposed_A: bool, transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:  # fmt: skip
    """The shape of the product, or of `out`. TypeError for other dtypes, ValueError for shapes that do not multiply.

    >>> check_matmul(torch.zeros(2, 3, dtype=torch.int8), torch.zeros(4, 3, dtype=torch.int8), None, False, True)
    (2, 4)
    """
    if A.dtype != expected_type or B.dtype != expected_type:
        raise TypeError(f"A and B must be {expected_type}, got {A.dtype} and {B.dtype}")
    left, right = _transposed_if(A, transposed_A), _transposed_if(B, transposed_B)
    same_rows = A.dim() == B.dim() == 3 and A.shape[:2] == B.shape[:2]
    if same_rows and out is not None and out.shape == (A.shape[2], B.shape[2]):
        return tuple(out.shape)
    if A.dim() not in (2, 3) or B.dim() not in (2, A.dim()) or left.shape[-1] != right.shape[-2]:
        raise ValueError(
            f"A and B must multiply, got {tuple(A.shape)} and {tuple(B.shape)}, "
            f"transposed_A={transposed_A}, transposed_B={transposed_B}"
        )
    return tuple(out.shape) if out is not None else (*left.shape[:-1], right.shape[-1])


def _transposed_if(x: Tensor, transposed: bool) -> Tensor:
    return x.transpose(-1, -2) if transposed else x


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """The int32 product of int8 matrices, A `[..., m, k]` and B `[k, n]`, or of stacks of matrices.  Exact.

    If out is a matrix `[i, o]` and A `[b, s, i]` and B `[b, s, o]` are stacks, it is the sum of all their products over b and s:
    the gradient of a weight.

    >>> igemm(torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3], [4]], dtype=torch.int8))
    tensor([[11]], dtype=torch.int32)
    """
    shape = check_matmul(A, B, out, transposed_A, transposed_B)
    if A.dim() == 3 and out is not None and len(shape) == 2:
        return into("out", out, int8.multiply(A.flatten(0, 1).t(), B.flatten(0, 1).t()))
    left, right = _transposed_if(A, transposed_A), _transposed_if(B, transposed_B)
    if right.dim() == 2:
        product = int8.multiply(left, right.t().contiguous())
    else:
        product = torch.stack([int8.multiply(a, b.t().contiguous()) for a, b in zip(left, right, strict=True)])
    return into("out", out, product)


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """The int32 products of the matrices of two int8 stacks, A `[b, m, k]` and B `[b, k, n]`.  Exact."""
    if A.dim() != 3 or B.dim() != 3:
        raise ValueError(f"A and B must have three dimensions, got {tuple(A.shape)} and {tuple(B.shape)}")
    return igemm(A, B, out, transposed_A, transposed_B)


# ---- nn -------------------------------------------------------------------------------------------------------------


def maybe_rearrange_weight(*args: Any) -> None:
    """Nothing: pickled layers name it as what is to be done before loading. Layouts of old GPUs are refused by loading."""
