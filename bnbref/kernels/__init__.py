"""The workshop: it makes the definitions of the book (`blockwise`, `fourbit`, `int8` and others) fast, and changes no bit.

`door` is the one door to torch.compile, with the registry of kernels. `compiler` has the compilers' options. Every other file is
one idea of how to compute a definition in a way that suits a compiler and a processor. Such a formulation attaches itself to the
name of its kernel, is loaded when something is compiled for the first time, and is proven equal to the definition. Nobody
needs one to read the book: docs/content/reading.md says how to read both.
"""

from bnbref.kernels.door import REGISTRY, Kernel, compile_enabled, eager, formulation, fused, once, tracing

__all__ = ["REGISTRY", "Kernel", "compile_enabled", "eager", "formulation", "fused", "once", "tracing"]
