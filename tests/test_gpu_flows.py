"""benchmarks/gpu_flows.py on a CPU, with a tiny model: what it prints and saves is whole, also where a contender fails."""

import importlib
import json
import re
import time
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

import bnbref

pytest.importorskip("transformers")
pytest.importorskip("peft")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name):
    return importlib.import_module(name)


def row(part, contender, format_="nf4", what="", **measured):
    return {"part": part, "format": format_, "what": what, "contender": contender, **measured}


RUN = {
    "shape": "8B",
    "machine": {"gpu": "cpu"},
    "rows": [
        row("generate", "bitsandbytes", tokens=[1, 2, 3], **{"tokens/s": 40.0, "first_s": 2.0}),
        row("static", "bnbref", tokens=[1, 2, 4], **{"tokens/s": 150.0, "first_s": 20.0}),
        row("static", "bitsandbytes", tokens=[1, 2, 3], **{"tokens/s": 50.0, "first_s": 2.0}),
        row("static", "bf16", "", tokens=[7], **{"tokens/s": 100.0, "first_s": 18.0}),
        row("layers", "bnbref", "int8, threshold 6", "4096x4096, 8 rows", call_us=20.0, kernels_us=9.0),
        row("layers", "bitsandbytes", "int8, threshold 6", "4096x4096, 8 rows", call_us=90.0),
        row("load", "bitsandbytes", what="cold caches", error="ImportError: no CUDA"),
    ],
}


def test_the_table():
    assert_expected_inline(
        module("flow_table").table(RUN),
        """\
| | bnbref | bitsandbytes | bf16 | ratio to bitsandbytes | to bf16 |
|---|---|---|---|---|---|
| static nf4, tokens/s | 150 | 50 | 100 | 3 (missed: 5.00) | 1.5 |
| static nf4, first_s | 20 | 2 | 18 | 0.1 | 0.9 (missed: 1.00) |
| layers int8, threshold 6, 4096x4096, 8 rows, call_us | 20 | 90 |  | 4.5 |  |
| layers int8, threshold 6, 4096x4096, 8 rows, kernels_us | 9 |  |  |  |  |

static nf4 bnbref: the first 2 of 3 tokens are those of bitsandbytes' generate

load nf4 cold caches bitsandbytes failed: ImportError: no CUDA""",
    )


def test_the_last_run_of_a_part_is_kept():
    gpu_flows = module("gpu_flows")
    later = {**RUN, "rows": [row("static", "bnbref", **{"tokens/s": 1.0})]}
    other = {**RUN, "shape": "1.2B"}
    first, second, third = gpu_flows.joined([RUN, later, other])
    assert [r["part"] for r in first["rows"]] == ["generate", "layers", "layers", "load"]
    assert (second, third) == (later, other)


FAILS = """
import sys
print("a library says something")
print('ROW {"part": "qlora", "format": "nf4", "what": "loop", "contender": "bnbref", "ms": 1.5}', flush=True)
raise SystemExit("no such kernel")
"""


@pytest.mark.parametrize(
    ("program", "left", "error"),
    [
        (FAILS, 60, "no such kernel"),
        (FAILS.replace("raise SystemExit", "__import__('time').sleep(60); raise SystemExit"), 1, "cut short after 1 s"),
    ],
)
def test_a_process_that_fails_is_a_row(program, left, error, tmp_path):
    gpu_flows = module("gpu_flows")
    (tmp_path / "fails.py").write_text(program)
    names = {"part": "qlora", "contender": "bnbref", "format": "nf4"}
    start = time.monotonic()
    rows = list(gpu_flows.run([gpu_flows.Process(str(tmp_path / "fails.py"), names)], left))
    assert [(r["what"], r.get("ms"), r.get("error")) for r in rows] == [("loop", 1.5, None), ("", None, error)]
    assert time.monotonic() - start < 30
    for found in rows:
        assert all(str(value) in gpu_flows.line(found) for value in names.values())


