"""The tables of what was measured on NVIDIA GPUs, made of benchmarks/results/gpu*.json. `docs/tables.py` writes them into pages.

A ratio is above 1 where bnbref is better. Contenders beside each other are always of one run.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from measured import ROOT, lines, results, source, table

GPU = "nvidia-h100-80gb-hbm3"
OTHERS = ("bitsandbytes", "bf16")
Row = dict[str, Any]


def percent(share: float) -> str:
    """A share of a bandwidth.

    >>> percent(0.9768)
    '98 %'
    """
    return f"{100 * share:.0f} %"


def number(value: float | None) -> str:
    """A rate or a time, or nothing where nothing ran.

    >>> [number(x) for x in (14863.9, 342.2, 57.38, 3.94, None)]
    ['14,864', '342', '57.4', '3.9', '']
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# One part of one program: kernels, products, optimizers, decoding.


def bandwidth() -> str:
    """Times of the kernels of quantization, and their shares of the bandwidth of a copy."""
    found = results(f"gpu-{GPU}")
    cells = (
        [
            row["what"], f"{row['ours']:.3f}", percent(row["ours_share"]), f"{row['theirs']:.3f}",
            percent(row["theirs_share"]), f"{row['ratio']:.2f}",
        ]
        for row in found["memory"]
    )  # fmt: skip
    head = ["", "bnbref, ms", "share", "bitsandbytes, ms", "share", "ratio"]
    return table(head, cells, found, "bitsandbytes")


def shares() -> str:
    """The shares alone: of float32 and of bfloat16 in one line, and of two optimizers."""
    found, optimizers = results(f"gpu-{GPU}"), results(f"gpu-optimizers-{GPU}")
    rows = {row["what"]: row for row in found["memory"]}
    cells = []
    for what in dict.fromkeys(what.rpartition(" ")[0] for what in rows):
        both = [rows[f"{what} {dtype}"] for dtype in ("fp32", "bf16")]
        way = "to" if what.startswith("de") else "from"
        each = (", ".join(percent(row[f"{side}_share"]) for row in both) for side in ("ours", "theirs"))
        cells.append([f"{what} {way} fp32, bf16", *each])
    for row in optimizers["one tensor"]:
        cells.append([optimizer(row), *(percent(row[f"{name} share"]) for name in ("bnbref", "bitsandbytes"))])
    below = f"({source(found, 'bitsandbytes')} The optimizers: `{optimizers['command']}`.)"
    return f"{lines(['', 'bnbref', 'bitsandbytes'], cells)}\n\n{below}"


def optimizer(row: Row) -> str:
    """The name of an optimizer, with its number of elements."""
    name, elements = row["what"].split(", ", 1)
    return f"{name} of fp32, {elements.split()[0]} elements"


def products() -> str:
    """Products of a layer, in microseconds: of the kernels, or of a call where no CUDA graph can be made."""
    found = results(f"gpu-{GPU}")
    cells = (
        [
            row["what"] + (" (call)" if row["timed"] == "call" else ""),
            *(f"{1e3 * row[side]:.1f}" for side in ("ours", "theirs")), f"{row['ratio']:.2f}",
        ]
        for row in found["products"]
    )  # fmt: skip
    return table(["", "bnbref, µs", "bitsandbytes, µs", "ratio"], cells, found, "bitsandbytes")


