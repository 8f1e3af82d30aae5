"""What another process compiles ahead: that it is what the products will call, that this process waits for that and for nothing
else, and that a process that cannot help does not hinder."""

import contextlib
import io
import os
import pathlib
import pickle
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bnbref
from bnbref import few_rows, functional
from bnbref.codebooks import FOUR_BIT, linear
from bnbref.kernels import REGISTRY, Kernel, ahead, door, variants
from bnbref.kernels.what_runs import _layout
from bnbref.packed_weight import PackedWeight

FLOATS = torch.float32, torch.float16, torch.bfloat16


# ---- what is compiled -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_on_gpu():
    """Two lists that grow by the calls that are compiled ahead and by those that are made; the definitions run."""
    asked, called = [], []

    def call_of(kernel, args, constants):
        return kernel.name, [_layout(t) for t in args], constants

    def call(self, *args, **constants):
        called.append(call_of(self, args, constants))
        return self.definition(*args, **constants)

    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (few_rows, "is_gpu", lambda x: True),
            (few_rows, "_is_compiled", lambda x: True),
            (Kernel, "ready", lambda *_: None),
            (Kernel, "ahead", lambda self, args, constants: asked.append(call_of(self, args, constants))),
            (Kernel, "__call__", call),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        yield asked, called


def product(draw, n, k, blocksize):
    """A quantized weight, a dtype of activations, and a bias or None."""
    with bnbref.eager():
        packed, state = functional.quantize_4bit(
            torch.randn(n, k, dtype=draw(st.sampled_from(FLOATS))),
            blocksize=blocksize,
            compress_statistics=draw(st.booleans()),
            quant_type=draw(st.sampled_from([*FOUR_BIT, linear(total_bits=4)])),
            quant_storage=draw(st.sampled_from([torch.uint8, torch.bfloat16])),
        )
    dtype = draw(st.sampled_from(FLOATS))
    return PackedWeight(packed, state), dtype, torch.randn(n).to(dtype) if draw(st.booleans()) else None


@settings(max_examples=40)
@given(st.data())
def test_it_is_what_the_next_row_calls(data):
    """A text of many rows, and then a row of it as models give it: with some stride in the dimensions of size 1."""
    n, k = data.draw(st.integers(1, 9)), 32 * data.draw(st.integers(1, 9))
    weight, dtype, bias = product(data.draw, n, k, data.draw(st.sampled_from([24, 32, 64, 96, 256])))
    row = torch.randn(2, 3, k).to(dtype)[1:, 2:]
    with as_on_gpu() as (asked, called), torch.no_grad():
        weight.find_or_prepare(torch.randn(1, 20, k).to(dtype), bias)
        assert called == []
        weight.multiply(row, bias)
    few = [call for call in called if call[0] == "multiply_rows"]
    assert asked == few
    assert len(few) == (n % 2 == 0 and k % weight.state.blocksize == weight.state.blocksize % 32 == 0)


@pytest.mark.parametrize("where", ["with gradients", "of one row", "on a CPU"])
def test_where_no_row_is_to_come(where):
    with bnbref.eager():
        packed, state = functional.quantize_4bit(torch.randn(2, 64), quant_type="nf4")
    on_gpu = mock.patch.object(few_rows, "is_gpu", return_value=where != "on a CPU")
    with as_on_gpu() as (asked, _), torch.set_grad_enabled(where == "with gradients"), on_gpu:
        PackedWeight(packed, state).find_or_prepare(torch.randn(1 if where == "of one row" else 20, 64), None)
    assert asked == []


@pytest.mark.parametrize("wrong", ["codes", "scales"])
def test_what_does_not_fit_is_named_as_ever(wrong):
    with bnbref.eager():
        packed, state = functional.quantize_4bit(torch.randn(2, 64), quant_type="nf4")
    if wrong == "codes":
        packed = packed[:-1]
    else:
        state.absmax = state.absmax[:-1]
    with as_on_gpu(), torch.no_grad(), pytest.raises(ValueError, match=r"^(packed must hold|absmax must have)"):
        PackedWeight(packed, state).find_or_prepare(torch.randn(20, 64), None)


# ---- this process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Where launches are to be. A process may be started, which is `program` in place of the real one."""
    monkeypatch.setattr(ahead, "_worker", None)
    monkeypatch.setattr(ahead, "_may_start", lambda index: True)
    yield SimpleNamespace(
        a=tmp_path / "a", b=tmp_path / "b", program=lambda text: monkeypatch.setattr(ahead, "_PROGRAM", text)
    )
    if ahead._worker is not None:
        ahead._worker.end()


