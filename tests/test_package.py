"""The rules of the house that can be read off the source: rooms, one door, no asserts, a light import."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bnbref"

# From the top of the house to the bottom. A name stands for the module and all below it (`bnbref` for __init__.py
# alone). A module may import from its own row and from the rows below: nothing else, not even inside a function.
ROOMS = (
    ("bnbref", "bnbref.__main__", "bnbref.cli", "bnbref.info", "bnbref.selfcheck", "bnbref.demo"),
    ("bnbref.integrations",),
    ("bnbref.conformance",),
    ("bnbref.nn",),
    ("bnbref.optim",),
    ("bnbref.functional",),
    ("bnbref.checkpoint",),
    ("bnbref.checkpoint_weights", "bnbref.maps"),
    ("bnbref.products",),
    ("bnbref.operators",),
    ("bnbref.fourbit_product", "bnbref.int8_product"),
    ("bnbref.packed_weight",),
    ("bnbref.few_rows", "bnbref.joined_scales"),
    ("bnbref.fourbit", "bnbref.int8", "bnbref.nested", "bnbref.quant_state", "bnbref.state_fields"),
    ("bnbref.blockwise",),
    ("bnbref.codebooks",),
    ("bnbref.formats",),
    ("bnbref.codebook",),
    ("bnbref.kernels",),
    ("bnbref.context", "bnbref.arguments", "bnbref.subnormals"),
)

# The workshop below the book is its door. What makes a definition fast knows the definition, and nobody imports it but the door.
FORMULATIONS = {
    f"bnbref.kernels.{path.stem}"
    for path in (PACKAGE / "kernels").glob("*.py")
    if re.search(r"^@formulation|^formulation\(", path.read_text(encoding="utf-8"), re.MULTILINE)
}

HEAVY = ("transformers", "peft", "accelerate", "torch._dynamo", "torch._inductor")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
each_module = pytest.mark.parametrize("module", SOURCES)


def tree_of(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"), str(SOURCES[module]))


def room_of(module: str) -> int | None:
    """The row of the longest name in ROOMS that is the module or a package around it."""
    best: tuple[int, int] | None = None
    for row, names in enumerate(ROOMS):
        for name in names:
            if module == name or (name != "bnbref" and module.startswith(name + ".")):
                best = max(best or (0, 0), (len(name), row))
    return best[1] if best else None


def imports_of(module: str, tree: ast.Module, is_package: bool, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """(line, module of bnbref) of every import; `from bnbref import x` imports bnbref.x if that is a module."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, node.module] if node.module else above)
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        else:
            continue
        for target in dict.fromkeys(targets):
            if target == "bnbref" or target.startswith("bnbref."):
                yield node.lineno, target


def upward_imports(module: str, tree: ast.Module, is_package: bool, known: frozenset[str]) -> list[str]:
    here = room_of(module)
    if here is None:
        return [f"{module} has no room: give it one in ROOMS"]
    if module in FORMULATIONS:
        return []
    problems = []
    for line, target in imports_of(module, tree, is_package, known):
        there = room_of(target)
        if target in FORMULATIONS:
            problems.append(f"line {line}: {module} imports {target}, which the door loads when it compiles")
            continue
        if there is None or there < here:
            problems.append(f"line {line}: {module} imports {target}, which is not below it")
    return problems


def compile_calls(tree: ast.Module) -> list[int]:
    """Lines that reach for a compiler: torch.compile, model.compile, `from torch import compile`; not re.compile."""
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "compile"
            and not (isinstance(node.value, ast.Name) and node.value.id == "re")
        )
        or (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "torch"
            and any(alias.name == "compile" for alias in node.names)
        )
    )


def test_there_is_a_package():
    assert "bnbref" in SOURCES
    assert (PACKAGE / "py.typed").exists()


@each_module
def test_imports_point_downwards(module):
    is_package = SOURCES[module].name == "__init__.py"
    assert upward_imports(module, tree_of(module), is_package, frozenset(SOURCES)) == []


