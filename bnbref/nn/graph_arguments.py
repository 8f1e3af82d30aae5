"""What a graph reads of a quantized weight, kept where torch.compile checks it for next to nothing.

Before each call of a compiled model Dynamo makes sure that all that its graph read is as it was. It passes over a module whose
dictionaries have not changed, if what the graph read is in these dictionaries: tensors, numbers, strings, tuples of them, and
plain dictionaries of them. The attributes of a weight are not; to check them took most of the time of all checks (docs: GPU).

So every quantized parameter has a dictionary, which the layer's own dictionary holds too. It is filled when the parameter becomes
the weight of a layer. It is emptied when the parameter is gone or an attribute with its scales is assigned. An attribute of the
quant state that is assigned is seen by the state's version. A graph that finds nothing here reads the attributes.
"""

import weakref
from typing import Any

from torch import Tensor, nn

Known = dict[str, Any]
"""weight: the `id` of the parameter. version, version2: `QuantState.version` of its state and of that state's state2.
arguments: what the operator of the product needs beside activations, codes and bias."""


def empty(weight: nn.Parameter) -> Known:
    """The dictionary of a new parameter."""
    known: Known = {}
    weakref.finalize(weight, known.clear).atexit = False  # before another parameter can have its id
    return known


def fill(known: Known, weight: nn.Parameter, arguments: tuple[Any, ...], *versions: dict[str, bool]) -> None:
    """Writes down what a graph may read of this weight."""
    known["weight"], known["arguments"] = id(weight), arguments
    known["version"], *rest = versions or [{"current": True}]
    known["version2"] = rest[0] if rest else known["version"]


def arguments_of(known: Known | None, weight: Tensor) -> tuple[Any, ...] | None:
    """The arguments that were written down for this weight; None if there are none, or they are of what was before."""
    if known is None or "arguments" not in known or id(weight) != known["weight"]:
        return None
    if not (known["version"]["current"] and known["version2"]["current"]):
        return None
    arguments: tuple[Any, ...] = known["arguments"]
    return arguments
