"""What a compiler needs on this machine, and the options under which its code has the bits of the eager operations."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref.context import constant_of_graphs

# The door has compared all that these would look at again in every call.
_NO_ASSERTS = {"size_asserts": False, "alignment_asserts": False, "assert_indirect_indexing": False}

# What somebody may set for his own graphs, and so in the whole process, by torch._inductor.config or the environment, and what
# must not reach ours. The first three let the C++ compiler, or Triton's functions, round otherwise than IEEE 754 says. The next
# two choose another generator of code than formulations and options are for. The others are functions that rewrite graphs.
_OURS = {
    "cpp.enable_unsafe_math_opt_flag": False,
    "cpp.enable_floating_point_contract_flag": "off",
    "use_fast_math": False,
    "cpu_backend": "cpp",
    "cuda_backend": "triton",
    "pre_grad_custom_pass": None,
    "joint_custom_pre_pass": None,
    "joint_custom_post_pass": None,
    "post_grad_custom_pre_pass": None,
    "post_grad_custom_post_pass": None,
    "_pre_fusion_custom_pass": None,
    "_post_fusion_custom_pass": None,
}

# Triton contracts a*b+c into one rounding, divides with an error of 2 ulp and drops the rounding of a 16-bit float between two
# operations, unless told not to. Names that list the operations of a kernel get longer than the 150 letters that Triton gives a
# file, and torch then launches the kernel by way of Triton, not of the file.
_GPU_OPTIONS = {
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "eager_numerics.disable_ftz": True,
    "triton.descriptive_names": False,
    **_NO_ASSERTS,
}

TUNED = {"coordinate_descent_tuning": True}
"""An option of encoders: on a GPU Inductor compiles and times a dozen block sizes, for some seconds of the first call. Decoders
gain nothing by it (docs: How to read the code, table "choices of the door")."""


def is_gpu(x: Tensor) -> bool:
    """Whether a formulation takes its way for GPUs, which is look-ups in memory and wide loads.

    A function of its own, because tests replace it to take that way on a CPU.
    """
    return x.device.type != "cpu"


def is_nvidia(x: Tensor) -> bool:
    """Whether a formulation may look up by address: the signs of a GPU's NaN count there, and nobody looked at others'."""
    return is_gpu(x) and x.device.type != "xpu" and torch.version.hip is None  # a CPU comes here in tests alone


_failed: dict[str, str] = {}
"""Device types for which a compilation failed for a reason that was not in what was compiled, with that reason."""


def give_up(why: str) -> None:
    """From now on nothing is compiled, for this reason."""
    _failed.update(dict.fromkeys(("cpu", "cuda", "xpu"), why))


# What is no fault of a kernel: a folder, a triton of another version, a source of torch's that a locale in ASCII cannot read.
_OUTSIDE = (ImportError, OSError, UnicodeDecodeError)
_OF_INDUCTOR = ("CppCompileError", "InvalidCxxCompiler")  # by name, as torch._inductor may be what cannot be imported


def why_failed(device_type: str, error: BaseException) -> str | None:
    """The reason, if the compiler or Inductor's folder made a compilation fail: `missing_compiler` says it from then on.

    It is asked afterwards, because nothing that is cheap tells whether a compiler that is there, and a folder, will do.
    """
    cause = _outside(error)
    if cause is None:
        return None
    if isinstance(cause, (ImportError, UnicodeDecodeError)):
        remedy = "; PYTHONUTF8=1 lets it read its own source" if isinstance(cause, UnicodeDecodeError) else ""
        why = f"torch's compiler cannot be imported ({type(cause).__name__}: {cause}{remedy})"
        return _failed.setdefault(device_type, why)
    lines = [line.strip() for line in str(cause).splitlines()]
    if isinstance(cause, OSError):  # of a full disk, or of a process that may not be started
        said = lines[0].partition(".  ")[0]
        why = f"Inductor cannot start a compiler or keep code in its folder, TORCHINDUCTOR_CACHE_DIR ({said})"
        return _failed.setdefault(device_type, why)
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
    if " " in folder:
        return _failed.setdefault(
            device_type, _unusable(f"{folder!r} has blanks, which torch does not quote for a compiler")
        )
    if " " in tempfile.gettempdir():
        why = f"{tempfile.gettempdir()!r} has blanks, which torch does not quote for a compiler: set TMPDIR to a folder without"
        return _failed.setdefault(device_type, why)
    installed = next((path for path in (torch.__file__, sysconfig.get_path("include")) if " " in path), None)
    if installed is not None:
        why = f"{installed!r} has blanks, which torch does not quote for a compiler: install torch in a folder without"
        return _failed.setdefault(device_type, why)
    said = next((line for line in lines if "error:" in line), lines[0])
    return _failed.setdefault(device_type, f"the C++ compiler {_cxx()!r} fails ({said})")


def _outside(error: BaseException) -> BaseException | None:
    """What was no fault of a kernel, among the causes of an error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _OUTSIDE) and type(cause).__name__ not in _OF_INDUCTOR:
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    return cause


