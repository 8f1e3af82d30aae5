"""What Inductor writes for an H100, compiled by Triton to PTX and by ptxas to machine code: read, and counted."""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import calls
import pretend
import triton
from torch._inductor.codecache import PyCodeCache
from triton.compiler import ASTSource

from bnbref.kernels import Kernel
from bnbref.kernels.variants import LARGE

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Written(BaseException):
    """The generated code, in place of its results."""


def stop(source: str) -> Any:
    raise Written(source)


def source_of(kernel: Kernel[..., Any], tensors: list[Any], constants: Any) -> str:
    """What Inductor writes for large tensors, whose kernels are tuned for bandwidth: all sizes that vary times the same."""
    size = max(t.numel() for t in tensors if t is not None)
    dims = kernel.parameters.with_dynamic(tensors)
    both = max(len(d) for t, d in dims if t is not None)
    factor = 2
    while size * factor**both < LARGE:
        factor *= 2
    sizes = [
        () if t is None else [n * factor if i in d and n > 1 else n for i, n in enumerate(t.shape)] for t, d in dims
    ]
    try:
        tables = pretend.on_gpu(kernel.tables(*tensors, **constants))
        pretend.generate(kernel, pretend.on_gpu(tensors, sizes), tables, constants, stop)
    except Written as written:
        return str(written)
    raise RuntimeError(f"kernel {kernel.name!r} ran without being compiled")


def compiled(source: str, **overrides: Any) -> list[dict[str, Any]]:
    """For each Triton kernel in it and each configuration that would be timed what ptxas made of it."""
    out = []
    for name, text in re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''',", source, re.S):
        tuner = getattr(PyCodeCache.load(text), name)
        for config in tuner.configs:
            meta = tuner._create_compile_meta(config)
            options = {**tuner._create_compile_options(config, meta), **overrides}
            binary = triton.compile(
                ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0]), pretend.TARGET, options
            )
            out.append({"kernel": name, "config": str(config), **read(binary), "masked": masked(text)})
    return out


def masked(text: str) -> int:
    """How many numbers that are the same for all lanes are set to 0 in lanes beyond the end."""
    uniform = set(re.findall(r"(tmp\d+) = tl\.broadcast_to\(tmp\d+, \[1(?:, 1)*\]\)", text))
    return len(uniform.intersection(re.findall(r"tl\.where\(\w*mask, (tmp\d+), 0", text)))


def read(binary: Any) -> dict[str, Any]:
    """Registers, bytes of stack, widths of loads and stores, and floating-point instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    ptx = binary.asm["ptx"]

    def widths(operation: str) -> dict[int, int]:
        found = re.findall(rf"\b{operation}\.global(?:\.\w+|::\w+)*?(?:\.v([248]))?\.b(\d+)", ptx)
        return dict(Counter(int(vector or 1) * int(bits) for vector, bits in found))

    floats = Counter(
        re.findall(r"\b((?:fma|div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|tanh)\.[\w.]*f(?:16|32|64)(?:x2)?)\b", ptx)
    )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "loads": widths("ld"),
        "stores": widths("st"),
        "floats": dict(floats),
        "ffma": len(re.findall(r"\b[FD]FMA\b", code)),
        "fusion": binary.metadata.enable_fp_fusion,
        "by_address": "ld.global.nc.b64" in ptx,
        "conversions": binary.asm["ttgir"].count("ttg.convert_layout"),
    }


def main() -> None:
    """A line of JSON for each variant of each kernel."""
    pretend.install()
    seen: set[str] = set()

    def run(kernel: Kernel[..., Any], tensors: list[Any], constants: Any) -> Any:
        name = calls.variant(kernel.name, tensors, constants)
        if name not in seen:
            seen.add(name)
            print(
                json.dumps(
                    {"kernel": kernel.name, "variant": name, "made": compiled(source_of(kernel, tensors, constants))}
                ),
                flush=True,
            )
        return kernel.definition(*tensors, **constants)

    calls.run_asked(run)


if __name__ == "__main__":
    main()
