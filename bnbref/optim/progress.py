"""How far a step has come, and what is said if it is interrupted: out of memory, by a signal."""

import warnings
from collections.abc import Sequence

from torch import Tensor

from bnbref.optim.update import Tails


class Progress:
    """The parameters that have made their step, and those that are making it."""

    def __init__(self) -> None:
        self._made: list[Tensor] = []
        self._begun: list[Tensor] = []

    def begin(self, params: list[Tensor]) -> None:
        """These are changed from now on."""
        self._begun = params

    def end(self) -> None:
        """Those that were begun have made their step."""
        self._made += self._begun
        self._begun = []

    def say_interrupted(self, every: Sequence[Tensor], params: Sequence[Tensor], tails: Tails) -> None:
        """After an exception: finish the parameters before the one that failed, and warn of what is not as a step leaves it.

        every: the parameters by their index in the state dict. params: those that were to make the step. tails: the last blocks
        that are waiting.
        """
        made, partly = self._made, self._begun
        try:
            tails.interrupt()
        except RuntimeError:
            tails.torn = True
        if tails.torn:  # they lack their last blocks, each of which may be of any of them
            made, partly = [], made + partly
        index = {id(p): i for i, p in enumerate(every)}
        done, part = ({index[id(p)] for p in ps} for ps in (made, partly))
        not_yet = [index[id(p)] for p in params if index[id(p)] not in done | part]
        warnings.warn(
            f"a step was interrupted. By their index in the state dict: {sorted(done)} have made it, {not_yet} are as they were, "
            f"and {sorted(part)} may have made a part of it",
            stacklevel=4,
        )