def begin(place, **constants):
    ahead.begin("multiply_rows", [torch.empty(3, 2).t(), None], constants, place)


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def seconds(function, *args):
    start = time.monotonic()
    function(*args)
    return time.monotonic() - start


def test_a_call_waits_for_its_launch(places):
    places.program(
        f"import pathlib, time; print('begun', flush=True); time.sleep(1); pathlib.Path({str(places.a)!r}).touch(); time.sleep(9)"
    )
    begin(places.a)
    until(lambda: os.fstat(ahead._worker._begun.fileno()).st_size)
    ahead.wait(places.a)
    assert places.a.exists()
    assert seconds(ahead.wait, places.b) < 0.5  # of which nobody was asked
    worker = ahead._worker
    begin(places.a)  # which is there
    begin(places.b)
    assert ahead._worker is worker
    assert worker._given == {places.a, places.b}


def test_nobody_waits_for_a_process_that_has_not_begun_or_has_ended(places):
    places.program("import time; time.sleep(99)")
    begin(places.a)
    assert seconds(ahead.wait, places.a) < 0.5
    assert not ahead._worker.lives()  # it was not ahead
    places.program("print('begun')")
    begin(places.a)
    until(lambda: not ahead._worker.lives())
    assert seconds(ahead.wait, places.a) < 0.5
    first = ahead._worker
    begin(places.b)
    assert ahead._worker is not first


def test_what_the_process_gets(places, tmp_path):
    """The index of the GPU and the job as it is; no more processes of Inductor's. It ends with this one."""
    received = tmp_path / "received"
    places.program(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(received)!r}).write_bytes(sys.stdin.buffer.read())\n"
        f"pathlib.Path({str(places.a)!r}).write_text(os.environ['TORCHINDUCTOR_COMPILE_THREADS'])"
    )
    with mock.patch.object(ahead.atexit, "register") as at_exit:
        begin(places.a, blocksize=64)
    at_exit.assert_called_once_with(ahead._worker.end)
    ahead._worker._jobs.close()
    until(places.a.exists)
    until(lambda: not ahead._worker.lives())
    assert places.a.read_text() == "1"
    with received.open("rb") as file:
        assert pickle.load(file) is None  # a tensor of the CPU has no index
        layouts = (torch.float32, (2, 3), (1, 2)), None
        assert pickle.load(file) == ahead.Job("multiply_rows", layouts, {"blocksize": 64}, places.a)


def test_a_process_that_hangs_is_ended(places, monkeypatch):
    monkeypatch.setattr(ahead, "_LONGEST", 0.2)
    places.program("import time; print('begun', flush=True); time.sleep(99)")
    begin(places.a)
    until(lambda: os.fstat(ahead._worker._begun.fileno()).st_size)
    assert 0.2 <= seconds(ahead.wait, places.a) < 10
    assert not ahead._worker.lives()


def test_what_cannot_be_sent_is_not_waited_for(places, monkeypatch):
    monkeypatch.setattr(ahead, "_MOST", 1)
    places.program("import time; print('begun', flush=True); time.sleep(99)")
    begin(places.a, codebook=lambda: 0)  # a function in a function
    assert ahead._worker._given == set()
    begin(places.a)
    begin(places.b)  # one too many
    assert ahead._worker._given == {places.a}
    with mock.patch.object(ahead.subprocess, "Popen", side_effect=OSError):  # no more processes
        ahead._worker.end()
        begin(places.b)


def test_a_full_pipe_holds_nobody_up(places):
    """A user's pipes are small once he has many; and what is read late may not have been read at all."""
    places.program("import time; print('begun', flush=True); time.sleep(99)")
    begin(places.a, text="x" * 2**17)  # more than a pipe takes: a part of it was written
    assert not ahead._worker.lives()
    begin(places.a)
    pipe = ahead._worker._jobs
    while pipe.write(b"x" * 4096) is not None:
        pass
    begin(places.b)
    assert ahead._worker._given == {places.a}


def test_threads_that_wait_while_one_ends_the_process(places):
    places.program("import time; time.sleep(99)")
    begin(places.a)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            begin(places.a)
            list(pool.map(ahead.wait, [places.a] * 8))


