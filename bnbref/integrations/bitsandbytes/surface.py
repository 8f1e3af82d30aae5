"""The public surface of bitsandbytes 0.50.2: where each name comes from, and what there is not, with the reason.

    SURFACE[module][name] = "module.of.bnbref:attribute", or "module:" for a module itself
    MISSING["module.name"] = a sentence

`docs/surface.py` makes the table of the documentation from these, says what differs, and compares them with bitsandbytes, where
it is installed.
"""

EXTRAS = "bnbref.integrations.bitsandbytes.extras"
UPDATES = "bnbref.integrations.bitsandbytes.updates"
UTILS = "bnbref.integrations.bitsandbytes.utils"

_OPTIMIZERS = {
    "adagrad": "Adagrad Adagrad8bit Adagrad32bit",
    "adam": "Adam Adam8bit Adam32bit PagedAdam PagedAdam8bit PagedAdam32bit",
    "adamw": "AdamW AdamW8bit AdamW32bit PagedAdamW PagedAdamW8bit PagedAdamW32bit",
    "ademamix": "AdEMAMix AdEMAMix8bit AdEMAMix32bit PagedAdEMAMix PagedAdEMAMix8bit PagedAdEMAMix32bit",
    "lamb": "LAMB LAMB8bit LAMB32bit",
    "lars": "LARS LARS8bit LARS32bit",
    "lion": "Lion Lion8bit Lion32bit PagedLion PagedLion8bit PagedLion32bit",
    "rmsprop": "RMSprop RMSprop8bit RMSprop32bit",
    "sgd": "SGD SGD8bit SGD32bit",
}

_LAYERS = (
    "Embedding Embedding4bit Embedding8bit EmbeddingFP4 EmbeddingNF4 Int8Params Linear4bit Linear8bitLt LinearFP4 "
    "LinearNF4 Params4bit StableEmbedding"
)

_FUNCTIONS = (
    "QuantState create_dynamic_map create_fp8_map create_linear_map create_normal_map dequantize_4bit "
    "dequantize_blockwise dequantize_fp4 dequantize_nf4 gemv_4bit get_4bit_type int8_double_quant int8_linear_matmul "
    "int8_mm_dequant int8_vectorwise_dequant int8_vectorwise_quant quantize_4bit quantize_blockwise quantize_fp4 "
    "quantize_nf4"
)


def _from(source: str, names: str) -> dict[str, str]:
    return {name: f"{source}:{name}" for name in names.split()}


_PRODUCTS = _from("bnbref", "MatmulLtState matmul matmul_4bit")
_MANAGER = _from("bnbref.optim", "GlobalOptimManager")
_PACKING = _from(UTILS, "pack_dict_to_tensor unpack_tensor_to_dict")
_F = {"F": "bitsandbytes.functional:"}
_TWO_STATES = ("adam", "adamw", "ademamix", "lamb")


def _base(family: str) -> dict[str, str]:
    """What the module of a family of optimizers imports from others."""
    base = {f"Optimizer{2 if family in _TWO_STATES else 1}State": "bnbref.optim:Optimizer"}
    return base | _F if family == "ademamix" else base


SURFACE: dict[str, dict[str, str]] = {
    "": _PRODUCTS
    | _from(EXTRAS, "features supported_torch_devices")
    | {"modules": "bitsandbytes.nn:modules", "adam": "bitsandbytes.optim:adam"},
    "_ops": _from(EXTRAS, "register_fake register_kernel"),
    "autograd": {},
    "autograd._functions": _PRODUCTS | _F | _from(EXTRAS, "MatMul4Bit MatMul8bitFp MatMul8bitLt"),
    "cextension": _from(EXTRAS, "BNB_BACKEND HIP_ENVIRONMENT"),
    "functional": _from("bnbref.functional", _FUNCTIONS)
    | _from(EXTRAS, "C batched_igemm check_matmul fill get_ptr has_avx512bf16 igemm is_on_gpu name2qmap")
    | _from(UPDATES, "optimizer_update_32bit optimizer_update_8bit_blockwise")
    | _PACKING,
    "nn": _from("bnbref.nn", _LAYERS),
    "nn.modules": _from("bnbref.nn", _LAYERS)
    | _from(EXTRAS, "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING has_avx512bf16 maybe_rearrange_weight")
    | _from("bnbref.functional", "QuantState")
    | _from(UTILS, "OutlierTracer")
    | _MANAGER
    | {"bnb": "bitsandbytes:"},
    "nn.parametrize": _F
    | _from(
        "bnbref.nn.parametrize", "Bnb4bitParametrization replace_parameter_4bit replace_parameter_4bit_prequantized"
    ),
    "optim": _MANAGER | _from("bnbref.optim", " ".join(_OPTIMIZERS.values())),
    **{f"optim.{family}": _from("bnbref.optim", names) | _base(family) for family, names in _OPTIMIZERS.items()},
    "optim.optimizer": _MANAGER
    | dict.fromkeys(("Optimizer8bit", "Optimizer1State", "Optimizer2State"), "bnbref.optim:Optimizer")
    | _from(UTILS, "sync_gpu")
    | _F,
    "utils": _from(EXTRAS, "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING")
    | _PACKING
    | _from(UTILS, "OutlierTracer find_outlier_dims outlier_hook replace_linear sync_gpu"),
}

_MANAGED = "CUDA's managed memory has no counterpart in torch: the paged optimizers page by themselves."
_LIBRARY = "There is no compiled library: call the functions of `bitsandbytes.functional`."

MISSING: dict[str, str] = {
    "autograd._functions.GlobalOutlierPooler": "Outlier columns are found anew in every product: nothing is pooled.",
    **dict.fromkeys((
        "cextension.lib", "cextension.BNBNativeLibrary", "cextension.CudaBNBNativeLibrary", "cextension.DYNAMIC_LIBRARY_SUFFIX",
        "cextension.ErrorHandlerMockBNBNativeLibrary", "cextension.ROCM_GPU_ARCH", "cextension.XpuBNBNativeLibrary",
        "cextension.get_available_cuda_binary_versions", "cextension.get_cuda_bnb_library_path", "cextension.get_native_library",
        "cextension.get_xpu_bnb_library_path", "cextension.parse_cuda_version", "functional.CUBLAS_Context", "functional.lib",
    ), _LIBRARY),
    **dict.fromkeys((
        "functional.FIRST_CUDA_DEVICE", "functional.GlobalPageManager", "functional.elementwise_func", "functional.get_paged",
        "functional.prefetch_tensor",
    ), _MANAGED),
    "nn.OutlierAwareLinear": "Abstract in bitsandbytes: it has no product. Linear8bitLt keeps outliers by a threshold.",
    "nn.modules.OutlierAwareLinear": "Abstract in bitsandbytes: it has no product.",
    "nn.modules.T": "A type variable.",
    "nn.modules.fix_4bit_weight_quant_state_from_module": "Not needed: a layer remembers the scales of its weight.",
    **dict.fromkeys(("optim.PytorchLARS", "optim.lars.PytorchLARS"), "Use LARS32bit: the same rule."),
    "optim.optimizer.MockArgs": "Settings are passed by name.",
    "utils.execute_and_return": "Runs shell commands: use subprocess.",
}  # fmt: skip
