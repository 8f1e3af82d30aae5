"""Launches without Inductor's wrapper: which calls are taken for one launch, that the launch gets this call's tensors, and that
a later process finds it on disk if it would compile the same, and only then."""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys
import tempfile
import types
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bnbref.kernels
from bnbref import blockwise
from bnbref.codebooks import DYNAMIC, NF4, Codebook
from bnbref.kernels import REGISTRY, Kernel, formulations, kept_launches, launch, variants, what_runs
from bnbref.kernels.kept_launches import find, keep, place_of
from bnbref.kernels.variants import Variants
from bnbref.optim import master_weights, step

FUNCTION = 4711


def floats(address, n):
    return (ctypes.c_float * n).from_address(address)


def add(a, b, out, n):
    """Machine code: out = a + n * b, of 8 floats."""
    floats(out, 8)[:] = [x + n * y for x, y in zip(floats(a, 8), floats(b, 8), strict=True)]


def two_sums(a, low, high):
    """Machine code whose two results are halves of one tensor."""
    floats(low, 4)[:], floats(high, 4)[:] = [2 * x for x in floats(a, 4)], [3 * x for x in floats(a, 4)]


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    """A device whose tensors and machine code are on the CPU; its number and its machine code can be set."""
    now = SimpleNamespace(device=0, code=add, loaded=[])
    made = lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)  # noqa: E731

    def run(function, x, y, z, warps, shared, kinds, values, stream):
        assert (function, x, y, z, warps, shared, stream) == (FUNCTION, 8, 1, 1, 2, 64, 70)
        assert len(kinds) == len(values)
        assert all(isinstance(v, int) for v, k in zip(values[:3], kinds, strict=False) if k == "O")
        now.code(*[v for v in values if v is not None])

    def load(file, one, index):
        now.loaded.append(file)
        return FUNCTION

    monkeypatch.setattr(launch, "_runtime", lambda: (lambda: now.device, lambda index: 70, made, run))
    monkeypatch.setattr(kept_launches, "loaded", load)
    monkeypatch.setattr(kept_launches, "_functions", {})
    return now


def inductors(args, runner=None, **fields):
    """What Inductor has of a compiled kernel with these arguments, which torch's own launcher launches."""
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

    kernel = StaticallyLaunchedCudaKernel.__new__(StaticallyLaunchedCudaKernel)
    kinds = "".join("l" if name == "n" else "O" for name in args.split(", "))
    kernel.__dict__.update(name="triton_0", function=FUNCTION, num_warps=2, shared=64, arg_tys=kinds, hash="hash")
    kernel.__dict__.update(has_global_scratch=True, has_profile_scratch=False, **fields)
    scope = {"runner": kernel.run if runner is None else runner}
    exec(
        f"def launcher({args}, xnumel, stream):\n    runner(xnumel, 1, 1, stream, {args})", scope
    )  # as Inductor writes it
    return SimpleNamespace(launchers=[scope["launcher"]])


def recorded(*given, args="a, b, out, n", **fields):
    return [launch.Call(inductors(args, **fields), (*given, 8), {"stream": 70}, None)]


def ints(n):
    """Floats whose sums Python, which adds float64, and torch round alike."""
    return torch.randint(-99, 99, (n,) if isinstance(n, int) else n).float()


def tensors(*sizes):
    return [ints(size) for size in sizes]


def call_of(launched, given, result, tables=()):
    one, _ = launch.launched_alone(launched, given, tables, result)
    return launch.bound(one, FUNCTION, tables, len(given), 0)


def test_the_next_call_computes_with_its_own_tensors():
    a, b, out = tensors(8, 8, 8)
    call = call_of(recorded(a.view(2, 4), b, out, 3), [a, None, b], out)
    for _ in range(2):
        a, b = tensors(8, 8)
        [got] = call([a, None, b])
        assert torch.equal(got, a + 3 * b)
        assert got.data_ptr() not in (a.data_ptr(), b.data_ptr(), out.data_ptr())


def test_tables_stay():
    a, table, out = tensors(8, 8, 8)
    call = call_of(recorded(a, table, out, 3), [a], out, [table])
    expected, a = table.clone(), ints(8)
    del table
    others = tensors(*[8] * 20)  # would have its memory
    assert torch.equal(call([a])[0], a + 3 * expected)
    assert len(others) == 20


