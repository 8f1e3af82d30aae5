# ruff: noqa: E501, the tables of messages are as long as the messages
"""The one door to torch.compile: how often it compiles, when it does not, and what it leaves behind."""

import concurrent.futures
import itertools
import os
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import difference, same_bits
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import bnbref
from bnbref import blockwise, fourbit, int8, nested
from bnbref import functional as F
from bnbref.codebooks import DYNAMIC, NF4, Codebook, value_table
from bnbref.kernels import REGISTRY, Kernel, compile_enabled, compiler, door, formulations, fused, variants
from bnbref.kernels.ordered import batch_invariant_enabled
from bnbref.kernels.variants import Variants, _own_settings

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
F32 = torch.float32


def graphs() -> int:
    """How many graphs Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def ramp(n: int) -> torch.Tensor:
    return torch.linspace(-3, 2, n) if n else torch.zeros(0)


def fresh(name: str) -> Codebook:
    """A codebook that no other test has compiled a kernel for."""
    return Codebook(name, NF4.values, NF4.thresholds)


@pytest.fixture
def through_dynamo():
    """No call of an earlier test is kept, which may have compiled under another default dtype: Dynamo looks at every layout."""
    for kernel in REGISTRY.values():
        kernel._calls.clear()


# ---- one compilation for all shapes ---------------------------------------------------------------------------------

# Nothing, one, odd, a tail, less and more than a block, whole blocks, several dimensions.
SHAPES = [(0,), (1,), (), (3,), (7, 9), (63,), (64,), (65,), (127,), (128,), (129,), (191,), (192,), (2, 96), (5, 7, 11),
          (1000,), (1024,), (4097,), (16, 0), (33, 33)]  # fmt: skip


def test_twenty_shapes_cost_one_compilation():
    assert len(set(SHAPES)) == 20
    book, before = fresh("twenty"), graphs()
    for shape in SHAPES:
        n = torch.Size(shape).numel()
        packed, absmax = fourbit.quantize(ramp(n).view(shape), book, 64)
        fourbit.dequantize(packed, absmax, book, 64, shape, F32)
    assert graphs() - before == 2, "one for quantize_rows, one for dequantize_rows"
    again = graphs()
    fourbit.quantize(ramp(100).bfloat16().float(), fresh("twenty"), 64)  # an equal codebook
    assert graphs() == again
    fourbit.dequantize(packed, absmax, book, 64, (33, 33), torch.bfloat16)
    assert graphs() == again + 1, "another dtype is another kernel"


def test_twenty_shapes_of_eight_bits(through_dynamo):
    blockwise.quantize(ramp(999), DYNAMIC, 256)  # compiled here if it was not yet
    before = graphs()
    for shape in SHAPES:
        x = ramp(torch.Size(shape).numel()).view(shape)
        codes, absmax = blockwise.quantize(x, DYNAMIC, 256)
    assert graphs() == before
    values = value_table(DYNAMIC, CPU)
    blockwise.dequantize(codes, absmax, values, 256, F32)
    nested.dequantize(codes, absmax, values, torch.tensor(1.0))
    before = graphs()
    for n in range(0, 1500, 75):
        codes = torch.zeros(n, dtype=torch.uint8)
        blockwise.dequantize(codes, torch.ones(-(-n // 256)), values, 256, F32)
        nested.dequantize(codes, torch.ones(-(-n // 256)), values, torch.tensor(1.0))
    assert graphs() == before


def test_matrices_of_any_size_share_a_kernel(through_dynamo):
    """Sizes 0 and 1 are kernels of their own, as Dynamo has it: nothing else is."""
    int8.quantize(torch.ones(2, 2), 2.5)
    before = graphs()
    for m, n in ((2, 3), (3, 2), (17, 5), (5, 64), (100, 3), (64, 64), (9, 33)):
        int8.quantize(torch.ones(m, n), 2.5)
    assert graphs() == before


@settings(max_examples=20, deadline=None)
@given(rows=st.sampled_from([1, 3]), columns=st.sampled_from([1, 4]), data=st.data())
def test_the_stride_of_a_dimension_of_size_1_costs_no_compilation(rows, columns, data):
    """Inductor's own results have 0 there, slices what they were cut from: no element has another place by it."""
    kernel = REGISTRY["dequantize_int8_product"]
    kernel._calls.clear()
    product, scales = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns), torch.ones(rows)

    def strange(x):
        strides = [data.draw(st.integers(0, 9)) if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
        return x.as_strided(x.shape, strides)

    arguments = product, scales, torch.ones(columns), None, None
    want = kernel(*arguments, dtype=F32)
    before = graphs()
    for _ in range(3):
        others = [t if t is None else strange(t) for t in arguments]
        assert same_bits(kernel(*others, dtype=F32), want)
        assert same_bits(kernel(*others, dtype=F32), want), "by the code that was kept for this layout"
    assert graphs() == before


@torch._dynamo.config.patch(recompile_limit=1)
def test_more_blocksizes_than_dynamo_would_recompile():
    """Eight recompilations of one code object are Dynamo's limit. Each static size has a code object, so there is none."""
    kernel = REGISTRY["dequantize_int8_rows"]
    for m, n in ((1, 1), (1, 5), (5, 1), (5, 5), (6, 7)):
        got = kernel(torch.ones(m, n, dtype=torch.int8), torch.full((m,), 127.0), dtype=F32)
        assert same_bits(got, torch.full((m, n), 1.0)) or bool((got - 1).abs().max() < 1e-6)
    for blocksize in (16, 32):
        blockwise.dequantize(
            torch.zeros(100, dtype=torch.uint8),
            torch.ones(-(-100 // blocksize)),
            value_table(DYNAMIC, CPU),
            blocksize,
            F32,
        )


# ---- off ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Calls of the definition of a kernel that has a formulation, which is what runs compiled."""
    kernel, calls = REGISTRY["dequantize_rows"], []
    definition = kernel.definition
    monkeypatch.setattr(kernel, "definition", lambda *args, **kwargs: calls.append(1) or definition(*args, **kwargs))
    return calls


def decode(packed=None) -> torch.Tensor:
    packed = torch.arange(256).to(torch.uint8) if packed is None else packed
    return fourbit.dequantize(packed, torch.ones(8, device=packed.device), NF4, 64, (512,), F32)


def test_eager_is_a_context_that_nests(counted):
    decode()
    assert len(counted) == 0
    with bnbref.eager():
        decode()
        with bnbref.eager():
            decode()
        decode()
    assert len(counted) == 3
    decode()
    assert len(counted) == 3
    with pytest.raises(KeyError), bnbref.eager():
        raise KeyError
    decode()
    assert len(counted) == 3


def test_eager_in_threads():
    """In a Python without a global lock a counter that threads share loses some of what they add: there this failed."""
    barrier = threading.Barrier(8)

    def work(_):
        barrier.wait()
        for _ in range(500):
            with bnbref.eager(), bnbref.batch_invariant():
                pass

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert compile_enabled()
    assert not batch_invariant_enabled()
    with bnbref.eager(), bnbref.batch_invariant():
        assert not compile_enabled()
        assert batch_invariant_enabled()


PROBE = """
import hashlib, warnings, torch, bnbref
from bnbref import functional as F
torch.manual_seed(0)
x = torch.randn(300)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = []
    for _ in range(3):
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        codes, state8 = F.quantize_blockwise(x, blocksize=256)
        q, stats, _ = F.int8_vectorwise_quant(x.view(10, 30), threshold=2.5)
        results += [packed, state.absmax, state.state2.absmax, F.dequantize_4bit(packed, state), codes, state8.absmax, q, stats]
digest = hashlib.sha256(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in results)).hexdigest()
print(digest, *[str(w.message) for w in caught if "bnbref" in str(w.message)], sep="\\n")
"""


def probe(**environment: str) -> list[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("CXX", "BNBREF_COMPILE")} | environment
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def digest() -> str:
    uncompiled, *said = probe(BNBREF_COMPILE="0")
    assert said == []
    return uncompiled


def test_without_a_compiler_it_says_so_once_and_has_the_same_bits(digest):
    missing, *said = probe(CXX="nonexistent-c++")
    assert missing == digest
    assert_expected_inline(
        "\n".join(said),
        """bnbref runs uncompiled on cpu: no C++ compiler ('nonexistent-c++' is not on the PATH; set CXX or install g++). The bits are the same, the speed is not.""",
    )
    missing, *said = probe(PATH="")
    assert missing == digest
    assert_expected_inline(
        "\n".join(said).replace("clang++", "g++"),
        """bnbref runs uncompiled on cpu: no C++ compiler ('g++' is not on the PATH; set CXX or install g++). The bits are the same, the speed is not.""",
    )
    # One that is there and does not run; and torch.compile switched off by its own variable.
    missing, *said = probe(CXX="false")
    assert missing == digest
    assert_expected_inline(
        "\n".join(said),
        """bnbref runs uncompiled on cpu: no C++ compiler ('false' does not run). The bits are the same, the speed is not.""",
    )
    # A driver for C links no C++ library, so that what it makes cannot be loaded.
    missing, *said = probe(CXX="gcc")
    assert missing == digest
    assert_expected_inline(
        "\n".join(said),
        """bnbref runs uncompiled on cpu: no C++ compiler ('gcc' is one for C, which peft's BOFT leaves in CXX: unset CXX, or set it to g++). The bits are the same, the speed is not.""",
    )
    missing, *said = probe(TORCH_COMPILE_DISABLE="1")
    assert missing == digest
    assert_expected_inline(
        "\n".join(said),
        """bnbref runs uncompiled on cpu: TORCH_COMPILE_DISABLE=1 switches torch.compile off. The bits are the same, the speed is not.""",
    )


def test_what_fails_only_when_it_compiles_is_said_once_too(digest, tmp_path):
    """A compiler that answers and does not compile; a folder that cannot be made, and one that cannot be written."""
    broken, file = tmp_path / "g++", tmp_path / "file"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in -dumpversion) echo 12;; *--version) echo "g++ 12.2.0";;\n'
        "*) echo \"fatal error: cannot execute 'cc1plus'\" >&2; exit 1;; esac\n",
        encoding="utf-8",
    )
    broken.chmod(0o755)
    file.touch()
    got, *said = probe(CXX=str(broken), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert got == digest
    assert_expected_inline(
        "\n".join(said).replace(str(tmp_path), "TMP"),
        """bnbref runs uncompiled on cpu: the C++ compiler 'TMP/g++' fails (fatal error: cannot execute 'cc1plus'). The bits are the same, the speed is not.""",
    )
    got, *said = probe(TORCHINDUCTOR_CACHE_DIR=str(file / "cache"))
    assert got == digest
    assert_expected_inline(
        "\n".join(said).replace(str(tmp_path), "TMP"),
        """bnbref runs uncompiled on cpu: Inductor cannot keep code in its folder, TORCHINDUCTOR_CACHE_DIR ([Errno 20] Not a directory: 'TMP/file/cache'). The bits are the same, the speed is not.""",
    )

    blank = tmp_path / "a b"
    got, *said = probe(TORCHINDUCTOR_CACHE_DIR=str(blank))
    assert got == digest
    if said:  # a torch that quotes it would compile
        assert_expected_inline(
            "\n".join(said).replace(str(tmp_path), "TMP"),
            """bnbref runs uncompiled on cpu: Inductor cannot keep code in its folder, TORCHINDUCTOR_CACHE_DIR ('TMP/a b' has blanks, which torch does not quote for a compiler). The bits are the same, the speed is not.""",
        )
    # torch's compiler is not whole, as beside a triton of another version.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch._inductor.compile_fx'] = None\n")
    got, *said = probe(PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert got == digest
    assert_expected_inline(
        "\n".join(said),
        """bnbref runs uncompiled on cpu: torch's compiler cannot be imported (ModuleNotFoundError: import of torch._inductor.compile_fx halted; None in sys.modules). The bits are the same, the speed is not.""",
    )


def test_where_nothing_may_be_compiled_or_started(tmp_path, monkeypatch):
    """Optimized Python, a process that has no folder for temporary files, a compiler that is no program."""
    lacking = compiler._lacking.__wrapped__
    with mock.patch.object(sys, "flags", SimpleNamespace(optimize=1)):
        assert_expected_inline(
            lacking("cpu"),
            """python -O or PYTHONOPTIMIZE takes away assertions by which torch's compiler decides what it writes""",
        )
    with mock.patch.object(compiler.sysconfig, "get_path", return_value=str(tmp_path)), monkeypatch.context() as within:
        within.setattr(compiler, "_cxx_version", lambda: 11)
        within.setattr(compiler, "_cxx", lambda: sys.executable)
        assert lacking("cpu") == "no Python.h (install Python's development headers)"
        within.setattr(sys, "frozen", True, raising=False)  # as PyInstaller says of itself
        assert lacking("cpu") == "no Python.h in this frozen program"
    program = tmp_path / "g++"
    program.touch(0o755)
    monkeypatch.setattr(compiler, "_cxx", lambda: str(program))
    compiler._cxx_version.cache_clear()
    assert_expected_inline(
        lacking("cpu").replace(str(tmp_path), "TMP"),
        """no C++ compiler ('TMP/g++' cannot be started: [Errno 8] Exec format error: 'TMP/g++')""",
    )
    monkeypatch.setattr(tempfile, "gettempdir", mock.Mock(side_effect=FileNotFoundError(2, "No usable folder")))
    assert_expected_inline(
        lacking("cpu"),
        """Inductor cannot keep code in its folder, TORCHINDUCTOR_CACHE_DIR ([Errno 2] No usable folder)""",
    )


def test_torchs_compiler_is_imported_by_a_thread_that_ctrl_c_does_not_reach(monkeypatch):
    """An import that was interrupted cannot be made again: `module 'sympy' has no attribute 'printing'`."""
    threads = []
    monkeypatch.delitem(sys.modules, "torch._inductor.compile_fx", raising=False)
    monkeypatch.setattr(variants.importlib, "import_module", lambda name: threads.append(threading.current_thread()))
    variants.import_compiler()
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    variants.import_compiler()
    assert threads[2:] == [threading.current_thread()] * 2


@pytest.mark.parametrize("error", [TimeoutError, RuntimeError, KeyboardInterrupt])
def test_what_a_handler_of_signals_raises_while_torchs_compiler_is_imported_is_the_caller_s(error, monkeypatch):
    """The time limit of an alarm ended in a warning that nothing can be compiled, an error of DataLoader's workers nowhere."""

    def interrupted(load):
        load()
        raise error("of a handler")

    monkeypatch.setattr(compiler, "_failed", {})
    monkeypatch.delitem(sys.modules, "torch._inductor.compile_fx", raising=False)
    monkeypatch.setattr(variants.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(variants, "in_another_thread", interrupted)
    with pytest.raises(error, match="of a handler"):
        door._not_imported("cpu")
    assert not compiler._failed


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, OSError])
def test_whatever_keeps_torchs_compiler_from_being_imported_is_said(error, monkeypatch):
    """As a folder named triton in the current one does: `module 'triton' has no attribute 'language'`."""
    monkeypatch.setattr(compiler, "_failed", {})
    monkeypatch.delitem(sys.modules, "torch._inductor.compile_fx", raising=False)
    monkeypatch.setattr(variants.importlib, "import_module", mock.Mock(side_effect=error("of triton")))
    with pytest.raises(ImportError) as raised:
        variants.import_compiler()
    said = f"torch's compiler cannot be imported (ImportError: {error.__name__}: of triton)"
    assert compiler.why_failed("cpu", raised.value) == said


def test_an_environment_in_a_folder_with_a_blank(monkeypatch):
    """The compiler says only that the linker failed."""
    failure = type("CppCompileError", (RuntimeError,), {})(
        "C++ compile error\ncollect2: error: ld returned 1 exit status"
    )
    monkeypatch.setattr(compiler, "_failed", {})
    assert "fails (collect2: error: ld returned 1 exit status)" in str(compiler.why_failed("cpu", failure))
    monkeypatch.setattr(compiler, "_failed", {})
    monkeypatch.setattr(torch, "__file__", "/my code/.venv/torch/__init__.py")
    monkeypatch.setattr(tempfile, "tempdir", "/my folder")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    assert_expected_inline(
        str(compiler.why_failed("cpu", failure)),
        """'/my folder' has blanks, which torch does not quote for a compiler: set TMPDIR to a folder without""",
    )
    monkeypatch.setattr(compiler, "_failed", {})
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert_expected_inline(
        str(compiler.why_failed("cpu", failure)),
        """'/my code/.venv/torch/__init__.py' has blanks, which torch does not quote for a compiler: install torch in a folder without""",
    )


ONE_KERNEL = """
import torch
from bnbref import int8, kernels
int8.quantize(torch.ones(2, 64))
print(len(kernels.REGISTRY["quantize_int8_rows"]._calls))
"""


def test_a_library_of_which_a_killed_process_wrote_a_part(tmp_path):
    """It is compiled anew, here and for later processes."""
    env = {key: value for key, value in os.environ.items() if key not in ("CXX", "BNBREF_COMPILE")}  # peft sets CXX
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)

    def compiled():
        command = [sys.executable, "-W", "error", "-c", ONE_KERNEL]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert compiled() == "1\n"
    (library,) = tmp_path.rglob("*.main.so")
    library.write_bytes(b"")
    assert compiled() == "1\n"
    assert library.stat().st_size > 1000