def test_a_process_that_has_ended_leaves_no_open_file(places):
    places.program("pass")
    workers = []
    for _ in range(2):
        begin(places.a)
        workers.append(ahead._worker)
        until(lambda: not ahead._worker.lives())
    assert workers[0]._begun.closed
    assert workers[0]._jobs.closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_fork_does_not_end_the_process_of_its_parent(places):
    places.program("import time; time.sleep(99)")
    begin(places.a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside threads
        child = os.fork()
    if child == 0:
        # Another thread may have been asking for the process: then the fork has its lock, and cannot find out whose it is.
        ahead._worker._process._waitpid_lock.acquire(blocking=False)
        ahead._worker.end()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert ahead._worker.lives()


@pytest.mark.parametrize("path", [pathlib.Path("folder"), b"folder", "nul\0", "\ud800", None], ids=repr)
def test_what_is_no_path_hinders_nobody(path, places, monkeypatch):
    """Imports pass over it."""
    monkeypatch.setattr(sys, "path", [*sys.path, path])
    begin(places.a)
    assert (ahead._worker is None) == isinstance(path, str)  # which the system cannot take


def test_a_place_that_cannot_be_looked_at_hinders_nobody(places):
    with mock.patch.object(pathlib.Path, "exists", side_effect=PermissionError):
        begin(places.a)
    assert ahead._worker is None


def test_modules_are_those_of_this_process(places, tmp_path, monkeypatch):
    """And not those of the folder where it runs."""
    (tmp_path / "torch.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path] + ["a:b"])
    first, rest = ahead._PROGRAM.split("import os\n")
    assert "work()" in rest
    places.program(f"{first}import sys, time; print(sys.path, sys.argv, flush=True); time.sleep(99)")
    begin(places.a)
    until(lambda: os.fstat(ahead._worker._begun.fileno()).st_size)
    ahead._worker._begun.seek(0)
    assert ahead._worker._begun.readline().decode().strip() == f"{sys.path} ['-c']"


def test_no_process_of_a_place_that_is_there(places):
    places.a.touch()
    begin(places.a)
    assert ahead._worker is None
    ahead.wait(places.a)


SETTINGS = {
    "cores": 4,
    "free": 4 * 2**30,
    "environment": {},
    "executable": "/usr/bin/python3.11",
    "frozen": False,
    "hip": None,
}


@pytest.mark.parametrize(
    "other",
    [
        {"cores": 3},
        {"free": 4 * 2**30 - 1},
        {"environment": {"LOCAL_RANK": "1"}},
        {"environment": {"TORCHINDUCTOR_COMPILE_THREADS": "1"}},
        {"environment": {"BNBREF_AHEAD": "0"}},
        {"executable": "/opt/blender/blender"},
        {"executable": None},
        {"frozen": True},
        {"hip": "6.4"},
    ],
    ids=str,
)
def test_when_no_process_is_started(other, monkeypatch):
    def may(cores, free, environment, executable, frozen, hip):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 80 * 2**30))
        monkeypatch.setattr(sys, "executable", executable)
        monkeypatch.setattr(sys, "frozen", frozen, raising=False)
        monkeypatch.setattr(torch.version, "hip", hip)
        with mock.patch.dict(os.environ, environment):
            return ahead._may_start(0)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.delenv("BNBREF_AHEAD", raising=False)
    assert may(**SETTINGS)
    assert may(**{**SETTINGS, "environment": {"LOCAL_RANK": "0"}})
    assert not may(**{**SETTINGS, **other})


FIRSTS = [("0", 1, True), ("1", 0, False), (None, 0, True), (None, 1, False), (None, None, True)]


