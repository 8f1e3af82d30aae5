"""One step of any rule, and the state it keeps: float32, or 8-bit blockwise codes (Dettmers et al., 2110.02861).

    elements, state in float32             blocks, state in 8 bits
    -----------------------------------    -----------------------------------------------------
                                           state  = values[code] * absmax
    direction, new = rule(p, g, state)     direction, new = rule(p, g, state)
    p = decay * p - rate * direction       p      = decay * p - rate * direction
                                           absmax = max |new| of the block
                                           code   = number of thresholds below new * (1 / absmax)

Each is one kernel per (rule, dtype), which writes into the parameter and its state. An element whose gradient is
NaN, infinite or beyond 2^63 stays as it was, parameter and state; so does its code, unless its block's absmax grows.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from bnbref.blockwise import block_count, check_blocksize, encode, magnitude, reciprocal
from bnbref.codebooks import value_table
from bnbref.kernels import fused
from bnbref.optim.rules import Coefficients, Rule
from bnbref.optim.sharding import Shard, complete, total

# ---- arithmetic -----------------------------------------------------------------------------------------------------


# The square of a larger one is no float32. (To look at the new state instead makes Inductor write it to memory: 4 times
# the time of Adam in 8 bits.)
_LARGEST_GRADIENT = 2.0**63


def _advance(
    rule: Rule, names: tuple[str, ...], p: Tensor, g: Tensor, states: Sequence[Tensor], hyper: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`(finite, new p, direction, new states)` in float32; where not finite the old p and states, and 0."""
    p, g = p.float(), g.float()
    c = Coefficients(names, hyper)
    direction, *new = rule.direction(p, g, *states, c)
    finite = g.abs() <= _LARGEST_GRADIENT
    kept = [torch.where(finite, now, before) for now, before in zip(new, states, strict=True)]
    return finite, torch.where(finite, c.decay * p - c.rate * direction, p), torch.where(finite, direction, 0.0), kept


def _rounded(x: Tensor, dtype: torch.dtype, noise: Tensor | None) -> Tensor:
    """To nearest; with 16 random bits to bfloat16 up or down, with the probability that makes the mean x."""
    if noise is None:
        return x.to(dtype)
    bits = (x.view(torch.int32) + (noise.to(torch.int32) & 0xFFFF)) & -0x10000
    return torch.where(x.abs() < torch.inf, bits.view(torch.float32), x).to(dtype)


# ---- kernels --------------------------------------------------------------------------------------------------------


