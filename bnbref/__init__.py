"""bitsandbytes as plain PyTorch tensor operations, compiled by Inductor into fused kernels."""

from bnbref import functional, nn, optim
from bnbref.integrations.bitsandbytes_alias import install_as_bitsandbytes, uninstall_as_bitsandbytes
from bnbref.kernels import eager
from bnbref.kernels.ordered import batch_invariant
from bnbref.linear4bit import matmul_4bit
from bnbref.linear8bit import MatmulLtState, matmul

__version__ = "0.1.0"

__all__ = [
    "MatmulLtState",
    "batch_invariant",
    "eager",
    "functional",
    "install_as_bitsandbytes",
    "matmul",
    "matmul_4bit",
    "nn",
    "optim",
    "uninstall_as_bitsandbytes",
]
