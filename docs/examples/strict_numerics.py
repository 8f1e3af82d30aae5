"""Does `torch.compile` keep the bits of eager PyTorch, and does numerics="strict" help? A program of torch alone.

    python strict_numerics.py [cpu | cuda]

Each line is an operation, or two or three in a row, on 2^18 floats (rows of 1024 where it sums): how many results have other bits
compiled than uncompiled, by default and with `options={"numerics": "strict"}`, which torch has from 2.14 on.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
generator = torch.Generator().manual_seed(0)
a, b, c = (torch.rand(256, 1024, generator=generator).add(0.1).to(device) for _ in range(3))
zeros = torch.zeros(256, 1024, device=device)
scalar = torch.tensor(3.7, device=device)

OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "a * b": (lambda a, b: a * b, (a, b)),
    "a * b + c": (lambda a, b, c: a * b + c, (a, b, c)),
    "a / b": (lambda a, b: a / b, (a, b)),
    "a / 3.7": (lambda a: a / 3.7, (a,)),
    "a / tensor(3.7)": (lambda a, s: a / s, (a, scalar)),
    "1 / a": (lambda a: 1 / a, (a,)),
    "sqrt(a)": (torch.sqrt, (a,)),
    "rsqrt(a)": (torch.rsqrt, (a,)),
    "exp(a)": (torch.exp, (a,)),
    "log(a)": (torch.log, (a,)),
    "tanh(a)": (torch.tanh, (a,)),
    "erf(a)": (torch.erf, (a,)),
    "a ** 2.5": (lambda a: a**2.5, (a,)),
    "a.add(b, alpha=3.7)": (lambda a, b: a.add(b, alpha=3.7), (a, b)),
    "addcmul(c, a, b, value=3.7)": (lambda a, b, c: torch.addcmul(c, a, b, value=3.7), (a, b, c)),
    "addcdiv(c, a, b, value=3.7)": (lambda a, b, c: torch.addcdiv(c, a, b, value=3.7), (a, b, c)),
    "lerp(a, b, 0.3)": (lambda a, b: torch.lerp(a, b, 0.3), (a, b)),
    "a.bfloat16().float()": (lambda a: a.bfloat16().float(), (a,)),
    "(a.bfloat16() * b.bfloat16()) + c.bfloat16()": (
        lambda a, b, c: a * b + c, (a.bfloat16(), b.bfloat16(), c.bfloat16()),
    ),
    "a * 1e-38 * 1e-3": (lambda a: a * 1e-38 * 1e-3, (a,)),
    "0 - zeros": (lambda z: 0 - z, (zeros,)),
    "-zeros": (lambda z: -z, (zeros,)),
    "(-zeros).sum(-1)": (lambda z: (-z).sum(-1), (zeros,)),
    "a.sum(-1)": (lambda a: a.sum(-1), (a,)),
    "a.mean(-1)": (lambda a: a.mean(-1), (a,)),
    "a[:, :3].sum(-1)": (lambda a: a[:, :3].sum(-1), (a,)),
    "a.prod(-1)": (lambda a: a.prod(-1), (a,)),
    "softmax(a, -1)": (lambda a: torch.softmax(a, -1), (a,)),
    "a[:1] @ b.t()": (lambda a, b: a[:1] @ b.t(), (a, b)),
    "a @ b.t()": (lambda a, b: a @ b.t(), (a, b)),
}  # fmt: skip


def differ(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], **options: str) -> str:
    torch._dynamo.reset()
    want = function(*tensors)
    try:
        got = torch.compile(function, fullgraph=True, options=options)(*tensors)
    except RuntimeError as error:  # torch before 2.14 has no such option
        return str(error).splitlines()[0]
    integers = {2: torch.int16, 4: torch.int32}[want.element_size()]
    return f"{int((got.view(integers) != want.view(integers)).sum())} of {want.numel()}"


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {device}\n| operation | default | strict |\n|---|---|---|")
    for name, (function, tensors) in OPERATIONS.items():
        print(
            f"| `{name}` | {differ(function, tensors)} | {differ(function, tensors, numerics='strict')} |", flush=True
        )
