"""Layers whose weight is read by another module of the model. It would find packed codes instead of a matrix.

    time_step = self.dt_proj.weight @ time_step                        Mamba's mixer
    F.multi_head_attention_forward(..., self.out_proj.weight, ...)     WavLM's attention
    self.head(x.to(self.head.weight.dtype))                            a cast to the dtype of codes

They are found in the source of the classes. `weight.device` does not count, because it says nothing about the elements.
"""

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_READ = re.compile(r"\bself\.([\w.]+)\.weight\b(?!\.device\b)")


def read_by_others(model: nn.Module) -> dict[str, str]:
    """The paths of modules whose weight a class around them reads, and the name of that class.

    >>> class Mixer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.dt_proj, self.out_proj = nn.Linear(4, 8), nn.Linear(8, 4)
    >>> read_by_others(nn.Sequential(Mixer()))  # no method reads one
    {}
    """
    found = {}
    for path, module in model.named_modules():
        cls: Any = type(module)
        for name in _reads(cls):
            found[f"{path}.{name}" if path else name] = cls.__name__
    return found


@functools.cache
def _reads(cls: Any) -> frozenset[str]:
    return frozenset(name for source in _methods(cls) for name in _READ.findall(source))


def _methods(cls: type[nn.Module]) -> Iterator[str]:
    """The source of the methods that a class runs after it is made, its bases' included, torch's own left out."""
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if not (method.__module__ or "").startswith("torch.") and not re.search("init|reset", name):
            try:
                yield inspect.getsource(inspect.unwrap(method))
            except (OSError, TypeError):  # made at run time
                continue