@each_module
def test_only_the_door_compiles(module):
    if module != "bnbref.kernels.variants":
        lines = compile_calls(tree_of(module))
        assert not lines, f"{module}, lines {lines}: decorate it by bnbref.kernels.fused, the one door to torch.compile"


@each_module
def test_no_bare_except(module):
    lines = [n.lineno for n in ast.walk(tree_of(module)) if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert not lines, f"{module}, lines {lines}: name the exception"


@each_module
def test_no_assert(module):
    lines = [node.lineno for node in ast.walk(tree_of(module)) if isinstance(node, ast.Assert)]
    assert not lines, f"{module}, lines {lines}: `python -O` removes asserts; raise ValueError, TypeError, RuntimeError"


# ---- what is imported is what pyproject.toml declares ---------------------------------------------------------------

# What only these may import is an extra's; all the rest of the package runs with the dependencies alone. pytest loads three.
GUESTS = ("bnbref.integrations.hf", "bnbref.demo", "bnbref.conformance.conftest", "bnbref.conformance.test_backend",
          "bnbref.conformance.plugin", "bnbref.conformance.backends.nncf", "bnbref.conformance.backends.onnxruntime",
          "bnbref.conformance.backends.optax", "bnbref.conformance.backends.qwix",
          "bnbref.conformance.backends.tinygrad")  # fmt: skip
FOLDERS = ("bnbref", "tests", "benchmarks", "docs")
BROUGHT = {"griffe", "sympy", "tokenizers", "triton", "yaml"}
"""By mkdocstrings, torch, transformers, a torch for GPUs, huggingface_hub."""
BROUGHT |= {"jax", "onnx", "openvino"}  # with the packages that programs of the conformance reports are about


def project():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names_of(requirements):
    """How the packages of requirements are imported; an extra of ours is left out."""
    return {re.split(r"[^\w-]", r)[0].replace("-", "_") for r in requirements} - {"bnbref"}


def foreign_imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(package, whether the module cannot be imported without it) of every import that is neither Python's nor ours."""
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif (  # import_module("matplotlib.pyplot"), importorskip("numpy")
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "importorskip")
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [node.args[0].value]
        elif isinstance(node, ast.Attribute) and node.attr in ("numpy", "from_numpy"):  # of a tensor, of torch
            yield "numpy", True
            continue
        else:
            continue
        for name in names:
            package = name.partition(".")[0]
            if package not in sys.stdlib_module_names | {"bnbref"}:
                yield package, id(node) in at_once


def test_the_package_needs_its_dependencies_and_no_other():
    imported = {
        package
        for module in SOURCES
        if not module.startswith(GUESTS)
        for package, at_once in foreign_imports(tree_of(module))
        if at_once
    }
    assert imported == names_of(project()["dependencies"])


def test_all_that_is_imported_is_declared():
    declared = project()
    known = names_of(declared["dependencies"]).union(*map(names_of, declared["optional-dependencies"].values()))
    ours = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    known |= BROUGHT | {path.stem for path in ours} | {path.parent.name for path in ours}
    undeclared = {
        (package, str(path.relative_to(ROOT)))
        for path in ours
        for package, _ in foreign_imports(ast.parse(path.read_text(encoding="utf-8")))
        if package not in known
    }
    assert undeclared == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import os, numpy.linalg", [("numpy", True)]),
        ("from typing_extensions import Unpack", [("typing_extensions", True)]),
        ("def f():\n    import peft", [("peft", False)]),
        ("from . import codebooks", []),
        ("def f(x):\n    return x.numpy()", [("numpy", True)]),
        ("x = importlib.import_module('matplotlib.pyplot')", [("matplotlib", False)]),
    ],
)
def test_imports_are_found(source, found):
    assert list(foreign_imports(ast.parse(source))) == found


