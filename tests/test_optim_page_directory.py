"""A page_directory among other optimizers, processes and programs that write there, and on a disk without room."""

import contextlib
import copy
import errno
import gc
import importlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnbref import optim
from bnbref.optim import folder_lock, page_directory
from bnbref.optim.page_directory import Directory

pytestmark = pytest.mark.usefixtures("eager")


class Sign(optim.Rule):
    """Keeps nothing but the number of its steps."""

    states = ()

    def coefficients(self, t, group):
        return {"rate": group["lr"], "decay": 1.0}

    def direction(self, p, g, c):
        return (g,)


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


def test_parameters_that_change_places_change_their_files(tmp_path):
    """Also where some keep theirs."""
    params = [nn.Parameter(torch.linspace(-1, 1, 60) * k) for k in (1, 2, 3)]
    optimizer = optim.AdamW8bit(params, page_directory=tmp_path, min_8bit_size=0)
    for t in range(2):
        for k, p in enumerate(params):
            p.grad = torch.sin(torch.arange(60.0) * (t + k))
        optimizer.step()
        optimizer.param_groups[0]["params"][:] = [params[0], params[2], params[1]]
    fresh = optim.AdamW8bit(optimizer.param_groups[0]["params"], min_8bit_size=0)
    fresh.load_state_dict({**fresh.state_dict(), "state": optim.read_pages(tmp_path)})
    assert_equal_states(fresh.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_file_that_was_removed_before_its_parameter_moved_is_missed(tmp_path):
    params = [nn.Parameter(torch.linspace(-1, 1, 60)) for _ in range(2)]
    optimizer = optim.AdamW8bit(params, page_directory=tmp_path, min_8bit_size=0)
    for p in params:
        p.grad = torch.ones(60)
    optimizer.step()
    (removed,) = tmp_path.glob("1.absmax1.*")
    removed.unlink()
    optimizer.param_groups[0]["params"].pop(0)
    with pytest.warns(UserWarning, match=r"lacks 1 files that were removed, 0\.absmax1\."):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"no steps\.json"):
        optim.read_pages(tmp_path)


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
            first._placement.directory.begin()  # of a step
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


STEPS_OF_A_USER = st.lists(
    st.sampled_from(["step", "step", "remove", "forget", "add", "turn", "clear", "load", "set"]),
    min_size=3,
    max_size=12,
)


