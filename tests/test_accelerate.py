"""accelerate's `load_checkpoint_and_dispatch` into a quantized model: whole, or refused."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions

from bnbref import BnbRefConfig

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("eager")
FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"
PLAIN = {"nf4": "nf4_nested", "int8": "int8"}


@pytest.fixture(scope="module", params=PLAIN)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURES / "base", quantization_config=BnbRefConfig(kind), dtype=torch.bfloat16, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_a_part_of_a_quantized_weight_is_refused_and_nothing_changes(quantized, kind, model):
    file = FIXTURES / (PLAIN[kind] if quantized else "base") / "model.safetensors"
    layers = {name: value.clone() for name, value in model.state_dict().items() if "_proj" in name}
    with pytest.raises(ValueError, match=r"_proj\.weight.* is a part of a quantized weight.* without device_map"):
        accelerate.load_checkpoint_and_dispatch(model, str(file), device_map={"": "cpu"})
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in layers.items())


def test_without_a_device_map_a_file_is_loaded_whole(kind, model):
    file = FIXTURES / PLAIN[kind] / "model.safetensors"
    want = {name: value.clone() for name, value in model.state_dict().items()}
    other = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    model.load_state_dict({name: other[name]}, strict=False)
    assert not torch.equal(model.state_dict()[name], want[name])
    loaded = accelerate.load_checkpoint_and_dispatch(model, str(file))
    assert torch.equal(loaded.state_dict()[name], want[name])


def test_a_quantized_weight_is_moved_whole(kind, model):
    """accelerate gives no value then."""
    name = "model.layers.0.mlp.up_proj.weight"
    want = model.state_dict()[name].clone()
    for device in ("cpu", "meta"):
        accelerate.utils.modeling.set_module_tensor_to_device(model, name, device)
        weight = model.get_parameter(name)
        assert weight.device.type == device
        assert device == "meta" or torch.equal(weight.data, want)


def test_a_full_state_dict_of_adapters_has_no_scales(model):
    """torch cannot load those under FSDP2, as they are no parameters."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    options = StateDictOptions(full_state_dict=True)
    save = accelerate.utils.fsdp_utils._get_model_state_dict
    names = save(adapted, adapter_only=True, sd_options=options).keys()
    assert names == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert save(adapted, sd_options=options).keys() == adapted.state_dict().keys()


def test_an_accelerate_without_its_private_function(monkeypatch):
    """Models are loaded all the same."""
    from bnbref.integrations.hf.accelerate import adapt_accelerate

    monkeypatch.delattr(accelerate.utils.fsdp_utils, "_get_model_state_dict")
    monkeypatch.setattr(accelerate.utils.modeling, "set_module_tensor_to_device", print)
    adapt_accelerate.__wrapped__()
    assert accelerate.utils.modeling.set_module_tensor_to_device is not print
    assert not hasattr(accelerate.utils.fsdp_utils, "_get_model_state_dict")
