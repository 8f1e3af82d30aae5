"""Look-ups by address, whose instructions are run one by one here: they load what a plain look-up finds."""

import ctypes
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

from bnbref.kernels import by_address, taught
from bnbref.kernels.by_address import addressed, look_up

CPU = torch.device("cpu")


def ptx(text, *operands):
    """The instructions of an inline assembly, run; $0 is the result, $1 the first operand."""
    names = {f"${i + 1}": value for i, value in enumerate(operands)}

    def read(name):
        return names[name] if name in names else int(name, 0)

    for line in filter(None, (part.strip() for part in text.strip("{} ").split(";"))):
        if found := re.fullmatch(r"mad\.wide\.u32 (\S+), (\S+), (\S+), (\S+)", line):
            a, b, c = map(read, found.groups()[1:])
            names[found[1]] = (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF) + c
        elif found := re.fullmatch(r"setp\.ne\.b64 (\S+), (\S+), (\S+)", line):
            names[found[1]] = read(found[2]) != read(found[3])
        elif found := re.fullmatch(r"@(\S+) ld\.global\.nc\.b64 (\S+), \[(\S+)\]", line):
            if names[found[1]]:
                names[found[2]] = ctypes.c_int64.from_address(read(found[3])).value
        elif not line.startswith(".reg"):
            raise AssertionError(f"an instruction that is not emulated: {line!r}")
    return names.get("$0")


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_the_instructions_load_what_a_look_up_finds(entries):
    table = addressed(torch.tensor(entries), CPU)
    index = torch.arange(len(entries), dtype=torch.int32)
    assert look_up(table, index).tolist() == entries
    assert [ptx(by_address._LOAD, table.data_ptr(), i) for i in index.tolist()] == entries
    assert ptx(by_address._LOAD, 0, 7) is None  # a lane beyond the end of the tensors, whose address is 0


def test_a_table_on_a_gpu_ends_with_its_address(monkeypatch):
    """Its own, as it lies there: pretended by a device that makes its tensors on the CPU."""

    class Device:
        type = "cuda"

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype, device=CPU))
    table = addressed(torch.tensor([5, 6, 7]), Device())
    assert table.tolist() == [5, 6, 7, table.data_ptr()]


def test_the_operator_is_whole():
    table = addressed(torch.tensor([5, 6, 7]), CPU)
    index = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    library.opcheck(torch.ops.bnbref.entry_at.default, (table, index))


@pytest.mark.parametrize("lacks", ["an operation", "a lowering", "a GPU of NVIDIA's"])
def test_inductor_is_taught_nothing_where_it_is_not_as_expected(lacks, monkeypatch):
    from torch._inductor import lowering
    from torch._inductor.ops_handler import OpsHandler

    learn = taught._taught.__wrapped__
    monkeypatch.setattr(lowering, "register_lowering", lambda *args, **options: lambda function: function)
    assert learn("entry_at")
    if lacks == "an operation":
        monkeypatch.delattr(OpsHandler, "inline_asm_elementwise")
    elif lacks == "a lowering":
        monkeypatch.delattr(lowering, "register_lowering")
    else:
        monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not learn("entry_at")
