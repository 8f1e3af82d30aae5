"""QLoRA on two ranks (gloo, CPU) gives what one process gives: DDP and FSDP2, packed weights as bytes and as bfloat16."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

PROGRAM = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
import peft, transformers
import bnbref
from bnbref.integrations.peft import register_lora
from bnbref.integrations.transformers import BnbRefConfig

how, storage, folder = sys.argv[1:]
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
with bnbref.eager():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        "tests/fixtures/checkpoints/base", dtype=torch.float32,
        quantization_config=BnbRefConfig("nf4", quant_storage=getattr(torch, storage)),
    )
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(model, register_lora(settings))
    if world > 1:
        dist.init_process_group("gloo")
    run = model
    if how == "ddp":
        run = DistributedDataParallel(model)
    elif how == "fsdp2":
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(3):
        ids = torch.arange(10 + step, 10 + step + 64).view(4, 16)
        mine = ids[rank * 4 // world : (rank + 1) * 4 // world]
        loss = run(input_ids=mine, labels=mine, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        if world > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / world)
    # torch's get_model_state_dict looks for `absmax` on the DTensor that took the weight's place, and fails.
    state = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    if rank == 0:
        torch.save(state, folder + "/state.pt")
        print(json.dumps(losses), flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
"""


def run(world, how, storage, folder):
    """Losses and the state dict of rank 0."""
    import torch

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, how, storage, str(folder)]
        processes.append(
            subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * world, outputs[0][1] + outputs[-1][1]
    return json.loads(outputs[0][0].splitlines()[-1]), torch.load(Path(folder) / "state.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(1, "none", "uint8", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(("how", "storage"), [("ddp", "uint8"), ("fsdp2", "uint8"), ("fsdp2", "bfloat16")])
def test_two_ranks_are_one_process(how, storage, alone, tmp_path):
    import torch

    losses, state = run(2, how, storage, tmp_path)
    # Gradients are averaged over ranks: float32 sums in another order, a few ulps of a loss of 6.
    assert losses == pytest.approx(alone[0], rel=1e-5)
    assert losses[-1] < losses[0]
    assert state.keys() == alone[1].keys()
    for name, value in alone[1].items():
        if "lora_" in name:
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
        elif value.dtype == torch.uint8 and not name.endswith("bitsandbytes__nf4"):
            assert torch.equal(state[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