@fused(dynamic={"p": (0,), "g": (0,), "noise": (0,), "states": (0,)}, writes=("p", "states"))
def step_elements(
    p: Tensor, g: Tensor, hyper: Tensor, noise: Tensor | None, *states: Tensor, rule: Rule, names: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """New p, and float32 states, all `[n]`; hyper: the float32 coefficients called `names`; noise: int16 or None.  Exact."""
    _, p_new, _, new = _advance(rule, names, p, g, states, hyper)
    return (_rounded(p_new, p.dtype, noise), *new)


@fused(dynamic={"p": (0,), "g": (0,), "states": (0,)})
def direction_elements(
    p: Tensor, g: Tensor, hyper: Tensor, *states: Tensor, rule: Rule, names: tuple[str, ...]
) -> Tensor:
    """The direction that `step_elements` would take, float32 `[n]`.  Exact."""
    return _advance(rule, names, p, g, states, hyper)[2]


_BY_ROWS = {"p": (0,), "g": (0,), "noise": (0,), "states": (0,)}


@fused(dynamic=_BY_ROWS, writes=("p", "states"))
def step_blocks(
    p: Tensor, g: Tensor, hyper: Tensor, noise: Tensor | None, *states: Tensor, rule: Rule, names: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """New p `[blocks, blocksize]`, then of each state uint8 codes `[blocks, blocksize]` and float32 absmax `[blocks]`.  Exact."""
    values = [value_table(rule.codebook(state), p.device) for state in rule.states]
    results = advance_blocks(p, g, hyper, noise, states, rule, names, lambda i, codes: values[i][codes.to(torch.int32)])
    codes = [encode(x, rule.codebook(state)) for x, state in zip(results.scaled, rule.states, strict=True)]
    return results.p, *itertools.chain.from_iterable(zip(codes, results.absmax, strict=True))


class Advanced(NamedTuple):
    """A step of blocks before its states are encoded: the new p, and of each state the scaled elements and the scales."""

    p: Tensor
    scaled: list[Tensor]
    absmax: list[Tensor]


def advance_blocks(
    p: Tensor,
    g: Tensor,
    hyper: Tensor,
    noise: Tensor | None,
    states: Sequence[Tensor],
    rule: Rule,
    names: tuple[str, ...],
    values: Callable[[int, Tensor], Tensor],
) -> Advanced:
    """A step of states that are decoded by `values(number of the state, codes)`."""
    scales = states[1::2]
    finite, p_new, _, new = _advance(rule, names, p, g, decode_states(states, values), hyper)
    out = Advanced(_rounded(p_new, p.dtype, noise), [], [])
    for x, before in zip(new, scales, strict=True):
        # An element that stays holds its block's absmax where it was, lest it move by the rounding of another scale.
        absmax = torch.where(finite, magnitude(x), rearrange(before, "b -> b 1")).amax(-1)
        out.absmax.append(absmax)
        out.scaled.append(x * rearrange(reciprocal(absmax), "b -> b 1"))
    return out


def decode_states(states: Sequence[Tensor], values: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """The states in float32, of codes and scales in turns."""
    pairs = enumerate(zip(states[::2], states[1::2], strict=True))
    return [values(i, codes) * rearrange(absmax, "b -> b 1") for i, (codes, absmax) in pairs]


@fused(dynamic={"p": (0,), "g": (0,), "states": (0,)})
def direction_blocks(
    p: Tensor, g: Tensor, hyper: Tensor, *states: Tensor, rule: Rule, names: tuple[str, ...]
) -> Tensor:
    """The direction that `step_blocks` would take, float32 `[blocks, blocksize]`.  Exact."""
    values = [value_table(rule.codebook(state), p.device) for state in rule.states]
    return direction_of_blocks(p, g, hyper, states, rule, names, lambda i, codes: values[i][codes.to(torch.int32)])


def direction_of_blocks(
    p: Tensor,
    g: Tensor,
    hyper: Tensor,
    states: Sequence[Tensor],
    rule: Rule,
    names: tuple[str, ...],
    values: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The direction with states that are decoded by `values(number of the state, codes)`."""
    return _advance(rule, names, p, g, decode_states(states, values), hyper)[2]


# ---- tensors of any shape -------------------------------------------------------------------------------------------


def new_state(
    rule: Rule,
    shape: torch.Size,
    bits: int,
    blocksize: int,
    empty: Callable[..., Tensor],
    shard: Shard | None = None,
) -> dict[str, Tensor]:
    """All states zero, under the keys of bitsandbytes: `state1` and, of 8 bits, `absmax1`.

    bits: 32 or 8. `empty(key, shape, dtype)` gives the memory. shard: of what the shape is a part.

    >>> from bnbref.optim.rules import Adam
    >>> state = new_state(Adam(), torch.Size([300]), 8, 256, lambda key, shape, dtype: torch.empty(shape, dtype=dtype))
    >>> {key: (tuple(x.shape), x.dtype) for key, x in state.items()}
    {'state1': ((300,), torch.uint8), 'absmax1': ((2,), torch.float32),
     'state2': ((300,), torch.uint8), 'absmax2': ((2,), torch.float32)}
    """
    out: dict[str, Tensor] = {}
    for state in rule.states:
        key = state.key
        if bits == 32:
            out[key] = empty(key, tuple(shape), torch.float32).zero_()
        else:
            out[key] = empty(key, tuple(shape), torch.uint8).fill_(rule.codebook(state).code_of_zero)
            blocks = block_count(shape.numel(), blocksize) if shard is None else len(shard.blocks(blocksize))
            out[absmax_key(key)] = empty(absmax_key(key), (blocks,), torch.float32).zero_()
    return out


def absmax_key(key: str) -> str:
    """Where the scales of a state are: `absmax1` for `state1`."""
    return key.replace("state", "absmax")


def _in_8_bits(rule: Rule, state: Mapping[str, Any]) -> bool:
    return any(state[s.key].dtype == torch.uint8 for s in rule.states)


def _codes_of_zero(rule: Rule) -> list[int]:
    return [rule.codebook(s).code_of_zero for s in rule.states]


def _flat(rule: Rule, state: Mapping[str, Any], eight: bool) -> list[Tensor]:
    """The kernel's `states`: of each one all elements in a row and, of 8 bits, its scales."""
    names = [name for s in rule.states for name in ((s.key, absmax_key(s.key)) if eight else (s.key,))]
    return [state[name].view(-1) for name in names]


def step(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Any],
    coefficients: Mapping[str, float],
    hyper: Tensor,
    *,
    blocksize: int,
    noise: Tensor | None = None,
    max_norm: float = 0.0,
    shard: Shard | None = None,
    tails: "Tails | None" = None,
) -> None:
    """One step in place: of contiguous p by g of its shape, and of the state that `new_state` made.  Exact.

    hyper: the values of `coefficients` as a float32 tensor. max_norm: for a rule that is `clipped`, the largest ratio of the
    direction's norm to that of p, 0 for none; the norms are float sums, and their last bits depend on device, threads and
    shards. shard: of what p, g and the state are a part; then it is a collective call. tails: where the last block waits for
    those of other parameters, if it is incomplete; the step is over after `tails.run()`.
    """
    names = tuple(coefficients)
    if max_norm > 0:
        u = directions(rule, p, g, state, coefficients, hyper, blocksize=blocksize, shard=shard)
        hyper = _clipped(hyper, names, p, u, max_norm, shard)
    eight = _in_8_bits(rule, state)
    flat: list[Any] = [p.view(-1), g.reshape(-1), noise, *_flat(rule, state, eight)]
    if not eight:
        if p.numel() > 0:
            step_elements(flat[0], flat[1], hyper, *flat[2:], rule=rule, names=names)
        return
    blocksize = check_blocksize(blocksize, p.numel() if shard is None else shard.numel)
    if tails is None or shard is not None:
        for part, write_back in _parts(flat, _codes_of_zero(rule), blocksize, shard):
            _call(part, rule, names, hyper)
            write_back()
        return
    whole, rest = _split(flat, blocksize)
    if whole is not None:
        _call(whole, rule, names, hyper)
    if rest is not None:
        tails.add(rule, names, hyper, blocksize, rest)


def _call(part: list[Any], rule: Rule, names: tuple[str, ...], hyper: Tensor) -> None:
    p, g, noise, *states = part
    step_blocks(p, g, hyper, noise, *states, rule=rule, names=names)


def directions(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Any],
    coefficients: Mapping[str, float],
    hyper: Tensor,
    *,
    blocksize: int,
    shard: Shard | None = None,
) -> Tensor:
    """The direction of `step`, float32 `[numel]`, 0 where the gradient is not finite; nothing is changed.  Exact."""
    names = tuple(coefficients)
    eight = _in_8_bits(rule, state)
    flat: list[Any] = [p.view(-1), g.reshape(-1), None, *_flat(rule, state, eight)]
    if p.numel() == 0:
        return p.new_empty(0, dtype=torch.float32)
    if not eight:
        return direction_elements(flat[0], flat[1], hyper, *flat[3:], rule=rule, names=names)
    blocksize = check_blocksize(blocksize, p.numel() if shard is None else shard.numel)
    us = []
    for piece in _pieces(flat, blocksize, shard):
        parts = _in_blocks(piece, _codes_of_zero(rule), blocksize)
        u = [direction_blocks(*part[:2], hyper, *part[3:], rule=rule, names=names) for part, _ in parts]
        us.append(torch.cat([x.view(-1) for x in u])[: piece[0].numel()])
    return torch.cat(us)


def _clipped(
    hyper: Tensor, names: tuple[str, ...], p: Tensor, u: Tensor, max_norm: float, shard: Shard | None
) -> Tensor:
    # A parameter that is all zeros could never leave: its step is not clipped.
    norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in (u, p)])
    if shard is not None:
        norms = total(shard, norms * norms).sqrt()
    norm, most = norms[0], max_norm * norms[1]
    ratio = torch.where((norm > most) & (most > 0), most / norm, 1.0)
    scale = torch.ones_like(hyper)
    scale[names.index("rate")] = ratio
    return hyper * scale


