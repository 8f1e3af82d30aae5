"""Who has read the page alone makes mistakes: each is told in one line that says what to do, in Python and through the pipe."""

import functools
import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bnbref.cli import main
from bnbref.conformance import conftest, judge, report, test_backend, vectors, workers
from bnbref.conformance.backends import Backend, Unsupported, load
from bnbref.conformance.text import tensor_line

CPU = torch.device("cpu")
CODES = vectors.read("quantize_4bit")[:3]
WEIGHTS = vectors.read("int8_dequantize")
PRODUCTS = vectors.read("int8_matmul")[:3]
RIGHT = load("bnbref-eager").functions


def _raise(error):
    raise error


async def _later(**k):
    return RIGHT["int8_dequantize"](**k)


STATIC = torch.zeros(1 << 16)


def _static(y):
    STATIC[: y.numel()] = y.reshape(-1)
    return STATIC[: y.numel()].view(y.shape)


PAIRS = {
    "float64": (lambda p, a: (p, a.double()), "absmax is torch.float64, must be torch.float32"),
    "reshaped": (lambda p, a: (p, a[:, None]), "absmax has shape ["),
    "column": (lambda p, a: (p[:, None], a), "packed has shape ["),
    "numpy": (lambda p, a: (p.numpy(), a), "packed is of type numpy.ndarray, must be a torch.Tensor"),
    "list": (lambda p, a: (p, a.tolist()), "absmax is of type builtins.list, must be a torch.Tensor"),
    "none": (lambda p, a: None, "packed is None, must be a torch.Tensor"),
    "one": (lambda p, a: p, "absmax is missing: the results are packed"),
    "three": (lambda p, a: (p, a, a), "result 3 should not be there"),
    "four": (lambda p, a: [p, a, None, a], "result 3, result 4 should not be there"),
    "exchanged": (lambda p, a: (a, p), "packed is torch.float32, must be torch.uint8"),
    "named": (lambda p, a: {"codes": p, "absmax": a}, "packed is missing: the results are codes, absmax"),
}
SINGLE = {
    "meta": (lambda y: y.to("meta"), "y has no elements in memory: torch.strided on meta"),
    "sparse": (lambda y: y.to_sparse(), "y has no elements in memory: torch.sparse_coo on cpu"),
    "nan": (lambda y: y * torch.nan, "elements of y are wrong"),
    "raised": (lambda y: _raise(KeyError("fp5")), "raised KeyError: 'fp5'"),
    "lines": (lambda y: _raise(RuntimeError("\n  no kernel\nfor it")), "raised RuntimeError: no kernel"),
    "exit": (lambda y: sys.exit(3), "raised SystemExit: 3"),
    "bytes": (lambda y: torch.from_numpy(y.numpy().byteswap()), "the bytes of each element are in the other order"),
}
FINE = {
    "strided": lambda y: y.t().contiguous().t(),
    "differentiable": lambda y: y.requires_grad_(),
    "tuple": lambda y: (y,),
    "nothing-more": lambda y: [y, None, None],
    "subclass": torch.nn.Parameter,
}


def told(function, operation, cases):
    """What the report says of each case's failure."""
    backend = Backend("mine", {operation: function})
    results = judge.run(backend, cases, CPU)
    assert {result.status for result in results} == {"failed"}
    return report.report(backend, CPU, results)


@pytest.mark.parametrize("name", PAIRS)
def test_results_of_another_form(name):
    change, message = PAIRS[name]
    done = told(lambda **k: change(*RIGHT["quantize_4bit"](**k)), "quantize_4bit", CODES)
    assert message in report.as_text(done)
    if "shape" not in message:  # it is no matter of what the case is about
        (finding,) = done.findings
        assert (finding.rule, finding.flags) == ("G-1", ())


@pytest.mark.parametrize("name", SINGLE)
def test_results_that_are_wrong(name):
    change, message = SINGLE[name]
    assert message in report.as_text(
        told(lambda **k: change(RIGHT["int8_dequantize"](**k)), "int8_dequantize", WEIGHTS)
    )


def test_a_coroutine_is_no_result():
    with pytest.warns(RuntimeWarning, match="never awaited"):
        done = told(_later, "int8_dequantize", WEIGHTS)
    assert "y is of type builtins.coroutine, must be a torch.Tensor" in report.as_text(done)


@pytest.mark.parametrize("name", FINE)
def test_results_that_are_right_in_another_way(name):
    backend = Backend("mine", {"int8_dequantize": lambda **k: FINE[name](RIGHT["int8_dequantize"](**k))})
    assert [result.status for result in judge.run(backend, WEIGHTS, CPU)] == ["passed"] * len(WEIGHTS)


def test_a_result_is_not_written_where_the_one_before_lies():
    """Who keeps the codes of two layers would have those of the second one twice."""
    backend = Backend("mine", {"int8_dequantize": lambda **k: _static(RIGHT["int8_dequantize"](**k))})
    first, second = judge.run(backend, WEIGHTS[:2], CPU)
    assert first.status == "passed"
    assert [failure.message for failure in second.failures] == ["what the call before had returned was modified"]


def test_an_argument_may_be_given_other_memory():
    """Its numbers are what they were, and what the backend returns is judged as ever: right, or wrong."""

    def moved(x, wrong, **k):
        x.data = x.data.clone()
        packed, absmax = RIGHT["quantize_4bit"](x=x, **k)
        return packed + wrong, absmax

    for wrong, status in ((0, "passed"), (1, "failed")):
        backend = Backend("mine", {"quantize_4bit": functools.partial(moved, wrong=wrong)})
        assert {result.status for result in judge.run(backend, CODES, CPU)} == {status}


