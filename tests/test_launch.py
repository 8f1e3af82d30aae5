"""Launches without Inductor's wrapper: which calls are taken for one launch, and that the launch gets this call's tensors."""

import ctypes

import pytest
import torch

from bnbref.kernels import launch


class Kernel:
    """A Triton kernel as Inductor holds it: out = a + n * b, elementwise on what the addresses name."""

    def __init__(self):
        self.launchers = [self.launcher]

    def launcher(self, a, b, n, out, *, stream):
        assert stream == 70
        out.copy_(a.view_as(out) + n * b.view_as(out))


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    """A device whose tensors are on the CPU; its number can be set."""
    now = [0]
    made = lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(launch, "_runtime", lambda: (lambda: now[0], lambda index: 70, made))
    monkeypatch.setattr(torch.Tensor, "device", property(lambda t: torch.device("cuda", 0)))
    return now


def recorded(a, b, out, n=3, kernel=None):
    kernel = kernel or Kernel()
    kernel.launcher(a, b, n, out, stream=70)
    return [launch.Call(kernel, (a, b, n, out), {"stream": 70}, None)]


def tensors(*sizes):
    return [torch.randn(size) for size in sizes]


def test_the_next_call_computes_with_its_own_tensors():
    a, b, out = tensors(8, 8, 8)
    call = launch.launch_alone(recorded(a.view(2, 4), b, out), [a, None, b], 3, [out])
    for _ in range(2):
        a, b = tensors(8, 8)
        [got] = call([a, None, b])
        assert torch.equal(got, a + 3 * b)
        assert got.data_ptr() not in (a.data_ptr(), b.data_ptr(), out.data_ptr())


def test_tables_stay():
    a, table, out = tensors(8, 8, 8)
    call = launch.launch_alone(recorded(a, table, out), [a, table], 1, [out])
    a = torch.randn(8)
    assert torch.equal(call([a])[0], a + 3 * table)


class TwoSums:
    """Two kernels in one: their results are the halves of one tensor, of which a launch gets the addresses."""

    def __init__(self):
        self.launchers = [self.launcher]

    def launcher(self, a, low, high, *, stream):
        for out, factor in ((low, 2), (high, 3)):
            address = out if isinstance(out, int) else out.data_ptr()
            (ctypes.c_float * 4).from_address(address)[:] = (a * factor).tolist()


def test_parts_of_a_result():
    a, out = tensors(4, 8)
    launched = launch.Call(TwoSums(), (a, out[:4], out[4:]), {"stream": 70}, None)
    call = launch.launch_alone([launched], [a], 1, [out])
    a = torch.randn(4)
    assert torch.equal(call([a])[0], torch.cat([a * 2, a * 3]))


def test_what_was_not_compiled_for_is_not_launched(runtime):
    a, b, out = tensors(8, 8, 8)
    call = launch.launch_alone(recorded(a, b, out), [a, b], 2, [out])
    assert call([torch.randn(9)[1:], b]) is None
    assert call([a, b]) is not None
    runtime[0] = 1
    assert call([a, b]) is None


class Untuned(Kernel):
    def __init__(self):
        self.launchers = [self.launcher, self.launcher]


def refused():
    """What was recorded, of which arguments, with which results, by why it is refused."""
    a, b, out = tensors(8, 8, 8)
    one = recorded(a, b, out)
    yield "no launch", [], [a, b], [out]
    yield "two launches", one + one, [a, b], [out]
    yield "two choices", recorded(a, b, out, kernel=Untuned()), [a, b], [out]
    yield "an option", [one[0]._replace(kwargs={"stream": 70, "grid": 1})], [a, b], [out]
    yield "an input that is no argument", one, [a, torch.randn(8)], [out]
    yield "a part of an argument", recorded(a[:4], b[4:], out[:4]), [a, b], [out[:4].clone()]
    yield "an argument twice", recorded(a, a, out), [a, a], [out]
    yield "a result in place", recorded(a, b, a), [a, b], [a]
    yield "a part of a result", one, [a, b], [out[:4]]
    yield "a result that is not launched for", one, [a, b], [out, torch.randn(8)]
    yield "nothing", recorded(a[:0], b[:0], out[:0]), [a[:0], b[:0]], [torch.empty(0)]


@pytest.mark.parametrize("case", list(refused()), ids=lambda case: case[0])
def test_what_may_be_more_than_one_launch_is_left_to_inductor(case):
    _, launches, given, results = case
    assert launch.launch_alone(launches, given, len(given), results) is None
