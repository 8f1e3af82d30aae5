"""What a graph reads of a quantized weight, kept where torch.compile checks it for next to nothing.

Before each call of a compiled model Dynamo makes sure that all that its graph read is as it was. It passes over a module whose
dictionaries have not changed, if what the graph read is in these dictionaries: tensors, numbers, strings, tuples of them, and
plain dictionaries of them. The attributes of a weight are not; to check them took most of the time of all checks (docs: GPU).

So a quantized parameter has a dictionary, which the layer's own dictionary holds too. It is filled when the parameter becomes the
weight of a layer, and emptied when an attribute with the scales is assigned or the parameter is gone. The versions in it say
whether an attribute of the quant state was assigned. A graph that finds nothing here reads the attributes.

One change escapes: `layer._parameters["weight"] = other` while the weight before is still in use elsewhere. So the operator that
gets what is written here makes sure that it is of the parameter it gets (`bnbref.operators`). A CUDA graph, which runs no
operator, does not see `state.offset.data = other`, nor this for another field that `joined_scales` has joined.
"""

from typing import Any

Known = dict[str, Any]
"""arguments: what the operator of the product needs beside activations, codes and bias. version, version2: `QuantState.version`
of the weight's quant state and of its state2."""


class Owner:
    """Owns the dictionary of a parameter, which holds it in a slot. Not the parameter itself is watched, by a weak reference:
    `torch.utils.swap_tensors` refuses a tensor that has one."""

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: Known = {}

    def __del__(self) -> None:
        if hasattr(self, "known"):  # Dynamo makes some without `__init__`, as stand-ins for what it traces
            self.known.clear()


def fill(known: Known, arguments: tuple[Any, ...], *versions: dict[str, bool]) -> None:
    """Writes down what a graph may read of the weight."""
    known["arguments"] = arguments
    # Two dictionaries, also where there is one version or none: Dynamo of torch 2.15 checks before each call that what it has met
    # twice is still one object, and so passes over no layer that has the same one in two places.
    known["version"], known["version2"], *_ = (*versions, {"current": True}, {"current": True})


def arguments_of(known: Known | None) -> tuple[Any, ...] | None:
    """The arguments that were written down; None if there are none, or they are of what was before."""
    if known is None or "arguments" not in known:
        return None
    if not (known["version"]["current"] and known["version2"]["current"]):
        return None
    arguments: tuple[Any, ...] = known["arguments"]
    return arguments