@settings(max_examples=40)
@given(STEPS_OF_A_USER, st.randoms(use_true_random=False), st.sampled_from(["AdamW8bit", "AdamW32bit", "Muon8bit"]))
def test_groups_that_change_change_the_files(what, random, name):
    """Files are named by the index of their parameter: one that leaves its group, comes back, or has another place later must
    not be stepped with the state of another one, nor be resumed with it."""
    shapes = [(5, 60), (5, 60), (5, 60), (8, 40)]
    every = [[nn.Parameter(torch.linspace(-1, 1, a * b).view(a, b)) for a, b in shapes] for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        pages = [{"page_directory": folder}, {}]
        both = [getattr(optim, name)(ps[:2], min_8bit_size=0, **own) for ps, own in zip(every, pages, strict=True)]
        saved = copy.deepcopy(both[1].state_dict())
        for t, word in enumerate([*what, "step"]):
            i, place = random.randrange(4), random.randrange(4)
            for ps, optimizer in zip(every, both, strict=True):
                group = optimizer.param_groups[0]["params"]
                inside = next((k for k, p in enumerate(group) if p is ps[i]), None)
                if word in ("remove", "forget") and inside is not None and len(group) > 1:
                    group.pop(inside)
                    if word == "forget":
                        optimizer.state.pop(ps[i], None)
                elif word == "add" and inside is None:
                    group.insert(place, ps[i])
                elif word == "turn":
                    group.reverse()
                elif word == "clear":
                    optimizer.state.pop(ps[i], None)
                elif word == "set" and inside is not None:
                    optimizer.set_exact_weight(ps[i], torch.full(shapes[i], 0.5 + t))
                elif word == "load" and len(group) == len(saved["param_groups"][0]["params"]):
                    with contextlib.suppress(ValueError):  # another shape
                        optimizer.load_state_dict(copy.deepcopy(saved))
                elif word == "step":
                    for k, p in enumerate(ps):
                        p.grad = torch.sin(torch.arange(p.numel()) * (t + 1.0 + k)).view(p.shape)
                    optimizer.step()
            assert all(map(same_bits, *every))
            if word == "step" and all(p in both[1].state for p in both[1].param_groups[0]["params"]):
                gone = [p for p in both[1].state if not any(p is q for q in both[1].param_groups[0]["params"])]
                kept = {p: both[1].state.pop(p) for p in gone}
                saved = copy.deepcopy(both[1].state_dict())
                both[1].state.update(kept)
                fresh = getattr(optim, name)(
                    [nn.Parameter(p.detach().clone()) for p in both[1].param_groups[0]["params"]]
                )
                fresh.load_state_dict({**fresh.state_dict(), "state": optim.read_pages(folder)})
                assert_equal_states(fresh.state_dict()["state"], saved["state"])


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for i, state in one.items():
        assert state["step"] == other[i]["step"]
        wrapped, others = state["__bnb_optimizer_quant_state__"], other[i]["__bnb_optimizer_quant_state__"]
        assert wrapped.keys() == others.keys()
        assert all(same_bits(x, others[key]) for key, x in wrapped.items())


def test_a_weight_that_is_set_writes_into_no_file_of_another_parameter(tmp_path):
    """The first state of a parameter that is set before its first step is made then, under its index of then."""
    p, optimizer = begun(tmp_path)
    other, new = (nn.Parameter(p.detach().clone()) for _ in range(2))
    other.grad = torch.ones(20, 30)
    optimizer.param_groups[0]["params"].append(other)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[other])
    optimizer.param_groups[0]["params"][:] = [other, new]
    del optimizer.state[p]
    optimizer.set_exact_weight(new, torch.zeros(20, 30))
    assert all(same_bits(x, optimizer.state[other][key]) for key, x in before.items() if key != "step")
    fresh = optim.PagedAdamW8bit([other, new], min_8bit_size=0)
    fresh.load_state_dict({**fresh.state_dict(), "state": optim.read_pages(tmp_path)})
    assert_equal_states(fresh.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("after", range(9))
def test_renames_that_were_interrupted_leave_no_half_of_a_checkpoint(after, tmp_path, monkeypatch):
    """Neither then, nor after the next step, as in a notebook: a state stayed in a file that had a name for a while."""
    every = [[nn.Parameter(torch.linspace(-1, 1, 60) * k) for k in (1, 2, 3)] for _ in range(2)]
    paged, other = optim.AdamW(every[0], page_directory=tmp_path), optim.AdamW(every[1])

    def stepped(optimizer, t):
        for k, p in enumerate(p for p in optimizer.param_groups[0]["params"]):
            p.grad = torch.sin(torch.arange(60.0) * (t + k))
        optimizer.step()

    for optimizer in (paged, other):
        stepped(optimizer, 1)
        optimizer.param_groups[0]["params"].pop(0)
        optimizer.state.pop(every[optimizer is other][0])
    left = [after]

    def interrupted(rename):
        def now(path, target):
            if path.suffix != ".new" and not left[0]:
                raise KeyboardInterrupt
            left[0] -= path.suffix != ".new"
            return rename(path, target)

        return now

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, interrupted(getattr(Path, name)))
        with contextlib.suppress(KeyboardInterrupt):
            stepped(paged, 2)
    if after < 8:  # four files, twice each
        with pytest.raises(RuntimeError, match="interrupted"):
            optim.read_pages(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".moved")]
        stepped(paged, 2)
    stepped(other, 2)
    assert all(map(same_bits, *every))
    fresh = optim.AdamW(every[0][1:])
    fresh.load_state_dict({**fresh.state_dict(), "state": optim.read_pages(tmp_path)})
    assert_equal_states(fresh.state_dict()["state"], other.state_dict()["state"])


