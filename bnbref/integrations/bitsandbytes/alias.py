"""`import bitsandbytes` answered by bnbref: for code, checkpoints and libraries that cannot be changed.

    bnbref.install_as_bitsandbytes()            before or after transformers, peft and accelerate are imported
    import bitsandbytes as bnb                  bnb.nn.Linear4bit is bnbref.nn.Linear4bit

The classes are bnbref's own; the modules around them are made in memory, with bitsandbytes' paths, so that its pickles load.
A process that is spawned does not inherit the alias. `python -m bnbref alias --enable` installs a start-up hook for those,
which does nothing but where BNBREF_AS_BITSANDBYTES=1 is in the environment.
"""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from bnbref.arguments import check_bool
from bnbref.integrations.bitsandbytes import finder, ops
from bnbref.integrations.bitsandbytes.finder import NAME, VERSION
from bnbref.integrations.bitsandbytes.surface import MISSING, SURFACE

__all__ = ["as_bitsandbytes", "install_as_bitsandbytes", "uninstall_as_bitsandbytes"]

_undo = contextlib.ExitStack()
"""The changes that uninstalling takes back, the last one first."""

# ---- install --------------------------------------------------------------------------------------------------------


def install_as_bitsandbytes(*, version: str = VERSION, force: bool = False, patch_hf: bool = False) -> None:
    """Lets `import bitsandbytes` in this process mean bnbref. A second call does nothing.

    version: what `importlib.metadata` and `bitsandbytes.__version__` say. force: also where bitsandbytes is installed.
    patch_hf: let bnbref's own quantizer serve `BitsAndBytesConfig` in transformers (`take_over_bitsandbytes`): models that
    were loaded quantized can be saved again, offloaded and dequantized, which transformers' own cannot.

    RuntimeError if bitsandbytes is installed (without force), or was imported already; ValueError if the alias reports
    another version. Nothing has changed then.

    >>> import bnbref
    >>> with bnbref.as_bitsandbytes(force=True):
    ...     import bitsandbytes
    ...     bitsandbytes.__version__, bitsandbytes.nn.Linear4bit is bnbref.nn.Linear4bit
    ('0.50.2', True)
    """
    if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\d+)*((a|b|rc|\.dev|\.post)\d+)?", version):
        raise ValueError(f"version must be like '0.50.2', got {version!r}")
    check_bool("force", force)
    check_bool("patch_hf", patch_hf)
    found = finder.current()
    if found is None:
        if NAME in sys.modules:
            raise RuntimeError(
                f"bitsandbytes {getattr(sys.modules[NAME], '__version__', '')} is imported already: "
                "call install_as_bitsandbytes() first"
            )
        _check_not_installed(force)
        sys.meta_path.insert(0, finder.Finder(version, guarded=False))
    elif found.version != version:
        raise ValueError(f"version is {found.version!r} already: uninstall_as_bitsandbytes() first, got {version!r}")
    elif found.guarded:  # of the start-up hook, which asks when bitsandbytes is imported
        _check_not_installed(force)
        found.guarded = not force
    _refresh_caches()
    _bind()
    if patch_hf:
        _take_over(_undo)


def _take_over(undo: contextlib.ExitStack) -> None:
    """Lets bnbref serve `BitsAndBytesConfig`, until `undo` is closed if it did not before."""
    from bnbref.integrations.hf.transformers import give_back_bitsandbytes, take_over_bitsandbytes

    if take_over_bitsandbytes():
        undo.callback(give_back_bitsandbytes)


def _check_not_installed(force: bool) -> None:
    if not force and finder.is_installed():
        raise RuntimeError(
            "bitsandbytes is installed: uninstall it, or leave it aside with install_as_bitsandbytes(force=True)"
        )


def uninstall_as_bitsandbytes() -> None:
    """Undoes `install_as_bitsandbytes`.

    Modules that were imported stay with those who imported them; loaded models stay as they are.
    """
    found = finder.current()
    if found is None:
        return
    sys.meta_path.remove(found)
    for name in [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]:
        del sys.modules[name]
    _undo.close()
    _refresh_caches()


@contextlib.contextmanager
def as_bitsandbytes(*, version: str = VERSION, force: bool = False, patch_hf: bool = False) -> Iterator[None]:
    """`install_as_bitsandbytes` for the length of a test. What was loaded inside may import bitsandbytes later, and fail.

    Where it was installed before, it stays as it was.
    """
    check_bool("patch_hf", patch_hf)
    stays = finder.current()
    guarded = stays is not None and stays.guarded
    install_as_bitsandbytes(version=version, force=force)
    with contextlib.ExitStack() as undo:
        if stays is None:
            undo.callback(uninstall_as_bitsandbytes)
        else:
            undo.callback(setattr, stays, "guarded", guarded)
        if patch_hf:
            _take_over(undo)
        yield


# ---- modules --------------------------------------------------------------------------------------------------------


