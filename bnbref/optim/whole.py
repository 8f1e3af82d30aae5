"""A step by a rule that sees whole matrices: kernels for what is by element, torch for the rest, matrices of one shape together.

    of each parameter       gradient  ->  kernel  ->  what the whole matrix is needed for
    of a batch              [k, rows, columns]  ->  a function of the rule  ->  [k, rows, columns]
    of each parameter                 kernel  ->  parameter and states

What lies on several ranks is gathered for such a function, which each of them runs on the same numbers; states of the whole
matrix are on each. A parameter whose gradient has one element that is not finite stays as it was, with all of its states.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from bnbref.optim.chain import DESCENT, LOOK, WRITE, Part
from bnbref.optim.equation import Chain, Equation
from bnbref.optim.rules import Coefficients, absmax_key, matrix_shape
from bnbref.optim.sharding import Shard, shard_of, total, whole
from bnbref.optim.step import LARGEST_GRADIENT
from bnbref.optim.symbols import Call, Name
from bnbref.optim.update import correction, directions, step
from bnbref.optim.weights import CORRECTION, opened

BATCH = 2**24
"""Elements of the parameters that are stepped together, unless a single one has more: 64 MiB for each of some matrices."""


@dataclass
class Job:
    """A parameter to be stepped.

    p: as the optimizer has it. flat: this rank's part of it, contiguous. g: that of the gradient. state: its states, as
    `update.new_state` made them. blocksize, noise, shard: as `update.step` takes them.
    """

    p: Tensor
    flat: Tensor
    g: Tensor
    state: Mapping[str, Any]
    blocksize: int
    noise: Tensor | None
    shard: Shard | None

    def begin(self, finite: Tensor) -> None:
        """Forget what was computed. finite: whether all of the gradient is."""
        self._finite = finite
        rest = [x.to(self.flat.device) for x in correction(self.state)]
        value = opened(self.flat.view(-1), rest).view(self.flat.shape) if rest else self.flat
        self._parts: dict[str, Tensor] = {"p": value, "g": self.g}
        self._wholes: dict[str, Tensor] = {}

    def part(self, name: str) -> Tensor:
        """This rank's part of a matrix."""
        if name not in self._parts:
            x, shape = self._wholes[name], matrix_shape(self.p.shape)
            if x.shape != shape:
                raise ValueError(
                    f"{name}, which a part by element reads, must have the parameter's shape {shape}, got {tuple(x.shape)}"
                )
            flat = x.float().reshape(-1)
            own = flat if self.shard is None else flat[self.shard.start : self.shard.stop]
            self._parts[name] = own.view(self.flat.shape)
        return self._parts[name]

    def matrix(self, name: str) -> Tensor:
        """The whole of it, float32 `[..., rows, columns]`."""
        if name in self._wholes:
            return self._wholes[name]
        x = whole(self.p, self._parts[name].float()).reshape(matrix_shape(self.p.shape))
        return torch.where(self._finite, x, 0.0) if name == "g" else x

    def keep(self, name: str, x: Tensor) -> None:
        """Keep a result of a step of the whole matrix."""
        self._wholes[name] = x

    def run(self, part: Part, equation: Equation, hyper: Tensor, state: Mapping[str, Any]) -> None:
        """A kernel. A gradient of NaN makes it leave everything as it was."""
        g = torch.where(self._finite, self.part(part.g), torch.nan)
        if part.kind == DESCENT:
            step(equation, hyper, self.flat, g, state, blocksize=self.blocksize, noise=self.noise, shard=self.shard)
            return
        p = self.part(part.p).float() if part.p else torch.zeros_like(g, dtype=torch.float32)
        if part.kind == LOOK:
            found = directions(equation, hyper, p, g, state, blocksize=self.blocksize, shard=self.shard)
        else:
            found = p.clone() if part.p else p
            step(equation, hyper, found, g, state, blocksize=self.blocksize, shard=self.shard)
        if part.out:
            self._parts[part.out] = found.view(self.flat.shape)

    def remember(self, key: str, name: str) -> None:
        """Let a state of the whole matrix be what was computed."""
        old, new = self.state[key], self._wholes[name]
        if new.shape != old.shape:
            raise ValueError(f"a new {key} must have the shape {tuple(old.shape)}, got {tuple(new.shape)}")
        old.copy_(torch.where(self._finite, new, old.to(new.device)))


