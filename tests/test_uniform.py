"""Numbers that are the same for all lanes: where they are loaded from, and that Inductor does not see it."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

from bnbref.kernels.uniform import place_of


@given(k=st.integers(0, 2**17), n=st.integers(0, 2**62))
def test_the_place_is_the_number_s_own(k, n):
    assert place_of(k, n) == k


def test_the_place_is_no_constant_where_the_rows_vary():
    """Else Inductor masks the number. What it writes is claimed in tests/test_codegen.py."""
    import sympy

    n = sympy.Symbol("n", integer=True, positive=True)
    assert place_of(3, n).free_symbols == {n}


def test_the_operator_is_whole():
    for numbers in (torch.tensor([0.5, 2.0]), torch.tensor([5, 6, 7])):
        library.opcheck(torch.ops.bnbref.uniform.default, (numbers, torch.ones(3, 256)))
