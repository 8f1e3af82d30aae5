"""Where tests of several ranks run: two processes of gloo on the CPU, or with BNBREF_BACKEND=nccl one process for each GPU.

python -m pytest -m gpus                             the tests of this kind, as CI runs them
BNBREF_BACKEND=nccl python -m pytest -m gpus         the same on all GPUs of this host
"""

import datetime
import faulthandler
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing.spawn import ProcessExitedException

import bnbref

ROOT = Path(__file__).resolve().parent.parent
NCCL = os.environ.get("BNBREF_BACKEND", "gloo") == "nccl"
TYPE = "cuda" if NCCL else "cpu"
RANKS = torch.cuda.device_count() if NCCL else 2
OTHER = 1 if NCCL else 3
"""Another number of ranks: NCCL wants a GPU for each."""
PROCESS_GROUP = "cpu:gloo,cuda:nccl" if NCCL else "gloo"
"""With gloo beside NCCL, because torch.distributed.checkpoint saves asynchronously from the CPU."""


def device(rank: int = 0) -> torch.device:
    """Where a rank has its tensors."""
    return torch.device(TYPE, rank) if NCCL else torch.device(TYPE)


def mesh(ranks: int) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(TYPE, (ranks,))


def prepare(rank: int) -> None:
    """What a rank does before it has a process group."""
    faulthandler.enable()  # says what each thread did when C++ code ends a process
    torch.set_num_threads(1)
    if NCCL:
        torch.cuda.set_device(rank)


def leave() -> None:
    """Ends a rank whose work is done, without the end of Python.

    A thread of gloo lets go of its last collective call after that was waited for, and takes Python's lock for it. If Python is
    just ending, the thread is ended in the middle of C++ code, and the process is aborted: "terminate called without an active
    exception" (torch 2.13, one of 25 programs of nothing but `all_reduce` and `barrier`). To destroy the group joins its threads
    only where nobody else holds it, and torch's caches of DTensors do.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _as_rank(rank: int, ranks: int, run: Callable[..., None], path: str, args: tuple[Any, ...]) -> None:
    prepare(rank)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group(PROCESS_GROUP, f"file://{path}", rank=rank, world_size=ranks, timeout=timeout)
    with bnbref.eager():
        run(rank, ranks, *args)
    leave()


def spawn(run: Callable[..., None], ranks: int, folder: Path, *args: Any) -> None:
    """`run(rank, ranks, *args)` in as many processes, kernels uncompiled. folder: an existing one for their rendezvous.

    Ranks of which a signal ended one run once more, with a warning; an exception is raised at once. Kernels are uncompiled, so
    that all C++ code here is torch's, and it was seen once to damage its heap ("malloc(): unaligned tcache chunk detected",
    torch 2.13), in `test_optim_distributed.run_all`. What did it was not found, by memcheck neither.
    """
    try:
        _start(run, ranks, folder, args)
    except ProcessExitedException as error:
        if error.signal_name is None:
            raise
        warnings.warn(f"{run.__name__} on {ranks} ranks runs once more: {error}", stacklevel=1)
        _start(run, ranks, folder, args)


def _start(run: Callable[..., None], ranks: int, folder: Path, args: tuple[Any, ...]) -> None:
    meeting = folder / f"meeting{len(list(folder.glob('meeting*')))}"
    torch.multiprocessing.spawn(_as_rank, (ranks, run, str(meeting), args), nprocs=ranks)


_LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "{ranks}", "--master_port", "{port}"],
    # `--multi_gpu` is how accelerate is told to start processes itself; `--cpu` leaves that to MPI.
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "{ranks}", "--num_machines", "1", "--mixed_precision",
        "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "{port}",
    ],
}  # fmt: skip


def launch(launcher: str, ranks: int, program: str, *args: Any, **environment: str) -> str:
    """What a program prints that `torchrun` or `accelerate launch` runs on so many ranks; the end of its errors if it fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONFAULTHANDLER": "1",  # says what each thread did when C++ code ends a process
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if not NCCL:
        env["ACCELERATE_USE_CPU"] = "true"
    options = [option.format(ranks=ranks, port=port) for option in _LAUNCHERS[launcher]]
    command = [sys.executable, "-W", "ignore", "-m", *options, program, *map(str, args)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-5000:]}")
    return done.stdout
