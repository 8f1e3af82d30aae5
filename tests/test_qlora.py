"""`python -m bnbref qlora`: a text in, an adapter out, lower held-out perplexity."""

import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bnbref
from bnbref import cli
from bnbref.demo import MODEL
from bnbref.optim import PagedAdamW8bit

AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
qlora = pytest.importorskip("bnbref.integrations.hf.qlora")

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("eager")

SAID = re.compile(r"held-out perplexity ([\d.]+) before, ([\d.]+) after")
TEXT = Path(json.__file__).read_text(encoding="utf-8")[:3500]  # Python source, which the model does not write


def test_the_command_lowers_held_out_perplexity(capsys, tmp_path, recwarn, monkeypatch):
    text, out = tmp_path / "mine.txt", tmp_path / "adapter"
    text.write_text(TEXT, encoding="utf-8")
    arguments = ["--steps", "5", "--batch", "4", "--length", "32", "--lr", "5e-3"]
    if importlib.util.find_spec("matplotlib"):
        arguments += ["--plot", str(tmp_path / "losses.png")]
    found = []
    monkeypatch.setattr(
        qlora, "qlora", lambda *args, run=qlora.qlora, **rest: found.append(run(*args, **rest)) or found[0]
    )
    assert cli.main(["qlora", "--text", str(text), "--out", str(out), *arguments]) == 0
    (run,) = found
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert (len(run.losses), run.parameters) == (5, sum(p.numel() for p in trained))
    assert {p.dtype for p in trained} == {torch.float32}
    assert run.nbytes == sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    before, after = map(float, SAID.search(capsys.readouterr().out).groups())
    assert after < before
    assert not [str(w.message) for w in recwarn if w.category is FutureWarning]
    settings = peft.LoraConfig.from_pretrained(out)
    assert (settings.r, settings.target_modules) == (16, {"q_proj", "k_proj", "v_proj", "o_proj"})
    assert (out / "adapter_model.safetensors").stat().st_size < 2**20
    assert (tmp_path / "losses.png").exists() == ("--plot" in arguments)


