"""What 8-bit states cost, and what each part of their format saves: the ablation of 2110.02861, table 3, on the demo model.

    python benchmarks/ablation.py [--steps 80] [--seeds 2] [--device cpu] [--plot docs/content/ablation.svg]

Adam with its states in 32 bits; in 8 bits with codes in equal steps; with dynamic codes, one scale for a tensor; with dynamic
codes, a scale for each block of 256. The model, the text and the schedule are those of bnbref.demo; a run sees the same
batches in all four. A run is unstable if its loss, after the warm-up, is ever above where it began, or no number.
"""

import argparse
import contextlib
import importlib
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timing
import torch
from demo_corpus import documents, split
from demo_model import END, arguments, build_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

import bnbref
import bnbref.demo
from bnbref import optim
from bnbref.codebooks import linear
from bnbref.demo.evaluate import encode, next_token_loss, windows
from bnbref.optim.rules import Adam


class LinearAdam(Adam):
    """Adam whose 8-bit states have equal steps."""

    codebooks = (linear(), linear(signed=False))


WHOLE = 2**40  # elements of a block: one for each tensor

Variants = Mapping[str, Callable[[nn.Module, float], Any]]
"""By its name, what makes an optimizer of a model and a learning rate."""


def adam(rule: Adam, **options: Any) -> Callable[[nn.Module, float], Any]:
    group = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return lambda model, lr: optim.Optimizer(model.parameters(), rule, {"lr": lr, **group}, **options)


VARIANTS: Variants = {
    "32 bits": adam(Adam(), optim_bits=32),
    "8 bits, linear, one scale": adam(LinearAdam(), optim_bits=8, blocksize=WHOLE),
    "8 bits, dynamic, one scale": adam(Adam(), optim_bits=8, blocksize=WHOLE),
    "8 bits, dynamic, blockwise": adam(Adam(), optim_bits=8),
}


def trained(
    variant: str, variants: Variants, seed: int, tokens: Tensor, heldout: Tensor, args: Any, bar: Any
) -> dict[str, Any]:
    """Losses of each step, the held-out loss at the end, and the longest step of an element, in learning rates."""
    torch.manual_seed(seed)
    sizes = [f"--{name}={getattr(args, name)}" for name in ("hidden", "ffn", "layers", "device")]
    model = build_model(arguments(["--out=unused", "--dropout=0", *sizes]))
    optimizer = variants[variant](model, args.lr)
    averages = hasattr(optimizer, "eval")  # Schedule-Free: it has no schedule, and other parameters to be evaluated
    warmup = args.steps // 20 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        (lambda step: 1.0)
        if averages
        else lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / args.steps))),
    )
    offsets = torch.arange(args.length, device=args.device)
    losses, longest = [], 0.0
    for _ in range(args.steps):
        first = torch.randint(len(tokens) - args.length, (args.batch, 1), device=args.device)
        loss = next_token_loss(model, tokens[first + offsets])
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        # The same bits; a block for each tensor would be a kernel to compile for each size of a tensor.
        with contextlib.nullcontext() if args.compiled else bnbref.eager():
            optimizer.step()
        moved = zip(model.parameters(), before, strict=True)
        longest = max(longest, *((p.detach() - old).abs().max().item() / rates[id(p)] for p, old in moved))
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.update()
    model.eval()
    if averages:
        optimizer.eval()
    with torch.inference_mode():
        parts = windows(heldout, args.length)[: args.windows].split(16)
        held = statistics.fmean(next_token_loss(model, part).item() for part in parts)
    every = max(1, args.steps // 250)  # of longer runs fewer losses are kept
    return {
        "what": variant,
        "seed": seed,
        "loss": statistics.fmean(losses[-max(1, args.steps // 10) :]),
        "heldout_loss": held,
        "longest_step": longest,
        "unstable": not all(x <= losses[0] for x in losses[warmup:]),
        "every": every,
        "losses": [round(x, 4) for x in losses[::every]],
    }


def table(rows: list[dict[str, Any]], variants: Variants) -> str:
    """A variant a line: loss and held-out loss, the median of the seeds, the longest step of all, and the unstable runs."""
    lines = ["| states | loss | held-out loss | longest step | unstable runs |", "|---|---|---|---|---|"]
    for variant in variants:
        own = [row for row in rows if row["what"] == variant]
        loss, held = (statistics.median(row[key] for row in own) for key in ("loss", "heldout_loss"))
        unstable, longest = sum(row["unstable"] for row in own), max(row.get("longest_step", math.nan) for row in own)
        lines.append(f"| {variant} | {loss:.3f} | {held:.3f} | {longest:.1f} | {unstable} of {len(own)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], variants: Variants, path: Path) -> None:
    """Loss by step: a colour for each variant, a line for each seed."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'bnbref[bench]', or leave out --plot") from error
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for i, variant in enumerate(variants):
        for k, row in enumerate(row for row in rows if row["what"] == variant):
            steps = range(0, len(row["losses"]) * row.get("every", 1), row.get("every", 1))
            axes.plot(steps, row["losses"], color=f"C{i}", linewidth=1, alpha=0.8, label=variant if k == 0 else None)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main(
    variants: Variants = VARIANTS, name: str = "ablation", description: str | None = __doc__, **defaults: Any
) -> None:
    """Train each variant with each seed; rows, a table and a plot of them. defaults: of the arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=2e-3)
    for size, default in (("hidden", 128), ("ffn", 320), ("layers", 4)):
        parser.add_argument(f"--{size}", type=int, default=default, help="of the model; the demo's are 256, 640, 6")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="file of the plot: needs matplotlib")
    parser.add_argument("--again", type=Path, help="print and plot the rows in this file, train nothing")
    parser.set_defaults(**{"compiled": False, **defaults})
    args = parser.parse_args()
    if args.again is not None:
        rows = json.loads(args.again.read_text(encoding="utf-8"))["rows"]
    else:
        tokenizer = AutoTokenizer.from_pretrained(Path(bnbref.demo.__file__).parent / "model")
        train, held = split(documents(None), 110_000)
        texts = [text for document in train for text in (document.text, document.comment_text) if text]
        tokens, heldout = (
            encode(tokenizer, END.join(part)).to(args.device) for part in (texts, [d.text for d in held])
        )
        rows = []
        with tqdm(total=len(variants) * args.seeds * args.steps, unit="step") as bar:
            for seed in range(args.seeds):
                for variant in variants:
                    bar.set_description(f"{variant}, seed {seed}")
                    rows.append(trained(variant, variants, seed, tokens, heldout, args, bar))
                    timing.save(name, rows)  # as it goes: a run that is cut short leaves what it has
    print(table(rows, variants))
    if args.plot is not None:
        plot(rows, variants, args.plot)


if __name__ == "__main__":
    main()
