"""QLoRA from end to end: a base model in NF4 with double quantization, a text, an adapter of a few megabytes.

    python -m bnbref qlora --text mine.txt --out adapter        or --dataset NAME --column text, or neither
    qlora(model, text, folder)                                  the same from Python

Every tenth window of the text is held out, and its perplexity is measured before and after.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2305.14314).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from bnbref.arguments import checked
from bnbref.integrations.hf.trainer import optimizer_cls_and_kwargs
from bnbref.integrations.hf.transformers import BnbRefConfig
from bnbref.optim import PagedAdamW8bit

__all__ = ["Finetuned", "dataset_text", "qlora"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The names of the projections of attention in Llama, Qwen, Mistral and similar models."""

ALL_LINEAR = "all-linear"
"""What peft calls all linear layers but the output head."""

HELD_OUT = 10
"""Every tenth window."""

CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
"""What this version of transformers calls it that activations are computed again in the backward pass."""


@dataclass(frozen=True)
class Finetuned:
    """The fine-tuned model with its adapter, and what was measured.

    before, after: held-out perplexities. losses: of each step. seconds: of training alone. parameters: that were trained.
    nbytes: of the adapter's folder.
    """

    model: Any
    before: float
    after: float
    losses: tuple[float, ...]
    seconds: float
    parameters: int
    nbytes: int


def windows(tokenizer: Any, text: str, length: int) -> list[dict[str, Tensor]]:
    """The text as windows of token ids; a causal model's labels are its inputs. ValueError if there are fewer than ten."""
    ids = tokenizer(text, return_tensors="pt", truncation=False)["input_ids"][0]
    count = len(ids) // length
    if count < HELD_OUT:
        raise ValueError(
            f"text must have at least {HELD_OUT * length} tokens, for {HELD_OUT} windows of {length}, got {len(ids)}"
        )
    return [{"input_ids": part, "labels": part} for part in ids[: count * length].view(count, length)]


def dataset_text(name: str, column: str = "text", split: str = "train") -> str:
    """A column of a dataset, on the hub or in a directory, as one text. ValueError if it has no such column of strings."""
    from datasets import load_dataset

    data = load_dataset(name, split=split)
    if column not in data.column_names:
        raise ValueError(f"column must be one of {', '.join(data.column_names)}, got {column!r}")
    rows = list(data[column])
    if not all(isinstance(row, str) for row in rows):
        raise ValueError(f"column {column!r} must hold strings, got {data.features[column]}")
    return "\n\n".join(rows)


def load(
    model: str | os.PathLike[str], device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """The frozen model in NF4 with double quantization, all else in dtype; device: transformers' choice if None."""
    config = BnbRefConfig("nf4")
    where = None if device is None else {"": device}
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=dtype, device_map=where)


@checked
def qlora(
    model: str | os.PathLike[str], text: str, folder: str | os.PathLike[str], *, steps: int = 60, batch: int = 8,
    length: int = 128, lr: float = 2e-3, rank: int = 16, targets: Sequence[str] | str = ATTENTION,
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16,
) -> Finetuned:  # fmt: skip
    """Fine-tune an adapter on a text, and save it in `folder`.

    model: a directory or a name on the hub. A step takes `batch` windows of `length` tokens, at a learning rate that warms up to
    lr and falls as a cosine. LoRA of that rank, in float32, on the layers called `targets`, or on `ALL_LINEAR`; gradient
    checkpointing; `PagedAdamW8bit`. device: transformers' choice if None. dtype: of all that is neither quantized nor trained.

    Raises ValueError for a text that is too short, for numbers that are not positive, and for `ALL_LINEAR` among names of layers;
    OSError if there is no such model, or folder cannot be one.
    """
    for name, count in (("steps", steps), ("batch", batch), ("length", length), ("rank", rank)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if not isinstance(targets, str) and ALL_LINEAR in targets:
        raise ValueError(f"targets must be {ALL_LINEAR!r} or a list of names of layers, got {list(targets)}")
    folder, device = Path(folder), None if device is None else torch.device(device)
    folder.mkdir(parents=True, exist_ok=True)
    parts = windows(AutoTokenizer.from_pretrained(model), text, length)
    base = load(model, device, dtype)
    # Norms in float32. Checkpointing is left to Trainer, which calls it by its name of today.
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    layers = targets if isinstance(targets, str) else list(targets)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, settings)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=steps // 10, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=device is not None and device.type == "cpu", **{CHECKPOINTING: True},
    )  # fmt: skip
    trainer = Trainer(
        model=adapted,
        args=args,
        train_dataset=[part for i, part in enumerate(parts) if i % HELD_OUT],
        eval_dataset=parts[::HELD_OUT],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(PagedAdamW8bit, args),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress)
    before = math.exp(trainer.evaluate()["eval_loss"])
    training = trainer.train()
    after = math.exp(trainer.evaluate()["eval_loss"])
    adapted.save_pretrained(folder)
    return Finetuned(
        adapted,
        before,
        after,
        tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        training.metrics["train_runtime"],
        sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
    )


class _Progress(ProgressCallback):  # type: ignore[misc]
    """Trainer's bar, with the loss in it instead of on lines of its own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