def test_a_step_looks_up_the_settings_of_no_other_parameter(tmp_path, monkeypatch):
    """`advance` is called for each parameter when gradients are released: looking at those of all took seconds for 400."""
    p, optimizer = begun(tmp_path)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5)) for _ in range(3)]})
    optimizer.step()
    monkeypatch.setattr(optimizer, "_rules_and_blocks", None)
    optimizer.advance([(p, optimizer.param_groups[0])])
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("name", ["AdamW8bit", "Adafactor8bit"])
def test_an_empty_parameter_is_in_the_checkpoint(name, tmp_path):
    """A state without elements has a file, too: its name says that there is such a state, which loading asks for."""
    shapes = [(20, 30), (0, 4), ()]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = getattr(optim, name)(params, page_directory=tmp_path, min_8bit_size=0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    fresh = getattr(optim, name)([nn.Parameter(torch.ones(shape)) for shape in shapes], min_8bit_size=0)
    fresh.load_state_dict({**fresh.state_dict(), "state": optim.read_pages(tmp_path)})
    assert_equal_states(fresh.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("ended", [True, False])
def test_what_was_loaded_is_the_checkpoint(ended, tmp_path, monkeypatch):
    """Not the steps of before with the states of now, if the process ends before the next step; and none if it ends in it."""
    _, optimizer = begun(tmp_path)
    optimizer.step()
    early = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.step()
    if ended:
        optimizer.load_state_dict(early)
        assert_equal_states({0: optimizer.state_dict()["state"][0]}, early["state"])
        assert optim.read_pages(tmp_path)[0]["step"] == 1
        return

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Directory, "mapped", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(early)
    with pytest.raises(RuntimeError, match="interrupted"):
        optim.read_pages(tmp_path)


def test_the_files_of_an_earlier_run_are_no_states_of_this_one(tmp_path):
    """That had more parameters, of other shapes."""
    for shapes in ([(90, 50), (4100,)], [(4200,)]):
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = optim.PagedAdamW8bit(params, page_directory=tmp_path)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        states = optim.read_pages(tmp_path)
        assert {i: state["state1"].shape for i, state in states.items()} == dict(enumerate(shapes))
        del optimizer, params, p, states
        gc.collect()


@pytest.mark.parametrize("how", ["read_pages", "relative", "state_dict"])
def test_states_may_change_places_within_their_files(how, tmp_path, monkeypatch):
    """Groups in another order: the file of one parameter is written while that of another is still to be read."""
    monkeypatch.chdir(tmp_path)
    params = [nn.Parameter(torch.linspace(-1, i, 600)) for i in (1, 2)]
    optimizer = optim.AdamW8bit(params, page_directory=tmp_path, min_8bit_size=0)
    for p in params:
        p.grad = p.detach().clone()
    optimizer.step()
    wanted = copy.deepcopy([optimizer.state[p] for p in params])
    first, second = (optimizer.state_dict()["state"][i] for i in (0, 1))
    if how != "state_dict":
        states = optim.read_pages(tmp_path if how == "read_pages" else ".")
        first, second = states[0], states[1]
        del optimizer
        optimizer = optim.AdamW8bit(params[::-1], page_directory=tmp_path, min_8bit_size=0)
    else:
        wanted.reverse()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: second, 1: first}})
    for p, state in zip(params, wanted, strict=True):
        assert same_bits([x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)], [*state.values()][1:])


EARLIER = [("AdamW8bit", {"master_weight_bits": 32}), ("AdEMAMix8bit", {}), ("AdamW", {}), ("SOAP", {})]


@pytest.mark.parametrize(("before", "options"), EARLIER)
def test_what_an_earlier_run_has_left_belongs_to_no_state(before, options, tmp_path):
    """Tensors that the parameter of this run has not: a correction of theirs would be added to it. Files of others stay."""
    (tmp_path / "pytorch_model.bin").write_text("of others")
    for name, own in ((before, options), ("AdamW8bit", {})):
        p = nn.Parameter(torch.linspace(-1, 1, 600, dtype=torch.bfloat16).view(20, 30))
        p.grad = torch.ones_like(p)
        optimizer = getattr(optim, name)([p], page_directory=tmp_path, min_8bit_size=0, **own)
        optimizer.step()
        state = optimizer.state[p]
        assert optim.read_pages(tmp_path)[0].keys() == state.keys()
        del optimizer
    assert (tmp_path / "pytorch_model.bin").read_text() == "of others"


def test_a_file_gets_an_index_at_which_an_earlier_run_has_left_one(tmp_path):
    """Of another shape: the first parameter makes no step in the second run, and then goes."""
    for shapes, stepped in (([(700,), (600,)], (0, 1)), ([(700,), (600,)], (1,))):
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = optim.AdamW8bit([{"params": [p]} for p in params], page_directory=tmp_path, min_8bit_size=0)
        for i in stepped:
            params[i].grad = torch.ones_like(params[i])
        optimizer.step()
        if stepped == (1,):
            del optimizer.param_groups[0]
            optimizer.step()
            assert {key: x.shape for key, x in optim.read_pages(tmp_path)[0].items() if key != "step"} == {
                key: x.shape for key, x in optimizer.state[params[1]].items() if key != "step"
            }
        del optimizer