def test_two_tables_may_be_one():
    table, out = tensors(8, 8)
    assert torch.equal(call_of(recorded(table, table, out, 3), [], out, [table, table])([])[0], table * 4)
    a = table.view(8)  # an argument, which need not be the table's memory the next time
    assert launch.launched_alone(recorded(a, table, out, 3), [a], [table], out) is None


def test_what_writes_into_its_arguments():
    a, b, out = tensors(8, 8, 8)
    call = call_of(recorded(a, b, out, 3), [a, b, out], ())
    a, b, out = tensors(8, 8, 8)
    assert call([a, b, out]) == []
    assert torch.equal(out, a + 3 * b)


def test_parts_of_a_result(runtime):
    a, out = tensors(4, 8)
    call = call_of(recorded(a, out[:4], out[4:], args="a, low, high"), [a], out)
    runtime.code, a = two_sums, ints(4)
    assert torch.equal(call([a])[0], torch.cat([a * 2, a * 3]))


def test_what_was_not_compiled_for_is_not_launched(runtime):
    a, b, out = tensors(8, 8, 8)
    call = call_of(recorded(a, b, out, 3), [a, b], out)
    assert call([ints(9)[1:], b]) is None
    assert call([a, b]) is not None
    runtime.device = 1
    assert call([a, b]) is None


def test_a_tensor_that_was_freed_is_refused():
    a, b, out = tensors(8, 8, 8)
    call = call_of(recorded(a, b, out, 3), [a, b], out)
    b.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"of shape \(8,\) needs 32 bytes, and its storage has 0"):
        call([a, b])


def test_a_launch_is_for_the_device_of_its_arguments(monkeypatch):
    """Inductor's code makes it the current one for a while. Afterwards another one may be."""
    seen, kernel = [], REGISTRY["dequantize_rows"]
    given = [torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1)]
    one = SimpleNamespace(several=False), SimpleNamespace(function=FUNCTION)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(variants, "launches", lambda: contextlib.nullcontext([1]))
    monkeypatch.setattr(variants, "_compiled", lambda *_: lambda *_: torch.zeros(2, 64))
    monkeypatch.setattr(variants, "direct", lambda *_: print)
    monkeypatch.setattr(variants, "launched_alone", lambda *_: one)
    monkeypatch.setattr(variants, "bound", lambda *given: seen.append(given[-1]))
    calls = Variants("name", kernel.parameters)
    calls.call("cuda", formulations.Formulation(kernel.definition), given, (), {"codebook": NF4}, False, None)
    assert seen == [given[0].device.index]


def refused():
    """What was recorded, of which arguments, with which results, by why it is refused."""
    a, b, out = tensors(8, 8, 8)
    one = recorded(a, b, out, 3)
    two = [launch.Call(SimpleNamespace(launchers=one[0].of.launchers * 2), one[0].args, {"stream": 70}, None)]
    yield "no launch", [], [a, b], out
    yield "two launches", one + one, [a, b], out
    yield "two choices", two, [a, b], out
    yield "an option", [one[0]._replace(kwargs={"stream": 70, "grid": 1})], [a, b], out
    yield "a launch by way of Triton", recorded(a, b, out, 3, runner=print), [a, b], out
    yield "machine code of each device", recorded(a, b, out, 3, function=None), [a, b], out
    yield "an input that is no argument", one, [a, ints(8)], out
    yield "a part of an argument", recorded(a[:4], b[4:], out[:4], 3), [a, b], out[:4].clone()
    yield "an argument twice", recorded(a, a, out, 3), [a, a], out
    yield "a result in place", recorded(a, b, a, 3), [a, b], a
    yield "a part of a result", one, [a, b], out[:4]
    yield "a result that is not launched for", one, [a, b], (out, ints(8))
    yield "nothing", recorded(a[:0], b[:0], out[:0], 3), [a[:0], b[:0]], torch.empty(0)


@pytest.fixture(scope="module", params=range(13))
def case(request):
    with pytest.MonkeyPatch.context():
        return list(refused())[request.param]


