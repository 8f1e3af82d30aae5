"""The reference is made of docstrings: a function's names every argument, says the class of the result, and has an example."""

import importlib
import inspect
import re

import pytest

from bnbref import optim
from bnbref.optim.family import Family, Options, PagedOptions

MODULES = ("bnbref", "bnbref.functional", "bnbref.codebooks", "bnbref.checkpoint", "bnbref.nn")
NO_EXAMPLE = {
    # They need transformers or peft: docs/content/transformers.md and peft.md.
    "bnbref.register_lora", "bnbref.take_over_bitsandbytes", "bnbref.give_back_bitsandbytes",
    # Their example is that of `read` and of `replace_parameter_4bit`.
    "bnbref.checkpoint.open_checkpoint", "bnbref.nn.replace_parameter_4bit_prequantized",
}  # fmt: skip


def functions():
    for name in MODULES:
        module = importlib.import_module(name)
        for each in getattr(module, "__all__", None) or dir(module):
            if inspect.isfunction(value := getattr(module, each)):
                yield pytest.param(module, value, id=f"{name}.{each}")


def said(module, function):
    """A docstring, with those of the functions that it refers to: `quantize_nf4` is `quantize_4bit` with one argument fixed."""
    own = inspect.getdoc(function) or ""
    others = (getattr(module, name, None) for name in re.findall(r"`(\w+)", own))
    return "\n".join([own, *(inspect.getdoc(other) or "" for other in others if inspect.isfunction(other))])


@pytest.mark.parametrize(("module", "function"), list(functions()))
def test_arguments_exactness_and_an_example(module, function, request):
    text, signature = said(module, function), inspect.signature(function)
    assert [name for name in signature.parameters if not re.search(rf"\b{name}\b", text)] == []
    if "Tensor" in str(signature.return_annotation):
        assert re.search(r"\b(Exact|Bounded|exact|bounded)\b", text), "the class of the result is not said"
    name = request.node.callspec.id
    assert (">>>" in text) == (name not in NO_EXAMPLE), "an example"


def optimizers():
    """The named classes, without those that are made of another family's."""
    return [
        kind for name in optim.__all__ if inspect.isclass(kind := getattr(optim, name)) and issubclass(kind, Family)
    ]


@pytest.mark.parametrize("kind", optimizers(), ids=lambda kind: kind.__name__)
def test_help_of_an_optimizer_says_each_argument_and_its_default(kind):
    text, family = (
        inspect.getdoc(kind),
        next(base for base in kind.__mro__ if "Family" in str(base.__bases__) or base is kind),
    )
    own = {p.name: p.default for p in inspect.signature(kind).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD}
    by_keyword = inspect.signature(Family.__init__).parameters | inspect.signature(optim.Optimizer.__init__).parameters
    own |= {
        name: by_keyword[name].default
        for name in PagedOptions.__annotations__ | Options.__annotations__
        if name not in own
    }
    assert "raises ValueError, TypeError or NotImplementedError" in text
    assert re.search(r"\b(Exact|exact|Exact\*)\b", text), f"the class of the results of {family} is not said"
    assert re.search(r"^params: ", text, re.MULTILINE)
    fixed = {"optim_bits"} if "bit" in kind.__name__ else set()
    for name, default in own.items():
        if name == "params":
            continue
        said = re.search(rf"(?:^|and |, ){name}: (has no default|(.+?) by default)", text, re.MULTILINE)
        assert said, name
        if name not in fixed and not (name == "is_paged" and kind.__name__.startswith("Paged")):
            assert default is inspect.Parameter.empty if said[2] is None else eval(said[2]) == default, said[0]


def test_what_a_docstring_lacks_is_found():
    def half(A, blocksize):
        """The codes of A."""

    module = inspect.getmodule(functions)
    assert not re.search(r"\bblocksize\b", said(module, half))