def remove_fragment(error: BaseException) -> bool:
    """Removes the library for which a compilation failed, if it is in Inductor's folder and a killed process wrote only a part of
    it, and returns whether it did. Inductor would try to load it in every process that is to come.
    """
    path, _, why = str(_outside(error)).partition(".so: ")
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")  # Inductor sets it when it is first used
    partial = why in ("file too short", "invalid ELF header", "cannot read file data")
    if not partial or Path(path).parent.parent != Path(folder):  # FOLDER/xx/NAME.so, as Inductor names them
        return False
    try:
        Path(f"{path}.so").unlink()
    except OSError:  # another process was faster, or it is another user's
        return False
    return True


def _unusable(why: str) -> str:
    return f"Inductor cannot keep code in its folder, TORCHINDUCTOR_CACHE_DIR ({why})"


def _cxx() -> str:
    """The C++ compiler that Inductor will use: it asks for CXX when it is imported, and no more."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None:
        return str(config.cpp.cxx[-1])
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@functools.cache
def _cxx_version() -> int | None:
    """The major version of that compiler; None if it does not run."""
    done = subprocess.run([_cxx(), "-dumpversion"], capture_output=True, text=True, check=False)
    major = done.stdout.strip().partition(".")[0]
    return int(major) if done.returncode == 0 and major.isdecimal() else None


def missing_compiler(device_type: str) -> str | None:
    """What Inductor lacks on this machine to compile for a device type, or who has switched it off; None if nothing."""
    return _failed.get(device_type) or _lacking(device_type) or _switched_off()


def _switched_off() -> str | None:
    """By what somebody has switched torch.compile off for the whole process. It may be on again at the next call."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # of which another thread may have imported a part
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        by = "TORCHDYNAMO_DISABLE=1"
    elif getattr(getattr(dynamo, "config", None), "disable", False):
        by = "torch._dynamo.config.disable"
    elif getattr(getattr(dynamo, "_stance", None), "stance", "") == "force_eager":
        by = "torch.compiler.set_stance('force_eager')"
    else:
        return None
    return f"{by} switches torch.compile off"


@constant_of_graphs
def compiles(device_type: str) -> bool:
    """Whether Inductor can compile for a device type."""
    return missing_compiler(device_type) is None


@functools.cache
def _lacking(device_type: str) -> str | None:
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE=1 switches torch.compile off"
    if sys.flags.optimize:
        # Inductor catches assertions of its own: without them `quantize_rows` did not store its codes in torch 2.13.
        return "python -O or PYTHONOPTIMIZE takes away assertions by which torch's compiler decides what it writes"
    try:
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        return _unusable(str(error))
    if not os.access(folder, os.W_OK):
        return _unusable(f"{folder!r} cannot be written")
    if device_type == "cpu":
        if shutil.which(_cxx()) is None:
            return f"no C++ compiler ({_cxx()!r} is not on the PATH; set CXX or install g++)"
        if Path(_cxx()).name in ("gcc", "cc", "clang"):
            return f"no C++ compiler ({_cxx()!r} is one for C, which peft's BOFT leaves in CXX: unset CXX, or set it to g++)"
        try:
            runs = _cxx_version() is not None
        except OSError as error:  # no program, or no process may be started
            return f"no C++ compiler ({_cxx()!r} cannot be started: {error})"
        if not runs:
            return f"no C++ compiler ({_cxx()!r} does not run)"
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            frozen = getattr(sys, "frozen", False)  # by PyInstaller
            return "no Python.h " + ("in this frozen program" if frozen else "(install Python's development headers)")
        return None
    if device_type in ("cuda", "xpu"):
        return None if importlib.util.find_spec("triton") else "no triton (pip install triton)"
    return f"no Inductor backend that was ever tried with bnbref on device type {device_type!r}"


@functools.cache
def _prepare_cpu() -> dict[str, Any]:
    """Prepares Inductor for CPUs, once per process, and returns the options that all kernels share there."""
    from torch._inductor import config

    from bnbref.kernels import lookup16

    # To learn which vector instructions the compiler and the CPU share, Inductor builds and loads three libraries, which takes
    # seconds. It need not: torch asks the CPU itself, and a compiler from GCC 11 on knows all of these instructions but AMX-FP16.
    known = config.cpp.vec_isa_ok is None and (_cxx_version() or 0) >= 11 and not torch.cpu._is_amx_fp16_supported()
    options: dict[str, Any] = {"cpp.vec_isa_ok": True} if known else {}
    with config.patch(options):
        lookup16.enable()
    return {**_OURS, **_NO_ASSERTS, **options}


def options_for(device_type: str, own: Mapping[str, Any], large: bool) -> dict[str, Any]:
    """Inductor's options for a kernel: those of the device type, overridden by the kernel's own.

    large: whether the variant is the one for large tensors.
    """
    if device_type != "cpu":
        options = {**_OURS, **_GPU_OPTIONS, **own}
        if not large:  # seconds of a first call that a small tensor never earns back
            options.pop("coordinate_descent_tuning", None)
        return options
    options = {**_prepare_cpu(), **own}
    widest = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())
    # A kernel's own width counts on CPUs with AVX512 only: elsewhere it may be a width that Inductor does not know, for which it
    # writes scalar code. The width is always among the options, because Inductor's cache on disk tells options apart, but not the
    # instruction sets that code was made for (a directory shared by machines, or another ATEN_CPU_CAPABILITY).
    if options.get("cpp.simdlen") != 1 and (widest != 512 or "cpp.simdlen" not in options):
        options["cpp.simdlen"] = widest
    return options
