"""QLoRA from end to end: a base model in NF4 with double quantization, a text file, an adapter of a few megabytes.

    python docs/examples/qlora.py --text mine.txt [--model NAME] [--steps 60] [--out adapter] [--plot losses.svg]

Without --model it is bnbref's demo model, a writer of Python documentation; without --text the source of Python's `argparse`.
Every tenth window of the text is held out, and its perplexity is printed before and after.
Needs: pip install 'bnbref[hf]' (and matplotlib for --plot).

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2305.14314).
"""

import argparse
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import bnbref.demo
from bnbref.integrations.peft import register_lora
from bnbref.integrations.trainer import optimizer_cls_and_kwargs
from bnbref.integrations.transformers import BnbRefConfig
from bnbref.optim import PagedAdamW8bit

DEMO = str(Path(bnbref.demo.__file__).parent / "model")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, help="a directory or a name on the hub (default: the demo model)")
    parser.add_argument("--text", type=Path, help="a text file (default: the source of argparse)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--plot", type=Path, help="draw the losses")
    return parser.parse_args()


def windows(tokenizer: Any, text: str, length: int) -> list[dict[str, torch.Tensor]]:
    """The text as windows of token ids; a causal model's labels are its inputs."""
    ids = tokenizer(text, return_tensors="pt", truncation=False)["input_ids"][0]
    count = len(ids) // length
    if count < 10:
        raise SystemExit(
            f"--text must have at least {10 * length} tokens, for ten windows of {length}; it has {len(ids)}"
        )
    return [{"input_ids": part, "labels": part} for part in ids[: count * length].view(count, length)]


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text(encoding="utf-8") if args.text else inspect.getsource(argparse)
    parts = windows(tokenizer, text, args.length)

    config = BnbRefConfig("nf4", double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=config, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model)  # norms in float32, gradient checkpointing
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, register_lora(lora))
    model.print_trainable_parameters()

    training = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        logging_steps=max(1, args.steps // 20),
        save_strategy="no",
        report_to=[],
        gradient_checkpointing=True,
    )
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=[part for i, part in enumerate(parts) if i % 10],
        eval_dataset=parts[::10],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(PagedAdamW8bit, training),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(args.out)
    size = sum(file.stat().st_size for file in args.out.iterdir() if file.is_file()) / 2**20
    print(f"held-out perplexity {math.exp(before):.2f} before, {math.exp(after):.2f} after; {args.out}: {size:.1f} MiB")
    if args.plot:
        import matplotlib.pyplot as plt

        points = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        plt.plot(*zip(*points, strict=True))
        plt.xlabel("step")
        plt.ylabel("loss")
        plt.savefig(args.plot)


if __name__ == "__main__":
    main()