def test_what_may_be_more_than_one_launch_is_left_to_inductor(case):
    why, launched, given, result = case
    assert launch.launched_alone(launched, given, (), result) is None, why


# ---- on disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Inductor's folder, with the machine code that Triton wrote for the kernel, on a machine with a GPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    runtime_utils = importlib.import_module("torch._inductor.runtime.runtime_utils")
    monkeypatch.setattr(runtime_utils, "triton_hash_to_path_key", lambda key: key)
    code = tmp_path / "triton" / "0" / "hash" / "triton_0.cubin"
    code.parent.mkdir(parents=True)
    code.write_bytes(b"machine code")
    monkeypatch.setattr(what_runs, "_machine", lambda device: ("a machine", what_runs._workshop()))
    return tmp_path / "bnbref"


def functions(name="dequantize_rows"):
    kernel = REGISTRY[name]
    return [f for f in (kernel.definition, kernel.formulation.body, kernel.formulation.tables) if f is not None]


def place(args=None, name="dequantize_rows", **constants):
    args = [torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1)] if args is None else args
    return place_of(functions(name), args, {"codebook": NF4, "blocksize": 64, "dtype": torch.float32, **constants})


def test_a_launch_is_found_as_it_was_kept(folder, runtime, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    a, b, out = tensors(8, 8, (2, 4))
    one, kernel = launch.launched_alone(recorded(a, b, out, 3), [a, b], (), (out,))
    assert find(place(), 0) is None
    keep(place(), one, kernel, 0)
    assert find(place(), 0) == (one, FUNCTION) == find(place(), 0)
    assert runtime.loaded == [str(folder / f"{hashlib.sha256(b'machine code').hexdigest()}.cubin")]  # once
    assert len(list(folder.iterdir())) == 2
    keep(place(blocksize=128), one, kernel, 0)
    assert len(list(folder.iterdir())) == 3  # the machine code is there

    calls = Variants("name", REGISTRY["dequantize_rows"].parameters)
    found = calls.kept([a, b], (), False, place(), otherwise=lambda args: "otherwise")
    assert torch.equal(found([a, b])[0], (a + 3 * b).view(2, 4))
    assert found([ints(9)[1:], b]) == "otherwise"
    assert calls.kept([a, b], (), False, folder / "other.json", otherwise=print) is None


def test_who_may_read_other_files_of_the_folder_may_read_these(folder):
    """As users who share Inductor's folder."""
    a, b, out = tensors(8, 8, 8)
    keep(place(), *launch.launched_alone(recorded(a, b, out, 3), [a, b], (), out), 0)
    (folder / "other").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "other").stat().st_mode}


def test_the_folder_does_not_grow_for_ever(folder, monkeypatch):
    a, b, out = tensors(8, 8, 8)
    monkeypatch.setattr(kept_launches, "_MOST_FILES", 5)
    for blocksize in range(1, 10):
        keep(place(blocksize=blocksize), *launch.launched_alone(recorded(a, b, out, 3), [a, b], (), out), 0)
        assert find(place(blocksize=blocksize), 0) is not None
        assert len(list(folder.iterdir())) <= 5


@pytest.mark.parametrize(
    "broken",
    [
        "", "{}", '{"launch": {}}', '{"launch": {}, "cubin": "no.cubin"}', "[1]", '{"launch": {', '{"launch": 1, "cubin": "%s"}',
        '{"launch": {}, "cubin": "%s"}', '{"launch": {"grid": 1, "arguments": [], "results": []}, "cubin": "%s"}',
        '{"launch": {"grid": [], "arguments": [], "results": [[[], [], "no"]]}, "cubin": "%s"}',
    ],
)  # fmt: skip
def test_what_is_not_whole_is_not_there(folder, broken):
    folder.mkdir()
    code = f"{hashlib.sha256(b'').hexdigest()}.cubin"
    (folder / code).touch()
    place().write_text(broken.replace("%s", code))
    assert find(place(), 0) is None


