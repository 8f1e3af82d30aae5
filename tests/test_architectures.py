"""Models of every kind, quantized, saved, loaded and saved again: see `architectures.py`, which also writes the table."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("bnbref.integrations.transformers")
import transformers

import architectures
from bnbref.integrations import transformers as hf

PAGE = Path(__file__).resolve().parent.parent / "docs" / "content" / "architectures.md"

# One of each kind: packed projections, weight norm, experts, layers of their own kind, transposed ones, codes cast by the model.
FEW = ("llama4", "gemma3", "wav2vec2", "falcon", "gpt2", "jetmoe", "longt5", "siglip")


@pytest.fixture(autouse=True)
def alone():
    """bnbref loads what says "bitsandbytes"."""
    hf.take_over_bitsandbytes()
    yield
    hf.restore()


def table():
    """The lines of the page's table, by architecture."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def test_the_table_has_every_kind_of_model():
    assert list(table()) == [name for name in architectures.NAMES if name in table()]
    assert len(table()) >= 60
    assert set(FEW) <= table().keys()


@pytest.mark.parametrize("name", FEW)
def test_what_is_saved_comes_back(name):
    kinds = ("nf4 nested", "int8")
    found = architectures.rows(name, kinds)
    assert f"| {found['nf4 nested'].quantized}, {found['int8'].quantized} |" in table()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", table())
def test_the_table_is_right(name):
    assert architectures.line(name) == table()[name], transformers.__version__
