"""The libraries of Hugging Face. Nothing here is imported by `import bnbref`.

transformers    `from_pretrained(..., quantization_config=...)`: config, quantizer, layers, loading, experts, readers
peft            adapters on quantized layers: peft_checks, peft_parameters
trainer         8-bit and paged optimizers in transformers' Trainer
qlora           from a text to an adapter
plan            how much memory a model takes
"""
