"""`import bitsandbytes` answered by bnbref: the import system, the surface, the hook, the libraries' caches, old pickles."""

import importlib.metadata
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType

import pytest
import torch

import bnbref
from bnbref import cli
from bnbref.integrations.bitsandbytes import alias, finder, startup
from bnbref.integrations.bitsandbytes.surface import MISSING, SURFACE

ROOT = Path(__file__).resolve().parent.parent
NAMES = (ROOT / "tests" / "data" / "bitsandbytes_names.txt").read_text(encoding="utf-8").split()


def run(code, *flags, **environment):
    """The output of a fresh interpreter."""
    env = {**os.environ, "BNBREF_COMPILE": "0", "TRANSFORMERS_VERBOSITY": "error", **environment}
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# ---- the import system ----------------------------------------------------------------------------------------------


def test_everybody_who_asks_finds_it(bitsandbytes):
    assert importlib.util.find_spec("bitsandbytes") is not None
    assert importlib.metadata.version("bitsandbytes") == "0.50.2" == bitsandbytes.__version__
    assert importlib.metadata.metadata("bitsandbytes")["Name"] == "bitsandbytes"
    assert "bitsandbytes" in importlib.metadata.packages_distributions()["bitsandbytes"]
    assert importlib.util.find_spec("bitsandbytes.cuda_specs") is None
    with pytest.raises(ModuleNotFoundError, match=r"bitsandbytes\.research"):
        importlib.import_module("bitsandbytes.research")
    assert "multi_backend" in bitsandbytes.features


@pytest.mark.parametrize("module", finder.MODULES)
def test_every_module_is_found_and_imported(bitsandbytes, module):
    name = f"bitsandbytes.{module}".rstrip(".")
    assert importlib.util.find_spec(name).origin == "bnbref"
    assert importlib.import_module(name).__name__ == name


def test_every_module_is_an_attribute_after_the_import_alone():
    """`bnb.nn.modules.Params4bit`, in the tests of transformers and in peft; bitsandbytes has two modules under a second name."""
    code = """
import operator
import bnbref
bnbref.install_as_bitsandbytes(force=True)
import bitsandbytes as bnb
from bnbref.integrations.bitsandbytes.finder import MODULES
for module in MODULES[1:]:
    assert operator.attrgetter(module)(bnb).__name__ == f"bitsandbytes.{module}"
assert bnb.modules is bnb.nn.modules and bnb.adam is bnb.optim.adam
assert bnb.nn.modules.Params4bit is bnb.nn.Params4bit is bnbref.nn.Params4bit
"""
    assert run(code) == []


def test_classes_are_the_same_objects(bitsandbytes):
    import bitsandbytes.optim.adamw

    assert bitsandbytes.nn.Linear4bit is bnbref.nn.Linear4bit
    assert bitsandbytes.optim.AdamW8bit is bitsandbytes.optim.adamw.AdamW8bit is bnbref.optim.AdamW8bit
    assert "bitsandbytes" in str(bitsandbytes.optim.AdamW8bit)  # transformers' Trainer looks for the word


def test_uninstalling_leaves_nothing():
    if "bitsandbytes" in sys.modules:
        pytest.skip("bitsandbytes itself is imported")
    before = list(sys.meta_path)
    with alias.as_bitsandbytes(force=True):
        import bitsandbytes  # noqa: F401

        assert sys.meta_path != before
    assert sys.meta_path == before
    assert not [name for name in sys.modules if name.startswith("bitsandbytes")]
    assert str(bnbref.optim.AdamW8bit) == "<class 'bnbref.optim.families.AdamW8bit'>"
    assert not hasattr(torch.ops.bitsandbytes, "quantize_4bit")
    bnbref.uninstall_as_bitsandbytes()  # again does nothing


def test_what_was_installed_before_stays():
    if "bitsandbytes" in sys.modules:
        pytest.skip("bitsandbytes itself is imported")
    with alias.as_bitsandbytes(force=True):
        with alias.as_bitsandbytes(force=True):
            first = importlib.import_module("bitsandbytes")
        assert sys.modules["bitsandbytes"] is first
        assert importlib.util.find_spec("bitsandbytes.nn").origin == "bnbref"
    assert finder.current() is None