def fill(module: ModuleType, version: str) -> None:
    """Give a module of bitsandbytes its names and its submodules: `bnb.nn.modules` is there after `import bitsandbytes`."""
    names = SURFACE[module.__name__.removeprefix(NAME).removeprefix(".")]
    for name, source in names.items():
        home, _, attribute = source.partition(":")
        found = importlib.import_module(home)
        setattr(module, name, getattr(found, attribute) if attribute else found)
    setattr(module, "__getattr__", _missing_from(module.__name__))  # noqa: B010
    if module.__name__.startswith(f"{NAME}.optim."):
        for name in names:
            _rename(getattr(module, name), module.__name__)
    if module.__name__ == NAME:
        setattr(module, "__version__", version)  # noqa: B010
        ops.define()
        _undo.callback(ops.undefine)
    for child in SURFACE:
        parent, _, _ = f"{NAME}.{child}".rpartition(".")
        if child and parent == module.__name__:
            importlib.import_module(f"{NAME}.{child}")


def _missing_from(module: str) -> Any:
    def __getattr__(name: str) -> Any:
        reason = MISSING.get(f"{module}.{name}".removeprefix(f"{NAME}."))
        explained = f": {reason}" if reason else f": bnbref serves the public names of bitsandbytes {VERSION}"
        raise AttributeError(f"module {module!r} has no attribute {name!r}{explained}", name=name)

    return __getattr__


def _rename(cls: Any, module: str) -> None:
    # transformers' Trainer looks for the word in str(optimizer_cls), to keep the state of embeddings in 32 bits.
    from bnbref.optim import Optimizer

    if isinstance(cls, type) and cls is not Optimizer and issubclass(cls, Optimizer):
        _undo.callback(setattr, cls, "__module__", cls.__module__)
        cls.__module__ = module


# ---- what the libraries remember ------------------------------------------------------------------------------------

_CACHED = (
    ("transformers.utils.import_utils", "is_bitsandbytes_available"),
    ("peft.import_utils", "is_bnb_available"),
    ("peft.import_utils", "is_bnb_4bit_available"),
)
_BINDING = ("transformers.integrations.bitsandbytes", "peft.helpers")
"""Modules that import bitsandbytes as `bnb` if it is there when they are imported."""


def _refresh_caches() -> None:
    """Forget whether bitsandbytes was there: modules and metadata."""
    importlib.invalidate_caches()
    for home, name in _CACHED:
        module = sys.modules.get(home)
        if module is not None:
            getattr(module, name).cache_clear()


def _bind() -> None:
    """Gives `bnb` to the modules that have tried `import bitsandbytes as bnb` before the alias was there, and failed."""
    for home in _BINDING:
        module: Any = sys.modules.get(home)
        if module is not None and getattr(module, "bnb", None) is None:
            before = (setattr, module, "bnb", None) if hasattr(module, "bnb") else (delattr, module, "bnb")
            _undo.callback(*before)
            module.bnb = importlib.import_module(NAME)
    for name in finder.MENDED:
        if name in sys.modules:
            mend(sys.modules[name])


# The first version of transformers whose conversions give each weight its own name back when they are undone. An older one gives
# the first name of the pattern to every weight (seen in 5.17), so that there saving is left to raise an error.
_UNDOES_BY_NAME = (5, 23)

# The oldest version of peft that is tested. An older one is left as it is.
_ADAPTABLE = (0, 21)


def mend(module: Any) -> None:
    """Gives a module of another library, one of `finder.MENDED`, what it needs over bnbref's layers."""
    if module.__name__ == "peft":
        _let_peft_find_parameters(module)
    else:
        _let_transformers_save(module)


def _version(package: Any) -> tuple[int, ...]:
    return tuple(map(int, package.__version__.split(".")[:2]))


def _let_peft_find_parameters(peft: Any) -> None:
    """LoRA on layers and parameters that are quantized, and refusals of what would read codes: `adapt_peft`."""
    name = "bnbref.integrations.hf.peft"
    importing = name in sys.modules and not hasattr(sys.modules[name], "adapt_peft")  # and who imports it adapts
    if _version(peft) >= _ADAPTABLE and not importing:
        importlib.import_module(name).adapt_peft()


def _let_transformers_save(module: Any) -> None:
    """Let transformers save again what its own quantizer has loaded quantized.

    Saving undoes the conversions of loading. Reading codes and scales needs no undoing, because they are saved as they are
    in the state dict; transformers leaves that out, and `save_pretrained` raises NotImplementedError.
    """
    import transformers

    if _version(transformers) < _UNDOES_BY_NAME:
        return
    from transformers.core_model_loading import ConversionOps, _IdentityOp

    for cls in (module.Bnb4bitDeserialize, module.Bnb8bitDeserialize):
        if cls.reverse_op is ConversionOps.reverse_op:
            cls.reverse_op = property(lambda self: _IdentityOp())
            _undo.callback(delattr, cls, "reverse_op")