TURNS = """
import json, sys
name = json.loads(sys.argv[1])["contender"]
log = open({log!r}, "a")
for round in range(3):
    print("TURN", flush=True)
    assert sys.stdin.readline() == "go\\n"
    print(f"{{name}} {{round}} begins", file=log, flush=True)
    __import__("time").sleep(0.05)
    print(f"{{name}} {{round}} ends", file=log, flush=True)
    if name == "b" and round == 1:
        raise SystemExit("b fails")
print("ROW " + json.dumps({{"part": "static", "format": "", "what": "", "contender": name}}), flush=True)
"""


def test_processes_take_turns(tmp_path):
    gpu_flows = module("gpu_flows")
    (tmp_path / "turns.py").write_text(TURNS.format(log=str(tmp_path / "log")))
    names = [{"part": "static", "contender": name, "format": ""} for name in "abc"]
    rows = list(gpu_flows.run([gpu_flows.Process(str(tmp_path / "turns.py"), n) for n in names], 60))
    assert [(r["contender"], r.get("error")) for r in rows] == [("b", "b fails"), ("a", None), ("c", None)]
    order = ("a 0", "b 0", "c 0", "a 1", "b 1", "c 1", "a 2", "c 2")
    assert (tmp_path / "log").read_text().splitlines() == [
        f"{turn} {what}" for turn in order for what in ("begins", "ends")
    ]


def test_the_parts_of_a_model(tmp_path):
    parts = module("flow_parts")
    with bnbref.eager():
        for part in ("checkpoint", "generate", "static", "first", "load"):
            job = parts.Job(part, "bnbref", "nf4", "tiny", str(tmp_path / "tiny"), "cpu")
            (found,) = parts.PARTS[part](job)
            assert part == "checkpoint" or found[module("flow_table").MEASURES[part][0]] > 0
            assert json.loads(json.dumps(found)) == found
    assert list(parts.checkpoint(job)) == []  # it is there


def test_layers(monkeypatch):
    layers = module("flow_layers")
    right = layers.layer

    def doubled(contender, format_, weight, device):
        return right(
            "bf16" if contender == "wrong" else contender, format_, weight * (1 + (contender == "wrong")), device
        )

    monkeypatch.setattr(layers, "layer", doubled)
    options = {"sizes": ((128, 64),), "counts": (1, 3), "cache": 20_000, "rounds": 1}
    with bnbref.eager():
        rows = list(layers.rows(["bnbref", "bf16", "wrong", "nobody"], "cpu", **options))
    assert len([r for r in rows if r.get("call_us", 0) > 0]) == 2 * 2 * len(layers.FORMATS)
    assert {(r["contender"], re.sub("0[.]99[0-9]*|1", "1", r["error"])) for r in rows if "error" in r} == {
        ("nobody", "KeyError: 'nobody'"),
        ("wrong", "RuntimeError: the product is off by 1 of its norm"),  # or 0.999, by the CPU's product of bfloat16
    }


@pytest.mark.slow
def test_the_program(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BNBREF_COMPILE", "0")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent), prepend=":")
    models, out = tmp_path / "models", tmp_path / "out"
    options = ["--shape", "tiny", "--device", "cpu", "--models", str(models), "--out", str(out)]
    gpu_flows = module("gpu_flows")
    gpu_flows.main([*options, "--contenders", "bnbref", "bf16"])
    (run,) = gpu_flows.read(out / "gpu-flows-cpu.json")
    assert [r for r in run["rows"] if "error" in r] == []
    kinds = [
        (r["part"], r["contender"], r["format"]) for r in run["rows"] if r["part"] not in ("first", "load", "layers")
    ]
    formats = [("bnbref", "nf4"), ("bf16", ""), ("bnbref", "int8")]
    loops = [("qlora", who, what) for who, what in formats[:2] for _ in ("loop", "Trainer")]
    assert kinds == [(part, *kind) for part in ("generate", "static") for kind in formats] + loops
    assert "| qlora nf4, Trainer, ms |" in capsys.readouterr().out
    assert run["command"].split()[2:] == [*options, "--contenders", "bnbref", "bf16"]