def test_only_what_inductor_wrote_is_removed(tmp_path, monkeypatch):
    theirs = tmp_path / "libtriton.so"
    theirs.touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert not compiler.remove_fragment(ImportError(f"{theirs}: file too short"))
    assert not compiler.remove_fragment(RuntimeError("a fault of bnbref"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # an installation below it is not Inductor's either
    installed = tmp_path / "venv" / "lib" / "libtriton.so"
    installed.parent.mkdir(parents=True)
    installed.touch()
    for path in (theirs, installed):
        assert not compiler.remove_fragment(ImportError(f"{path}: file too short"))
        assert path.exists()
    (ours := tmp_path / "ab" / "cab.main.so").parent.mkdir()
    ours.touch()
    assert compiler.remove_fragment(ImportError(f"{ours}: cannot read file data"))
    assert not ours.exists()
    assert not compiler.remove_fragment(
        ImportError(f"{ours}: file too short")
    )  # it is gone: what is wrong is another thing


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), OSError(12, "Cannot allocate memory"), RuntimeError("a fault of bnbref")],
)
def test_a_folder_that_fills_up_in_the_middle_of_a_step(error, monkeypatch):
    """The pieces of a step that were computed are not computed again; any other error is no reason to go on."""
    monkeypatch.setattr(compiler, "_failed", {})
    compiled_call, left = Variants.call, [1]

    def call(self, *args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return compiled_call(self, *args, **kwargs)

    monkeypatch.setattr(Variants, "call", call)
    kernel = Kernel(plus_one, {"x": (0,)}, writes=("x",))
    monkeypatch.setitem(formulations.ATTACHED, "plus_one", formulations.Formulation(plus_one, piece=3))
    x = torch.arange(16.0).view(8, 2)  # pieces of 2, 3 and 3 rows
    if isinstance(error, OSError):
        with pytest.warns(UserWarning, match=f"start a compiler or keep code in its folder.*{error.strerror}"):
            kernel(x)
        assert torch.equal(x, torch.arange(16.0).view(8, 2) + 1)
        assert compiler.missing_compiler("cpu") is not None
    else:
        with pytest.raises(RuntimeError, match="a fault of bnbref"):
            kernel(x)


def plus_one(x):
    return (x + 1,)


def test_compiled_it_has_the_same_bits(digest):
    """In a process of its own, with kernels from Inductor's cache or new ones."""
    assert probe() == [digest]


# ---- other people's graphs and modes --------------------------------------------------------------------------------


def round_trip_4bit(x):
    packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    return F.dequantize_4bit(packed, state)


def round_trip_8bit(x):
    return F.dequantize_blockwise(*F.quantize_blockwise(x, blocksize=64))


def through_int8(x):
    codes, absmax, outliers = int8.quantize(x, 1.5)
    return int8.dequantize(codes, absmax), absmax, outliers


def product_int8(x):
    return bnbref.matmul(x, torch.linspace(-1, 1, 5 * x.shape[-1]).view(5, x.shape[-1]))


FUNCTIONS = (round_trip_4bit, round_trip_8bit, through_int8, product_int8)
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


@each_function
def test_inlines_into_an_outer_compile(function):
    """One graph without a break, with the public functions in it. A kernel is compiled on its own account by an operator alone, and
    only a product is one."""
    x = ramp(300).view(3, 100)
    with bnbref.eager():
        want = function(x)
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    before = {name: len(kernel.variants) for name, kernel in REGISTRY.items()}
    got = torch.compile(function, fullgraph=True, backend=backend)(x)
    assert same_bits(got, want), difference(got, want)
    assert len(seen) == 1
    operators = [str(node.target) for node in seen[0].graph.nodes if str(node.target).startswith("bnbref.linear")]
    assert operators == (["bnbref.linear_8bit.default"] if function is product_int8 else [])
    assert function is product_int8 or {name: len(kernel.variants) for name, kernel in REGISTRY.items()} == before


@each_function
@pytest.mark.parametrize("strict", [False, True])
def test_exports(function, strict):
    """An exported program has ATen's operators alone, so that it runs where bnbref is not installed."""

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    x = ramp(300).view(3, 100)
    program = torch.export.export(Module(), (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [t for t in targets if "bnbref" in t]
    with bnbref.eager():
        want = function(x)
    got = program.module()(x)
    assert same_bits(got, want), difference(got, want)


@each_function
def test_fake_and_meta_tensors(function):
    """Shapes and dtypes without data, and nothing of a fake mode outlives it."""
    x = ramp(300).view(3, 100)
    with bnbref.eager():
        want = function(x)
    want = want if isinstance(want, tuple) else (want,)
    with FakeTensorMode():
        fake = function(torch.empty(3, 100))
    for got in (fake, function(x.to("meta")) if function is not product_int8 else fake):
        got = got if isinstance(got, tuple) else (got,)
        assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in want]
    assert isinstance(fake[0] if isinstance(fake, tuple) else fake, FakeTensor)
    assert not any(isinstance(value_table(book, CPU), FakeTensor) for book in (NF4, DYNAMIC))
    with bnbref.eager():
        assert same_bits(function(x), want if len(want) > 1 else want[0])


def test_a_subclass_of_tensor_sees_plain_operations(counted):
    class Logged(torch.Tensor):
        pass

    packed, ones = torch.arange(256).to(torch.uint8), torch.ones(8)
    seen = fourbit.dequantize(packed, ones.as_subclass(Logged), NF4, 64, (512,), F32)
    assert len(counted) == 1
    assert same_bits(seen.as_subclass(torch.Tensor), decode(packed))
    assert same_bits(decode(packed.as_subclass(Logged)), decode(packed))  # codes are taken for their memory
    assert len(counted) == 1
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    before = len(counted)
    decode(parameter)
    assert len(counted) == before, "a parameter is compiled as a tensor is"


def test_nothing_is_left_on_the_callers_tensors():
    """Dynamo writes its mark of a dynamic size on the tensor itself."""
    x, codes = torch.randn(4, 64), torch.zeros(4, 64, dtype=torch.uint8)
    absmax = torch.ones(4)
    values = value_table(DYNAMIC, CPU).clone()  # the cached one may have been an input of somebody's own graph
    packed, _ = F.quantize_4bit(x, quant_type="nf4")
    REGISTRY["dequantize_blocks"](codes, absmax, values, dtype=F32)
    REGISTRY["quantize_rows"](x, blocksize=64, codebook=NF4)
    int8.quantize(x, 2.5)
    for tensor in (x, codes, absmax, packed, values):
        marks = [name for name in dir(tensor) if "dynamo" in name.lower()]
        assert marks == [], marks


def test_no_gradient_and_no_version():
    """Results do not require grad, and the inputs are not written to."""
    x = torch.randn(4, 64, requires_grad=True)
    version = x._version
    packed, absmax = fourbit.quantize(x, NF4, 64)
    codes, _ = blockwise.quantize(x, DYNAMIC, 256)
    assert not packed.requires_grad
    assert not absmax.requires_grad
    assert not codes.requires_grad
    assert x._version == version
    assert x.grad is None
    assert torch.is_grad_enabled()


def test_negative_views():
    """Their memory holds the other sign, and what was compiled for plain tensors of that layout must not read it."""
    x, absmax = ramp(256).view(4, 64), torch.linspace(1, 2, 4)
    codes = torch.arange(256).to(torch.uint8).view(4, 64)
    for negative in (False, True, False):
        y, scales = (torch._neg_view(-t) if negative else t for t in (x, absmax))
        assert y.is_neg() == negative
        assert same_bits(fourbit.quantize(y, NF4, 64)[0], fourbit.quantize(x, NF4, 64)[0])
        decoded = REGISTRY["dequantize_blocks"](codes, scales, value_table(DYNAMIC, CPU), dtype=F32)
        assert same_bits(decoded[:, -1], scales * value_table(DYNAMIC, CPU)[codes[:, -1].long()])


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # takes them for slow: they have no memory that is contiguous
def test_zeros_without_memory():
    """Tangents of forward mode are such; compiled code would read from address 0."""
    book, zeros = fresh("zeros"), torch.zeros(4, 64)
    want = fourbit.quantize(zeros, book, 64)
    assert same_bits(fourbit.quantize(torch._efficientzerotensor((4, 64)), book, 64), want)  # compiled for this layout
    layer = bnbref.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    results = []
    for bias in (zeros[0], torch._efficientzerotensor((64,))):
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        results.append(layer(ramp(64)))
    # Each is within (k + 5) u S, k = 64, of the exact product (`few_rows.multiply_rows`); no |a| is above 3, no |weight| above 1/8.
    assert (results[0] - results[1]).abs().max() <= 2 * 69 * 2.0**-24 * 64 * 3 / 8


def test_constants_that_are_equal_and_not_the_same():
    @fused(dynamic={"x": (0,)})
    def times(x: torch.Tensor, *, k: float) -> torch.Tensor:
        return x.to(torch.int32) * k

    try:
        assert [times(ramp(5), k=k).dtype for k in (1, 1.0, True, 1)] == [torch.int32, F32, torch.int32, torch.int32]
    finally:
        del REGISTRY["times"]


def sums_for_products(graph):
    """A pass over graphs, of somebody who writes his own."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.mul.Tensor:
            node.target = torch.ops.aten.add.Tensor


@pytest.mark.parametrize(
    "setting",
    [
        {"cpp.enable_unsafe_math_opt_flag": True},
        {"cpp.enable_floating_point_contract_flag": "fast"},
        {"use_fast_math": True},
        {"emulate_precision_casts": True, "max_autotune": True, "freezing": True, "cpp.simdlen": 1},
        {"cpu_backend": "halide", "post_grad_custom_post_pass": sums_for_products},
    ],
)
def test_what_somebody_allows_torchs_compiler_for_his_own_graphs_is_not_allowed_for_ours(setting):
    """Each rounding, NaN and infinity: kernels that were not compiled before, while the setting holds in the whole process."""

    @fused(dynamic={"x": (0,), "y": (0,), "z": (0,)})
    def product_and_sum(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.where(x.isnan(), y, x * y + z) / x

    x = torch.cat([ramp(4096), torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 2.0**-149])])
    args = (x, x.flip(0) * (1 + 2**-20), -x * x.flip(0))
    with bnbref.eager():
        want = product_and_sum(*args)
    try:
        with torch._inductor.config.patch(setting):
            assert same_bits(product_and_sum(*args), want)
    finally:
        del REGISTRY["product_and_sum"]


@pytest.mark.parametrize(
    "stance", ["fail_on_recompile", "eager_on_recompile", "eager_then_compile", {"force_backend": "eager"}], ids=str
)
def test_a_stance_that_somebody_gave_dynamo_is_for_his_own_graphs(stance):
    """Where it has none of new ones, a kernel is compiled all the same: its first call, and not its second."""
    kernel, x = Kernel(plus_one, {"x": (0,)}), torch.arange(5.0)
    given = stance if isinstance(stance, dict) else {"stance": stance}
    with torch.compiler.set_stance(**given):
        theirs = torch._dynamo.eval_frame._stance
        assert torch.equal(kernel(x)[0], x + 1)
        assert len(kernel._calls) == 1
        assert torch._dynamo.eval_frame._stance is theirs


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        (torch._dynamo.config, {"error_on_recompile": True}),
        (torch._dynamo.config, {"verify_correctness": True}),
        (torch._functorch.config, {"functionalize_rng_ops": True}),
    ],
    ids=["error_on_recompile", "verify_correctness", "functionalize_rng_ops"],
)
def test_settings_of_somebodys_own_graphs_under_which_a_kernel_could_not_be_compiled(module, setting):
    def beside_itself(x):
        return x.reshape(x.shape[0], 1) + x

    kernel, before = Kernel(beside_itself, {"x": (0,)}), torch.get_num_threads()
    try:
        with module.patch(setting):
            for threads in (1, 2):  # Dynamo compiles anew
                torch.set_num_threads(threads)
                assert kernel(torch.ones(5)).sum() == 50
    finally:
        torch.set_num_threads(before)
    assert len(kernel._calls) == 2


def switched_off_by_environment():
    return mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1")


@pytest.mark.parametrize(
    ("switch", "said"),
    [
        (switched_off_by_environment, "TORCHDYNAMO_DISABLE=1"),
        (lambda: torch._dynamo.config.patch(disable=True), r"torch\._dynamo\.config\.disable"),
        (lambda: torch.compiler.set_stance("force_eager"), r"torch\.compiler\.set_stance\('force_eager'\)"),
    ],
)
def test_whoever_switches_torchs_compiler_off_is_told_once(switch, said):
    kernel, x = Kernel(plus_one, {"x": (0,)}), torch.arange(5.0)
    door._warn_once.cache_clear()
    with switch():
        with pytest.warns(UserWarning, match=f"runs uncompiled on cpu: {said} switches"):
            assert torch.equal(kernel(x)[0], x + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(kernel(x)[0], x + 1)
    assert not kernel.variants
    kernel(x)
    assert kernel.variants, "it is on again"


def test_a_stance_that_is_set_while_another_thread_compiles_stays():
    from torch._dynamo import eval_frame

    before = eval_frame._stance
    try:
        with _own_settings():
            torch.compiler.set_stance("eager_on_recompile")  # of the process, not of a thread
        assert eval_frame._stance.stance == "eager_on_recompile"
    finally:
        eval_frame._stance = before


# ---- threads --------------------------------------------------------------------------------------------------------


def test_threads():
    """Several threads at once, the first use of a kernel among them: the bits of one thread."""
    book = fresh("threads")
    inputs = [ramp(n) for n in (50, 129, 640, 1)]
    with bnbref.eager():
        want = [fourbit.dequantize(*fourbit.quantize(x, book, 64), book, 64, x.shape, F32) for x in inputs]
    barrier = threading.Barrier(len(inputs))

    def work(x):
        barrier.wait()
        return [fourbit.dequantize(*fourbit.quantize(x, book, 64), book, 64, x.shape, F32) for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(len(inputs)) as pool:
        for got, expected in zip(pool.map(work, inputs), want, strict=True):
            assert all(same_bits(one, expected) for one in got)


FIRST_CALLS = """
import threading, torch
from bnbref import functional as F

barrier, failed = threading.Barrier(2), []

def work(function):
    barrier.wait()
    try:
        function(torch.ones(640))
    except Exception as error:
        failed.append(error)

threads = [threading.Thread(target=work, args=(function,)) for function in (F.quantize_4bit, F.quantize_blockwise)]
for thread in threads: thread.start()
for thread in threads: thread.join()
from torch._inductor.output_code import CompiledFxGraph
print(failed, CompiledFxGraph.__call__.__module__)
"""


def test_first_calls_of_a_process_in_threads():
    """They import torch's compiler, which two threads cannot do at once, and leave it as it was."""
    if torch.__version__ < "2.13":
        pytest.skip(
            "torch 2.11 for CUDA without a GPU: any second thread that compiles uses a device guard of the first, which has ended"
        )
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[] torch._inductor.output_code\n", done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_while_another_thread_compiles():
    """Neither waits for the other: the thread may need a lock that the fork holds, and in the child there is no such thread."""
    compiling, forked = threading.Event(), threading.Event()

    def compile_until_the_fork():
        with door._first_calls:
            compiling.set()
            forked.wait(10)

    thread = threading.Thread(target=compile_until_the_fork)
    thread.start()
    compiling.wait()
    child = os.fork()
    if child == 0:
        try:
            with pytest.warns(UserWarning, match="uncompiled on cpu: this process was forked while another thread"):
                packed, absmax = fourbit.quantize(ramp(64), fresh("forked"), 64)
            with bnbref.eager():
                want = fourbit.quantize(ramp(64), NF4, 64)
            os._exit(0 if same_bits(packed, want[0]) and same_bits(absmax, want[1]) else 1)
        finally:
            os._exit(2)
    assert thread.is_alive()
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert compiler.missing_compiler("cpu") is None, "of the parent"


def test_more_threads_than_dynamo_would_recompile():
    """What Dynamo guards beside tensors may take as many values as somebody likes."""
    before = torch.get_num_threads()
    try:
        for threads in range(1, 11):
            torch.set_num_threads(threads)
            blockwise.dequantize(torch.zeros(64, dtype=torch.uint8), torch.ones(2), value_table(DYNAMIC, CPU), 32, F32)
    finally:
        torch.set_num_threads(before)


# ---- the registry ---------------------------------------------------------------------------------------------------


def test_registering():
    def double(x: torch.Tensor) -> torch.Tensor:
        """Twice."""
        return x + x

    messages = []
    try:
        kernel = fused(dynamic={"x": (0,)})(double)
        assert REGISTRY["double"] is kernel
        assert kernel.__doc__ == "Twice."
        assert kernel.__name__ == "double"
        assert kernel(torch.ones(5)).tolist() == [2.0] * 5
        with pytest.raises(ValueError) as caught:
            fused(dynamic={})(double)
        messages.append(str(caught.value))
    finally:
        del REGISTRY["double"]
    with pytest.raises(ValueError) as caught:
        fused(dynamic={"y": (0,)})(double)
    messages.append(str(caught.value))
    assert "double" not in REGISTRY
    assert_expected_inline(
        "\n".join(messages),
        """\
a kernel named 'double' is registered already
dynamic names no argument of kernel 'double': ['y']""",
    )


def test_none_among_the_tensors():
    product, ones = torch.ones(2, 3, dtype=torch.int32), torch.ones(3)
    a = int8.dequantize_int8_product(product, ones[:2], ones, None, None, dtype=F32)
    b = int8.dequantize_int8_product(product, ones[:2], ones, ones * 0, None, dtype=F32)
    assert same_bits(a, b)


# ---- more than 2^31 elements ----------------------------------------------------------------------------------------


def test_generated_code_indexes_with_64_bits():
    """Every loop of the C++ that Inductor wrote for our kernels counts in int64_t, and every subscript is made of them.

    (No tensor of 2^31 elements is small; tests/test_exhaustive.py runs real ones.)
    """
    from torch._inductor.codecache import PyCodeCache

    x = ramp(300)
    round_trip_4bit(x), round_trip_8bit(x), through_int8(x.view(3, 100))
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in PyCodeCache.modules]
    kernels = [source for source in sources if 'extern "C"' in source and "for(" in source]
    assert kernels
    for source in kernels:
        loops = re.findall(r"for\((\w+) (x\d+\w*)=", source)
        assert {kind for kind, _ in loops} == {"int64_t"}, set(loops)
        # x0 + 64*x1, never a narrower copy of an index inside a subscript
        subscripts = re.findall(r"\w+_ptr\d+(?:\s*\+\s*|\[)static_cast<(\w+)>\(", source)
        assert set(subscripts) <= {"int64_t"}, set(subscripts)


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_of(function) -> int:
    """The most bytes that lived at a time of those that torch's allocator gave to a function on its second call."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    sizes = []

    def walk(event):
        if event.tag == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
        for child in event.children:
            walk(child)

    for event in profile.profiler.kineto_results.experimental_event_tree():
        walk(event)
    assert sizes, "the profiler saw no allocation"
    del result
    return max(itertools.accumulate(size for _, size in sorted(sizes)))


N = 1 << 18


def _memory_cases():
    values = value_table(DYNAMIC, CPU)
    for dtype in (F32, torch.bfloat16):
        x = torch.randn(512, N // 512, generator=torch.Generator().manual_seed(0)).to(dtype)
        packed, absmax = fourbit.quantize(x, NF4, 64)
        codes, absmax8 = blockwise.quantize(x, DYNAMIC, 256)
        rows, stats, _ = int8.quantize(x, 2.5)
        size = dtype.itemsize
        # Bytes an element in eager mode, temporaries and results. Encoding: the float32 copy of a 16-bit input, the
        # scaled elements, two int32 counts (bucketize, where) and a mask: 4 + 4 + 4 + 4 + 1. int8 has the magnitudes, the
        # scaled and the rounded elements, a few masks. Decoding: the unpacked codes, int32 and inside the operator int64
        # indices, the values: 1 + 4 + 8 + 4. A comparison with every threshold at once would be 15 or 255 masks.
        # Compiled: the results and nothing else.
        yield "quantize 4 bits", dtype, lambda x=x: fourbit.quantize(x, NF4, 64), 18, 0.5 + 4 / 64
        yield "quantize 8 bits", dtype, lambda x=x: blockwise.quantize(x, DYNAMIC, 256), 18, 1 + 4 / 256
        yield "quantize int8", dtype, lambda x=x: int8.quantize(x, 2.5), 24, 1 + 4 / 512 + 1 / 512
        yield (
            "dequantize 4 bits",
            dtype,
            lambda p=packed, a=absmax, d=dtype: fourbit.dequantize(p, a, NF4, 64, (N,), d),
            17,
            size,
        )
        yield (
            "dequantize 8 bits",
            dtype,
            lambda c=codes, a=absmax8, d=dtype: blockwise.dequantize(c, a, values, 256, d),
            17,
            size,
        )
        yield "dequantize int8", dtype, lambda c=rows, a=stats, d=dtype: int8.dequantize(c, a, d), 12, size


def test_peak_memory():
    for name, dtype, function, eager, compiled in _memory_cases():
        with bnbref.eager():
            peak = peak_of(function)
        assert peak <= eager * N + 4096, f"{name} {dtype} eager: {peak / N:.2f} bytes an element"
        peak = peak_of(function)
        assert peak <= compiled * N + 4096, f"{name} {dtype} compiled: {peak / N:.2f} bytes an element"


def test_peak_memory_is_measured():
    """The instrument, on functions whose peak is known: one float at a time, and a comparison with a whole table."""
    x, table = torch.ones(N), torch.ones(15)
    assert 8 * N <= peak_of(lambda: (x + 1) * 2) <= 8 * N + 4096
    assert peak_of(lambda: ((x + 1) * 2).sum() + 1) <= 8 * N + 4096
    assert peak_of(lambda: (x[:, None] > table).any(-1)) >= 16 * N


def test_an_argument_in_the_memory_of_one_that_is_written_to():
    """A first call, of which no cache on disk has the code."""

    @fused(dynamic={"x": (0,), "g": (0,)}, writes=("x",))
    def shrunk(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor]:
        return (x - 0.25 * g,)

    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            for _ in range(2):
                x = torch.arange(5000.0)
                shrunk(x, x)
                assert torch.equal(x, torch.arange(5000.0) * 0.75)
    finally:
        del REGISTRY["shrunk"]


@pytest.mark.filterwarnings("error")
def test_a_warning_of_torchs_compiler_is_no_error(monkeypatch):
    """Test suites make warnings errors, and Inductor warns, of what it imports first of all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._inductor import compile_fx
    original = compile_fx.compile_fx

    def warning(*args, **kwargs):
        warnings.warn("deprecated in torch", DeprecationWarning, stacklevel=2)
        return original(*args, **kwargs)

    @fused(dynamic={"x": (0,)})
    def plus_three(x: torch.Tensor) -> torch.Tensor:
        return x + 3

    monkeypatch.setattr(compile_fx, "compile_fx", warning)
    try:
        assert plus_three(torch.arange(5)).tolist() == [3, 4, 5, 6, 7]
    finally:
        del REGISTRY["plus_three"]
