"""Training on several ranks gives what one process gives: QLoRA with DDP and FSDP2, all weights with FSDP2, and trainers.

Launched by torchrun, which is plain torch, and by `accelerate launch`, on gloo or NCCL (`backend.py`); what was saved is loaded
by one process, and by another number of ranks.
"""

import json

import backend
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import bnbref

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
ranks = pytest.importorskip("ranks")

pytestmark = [pytest.mark.usefixtures("eager"), pytest.mark.gpus, pytest.mark.filterwarnings("ignore:paged state")]


def on_all(launcher, how, storage, folder, count=backend.RANKS):
    """What so many ranks found."""
    said = backend.launch(launcher, count, ranks.__file__, how, storage, folder)
    (line,) = [line.removeprefix("FOUND ") for line in said.splitlines() if line.startswith("FOUND ")]
    return json.loads(line)


def bytes_of(tensor):
    return tensor.cpu().reshape(-1).view(torch.uint8)


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
    check(on_all("accelerate", "fsdp2", "bfloat16", tmp_path), "bfloat16", tmp_path, alone)


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
    check(on_all(launcher, how, storage, tmp_path), storage, tmp_path, alone)


@pytest.mark.slow
def test_mixed_precision_and_gradient_checkpointing(alone, tmp_path):
    """bfloat16 has eight bits: a loss of 6.5 is the mean of 60 logarithms, each of logits that are rounded some ten times."""
    found = on_all("torchrun", "mixed", "bfloat16", tmp_path)
    assert found == pytest.approx(alone[0], rel=10 * 2**-8)
    assert found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "paged"])
def test_all_weights_go_on_with_another_number_of_ranks(how, tmp_path):
    """Gradients are averaged in another order, so that a few codes move by one, and weights by part of a step of 1e-3."""
    begun = on_all("torchrun", how, "float32", tmp_path / "several")
    ended = on_all("torchrun", how, "float32", tmp_path / "several", backend.OTHER)
    alone = [x for _ in range(2) for x in ranks.fine_tune(how, tmp_path / "alone", 0, 1)]
    same = 2 if backend.OTHER == 3 else 4  # three ranks do not share four rows evenly
    assert [*begun, *ended][:same] == pytest.approx(alone[:same], rel=1e-3)
    assert ended[-1] < begun[0]


@pytest.mark.slow
def test_trainer_saves_and_one_rank_resumes(tmp_path):
    """Gradients are averaged in another order, or on GPUs in bfloat16."""
    losses = on_all("accelerate", "trainer", "bfloat16", tmp_path)
    assert losses[-1] < losses[0]
    resumed = on_all("torchrun", "trainer", "bfloat16", tmp_path, 1)
    assert resumed[-2:] == pytest.approx(losses[-2:], rel=1e-2 if backend.NCCL else 1e-3)


@pytest.mark.slow
def test_sft_trainer(tmp_path):
    pytest.importorskip("trl")
    losses = on_all("torchrun", "sft", "bfloat16", tmp_path)
    assert losses[-1] < losses[0]


def test_tensor_parallelism_is_refused_by_name(tmp_path):
    said = on_all("torchrun", "tp", "uint8", tmp_path)
    assert len(said) == 3
    assert all("tp_plan" in each for each in said)


@pytest.mark.parametrize("storage", [torch.float16, torch.float32])
def test_codes_that_mixed_precision_has_cast_are_refused(storage):
    layer = bnbref.nn.Linear4bit(64, 8, quant_type="nf4", quant_storage=storage).to("cpu")
    packed = layer.weight.data
    layer._parameters["weight"] = nn.Parameter(packed.clone(), requires_grad=False)  # as FSDP puts it there
    layer(torch.ones(1, 64))
    layer._parameters["weight"] = nn.Parameter(packed.to(torch.bfloat16), requires_grad=False)
    with pytest.raises(TypeError, match=f"{storage} have become torch.bfloat16"):
        layer(torch.ones(1, 64))