def test_a_built_wheel_installs_alone(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install 'bnbref[test]'")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("bnbref-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    shipped = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    plugin = Path("conformance/plugin/pytest_bnbref.py")  # a module of its own: see pyproject.toml
    assert {path.relative_to(site / "bnbref") for path in (site / "bnbref").rglob("*")} >= shipped - {plugin}
    assert (site / plugin.name).exists()
    code = """
import importlib.metadata, bnbref, bnbref.cli
assert importlib.metadata.version("bnbref") == bnbref.__version__
assert bnbref.cli.main(["info"]) == 0
print(bnbref.__file__)
"""
    environment = os.environ | {"PYTHONPATH": str(site), "BNBREF_COMPILE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.splitlines()[-1] == str(site / "bnbref" / "__init__.py")


def test_the_source_distribution_has_what_its_tests_read():
    """So that `make test` runs in an unpacked one."""
    sdist = pytest.importorskip(
        "hatchling.builders.sdist", reason="hatchling is not installed: pip install 'bnbref[test]'"
    )
    shipped = {Path(file.distribution_path).parts[0] for file in sdist.SdistBuilder(str(ROOT)).recurse_included_files()}
    files = {"Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"}
    assert shipped >= {"bnbref", "tests", "benchmarks", "docs", ".ci", ".github", *files}


# ---- what there is to use -------------------------------------------------------------------------------------------


def test_line_ends_are_those_that_the_digests_are_of(tmp_path):
    """A clone on Windows, where git has `core.autocrlf` by default."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no checkout of git")
    name = "bnbref/demo/model/heldout.txt"
    clone = [
        "git",
        "-c",
        "core.autocrlf=true",
        "clone",
        "-q",
        "--depth",
        "1",
        "--no-checkout",
        ROOT.as_uri(),
        tmp_path / "clone",
    ]
    subprocess.run(clone, check=True, capture_output=True)
    take = ["git", "-c", "core.autocrlf=true", "checkout", "HEAD", "--", ".gitattributes", name]
    subprocess.run(take, check=True, capture_output=True, cwd=tmp_path / "clone")
    assert b"\r" not in (tmp_path / "clone" / name).read_bytes()


def test_import_statements_lead_to_all_that_is_imported():
    """What packs a program into a folder, such as PyInstaller, follows statements, and no `importlib.import_module`."""
    found, ahead = set(), ["bnbref"]
    while ahead:
        module = ahead.pop()
        if module in found or module not in SOURCES:
            continue
        found.add(module)
        is_package = SOURCES[module].name == "__init__.py"
        targets = [target for _, target in imports_of(module, tree_of(module), is_package, frozenset(SOURCES))]
        ahead += [".".join(target.split(".")[:depth]) for target in targets for depth in range(1, 6)]
    program = "import sys, bnbref; print(*(name for name in sys.modules if name.startswith('bnbref.')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - found == set()


def test_dir_is_what_there_is_to_use():
    """Every name, and no other: `import` statements of the module are not listed."""
    bnbref = importlib.import_module("bnbref")
    assert_expected_inline(
        "\n".join(dir(bnbref)),
        """\
BnbRefConfig
Codebook
MatmulLtState
QuantState
__version__
as_bitsandbytes
batch_invariant
checkpoint
codebooks
eager
functional
give_back_bitsandbytes
install_as_bitsandbytes
kernels
matmul
matmul_4bit
nn
optim
register_lora
report
take_over_bitsandbytes
uninstall_as_bitsandbytes""",
    )
    assert not hasattr(bnbref, "nonsense")


def test_every_name_is_there():
    pytest.importorskip("peft", reason="some names need it")
    bnbref = importlib.import_module("bnbref")
    for name in dir(bnbref):
        assert getattr(bnbref, name) is not None


def test_type_checkers_see_the_names_that_are_imported_late():
    bnbref = importlib.import_module("bnbref")
    seen = {
        alias.asname: node.module
        for block in tree_of("bnbref").body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        for alias in node.names
    }
    assert seen == bnbref._NEED_HUGGING_FACE


def test_every_name_is_on_a_page_of_the_api():
    """In a list of `bnbref`, in a section of its own, or among the names of such a section."""
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs/content/api").glob("*.md")]
    blocks = re.findall(r"^::: bnbref(?:\.(\w+))?\n((?: {4}.*\n)+)", "".join(pages), re.MULTILINE)
    bnbref = importlib.import_module("bnbref")
    sections = [module for module, _ in blocks if module]
    members = [
        name for module, options in blocks if not module for name in re.findall(r"^ +- (\w+)$", options, re.MULTILINE)
    ]
    below = {name for section in sections for name in dir(getattr(bnbref, section))}
    assert set(dir(bnbref)) - {"__version__", *sections, *members} <= below
    assert set(sections) | set(members) <= set(dir(bnbref))


def test_a_name_that_needs_another_package_says_which():
    code = """
import sys
sys.modules["transformers"] = None
import bnbref
from bnbref import *
try:
    bnbref.BnbRefConfig
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "bnbref.BnbRefConfig needs transformers: pip install transformers\n"


def test_a_transformers_that_is_broken_says_so_itself():
    code = """
import sys, types
class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise AttributeError(name) if name.startswith("_") else ModuleNotFoundError(f"Could not import module {name!r}")
sys.modules["transformers"] = Lazy("transformers")
import bnbref
try:
    bnbref.BnbRefConfig
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("Could not import module '")


def test_import_is_light():
    code = f"""
import sys, bnbref
from bnbref import *
print([m for m in sys.modules for heavy in {HEAVY} if m == heavy or m.startswith(heavy + ".")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", "importing bnbref also imports these"


PREFORK = """
import os, signal, torch, bnbref

child = os.fork()
if child:
    os._exit(os.waitpid(child, 0)[1] != 0)
signal.alarm(60)  # ends it where it hangs
torch.set_num_threads(2)
codes = torch.full((64, 64), 127, dtype=torch.int8)
assert (bnbref.int8.multiply(codes, codes) == 64 * 127 * 127).all() and torch.zeros(2**20).sum() == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_processes_may_be_forked_after_the_import():
    """As servers do that import before they fork. Where the parent has used several threads of OpenMP, the child would hang."""
    done = subprocess.run([sys.executable, "-c", PREFORK], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# The readers of source above, on source whose outcome is known.


@pytest.mark.parametrize(
    ("module", "source", "line"),
    [
        ("bnbref.blockwise", "from bnbref.codebooks import NF4", None),
        ("bnbref.blockwise", "from bnbref.fourbit import pack", 1),
        ("bnbref.blockwise", "def f():\n    import bnbref.nn.linear", 2),
        ("bnbref.blockwise", "from . import codebooks, kernels", None),
        ("bnbref.blockwise", "from bnbref.kernels import counting", 1),
        ("bnbref.blockwise", "from bnbref.kernels.counting import code_table", 1),
        ("bnbref.blockwise", "from . import functional", 1),
        ("bnbref.blockwise", "from bnbref import functional", 1),
        ("bnbref.blockwise", "from bnbref import __version__", 1),
        ("bnbref.nn.linear", "from ..fourbit import pack", None),
        ("bnbref.nn.linear", "from .embedding import Embedding", None),
        ("bnbref.nn.linear", "from ..conformance import cases", 1),
        ("bnbref.fourbit", "from bnbref.nested import join", None),
        ("bnbref.cli", "from bnbref import __version__", None),
        ("bnbref.kernels.door", "import torch, einops", None),
    ],
)
def test_upward_imports_are_found(module, source, line):
    known = frozenset(name for row in ROOMS for name in row) | FORMULATIONS
    found = upward_imports(module, ast.parse(source), False, known)
    assert [f.split(":")[0] for f in found] == ([] if line is None else [f"line {line}"])


def test_a_module_without_a_room_is_found():
    assert upward_imports("bnbref.attic", ast.parse(""), False, frozenset()) == [
        "bnbref.attic has no room: give it one in ROOMS"
    ]


def test_compile_calls_are_found():
    source = [
        "re.compile('x')",
        "torch.compile(f)",
        "model.compile()",
        "from torch import compile",
        "compile('1', '', 'eval')",
    ]
    assert compile_calls(ast.parse("\n".join(source))) == [2, 3, 4]
    assert compile_calls(ast.parse("@torch.compile\ndef f(): ...\ntorch.compiler.is_compiling()")) == [1]
