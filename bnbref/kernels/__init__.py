"""The workshop: what makes the book's definitions fast, and never other than they are.

`door` is the one door to torch.compile and the registry of kernels. Every other file here is one idea: a way to compute a
definition that suits a compiler and a processor. It attaches itself to the name of its kernel, is loaded when something is
compiled for the first time, and is proven equal to the definition. To read the book nobody needs any of them.
"""

from bnbref.kernels.door import (
    REGISTRY,
    Kernel,
    compile_enabled,
    eager,
    formulation,
    fused,
    tracing,
)

__all__ = ["REGISTRY", "Kernel", "compile_enabled", "eager", "formulation", "fused", "tracing"]
