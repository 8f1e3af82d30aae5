"""The flows of `flows.py` on the real bitsandbytes and on bnbref, side by side, and why each difference is there.

    python tests/side_by_side.py             run both and print the table; exit status 1 if it is not what REASONS says
    python tests/side_by_side.py --write     and write it to side_by_side.json and docs/content/side-by-side.md

A reason is an experiment. Each is a correction of the real bitsandbytes, and it holds for a flow if with its corrections
bitsandbytes gives the bits that bnbref gives, and with one of them less it does not. Nothing is compared within a tolerance.
"""

import argparse
import copy
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).parent / "data" / "side_by_side.json"
PAGE = ROOT / "docs" / "content" / "side-by-side.md"
SUITES = Path(__file__).parent / "data" / "suites_of_others.md"

# ---- corrections of the real bitsandbytes ---------------------------------------------------------------------------


class Correction(NamedTuple):
    """What bitsandbytes 0.50.2 does, and how to make it do what bnbref does."""

    text: str
    apply: Callable[[], None]


def kernels(*names: str) -> Callable[[], None]:
    """bnbref's kernels in the place of bitsandbytes' own."""

    def register() -> None:
        from bnbref.integrations.bitsandbytes.ops import KERNELS

        for name in names:
            library.register_kernel(f"bitsandbytes::{name}", "cpu", KERNELS[name])

    return register


def never_repack() -> None:
    import bitsandbytes as bnb

    bnb.nn.modules.has_avx512bf16 = lambda: False


def multiply_int8() -> None:
    import bitsandbytes as bnb

    import bnbref

    bnb.matmul = bnbref.matmul


def keep_the_weights_dtype() -> None:
    import bitsandbytes as bnb

    def quantize(self: Any, device: Any) -> Any:
        codes, self.SCB, _ = bnb.functional.int8_vectorwise_quant(self.data.contiguous().to(device))
        self.data = self.CB = codes
        return self

    bnb.nn.Int8Params._quantize = quantize


def round_once_backwards() -> None:
    from bitsandbytes.autograd._functions import MatMul4Bit

    theirs = MatMul4Bit.backward

    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.state = copy.copy(ctx.state)
        ctx.state.dtype = grad.dtype
        return theirs(ctx, grad)

    MatMul4Bit.backward = staticmethod(backward)


def leave_codes_alone() -> None:
    from bitsandbytes.nn import Linear4bit

    theirs = Linear4bit._apply

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        codes = self.weight.data
        theirs(self, fn, recurse)
        self.weight.data = codes
        return self

    Linear4bit._apply = _apply


def undo_reading() -> None:
    from transformers.core_model_loading import _IdentityOp
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize

    Bnb4bitDeserialize.reverse_op = Bnb8bitDeserialize.reverse_op = property(lambda self: _IdentityOp())


def keep_scales_off_meta() -> None:
    from bitsandbytes.functional import QuantState

    theirs = QuantState.to
    QuantState.to = lambda self, device: None if torch.device(device).type == "meta" else theirs(self, device)


def keep_scales_that_are_there() -> None:
    from bitsandbytes.nn import Linear8bitLt

    theirs = Linear8bitLt.init_8bit_state
    Linear8bitLt.init_8bit_state = lambda self: None if self.weight.SCB is None else theirs(self)