def test_what_cannot_be_loaded_or_kept_is_compiled(folder, monkeypatch):
    def too_old(*_):
        raise RuntimeError("CUDA driver error: device kernel image is invalid")

    a, b, out = tensors(8, 8, 8)
    monkeypatch.setattr(kept_launches, "loaded", too_old)
    keep(place(), *launch.launched_alone(recorded(a, b, out, 3), [a, b], (), out), 0)
    assert find(place(), 0) is None
    place().unlink()
    place().mkdir()  # which no file can take the place of
    keep(place(), *launch.launched_alone(recorded(a, b, out, 3), [a, b], (), out), 0)
    assert sorted(path.suffix for path in folder.iterdir()) == [".cubin", ".json"]  # no part of a file


def test_machine_code_that_is_cut_off_is_not_loaded(folder, runtime):
    a, b, out = tensors(8, 8, 8)
    keep(place(), *launch.launched_alone(recorded(a, b, out, 3), [a, b], (), out), 0)
    (code,) = folder.glob("*.cubin")
    code.write_bytes(b"machine")
    assert find(place(), 0) is None
    assert runtime.loaded == []
    keep(place(), *launch.launched_alone(recorded(a, b, out, 3), [a, b], (), out), 0)  # what was compiled instead
    assert find(place(), 0) is not None


def test_a_folder_that_cannot_be_written(folder):
    a, b, out = tensors(8, 8, 8)
    folder.write_text("a file")
    keep(place(), *launch.launched_alone(recorded(a, b, out, 3), [a, b], (), out), 0)
    assert find(place(), 0) is None


@pytest.mark.parametrize("name", kept_launches._WATCHED)
def test_nothing_is_kept_for_those_who_watch_the_compiler(folder, monkeypatch, name):
    assert place() is not None
    monkeypatch.setenv(name, "1")
    assert place() is None


@pytest.mark.parametrize("imported", [True, False])
def test_nothing_is_kept_without_caches(folder, monkeypatch, imported):
    """torch reads its two variables for it into this setting. Inductor, which kept launches do not need, may not be there."""
    if not imported:
        monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)
    with torch.compiler.config.patch(force_disable_caches=True):
        assert place() is None
    assert place() is not None


@pytest.mark.parametrize("fault", [None, ImportError, KeyError, OSError])
def test_the_folder_is_inductor_s(monkeypatch, fault):
    """Also before Inductor has entered it into the environment, and of a user without a name, as in many a container."""
    cache_dir_utils = importlib.import_module("torch._inductor.runtime.cache_dir_utils")
    fault = ModuleNotFoundError if fault is ImportError else fault
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    user = mock.Mock(return_value="some/bo:dy", side_effect=fault)
    monkeypatch.setattr(kept_launches.getpass, "getuser", user)
    own = str(kept_launches._folder())
    try:
        folder = cache_dir_utils.default_cache_dir()
    except (ModuleNotFoundError, KeyError, OSError):  # torch 2.11 has none for such a user: that of a newer one
        folder = os.path.join(tempfile.gettempdir(), f"torchinductor_uid_{os.getuid()}")
    assert own == os.path.join(folder, "bnbref")


def other(x):
    return x


