"""bitsandbytes as plain PyTorch tensor operations, compiled by Inductor into fused kernels."""

from bnbref import functional, nn, optim
from bnbref.fused import eager
from bnbref.integrations.bitsandbytes_alias import install_as_bitsandbytes, uninstall_as_bitsandbytes
from bnbref.linear4bit import matmul_4bit
from bnbref.linear8bit import MatmulLtState, matmul
from bnbref.ordered import batch_invariant

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
