"""A step of a parameter of any shape, in one piece or a shard, and the state that it keeps.

The walk goes one way: a parameter and its state are laid out in parts, a kernel steps each part, and what was a copy is
written back.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbref.blockwise import block_count, check_blocksize
from bnbref.optim.cuts import Cut, complete
from bnbref.optim.equation import Equation
from bnbref.optim.master_weights import corrections, value_of
from bnbref.optim.parts import Coded, Part, padded, sliced, split, zeros_of
from bnbref.optim.rule import Rule, absmax_key
from bnbref.optim.sharding import Shard, sum_over_shards
from bnbref.optim.step import direction_blocks, direction_elements, step_blocks, step_elements


def new_state(
    rule: Rule, shape: torch.Size, bits: int, blocksize: int, empty: Callable[..., Tensor], shard: Shard | None = None,
    whole: torch.Size | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """A state that begins at zero, under the keys of bitsandbytes: `state1` and, in 8 bits, `absmax1`.

    bits: 32 or 8. empty: gives the memory of a tensor, called with its key, shape and dtype. shard: where the part lies that
    has this shape, of a parameter that is spread over ranks, and whole: the shape of all of it.

    >>> from bnbref.optim.rules import Adam
    >>> state = new_state(Adam(), torch.Size([300]), 8, 256, lambda key, shape, dtype: torch.empty(shape, dtype=dtype))
    >>> {key: (tuple(x.shape), x.dtype) for key, x in state.items()}
    {'state1': ((300,), torch.uint8), 'absmax1': ((2,), torch.float32),
     'state2': ((300,), torch.uint8), 'absmax2': ((2,), torch.float32)}
    """
    out: dict[str, Tensor] = {}
    for state in rule.states:
        key = state.key
        if state.of != "elements":
            out[key] = empty(key, state.shape(shape if whole is None else whole), torch.float32).zero_()
        elif bits == 32:
            out[key] = empty(key, tuple(shape), torch.float32).zero_()
        else:
            out[key] = empty(key, tuple(shape), torch.uint8).fill_(rule.codebook(state).code_of_zero)
            blocks = block_count(shape.numel(), blocksize) if shard is None else len(shard.blocks(blocksize))
            out[absmax_key(key)] = empty(absmax_key(key), (blocks,), torch.float32).zero_()
    return out


_JOINED = {"cuda": 2**18}
"""By device, the most elements of a part that waits for others whole, also if its blocks are complete: one call of the kernel
steps all of them, in a copy. By its bandwidth an H100 copies and steps so many in 10 us, and the Python of a call takes 100
there. Not tuned. A CPU has none: a tensor of 32,768 elements took 964 us instead of 405."""


def _in_8_bits(rule: Rule, state: Mapping[str, Any]) -> bool:
    return any(state[s.key].dtype == torch.uint8 for s in rule.states)


def _part(rule: Rule, weights: Sequence[Tensor], g: Tensor, noise: Tensor | None, state: Mapping[str, Any]) -> Part:
    """A parameter with 8-bit states as one part: its elements in a row, and the scales of their blocks."""
    states = [Coded(state[s.key].view(-1), state[absmax_key(s.key)].view(-1)) for s in rule.states]
    return Part(tuple(x.view(-1) for x in weights), g.contiguous().view(-1), noise, states)


def _in_float32(rule: Rule, state: Mapping[str, Any]) -> list[Tensor]:
    return [state[s.key].view(-1) for s in rule.states]


def _run(part: Part, rule: Equation, hyper: Tensor) -> None:
    step_blocks(part.p, part.g, hyper, part.noise, *part.flat_states, rule=rule)


def step(
    rule: Equation, hyper: Tensor, p: Tensor, g: Tensor, state: Mapping[str, Any], *, blocksize: int,
    noise: Tensor | None = None, max_norm: float = 0.0, shard: Shard | None = None, tails: "Tails | None" = None,
) -> None:  # fmt: skip
    """One step in place: of contiguous p by g of its shape, and of the state that `new_state` made.  Exact.

    rule, hyper: as `equation.at_step` gives them. blocksize: of 8-bit states. noise: int16 `[numel]`, for stochastic rounding.
    max_norm: for a rule that is `clipped`, the largest ratio of the direction's norm to that of p, 0 for none. The norms are
    float sums, whose last bits depend on device, threads and shards. shard: where p, g and the state lie in a parameter that is
    spread over ranks. tails: where incomplete blocks wait for those of other parameters; the step is over after `tails.run()`.
    With a shard that is a collective call, and so is a step without tails.
    """
    own = corrections(p, state)
    if max_norm > 0:
        value = value_of(p.view(-1), own) if own else p
        u = directions(rule, hyper, value, g, state, blocksize=blocksize, shard=shard)
        hyper = _clipped(rule, hyper, value, u, max_norm, shard)
    if not _in_8_bits(rule, state):
        if p.numel() > 0:
            states = _in_float32(rule, state) + own
            step_elements(p.view(-1), g.contiguous().view(-1), hyper, noise, *states, rule=rule)
        return
    blocksize = check_blocksize(blocksize, p.numel() if shard is None else shard.numel)
    part = everything = _part(rule, [p, *own], g, noise, state)
    if shard is not None:
        part = sliced(part, *shard.whole_blocks(blocksize), shard, blocksize)
    waiting = Tails() if tails is None else tails
    if max_norm == 0 and 0 < part.p.numel() <= _JOINED.get(p.device.type, 0):  # else no other has the same coefficients
        waiting.add(rule, hyper, blocksize, part)
    else:
        whole, rest = split(part, blocksize)
        if whole is not None:
            _run(whole, rule, hyper)
        if rest is not None:
            waiting.add(rule, hyper, blocksize, rest)
    if shard is not None and shard.cut_blocks(blocksize):
        waiting.add_cut(rule, hyper, Cut(everything, shard, blocksize))
    if tails is None:
        waiting.run()


def directions(
    rule: Equation, hyper: Tensor, p: Tensor, g: Tensor, state: Mapping[str, Any], *, blocksize: int,
    shard: Shard | None = None,
) -> Tensor:  # fmt: skip
    """The direction that `step` would take, float32 `[numel]`, 0 where the gradient is not finite.  Exact.

    p: what the parameter and its correction stand for, see `master_weights.value_of`.
    """
    if p.numel() == 0:
        return p.new_empty(0, dtype=torch.float32)
    if not _in_8_bits(rule, state):
        states = _in_float32(rule, state)
        return direction_elements(p.view(-1), g.contiguous().view(-1), hyper, *states, rule=rule)
    blocksize = check_blocksize(blocksize, p.numel() if shard is None else shard.numel)
    everything = _part(rule, [p], g, None, state)
    # At each boundary of whole blocks what lies here is cut in two.
    bounds = (0, p.numel()) if shard is None else (0, *shard.whole_blocks(blocksize), p.numel())
    us = []
    for first, last in itertools.pairwise(bounds):
        if first < last:
            part = everything if shard is None else sliced(everything, first, last, shard, blocksize)
            whole, rest = split(part, blocksize)
            rows = [whole] if whole is not None else []
            rows += [padded([rest], zeros_of(rule), blocksize)[0]] if rest is not None else []
            u = [direction_blocks(x.p, x.g, hyper, *x.flat_states, rule=rule).view(-1) for x in rows]
            us.append(torch.cat(u)[: last - first])
    return torch.cat(us)


def _clipped(rule: Equation, hyper: Tensor, p: Tensor, u: Tensor, max_norm: float, shard: Shard | None) -> Tensor:
    # A parameter that is all zeros could never leave: its step is not clipped.
    norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in (u, p)])
    if shard is not None:
        norms = sum_over_shards(shard, norms * norms).sqrt()
    norm, most = norms[0], max_norm * norms[1]
    ratio = torch.where((norm > most) & (most > 0), most / norm, 1.0)
    scale = torch.ones_like(hyper)
    scale[rule.names.index("rate")] = ratio
    return hyper * scale


class Tails:
    """Incomplete blocks of many parameters, and small parameters: one call of the kernel for all that take the same step.

    They wait for `run`, or until there are so many that their copies would take more than some megabytes. So do blocks that a
    boundary between ranks cuts, the same ones on each rank, which one collective call completes.
    """

    def __init__(self) -> None:
        self.waiting: dict[Any, tuple[Tensor, list[Part]]] = {}
        """What waits and needs nothing of another rank, by what must be the same for one call."""
        self._elements = 0
        self._cuts: list[tuple[Equation, Tensor, Cut]] = []
        self._bytes = 0
        self._after: list[Callable[[], Any]] = []
        self.torn = False
        """Whether an exception came while blocks were written back, so that nobody knows which of them have made the step."""

    def add(self, rule: Equation, hyper: Tensor, blocksize: int, part: Part) -> None:
        """Adds what `split` has left of a parameter, or all of a small one, to those that wait. None of them may have memory in
        common."""
        p, g = part.p, part.g
        dtypes = *(weight.dtype for weight in part.weights), g.dtype
        key = (rule, blocksize, id(hyper), p.device, dtypes, part.noise is None)
        self.waiting.setdefault(key, (hyper, []))[1].append(part)  # it holds hyper, whose id nobody else then has
        self._elements += p.numel()
        if self._elements >= 2**20:
            self.run_own()

    def add_cut(self, rule: Equation, hyper: Tensor, cut: Cut) -> None:
        """Adds the blocks of a parameter that boundaries between ranks cut to those that wait."""
        self._cuts.append((rule, hyper, cut))
        self._bytes += cut.size
        if self._bytes >= 2**24:
            self.run()

    def then(self, run: Callable[[], Any]) -> None:
        """Calls `run` as soon as nothing waits any more."""
        self._after.append(run)

    def run(self) -> None:
        """Makes the steps of all blocks that wait. After an exception, those that were not stepped still wait.

        It is a collective call if parameters are sharded.
        """
        groups: dict[Any, list[tuple[Equation, Tensor, Cut]]] = {}
        for waiting in self._cuts:
            groups.setdefault((waiting[2].shard.group, waiting[2].part.p.device), []).append(waiting)
        written = []
        for cuts in groups.values():
            parts, write_back = complete([cut for *_, cut in cuts])
            written.append(write_back)
            for (rule, hyper, cut), part in zip(cuts, parts, strict=True):
                if part is not None:
                    self.add(rule, hyper, cut.blocksize, part)
        self.run_own()
        self.torn = True
        for write_back in written:
            write_back()
        self._cuts, self._bytes, self.torn = [], 0, False
        self._finish()

    def interrupt(self) -> None:
        """After an exception: `run_own`. Parameters with blocks that still wait are then not whole, see `torn`."""
        self.run_own()
        self.torn |= bool(self._cuts)
        self._finish()

    def _finish(self) -> None:
        while self._after:
            self._after.pop()()

    def run_own(self) -> None:
        """Makes the steps of the blocks that need nothing of another rank."""
        torn = self.torn  # by an exception before, which no step that follows mends
        for key, (hyper, parts) in list(self.waiting.items()):
            rule, blocksize, *_ = key
            if len(parts) == 1:  # of which no copy has to be made
                whole, rest = split(parts[0], blocksize)
                if whole is not None:
                    # It is changed in place: interrupted after that, it must not be stepped again.
                    del self.waiting[key]
                    self.torn = True
                    try:
                        _run(whole, rule, hyper)
                    except RuntimeError:  # such as out of memory, which comes before anything is changed
                        self.waiting[key], self.torn = (hyper, parts), torn
                        raise
                    self.torn = torn
                    if rest is None:
                        continue
                    parts = [rest]
                    self.waiting[key] = hyper, parts
            part, write_back = padded(parts, zeros_of(rule), blocksize)
            _run(part, rule, hyper)
            self.torn = True
            del self.waiting[key]  # before any is changed: `run` again must not step it again
            write_back()
            self.torn = torn
        self._elements = 0
