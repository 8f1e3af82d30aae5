"""The steps that came with version 2 of the vectors, a second time: numpy in float64, from the formulas of the pages alone.

Nothing of bnbref is imported. Corrections of 16-bit weights are integers of Python.
"""

import math
import struct

import numpy as np
import second
import torch


def double(x):
    return second.floats(x).reshape(x.shape).astype(np.float64)


def named(p, **results):
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in {"p": p, **results}.items()}


def schedule_free(p, z, g, squares, step, lr, beta1, beta2, eps, weight_decay, warmup_steps):
    p, z, g, v = map(double, (p, z, g, squares))
    rates = [lr * (min(t, warmup_steps) / warmup_steps if warmup_steps else 1) for t in range(1, step + 1)]
    v = beta2 * v + (1 - beta2) * g**2
    u = g / (np.sqrt(v / (1 - beta2**step)) + eps) + weight_decay * p
    c = rates[-1] ** 2 / sum(np.square(rates))
    new = z - rates[-1] * u
    x = (1 - c) * (p - (1 - beta1) * z) / beta1 + c * new  # the average itself, and p between both
    return named((1 - beta1) * new + beta1 * x, z=new, squares=v)


def newton_schulz(x, steps, eps):
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, steps, eps).T
    x = x / max(np.linalg.norm(x), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon(p, g, momentum, lr, beta, weight_decay, nesterov, adjust, ns_steps, eps):
    p, g, m = map(double, (p, g, momentum))
    m = beta * m + (1 - beta) * g
    rows, columns = p.shape
    s = math.sqrt(max(1, rows / columns)) if adjust == "original" else 0.2 * math.sqrt(max(rows, columns))
    u = newton_schulz(beta * m + (1 - beta) * g if nesterov else m, ns_steps, eps)
    return named((1 - lr * weight_decay) * p - lr * s * u, momentum=m)


def muon_8bit(p, g, momentum, absmax, values, **k):
    codes, scales = momentum.reshape(-1).long(), absmax.repeat_interleave(256)[: p.numel()]
    made = muon(p, g, (values[codes] * scales).view(p.shape), **k)
    new, scales = second.quantize("dynamic_signed", made["momentum"].numpy().reshape(-1).astype(np.float32), 256)
    return made | {
        "momentum": torch.tensor(new, dtype=torch.uint8).view(p.shape),
        "absmax": torch.from_numpy(np.asarray(scales, dtype=np.float32)),
    }


def adafactor(p, g, row, column, step, lr, beta2_decay, eps1, eps2, d, weight_decay):
    p, g, row, column = map(double, (p, g, row, column))
    beta = 1 - step**beta2_decay
    row = beta * row + (1 - beta) * (g**2).mean(1)
    column = beta * column + (1 - beta) * (g**2).mean(0)
    u = g / np.maximum(np.sqrt(np.outer(row, column) / row.mean()), eps1)
    rate = min(lr, step**-0.5) * max(eps2, np.sqrt((p**2).mean())) / max(1, np.sqrt((u**2).mean()) / d)
    return named((1 - lr * weight_decay) * p - rate * u, row=row, column=column)


def soap(
    p, g, momentum, squares, left, right, of_left, of_right, step, lr, beta1, beta2, beta3, eps, weight_decay
):  # fmt: skip
    p, g, m, v, left, right, of_left, of_right = map(double, (p, g, momentum, squares, left, right, of_left, of_right))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (of_left.T @ g @ of_right) ** 2
    rotated = of_left.T @ m @ of_right / (1 - beta1**step)
    u = of_left @ (rotated / (np.sqrt(v / (1 - beta2**step)) + eps)) @ of_right.T
    left, right = beta3 * left + (1 - beta3) * g @ g.T, beta3 * right + (1 - beta3) * g.T @ g
    return named(p - lr * weight_decay * p - lr * u, momentum=m, squares=v, left=left, right=right)


# ---- corrections ----------------------------------------------------------------------------------------------------

F = {torch.bfloat16: (16, 1.0), torch.float16: (13, 2.0**-112)}


def place(x, f):
    """The number of a float32, |x| f."""
    return struct.unpack("<I", struct.pack("<f", abs(x) * f))[0]


def split(x, dtype, coarse):
    shift, f = F[dtype]
    n = place(x, f)
    if coarse:
        unit = 2 ** (shift - 8)
        low = n // unit
        up = 2 * (n - low * unit) > unit or (2 * (n - low * unit) == unit and low % 2 == 1)
        n = (low + up) * unit
    w = (n + 2 ** (shift - 1)) // 2**shift * 2**shift
    p = math.copysign(struct.unpack("<f", struct.pack("<I", w))[0] / f, x)
    return p, (n - w) // (2 ** (shift - 8) if coarse else 1)


def split_weight(x, dtype, bits):
    pairs = [split(value, dtype, bits == 24) for value in x.tolist()]
    kind = torch.int8 if bits == 24 else torch.int16
    return torch.tensor([p for p, _ in pairs], dtype=dtype), torch.tensor([c for _, c in pairs], dtype=kind)


def join_weight(p, correction):
    shift, f = F[p.dtype]
    unit = 2 ** (shift - 8) if correction.dtype == torch.int8 else 1
    numbers = [max(0, place(x, f) + c * unit) for x, c in zip(p.tolist(), correction.tolist(), strict=True)]
    sizes = [struct.unpack("<f", struct.pack("<I", n))[0] / f for n in numbers]
    return torch.tensor([math.copysign(size, x) for size, x in zip(sizes, p.tolist(), strict=True)])


def corrected_step(
    p, correction, g, state1, state2, optimizer, step, lr, beta1, beta2, eps, weight_decay, gnorm_scale, **_
):
    x, g, m, v = map(double, (join_weight(p, correction), g, state1, state2))
    g = g * gnorm_scale
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    u = m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + eps)
    x = (x - lr * weight_decay * x - lr * u).astype(np.float32)
    new = split_weight(torch.from_numpy(x), p.dtype, 24 if correction.dtype == torch.int8 else 32)
    return named(x, state1=m, state2=v) | {"p": new[0], "correction": new[1]}


def released_step(x, weight1, grad, lr, weight2=None):
    x, w1, w2, grad = (double(t) for t in (x, weight1, weight1 if weight2 is None else weight2, grad))
    of_first, of_second = w2.T @ grad.T @ x, grad.T @ (x @ w1.T)
    steps = [of_first + of_second] if weight2 is None else [of_first, of_second]
    return tuple(torch.from_numpy((w - lr * u).astype(np.float32)) for w, u in zip((w1, w2), steps, strict=False))


STEPS = {
    function.__name__: function
    for function in (
        schedule_free, muon, muon_8bit, adafactor, soap, split_weight, join_weight, corrected_step, released_step,
    )
}  # fmt: skip
