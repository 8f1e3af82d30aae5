"""Encoders on an NVIDIA GPU, and ways to find values and codes in an optimizer's step: bits, and share of copy bandwidth.

    python benchmarks/gpu_encoders.py [--elements 268435456] [--seconds 100] [--only four eight adam]

`four` and `eight` are the formulations of the package, `adam` are candidates for that of `step_blocks`. Every variant is compared
with the definition, byte for byte, on blocks that hold every threshold and its neighbours, zeros, NaN, infinities and numbers at
random. Then it is timed, over the block sizes and numbers of warps below, of which Inductor takes the fastest; the line ends with
what it timed: rows x warps, milliseconds, registers. Share: of the bandwidth of a copy, bytes read + written; medians, timed with
CUDA events.

Each variant is a process of its own, which compiles beside the others, and then waits for its turn on the GPU. Lines come in the
order in which they are done.
"""

import argparse
import fcntl
import functools
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnbref import blockwise, fourbit
from bnbref.codebooks import DYNAMIC, DYNAMIC_UNSIGNED, FP4, NF4, Codebook, threshold_table, value_table
from bnbref.kernels import by_address, compiler, counting, floats
from bnbref.kernels import steps as formulations
from bnbref.optim import rules
from bnbref.optim import step as steps
from bnbref.optim.equation import at_step
from bnbref.selfcheck.kernels import GROUP

GPU = torch.device("cuda")

# ---- variants -------------------------------------------------------------------------------------------------------
# Each is a function of the tensors and of tables after them; its tables; the definition; and how many elements a lane has.

Variant = tuple[Callable[..., Any], tuple[Tensor, ...], Callable[..., Any], int]


def encoder(kernel: Any, dtype: torch.dtype, width: int, **constants: Any) -> Variant:
    tables = kernel.tables(torch.empty(2, width, dtype=dtype, device=GPU), **constants)

    def run(x: Tensor, *tables: Tensor) -> Any:
        return kernel.formulation((x,), tables, constants)

    return run, tables, lambda x: kernel.definition(x, **constants), 4


EQUATION, HYPER = at_step(rules.Adam(), 1, GROUP)
BOOKS = (DYNAMIC, DYNAMIC_UNSIGNED)


def adam(values: str, codes: str, largest: str) -> Variant:
    """AdamW with two states of 8 bits: how values of codes are found, codes of values, and the largest magnitude of a block."""

    def value(table: Tensor, code: Tensor) -> Tensor:
        if values == "gather":
            return floats.look_up(table, code)
        return by_address.look_up(table, code.to(torch.int32)).to(torch.int32).view(torch.float32)

    def run(p: Tensor, g: Tensor, hyper: Tensor, *rest: Tensor) -> None:
        states, tables = rest[:4], rest[4:]
        results = steps.advance_blocks(
            EQUATION, p, g, hyper, None, states,
            lambda i, codes: value(tables[i], codes), lambda i, x: counting.count(x, tables[2 + i]),
            formulations._largest_by_bits if largest == "bits" else steps.largest,
        )  # fmt: skip
        for target, result in zip((p, *states), results, strict=True):
            target.copy_(result)

    of_values = [value_table(book, GPU) for book in BOOKS]
    if values == "address":
        of_values = [by_address.addressed(table.cpu().view(torch.int32).long(), GPU) for table in of_values]
    make = {"code table": counting.code_table, "wide table": counting.wide_table}[codes]
    found = [table for table in (make(book, GPU) for book in BOOKS) if table is not None]

    def want(p: Tensor, g: Tensor, hyper: Tensor, *states: Tensor) -> Any:
        return steps.step_blocks.definition(p, g, hyper, None, *states, rule=EQUATION)

    return run, (*of_values, *found), want, 1


WIDTHS = {"four": 64, "eight": 256, "adam": 256}
VARIANTS: list[tuple[str, torch.dtype, Callable[[], Variant]]] = []
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _book in (NF4, FP4):
        _make = functools.partial(encoder, fourbit.quantize_rows, _dtype, 64, blocksize=64, codebook=_book)
        VARIANTS.append((f"four {_book.name}", _dtype, _make))
    _make = functools.partial(encoder, blockwise.quantize_blocks, _dtype, 256, codebook=DYNAMIC)
    VARIANTS.append(("eight dynamic", _dtype, _make))
for _dtype, *_ways in itertools.product(
    (torch.float32, torch.bfloat16), ("gather", "address"), ("code table", "wide table"), ("floats", "bits")
):
    _name = "adam values by {}, {}, maximum of {}".format(*_ways)
    VARIANTS.append((_name, _dtype, functools.partial(adam, *_ways)))

# ---- compilation ----------------------------------------------------------------------------------------------------