def test_an_argument_that_was_resized_was_modified():
    def shrinks(x, **k):
        made = RIGHT["quantize_4bit"](x=x, **k)
        x.resize_(0)
        return made

    assert "the argument x was modified" in report.as_text(told(shrinks, "quantize_4bit", CODES))


def test_a_file_is_no_name_of_a_module():
    with pytest.raises(ValueError, match=r"must be the name of a module, as after import, got a file: 'five\.py'"):
        load("five.py")


def test_a_backend_that_hangs_fails_the_case(tmp_path, monkeypatch):
    source = "import time\n\ndef int8_dequantize(codes, absmax):\n    time.sleep(1000)\n"
    (tmp_path / "it_hangs.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    (result,) = workers.run("it_hangs", WEIGHTS[:1], CPU, limit=0.5)
    assert result.failures[0].message.startswith("the process ended: no answer after 1 s")
    assert main(["check", "--limit", "0"]) == 2


# ---- the pipe -------------------------------------------------------------------------------------------------------


def answer(case, change=lambda words: words, end="end\n"):
    lines = [f"case {case.id}"]
    for name, expected in case.expected.items():
        words = tensor_line(name, expected.value).split()
        start = 4 + expected.value.dim()
        lines.append(" ".join([*words[:start], *change(words[start:])]))
    return "\n".join(lines) + "\n" + end


ALL = "".join(map(answer, PRODUCTS))
PIPED = {
    "banner": ("Loading\n" + ALL, "line 1: expected case, tensor, unsupported or end, got 'Loading'; what is no answer belongs"),
    "decimal": (
        "".join(answer(case, lambda words: [str(int(word, 16)) for word in words]) for case in PRODUCTS),
        "line 2: an element of int32 must be the 8 hexadecimal digits of its bits, got '",
    ),
    "prefix": (answer(PRODUCTS[0], lambda words: ["0x" + word for word in words]), "must be the 8 hexadecimal digits"),
    "dtype": (ALL.replace("int32", "i32"), "must be one of float32, float16, bfloat16, float64, uint8, int8, int16,"),
    "shape": ("case a/b\ntensor y int32 3 1 2\n", "line 2: tensor y must have the number of its dimensions and each of"),
    "count": ("case a/b\ntensor y int32 x 00000000\n", "line 2: tensor y must have the number of its dimensions"),
    "nothing": ("case a/b\ntensor\n", "line 2: dtype of tensor  must be one of"),
    "no-end": ("".join(answer(case, end="") for case in PRODUCTS), f"line 3: the answer to {PRODUCTS[0].id} has no end"),
    "cut": (ALL[: ALL.rindex("end")], f"the answer to {PRODUCTS[2].id} has no end: the program ended, or was cut off"),
    "twice": (ALL + answer(PRODUCTS[0]), f"{PRODUCTS[0].id} is answered twice"),
    "died": (answer(PRODUCTS[0]), "cases have no answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPED)
def test_answers_that_strangers_write(name, capsys, monkeypatch):
    text, message = PIPED[name]
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["vectors", "check", "int8_matmul"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("change", [lambda text: text.replace("\n", "\r\n"), str.upper], ids=["crlf", "upper-case"])
def test_answers_that_are_right_in_another_way(change, capsys, monkeypatch):
    (case,) = PRODUCTS[:1]
    lines = answer(case).splitlines(keepends=True)
    words = lines[1].split(" ")
    text = change("".join([lines[0], " ".join(words), lines[2]])) if change is not str.upper else "".join(
        [lines[0], " ".join([*words[:6], *map(str.upper, words[6:])]), lines[2]]
    )  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["vectors", "check", "int8_matmul", "--only", case.id]) == 0
    assert capsys.readouterr().out.endswith("conforms\n")


def test_a_program_that_ends_before_it_has_read_all_of_it():
    command = f"{sys.executable} -m bnbref vectors gen quantize_4bit | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


# ---- pytest ---------------------------------------------------------------------------------------------------------


def _tested(functions):
    return SimpleNamespace(backend=Backend("theirs", functions), device=CPU, examples=3, results=[])


def test_random_inputs_that_a_backend_has_no_answer_to_are_skipped():
    """`Unsupported` is neither passed nor failed: hypothesis called it too many inputs that were filtered out."""

    def quantize_4bit(x, blocksize, quant_type):
        raise Unsupported("no float32")

    with pytest.raises(pytest.skip.Exception, match="not implemented"):
        test_backend.test_random(_tested({"quantize_4bit": quantize_4bit}), "quantize_4bit")


def test_an_error_of_the_kit_is_no_result_of_random_inputs(monkeypatch):
    def wrong(*args):
        raise ValueError("of the oracle")

    monkeypatch.setattr(test_backend, "expect", wrong)
    with pytest.raises(ValueError, match="of the oracle"):
        test_backend.test_random(_tested({"quantize_4bit": print}), "quantize_4bit")


def test_no_examples_test_nothing():
    with pytest.raises(ValueError, match="--max-examples must be at least 1, got 0"):
        conftest.Run(SimpleNamespace(getoption=lambda name, default: {"--max-examples": 0}.get(name, default)))


def test_a_process_may_end_by_any_signal():
    """Python has no names for those between the first and the last for real time."""
    assert [workers._how(code) for code in (-9, -35, 3, None)] == [
        "SIGKILL",
        "signal 35",
        "exit status 3",
        "exit status None",
    ]