def optimizers() -> str:
    """Steps of optimizers: of one tensor, of the tensors of a model, and paged."""
    found = results(f"gpu-optimizers-{GPU}")
    (paged,) = (row for row in found["paged"] if "what" in row)
    later = results(f"gpu-optimizers-small-{GPU}")
    (many,) = later["many"]
    elements, link = many["what"].split(", ", 1)[1], paged["the link's limit"]
    fused = f"torch's fused AdamW {number(many['torch fused'])}"
    cells = [
        [
            optimizer(row), f"{row['bnbref']:.2f}", percent(row["bnbref share"]),
            f"bitsandbytes {row['bitsandbytes']:.2f}", f"{row['ratio']:.2f}",
        ]
        for row in found["one tensor"]
    ]  # fmt: skip
    cells += [
        [f"AdamW8bit, {elements}: a Llama of 7 B", number(many["bnbref"]), "", fused, f"{many['ratio']:.2f}"],
        [
            "AdamW32bit, the same", number(many["bnbref 32 bits"]), "", fused,
            f"{many['torch fused'] / many['bnbref 32 bits']:.2f}",
        ],
        [
            f"{paged['what']}: the link alone takes {number(link)}", number(paged["bnbref"]), "",
            f"bitsandbytes {number(paged['bitsandbytes'])}", f"{paged['ratio']:.2f}",
        ],
    ]  # fmt: skip
    cells += [
        [
            f"{row['what']}: LoRA over a Llama of 8 B", number(row["bnbref"]), "",
            f"bitsandbytes {number(row['bitsandbytes'])}, torch's fused AdamW {number(row['torch fused'])}",
            f"{row['ratio']:.2f}",
        ]
        for row in later["small"]
    ]  # fmt: skip
    return table(["", "bnbref, ms", "share", "beside it, ms", "ratio"], cells, found, "bitsandbytes")


def decoding() -> str:
    """Tokens a second, from Python and as a CUDA graph."""
    found = results(f"gpu-decode-{GPU}")
    cells = (
        [f"{row['batch']}", row["what"], f"{row['ms']:.1f}", *(f"{row[key]:.0f}" for key in ("tokens/s", "GB/s"))]
        for row in found["rows"]
    )
    return table(["batch", "", "ms a step", "tokens/s", "GB/s"], cells, found, "bitsandbytes")


# Whole flows, on one GPU: each program ran several times, and a run is a list of rows.


def flows_of(shape: str, part: str, form: str, what: str = "", beside: str = "bitsandbytes") -> list[dict[str, Row]]:
    """The rows of bnbref and of the others in each run in which bnbref and `beside` came to an end, the latest first.

    A model in bfloat16 stands beside every format.
    """
    found = []
    for run in results(f"gpu-flows-{GPU}")["runs"]:
        rows = [
            row
            for row in run["rows"]
            if (run["shape"], row["part"], row["what"]) == (shape, part, what) and row["format"] in (form, "")
        ]
        ended = {row["contender"]: row for row in rows if "first_s" in row or "ms" in row or "kernels_us" in row}
        if {"bnbref", beside} <= set(ended):
            found.append(ended)
    return found[::-1]


def flow(label: str, runs: Sequence[dict[str, Row]], measure: str) -> list[str]:
    """A line of such runs: the numbers of each, and its ratio to bitsandbytes."""
    better = (lambda ours, theirs: ours / theirs) if measure == "tokens/s" else (lambda ours, theirs: theirs / ours)
    each = ([run.get(name, {}).get(measure) for run in runs] for name in ("bnbref", *OTHERS))
    ours, theirs, half = ([value for value in values if value is not None] for values in each)
    ratios = [f"{better(*pair):.2f}" for pair in zip(ours, theirs, strict=False)]
    return [label, *(", ".join(map(number, values)) for values in (ours, theirs, half)), ", ".join(ratios)]


