"""The training text of the demo model: what every CPython says about itself, collected without a download.

The language reference is in `pydoc_data.topics`; the standard library documents itself in docstrings and comments. A
document is a topic or a module, a passage is a signature and its docstring, and documents are what is held out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

NOT_DOCUMENTATION = {"test", "tests", "idle_test", "site-packages", "__pycache__", "_bundled"}
NOT_IMPORTED = re.compile(r"_test|_xx|xx|_ctypes_test|_tkinter|antigravity|this")


class Passage(NamedTuple):
    """A signature and its docstring, or a paragraph under no header: what is compared when duplicates are dropped."""

    header: str
    body: str


@dataclass(frozen=True)
class Document:
    """A topic of the reference, or everything that one module says about itself: the unit of the split.

    `comments` is prose from the same source file: trained on but never measured, since held-out text is documentation.
    """

    name: str
    passages: list[Passage]
    comments: list[Passage] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n\n".join("\n".join(filter(None, passage)) for passage in self.passages)

    @property
    def comment_text(self) -> str:
        return "\n\n".join(body for _, body in self.comments)


def topics() -> Iterator[Document]:
    """The language reference, short topics first: long ones contain them, and `deduplicate` keeps what comes first."""
    from pydoc_data.topics import topics as pages

    for name, text in sorted(pages.items(), key=lambda page: (len(page[1]), page[0])):
        yield Document(f"topic {name}", [Passage("", paragraph) for paragraph in re.split(r"\n\s*\n", text.strip())])


def source_modules(stdlib: Path) -> Iterator[Document]:
    """The docstrings of each source file under their signatures, read without importing anything."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if NOT_DOCUMENTATION & set(parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
            continue
        name = ".".join(parts).removesuffix(".__init__")
        yield Document(name, list(docstrings(tree, name)), list(comments(source)))


def docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[Passage]:
    """The docstring of the node, and those of what is defined in it."""
    match node:
        case ast.Module():
            header = f"module {name}"
        case ast.ClassDef():
            header = f"class {name}({', '.join(map(ast.unparse, node.bases))})".removesuffix("()")
        case _:
            header = f"{name}({ast.unparse(node.args)})"
    if docstring := ast.get_docstring(node):
        yield Passage(header, docstring.strip())
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(child, f"{name}.{child.name}")


def comments(source: str) -> Iterator[Passage]:
    """Blocks of two or more comment lines that read as prose rather than as code."""
    for block in re.findall(r"(?:^[ \t]*#[^\n]*\n){2,}", source, re.MULTILINE):
        text = re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE).strip()
        if (
            len(re.findall(r"[A-Za-z ,.']", text)) > 0.85 * len(text)
            and text.count(" ") >= 12
            and "Copyright" not in text
        ):
            yield Passage("", text)


def compiled_modules() -> Iterator[Document]:
    """The docstrings of modules written in C, which have no source file to read: these are imported."""
    dynamic = {module.name for module in pkgutil.iter_modules([f"{sysconfig.get_path('platstdlib')}/lib-dynload"])}
    for name in sorted(dynamic | set(sys.builtin_module_names)):
        if NOT_IMPORTED.match(name):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # built without the library it wraps
            continue
        members = [(name, module), *public_members(module, name)]
        members += [pair for path, value in members if inspect.isclass(value) for pair in public_members(value, path)]
        documented = [(path, value) for path, value in members if value.__doc__]
        passages = [
            Passage(signature(path, value), inspect.cleandoc(value.__doc__).strip()) for path, value in documented
        ]
        yield Document(f"C module {name}", passages)


def public_members(owner: Any, name: str) -> list[tuple[str, Any]]:
    """What an owner defines itself, without slots such as `__eq__`, whose docstrings are all alike."""

    def documented(value: Any) -> bool:
        return inspect.isclass(value) or inspect.isroutine(value) or inspect.isdatadescriptor(value)

    members = sorted(vars(owner).items())
    return [(f"{name}.{key}", value) for key, value in members if not key.startswith("_") and documented(value)]


def signature(name: str, value: Any) -> str:
    """The header of a value's docstring; many C functions keep their signature in the docstring itself."""
    if inspect.ismodule(value):
        return f"module {name}"
    prefix = "class " if inspect.isclass(value) else ""
    try:
        return f"{prefix}{name}{inspect.signature(value)}"
    except (TypeError, ValueError):
        return prefix + name


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop a passage whose letters were seen before: C modules repeat their Python twins, topics repeat each other."""
    seen: set[str] = set()

    def fresh(passage: Passage) -> bool:
        letters = re.sub(r"[\W\d_]", "", passage.body).lower()
        known = len(letters) >= 24 and letters in seen
        seen.add(letters)
        return not known

    for document in documents:
        yield Document(document.name, list(filter(fresh, document.passages)), list(filter(fresh, document.comments)))


def collect() -> list[Document]:
    """Every document of at least a short paragraph, in an order that depends on nothing but the Python version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everything = [*topics(), *source_modules(Path(sysconfig.get_path("stdlib"))), *compiled_modules()]
    return [document for document in deduplicate(everything) if len(document.text) >= 200]


def split(documents: list[Document], budget: int) -> tuple[list[Document], list[Document]]:
    """Train and held-out documents: the hash of the name decides, so the choice follows neither content nor order.

    Documents of 1 to 12 KB are taken in the order of their hashes up to `budget` characters. Then a held-out passage
    goes if half of its runs of eight words occur in training: what was copied and edited is not held out.
    """
    heldout: dict[str, Document] = {}
    size = 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        length = len(document.text)
        if 1_000 <= length <= 12_000 and size + length <= budget:
            heldout[document.name] = document
            size += length
    train = [document for document in documents if document.name not in heldout]
    known = {run for document in train for text in (document.text, document.comment_text) for run in runs(text)}

    def unseen(passage: Passage) -> bool:
        own = runs(passage.body)
        return len(own & known) <= 0.5 * len(own)

    cleaned = [Document(document.name, list(filter(unseen, document.passages))) for document in heldout.values()]
    return train, [document for document in cleaned if len(document.text) >= 200]


def runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    """Every run of `length` consecutive words.

    >>> sorted(runs("Return a new list.", length=3))
    [('a', 'new', 'list'), ('return', 'a', 'new')]
    """
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def documents(path: Path | None) -> list[Document]:
    """The corpus of this Python, or the one in the file, so that another Python version can train the same model."""
    if path is not None and path.exists():
        records = map(json.loads, path.read_text("utf-8").splitlines())
        return [
            Document(name, [Passage(*p) for p in passages], [Passage(*p) for p in notes])
            for name, passages, notes in records
        ]
    found = collect()
    if path is not None:
        path.write_text("".join(json.dumps(list(asdict(document).values())) + "\n" for document in found), "utf-8")
    return found
