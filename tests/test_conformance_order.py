"""The order of a sum, found by calling it, is the order in which it was made."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnbref.cli import main
from bnbref.conformance import backends
from bnbref.conformance.order import Probe, as_json, as_text, orders, product, report
from bnbref.conformance.trees import in_words, leaves


def trees(elements):
    """Trees of these elements, of additions of two and of several at once."""
    if len(elements) == 1:
        return st.just(elements[0])
    cuts = st.lists(st.integers(1, len(elements) - 1), min_size=1, max_size=3, unique=True).map(sorted)
    parts = cuts.map(lambda at: [elements[a:b] for a, b in zip([0, *at], [*at, len(elements)], strict=True)])
    return parts.flatmap(lambda found: st.tuples(*map(trees, found)))


def summed(tree, row):
    """Several at once are aligned to the largest, as in a tensor core: what is too small beside it is lost."""
    if isinstance(tree, int):
        return row[tree]
    terms = [summed(child, row) for child in tree]
    return math.fsum([term for term in terms if abs(term) > 2.0**50] or terms)


def unordered(tree):
    return tree if isinstance(tree, int) else frozenset(map(unordered, tree))


@given(st.permutations(range(9)).flatmap(trees), st.integers(1, 4), st.sampled_from([1.0, 0.75]))
def test_the_tree_of_a_sum_is_found(tree, rows, weight):
    def multiply(a):
        return torch.tensor([[summed(tree, [float(x) * weight for x in row])] for row in a], dtype=torch.float64)

    found = Probe(multiply, 9, rows, torch.float32).tree()
    assert sorted(leaves(found)) == list(range(9))
    assert unordered(found) == unordered(tree)
    assert in_words(found)


def test_what_is_no_sum_has_no_order():
    seen = []

    def multiply(a):
        seen.append(0)
        return torch.tensor([[float(len(seen))] for _ in a])

    assert orders(multiply, 8, torch.float32)[0]["order"].startswith("no tree: ")


@pytest.mark.parametrize("answer", [0.0, math.nan, math.inf])
def test_a_product_that_is_no_number_has_no_order(answer):
    found = orders(lambda a: torch.full((len(a), 1), answer), 8, torch.float32)
    said = f"no tree: the product with a single one is {answer}, must be a number that is not 0"
    assert {entry["order"] for entry in found} == {said}


def test_what_does_not_cancel_has_no_order():
    (found,) = orders(lambda a: a.sum(1, keepdim=True).where(a.max() < 2, math.inf), 8, torch.float32)
    assert found["order"].endswith("do not cancel: the product with them and ones is inf")


def test_in_a_fixed_order_a_row_does_not_depend_on_the_batch():
    found = report(backends.load("bnbref-invariant"), n=2, sizes=(64,))
    assert [len(entry["anywhere"]) for entry in found] == [10, 10]
    assert {entry["order"] for entry in found} == {", ".join(f"pairs by {2**i}" for i in range(6))}


def test_a_product_of_another_device_is_asked_there():
    seen = []

    def gemm_4bit(a, packed, absmax, shape, **_):
        seen.append({t.device.type for t in (a, packed, absmax)})
        return torch.empty(*a.shape[:-1], shape[0], device="cpu")

    product(backends.Backend("mine", {"gemm_4bit": gemm_4bit}), 2, 64, torch.device("meta"))(torch.ones(3, 64))
    assert seen == [{"meta"}]
    ones = type("Mine", (), {"gemm_4bit": gemm_4bit, "product_of_ones": print})
    with pytest.raises(ValueError, match="multiplies on the CPU, got device 'meta'"):
        product(backends.Backend("mine", ones), 2, 64, torch.device("meta"))


def test_options_of_cases_are_refused_by_name(capsys):
    assert main(["check", "--order", "--html", "x.html", "--markdown", "x.md", "--quick"]) == 2
    assert "got --quick, --markdown, --html" in capsys.readouterr().err
    assert main(["check", "--order", "--jobs", "0", "--fail-on", "defect"]) == 2
    assert "got --jobs, --fail-on" in capsys.readouterr().err
    assert main(["check", "--list", "--order", "--device", "cpu"]) == 2
    assert "--list goes alone, got --order, --device" in capsys.readouterr().err


def test_a_backend_without_a_product_has_none():
    with pytest.raises(ValueError, match="has no gemm_4bit"):
        product(backends.Backend("mine", {"int8_matmul": print}), 64, 64)


def test_a_batch_in_which_a_row_depends_on_its_place_has_a_star():
    entry = {"dtype": "float32", "columns": 128, "order": "64 by 2", "batches": [1, 7], "anywhere": [1]}
    backend = backends.load("bnbref-eager")
    lines = as_text(backend, torch.device("cpu"), [entry]).split("\n")
    assert lines[1:] == [
        "float32, 128 columns, batches of 1 7*", "    64 by 2", "* a row has other bits in another place of the batch",
    ]  # fmt: skip
    assert "*" not in as_text(backend, torch.device("cpu"), [{**entry, "anywhere": [1, 7]}])
    body = json.loads(as_json(backend, torch.device("cpu"), [entry]))
    assert body == {"backend": "bnbref-eager", "device": "cpu", "versions": backend.versions, "orders": [entry]}
