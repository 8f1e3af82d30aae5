"""bnbref inside other libraries. `report(model)`: what became of every parameter, and why.

bnbref.integrations.transformers    from_pretrained(..., quantization_config=...)
bnbref.integrations.peft            LoRA on quantized layers
"""

from bnbref.integrations.inventory import ParameterReport, Report, report

__all__ = ["ParameterReport", "Report", "report"]
