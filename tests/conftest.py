"""What the tests share: hypothesis' profile, the two modes, and floats that are compared and printed bit for bit."""

import contextlib
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor
from tqdm import tqdm

import bnbref
from bnbref import as_bitsandbytes, few_rows
from bnbref.codebooks import FOUR_BIT
from bnbref.kernels import compiler, counting, decoding, encoding, floats, steps
from bnbref.kernels.compiler import missing_compiler

# No deadline: the first example of a kernel compiles it. `mode` does not change from one example to the next.
settings.register_profile(
    "here",
    deadline=None,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("ci", parent=settings.get_profile("here"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")


# A format that was added to the package is judged by its values alone; that the thresholds follow from them is a test of its own.
if (
    importlib.util.find_spec("numpy") is not None
):  # without it (tests/matrix.py) nothing is judged by a second implementation
    import second

    for _name, _book in FOUR_BIT.items():
        second.add_four_bit(_name, _book.values)

collect_ignore = ["codegen"]  # programs, for processes of their own


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and pytest -m cuda")


# What the extra `test` brings besides the tools: elsewhere (tests/matrix.py) a file that imports one is skipped.
EXTRAS = ("accelerate", "jsonschema", "numpy", "peft", "safetensors", "transformers")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Names the package of an extra that a file misses."""
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing and missing[1] in EXTRAS:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report


# ---- products as the writer of the fixtures computes them -----------------------------------------------------------


@pytest.fixture(scope="session")
def as_written() -> None:
    """Skips where products and attention in bfloat16, enough of them to show an order of sums, have another digest."""
    n = torch.arange(64 * 32 * 128)
    x = (((n * n * 31 + n * 17) % 8191 - 4095) / 512).bfloat16().view(64, 32, 128)
    weight, heads = x[:8].reshape(256, 128), x[:4].view(2, 4, 16, 4, 32).transpose(2, 3).reshape(8, 4, 16, 32)
    results = [F.linear(rows, weight) for rows in x]
    results.append(F.scaled_dot_product_attention(heads / 8, heads / 8, heads, is_causal=True))
    data = b"".join(bytes(r.contiguous().view(torch.uint8).flatten().tolist()) for r in results)
    if not hashlib.sha256(data).hexdigest().startswith("711cb33205f08e67"):
        pytest.skip("bfloat16 products or attention have other bits here than where the fixtures were written")


# ---- theorems -------------------------------------------------------------------------------------------------------


class Theorem(NamedTuple):
    """What was proven, on how many inputs, in how many seconds."""

    name: str
    inputs: int
    seconds: float


class Theorems:
    """What a run of the tests has proven by trying all inputs: the table at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.proven: list[Theorem] = []
        self.tables: list[tuple[str, list[str]]] = []
        self._capture = config.pluginmanager.getplugin("capturemanager")

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator["tqdm[Any]"]:
        """A progress bar that pytest does not swallow."""
        with (
            self._capture.global_and_fixture_disabled(),
            tqdm(total=total, desc=name, leave=False, mininterval=1) as bar,
        ):
            yield bar

    def record(self, name: str, inputs: int, seconds: float) -> None:
        self.proven.append(Theorem(name, inputs, seconds))

    def say(self, title: str, lines: list[str]) -> None:
        """A table of its own."""
        self.tables.append((title, lines))


_THEOREMS = pytest.StashKey[Theorems]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_THEOREMS] = Theorems(config)
    # transformers loads quantized models to a GPU if there is one, and tests that are not of a GPU give them tensors of the CPU.
    if not re.search(r"(?<!not )cuda", config.option.markexpr) and "BNBREF_BACKEND" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch asks for the first time


@pytest.fixture
def theorems(request: pytest.FixtureRequest) -> Theorems:
    """Where a proof by exhaustion says what it has proven."""
    return request.config.stash[_THEOREMS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for title, lines in config.stash[_THEOREMS].tables:
        terminalreporter.section(title)
        terminalreporter.write("\n".join([*lines, ""]))
    proven = config.stash[_THEOREMS].proven
    if not proven:
        return
    terminalreporter.section("proven")
    terminalreporter.write_line(f"{'theorem':<62} {'inputs':>15} {'seconds':>8}")
    for name, inputs, seconds in proven:
        terminalreporter.write_line(f"{name:<62} {inputs:>15,} {seconds:>8.1f}")
    terminalreporter.write_line(
        f"{'all':<62} {sum(t.inputs for t in proven):>15,} {sum(t.seconds for t in proven):>8.1f}"
    )


# ---- formulations for GPUs ------------------------------------------------------------------------------------------


def _yes(x: Tensor) -> bool:
    return True  # a function, because Dynamo traces no mock


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, formulations take their way for GPUs, whatever the device of their tensors."""
    with contextlib.ExitStack() as stack:
        for module in (compiler, counting, decoding, encoding, few_rows, floats, steps):
            stack.enter_context(mock.patch.object(module, "is_gpu", _yes))
        yield


# ---- modes ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(mode: str) -> Iterator[None]:
    """Inside, kernels run "compiled" or "eager"; the test is skipped where they cannot be compiled."""
    if mode == "compiled" and missing_compiler("cpu") is not None:
        pytest.skip(str(missing_compiler("cpu")))
    with bnbref.eager() if mode == "eager" else contextlib.nullcontext():
        yield


@pytest.fixture(params=["eager", "compiled"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs twice: kernels uncompiled, and compiled."""
    with running(request.param):
        yield request.param


@pytest.fixture
def eager() -> Iterator[None]:
    """Kernels run uncompiled: where compiling would show nothing that the proofs do not."""
    with bnbref.eager():
        yield


def skip_beside_bitsandbytes() -> None:
    """For tests of the alias. It must come before the first import of bitsandbytes, which peft imports where it is installed."""
    if "bitsandbytes" in sys.modules:
        pytest.skip("bitsandbytes itself is imported")


@pytest.fixture
def bitsandbytes() -> Iterator[Any]:
    """The module of this name, which is bnbref."""
    skip_beside_bitsandbytes()
    with as_bitsandbytes(force=True):
        import bitsandbytes

        yield bitsandbytes


# ---- bits -----------------------------------------------------------------------------------------------------------

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words(x: Tensor) -> Tensor:
    """The bits of each element as an integer of its width."""
    return x.detach().cpu().contiguous().view(_WORDS[x.element_size()]) if x.dtype != torch.bool else x.cpu()


def hexes(x: Tensor, most: int = 4096) -> str:
    """The bits of a tensor as hexadecimal words; `bits` makes the tensor again."""
    digits = 2 * x.element_size()
    flat = words(x).flatten()[:most].tolist()
    return " ".join(f"{int(word) & (16**digits - 1):0{digits}x}" for word in flat) + " ..." * (x.numel() > most)


def bits(dtype: torch.dtype, shape: tuple[int, ...], text: str) -> Tensor:
    """The tensor that `hexes` printed."""
    size = dtype.itemsize
    data = b"".join(int(word, 16).to_bytes(size, "little") for word in text.split())
    if not data:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def pasted(value: Any) -> str:
    """Python that makes a tensor again, bit for bit; `repr` of everything else."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f'bits({value.dtype}, {tuple(value.shape)}, "{hexes(value)}")'


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    unequal = words(a) != words(b)
    if a.dtype.is_floating_point:
        unequal &= ~(a.isnan().cpu() & b.isnan().cpu())
    return unequal


def same_bits(a: Any, b: Any) -> bool:
    """Equal bit for bit, and signed zeros count; a NaN equals any NaN, whose payload and sign are promised by nobody."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and not bool(_unequal(a, b).any())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a is None and b is None


def difference(got: Any, want: Any, *inputs: Any) -> str:
    """For the message of an assert: the first elements that differ, in hexadecimal, and the inputs."""
    lines = []
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        got, want = (got,), (want,)
    for k, (a, b) in enumerate(zip(got, want, strict=False)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            if not same_bits(a, b):
                lines.append(
                    f"result {k}: {getattr(a, 'dtype', a)} {getattr(a, 'shape', '')}, "
                    f"expected {getattr(b, 'dtype', b)} {getattr(b, 'shape', '')}"
                )
            continue
        where = _unequal(a, b).reshape(-1).nonzero().view(-1)
        for i in where[:4].tolist():
            one, other = a.reshape(-1)[i], b.reshape(-1)[i]
            lines.append(f"result {k}, element {i}: {hexes(one)} ({one}), expected {hexes(other)} ({other})")
        if where.numel() > 4:
            lines.append(f"result {k}: {where.numel()} elements differ")
    return "\n".join([*lines, *(f"input: {pasted(value)}" for value in inputs)])
