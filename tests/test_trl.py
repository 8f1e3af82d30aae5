"""TRL's SFTTrainer, unmodified, on `import bitsandbytes`, which is bnbref: QLoRA of the demo model."""

import inspect
import sys
import textwrap

import pytest
import torch

import bnbref
from bnbref import as_bitsandbytes
from bnbref.demo import MODEL

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'bnbref[trl]'")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def quantized():
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config, dtype=torch.float32)


@pytest.mark.slow
def test_sft_trainer_teaches_a_quantized_model(tmp_path):
    if "bitsandbytes" in sys.modules:
        pytest.skip("bitsandbytes itself is imported")
    lines = inspect.getsource(textwrap).splitlines()
    texts = ["\n".join(lines[i : i + 12]) for i in range(0, len(lines) - 12, 12)]
    args = trl.SFTConfig(
        str(tmp_path), optim="paged_adamw_8bit", learning_rate=5e-3, max_steps=12, per_device_train_batch_size=4,
        logging_steps=1, max_length=64, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    with as_bitsandbytes(force=True), bnbref.eager():
        trainer = trl.SFTTrainer(
            quantized(),
            args,
            train_dataset=datasets.Dataset.from_dict({"text": texts[4:]}),
            eval_dataset=datasets.Dataset.from_dict({"text": texts[:4]}),
            processing_class=transformers.AutoTokenizer.from_pretrained(MODEL),
            peft_config=peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        )
        base = trainer.model.base_model.model
        assert type(base.model.layers[0].self_attn.q_proj.base_layer) is bnbref.nn.Linear4bit
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        assert after < before - 0.1
        optimizer = trainer.optimizer.optimizer
        assert isinstance(optimizer, bnbref.optim.AdamW)
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        assert any(t.dtype == torch.uint8 for t in states)
        trainer.save_model(str(tmp_path / "adapter"))
        again = peft.PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
        want, found = map(peft.get_peft_model_state_dict, (trainer.model, again))
    assert want.keys() == found.keys()
    assert all(torch.equal(found[name].float(), value.float()) for name, value in want.items())
