"""What the programs beside this file have in common: the right answers, in a few lines of torch. None of them imports bnbref."""

import torch

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
THRESHOLDS = (NF4[1:] + NF4[:-1]) / 2


def codes(block):
    """NF4's codes of a block: how many midpoints are below an element, divided by the largest magnitude in float32."""
    scaled = block.float() / block.float().abs().max()
    return (scaled[:, None] > THRESHOLDS).sum(-1)


def unpack(packed):
    """The codes in bytes, the first of two in the high nibble."""
    return torch.stack((packed >> 4, packed & 15), -1).view(-1).long()


def beside(steps=(-2, -1, 0, 1), dtype=torch.float32):
    """A block of 64: 1, and the numbers of a dtype that are so many steps beside each of the fifteen thresholds."""
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    near = torch.cat([(THRESHOLDS.to(dtype).view(kind) + step).view(dtype) for step in steps])
    return torch.cat((torch.ones(1, dtype=dtype), near, torch.zeros(63 - len(near), dtype=dtype)))


def first_wrong(x, got, want):
    """The first element whose code is another: element, code that came, right code."""
    for element, a, b in zip(x.tolist(), got.tolist(), want.tolist(), strict=True):
        if a != b:
            return element, a, b
    return None


def sixteen_bits(quantize, dtype=torch.bfloat16):
    """A block of 16 bits, its codes and the right ones: the first of a hundred in which they differ, or the last."""
    for seed in range(100):
        block = torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        got, want = quantize(block), codes(block)
        if not torch.equal(got, want):
            break
    return block, got, want


def red(rule, got, *want):
    """Says whether what came breaks a rule: it is none of what is allowed."""
    print(rule, "is broken" if got not in want else "is kept", f": got {got}, right is {' or '.join(map(str, want))}")


def red_codes(rule, x, got, want):
    """The same of codes: prints the first element that has a wrong one."""
    found = first_wrong(x, got, want)
    if found is None:
        print(rule, "is kept")
    else:
        red(rule, f"code {found[1]} for {found[0]!r} in a block scaled to 1", f"{found[2]}")
