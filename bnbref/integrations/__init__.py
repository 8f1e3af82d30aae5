"""bnbref inside other libraries. `report(model)`: what became of every parameter, and why.

bnbref.integrations.transformers    from_pretrained(..., quantization_config=...)
bnbref.integrations.peft            LoRA on quantized layers
bnbref.integrations.trainer         8-bit and paged optimizers in transformers' Trainer

`bnbref.install_as_bitsandbytes()`: where code imports bitsandbytes and cannot be changed.
"""

from bnbref.integrations.bitsandbytes_alias import as_bitsandbytes
from bnbref.integrations.inventory import ParameterReport, Report, report

__all__ = ["ParameterReport", "Report", "as_bitsandbytes", "report"]