@pytest.mark.slow
def test_the_command_as_it_stands(tmp_path):
    """In a fresh process, compiled: the numbers of the page on peft."""
    command = [sys.executable, "-m", "bnbref", "qlora"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(float, SAID.search(done.stdout).groups())
    assert after < 0.6 * before
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_dataset_is_a_text(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert qlora.dataset_text(str(tmp_path)) == "one\n\ntwo"
    with pytest.raises(ValueError, match="column must be one of text, got 'body'"):
        qlora.dataset_text(str(tmp_path), "body")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="column 'text' must hold strings, got"):
        qlora.dataset_text(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no/such/file"], "No such file or directory: 'no/such/file'"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--length", "100000"], "text must have at least 1000000 tokens, for 10 windows of 100000, got"),
        (["--lr", "0"], "--lr must be positive and finite, got 0.0"),
        (["--lr", "nan"], "--lr must be positive and finite, got nan"),
        (["--lr", "inf"], "--lr must be positive and finite, got inf"),
        (["--targets", "query"], "Target modules {'query'} not found"),
        (["--targets", "all-linear", "q_proj"], "targets must be 'all-linear' or a list of names of layers, got ["),
        (["--column", "body"], "--column and --split go with --dataset, which was not given"),
        (["--text", "mine.txt", "--split", "test"], "--column and --split go with --dataset, which was not given"),
        (["--plot", "no/such/dir/losses.png"], "cannot write no/such/dir/losses.png: there is no directory"),
    ],
)
def test_what_it_refuses(arguments, message, capsys, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    known = {"matplotlib"}  # refused before it is needed
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: find_spec("json" if name in known else name, *args)
    )
    assert cli.main(["qlora", "--out", str(tmp_path / "adapter"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ([], qlora.ATTENTION),
        (["--targets", "all-linear"], "all-linear"),
        (["--targets", "k_proj", "head"], ["k_proj", "head"]),
    ],
)
def test_all_linear_is_no_name_of_a_layer(given, targets, monkeypatch, tmp_path, capsys):
    asked = {}

    def instead(*args, **options):
        asked.update(options)
        return qlora.Finetuned(None, 2.0, 1.0, (), 1.0, 1, 1)

    monkeypatch.setattr(qlora, "qlora", instead)
    assert cli.main(["qlora", "--out", str(tmp_path), *given]) == 0
    assert asked["targets"] == targets


def test_a_run_is_what_it_says(monkeypatch, tmp_path):
    """A rate that warms up over a tenth of the steps and falls as a cosine, LoRA of that rank, every tenth window held out."""

    class Caught(Exception):
        pass

    def caught(**given):
        raise Caught(given)

    monkeypatch.setattr(qlora, "Trainer", caught)
    with pytest.raises(Caught) as run:
        qlora.qlora(
            MODEL,
            TEXT,
            tmp_path / "not" / "yet",
            steps=20,
            batch=4,
            length=32,
            lr=5e-3,
            rank=5,
            device="cpu",
            dtype=torch.float16,
        )
    (given,) = run.value.args
    args, config = given["args"], given["model"].peft_config["default"]
    assert (args.max_steps, args.per_device_train_batch_size, args.per_device_eval_batch_size) == (20, 4, 4)
    assert (args.learning_rate, args.lr_scheduler_type.value, args.warmup_steps) == (5e-3, "cosine", 2)
    assert (args.report_to, args.save_strategy.value, getattr(args, qlora.CHECKPOINTING)) == ([], "no", True)
    assert (args.logging_steps, args.use_cpu, args.output_dir) == (1, True, str(tmp_path / "not" / "yet"))
    assert (config.r, config.lora_alpha, given["optimizer_cls_and_kwargs"][0]) == (5, 10, PagedAdamW8bit)
    assert config.task_type == "CAUSAL_LM"
    layers = [m for m in given["model"].modules() if isinstance(m, bnbref.nn.Linear4bit)]
    assert {(m.quant_state.quant_type, m.quant_state.nested, m.quant_state.dtype) for m in layers} == {
        ("nf4", True, torch.float16)
    }
    parts = qlora.windows(AutoTokenizer.from_pretrained(MODEL), TEXT, 32)
    train, held_out = given["train_dataset"], given["eval_dataset"]
    whole = [part["input_ids"].tolist() for part in parts]
    assert [part["input_ids"].tolist() for part in held_out] == whole[::10]
    assert [part["input_ids"].tolist() for part in train] == [ids for i, ids in enumerate(whole) if i % 10]
    assert {len(ids) for ids in whole} == {32}


def test_the_command_and_the_function_have_the_same_defaults():
    said = cli.parser().parse_args(["qlora"])
    own = inspect.signature(qlora.qlora).parameters
    for name in ("steps", "batch", "length", "lr", "rank"):
        assert getattr(said, name) == own[name].default, name


def test_a_dataset_is_a_text_of_its_rows(monkeypatch):
    """As `datasets` gives it, which need not be there."""

    class Data(dict):
        column_names = features = property(lambda self: dict.fromkeys(self, "string"))

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Data(text=["one", "two"], number=[1, 2])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert qlora.dataset_text("mine", split="test") == "one\n\ntwo"
    assert asked == [("mine", "test")]
    with pytest.raises(ValueError, match="column must be one of text, number, got 'body'"):
        qlora.dataset_text("mine", "body")
    with pytest.raises(ValueError, match="column 'number' must hold strings, got string"):
        qlora.dataset_text("mine", "number")


def test_numbers_of_a_run_are_positive(tmp_path):
    for name, value in (("steps", 0), ("batch", 0), ("length", 0), ("rank", -1), ("lr", 0.0), ("lr", math.nan)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            qlora.qlora(str(MODEL), TEXT, str(tmp_path / "adapter"), **{name: value})
    with pytest.raises(TypeError, match="folder must be a str or PathLike, got 3"):
        qlora.qlora(str(MODEL), TEXT, 3)
    assert not (tmp_path / "adapter").exists()


def test_a_file_is_no_folder_for_an_adapter(capsys, tmp_path):
    (tmp_path / "adapter").write_text("")
    assert cli.main(["qlora", "--model", str(MODEL), "--out", str(tmp_path / "adapter")]) == 2
    assert "File exists" in capsys.readouterr().err


def test_it_says_what_to_install(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    absent = {"peft", "datasets"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name in absent else find_spec(name, *args)
    )
    assert cli.main(["qlora", "--dataset", "d"]) == 2
    assert capsys.readouterr().err == "bnbref: error: qlora needs peft, datasets: pip install peft datasets\n"
