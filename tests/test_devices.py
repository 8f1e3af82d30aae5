"""A model that is too large for a device, spread over several by `device_map="auto"`, has the logits and texts of one device."""

import backend
import pytest
import torch

from bnbref import BnbRefConfig

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [pytest.mark.gpus, pytest.mark.usefixtures("eager")]
FORMATS = {"nf4": BnbRefConfig("nf4", double_quant=False), "nested": BnbRefConfig("nf4"), "int8": BnbRefConfig("int8")}
# Shares of the model that each place may take; what is left is on the disk.
PLACES = {
    "gpus": dict.fromkeys(range(backend.RANKS), 1.5 / backend.RANKS),
    "gpu and cpu": {0: 0.6, "cpu": 4},
    "gpu, cpu and disk": {0: 0.5, "cpu": 0.4},
} if backend.NCCL else {"cpu and disk": {"cpu": 0.6}}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of six layers on disk, by name: mixtral's experts are quantized as parameters."""
    small = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, config in {
        "llama": transformers.LlamaConfig(**small),
        "mixtral": transformers.MixtralConfig(num_local_experts=4, **small),
    }.items():
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root / name)
    return root


def shown(model):
    """Logits, and a text that follows from a cache."""
    ids = torch.arange(1, 33).view(2, 16).to(backend.device())
    with torch.no_grad():
        return model(ids).logits.cpu(), model.generate(ids, max_new_tokens=4, do_sample=False).cpu()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("quantized", FORMATS)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_spread_over_devices_is_one_device(name, quantized, places, models, tmp_path):
    options = {"dtype": torch.bfloat16, "quantization_config": FORMATS[quantized]}
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        models / name, device_map={"": backend.device()}, **options
    )
    size = sum(p.nbytes for p in whole.parameters())
    memory = {place: int(share * size / 0.9) for place, share in PLACES[places].items()}
    parts = transformers.AutoModelForCausalLM.from_pretrained(
        models / name, device_map="auto", max_memory=memory, offload_folder=tmp_path, **options
    )
    used = set(map(str, parts.hf_device_map.values()))
    assert len(used) == len(PLACES[places]) + ("disk" in places), parts.hf_device_map
    for one, other in zip(shown(parts), shown(whole), strict=True):
        assert torch.equal(one, other)
