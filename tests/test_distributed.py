"""QLoRA on two ranks (gloo, CPU) gives what one process gives: DDP and FSDP2, packed weights as bytes and as bfloat16.

Launched by torchrun, which is plain torch, and by `accelerate launch`; what was saved is loaded by one process.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import bnbref

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
ranks = pytest.importorskip("ranks")

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("eager")

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    # `--multi_gpu` is how accelerate is told to start processes itself; `--cpu` leaves that to MPI.
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port",
    ],
}  # fmt: skip


def on_two(launcher, how, storage, folder):
    """The losses of two ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "TRANSFORMERS_VERBOSITY": "error", "ACCELERATE_USE_CPU": "true"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-m", *LAUNCHERS[launcher], str(port), ranks.__file__]
    done = subprocess.run(
        [*command, how, storage, str(folder)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return json.loads(line)


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process, and its state dict."""
    folder = tmp_path_factory.mktemp("alone")
    with bnbref.eager():
        losses = ranks.train("none", "uint8", folder)
    return losses, torch.load(folder / "state.pt", weights_only=True)


def check(found, storage, folder, alone):
    """Losses and weights are those of one process; both kinds of saved state load into one, which goes on as they would."""
    losses, state = alone
    # Gradients are averaged over ranks: float32 sums in another order, a few ulps of a loss of 6.
    assert found == pytest.approx(losses, rel=1e-5)
    assert found[ranks.STEPS - 1] < found[0]
    whole = torch.load(folder / "state.pt", weights_only=True)
    assert whole.keys() == state.keys()
    for name, value in state.items():
        if "lora_" in name:
            torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-5)
        elif value.dtype == torch.uint8 and not name.endswith("bitsandbytes__nf4"):
            assert torch.equal(bytes_of(whole[name]), bytes_of(value)), name
    for saved in ("state.pt", "sharded"):
        model = ranks.adapted(storage)
        if saved == "sharded":
            loaded = model.state_dict()
            dcp.load(loaded, checkpoint_id=folder / "sharded", no_dist=True)
        else:
            loaded = whole
        model.load_state_dict(loaded)
        after = {name: bytes_of(value.contiguous()) for name, value in model.state_dict().items()}
        assert all(torch.equal(after[name], bytes_of(value.contiguous())) for name, value in whole.items()), saved
        with torch.no_grad():
            again = ranks.loss_of(model, ranks.batch(ranks.STEPS)).item()
        assert again == pytest.approx(found[-1], rel=1e-6)  # the mean of two means, and of one


def test_two_ranks_by_accelerate_launch(alone, tmp_path):
    check(on_two("accelerate", "fsdp2", "bfloat16", tmp_path), "bfloat16", tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "how", "storage"),
    [
        ("torchrun", "ddp", "uint8"),
        ("torchrun", "fsdp2", "uint8"),
        ("torchrun", "fsdp2", "bfloat16"),
        ("accelerate", "accelerator", "uint8"),
        ("accelerate", "accelerator", "bfloat16"),
        ("accelerate", "fsdp2", "uint8"),
    ],
)
def test_two_ranks_are_one_process(launcher, how, storage, alone, tmp_path):
    if (how, storage) == ("fsdp2", "uint8") and torch.__version__ < "2.13":
        pytest.skip(
            "FSDP2 of this torch shards no parameter that could not require a gradient: bytes need a float storage"
        )
    check(on_two(launcher, how, storage, tmp_path), storage, tmp_path, alone)
