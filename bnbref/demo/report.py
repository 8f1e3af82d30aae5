"""The results of the demo as an aligned table and as a plot."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


def aligned(widths: Iterable[int], cells: Iterable[str]) -> str:
    """A line of a table: the first cell is a name, the others are numbers.

    >>> aligned((8, 6), ("nf4", "4.5"))
    'nf4         4.5'
    """
    (name, width), *rest = zip(cells, widths, strict=True)
    return f"{name:<{width}}" + "".join(f" {cell:>{width}}" for cell, width in rest)


def one_line(text: str, width: int = 100) -> str:
    """Text with its white space folded, cut at a word.

    >>> one_line("a  b" + chr(10) + "ccc", 5)
    'a b ...'
    """
    words = " ".join(text.split())
    return words if len(words) <= width else words[: width - 1].rpartition(" ")[0] + " ..."


def mebibytes(count: int) -> str:
    """Bytes as a whole number of MiB; a dash where they are not known.

    >>> mebibytes(2**20), mebibytes(0)
    ('1', '-')
    """
    return f"{count / 2**20:.0f}" if count else "-"


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say on the terminal, as long as the block takes, what is being done."""
    with tqdm(total=0, desc=what, bar_format="{desc} ...", leave=False, disable=None):
        yield


def write_plot(file: Path, losses: Sequence[float], title: str) -> None:
    """The loss of each step, and its mean over the last ten."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.7", label="step")
    axes.plot(steps, list(running_mean(losses, 10)), color="C0", label="mean of ten")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def running_mean(values: Sequence[float], length: int) -> Iterable[float]:
    """The mean of each value and those before it, `length` at most.

    >>> list(running_mean([1.0, 2.0, 4.0], 2))
    [1.0, 1.5, 3.0]
    """
    return (statistics.fmean(values[max(0, i - length + 1) : i + 1]) for i in range(len(values)))