Part = tuple[list[Any], Callable[[], None]]


def _parts(flat: list[Any], zeros: Sequence[int], blocksize: int, shard: Shard | None) -> Iterator[Part]:
    """What the kernel is called with, and what writes it back: all blocks, those that a boundary cuts completed."""
    if shard is None:
        yield from _in_blocks(flat, zeros, blocksize)
        return
    yield from _in_blocks(_sliced(flat, *shard.whole(blocksize), shard, blocksize), zeros, blocksize)
    if not shard.cut(blocksize):
        return
    codes = flat[3::2]
    p, g, *completed = complete(shard, blocksize, [flat[0], flat[1], *codes], [0, 0, *zeros])
    places = [(row, block, *shard.part(block, blocksize)) for row, block in enumerate(shard.cut(blocksize))]
    own = [(row, block, here, place) for row, block, here, place in places if here.start < here.stop]
    if not own:
        return
    own = own if len(own) > 1 else own * 2  # two rows at least: Dynamo specialises one
    first, picked = shard.blocks(blocksize).start, [row for row, *_ in own]
    scales = [torch.stack([x[block - first] for _, block, *_ in own]) for x in flat[4::2]]
    noise: Any = None if flat[2] is None else torch.zeros(len(own), blocksize, dtype=torch.int16, device=flat[2].device)
    if noise is not None:
        for i, (_, _, here, place) in enumerate(own):
            noise[i, place] = flat[2][here]
    part = [
        p[picked],
        g[picked],
        noise,
        *(x for pair in zip((c[picked] for c in completed), scales, strict=True) for x in pair),
    ]

    def write_back() -> None:
        for i, (_, block, here, place) in enumerate(own):
            for target, rows in zip([flat[0], *codes], [part[0], *part[3::2]], strict=True):
                target[here] = rows[i, place]
            for target, rows in zip(flat[4::2], part[4::2], strict=True):
                target[block - first] = rows[i]

    yield part, write_back


