"""The tables of docs/content/dropin.md: every public name of bitsandbytes, whether bnbref serves it, and what differs.

python docs/surface.py            the tables, from tests/data/bitsandbytes_names.txt
python docs/surface.py --walk     the names, from the bitsandbytes that is installed
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from bnbref.integrations.bitsandbytes.surface import MISSING, SURFACE

NAMES = Path(__file__).resolve().parent.parent / "tests" / "data" / "bitsandbytes_names.txt"
_CLASS_IS_APPLY = "Only `.apply`, which is `matmul` or `matmul_4bit`: no class of `torch.autograd.Function`."
_SAME_NUMBERS = (
    "The equations of `bnbref.optim`: weight decay before the step. Codes must be of the dynamic maps, 256 a block."
)
_BASE = "`bnbref.optim.Optimizer`: for `isinstance`. Its constructor takes a `Rule`, see Optimizers."

DIFFERS: dict[str, str] = {
    "MatmulLtState": "No fields of transposed copies and sparse pools; deprecated ones are plain attributes.",
    **{f"autograd._functions.{name}": _CLASS_IS_APPLY for name in ("MatMul4Bit", "MatMul8bitFp", "MatMul8bitLt")},
    "cextension.BNB_BACKEND": '"PyTorch".',
    "functional.QuantState": "Equality is of bits; a malformed dict is refused.",
    "functional.get_4bit_type": "On the CPU by default, not on a GPU that may not be there; int4 too.",
    "functional.has_avx512bf16": "False: weights are never repacked.",
    "functional.igemm": "Any device, exact.",
    "functional.batched_igemm": "Any device, exact.",
    "functional.is_on_gpu": "Whether all tensors are on one device: there is none without kernels.",
    "functional.name2qmap": "Empty: maps are cached by codebook.",
    "functional.optimizer_update_32bit": _SAME_NUMBERS,
    "functional.optimizer_update_8bit_blockwise": _SAME_NUMBERS,
    "matmul": "On a CPU, too, LLM.int8() and no float product in its place.",
    "nn.Linear4bit": "compute_dtype stays what it was set to; without one it is the activation's at each call. It is "
    "float32, float16 or bfloat16; quant_storage may also be uint8, int8 or float64. Others are refused.",
    "nn.Params4bit": "A cast of packed codes is refused; `.to` leaves the original as it was.",
    "nn.Int8Params": "`CB` is the data; a cast of codes is refused.",
    "nn.modules.maybe_rearrange_weight": "Does nothing: weights in the layouts of old GPUs are refused when they are loaded.",
    **{f"optim.optimizer.{name}": _BASE for name in ("Optimizer8bit", "Optimizer1State", "Optimizer2State")},
    "utils.outlier_hook": "Deviations of the first layer's input are by column; in bitsandbytes they are by row.",
}
"""What is served and is not all the same, by `module.name`."""

MISSING_MODULES: dict[str, str] = {
    "backends": "Kernels of bitsandbytes. Ours come behind `torch.ops.bitsandbytes`.",
    "consts": "Names of binaries.",
    "cuda_specs": "Finds CUDA for the binaries.",
    "diagnostics": "Looks for binaries; `python -m bnbref info` says what bnbref runs on.",
}
"""Modules that are not served at all."""


def walk() -> Iterator[str]:
    """`module.name` of all that the modules of bitsandbytes have of bitsandbytes and do not call private, and so what one imports
    from another; modules of kernels left out."""
    import bitsandbytes

    found = [module.name for module in pkgutil.walk_packages(bitsandbytes.__path__, "bitsandbytes.")]
    for path in ["bitsandbytes", *found]:
        short = path.removeprefix("bitsandbytes").removeprefix(".")
        if short.split(".")[0] in (*MISSING_MODULES, "__main__") or short.startswith("libbitsandbytes"):
            continue
        module = importlib.import_module(path)
        for name, value in sorted(vars(module).items()):
            own = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", path)
            package, _, home = own.partition(".")
            ours = own == path or (package == "bitsandbytes" and home.split(".")[0] not in MISSING_MODULES)
            if ours and not name.startswith("_") and f"{short}.{name}".removeprefix(".") != home:
                yield f"{short}.{name}".removeprefix(".")


def split(name: str) -> tuple[str, str]:
    """Module and name."""
    module, _, attribute = name.rpartition(".")
    return module, attribute


def grouped(reasons: dict[str, str]) -> Iterator[str]:
    """Rows of names that have one reason."""
    for reason in dict.fromkeys(reasons.values()):
        yield f"| {', '.join(f'`{name}`' for name, own in reasons.items() if own == reason)} | {reason} |"


def table() -> str:
    """What is there and the same, by module; what differs; what is not there. An object may have names in several modules."""
    names = NAMES.read_text(encoding="utf-8").split()
    by_attribute = {split(name)[1]: reason for name, reason in DIFFERS.items()}
    there = [name for name in names if split(name)[1] in SURFACE.get(split(name)[0], {})]
    differs = {name: by_attribute[split(name)[1]] for name in there if split(name)[1] in by_attribute}
    missing = {name: MISSING[name] for name in names if name not in there} | MISSING_MODULES
    same: dict[str, list[str]] = {}
    for module, attribute in (split(name) for name in there if name not in differs):
        same.setdefault(f"bitsandbytes.{module}".rstrip("."), []).append(f"`{attribute}`")
    return "\n".join(
        [
            "### The same\n\n| module | names |\n|---|---|",
            *(f"| `{module}` | {', '.join(own)} |" for module, own in same.items()),
            "\n### There, with a difference\n\n| names | what differs |\n|---|---|", *grouped(differs),
            "\n### Not there\n\n| names, and the last four: modules | why |\n|---|---|", *grouped(missing),
        ]
    )  # fmt: skip


if __name__ == "__main__":
    print("\n".join(walk()) if "--walk" in sys.argv else table())
