"""What starts the ranks of the other tests: a rank that a signal ended runs once more, an error is an error."""

import backend
import pytest
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

ABORTED = ProcessExitedException("process 1 terminated with signal SIGABRT", 1, 2, -6, "SIGABRT")
EXITED = ProcessExitedException("process 1 terminated with exit code 3", 1, 2, 3)
RAISED = ProcessRaisedException("AssertionError", 1, 2)


def ends(monkeypatch, *errors):
    """`spawn` with starts that end so, one after the other; the starts that were not asked for."""
    left = list(errors)

    def start(*_):
        if (error := left.pop(0)) is not None:
            raise error

    monkeypatch.setattr(backend, "_start", start)
    return left


def test_a_signal_is_no_result(monkeypatch, tmp_path):
    left = ends(monkeypatch, ABORTED, None)
    with pytest.warns(UserWarning, match=r"ends on 2 ranks runs once more: process 1 terminated with signal SIGABRT"):
        backend.spawn(ends, 2, tmp_path)
    assert not left


def test_two_signals_are_an_error(monkeypatch, tmp_path):
    left = ends(monkeypatch, ABORTED, ABORTED, None)
    with pytest.warns(UserWarning, match="once more"), pytest.raises(ProcessExitedException, match="SIGABRT"):
        backend.spawn(ends, 2, tmp_path)
    assert left == [None]


@pytest.mark.parametrize("error", [EXITED, RAISED], ids=["exit code", "exception"])
def test_what_a_rank_says_itself_is_final(monkeypatch, tmp_path, error):
    left = ends(monkeypatch, error, None)
    with pytest.raises(type(error)):
        backend.spawn(ends, 2, tmp_path)
    assert left == [None]