def _flows() -> dict[str, list[str]]:
    generate, static, large = (
        {form: flows_of(shape, part, form, beside=beside) for form in ("nf4", "int8")}
        for shape, part, beside in (
            ("1.2B", "generate", "bitsandbytes"), ("1.2B", "static", "bitsandbytes"), ("8B", "static", "bf16"),
        )
    )  # fmt: skip
    loop, trainer = (flows_of("1.2B", "qlora", "nf4", what)[:1] for what in ("loop", "Trainer"))
    cold, warm = (flows_of("1.2B", "first", "nf4", f"{caches} caches")[:1] for caches in ("cold", "warm"))
    load = flows_of("1.2B", "load", "nf4", "cold caches")[:1]
    layer = flows_of("layers", "layers", "nf4 nested", "4096x4096, 1 rows")[:1]
    pages = ", its first call, s"
    rows = [
        flow("`generate` as it comes, NF4, tokens/s: three runs", generate["nf4"][:3], "tokens/s"),
        flow(f"`generate` as it comes, NF4{pages}", generate["nf4"][:1], "first_s"),
        flow("`generate` as it comes, int8, tokens/s", generate["int8"][:1], "tokens/s"),
        flow(f"`generate` as it comes, int8{pages}", generate["int8"][:1], "first_s"),
        flow("`generate` with a static cache, NF4, tokens/s", static["nf4"][:1], "tokens/s"),
        flow(f"`generate` with a static cache, NF4{pages}", static["nf4"][:1], "first_s"),
        flow("`generate` with a static cache, int8, tokens/s", static["int8"][:1], "tokens/s"),
        flow(f"`generate` with a static cache, int8{pages}", static["int8"][:1], "first_s"),
        flow("8 B with a static cache, NF4, tokens/s: two runs", large["nf4"][:2], "tokens/s"),
        flow(f"8 B with a static cache, NF4{pages}: two runs", large["nf4"][:2], "first_s"),
        flow("8 B with a static cache, int8, tokens/s", large["int8"][:1], "tokens/s"),
        flow(f"8 B with a static cache, int8{pages}", large["int8"][:1], "first_s"),
        flow("the first call of `generate` in a process, 8 tokens, NF4, s: caches cold", cold, "first_s"),
        flow("the first call of `generate` in a process, 8 tokens, NF4, s: a later process", warm, "first_s"),
        flow("then the first with a static cache, 8 tokens, NF4, s: caches cold", cold, "static_s"),
        flow("then the first with a static cache, 8 tokens, NF4, s: a later process", warm, "static_s"),
        flow("QLoRA step in a loop, NF4, ms", loop, "ms"),
        flow("QLoRA step in Trainer, NF4, ms", trainer, "ms"),
        flow("loading in NF4, caches cold, s", load, "first_s"),
        flow("loading in NF4, a second time in the process, s", load, "again_s"),
        flow("peak memory of loading in NF4, MB", load, "peak_MB"),
        flow("one row by 4096 x 4096, NF4 with double quantization, µs of the kernel", layer, "kernels_us"),
    ]  # fmt: skip
    return {row[0]: row for row in rows}


FRONT = (
    "`generate` as it comes, NF4, tokens/s: three runs",
    "`generate` with a static cache, NF4, tokens/s",
    "`generate` with a static cache, NF4, its first call, s",
    "the first call of `generate` in a process, 8 tokens, NF4, s: caches cold",
    "the first call of `generate` in a process, 8 tokens, NF4, s: a later process",
    "QLoRA step in a loop, NF4, ms",
    "loading in NF4, caches cold, s",
)
"""The rows of the front page: what a user waits for, gains and losses."""


def flows(names: Iterable[str] = ()) -> str:
    """The lines of all flows, or of those that are named."""
    found = _flows()
    machine = results(f"gpu-flows-{GPU}")["runs"][-1]["machine"]
    head = ["", "bnbref", "bitsandbytes", "bf16", "ratio"]
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "bitsandbytes"))
    below = (
        f"(`python benchmarks/gpu_flows.py`: {machine['gpu']}, {packages}. Of several runs the latest that both libraries "
        "finished comes first; the machines were of different speed.)"
    )
    return f"{lines(head, [found[name] for name in names or found])}\n\n{below}"


def few_rows() -> str:
    """One to eight rows by a weight with double quantization: kernels, and calls from Python."""
    (run,) = (run for run in results(f"gpu-flows-{GPU}")["runs"] if run["shape"] == "layers")
    cells = []
    for what in dict.fromkeys(row["what"] for row in run["rows"]):
        rows = {row["contender"]: row for row in run["rows"] if row["what"] == what}
        each = [f"{rows[name]['kernels_us']:.1f} ({rows[name]['call_us']:.0f})" for name in ("bnbref", *OTHERS)]
        cells.append(
            [
                what.replace(" 1 rows", " 1 row"),
                *each,
                f"{rows['bitsandbytes']['kernels_us'] / rows['bnbref']['kernels_us']:.2f}",
            ]
        )
    return lines(["", "bnbref", *OTHERS, "ratio to bitsandbytes"], cells)


def configurations() -> str:
    """Few rows by a 4-bit weight: columns and warps of a program that takes four rows of the weight."""
    found = results("gpu-configurations")
    timed = [row for row in found["rows"] if row["part"] == "products" and row["rows"] == 4]
    timed.sort(key=lambda row: (row["activations"], row["columns"], row["warps"]))
    shapes = ("4096x4096", "14336x4096", "4096x14336")
    cells = (
        [str(row["activations"]), f"{row['columns']}, {row['warps']}", *(f"{row[shape]:.1f}" for shape in shapes)]
        for row in timed
    )
    return table(["rows", "columns, warps", *shapes], cells, found)