@pytest.mark.parametrize("switch", ["1", "force"])
@pytest.mark.parametrize("installed", [False, True])
def test_bitsandbytes_itself_is_left_aside_by_force_alone(switch, installed, tmp_path, monkeypatch):
    if installed:
        (tmp_path / "bitsandbytes.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setenv(finder.SWITCH, switch)
    finder.at_startup()
    finder.at_startup()
    (found,) = sys.meta_path
    assert found is finder.current()
    if installed and switch != "force":
        with pytest.raises(
            ImportError, match="bitsandbytes is installed: uninstall it, or set BNBREF_AS_BITSANDBYTES=force"
        ):
            found.find_spec("bitsandbytes")
    else:
        assert found.find_spec("bitsandbytes").origin == "bnbref"
    assert found.find_spec("bitsandbytes.optim").origin == "bnbref"
    assert found.find_spec("bitsandbytes.tomorrow") is None


def test_a_module_of_transformers_is_mended_when_it_has_been_loaded(monkeypatch):
    transformers = pytest.importorskip("transformers")
    mended = []
    monkeypatch.setattr(
        alias, "mend", lambda module: mended.append((module.__name__, hasattr(module, "Bnb4bitQuantize")))
    )
    name = "transformers.integrations.bitsandbytes"
    spec = finder.Finder("0.50.2", guarded=False).find_spec(name, transformers.integrations.__path__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert mended == [(name, True)]


def test_what_the_finder_does_not_know():
    served = finder.Finder("0.45.0", guarded=False)
    assert served.find_spec("peft", []) is None  # where peft is not installed
    assert list(served.find_distributions(importlib.metadata.DistributionFinder.Context(name="other"))) == []
    (distribution,) = served.find_distributions(importlib.metadata.DistributionFinder.Context(name="BitsAndBytes"))
    assert [distribution.read_text(file) for file in ("top_level.txt", "RECORD")] == ["bitsandbytes", None]
    assert "Version: 0.45.0\n" in distribution.read_text("METADATA")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A package called bitsandbytes that can be imported."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("__version__ = '0.1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    sys.modules.pop("bitsandbytes", None)


def test_bitsandbytes_that_is_installed_is_not_hidden(real):
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match=r"bitsandbytes is installed.*force=True"):
        bnbref.install_as_bitsandbytes()
    assert sys.meta_path == before


def test_the_quantizer_of_transformers_is_patched_inside_alone():
    quantizers = pytest.importorskip("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING
    if "bitsandbytes" in sys.modules:
        pytest.skip("bitsandbytes itself is imported")
    hf = importlib.import_module("bnbref.integrations.hf.transformers")
    given_back = bool(hf._undo)  # it took over when it was imported, where bitsandbytes is not installed
    hf.give_back_bitsandbytes()
    before = dict(quantizers)
    try:
        with alias.as_bitsandbytes(force=True):
            with alias.as_bitsandbytes(force=True, patch_hf=True):
                assert quantizers["bitsandbytes_4bit"] is not before["bitsandbytes_4bit"]
            assert quantizers["bitsandbytes_4bit"] is before["bitsandbytes_4bit"]
    finally:
        if given_back:
            hf.take_over_bitsandbytes()


def test_bitsandbytes_that_is_installed_is_not_hidden_by_the_hook(real, monkeypatch):
    """The hook's finder asks when it is imported; the function, when it is called."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setenv(finder.SWITCH, "1")
    finder.at_startup()
    with pytest.raises(RuntimeError, match=r"bitsandbytes is installed.*force=True"):
        bnbref.install_as_bitsandbytes()
    assert finder.current().guarded
    bnbref.install_as_bitsandbytes(force=True)
    try:
        assert not finder.current().guarded
    finally:
        bnbref.uninstall_as_bitsandbytes()


def test_bitsandbytes_that_is_imported_is_never_replaced(real):
    module = importlib.import_module("bitsandbytes")
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match=r"bitsandbytes 0\.1 is imported already"):
        bnbref.install_as_bitsandbytes(force=True)
    assert sys.meta_path == before
    assert sys.modules["bitsandbytes"] is module


@pytest.mark.parametrize("version", ["", "new", None, 0.5])
def test_versions_are_checked(version):
    with pytest.raises(ValueError, match=r"version must be like '0\.50\.2', got "):
        bnbref.install_as_bitsandbytes(version=version)


def test_another_version_is_refused(bitsandbytes):
    bnbref.install_as_bitsandbytes(force=True)  # again does nothing
    with pytest.raises(ValueError, match=r"version is '0\.50\.2' already.*got '0\.45\.0'"):
        bnbref.install_as_bitsandbytes(version="0.45.0", force=True)


# ---- the surface ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def surface():
    """docs/surface.py, which makes the table of the page."""
    spec = importlib.util.spec_from_file_location("surface", ROOT / "docs" / "surface.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_name_of_bitsandbytes_is_there_or_says_why_not(bitsandbytes, surface):
    assert set(finder.MODULES) == SURFACE.keys()
    for name in NAMES:
        module, _, attribute = name.rpartition(".")
        home = importlib.import_module(f"bitsandbytes.{module}".rstrip("."))
        if name in MISSING:
            with pytest.raises(AttributeError, match=r"has no attribute .*: ."):
                getattr(home, attribute)
        else:
            assert getattr(home, attribute) is not None, name
    assert (surface.DIFFERS.keys() | MISSING.keys()) <= {*NAMES, "cextension.lib"}


def test_the_names_are_those_of_bitsandbytes():
    """Against the real one, where it is installed."""
    if not finder.is_installed():
        pytest.skip("bitsandbytes is not installed")
    done = subprocess.run(
        [sys.executable, "docs/surface.py", "--walk"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == NAMES


def test_the_page_has_the_table(surface):
    assert surface.table() in (ROOT / "docs" / "content" / "dropin.md").read_text(encoding="utf-8")
    assert set(surface.MISSING_MODULES).isdisjoint(finder.MODULES)


def test_a_name_that_nobody_has(bitsandbytes):
    assert not hasattr(bitsandbytes.functional, "nonsense")
    with pytest.raises(AttributeError, match="bnbref serves the public names of bitsandbytes"):
        _ = bitsandbytes.functional.nonsense


# ---- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "nf4_nested", "int8", "int8_used"])
def test_layers_that_bitsandbytes_pickled(bitsandbytes, kind, eager):
    """Written by bitsandbytes 0.50.2, with what the layer gave there."""
    written = pickle.loads((ROOT / "tests" / "data" / "bitsandbytes_pickles.pkl").read_bytes())
    blob, y = written[kind]
    layer = pickle.loads(blob)
    x = torch.linspace(-1, 1, 128).view(2, 64)
    assert type(layer.weight) is (bnbref.nn.Int8Params if "int8" in kind else bnbref.nn.Params4bit)
    # For int8 bitsandbytes rounds x and the bias to float16: 2^-11 of 64 products and a bias, each below 1/8. In 4 bits two CPUs
    # add the same 64 products and a bias in float32 in two orders: each is off by at most 65 roundings of at most 65/8.
    bound = 2**-11 * 65 / 8 if "int8" in kind else 2 * 65 * 2**-24 * 65 / 8
    torch.testing.assert_close(layer(x), torch.tensor(y), rtol=0, atol=bound)
    again = type(layer)(64, 16, **({"has_fp16_weights": False} if "int8" in kind else {}))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.to("cpu")(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_states_that_bitsandbytes_pickled(bitsandbytes):
    written = pickle.loads((ROOT / "tests" / "data" / "bitsandbytes_pickles.pkl").read_bytes())
    state = pickle.loads(written["qs"][0])
    expected = bnbref.functional.quantize_4bit(torch.linspace(-1, 1, 64), quant_type="nf4")[1]
    assert type(state) is bnbref.functional.QuantState
    assert state == expected
    assert state[2] is torch.float32
    assert pickle.loads(written["state"][0]).has_fp16_weights


# ---- the start-up hook ----------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site-packages of our own."""
    monkeypatch.setattr(startup.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


HOOKED = """
import site, sys
site.addsitedir({directory!r})
print("torch" in sys.modules, "bnbref" in sys.modules)
"""


def test_the_hook_serves_only_where_it_is_asked_to(site):
    path = startup.enable_hook()
    assert path.parent == site
    assert path.read_text().count("\n") == 1
    start = HOOKED.format(directory=str(site))
    ask = "import importlib.util, importlib.metadata as m; print(importlib.util.find_spec('bitsandbytes').origin, "
    ask += "m.version('bitsandbytes'), 'torch' in sys.modules)\n"
    ask += "import bitsandbytes; print(bitsandbytes.nn.Linear4bit.__module__)"
    found = run(start + ask, BNBREF_AS_BITSANDBYTES="force")
    assert found == ["False", "False", "bnbref", "0.50.2", "False", "bnbref.nn.linear"]
    off = start + "print(any(hasattr(f, 'serves_bnbref') for f in sys.meta_path))"
    assert run(off, BNBREF_AS_BITSANDBYTES="0") == ["False", "False", "False"]
    assert run(off) == ["False", "False", "False"]
    # bnbref finds the finder that the hook put there, and can take it away
    known = start + "import bnbref; bnbref.install_as_bitsandbytes(force=True); print(len(sys.meta_path))\n"
    known += "bnbref.uninstall_as_bitsandbytes(); print(len(sys.meta_path))"
    before, after = map(int, run(known, BNBREF_AS_BITSANDBYTES="1")[2:])
    assert before == after + 1
    assert startup.disable_hook()
    assert not path.exists()
    assert not startup.disable_hook()


def test_the_command(site, capsys, monkeypatch):
    monkeypatch.delenv("BNBREF_AS_BITSANDBYTES", raising=False)
    assert cli.main(["alias", "--status"]) == 0
    assert "hook not installed" in capsys.readouterr().out
    assert cli.main(["alias", "--enable"]) == 0
    assert "bnbref_alias.pth" in capsys.readouterr().out
    assert cli.main(["alias", "--status"]) == 0
    assert "hook installed" in capsys.readouterr().out
    assert cli.main(["alias", "--disable"]) == 0
    assert cli.main(["alias", "--disable"]) == 0
    assert "there is no" in capsys.readouterr().out
    monkeypatch.setattr(startup.sysconfig, "get_path", lambda name: str(site / "nowhere"))
    assert cli.main(["alias", "--enable"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_hook_does_not_hide_bitsandbytes(site, tmp_path):
    startup.enable_hook()
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("")
    code = HOOKED.format(directory=str(site)) + (
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import bitsandbytes\n"
        "except ImportError as error:\n    print(str(error).replace(' ', '_'))"
    )
    (message,) = run(code, BNBREF_AS_BITSANDBYTES="1")[2:]
    assert "bitsandbytes_is_installed" in message
    assert "BNBREF_AS_BITSANDBYTES=force" in message


WORKERS = """
import multiprocessing, os, sys
from pathlib import Path

import torch

def answer():
    import bitsandbytes
    return bitsandbytes.nn.Linear4bit.__module__

class Answers(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        return answer()

if __name__ == "__main__":
    if "RANK" in os.environ:
        Path(sys.argv[1], os.environ["RANK"]).write_text(answer())
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(answer))
        print(*torch.utils.data.DataLoader(Answers(), None, num_workers=1, multiprocessing_context="spawn"))
        print("bitsandbytes" in sys.modules)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment of its own that has all that this one has, and the hook, as the command installs it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    ours = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}, scheme="venv")
    Path(ours, "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    (folder / "workers.py").write_text(WORKERS)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def call(*arguments, **more):
        command = [str(python), *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, env=env | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split()

    assert str(Path(ours, "bnbref_alias.pth")) in " ".join(call("-m", "bnbref", "alias", "--enable"))
    return call


def test_workers_that_are_spawned_see_the_hook(environment):
    """A multiprocessing worker, and a DataLoader's; the process that starts them never imports bitsandbytes."""
    found = environment("workers.py", BNBREF_AS_BITSANDBYTES="force")
    assert found == ["bnbref.nn.linear", "bnbref.nn.linear", "False"]


def test_workers_of_accelerate_launch_see_the_hook(environment, tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    environment(*launch, "workers.py", tmp_path, BNBREF_AS_BITSANDBYTES="force", ACCELERATE_USE_CPU="true")
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["bnbref.nn.linear"] * 2


# ---- libraries that looked before -----------------------------------------------------------------------------------


def test_installed_after_the_libraries_were_imported():
    pytest.importorskip("peft")
    code = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(name)

import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "bitsandbytes" else real(name, package)
sys.meta_path.insert(0, Hide())
import transformers, peft, accelerate, peft.helpers, transformers.integrations.bitsandbytes
from transformers.utils import is_bitsandbytes_available
from peft.import_utils import is_bnb_4bit_available
print(is_bitsandbytes_available(), is_bnb_4bit_available())
sys.meta_path.pop(0)
importlib.util.find_spec = real

import bnbref
bnbref.install_as_bitsandbytes(force=True)
print(is_bitsandbytes_available(), is_bnb_4bit_available(), accelerate.utils.is_4bit_bnb_available())
print(transformers.integrations.bitsandbytes.bnb.__name__, peft.helpers.bnb.__name__)
from peft.tuners.lora.bnb import Linear4bit
bnbref.uninstall_as_bitsandbytes()
print(hasattr(transformers.integrations.bitsandbytes, "bnb"), peft.helpers.bnb)
"""
    assert run(code) == ["False", "False", "True", "True", "True", "bitsandbytes", "bitsandbytes", "False", "None"]


ON_QUANTIZED_PARAMETERS = """
import bnbref
{0}
bnbref.install_as_bitsandbytes(force=True)
{1}
import bitsandbytes as bnb, peft, torch
from torch import nn

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 64, 64))

    def forward(self, x):
        return torch.einsum("bk,enk->ebn", x, self.up).sum(0)

net = nn.Sequential(Experts(), bnb.nn.Linear4bit(64, 64))
bnb.nn.parametrize.replace_parameter_4bit(net[0], "up")
model = peft.get_peft_model(net.to("cpu"), peft.LoraConfig(target_parameters=["up"], target_modules=["1"]))
model(torch.randn(2, 64)).sum().backward()
print(*sorted(name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()))
try:
    peft.get_peft_model(nn.Sequential(bnb.nn.Linear4bit(64, 64)).to("cpu"), peft.LoHaConfig(target_modules=["0"]))
except ValueError as refusal:
    print("refused" if "LOHA reads the weight of 0, which is packed" in str(refusal) else refusal)
print(*(name for name in __import__("sys").modules if name == "bnbref.integrations.hf.transformers"))
"""


PEFT_BY_US = "import bnbref.integrations.hf.peft as ours; ours.adapt_peft()"
ORDERS = {"peft first": ("import peft", ""), "alias first": ("", "import peft"), "by our quantizer": ("", PEFT_BY_US)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_lora_finds_parameters_that_are_quantized_by_themselves(order):
    """Without `patch_hf`: peft finds what it finds over bitsandbytes' layers, and more; nothing is silent."""
    pytest.importorskip("peft")
    if order[0] == "import peft" and finder.is_installed():
        pytest.skip("bitsandbytes itself is installed, which peft imports")
    assert run(ON_QUANTIZED_PARAMETERS.format(*order)) == ["0", "1", "refused"]


def test_a_transformers_without_conversions_is_left_as_it_is(monkeypatch):
    """That of 4.57, to which AdapterHub's `adapters` keeps: it saves what it has loaded quantized by itself."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)  # an import of it fails
    alias.mend(ModuleType("transformers.integrations.bitsandbytes"))
