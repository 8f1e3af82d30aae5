"""`python -m bnbref info`: versions, devices, how kernels run here, and whether they give the right bits."""

import importlib.metadata
import math
import os
import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import bnbref
from bnbref import selfcheck
from bnbref.kernels import compile_enabled, lookup16
from bnbref.kernels.compiler import missing_compiler
from bnbref.selfcheck import Check, Result, formats, kernels_compiled
from bnbref.subnormals import FLUSHED, flushes_subnormals

OPTIONAL = ("triton", "transformers", "peft", "accelerate", "bitsandbytes")


def info(seconds: float = 10.0) -> bool:
    """Prints the report. Returns whether the self-check passed. seconds: after which no more kernels are compiled for it."""
    device = default_device()
    section("versions", versions())
    section("devices", devices())
    section("kernels", kernels(device))
    return _report(device, seconds, formats.CHECKS, "formats")


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return available_accelerator() or torch.device("cpu")


def available_accelerator() -> torch.device | None:
    """The accelerator that this build of torch is for, if the machine has one: a CUDA build runs without a GPU, too."""
    return torch.accelerator.current_accelerator(check_available=True)


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16; without them they take up to four times those in float32."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a small model is fastest: bfloat16, but float32 on a CPU without instructions for bfloat16."""
    return torch.float32 if device.type == "cpu" and not multiplies_bfloat16() else torch.bfloat16


def section(title: str, rows: list[tuple[str, str]]) -> None:
    """A title, and rows of a name and a value, aligned."""
    print(title)
    for name, value in rows:
        print(f"  {name:<14}{value}")
    print(end="", flush=True)


def versions() -> list[tuple[str, str]]:
    """The versions of the packages that decide the bits or may be in the way. None of them is imported."""
    rows = [
        ("bnbref", bnbref.__version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]
    for name in OPTIONAL:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def processor() -> str:
    """The name of the CPU, as its maker writes it where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_device(device: torch.device) -> str:
    """The name and the abilities of a device, in a few words."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, capability {gpu.major}.{gpu.minor}"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        instructions = torch.backends.cpu.get_cpu_capability() + ("" if multiplies_bfloat16() else " without bfloat16")
        return f"{processor()}, {instructions}, {threads} thread{'s' * (threads > 1)}"
    return str(device)


def devices() -> list[tuple[str, str]]:
    """The CPU, and the GPUs that torch sees."""
    rows = [("cpu", describe_device(torch.device("cpu")))]
    for i in range(torch.cuda.device_count()):
        rows.append((f"cuda:{i}", describe_device(torch.device("cuda", i))))
    accelerator = available_accelerator()
    if accelerator is not None and accelerator.type != "cuda":
        rows.append((accelerator.type, f"{torch.accelerator.device_count()} available"))
    return rows


def why_eager(device_type: str) -> str | None:
    """Why kernels are not compiled on that type of device; None where they are."""
    if not compile_enabled():
        return "BNBREF_COMPILE=0" if os.environ.get("BNBREF_COMPILE") == "0" else "bnbref.eager()"
    return missing_compiler(device_type)


def kernels(device: torch.device) -> list[tuple[str, str]]:
    """Whether kernels are compiled, and if not, why. Whether a compiler works shows only when it compiles: it is tried."""
    rows = []
    for kind in dict.fromkeys(("cpu", device.type)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the row says the same
            formats.CHECKS[0].run(selfcheck.example(device if kind == device.type else torch.device(kind)))
        why = why_eager(kind)
        rows.append((kind, "compiled by Inductor" if why is None else f"eager: {why}"))
    if why_eager("cpu") is None:
        with tqdm(total=1, desc="torch tries the C++ compiler", bar_format="{desc} ...", leave=False, disable=None):
            rows.append(("4-bit values", lookup16.lowering()))
    return rows


def check_kernels(device: torch.device) -> bool:
    """`python -m bnbref check --self`: the formats and every exact kernel; whether all have the right bits."""
    from bnbref.selfcheck.kernels import CHECKS

    section("versions", versions())
    section("kernels", kernels(device))
    return _report(device, math.inf, (*formats.CHECKS, *CHECKS), "formats and kernels")


def _report(device: torch.device, seconds: float, checks: Sequence[Check], what: str) -> bool:
    """Prints a line for each check as it is done, and the verdict. Returns whether all passed."""
    compiled = why_eager(device.type) is None
    print(f"self-check on {device.type}: {what} on fixed inputs, against golden digests")
    start = time.monotonic()
    results = []
    with tqdm(total=len(checks), leave=False, disable=None, bar_format="  {n} of {total} done ...") as bar:
        for result in selfcheck.run(checks, device, compiled, seconds):
            results.append(result)
            bar.clear()
            print(describe(result), flush=True)
            bar.update()
    passed = all(result.ok for result in results)
    print(verdict(results, compiled, time.monotonic() - start, what))
    return passed


def describe(result: Result) -> str:
    """One line: the check, and in each mode the right digest or the wrong one."""
    golden = result.check.golden
    modes = [
        f"{mode} {'ok' if digest == golden else f'is {digest}, must be {golden}'}"
        for mode, digest in (("eager", result.eager), ("compiled", result.compiled))
        if digest is not None
    ]
    return f"  {result.check.name:<26}{', '.join(modes):<22}{result.seconds:5.1f} s"


def verdict(results: list[Result], compiled: bool, seconds: float, what: str = "formats") -> str:
    """The last line: what was checked, what was not and why."""
    done, rest = kernels_compiled()
    wrong = [result.check.name for result in results if not result.ok]
    if wrong:
        why = f" The cause may be that {FLUSHED}." if flushes_subnormals() else ""
        return f"FAILED: {', '.join(wrong)}. This installation does not compute the reference formats.{why}"
    if not compiled:
        return f"ok: {len(results)} {what}, eager ({seconds:.1f} s)"
    skipped = sum(result.compiled is None for result in results)
    why = "; the time was up: run again, or with --seconds N" if skipped else ""
    return (
        f"ok: {len(results)} {what} eager, {len(results) - skipped} compiled, "
        f"in {len(done)} of {len(done + rest)} exact kernels ({seconds:.1f} s){why}"
    )