Stream = Callable[[Sequence[tuple[torch.device, Mapping[str, Any]]]], Iterable[Mapping[str, Any]]]


def alike(p: Tensor) -> tuple[Any, ...]:
    """What parameters have in common that are stepped together."""
    shard = shard_of(p)
    return p.shape, p.dtype, p.device, None if shard is None else shard.group


def batches(jobs: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Parameters that are alike, and what belongs to each, as many at a time as `BATCH` allows."""
    size = max(1, BATCH // max(1, jobs[0][0].numel()))
    return (jobs[first : first + size] for first in range(0, len(jobs), size))


def step_together(chain: Chain, hyper: Tensor, jobs: Sequence[Job], stream: Stream) -> None:
    """One step in place of parameters that are `alike`.  *Bounded* by what the rule says of its steps of the whole matrix.

    chain, hyper: as `equation.at_step` gives them. stream: brings states to their device, as `Placement.stream` does.
    """
    bad = torch.stack([~(job.g.abs() <= LARGEST_GRADIENT).all() for job in jobs])
    for job, finite in zip(jobs, total(jobs[0].shard, bad.to(torch.int32)) == 0, strict=True):
        job.begin(finite)
    direction = torch.cat(
        [hyper, hyper.new_tensor([-1.0, -0.0])]
    )  # p = -0.0 p + direction: with p = 0, to the sign of a zero
    for part in chain.parts:
        if isinstance(part, Call):
            _call(chain, hyper, part, jobs)
            continue
        how, equation = part
        keys = [key for s in equation.states for key in (s.key, absmax_key(s.key))]
        keys += [CORRECTION] if how.kind == DESCENT else []
        own = [(job.p.device, {key: job.state[key] for key in keys if key in job.state}) for job in jobs]
        for job, state in zip(jobs, stream(own), strict=True):
            job.run(how, equation, direction if how.kind == WRITE else hyper, state)
    for key, name in chain.memory.items():
        for job in jobs if name.startswith("w") else ():
            job.remember(key, name)


@_disable_dynamo  # the same operators of torch, whoever compiles the step
def _call(chain: Chain, hyper: Tensor, call: Call, jobs: Sequence[Job]) -> None:
    c = Coefficients(chain.names, hyper)

    def argument(x: Any) -> Any:
        if not isinstance(x, Name):
            return x
        if x.startswith("c."):
            return getattr(c, x[2:])
        if x.startswith("s"):
            key = chain.states[int(x[1:])].key
            found = [job.state[key].to(job.p.device) for job in jobs]
        else:
            found = [job.matrix(x) for job in jobs]
        return torch.stack(found) if len(found) > 1 else found[0][None]

    results = call.step(*map(argument, call.args))
    results = (results,) if len(call.results) == 1 and isinstance(results, Tensor) else results
    name = getattr(call.step, "__name__", repr(call.step))
    if not isinstance(results, (tuple, list)) or len(results) != len(call.results):
        raise ValueError(f"{name} of {chain!r} must return {len(call.results)} results, got {results!r}")
    for result, x in zip(call.results, results, strict=True):
        if not isinstance(x, Tensor) or x.shape[:1] != (len(jobs),):
            got = tuple(x.shape) if isinstance(x, Tensor) else repr(x)
            raise ValueError(f"{name} of {chain!r} must return tensors of a stack of {len(jobs)} matrices, got {got}")
        for job, own in zip(jobs, x.unbind(), strict=True):
            job.keep(result, own)
