"""The steps that came with version 2 of the vectors, a second time: numpy in float64, from the formulas of the pages alone.

Nothing of bnbref is imported. Corrections of 16-bit weights are integers of Python.
"""

import math
import struct

import numpy as np
import second
import torch


def double(x):
    return x.double().numpy().copy()


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


def coded_squares(x):
    """Codes of numbers that are not negative, none of which above 0 has the code of 0; and scales of blocks of 256."""
    return tensors_of(*quantize_squares(x.reshape(-1).astype(np.float32), 256), x.shape)


def quantize_squares(x, blocksize):
    codes, scales = second.quantize("dynamic_unsigned", x, blocksize)
    each = np.repeat(scales, blocksize)[: len(x)]
    with np.errstate(divide="ignore", invalid="ignore"):
        above = (each > 0) & (x * (np.float32(1) / each) > 0)
    return np.where(above, np.maximum(codes, 1), codes), scales


def tensors_of(codes, scales, shape):
    return torch.tensor(codes, dtype=torch.uint8).view(shape), torch.from_numpy(np.asarray(scales, dtype=np.float32))


def coded_signed(x):
    return tensors_of(*second.quantize("dynamic_signed", x.reshape(-1).astype(np.float32), 256), x.shape)


def uncoded(codes, scales, values):
    each = scales.repeat_interleave(256)[: codes.numel()].view(codes.shape)
    return values[codes.long()] * each


def schedule_free_8bit(p, difference, absmax1, values1, g, squares, absmax2, values2, beta1, **k):
    d, v = uncoded(difference, absmax1, values1), uncoded(squares, absmax2, values2)
    z = (p.double() + beta1 * d.double()).float()  # of y = z - b1 d, that is (1 - b1) z + b1 (z - d)
    made = schedule_free(p, z, g, v, beta1=beta1, **k)
    exact = made["z"].double() - made["p"].double()
    new, scales1 = coded_signed((exact / beta1).numpy())
    codes, scales2 = coded_squares(made["squares"].numpy())
    return {"p": made["p"], "difference": new, "absmax1": scales1, "squares": codes, "absmax2": scales2}


def soap_8bit(momentum, absmax1, values1, squares, absmax2, values2, **k):
    m, v = uncoded(momentum, absmax1, values1), uncoded(squares, absmax2, values2)
    made = soap(momentum=m, squares=v, **k)
    made["momentum"], made["absmax1"] = coded_signed(made["momentum"].numpy())
    made["squares"], made["absmax2"] = coded_squares(made["squares"].numpy())
    return made


def refreshed(mean, basis):
    """By Householder, and signs as they come; a first basis by LAPACK's symmetric eigenproblem."""
    if not basis.any():
        return np.linalg.eigh(mean)[1]
    order = np.argsort(-np.einsum("ij,ik,kj->j", basis, mean, basis))
    q = np.empty_like(basis)
    q[:, order] = np.linalg.qr((mean @ basis)[:, order])[0]
    return q


def soap_refresh(p, g, then, step, beta3, **k):
    arrays = {name: double(x) for name, x in k.items() if isinstance(x, torch.Tensor)}
    numbers = {name: x for name, x in k.items() if not isinstance(x, torch.Tensor)} | {"beta3": beta3}
    state = {"p": double(p), **arrays}
    if step:
        state |= {name: x.double().numpy() for name, x in soap(p=p, g=g, step=step, beta3=beta3, **k).items()}
    else:
        g = double(g)
        state |= {"left": (1 - beta3) * g @ g.T, "right": (1 - beta3) * g.T @ g}
    for side in ("left", "right"):
        state[f"of_{side}"] = refreshed(state[side], state[f"of_{side}"])
    made = soap(g=then, step=step + 1, **{name: torch.from_numpy(x) for name, x in state.items()}, **numbers)
    return {name: made[name] for name in ("p", "momentum", "left", "right")}


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
    pairs = [split(value, dtype, bits == 24) for value in x.reshape(-1).tolist()]
    kinds = dtype, torch.int8 if bits == 24 else torch.int16
    return tuple(
        torch.tensor(part, dtype=kind).view(x.shape) for part, kind in zip(zip(*pairs, strict=True), kinds, strict=True)
    )


def join_weight(p, correction):
    shift, f = F[p.dtype]
    unit = 2 ** (shift - 8) if correction.dtype == torch.int8 else 1
    numbers = [
        max(0, place(x, f) + c * unit)
        for x, c in zip(p.reshape(-1).tolist(), correction.reshape(-1).tolist(), strict=True)
    ]
    sizes = [struct.unpack("<f", struct.pack("<I", n))[0] / f for n in numbers]
    return torch.tensor([math.copysign(size, x) for size, x in zip(sizes, p.reshape(-1).tolist(), strict=True)]).view(
        p.shape
    )


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
        schedule_free_8bit, soap_8bit, soap_refresh,
    )
}  # fmt: skip