@pytest.mark.parametrize(("local", "rank", "first"), FIRSTS)
def test_of_ranks_that_need_the_same_the_first_starts_it(local, rank, first, monkeypatch):
    """Of those of `torch.multiprocessing.spawn`, too, which have no LOCAL_RANK. rank: None without a process group."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    assert ahead._is_first_rank() is first


def test_a_first_call_looks_for_the_launch_once_it_has_waited(monkeypatch, tmp_path):
    """And a kernel asks once for each layout, of a GPU alone."""
    kernel, seen = REGISTRY["dequantize_nested"], []
    cuda = SimpleNamespace(type="cuda", index=0)
    args = [SimpleNamespace(device=cuda)] * 4
    monkeypatch.setattr(kernel, "_place", lambda args, constants: tmp_path / "a")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernel, "tables", lambda *_: ())
    monkeypatch.setattr(door.ahead, "wait", lambda place: seen.append(place))
    monkeypatch.setattr(kernel.variants, "kept", lambda *given: seen.append("kept"))
    assert kernel._kept(args, {}) is None
    assert seen == [tmp_path / "a", "kept"]

    asked = []
    monkeypatch.setattr(kernel, "_ahead", set())
    monkeypatch.setattr(door, "call_layout", lambda args, constants: ("layout", len(args)))
    monkeypatch.setattr(door, "missing_compiler", lambda kind: None)
    monkeypatch.setattr(door, "compile_enabled", lambda: True)
    monkeypatch.setattr(door.ahead, "begin", lambda *given: asked.append(given))
    for given_args in (args, args, args[:3], [torch.zeros(2)]):
        kernel.ahead(given_args, {})
    place = tmp_path / "a"
    assert asked == [(kernel.name, args, {}, place), (kernel.name, args[:3], {}, place)]


# ---- the other process ----------------------------------------------------------------------------------------------


def done(monkeypatch, jobs, kernel, ends=("the input has ended",)):
    """What `work` does with these jobs, of which all have come when it begins. It goes on at the end of the input."""
    started = []

    def read(target, jobs):
        with contextlib.suppress(EOFError):
            target(jobs)

    monkeypatch.setattr(ahead, "_IDLE", 0.01)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"".join(map(pickle.dumps, [7, *jobs])))))
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        ahead.threading, "Thread", lambda target, args, daemon: SimpleNamespace(start=lambda: read(target, *args))
    )
    monkeypatch.setattr(ahead, "_zeros", lambda layout: layout)
    monkeypatch.setattr(variants, "import_compiler", lambda: started.append("imported"))
    monkeypatch.setattr(os, "write", lambda file, text: started.append((file, text)))
    monkeypatch.setattr(os, "_exit", lambda code: started.append("the input has ended"))
    monkeypatch.setitem(REGISTRY, "kernel", kernel)
    ahead.work()
    assert started == [7, *ends, "imported", (1, b"begun")]


def job(place, **constants):
    return ahead.Job("kernel", ((torch.float32, (2, 3), (3, 1)), None), constants, place)


def test_jobs_are_done_in_order(tmp_path, monkeypatch):
    made = []

    def kernel(*args, name):
        made.append((name, args))
        (tmp_path / name).touch()

    done(monkeypatch, [job(tmp_path / name, name=name) for name in "abc"], kernel)
    assert made == [(name, ((torch.float32, (2, 3), (3, 1)), None)) for name in "abc"]


def test_a_job_that_leaves_nothing_is_the_last(tmp_path, monkeypatch):
    made = []
    done(monkeypatch, [job(tmp_path / "a"), job(tmp_path / "b")], lambda *args: made.append(args))
    assert len(made) == 1


def test_it_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "_read", lambda jobs: None)  # which waits for a process that has nothing to say
    done(monkeypatch, [], None, ends=())


def test_tensors_of_a_job():
    with mock.patch.object(torch, "empty_strided", lambda *given, dtype, device: torch.ones(2) * (device == "cuda")):
        assert torch.equal(ahead._zeros((torch.float32, (2,), (1,))), torch.zeros(2))
    assert ahead._zeros(None) is None


PROGRAM = """
import sys, time
import torch
from bnbref.kernels import ahead
from bnbref.nn import Linear4bit
def layer(n, k):
    new = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    new.load_state_dict({"weight": torch.randn(n, k)})
    return new.cuda()
layers = [layer(n, 256) for n in (256, 512)]
with torch.no_grad():
    for each in layers:
        each(torch.randn(1, 32, 256, dtype=torch.bfloat16, device="cuda"))
    places, end = ahead._worker._given, time.monotonic() + 100
    while not all(place.exists() for place in places) and time.monotonic() < end:
        time.sleep(0.1)
    from bnbref.few_rows import multiply_rows
    for each in layers:
        each(torch.randn(1, 1, 256, dtype=torch.bfloat16, device="cuda"))
print(len(places), sum(place.exists() for place in places), len(multiply_rows.variants))
"""


@pytest.mark.cuda
def test_one_row_is_compiled_by_the_other_process(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split() == ["2", "2", "0"]
