"""How running averages in 8 bits follow gradients that change: against the same averages in 32 bits.

    python benchmarks/averages.py [--steps 3000]

In each block of 256 the gradients of one half are random numbers of the same size for ever. Those of the other half change their
size after a third of the steps, or never. The first table is of that half: the squares v of AdamW in 8 bits over those in 32. The
second is of AdEMAMix, whose gradients have a mean here: the error of its slow average in 8 bits, over the size that it has in 32,
and the part of the mean that each of them has found.
"""

import argparse
from typing import Any

import timing
import torch
from torch import Tensor, nn

import bnbref
from bnbref import blockwise, optim
from bnbref.codebooks import value_table
from bnbref.optim.rules import absmax_key

N = 1024
HALF = torch.arange(N) % 2 == 0


def decoded(optimizer: optim.Optimizer, key: str) -> Tensor:
    """The state in float32 of the only parameter."""
    [state] = optimizer.state.values()
    if state[key].dtype != torch.uint8:
        return state[key].clone()
    [codebook] = [optimizer.rule.codebook(s) for s in optimizer.rule.states if s.key == key]
    values = value_table(codebook, torch.device("cpu"))
    return blockwise.dequantize(state[key], state[absmax_key(key)], values, 256, torch.float32)


def averages(
    kind: Any, key: str, gradients: Any, steps: int, at: list[int], **group: Any
) -> list[tuple[Tensor, Tensor]]:
    """The state after some of the steps, in 32 bits and in 8."""
    optimizers = [kind([nn.Parameter(torch.zeros(N))], optim_bits=bits, min_8bit_size=1, **group) for bits in (32, 8)]
    found = []
    for t in range(1, steps + 1):
        gradient = gradients(t)
        for optimizer in optimizers:
            optimizer.param_groups[0]["params"][0].grad = gradient.clone()
            with bnbref.eager():  # the same bits, and nothing to compile
                optimizer.step()
        if t in at:
            found.append((decoded(optimizers[0], key), decoded(optimizers[1], key)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    change, rows = args.steps // 3, []
    at = [change, change + 500, args.steps]
    print(f"| AdamW, beta2 | gradients of the half | v in 8 bits over v in 32: {' | '.join(f'step {t}' for t in at)} |")
    for b2 in (0.95, 0.99, 0.999):
        for before, after in ((1.0, 1.0), (1.0, 0.1), (0.1, 1.0)):
            generator = torch.Generator().manual_seed(0)

            def changing(t: int, before: float = before, after: float = after, own: Any = generator) -> Tensor:
                return torch.randn(N, generator=own) * torch.where(HALF, before if t <= change else after, 1.0)

            found = averages(optim.AdamW, "state2", changing, args.steps, at, betas=(0.9, b2))
            ratios = [(v8 / v32)[HALF].median().item() for v32, v8 in found]
            rows.append({"what": "v", "beta2": b2, "before": before, "after": after, "at": at, "ratios": ratios})
            print(f"| {b2} | {before} to {after} | {' | '.join(f'{x:.2f}' for x in ratios)} |")
    print("| AdEMAMix, beta3 | error | mean found in 32 bits | in 8 |")
    mean = 0.05 * torch.randn(N, generator=torch.Generator().manual_seed(1))
    for b3 in (0.999, 0.9999):
        generator = torch.Generator().manual_seed(0)

        def noisy(t: int, own: Any = generator) -> Tensor:
            return mean + torch.randn(N, generator=own)

        [(m32, m8)] = averages(optim.AdEMAMix, "state3", noisy, args.steps, [args.steps], betas=(0.9, 0.999, b3))
        error = ((m8 - m32).square().mean() / m32.square().mean()).sqrt().item()
        parts = [((m * mean).sum() / mean.square().sum()).item() for m in (m32, m8)]
        rows.append({"what": "slow average", "beta3": b3, "error": error, "parts": parts})
        print(f"| {b3} | {error:.2f} | {parts[0]:.2f} | {parts[1]:.2f} |")
    print("saved", timing.save("averages", rows))


if __name__ == "__main__":
    main()
