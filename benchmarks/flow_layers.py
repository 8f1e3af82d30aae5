"""What gpu_flows.py times of single layers: `python benchmarks/flow_layers.py '{"device": "cuda", "contenders": ["bnbref"]}'`.

Beside these two, `"formats": ["nf4 nested"]` and `"counts": [1, 2, 4, 8]` ask for a part of the table.

call_us: microseconds a call as Python makes it, one after the other; kernels_us: replayed from a CUDA graph, without Python,
where no result is waited for on the host. Each call takes the next of several layers, whose weights together do not fit into
a GPU's cache. All contenders take turns; activations and the plain layer are in float16 for 8 bits, which is what bitsandbytes
computes in, and in bfloat16 for 4.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import timing
import torch
from flow_parts import ROW, wait
from torch import Tensor, nn

SIZES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8, 16, 64, 512)
CACHE = 100e6
"""Bytes of weights that are more than the caches of an H100 hold: 50 MB."""
CALLS = 64
"""Of a round, so that waiting for its end costs a call little."""
WRONG = 0.2
"""Of the norm of a product: twice what rounding normal numbers to NF4 costs."""

LIBRARIES = {"bnbref": "bnbref.nn", "bitsandbytes": "bitsandbytes.nn"}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"compress_statistics": False},
    "nf4 nested": {"compress_statistics": True},
    "int8, threshold 0": {"threshold": 0.0},
    "int8, threshold 6": {"threshold": 6.0},
}

Run = Callable[[], Any]


def layer(contender: str, format_: str, weight: Tensor, device: str) -> nn.Module:
    """A layer of that weight, which is on the CPU, quantized on the device."""
    made: nn.Module
    n, k = weight.shape
    if contender == "bf16":
        made = nn.Linear(k, n, bias=False, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made.to(device)
    library: Any = importlib.import_module(LIBRARIES[contender])
    options = FORMATS[format_]
    if "threshold" in options:
        made = library.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, device="meta", **options)
        made.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        made = library.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        made.weight = library.Params4bit(weight, requires_grad=False, quant_type="nf4", **options)
    return made.to(device).eval()


def nbytes(module: nn.Module) -> int:
    """Of codes or floats; scales are few."""
    return sum(p.nbytes for p in module.parameters())


def layers(contender: str, format_: str, weight: Tensor, device: str, cache: float) -> list[nn.Module]:
    """As many that their weights fill `cache`, two at least."""
    first = layer(contender, format_, weight, device)
    count = max(2, math.ceil(cache / nbytes(first)))
    return [first, *(layer(contender, format_, weight, device) for _ in range(count - 1))]


def in_turn(modules: list[nn.Module], x: Tensor) -> tuple[Run, int]:
    """Calls of all of them, as often as makes CALLS or more; how many calls that is."""
    order = modules * math.ceil(CALLS / len(modules))

    def run() -> None:
        for module in order:
            module(x)

    return run, len(order)


def never_waits(run: Run) -> bool:
    """Whether no result is waited for on the host: a CUDA graph cannot hold what is, and a failed capture leaves a mess."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def graphed(run: Run) -> Run:
    """The kernels of a run as one replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def microseconds(runs: Mapping[str, Run], calls: Mapping[str, int], device: str, rounds: int) -> dict[str, float]:
    """A call of each: medians of interleaved rounds, to the end on the device."""

    def waited(run: Run) -> Run:
        def whole() -> None:
            run()
            wait(device)

        return whole

    found = timing.medians({name: waited(run) for name, run in runs.items()}, rounds)
    return {name: ms * 1e3 / calls[name] for name, ms in found.items()}


def rows(
    contenders: list[str],
    device: str,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    counts: tuple[int, ...] = ROWS,
    cache: float = CACHE,
    rounds: int = 9,
    formats: tuple[str, ...] = tuple(FORMATS),
) -> Iterator[dict[str, Any]]:
    """All contenders at each format, size and number of rows; a contender that fails is a row with its error."""
    for (n, k), format_ in product(sizes, formats):
        dtype = torch.float16 if format_.startswith("int8") else torch.bfloat16
        weight = (torch.randn(n, k, device=device, dtype=dtype) * 0.02).cpu()
        made: dict[str, list[nn.Module]] = {}
        for contender in contenders:
            row = {"part": "layers", "format": format_, "what": f"{n}x{k}", "contender": contender}
            try:
                made[contender] = layers(contender, format_, weight, device, cache)
            except Exception as error:
                yield {**row, "error": f"{type(error).__name__}: {error}"}
        for count in counts:
            x = torch.randn(count, k, device=device, dtype=dtype).clamp(-5, 5)
            x[:, 7] = 8.0  # an outlier where the threshold is 6
            want = x.float() @ weight.to(device).float().T
            yield from compared(f"{n}x{k}, {count} rows", format_, made, x, want, device, rounds)


def compared(
    what: str, format_: str, made: Mapping[str, list[nn.Module]], x: Tensor, want: Tensor, device: str, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row of each, of layers whose product is `want` but for the error of their format."""
    runs: dict[str, Run] = {}
    calls: dict[str, int] = {}
    found: dict[str, dict[str, Any]] = {}
    for contender, modules in made.items():
        row = found[contender] = {"part": "layers", "format": format_, "what": what, "contender": contender}
        run, calls[contender] = in_turn(modules, x)
        try:
            run()
            wrong = float((modules[0](x) - want).norm() / want.norm())
            if not wrong < WRONG:
                raise RuntimeError(f"the product is off by {wrong:.3g} of its norm")
            runs[contender] = run
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
    for contender, us in microseconds(runs, calls, device, rounds).items():
        found[contender]["call_us"] = us
    if device != "cpu":
        replays: dict[str, Run] = {}
        for contender, run in runs.items():
            try:
                if never_waits(run):
                    replays[contender] = graphed(run)
            except Exception as error:
                found[contender]["graph_error"] = f"{type(error).__name__}: {error}"
        for contender, us in microseconds(replays, calls, device, rounds).items():
            found[contender]["kernels_us"] = us
    yield from found.values()


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    with torch.no_grad():
        for row in rows(**job):
            print(ROW + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