OPTIONS = {
    **compiler._GPU_OPTIONS,
    **by_address.REAL_INPUTS,
    "autotune_local_cache": False,
    "autotune_remote_cache": False,
    "fx_graph_cache": False,
}
# (elements a thread, warps). Coordinate descent, an option of the door, finds the best of them too, but compiles one by one.
SIZES = [(8, 2), (8, 4), (16, 1), (16, 2), (16, 4), (16, 8), (32, 2), (32, 4)]
ADAM_SIZES = [(4, 2), (4, 4), (4, 8), (8, 1), (8, 2), (8, 4), (16, 1), (16, 2)]
TIMED: list[str] = []


def prepare(kind: str, lane: int, at_first_run: Callable[[], None]) -> None:
    """From now on Inductor tries these block sizes, for lanes of so many elements, and notes what it timed, the fastest first.

    at_first_run is called before the first run of a compiled kernel.
    """
    import torch._inductor.runtime.triton_heuristics as heuristics
    from torch._inductor.runtime.triton_compat import Config

    tuner = heuristics.CachingAutotuner
    original, run, ran = tuner.benchmark_all_configs, tuner.run, []

    def configs(*args: Any, **kwargs: Any) -> list[Any]:
        pairs = [(e * 32 * w // WIDTHS[kind], w) for e, w in (ADAM_SIZES if kind == "adam" else SIZES) if e >= lane]
        return [Config({"XBLOCK": rows}, num_warps=w, num_stages=1) for rows, w in pairs if rows]

    def benchmark(self: Any, *args: Any, **kwargs: Any) -> Any:
        timings = original(self, *args, **kwargs)
        for launcher, ms in sorted(timings.items(), key=lambda pair: pair[1]):
            config = launcher.config
            TIMED.append(f"{config.kwargs['XBLOCK']}x{config.num_warps}w {ms:.3f} r{launcher.n_regs}")
        return timings

    def run_in_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not ran:
            ran.append(True)
            at_first_run()
        return run(self, *args, **kwargs)

    heuristics._persistent_reduction_configs = configs
    tuner.benchmark_all_configs, tuner.run = benchmark, run_in_turn


def compiled(function: Callable[..., Any], dynamic: Sequence[Tensor]) -> Callable[..., Any]:
    def inductor(graph: Any, example_inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, example_inputs, config_patches=OPTIONS)

    for t in dynamic:
        torch._dynamo.mark_dynamic(t, 0)
    return torch.compile(function, fullgraph=True, dynamic=False, backend=inductor)


# ---- inputs and truth -----------------------------------------------------------------------------------------------


def numbers(blocks: int, dtype: torch.dtype, width: int, book: Codebook | None) -> list[Tensor]:
    """Blocks at random; for a check, given a codebook, at all scales, with everything that is special and every threshold."""
    g = torch.Generator(GPU).manual_seed(1)
    x = torch.randn(blocks, width, device=GPU, generator=g)
    if book is None:
        return [x.to(dtype)]
    x = x * torch.exp2(torch.randint(-140, 120, (len(x), 1), device=GPU, generator=g).float())
    special = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1e-45, 2.0**-126, 3e38, -3e38]
    for at in (x[::11, 3], x[1::501]):
        at.copy_(torch.tensor(special, device=GPU)[torch.randint(0, 10, at.shape, device=GPU, generator=g)])
    x[::13] = 0.0
    ts = threshold_table(book, GPU)
    near = torch.cat([ts, ts.nextafter(torch.ones_like(ts)), ts.nextafter(-torch.ones_like(ts))])
    rows = torch.cat([near, near.new_zeros(-len(near) % (width - 1))]).view(-1, width - 1)
    x[2 : 2 + len(rows), 1:], x[2 : 2 + len(rows), 0] = rows, 1.0
    return [x.to(dtype)]


def adam_inputs(blocks: int, dtype: torch.dtype, special: bool) -> list[Tensor]:
    g = torch.Generator(GPU).manual_seed(2)
    p, grad, first, second = (torch.randn(blocks, 256, device=GPU, generator=g) for _ in range(4))
    states = []
    for x, book in zip((first, second.square()), BOOKS, strict=True):
        absmax = x.abs().amax(1)
        states += [blockwise.encode(x / absmax[:, None], book), absmax * 0.1]
    if special:
        for value in (torch.nan, torch.inf, -torch.inf, 1e30, 1e18, 0.0, 1e-30, -1e-42):
            grad.view(-1)[torch.randint(0, grad.numel(), (500,), device=GPU, generator=g)] = value
        grad[3::64] = 0.0
        states[0][5::64], states[2][5::64] = 127, 0
        states[1][7::64], states[3][7::64], states[1][11::64] = 0.0, 0.0, torch.nan
        for codes in (states[0], states[2]):
            codes[9::64] = torch.randint(0, 256, codes[9::64].shape, device=GPU, generator=g).to(torch.uint8)
    return [p.to(dtype), grad.to(dtype), HYPER.to(GPU), *states]


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Equal bits, or NaN in both."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(got, want, strict=True)]
    return all(
        bool(((a.view(torch.uint8).view(len(a), -1) == b.view(torch.uint8).view(len(b), -1)).all(1) | (a != a) & (b != b)).all())
        for a, b in pairs
    )  # fmt: skip


# ---- timing ---------------------------------------------------------------------------------------------------------


def milliseconds(call: Callable[[], Any], rounds: int = 9, calls: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """GB/s, read + written."""
    source = torch.randn(2**28, device=GPU)
    target = torch.empty_like(source)
    return 8 * 2**28 / milliseconds(lambda: target.copy_(source)) / 1e6


def measure(number: int, elements: int, turn: Path) -> str:
    """A line about a variant, which takes its turn on the GPU when it is compiled."""
    name, dtype, make = VARIANTS[number]
    kind, (function, tables, definition, lane) = name.split()[0], make()

    def inputs(blocks: int, book: Codebook | None) -> list[Tensor]:
        if kind == "adam":
            return adam_inputs(blocks, dtype, book is not None)
        return numbers(blocks, dtype, WIDTHS[kind], book)

    blocks = elements // (4 if kind == "adam" else 1) // WIDTHS[kind]
    args = [x.new_empty(blocks, *x.shape[1:]) if len(x) == 2 else x for x in inputs(2, None)]  # all but hyper
    held = turn.open("w")

    def begin() -> None:
        fcntl.flock(held, fcntl.LOCK_EX)
        for arg, values in zip(args, inputs(blocks, None), strict=True):
            arg.copy_(values)

    prepare(kind, lane, begin)
    try:
        with torch.no_grad():
            run = compiled(function, [x for x in args if len(x) == blocks])
            results = run(*args, *tables)
            size = sum(x.nbytes for x in args) + sum(x.nbytes for x in results or (args[0], *args[3:]))
            ms = milliseconds(lambda: run(*args, *tables))
            checked = inputs(2**14, {"four nf4": NF4, "four fp4": FP4}.get(name, DYNAMIC))
            want = definition(*checked)
            got = run(*checked, *tables) or (checked[0], *checked[3:])
            bits = "right" if same(got, want) else "WRONG"
            result = f"{ms:.4f} ms  {size / ms / 1e6:.0f} GB/s  bits {bits}"
    except Exception as error:  # one variant that fails must not cost the others
        result = f"{type(error).__name__}: {str(error)[:300]}"
    held.close()
    return f"{str(dtype)[6:]:<9} {name:<46} {result}  {TIMED}"


def share(line: str, bandwidth: float) -> str:
    return re.sub(r"(\d+) GB/s", lambda m: f"{int(m[1]) / bandwidth:.3f} of copy", line)


def side_by_side(waiting: list[int], args: argparse.Namespace) -> None:
    """A process for each of these variants, as many at a time as there are cores, and what they print."""
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp())
    turn, bandwidth = folder / "turn", 1.0
    running: dict[Path, subprocess.Popen[bytes]] = {}
    with turn.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # the others import and compile meanwhile
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 2):
                number = waiting.pop(0)
                own = ["--variant", f"{number}:{turn}", "--elements", str(args.elements)]
                with (folder / str(number)).open("w") as file:
                    command = [sys.executable, __file__, *own]
                    running[folder / str(number)] = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            if not held.closed:
                bandwidth = copy_bandwidth()
                name = f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
                print(f"{name}: copy {bandwidth:.0f} GB/s", flush=True)
                torch.cuda.empty_cache()
                held.close()
            late = time.monotonic() - begun > args.seconds
            for path, process in list(running.items()):
                if late:
                    process.kill()
                if late or process.poll() is not None:
                    last = (path.read_text().splitlines() or ["nothing said"])[-1]
                    print(f"{share(last, bandwidth)[:700]}  {time.monotonic() - begun:.0f} s", flush=True)
                    del running[path]
            if late:
                print("out of time; not begun:", [VARIANTS[i][0] for i in waiting], flush=True)
                return
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**28)
    parser.add_argument("--seconds", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--variant", help="only this one, as NUMBER:FILE, a file that is locked during a turn")
    args = parser.parse_args()
    torch._inductor.config.compile_threads = 1
    if args.variant is None:
        side_by_side([i for i, (name, *_) in enumerate(VARIANTS) if name.split()[0] in args.only], args)
    else:
        number, turn = args.variant.split(":")
        print(measure(int(number), args.elements, Path(turn)))


if __name__ == "__main__":
    main()
