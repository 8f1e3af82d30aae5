"""A page_directory among other optimizers, processes and programs that write there, and on a disk without room."""

import copy
import errno
import gc
import importlib
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import same_bits
from torch import nn

from bnbref import optim
from bnbref.optim import folder_lock, page_directory

pytestmark = pytest.mark.usefixtures("eager")


def begun(folder, name="PagedAdamW8bit"):
    """A parameter with a gradient, and an optimizer that has made no step."""
    p = nn.Parameter(torch.linspace(-1, 1, 600).view(20, 30))
    p.grad = torch.ones(20, 30)
    return p, getattr(optim, name)([p], page_directory=folder, min_8bit_size=0)


def locking(file, mode, size):
    """`msvcrt.locking`, as the documentation of Windows has it: of a file that may be written to, for the one who opened it."""
    import fcntl

    assert (mode, size) == (2, 1)
    assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_RDWR
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "Permission denied") from error


@pytest.fixture(params=["fcntl", "msvcrt"])
def locks(request, monkeypatch):
    """The lock that this system has, and that of Windows, where there is no module fcntl, and no folder can be opened."""
    if request.param == "fcntl":
        pytest.importorskip("fcntl")
        yield request.param
        return
    opened = os.open

    def open_a_file(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as hidden:
        if os.name != "nt":
            hidden.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
        hidden.setitem(sys.modules, "fcntl", None)
        importlib.reload(folder_lock)
    monkeypatch.setattr(os, "open", open_a_file)
    monkeypatch.setattr(page_directory, "lock", folder_lock.lock)
    yield request.param
    importlib.reload(folder_lock)


@pytest.mark.parametrize("how", ["second", "copy", "pickle"])
def test_a_directory_has_one_optimizer(how, locks, tmp_path):
    _, first = begun(tmp_path)
    first.step()
    q, other = begun(tmp_path)
    if how != "second":
        other = copy.deepcopy(first) if how == "copy" else pickle.loads(pickle.dumps(first))
        [q] = other.param_groups[0]["params"]
        q.grad = torch.ones(20, 30)
    before, states = q.detach().clone(), copy.deepcopy(optim.read_pages(tmp_path))
    with pytest.raises(RuntimeError, match=r"page_directory .* is in use by another optimizer"):
        other.step()
    assert torch.equal(q, before)
    assert str(optim.read_pages(tmp_path)) == str(states)
    first.step()
    assert optim.read_pages(tmp_path)[0]["step"] == 2
    del first
    other.step()  # now it is free; and the states of a copy are in the files from then on
    other.step()
    files, own = optim.read_pages(tmp_path)[0], other.state[q]
    assert files["step"] == own["step"] == (2 if how == "second" else 3)
    assert all(torch.equal(files[key], own[key]) for key in ("state1", "absmax1", "state2", "absmax2"))
    assert all(own[key].untyped_storage().is_shared() for key in ("state1", "absmax2"))


def test_a_group_that_is_refused_when_it_is_loaded_leaves_the_files(tmp_path):
    p, optimizer = begun(tmp_path)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()  # the files now have other states than those that are to be loaded
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    saved["param_groups"][0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr"):
        optimizer.load_state_dict(saved)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert optimizer.state[p]["step"] == 2


def test_a_directory_has_one_process(tmp_path):
    _, first = begun(tmp_path)
    first.step()
    program = (
        "import torch, bnbref; from bnbref import optim; p = torch.nn.Parameter(torch.ones(600)); p.grad = p.detach()\n"
        f"with bnbref.eager(): optim.PagedAdamW8bit([p], page_directory={str(tmp_path)!r}).step()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "is in use by another optimizer" in ended.stderr


def test_a_directory_stays_where_it_was(tmp_path, monkeypatch):
    """A relative path is that of the program when it made the optimizer."""
    monkeypatch.chdir(tmp_path)
    _, optimizer = begun("pages")
    optimizer.step()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    optimizer.step()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert optim.read_pages(tmp_path / "pages")[0]["step"] == 2


@pytest.mark.parametrize("what", ["one", "all", "folder"])
def test_files_that_were_removed_are_no_checkpoint(what, tmp_path):
    """As cleaners of /tmp do. The states are still in memory, and the run has the bits that it would have had."""
    (p, optimizer), (q, twin) = begun(tmp_path / "pages"), begun(tmp_path / "twin")
    optimizer.step()
    if what == "folder":
        shutil.rmtree(tmp_path / "pages")
    else:
        for path in sorted((tmp_path / "pages").glob("*.bin"))[: 1 if what == "one" else 9]:
            path.unlink()
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"lacks . files that were removed, 0\.absmax1\."):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"no steps\.json"):
            optim.read_pages(tmp_path / "pages")
    for _ in range(3):
        twin.step()
    assert same_bits(p, q)
    state = optimizer.state_dict()["state"][0]
    assert str(state) == str(twin.state_dict()["state"][0])


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing is reserved here")
def test_a_disk_without_room_is_said_before_a_step(tmp_path, monkeypatch):
    """A page of a file with holes would find no room later, which ends a process."""
    p, optimizer = begun(tmp_path)
    before = p.detach().clone()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"page_directory has no room for 0\.state1\.uint8\.20x30\.bin, of 600 bytes: No space"
    ):
        optimizer.step()
    assert torch.equal(p, before)
    assert not list(tmp_path.glob("*.bin"))
    monkeypatch.undo()
    optimizer.step()
    assert optim.read_pages(tmp_path)[0]["step"] == 1
    assert (tmp_path / "0.state1.uint8.20x30.bin").stat().st_blocks > 0


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", ""):
        with pytest.raises(ValueError, match="page_directory must be a folder, got"):
            begun(path)


