"""The workshop: it makes the definitions of the book (`blockwise`, `fourbit`, `int8` and others) fast, and changes no bit.

`door` is what a call of a kernel goes through, with the registry of kernels. Eleven files are parts of it: `modes` (whether to
compile), `parameters` (what a kernel says of its arguments), `formulations` (what is compiled), `compiler` and `configured`
(under which options), `variants` (the one call of torch.compile), `direct` and `launch` (every later call), `kept_launches`
and `what_runs` (the first call of a later process), `ahead` (what another process compiles). Every other file is one idea of
how to compute a definition in a way that suits a compiler and a processor. Such a formulation attaches itself to the name of
its kernel, is loaded when something is compiled for the first time, and is proven equal to the definition. Some of them use
operators of bnbref's own (`taught`). Nobody needs one to read the book: docs/content/reading.md says how to read both.
"""

from bnbref.context import tracing
from bnbref.kernels.door import REGISTRY, Kernel, fused
from bnbref.kernels.formulations import formulation
from bnbref.kernels.modes import compile_enabled, eager, once

__all__ = ["REGISTRY", "Kernel", "compile_enabled", "eager", "formulation", "fused", "once", "tracing"]
