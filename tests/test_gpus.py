"""benchmarks/gpus.py: which rows there are, and a tiny model on two ranks of gloo."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    return importlib.import_module("gpus")


def rows(gpus, folder, monkeypatch, *argv):
    """The jobs of a command, without running them."""
    found = []
    monkeypatch.setattr(gpus, "run", lambda job, left: found.append(job) or job.row(wall_s=0.0))
    gpus.main(["--device", "cpu", "--out", str(folder), *argv])
    return [(job.part, job.contender, job.shape, job.ranks) for job in found]


def test_all_weights_are_trained_by_optimizers_and_not_by_contenders(gpus, tmp_path, monkeypatch):
    argv = [
        "--only",
        "full",
        "exchange",
        "--shape",
        "13B",
        "8B",
        "--ranks",
        "1",
        "2",
        "--optimizers",
        "AdamW8bit",
        "AdamW",
    ]
    found = rows(gpus, tmp_path, monkeypatch, *argv, "--contenders", "bf16")
    assert found[:4] == [("full", name, "13B", ranks) for name in ("AdamW8bit", "AdamW") for ranks in (1, 2)]
    assert [row[2] for row in found[4:8]] == ["8B"] * 4
    assert found[8:] == [("exchange", "bnbref", "13B", 2)]


@pytest.mark.slow
def test_a_tiny_model_trains_all_weights_on_two_ranks(gpus, tmp_path):
    gpus.main(
        [
            "--device",
            "cpu",
            "--shape",
            "tiny",
            "--only",
            "full",
            "--optimizers",
            "AdamW8bit",
            "--ranks",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    (row,) = json.loads((tmp_path / "gpus-cpu.json").read_text(encoding="utf-8"))["runs"][0]["rows"]
    assert row["tokens/s"] > 0
    assert row["losses"][-1] < row["losses"][0]