def _sliced(flat: list[Any], first: int, last: int, shard: Shard, blocksize: int) -> list[Any]:
    """Elements `first` to `last` of what a shard has, and the scales of their blocks."""
    before = shard.blocks(blocksize).start
    blocks = slice((shard.start + first) // blocksize - before, block_count(shard.start + last, blocksize) - before)
    scales = [False] * 3 + [False, True] * ((len(flat) - 3) // 2)
    return [x if x is None else x[blocks if b else slice(first, last)] for x, b in zip(flat, scales, strict=True)]


def _pieces(flat: list[Any], blocksize: int, shard: Shard | None) -> list[list[Any]]:
    """What lies here, at each boundary of whole blocks cut in two."""
    if shard is None:
        return [flat]
    bounds = (0, *shard.whole(blocksize), flat[0].numel())
    return [_sliced(flat, a, b, shard, blocksize) for a, b in itertools.pairwise(bounds) if a < b]


def _in_blocks(flat: list[Any], zeros: Sequence[int], blocksize: int) -> Iterator[Part]:
    """The whole blocks as they lie in memory; then the rest, a padded copy with the function that writes it back."""
    whole, rest = _split(flat, blocksize)
    if whole is not None:
        yield whole, lambda: None
    if rest is not None:
        yield _padded([rest], zeros, blocksize)


def _split(flat: list[Any], blocksize: int) -> tuple[list[Any] | None, list[Any] | None]:
    """Whole blocks in rows, at least two of them, which Dynamo does not specialise; and the rest."""
    n = flat[0].numel()
    whole = n // blocksize if n >= 2 * blocksize else 0
    size = whole * blocksize
    rows = rest = None
    if whole:
        rows = [
            x if x is None else x[:whole] if i > 2 and i % 2 == 0 else x[:size].view(whole, blocksize)
            for i, x in enumerate(flat)
        ]
    if size < n:
        rest = [x if x is None else x[whole if i > 2 and i % 2 == 0 else size :] for i, x in enumerate(flat)]
    return rows, rest


def _padded(rests: list[list[Any]], zeros: Sequence[int], blocksize: int) -> Part:
    """What is left of several tensors, each padded to whole blocks, in the rows of one."""
    sizes = [rest[0].numel() for rest in rests]
    gaps = [-size % blocksize for size in sizes]
    if sum(sizes) + sum(gaps) < 2 * blocksize:  # a row, of one tensor: Dynamo would specialise it
        gaps[-1] += blocksize
    extra = int(gaps[-1] >= blocksize)
    fill = [0, 0, 0, *(value for zero in zeros for value in (zero, 0))]
    part: list[Any] = []
    for i, (first, value) in enumerate(zip(rests[0], fill, strict=True)):
        if first is None:
            part.append(None)
        elif i > 2 and i % 2 == 0:
            part.append(torch.cat([*(rest[i] for rest in rests), first.new_zeros(extra)]))
        else:
            padding = first.new_full((max(gaps),), value)
            pieces = [x for rest, gap in zip(rests, gaps, strict=True) for x in (rest[i], padding[:gap])]
            part.append(torch.cat(pieces).view(-1, blocksize))
    bounds = [n for pair in zip(sizes, gaps, strict=True) for n in pair]

    def write_back() -> None:
        targets, sources = [], []
        for i, x in enumerate(part):
            if i in (1, 2):  # gradient and noise
                continue
            targets += [rest[i] for rest in rests]
            if i > 2 and i % 2 == 0:
                sources += x.split([*(len(rest[i]) for rest in rests), extra])[:-1]
            else:
                sources += x.view(-1).split(bounds)[::2]
        torch._foreach_copy_(targets, sources)

    return part, write_back


class Tails:
    """Incomplete last blocks of many parameters: one call of the kernel for all that take the same step.

    They wait for `run`, or until there are so many that their copies would take more than some megabytes.
    """

    def __init__(self) -> None:
        self._waiting: dict[Any, tuple[Tensor, list[list[Any]]]] = {}
        self._elements = 0

    def add(self, rule: Rule, names: tuple[str, ...], hyper: Tensor, blocksize: int, rest: list[Any]) -> None:
        """What `_split` left of a parameter, its gradient, noise and states."""
        p, g, noise = rest[:3]
        key = (rule, names, blocksize, id(hyper), p.device, p.dtype, g.dtype, noise is None)
        self._waiting.setdefault(key, (hyper, []))[1].append(rest)  # it holds hyper, whose id nobody else then has
        self._elements += p.numel()
        if self._elements >= 2**20:
            self.run()

    def run(self) -> None:
        """Step all that wait."""
        for (rule, names, blocksize, *_), (hyper, rests) in self._waiting.items():
            part, write_back = _padded(rests, _codes_of_zero(rule), blocksize)
            _call(part, rule, names, hyper)
            write_back()
        self._waiting.clear()
        self._elements = 0