def code_squares_without_a_sign() -> None:
    from bitsandbytes.optim.optimizer import Optimizer1State

    theirs = Optimizer1State.init_state

    def init_state(self: Any, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        theirs(self, group, p, gindex, pindex)
        if self.optimizer_name in ("rmsprop", "adagrad") and "qmap1" in self.state[p]:
            self.state[p]["qmap1"] = self.name2qmap["udynamic"].to(p.device)

    Optimizer1State.init_state = init_state


def bound_the_step() -> None:
    from bnbref.integrations.bitsandbytes import updates

    def update(
        name: str, g: Tensor, p: Tensor, state1: Tensor, state2: Any, b1: float, b2: float, b3: float, alpha: float,
        eps: float, step: int, lr: float, qmap1: Tensor, qmap2: Any, absmax1: Tensor, absmax2: Any, decay: float,
        gnorm_scale: float, skip_zeros: bool = False,
    ) -> None:  # fmt: skip
        numbers = {"lr": lr, "betas": (b1, b2, b3), "eps": eps, "weight_decay": decay, "alpha": alpha}
        scales = ((absmax1, qmap1), (absmax2, qmap2))
        longest = {"lars": 0.02, "lamb": 1.0}.get(name, 0.0)
        updates._update(name, g, p, (state1, state2), scales, numbers, step, gnorm_scale, longest, skip_zeros)

    library.register_kernel("bitsandbytes::optimizer_update_8bit_blockwise", "cpu", update)


def cpu_is_device_0() -> None:
    from bitsandbytes.nn import Int8Params

    theirs = Int8Params.to
    Int8Params.to = lambda self, device, *args, **options: theirs(self, device or "cpu", *args, **options)


CORRECTIONS: dict[str, Correction] = {
    "repacking": Correction(
        "On a CPU with AVX512-BF16 the first forward in eval mode repacks 4-bit weights in place: it multiplies in bfloat16, "
        "and what is saved afterwards has other scales.",
        never_repack,
    ),
    "bins": Correction(
        "Its CPU kernel for 8-bit codes, those of nested scales too, looks up one of 65,536 bins instead of the nearest "
        "value: 0 is coded as 2.1e-5 times absmax.",
        kernels("quantize_blockwise"),
    ),
    "fp4": Correction(
        "Without CUDA its FP4 has other codes: 0 and 8, both zero, are swapped below the first threshold, four thresholds "
        "are up to 14 ulp away from CUDA's, and negative ties go the other way.",
        kernels("quantize_4bit"),
    ),
    "int8 product": Correction(
        "On a CPU its layers do not multiply by LLM.int8(): in training they multiply by the dequantized weight, in eval "
        "mode they round activations to float16 first and scale by a constant that is 1.8e-5 too large.",
        multiply_int8,
    ),
    "int8 scaling": Correction(
        "Its CPU kernel that scales int8 products multiplies in another order, by a constant that is 1.8e-5 too large; in a "
        "bfloat16 model that turns roundings over in every layer.",
        kernels("int8_mm_dequant"),
    ),
    "float16 weights": Correction(
        "It rounds a weight to float16 before it quantizes it to int8.", keep_the_weights_dtype
    ),
    "two roundings": Correction(
        "Its gradient rounds the weight to the dtype that it had before it was quantized, and then to the gradient's.",
        round_once_backwards,
    ),
    "optimizers": Correction(
        "Its CPU optimizers round otherwise in the last bit, and code 8-bit states by the table of 65,536 bins.",
        kernels("optimizer_update_32bit", "optimizer_update_8bit_blockwise"),
    ),
    "sign of squares": Correction(
        "Its RMSprop and Adagrad code their sums of squares by the map with a sign: half of the codes are never used.",
        code_squares_without_a_sign,
    ),
    "unbounded": Correction(
        "On a CPU its LARS and LAMB in 8 bits are SGD and Adam: the step is not bounded by the parameter's length.",
        bound_the_step,
    ),
    "no kernel": Correction(
        "It has no kernel for this on a CPU.", kernels("dequantize_4bit.out", "int8_double_quant")
    ),
    "gemv": Correction(
        "On a CPU with AVX512-BF16 its `gemv_4bit` takes every weight for a repacked one.", kernels("gemv_4bit")
    ),
    "cast": Correction(
        "It converts packed codes in a float storage by value, which destroys them; bnbref leaves them.", leave_codes_alone
    ),
    "meta": Correction(
        "Moving a weight to the meta device takes the scales of the original along.", keep_scales_off_meta
    ),
    "scales lost": Correction(
        "An int8 weight that is wrapped anew, as DoRA does, makes the layer forget its scales.", keep_scales_that_are_there
    ),
    "GPU 0": Correction(
        "accelerate moves int8 weights to device 0 to quantize them; bnbref takes the CPU where there is no such device.",
        cpu_is_device_0,
    ),
    "undoing": Correction(
        "transformers cannot undo the reading of quantized weights, which saving them again asks for; with the alias it can.",
        undo_reading,
    ),
}  # fmt: skip

REASONS: dict[str, tuple[str, ...]] = {
    "logits: NF4": ("repacking",),
    "logits: NF4, double": ("repacking", "bins"),
    "logits: NF4 in bfloat16": ("repacking",),
    "logits: FP4": ("repacking", "fp4"),
    "logits: int8": ("int8 scaling",),
    "checkpoint, logits: nf4_plain": ("repacking",),
    "checkpoint, logits: nf4_nested": ("repacking",),
    "checkpoint, logits: int8": ("int8 scaling",),
    "generate: NF4, double": ("repacking",),
    "save_pretrained after a forward pass: NF4": ("repacking",),
    "half() of weights in bfloat16 storage: NF4": ("cast",),
    "cpu_offload: NF4, double": ("meta", "repacking", "bins"),
    "disk_offload: NF4, double": ("meta", "repacking", "bins"),
    "cpu_offload: int8": ("int8 scaling",),
    "disk_offload: int8": ("int8 scaling",),
    "load_and_quantize_model: int8": ("GPU 0",),
    "save a checkpoint again: nf4_nested": ("undoing",),
    "LoRA, losses and gradients: int8": ("int8 product",),
    "LoRA, a float16 model computing in bfloat16: NF4": ("two roundings",),
    "DoRA, losses and gradients: int8": ("scales lost", "int8 product"),
    "OLoRA, the base it leaves and losses: int8": ("float16 weights", "int8 product"),
    "Trainer, rmsprop_bnb_8bit: NF4": ("optimizers", "sign of squares"),
    **dict.fromkeys(
        (
            "load on the fly: NF4, double", "save_pretrained: NF4, double", "dequantize: NF4, double",
            "LoRA, losses and gradients: NF4, double", "DoRA, losses and gradients: NF4, double",
            "OLoRA, the base it leaves and losses: NF4, double", "merge: NF4, double", "merge and unmerge: NF4, double",
            "merge_and_unload: NF4, double", "adapter saved and loaded: NF4, double",
        ),
        ("bins",),
    ),
    **dict.fromkeys(
        ("load on the fly: FP4", "save_pretrained: FP4", "dequantize: FP4", "LoRA, losses and gradients: FP4"), ("fp4",)
    ),
    **dict.fromkeys(("merge: int8", "merge and unmerge: int8", "merge_and_unload: int8"), ("float16 weights",)),
    **dict.fromkeys(
        (
            f"Trainer, {name}: NF4"
            for name in (
                "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "rmsprop_bnb",
                "rmsprop_bnb_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
            )
        ),
        ("optimizers",),
    ),
}  # fmt: skip
"""Of flows: the corrections with which bitsandbytes gives what bnbref gives, none of which can be left out."""

OF_CALLS: dict[str, tuple[str, ...]] = {
    "q, state = F.quantize_4bit(A)": ("fp4",),
    "q, state = F.quantize_4bit(A, quant_type='fp4'": ("fp4",),
    "out = torch.empty_like(A); q": ("no kernel",),
    "q, s = F.quantize_4bit(A); ": ("no kernel",),
    "q, state = F.quantize_blockwise(A": ("bins",),
    "out = torch.empty_like(A, dtype=torch.uint8); ": ("bins",),
    "a, _, rows": ("no kernel",),
    "a, s, _ = F.int8_vectorwise_quant(A); ": ("int8 scaling",),
    "q, state = F.quantize_4bit(W, quant_type='nf4'); y = F.gemv_4bit": ("gemv",),
    "y = bnb.matmul(A, W": ("int8 product",),
    "state = bnb.MatmulLtState(); ": ("int8 product",),
    "fp = torch.nn.Sequential(torch.nn.Linear(128, 32)); q = torch.nn.Sequential(bnb.nn.Linear8bitLt": (
        "int8 product",
        "float16 weights",
    ),
    "w = bnb.nn.Int8Params": ("float16 weights",),
    "bnb.optim.Adam8bit": ("optimizers",),
    "bnb.optim.AdamW(": ("optimizers",),
    "bnb.optim.LARS8bit": ("unbounded",),
}
"""The same of the snippets that begin so."""

FAIL: dict[str, str] = {
    "dequantize after save_pretrained: NF4": "transformers cannot; `patch_hf=True` can",
    "device_map with a disk: NF4, double": "transformers refuses; `patch_hf=True` can",
    "device_map with a disk: int8": "transformers refuses; `patch_hf=True` can",
    "load_and_quantize_model: NF4, double": "accelerate refuses 4 bits without a GPU",
    "LoftQ: NF4, double": "peft computes it on a GPU only",
    "LoftQ: int8": "peft computes it on a GPU only",
}
"""What bnbref raises in too, and whose doing it is."""


def all_reasons() -> dict[str, tuple[str, ...]]:
    """REASONS, and those of every snippet. ValueError for a beginning that is no snippet's."""
    import flows

    found, snippets = dict(REASONS), flows.calls()
    for beginning, reasons in OF_CALLS.items():
        ours = [code for code in snippets if code == beginning or (code.startswith(beginning) and beginning[-1] != ")")]
        if not ours:
            raise ValueError(f"no snippet begins with {beginning!r}")
        found |= dict.fromkeys(ours, reasons)
    return found


# ---- running --------------------------------------------------------------------------------------------------------


def all_flows() -> dict[str, Callable[[Path], dict[str, Tensor]]]:
    import flows

    return flows.FLOWS | flows.calls()


def work(package: str, corrections: Iterable[str], names: Iterable[str], out: Path) -> None:
    """In a process of its own: run flows, write tensors and errors into a folder."""
    if package == "bnbref":
        import bnbref

        bnbref.install_as_bitsandbytes(force=True)
    import bitsandbytes
    import transformers

    for name in corrections:
        CORRECTIONS[name].apply()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    flows, errors = all_flows(), {}
    for i, name in enumerate(names):
        torch.manual_seed(0)
        bitsandbytes.optim.GlobalOptimManager._instance = None  # it would know parameters of the last flow by their id
        with tempfile.TemporaryDirectory() as folder:
            try:
                torch.save(flows[name](Path(folder)), out / f"{i}.pt")
            except Exception as error:  # whatever it is, it is what this package does
                lines = str(error).splitlines() or [""]
                errors[name] = f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
    (out / "errors.json").write_text(json.dumps(errors), encoding="utf-8")


class Outcome(NamedTuple):
    """What a flow gave: tensors, or an error."""

    tensors: Mapping[str, Tensor] | None
    error: str | None


def run(package: str, names: Iterable[str], corrections: Iterable[str] = ()) -> dict[str, Outcome]:
    """The outcomes of flows in a fresh process."""
    import os

    names = list(names)
    with tempfile.TemporaryDirectory() as folder:
        order = {"package": package, "corrections": list(corrections), "names": names, "out": folder}
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "BNBREF_COMPILE": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        env.pop("BNBREF_BACKEND_FOR", None)
        command = [sys.executable, __file__, "--work", json.dumps(order)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{package} {order['corrections']}: {done.stderr}")
        errors = json.loads((Path(folder) / "errors.json").read_text(encoding="utf-8"))
        return {
            name: Outcome(None, errors[name])
            if name in errors
            else Outcome(torch.load(Path(folder) / f"{i}.pt", weights_only=True), None)
            for i, name in enumerate(names)
        }


# ---- comparing ------------------------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def difference(theirs: Outcome, ours: Outcome) -> str:
    """Empty if both gave the same bits, or the same error; else how far apart they are."""
    if theirs.error is not None or ours.error is not None:
        return "" if theirs.error == ours.error else "one raises"
    assert theirs.tensors is not None
    assert ours.tensors is not None
    if theirs.tensors.keys() != ours.tensors.keys():
        return "other tensors"
    codes = values = 0.0
    equal = True
    for name, a in theirs.tensors.items():
        b = ours.tensors[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            return "other shapes or dtypes"
        if same(a, b):
            continue
        equal = False
        if a.is_floating_point() and bool((a.isfinite() & b.isfinite()).all()):
            size = max(a.double().norm().item(), b.double().norm().item())
            values = max(values, (a.double() - b.double()).norm().item() / (size or 1))
        else:
            codes = max(codes, (a != b).double().mean().item())
    parts = [f"{codes:.1%} of codes"] * (codes > 0) + [f"{values:.0e} of the norm"] * (values > 0)
    return "" if equal else ", ".join(parts) or "signs of zeros"


class Row(NamedTuple):
    """A flow on both, and the corrections with which bitsandbytes gives what bnbref gives."""

    flow: str
    bitsandbytes: str | None
    bnbref: str | None
    difference: str
    reasons: list[str]


def compare() -> tuple[list[Row], list[str]]:
    """The rows of the table, and everything that is not as REASONS and FAIL say."""
    names, reasons = list(all_flows()), all_reasons()
    ours, theirs = run("bnbref", names), run("bitsandbytes", names)
    rows = [
        Row(name, theirs[name].error, ours[name].error, difference(theirs[name], ours[name]), [*reasons.get(name, ())])
        for name in names
    ]
    corrected: dict[tuple[str, ...], dict[str, Outcome]] = {}
    for part, names in wanted(reasons).items():
        corrected[part] = run("bitsandbytes", names, part)
    return rows, judge(rows, reasons, FAIL, lambda name, part: difference(corrected[part][name], ours[name]))


def wanted(reasons: Mapping[str, tuple[str, ...]]) -> dict[tuple[str, ...], list[str]]:
    """What is to be run: each set of corrections, and each with one less, for the flows that it is a reason of."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, all_of_them in reasons.items():
        for part in (all_of_them, *less_one(all_of_them)):
            found.setdefault(part, []).append(name)
    return found


def less_one(reasons: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The sets without one of them; none for a single one, which is the uncorrected run."""
    return [(*reasons[:i], *reasons[i + 1 :]) for i in range(len(reasons))] if len(reasons) > 1 else []


def judge(
    rows: Iterable[Row],
    reasons: Mapping[str, tuple[str, ...]],
    fail: Mapping[str, str],
    corrected: Callable[[str, tuple[str, ...]], str],
) -> list[str]:
    """What is wrong: differences without a reason, reasons without a difference, reasons that do not explain or are too many.

    corrected: the difference that is left of a flow's with corrections.
    """
    wrong = []
    rows = list(rows)
    for row in rows:
        own = reasons.get(row.flow)
        if row.difference and own is None:
            wrong.append(f"{row.flow}: {row.difference}, and no reason is known ({row.bitsandbytes} | {row.bnbref})")
        if own is not None and not row.difference:
            wrong.append(f"{row.flow}: there is no difference any more, but reasons: {', '.join(own)}")
        if row.difference and own is not None:
            left = corrected(row.flow, own)
            if left:
                wrong.append(f"{row.flow}: {left}, although corrected for {', '.join(own)}")
            for fewer in less_one(own):
                if not corrected(row.flow, fewer):
                    wrong.append(f"{row.flow}: {', '.join(fewer)} explain it alone, without all of {', '.join(own)}")
        if row.bnbref is not None and row.flow not in fail:
            wrong.append(f"{row.flow}: bnbref raises, and no reason is known: {row.bnbref}")
        if row.bnbref is None and row.flow in fail:
            wrong.append(f"{row.flow}: bnbref does not raise any more")
    flows = {row.flow for row in rows}
    wrong += [f"{name}: there is no such flow" for name in (reasons.keys() | fail.keys()) - flows]
    used = {name for own in reasons.values() for name in own}
    wrong += [f"{name}: a correction that is no reason of any flow" for name in CORRECTIONS.keys() - used]
    return wrong


# ---- the page -------------------------------------------------------------------------------------------------------


HEAD = """\
# Side by side with bitsandbytes

This page is for those who move a program from bitsandbytes to bnbref and see another number. The same programs were run on
both, with bnbref under [the name of bitsandbytes](dropin.md), and their results compared bit by bit. Where they differ, the
table says why.

There are {rows} programs, called flows (`tests/flows.py`): loading, saving, generating, adapters, `Trainer`, optimizers, and
the calls of bitsandbytes' documentation. {equal} of them have the same bits on both, or raise the same error. Each of the
others has one or several of the reasons below. A reason was tested by an experiment: with these faults of bitsandbytes
corrected the flow gives the bits that it gives on bnbref, and with one of the corrections missing it does not.

In the column of differences, *of codes* is the share of codes that differ, and *of the norm* the length of the difference divided
by the length of the result. *One raises* means that the program fails on one of the two.

`python tests/side_by_side.py --write` made this page: {made}, on a CPU.
`tests/test_side_by_side.py` checks it.
"""


def page(facts: Mapping[str, Any]) -> str:
    """The page, from what is stored."""
    from test_alias_snippets import SNIPPETS

    rows = [Row(**row) for row in facts["rows"]]
    numbers = {name: i for i, name in enumerate(CORRECTIONS, 1)}
    equal = sum(not row.difference for row in rows)
    lines = [
        HEAD.format(rows=len(rows), equal=equal, made=facts["made with"]),
        "## Reasons",
        "",
        "| | bitsandbytes 0.50.2 |",
        "|---|---|",
        *(f"| {i} | {CORRECTIONS[name].text} |" for name, i in numbers.items()),
        "",
    ]
    for title, part in (
        ("Flows", [row for row in rows if row.flow not in SNIPPETS]),
        ("Calls of bitsandbytes' documentation", [row for row in rows if row.flow in SNIPPETS]),
    ):
        lines += [f"## {title}", "", "| | bitsandbytes | bnbref | difference | reasons |", "|---|---|---|---|---|"]
        lines += [line(row, numbers) for row in part] + [""]
    return "\n".join([*lines, SUITES.read_text(encoding="utf-8")])


def line(row: Row, numbers: Mapping[str, int]) -> str:
    """A row of the table."""
    from test_alias_snippets import SNIPPETS

    code = row.flow.replace("\n", "; ").replace("|", "\\|")
    name = f"`{code}`" if row.flow in SNIPPETS else code
    theirs, ours = (f"`{error[:60]}`" if error else "runs" for error in (row.bitsandbytes, row.bnbref))
    why = [*(str(numbers[name]) for name in row.reasons), *([FAIL[row.flow]] if row.flow in FAIL else [])]
    return f"| {name} | {theirs} | {ours} | {row.difference or 'none'} | {', '.join(why)} |".replace("|  |", "| |")


def write(rows: list[Row]) -> None:
    """Both files."""
    import importlib.metadata as metadata

    versions = [
        f"{name} {metadata.version(name)}" for name in ("bitsandbytes", "torch", "transformers", "peft", "accelerate")
    ]
    facts = {"made with": ", ".join(versions), "rows": [row._asdict() for row in rows]}
    STORED.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(facts), encoding="utf-8")


def why_not() -> str | None:
    """Why this cannot be run here; None if it can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        return "bitsandbytes has other kernels on a CPU without AVX512-BF16"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page and its JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        order = json.loads(args.work)
        work(order["package"], order["corrections"], order["names"], Path(order["out"]))
        return 0
    problem = why_not()
    if problem:
        print(f"side_by_side: {problem}", file=sys.stderr)
        return 2
    rows, wrong = compare()
    numbers = {name: i for i, name in enumerate(CORRECTIONS, 1)}
    print("\n".join([*(line(row, numbers) for row in rows), *wrong]))
    if args.write and not wrong:
        write(rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