def test_the_values_of_a_copy_that_was_cast_are_set(tmp_path):
    """Its states are in memory, and their corrections of the dtype before, until each value is set."""
    params = [nn.Parameter(torch.linspace(-1, 1, 600).bfloat16()) for _ in range(2)]
    optimizer = optim.AdamW8bit(params, page_directory=tmp_path, master_weight_bits=32, min_8bit_size=0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params, other = copy.deepcopy((params, optimizer))
    del optimizer
    values = [other.exact_weight(p) for p in params]
    for p in params:
        p.grad, p.data = None, p.detach().float()
    other.set_exact_weight(params[0], values[0])
    with pytest.raises(RuntimeError, match=r"no steps\.json"):  # until all of them are there
        optim.read_pages(tmp_path)
    other.set_exact_weight(params[1], values[1])
    assert same_bits([p.detach() for p in params], values)
    assert all(
        state.keys() == other.state[p].keys()
        for p, state in zip(params, optim.read_pages(tmp_path).values(), strict=True)
    )


@pytest.mark.parametrize("how", ["renamed", "moved"])
def test_mapped_states_are_known_by_their_files_and_not_by_names(how, tmp_path):
    """A file that was renamed since it was mapped, by an optimizer that is gone, or whose folder was, may be that of another."""
    params = [nn.Parameter(torch.linspace(-1, i, 600)) for i in (1, 2)]
    folder = tmp_path / "pages"
    optimizer = optim.AdamW8bit([{"params": [p]} for p in params], page_directory=folder, min_8bit_size=0)
    for p in params:
        p.grad = p.detach().clone()
    optimizer.step()
    wanted = copy.deepcopy([optimizer.state[p] for p in params])
    for p in params:
        p.grad = None
    if how == "renamed":
        optimizer.param_groups.reverse()
        optimizer.step()
        second, first = (optimizer.state_dict()["state"][i] for i in (0, 1))
    else:
        first, second = optim.read_pages(folder).values()
    del optimizer
    if how == "moved":
        folder = folder.rename(tmp_path / "moved")
        params, wanted, first, second = params[::-1], wanted[::-1], second, first
    optimizer = optim.AdamW8bit([{"params": [p]} for p in params], page_directory=folder, min_8bit_size=0)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: first, 1: second}})
    for p, state in zip(params, wanted, strict=True):
        assert same_bits([x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)], [*state.values()][1:])


def test_a_file_that_was_cut_off_is_no_state(tmp_path):
    """torch, which maps it, would put zeros behind it, in the file as well."""
    _, optimizer = begun(tmp_path)
    optimizer.step()
    file = tmp_path / "0.state1.uint8.20x30.bin"
    file.write_bytes(file.read_bytes()[:599])
    with pytest.raises(RuntimeError, match=r"0\.state1\.uint8\.20x30\.bin must have the 600 bytes .*, got 599"):
        optim.read_pages(tmp_path)
    assert file.stat().st_size == 599


@pytest.mark.parametrize("stepped", [True, False])
def test_tensors_of_others_are_no_states_that_belong_into_files(stepped, tmp_path):
    """As Lookahead's, of a parameter whose rule keeps nothing, or which has no gradient: there is a checkpoint none the less."""
    params = [nn.Parameter(torch.ones(600)) for _ in range(2)]
    optimizer = optim.Optimizer(params, Sign(), {"lr": 0.1}, page_directory=tmp_path)
    kept = optimizer.state[params[1]]["slow"] = torch.ones(600)
    params[0].grad = torch.ones(600)
    params[1].grad = torch.ones(600) if stepped else None
    for steps in (1, 2):
        optimizer.step()
        assert optim.read_pages(tmp_path) == {i: {"step": steps} for i in range(1 + stepped)}
    assert optimizer.state[params[1]]["slow"] is kept


@pytest.mark.parametrize("how", ["away for a step", "a copy"])
def test_an_empty_parameter_comes_back_into_the_checkpoint(how, tmp_path):
    params = [nn.Parameter(torch.ones(0, 5)), nn.Parameter(torch.ones(600))]
    optimizer = optim.AdamW8bit([{"params": [p]} for p in params], page_directory=tmp_path, min_8bit_size=0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    if how == "a copy":
        optimizer, params = copy.deepcopy((optimizer, params))
        for p in params:
            p.grad = torch.ones_like(p)
    else:
        group = optimizer.param_groups.pop(0)
        optimizer.step()
        optimizer.param_groups.insert(0, group)
    optimizer.step()
    for i, p in enumerate(params):
        assert optim.read_pages(tmp_path)[i].keys() == optimizer.state[p].keys()