def test_a_kept_launch_that_does_not_fit_is_compiled_once(folder, monkeypatch):
    """Products keep what `ready` returned: the launch on disk, which is not for a tensor whose address is not aligned."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU
    kernel, compiled = Kernel(add, {}), []
    monkeypatch.setattr(kernel, "_place", lambda *_: place())
    monkeypatch.setattr(kernel.variants, "kept", lambda *args: args[-1])

    def through(*_):
        compiled.append(1)
        return "compiled", lambda args: "again"

    monkeypatch.setattr(kernel, "_through_dynamo", through)
    kept = kernel._kept(tensors(8, 8), {})
    assert [kept(tensors(8, 8)) for _ in range(3)] == ["compiled", "again", "again"]
    assert compiled == [1]


def test_a_digest_tells_calls_apart():
    two, one = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1)
    calls = [
        place(), place([torch.zeros(32, 2, dtype=torch.uint8).T, one]),
        place([two[:1], one[:1]]), place([two.int(), one]), place([two.T, one]), place([two, one, None]),
        place(blocksize=128), place(blocksize=64.0), place(dtype=torch.bfloat16), place(name="quantize_rows"),
        place(codebook=DYNAMIC), place(codebook=Codebook("own", NF4.values, NF4.values[1:])),
    ]  # fmt: skip
    assert None not in calls
    assert len(set(calls)) == len(calls)
    assert place(codebook=object()) is None  # of which nobody knows what it is
    assert place_of([*functions(), other], [two, one], {}) is None  # a stranger's kernel


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(what_runs, "_machine", lambda device: ("a machine", what_runs._workshop()))


numbers = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=16, unique=True)


@settings(deadline=None, max_examples=50)
@given(numbers, numbers)
def test_own_codebooks_share_what_they_compile_if_they_are_equal(one, two):
    books = [Codebook.nearest("own", sorted(values)) for values in (one, two, one)]
    first, second, again = [place(codebook=book) for book in books]
    assert first == again
    assert (first == second) == (books[0] == books[1])


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        ("bnbref.kernels.decoding", "rounded_bits", lambda x, dtype: x),
        ("bnbref.kernels.decoding", "WORD", 8),
        ("bnbref.kernels.floats", "widen", lambda x, dtype: x),
        ("bnbref.kernels.compiler", "is_gpu", lambda x: True),
    ],
)
def test_a_function_that_somebody_replaced_is_another(monkeypatch, module, name, value):
    """Also one that is reached by way of others: `rounded_bits` widens; of `compiler` decoding imports the function."""
    before = {kernel: place(name=kernel) for kernel in ("dequantize_rows", "multiply_rows")}
    monkeypatch.setattr(module + "." + name, value)
    decoding = importlib.import_module("bnbref.kernels.decoding")
    if hasattr(decoding, name):
        monkeypatch.setattr(decoding, name, value)
    after = {kernel: place(name=kernel) for kernel in before}
    assert any(before[kernel] != after[kernel] for kernel in before)
    monkeypatch.undo()
    monkeypatch.setattr(what_runs, "_machine", lambda device: ("a machine", what_runs._workshop()))
    assert {kernel: place(name=kernel) for kernel in before} == before


def unfinished():
    def call(x):
        return later(x)

    if not call:
        later = None
    return call


def test_what_may_take_the_place_of_a_function(monkeypatch):
    """Another function that is reached anyway, one of Python's, one that closes over what is not there yet; and what nobody
    knows, as a partial function, for which nothing is kept."""
    digests = [place(name="step_blocks")]
    for one in (step.rounded, step.largest, max, min, unfinished()):
        monkeypatch.setattr(step, "magnitude", one)
        digests.append(place(name="step_blocks"))
    assert None not in digests
    assert len(set(digests)) == len(digests)
    for one in (functools.partial(max, 1), [].append, mock.Mock()):
        monkeypatch.setattr(step, "magnitude", one)
        assert place(name="step_blocks") is None


def test_another_machine_is_another(monkeypatch):
    before = place()
    monkeypatch.setattr(what_runs, "_machine", lambda device: ("another machine", what_runs._workshop()))
    assert place() != before


def test_a_set_has_no_order():
    letters = what_runs._constant(frozenset("abcdefghijklmnop"))
    assert letters.startswith("{str 'a', str 'b', str 'c', str 'd', str 'e', ")


# How a program reaches the function `inner`. `{}` is its name there, since a name counts as well.
WAYS = {
    "its name": "def {}(): return inner()",
    "a default": "def {}(f=inner): return f()",
    "a default by name": "def {}(*, f=inner): return f()",
    "a closure": "def outer(f):\n    def {}(): return f()\n    return {}\n{} = outer(inner)",
    "a function in it": "def {}():\n    def own(): return inner()\n    return own()",
    "a module": "module = ModuleType('bnbref.other')\nmodule.f = inner\ndef {}(): return module.f()",
    "a tuple": "all = (inner,)\ndef {}(): return all[0]()",
    "a list": "all = [inner]\ndef {}(): return all[0]()",
    "a dict": "all = {{'one': inner}}\ndef {}(): return all['one']()",
    "a cache": "kept = cache(inner)\ndef {}(): return kept()",
    "a decorator": "@wraps(inner)\ndef {}(): return kept()\nkept = 1",
    "a method": "class Own:\n    def f(self): return inner()\ndef {}(): return Own().f()",
    "a property": "class Own:\n    @property\n    def f(self): return inner()\ndef {}(): return Own().f",
    "a kept property": "class Own:\n    @cached_property\n    def f(self): return inner()\ndef {}(): return Own().f",
    "a class method": "class Own:\n    @classmethod\n    def f(cls): return inner()\ndef {}(): return Own.f()",
    "a static method": "class Own:\n    @staticmethod\n    def f(): return inner()\ndef {}(): return Own.f()",
    "a base": "class Base:\n    def f(self): return inner()\nclass Own(Base): pass\ndef {}(): return Own().f()",
    "a field": "@dataclass\nclass Own:\n    f: object\none = Own(inner)\ndef {}(): return one.f()",
}  # fmt: skip
# How a function reaches a value.
LEAVES = {
    "a global": "def {}(): return value",
    "a default": "def {}(x=value): return x",
    "a default by name": "def {}(*, x=value): return x",
    "a closure": "def outer(x):\n    def {}(): return x\n    return {}\n{} = outer(value)",
    "a module": "module = ModuleType('bnbref.other')\nmodule.x = value\ndef {}(): return module.x",
    "a class": "class Own:\n    x = value\ndef {}(): return Own.x",
    "a base": "class Base:\n    x = value\nclass Own(Base): pass\ndef {}(): return Own.x",
    "a field": "@dataclass\nclass Own:\n    x: object\none = Own(value)\ndef {}(): return one.x",
    "an identity": "class Own: pass\none = Own()\none._identity = (value,)\ndef {}(): return one._identity[0]",
}  # fmt: skip
VALUES = [
    0, 1, True, False, None, 1.0, 0.0, -0.0, 1j, "1", b"1", ..., torch.float16, torch.bfloat16, (1,), [1], {1: 2}, {2: 1},
    max, min,
]  # fmt: skip


def reaching(ways, leaf, value):
    """A function of bnbref that reaches a value through others."""
    known = {
        "ModuleType": types.ModuleType, "dataclass": dataclasses.dataclass, "cached_property": functools.cached_property,
        "wraps": functools.wraps, "cache": functools.cache, "__name__": "bnbref.own", "value": value,
    }  # fmt: skip
    for i, text in enumerate([LEAVES[leaf], *(WAYS[way] for way in ways)]):
        scope, name = dict(known), f"f{i}"
        exec(text.format(name, name, name), scope)
        known["inner"] = scope[name]
    return known["inner"]


@pytest.mark.parametrize("leaf", LEAVES)
def test_each_way_to_what_a_kernel_computes_with_counts(leaf):
    """A digest that did not see it would give a process the machine code of another function."""
    for way in (None, *WAYS):
        ways = [] if way is None else [way]
        one, two = [what_runs.digest([reaching(ways, leaf, value)], [torch.zeros(2)], {}) for value in (1, 2)]
        assert None not in (one, two), way
        assert one != two, way


several_ways, values = st.lists(st.sampled_from(sorted(WAYS)), max_size=3), st.sampled_from(VALUES)


@given(several_ways, st.sampled_from(sorted(LEAVES)), values, values)
def test_whatever_a_kernel_computes_with_counts(ways, leaf, one, two):
    """By several ways one after another, and not what is equal."""
    first, again, other = [
        what_runs.digest([reaching(ways, leaf, value)], [torch.zeros(2)], {}) for value in (one, one, two)
    ]
    assert first == again is not None
    assert (first == other) == ((type(one), repr(one)) == (type(two), repr(two)))


def test_every_file_of_the_workshop_counts(monkeypatch):
    """Also what no name leads to from the definition: options, and the code that writes kernels."""
    names = [module.name for module in pkgutil.iter_modules(bnbref.kernels.__path__, "bnbref.kernels.")]
    codes = {name: importlib.util.find_spec(name).loader.get_code(name) for name in names}
    workshop, before = what_runs._workshop.__wrapped__, what_runs._workshop()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: mock.Mock(loader=mock.Mock(get_code=codes.get)))
    assert workshop() == before
    for name in names:
        with mock.patch.dict(codes, {name: compile("1", "file", "exec")}):
            assert workshop() != before
    for loader in (None, mock.Mock(spec=()), mock.Mock(get_code=lambda name: None)):  # as in a frozen program
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, loader=loader: mock.Mock(loader=loader))
        with pytest.raises(what_runs.Unknown):
            workshop()


def test_a_constant_of_a_function_in_a_function_counts():
    text = "def one(x):\n    def two(): return x in {}\n    return two"
    codes = [compile(text.format(s), "file", "exec") for s in ("(1, 2)", "(1, 3)", "{1, 2}", "{2, 1}", "(1, (2, {3}))")]
    assert len({what_runs._code(code) for code in codes}) == 4  # two of them are one set


def test_a_method_of_a_base_counts(monkeypatch):
    base = type("Base", (), {"__module__": "bnbref.own", "value": lambda self: 1})
    value = type("Value", (base,), {"__module__": "bnbref.own", "_identity": ()})()
    before = place(codebook=value)
    monkeypatch.setattr(base, "value", lambda self: 2)
    assert place(codebook=value) not in (None, before)


def test_a_number_in_a_dict_counts(monkeypatch):
    lines, before = dict(master_weights._LINES), place(name="step_blocks")
    line = lines[torch.bfloat16]
    monkeypatch.setattr(master_weights, "_LINES", {**lines, torch.bfloat16: line._replace(scale=2.0)})
    assert place(name="step_blocks") != before
    monkeypatch.setattr(master_weights, "_LINES", dict(reversed(lines.items())))
    assert place(name="step_blocks") == before


def test_a_method_that_somebody_replaced_is_another(monkeypatch):
    before = place()
    monkeypatch.setattr(Codebook, "__post_init__", lambda self: None)
    assert place() != before


def test_processes_agree(folder):
    """Hashes of strings, addresses and the order of imports differ."""
    program = (
        "import sys, torch; from bnbref.kernels import REGISTRY, what_runs; from bnbref.codebooks import NF4\n"
        "what_runs._machine = lambda device: ('a machine', what_runs._workshop())\n"
        "for name in ('dequantize_rows', 'multiply_rows', 'quantize_blocks', 'step_blocks'):\n"
        "    k = REGISTRY[name]; f = [f for f in (k.definition, k.formulation.body, k.formulation.tables) if f is not None]\n"
        "    print(what_runs.digest(f, [torch.zeros(2, 3), None], {'codebook': NF4, 'dtype': torch.half}))"
    )
    said = [
        subprocess.run(
            [sys.executable, *options, "-c", first + program], capture_output=True, text=True, check=True
        ).stdout
        for options, first in (
            (("-W", "ignore"), ""),
            (("-B",), "import bnbref.optim, bnbref.nn, torch._inductor.config\n"),
        )
    ]
    assert said[0] == said[1]
    assert len(set(said[0].split())) == 4


def test_every_kernel_has_a_digest_in_which_its_own_functions_count():
    formulations.load()
    for name, kernel in REGISTRY.items():
        if kernel.definition.__module__.startswith("bnbref."):
            found = what_runs.digest(functions(name), [torch.zeros(2)], {})
            assert found is not None
            assert found != what_runs.digest([blockwise.encode], [torch.zeros(2)], {})


PROGRAM = """
import sys, torch, bnbref
from bnbref.kernels import REGISTRY
torch.manual_seed(0)
linear = torch.nn.Linear(256, 64).to(torch.bfloat16)
layer = bnbref.nn.Linear4bit(256, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
layer.load_state_dict(linear.state_dict())
with bnbref.eager():
    layer = layer.cuda()
p = torch.nn.Parameter(torch.randn(64, 256, device="cuda"))
optimizer = bnbref.optim.AdamW8bit([p], lr=1e-2)
with torch.no_grad():
    for rows in (1, 32):
        print(layer(torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)).float().sum(0).tolist())
for _ in range(3):
    p.grad = torch.randn_like(p)
    optimizer.step()
print(p.sum(0).tolist())
print("compiler", "torch._inductor.compile_fx" in sys.modules, {k: len(v.variants) for k, v in REGISTRY.items() if v.variants})
"""


@pytest.mark.cuda
def test_a_later_process_compiles_nothing(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, env=environment)
    first, second = (run([sys.executable, "-c", PROGRAM]).stdout.splitlines() for _ in range(2))
    assert first[-1].startswith("compiler True")
    assert second[-1] == "compiler False {}"
    assert first[:-1] == second[:-1]
