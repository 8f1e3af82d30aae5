"""The first name of `bnbref.integrations.hf.transformers`, which programs import; new ones say `bnbref.BnbRefConfig`."""

from bnbref.integrations.hf.transformers import (
    BnbRefConfig,
    BnbRefHfQuantizer,
    give_back_bitsandbytes,
    take_over_bitsandbytes,
)

__all__ = ["BnbRefConfig", "BnbRefHfQuantizer", "give_back_bitsandbytes", "take_over_bitsandbytes"]
