"""What Python costs between a call and Inductor's code: microseconds of calls that compute next to nothing.

    python benchmarks/door.py [--device cuda] [--rounds 7]

A layer is called two hundred times a token, so this decides how fast text is generated. "alone" is Inductor's own code, called
with the list of arguments that the door gives to it; the difference is the door's.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import timing
import torch

import bnbref
from bnbref import fourbit, functional
from bnbref.codebooks import NF4
from bnbref.kernels import Kernel
from bnbref.packed_weight import operator_arguments

CALLS = 1000


def repeated(call: Callable[[], Any]) -> Callable[[], None]:
    """Many calls, of which nothing is waited for."""

    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def alone(kernel: Kernel[..., Any], *args: Any, **constants: Any) -> Callable[[], Any]:
    """Inductor's code for these arguments."""
    kernel(*args, **constants)
    direct = next(reversed(kernel._calls.values()))
    return lambda: direct(args)


def rows(device: torch.device) -> list[tuple[str, Callable[[], Any]]]:
    """What is timed, by name."""
    x = torch.randn(4, 64, device=device)
    constants = {"blocksize": 64, "codebook": NF4}
    row = torch.randn(1, 256, device=device, dtype=torch.bfloat16)
    weight = torch.randn(256, 256, device=device)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    nested, nested_state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    four, plain = bnbref.nn.Linear4bit(256, 256, bias=False), torch.nn.Linear(256, 256, bias=False)
    eight = bnbref.nn.Linear8bitLt(256, 256, bias=False, has_fp16_weights=False)
    layers = [layer.to(device) for layer in (four, eight, plain.bfloat16())]
    quantized = layers[0].weight
    arguments = operator_arguments(quantized.quant_state)
    return [
        ("a kernel, alone", alone(fourbit.quantize_rows, x, **constants)),
        ("a kernel, through the door", lambda: fourbit.quantize_rows(x, **constants)),
        ("quantize_4bit", lambda: functional.quantize_4bit(x, quant_type="nf4")),
        ("matmul_4bit, one row", lambda: bnbref.matmul_4bit(row, packed, state)),
        ("matmul_4bit, one row, nested", lambda: bnbref.matmul_4bit(row, nested, nested_state)),
        ("Linear4bit, one row", lambda: layers[0](row)),
        (
            "its operator in a graph",
            lambda: torch.ops.bnbref.linear_4bit(row, None, False, quantized, *arguments, True),
        ),
        ("Linear8bitLt, one row", lambda: layers[1](row)),
        ("nn.Linear, one row", lambda: layers[2](row)),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    with torch.no_grad():
        contenders = {name: repeated(call) for name, call in rows(device)}
        found = timing.medians(contenders, args.rounds, time.process_time)
    for name, milliseconds in found.items():
        print(f"{name:<32}{milliseconds * 1000 / CALLS:8.1f} us")


if __name__ == "__main__":
    main()
