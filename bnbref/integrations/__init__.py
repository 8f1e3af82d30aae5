"""bnbref inside other libraries. What users need of it is reached from `bnbref` itself.

bnbref.integrations.hf              transformers, peft and accelerate: `BnbRefConfig`, `register_lora`
bnbref.integrations.bitsandbytes    where code imports bitsandbytes and cannot be changed: `install_as_bitsandbytes`
"""
