"""Models of every kind, quantized, saved, loaded and saved again: see `architectures.py`, which also writes the table."""

import pytest

hf = pytest.importorskip("bnbref.integrations.hf.transformers")
architectures = pytest.importorskip("architectures")

# One of each kind: packed projections, weight norm, experts, layers of their own kind, transposed ones, parts kept in float32.
FEW = ("llama4", "gemma3", "wav2vec2", "falcon", "gpt2", "jetmoe", "t5", "siglip")


@pytest.fixture(autouse=True)
def alone():
    """bnbref loads what says "bitsandbytes"."""
    hf.take_over_bitsandbytes()
    yield
    hf.give_back_bitsandbytes()


def test_the_table_has_every_kind_of_model():
    names = architectures.table()
    assert len(names) >= 60
    assert set(FEW) <= names.keys()


@pytest.mark.parametrize("name", FEW)
def test_what_is_saved_comes_back(name):
    kinds = ("nf4 nested", "int8")
    found = architectures.rows(name, kinds)
    assert f"| {found['nf4 nested'].quantized}, {found['int8'].quantized} |" in architectures.table()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.table())
def test_the_table_is_right(name):
    assert architectures.line(name) == architectures.table()[name]