def test_a_scheduler_does_not_keep_a_directory(locks, tmp_path):
    """It is in a cycle with its optimizer, which is not gone with the last name for it."""
    gc.disable()
    try:
        _, first = begun(tmp_path)
        scheduler = torch.optim.lr_scheduler.ConstantLR(first)
        first.step()
        del first, scheduler
        begun(tmp_path)[1].step()
    finally:
        gc.enable()
    assert optim.read_pages(tmp_path)[0]["step"] == 1
    assert (tmp_path / "lock").exists() == (locks == "msvcrt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_neither_steps_the_states_nor_keeps_the_directory(tmp_path):
    """As a worker of a DataLoader, which may live on when its parent makes another optimizer, or was killed."""
    p, first = begun(tmp_path)
    first.step()
    before = p.detach().clone()
    (said, say), (asked, go_on) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # threads of torch are not there: nothing may be computed
        try:
            first._placement.begin()  # of a step
        except BaseException as error:
            os.write(say, str(error).encode())
        finally:
            os.write(say, b".")
            os.read(asked, 1)
            os._exit(0)
    try:
        assert b"is in use by another optimizer" in os.read(said, 1000)
        first.step()
        del first
        _, other = begun(tmp_path)
        other.step()  # while the fork lives
        assert not torch.equal(p, before)
    finally:
        os.write(go_on, b".")
        os.waitpid(child, 0)
        for each in (said, say, asked, go_on):
            os.close(each)


def test_files_in_the_place_of_removed_ones_are_anothers(tmp_path):
    """The checkpoint there is the second optimizer's, and the first one does not say that it is of its own steps."""
    folder = tmp_path / "pages"
    _, first = begun(folder)
    first.step()
    shutil.rmtree(folder)
    _, second = begun(folder)
    second.step()
    with pytest.warns(UserWarning, match=r"lacks 4 files that were removed"):
        first.step()
    with pytest.raises(RuntimeError, match=r"no steps\.json"):
        optim.read_pages(folder)
    second.step()
    assert optim.read_pages(folder)[0]["step"] == 2
