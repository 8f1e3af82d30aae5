"""An embedding whose tokens are as rare as words, by Adam with 8-bit states: errors that are left, and the longest steps.

    python benchmarks/rare_tokens.py [--steps 500] [--tokens 4096] [--lr 1e-2] [--plot docs/content/squares.svg]

Each row of the table is to become a vector of its own, of which every look-up gives a noisy sample. Token number r comes with a
probability proportional to 1 / (r + 10), and rows lie in the order of a vocabulary, which is no order of frequency: a block of
256 elements has four of them. Beside bnbref stand bitsandbytes and torchao, where they are installed. A step is said in learning
rates: one of Adam is about one.
"""

import argparse
import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from torch import nn

import bnbref
from bnbref import optim

CHANNELS, BATCH = 64, 512
BETAS = (0.9, 0.999)


def contenders() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {
        "32 bits": optim.AdamW32bit,
        "8 bits": optim.AdamW8bit,
        "8 bits, nonzero_squares": lambda *args, **options: optim.AdamW8bit(*args, nonzero_squares=True, **options),
    }
    for package, module in (("bitsandbytes", "bitsandbytes.optim"), ("torchao", "torchao.optim")):
        try:
            found[f"8 bits, {package}"] = importlib.import_module(module).AdamW8bit
        except ImportError:
            print(f"{package} is not installed: no comparison with it")
    return found


def schedule(optimizer: Any, lr: torch.Tensor) -> None:
    """Let the optimizer have this learning rate: torchao keeps a tensor of its own, and bitsandbytes takes numbers alone."""
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].copy_(lr)
    else:
        group["lr"] = lr.item()


def trained(make: Callable[..., Any], args: Any, seed: int) -> dict[str, Any]:
    """Errors of frequent and of rare rows, and the longest step of each iteration in learning rates."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 1 / (torch.arange(args.tokens) + 10.0)
    frequency = frequency[torch.randperm(args.tokens, generator=generator)]
    wanted = torch.randn(args.tokens, CHANNELS, generator=generator)
    table = nn.Embedding(args.tokens, CHANNELS)
    nn.init.zeros_(table.weight)
    lr = torch.tensor(args.lr)
    optimizer = make(table.parameters(), lr=args.lr, betas=BETAS, weight_decay=0.0)
    longest, seen = [], torch.zeros(args.tokens)
    for t in range(args.steps):
        schedule(optimizer, lr.fill_(args.lr * (1 - t / args.steps)))
        tokens = torch.multinomial(frequency, BATCH, replacement=True, generator=generator)
        seen += torch.bincount(tokens, minlength=args.tokens)
        sample = wanted[tokens] + torch.randn(BATCH, CHANNELS, generator=generator)
        loss = 0.5 * (table(tokens) - sample).square().sum(-1).mean()
        torch.autograd.backward(loss)
        before = table.weight.detach().clone()
        with bnbref.eager():  # the same bits, and nothing to compile
            optimizer.step()
        optimizer.zero_grad()
        longest.append((table.weight.detach() - before).abs().max().item() / lr.item())
    order = frequency.argsort(descending=True)
    error = (table.weight.detach() - wanted).square().mean(-1)
    parts = {"frequent": order[: args.tokens // 16], "rare": order[args.tokens // 2 :]}
    errors = {f"error_{name}": error[rows[seen[rows] > 0]].mean().item() for name, rows in parts.items()}
    return {"seed": seed, **errors, "longest_step": max(longest), "median_longest_step": statistics.median(longest),
            "steps": [round(x, 3) for x in longest]}  # fmt: skip


def table_of(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| states | error, frequent | error, rare | longest step | median of the longest |",
        "|---|---|---|---|---|",
    ]
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        frequent, rare, longest, median = (
            statistics.median(row[key] for row in own)
            for key in ("error_frequent", "error_rare", "longest_step", "median_longest_step")
        )
        lines.append(f"| {what} | {frequent:.4f} | {rare:.4f} | {longest:.1f} | {median:.1f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for what in dict.fromkeys(row["what"] for row in rows):
        own = next(row for row in rows if row["what"] == what)
        axes.plot(own["steps"], linewidth=1, alpha=0.8, label=what)
    axes.set(xlabel="step", ylabel="longest step, in learning rates", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="file of the plot: needs matplotlib")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for what, make in contenders().items():
        for seed in range(args.seeds):
            rows.append({"what": what, **trained(make, args, seed)})
            timing.save("rare_tokens", rows)  # as it goes
    print(table_of(rows))
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
