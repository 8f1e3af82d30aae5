"""BnbRefConfig: what is quantized and how, checked when it is made, and as it stands in config.json.

In config.json it is, by default, a `BitsAndBytesConfig`: whoever reads bitsandbytes' checkpoints reads these. What
bitsandbytes cannot read (other codebooks and block sizes, quantized experts) says `"quant_method": "bnbref"` instead.
"""

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from bnbref.arguments import dtype_name
from bnbref.blockwise import FLOATS, block_count, check_blocksize
from bnbref.checkpoint import BLOCKSIZES
from bnbref.checkpoint_weights import STORAGES
from bnbref.codebooks import FOUR_BIT
from bnbref.nested import BLOCKSIZE as NESTED_BLOCKSIZE
from bnbref.state_fields import ENTER

METHOD = "bnbref"

COMPUTE_DTYPE = "bnbref_compute_dtype"
"""Key beside bitsandbytes' keys in config.json: the compute dtype, "activation" if it is the activation's.

bitsandbytes cannot say "the activation's": it writes float32 for a user who set nothing. So without this key a float32 in
config.json means the activation's dtype, and any other dtype means itself.
"""


class BnbRefConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`from_pretrained(..., quantization_config=BnbRefConfig("nf4"))` quantizes with bnbref; nothing else to install.

    quant_type: "nf4", "fp4", "af4", "int4", or "int8" (LLM.int8()).
    double_quant: 4 bits: quantize the scales too; QLoRA's setting, 0.37 bits a weight less.
    compute_dtype: 4 bits: dtype of the products; None, the activation's.
    quant_storage: 4 bits: dtype of the packed tensor; uint8, or a float for FSDP1.
    blocksize: 4 bits: elements that share a scale.
    skip_modules: layers that stay as they are: the end of a name ("c_fc"), or a regular expression for its beginning
        (".*self_attn"), as in transformers. None: the output head, tied weights, the last layer if it has no bias. A list
        replaces that.
    threshold: int8: activations at least this large take the path of full precision; 0 turns it off.
    checkpoint_format: "bitsandbytes" or "bnbref", what config.json says; see the head of this file.

    >>> BnbRefConfig("nf4", blocksize=48)
    Traceback (most recent call last):
    ValueError: checkpoint_format 'bitsandbytes' needs quant_type nf4, fp4 or int8 and a blocksize of 32 to 4096, a ...
    """

    def __init__(
        self, quant_type: str = "nf4", *, double_quant: bool = True, compute_dtype: torch.dtype | str | None = None,
        quant_storage: torch.dtype | str = torch.uint8, blocksize: int = 64, skip_modules: list[str] | None = None,
        threshold: float = 6.0, checkpoint_format: str = "bitsandbytes", **unknown: NoReturn,
    ) -> None:  # fmt: skip
        if unknown:
            raise TypeError(
                f"arguments of BnbRefConfig must be among {', '.join(ARGUMENTS)}, got {', '.join(unknown)}: what bitsandbytes "
                "names load_in_4bit and load_in_8bit is quant_type='nf4' and quant_type='int8'"
            )
        self.quant_method = METHOD
        self.quant_type = quant_type
        self.double_quant = double_quant
        self.compute_dtype = None if compute_dtype is None else _dtype("compute_dtype", compute_dtype, FLOATS)
        self.quant_storage = _dtype("quant_storage", quant_storage, STORAGES)
        check_blocksize(blocksize, 0)
        self.blocksize = blocksize
        self.skip_modules = skip_modules
        self.threshold = threshold
        self.checkpoint_format = checkpoint_format
        self.model_dtype: torch.dtype | None = None  # known once a model is loaded
        self._check()

    def _check(self) -> None:
        allowed = [*FOUR_BIT, "int8"]
        if self.quant_type not in allowed:
            raise ValueError(f"quant_type must be one of {allowed}{ENTER}, got {self.quant_type!r}")
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"double_quant must be a bool, got {self.double_quant!r}")
        names = self.skip_modules
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError(f"skip_modules must be None or a list of strings, got {names!r}")
        for pattern in names or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"skip_modules must be ends of names, or regular expressions for their beginnings, got {pattern!r}: {error}"
                ) from error
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)) or not self.threshold >= 0:
            raise ValueError(f"threshold must be 0 (off) or positive, got {self.threshold!r}")
        if self.checkpoint_format not in ("bitsandbytes", METHOD):
            raise ValueError(f"checkpoint_format must be 'bitsandbytes' or {METHOD!r}, got {self.checkpoint_format!r}")
        if self.checkpoint_format == "bitsandbytes" and not self._known_to_bitsandbytes:
            raise ValueError(
                "checkpoint_format 'bitsandbytes' needs quant_type nf4, fp4 or int8 and a blocksize of 32 to 4096, "
                f"a power of two, got {self.quant_type!r} and {self.blocksize}: pass checkpoint_format={METHOD!r}"
            )

    @property
    def _known_to_bitsandbytes(self) -> bool:
        return self.quant_type == "int8" or (self.quant_type in ("nf4", "fp4") and self.blocksize in BLOCKSIZES)

    @property
    def is_int8(self) -> bool:
        """LLM.int8(), rather than a 4-bit codebook."""
        return self.quant_type == "int8"

    @property
    def bits(self) -> float:
        """Bits a quantized weight takes, scales included, for large weights."""
        if self.is_int8:
            return 8.0
        scale = 8 + 32 / 256 if self.double_quant else 32
        return 4 + scale / self.blocksize

    def bytes_of(self, rows: int, columns: int) -> tuple[int, int]:
        """Bytes of the codes and of the scales of a weight, exactly; the tables of values, which all weights share, are left out.

            int8                   n                4 rows                              n = rows * columns
            4 bits                 n / 2            4 b                                 b = n / blocksize blocks
            4 bits, double_quant   n / 2            b + 4 (b / 256) + 4                 scales in 8 bits, theirs, the mean

        Quotients are rounded up.

        >>> BnbRefConfig("nf4").bytes_of(4096, 4096)
        (8388608, 266244)
        """
        if self.is_int8:
            return rows * columns, 4 * rows
        blocks = block_count(rows * columns, self.blocksize)
        scales = blocks + 4 * block_count(blocks, NESTED_BLOCKSIZE) + 4 if self.double_quant else 4 * blocks
        return block_count(rows * columns, 2), scales

    @property
    def bnb_4bit_quant_storage(self) -> torch.dtype:
        """`quant_storage`, by the name under which transformers' FSDP support looks for it."""
        return self.quant_storage

    # ---- config.json ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The dictionary for config.json, in the form that `checkpoint_format` names."""
        arguments = {name: getattr(self, name) for name in ARGUMENTS}
        own = {name: dtype_name(x) if isinstance(x, torch.dtype) else x for name, x in arguments.items()}
        own = {"quant_method": METHOD, **own}
        return own if self.checkpoint_format == METHOD else self._to_bitsandbytes()

    def _to_bitsandbytes(self) -> dict[str, Any]:
        config = BitsAndBytesConfig(
            load_in_4bit=not self.is_int8,
            load_in_8bit=self.is_int8,
            llm_int8_threshold=float(self.threshold),
            llm_int8_skip_modules=self.skip_modules,
            # For readers that cannot say "the activation's". Left out, it would be float32 to them, which is slow.
            bnb_4bit_compute_dtype=self.compute_dtype or self.model_dtype,
            bnb_4bit_quant_type="fp4" if self.is_int8 else self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant and not self.is_int8,
            bnb_4bit_quant_storage=self.quant_storage,
        )
        said = (
            {}
            if self.is_int8
            else {COMPUTE_DTYPE: dtype_name(self.compute_dtype) if self.compute_dtype else "activation"}
        )
        return {**config.to_dict(), **said}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From `to_dict`'s dictionary of either format."""
        fields = dict(config_dict)
        if fields.pop("quant_method", METHOD) != METHOD:
            original = BitsAndBytesConfig.from_dict(config_dict)
            setattr(original, COMPUTE_DTYPE, fields.get(COMPUTE_DTYPE))
            config = cls.of_bitsandbytes(original)
        else:
            config = cls(**fields)
        return (config, kwargs) if return_unused_kwargs else config

    def of_checkpoint(self, config_dict: Mapping[str, Any]) -> "BnbRefConfig":
        """The config of a checkpoint that is quantized already, from its dictionary, with this compute_dtype if it is given.

        ValueError for another quant_type than the checkpoint's. In all else the checkpoint's settings hold; a warning names those
        that this config would have otherwise, and not by default.
        """
        config: BnbRefConfig = BnbRefConfig.from_dict({"quant_method": "bitsandbytes", **config_dict})
        if config.quant_type != self.quant_type:
            raise ValueError(
                f"quant_type must be that of the checkpoint, which is quantized already, {config.quant_type!r}, got "
                f"{self.quant_type!r}"
            )
        config.compute_dtype = self.compute_dtype or config.compute_dtype
        usual = inspect.signature(BnbRefConfig).parameters
        asked = [name for name in ARGUMENTS if getattr(self, name) not in (usual[name].default, getattr(config, name))]
        if asked:
            hold, given = (", ".join(f"{name}={getattr(c, name)!r}" for name in asked) for c in (config, self))
            warnings.warn(f"the checkpoint is quantized already: its {hold} hold, not {given}", stacklevel=2)
        return config

    @classmethod
    def of_bitsandbytes(cls, config: BitsAndBytesConfig) -> "BnbRefConfig":
        """The config that asks for the same as a `BitsAndBytesConfig`.

        >>> BnbRefConfig.of_bitsandbytes(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")).bits
        4.5
        """
        if not config.load_in_8bit and not config.load_in_4bit:
            raise ValueError("BitsAndBytesConfig must have load_in_4bit=True or load_in_8bit=True, got neither")
        compute = getattr(config, COMPUTE_DTYPE, None)
        if compute is None and config.bnb_4bit_compute_dtype != torch.float32:
            compute = config.bnb_4bit_compute_dtype
        return cls(
            "int8" if config.load_in_8bit else config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
            compute_dtype=None if compute == "activation" else compute,
            quant_storage=config.bnb_4bit_quant_storage,
            skip_modules=config.llm_int8_skip_modules,
            threshold=config.llm_int8_threshold,
        )


ARGUMENTS = tuple(inspect.signature(BnbRefConfig).parameters)[:-1]
"""The names of the arguments of `BnbRefConfig`, without the last one, `unknown`."""


def dtype_of(value: torch.dtype | str) -> Any:
    """A dtype from its name, which is what a saved config has; a dtype is returned as it is.

    None if torch has none of that name.
    """
    return getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value


def _dtype(name: str, value: torch.dtype | str, allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    dtype: torch.dtype = dtype_of(value)
    if dtype not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(dtype_name, allowed))}, got {value!r}")
    return dtype
