"""The output of `python -m bnbref plan`: a table of the usual GPUs; or, for one memory size, what fits and the code to paste."""

import math
import re
from collections.abc import Sequence

from bnbref import optim
from bnbref.integrations.hf.blueprint import FORMATS, Blueprint
from bnbref.integrations.hf.plan import Plan, must_say, plans

CARDS = (8, 12, 16, 24, 40, 80)
"""Memory of usual GPUs, in GiB."""

USES: dict[str | None, tuple[str, tuple[type[optim.Optimizer], ...]]] = {
    None: ("run", (optim.PagedAdamW8bit,)),
    "qlora": ("train an adapter", (optim.PagedAdamW8bit,)),
    "full": ("train everything", (optim.AdamW, optim.AdamW8bit, optim.PagedAdamW8bit, optim.Lion8bit)),
}
"""The uses of a model, each with optimizers of different cost. An adapter is so small that its optimizer hardly counts."""


PREPARED = ("model = prepare_model_for_kbit_training(model)",)
CHECKPOINTED = ("model.gradient_checkpointing_enable()", "model.enable_input_require_grads()")
"""Lines of code that prepare a float model. `prepare_model_for_kbit_training` would cast all of it to float32."""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its columns aligned at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


# ---- all devices ----------------------------------------------------------------------------------------------------


def cards(
    blueprint: Blueprint, train: str | None, optimizer: type[optim.Optimizer] | None, seq: int, batch: int
) -> tuple[str, bool]:
    """A table of what fits on which GPU, and whether anything fits on any. train, optimizer: None for all of `USES`."""
    found: list[tuple[str, str, Plan]] = []
    for use, (name, usual) in USES.items():
        if train not in (None, use):
            continue
        for choice in (optimizer,) if optimizer and use else usual:
            found += [(name, choice.__name__ if use else "", p) for p in plans(blueprint, use, choice, seq, batch)]
    unit, power = ("GiB", 30) if max(p.total for *_, p in found) >= 2**30 else ("MiB", 20)
    rows = [["", "format", "optimizer", "weights", "training", "tokens", unit, "host", *map(str, CARDS)]]
    for name, chosen, p in found:
        weights = p.parts["weights"] + p.parts["scales"]
        tokens = p.parts.get("KV cache", 0) + p.parts["activations"]
        sizes = (weights, p.total - weights - tokens, tokens, p.total, p.host)
        fits = ["yes" if p.total <= card * 2**30 else "-" for card in CARDS]
        rows.append([name, p.format, chosen, *(f"{size / 2**power:.2f}" if size else "" for size in sizes), *fits])
    lines = [
        *aligned(rows), "",
        f"{batch} x {seq} tokens. training: adapters, gradients and states of the optimizer. tokens: KV cache and activations,",
        "which are an estimate; the driver takes some hundred MiB more. host: states in the memory of the host.",
        "Right: GPUs by their GiB. Add --memory SIZE for a recommendation and the code to paste.",
    ]  # fmt: skip
    return "\n".join(lines), any(p.total <= max(CARDS) * 2**30 for *_, p in found)


def parse_memory(text: str) -> tuple[int, int]:
    """How many GPUs there are, and the bytes of each. text: a number with a unit; the number of GPUs may stand before it.

    >>> parse_memory("24GiB"), parse_memory("2 x 1.5 GB")
    ((1, 25769803776), (2, 1500000000))
    """
    found = re.fullmatch(r"\s*(?:([1-9]\d{0,8})\s*x)?\s*(\d{1,15}(?:\.\d+)?)\s*(?:([kmgt])(i?))?b\s*", text.lower())
    if found is None:
        raise ValueError(f"memory must be a number with a unit, like 24GiB, 16GB or 2x24GiB, got {text!r}")
    count, number, letter, binary = found.groups()
    unit: int = (1024 if binary else 1000) ** " kmgt".index(letter or " ")
    return int(count or 1), math.floor(float(number) * unit)


# ---- one device -----------------------------------------------------------------------------------------------------


def room(blueprint: Blueprint, count: int, memory: int) -> int:
    """Bytes that a model may take on so many GPUs: whole layers are divided, so each but one may waste a layer."""
    return count * memory - (count - 1) * blueprint.undivided_bytes()


def report(
    model: str, loader: str, found: list[Plan], memory: int, train: str | None, optimizer: str, count: int = 1
) -> str:
    """A table of plans, what is recommended, and the code to paste.

    loader: the class of transformers that loads the model. memory: bytes that there are, on `count` GPUs.
    """
    columns = list(found[0].parts)  # of one use all plans have the same parts
    unit, power = ("GiB", 30) if max(plan.total for plan in found) >= 2**30 else ("MiB", 20)
    rows = [[unit, *columns, "total", "host", "fits"]]
    for plan in found:
        fits = "yes" if plan.total <= memory else "no"
        rows.append(
            [plan.format, *(f"{size / 2**power:.2f}" for size in (*plan.parts.values(), plan.total, plan.host)), fits]
        )
    lines = aligned(rows)
    best = next((plan for plan in found if plan.total <= memory), None)
    divided = (
        f", on {count} GPUs among which layers are divided as a whole; one GPU works at a time" if count > 1 else ""
    )
    lines += ["", f"activations are an estimate; {memory / 2**power:.2f} {unit} are there{divided}"]
    if best is None:
        least = min(found, key=lambda plan: plan.total)
        return "\n".join(
            [*lines, f"none fits: {least.format} needs {(least.total - memory) / 2**power:.2f} {unit} more"]
        )
    return "\n".join([*lines, f"recommended: {best.format}", "", code(model, loader, best.format, train, optimizer)])


def code(model: str, loader: str, format_name: str, train: str | None, optimizer: str) -> str:
    """Python that does what a plan says."""
    spec = FORMATS[format_name]
    quantization = ""
    if spec is not None:
        double = "" if spec.is_int8 else f", double_quant={spec.double_quant}"
        quantization = f"    quantization_config=BnbRefConfig({spec.quant_type!r}{double}),\n"
    task = ', task_type="CAUSAL_LM"' if loader == "AutoModelForCausalLM" else ""
    lines = ["import torch", f"from transformers import {loader}"]
    if spec is not None:
        lines.append("from bnbref import BnbRefConfig")
    lines += ["", f"model = {loader}.from_pretrained("]
    lines += [f'    {model!r},\n{quantization}    dtype=torch.bfloat16,\n    device_map="auto",', ")"]
    if train == "qlora":
        lines += [
            "",
            f"from peft import LoraConfig, get_peft_model{', prepare_model_for_kbit_training' if spec else ''}",
            "",
            *(PREPARED if spec else CHECKPOINTED),
            f'lora = LoraConfig(r=16, target_modules="all-linear"{task})',
            "model = get_peft_model(model, lora)",
        ]
    if train is not None:
        lines += ["", "from bnbref import optim", ""]
        if train == "full":
            lines.append(CHECKPOINTED[0])
        more = "".join(f", {name}={value}" for name, value in must_say(getattr(optim, optimizer)).items())
        lines.append(
            f"optimizer = optim.{optimizer}([p for p in model.parameters() if p.requires_grad], lr=1e-4{more})"
        )
    return "\n".join(lines)
