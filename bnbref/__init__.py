"""bitsandbytes as plain PyTorch tensor operations, compiled by Inductor into fused kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from bnbref import checkpoint, codebooks, functional, kernels, nn, optim
from bnbref import operators as operators  # what graphs hold; packers of programs find an import alone
from bnbref.codebooks import Codebook
from bnbref.integrations.bitsandbytes.alias import as_bitsandbytes, install_as_bitsandbytes, uninstall_as_bitsandbytes
from bnbref.kernels import eager
from bnbref.kernels.ordered import batch_invariant
from bnbref.nn.inventory import report
from bnbref.products import MatmulLtState, matmul, matmul_4bit
from bnbref.quant_state import QuantState

if TYPE_CHECKING:  # "as" says to type checkers that these names are for others
    from bnbref.integrations.hf.peft import register_lora as register_lora
    from bnbref.integrations.hf.transformers import BnbRefConfig as BnbRefConfig
    from bnbref.integrations.hf.transformers import give_back_bitsandbytes as give_back_bitsandbytes
    from bnbref.integrations.hf.transformers import take_over_bitsandbytes as take_over_bitsandbytes

__version__ = "0.1.0"

# Without the names below, so that `from bnbref import *` needs no transformers.
__all__ = [
    "Codebook", "MatmulLtState", "QuantState", "__version__", "as_bitsandbytes", "batch_invariant", "checkpoint", "codebooks",
    "eager", "functional", "install_as_bitsandbytes", "kernels", "matmul", "matmul_4bit", "nn", "optim", "report",
    "uninstall_as_bitsandbytes",
]  # fmt: skip

_NEED_HUGGING_FACE = {
    "BnbRefConfig": "bnbref.integrations.hf.transformers",
    "give_back_bitsandbytes": "bnbref.integrations.hf.transformers",
    "register_lora": "bnbref.integrations.hf.peft",
    "take_over_bitsandbytes": "bnbref.integrations.hf.transformers",
}
"""The modules of the names that are imported when they are first asked for."""

if not TYPE_CHECKING:  # a type checker would believe that there is any name

    def __getattr__(name: str) -> Any:
        home = _NEED_HUGGING_FACE.get(name)
        if home is None:
            raise AttributeError(f"module 'bnbref' has no attribute {name!r}", name=name)
        try:
            return getattr(importlib.import_module(home), name)
        except ModuleNotFoundError as error:
            if error.name is None:  # transformers' own, about what it could not import
                raise
            raise ImportError(f"bnbref.{name} needs {error.name}: pip install {error.name}", name=error.name) from error


def __dir__() -> list[str]:
    # The names that users may use, without those that this file imports for itself.
    return sorted([*__all__, *_NEED_HUGGING_FACE])