# Several GPUs.


FSDP, DDP = ((0,), (2,), (4,), (6,)), ((18, 19, 15), (13, 14), (11, 12), (10, 9), (7, 8))
"""The numbers of the runs that a line's ratios are taken in: each group ran on one machine within minutes."""


def several(groups: Iterable[Sequence[int]]) -> str:
    """QLoRA of 8 B on one GPU and on two: tokens a second, and how many times those of one GPU and those of bitsandbytes."""
    runs, cells = results(f"gpus-{GPU}")["runs"], []
    for place, group in enumerate(groups, 1):
        rows = [row for run in group for row in runs[run]["rows"]]
        rate = {(row["contender"], row["ranks"]): row["tokens/s"] for row in rows}
        for row in rows:
            beside = rate.get((row["contender"], 1)), rate.get(("bitsandbytes", row["ranks"]))
            times = [f"{row['tokens/s'] / other:.2f}" if other else "" for other in beside]
            peak = f"{row['peak_MB'] / 1000:.1f}"
            cells.append([f"{place}", row["contender"], f"{row['ranks']}", number(row["tokens/s"]), *times, peak])
    head = ["run", "", "GPUs", "tokens/s", "times one GPU", "times bitsandbytes", "peak GB of a GPU"]
    return lines(head, cells)


def all_weights() -> str:
    """All weights of a model of 13 B trained, by optimizer."""
    rows = [row for run in results(f"gpus-{GPU}")["runs"] for row in run["rows"] if row["part"] == "full"]
    cells = ([r["contender"], f"{r['ranks']}", number(r["tokens/s"]), f"{r['peak_MB'] / 1000:.1f}"] for r in rows)
    return lines(["", "GPUs", "tokens/s", "peak GB of a GPU"], cells)


def written() -> str:
    """What Inductor and ptxas make of each kernel for an H100: the least and the most of its variants."""
    text = (ROOT / "benchmarks/results/written-h100.jsonl").read_text(encoding="utf-8")
    by_kernel: dict[str, list[Row]] = {}
    for variant in map(json.loads, text.splitlines()):
        name = variant["kernel"]
        if name == "quantize_int8_rows":
            name += ", threshold 0" if " 0.0 " in variant["variant"] else ", above 0"
        by_kernel.setdefault(name, []).append(variant)

    def span(values: Iterable[int]) -> str:
        least, *_, most = sorted({*values}) * 2
        return f"{least}" if least == most else f"{least} to {most}"

    def widest(variant: Row, operation: str) -> int:
        return max(int(bits) for made in variant["made"] for bits in made[operation])

    cells = []
    for name, variants in by_kernel.items():
        made = [made for variant in variants for made in variant["made"]]
        special = sorted({f"`{word.removesuffix('.f32')}`" for each in made for word in each["floats"]})
        cells.append([
            name, f"{len(variants)}", span(len({each["kernel"] for each in v["made"]}) for v in variants),
            span(each["registers"] for each in made), f"{sum(each['stack'] > 0 for each in made)} of {len(made)}",
            *(span(widest(v, operation) for v in variants) for operation in ("loads", "stores")), ", ".join(special) or "—",
        ])  # fmt: skip
    head = [
        "kernel", "variants", "kernels in each", "registers", "configurations that spill", "widest load, bits", "widest store",
        "besides sums and products",
    ]  # fmt: skip
    return lines(head, cells)


TABLES: dict[str, Callable[[], str]] = {
    "gpu-written": written,
    "gpu-bandwidth": bandwidth,
    "gpu-shares": shares,
    "gpu-products": products,
    "gpu-optimizers": optimizers,
    "gpu-decoding": decoding,
    "gpu-few-rows": few_rows,
    "gpu-configurations": configurations,
    "gpu-flows": flows,
    "gpu-flows-front": partial(flows, FRONT),
    "gpus-fsdp": partial(several, FSDP),
    "gpus-ddp": partial(several, DDP),
    "gpus-all-weights": all_weights,
}
