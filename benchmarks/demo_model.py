"""Train the demo model: a small Llama that writes Python documentation, from text that every CPython carries.

    python benchmarks/demo_model.py --out DIR --device cuda

The text (demo_corpus.py) differs a little between Python versions, so the held-out text is written beside the weights, and
perplexity is measured on that file. The corpus is small (3 MB, a million tokens): what limits the model is overfitting.
Against that stand dropout, weight decay, an average over the last steps, and the checkpoint chosen by held-out loss.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_corpus import documents, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bnbref.demo.evaluate import CONTEXT, encode, next_token_loss, perplexity, sample, windows

END = "<|endoftext|>"  # between documents, in training and in heldout.txt
PROMPTS = ("Return a new", 'The "try" statement', "class collections.", "Raises ValueError if")


# ------------------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every text round-trips. `END` in a text becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


# ---------------------------------------------------------------------------------------------------------------- model


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Tied embeddings, heads of 64 channels, every width a multiple of 64: a row is a whole number of 4-bit blocks."""
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64, head_dim=64,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(InputDropout(args.dropout))
    return model


class InputDropout:
    """Dropout on the input of a Linear: noise of the shape that a quantized weight makes in its output, only larger.

    A weight error e gives an output error of variance sum(e_j^2 x_j^2); a dropped input gives one of sum(w_j^2 x_j^2).
    A model trained under the second hardly notices the first.
    """

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.dropout(inputs[0], self.p, module.training), *inputs[1:])


def stored(model: nn.Module, args: argparse.Namespace) -> LlamaForCausalLM:
    """The model as it will be saved and loaded: parameters rounded to bfloat16, rotary frequencies left in float32."""
    copy = build_model(args)
    copy.load_state_dict(model.state_dict())
    for parameter in copy.parameters():
        parameter.data = parameter.data.bfloat16()
    return copy


# ------------------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace, tokens: Tensor, heldout: Tensor) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """AdamW under a warm-up and a cosine; what is measured and kept is an exponential average of the weights."""
    torch.manual_seed(args.seed)
    model, average = build_model(args), build_model(args)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    warmup = args.steps // 20 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / args.steps)))
    )
    device = torch.device(args.device)
    tokens, heldout = tokens.to(device), heldout.to(device)
    offsets = torch.arange(CONTEXT, device=device)
    best, best_step, kept = math.inf, 0, model
    start = time.monotonic()
    for step in tqdm(range(1, args.steps + 1), disable=None, mininterval=2.0):
        model.train()
        first = torch.randint(len(tokens) - CONTEXT, (args.batch, 1), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = next_token_loss(model, tokens[first + offsets])
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        update_average(average, model, min(args.average, step / (step + 10)))
        if step % args.evaluate_every == 0 or step == args.steps:
            candidate = stored(average, args)
            now = perplexity(candidate, windows(heldout))
            tqdm.write(
                f"step {step}: perplexity {loss.exp().item():.2f} in training, {now:.3f} held out", file=sys.stderr
            )
            if now < best:
                best, best_step, kept = now, step, candidate
            elif step - best_step >= args.patience:
                break
    minutes = (time.monotonic() - start) / 60
    return kept, {"step": best_step, "epochs": best_step * args.batch * CONTEXT / len(tokens), "minutes": minutes}


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) model, in place."""
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


# -------------------------------------------------------------------------------------------------------------- command


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The defaults are the model in `bnbref/demo/model`."""
    parser = argparse.ArgumentParser(prog="python benchmarks/demo_model.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the model is written")
    parser.add_argument("--corpus", type=Path, help="JSON Lines file of documents to read, or to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=int, default=110_000, help="characters of held-out text")
    model = parser.add_argument_group("model")
    for name, default in (("vocab", 4096), ("hidden", 256), ("ffn", 640), ("layers", 6)):
        model.add_argument(f"--{name}", type=int, default=default)
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=4000)
    training.add_argument("--batch", type=int, default=32, help=f"windows of {CONTEXT} tokens in a step")
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--weight-decay", type=float, default=0.1)
    training.add_argument("--dropout", type=float, default=0.2)
    training.add_argument("--average", type=float, default=0.995, help="decay of the average of the weights")
    training.add_argument("--evaluate-every", type=int, default=200)
    training.add_argument(
        "--patience", type=int, default=800, help="steps without a better held-out loss before stopping"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Collect, split, train, and write what `from_pretrained` reads, with heldout.txt beside it."""
    args = arguments(argv)
    train_documents, heldout_documents = split(documents(args.corpus), args.heldout)
    texts = [text for document in train_documents for text in (document.text, document.comment_text) if text]
    heldout_text = END.join(document.text for document in heldout_documents)
    tokenizer = train_tokenizer(texts, args.vocab)
    tokens, heldout = encode(tokenizer, END.join(texts)), encode(tokenizer, heldout_text)
    for name, count, text, ids in (
        ("train", len(train_documents), "".join(texts), tokens),
        ("held-out", len(heldout_documents), heldout_text, heldout),
    ):
        print(f"{name}: {count} documents, {len(text.encode()):,} bytes, {len(ids):,} tokens", file=sys.stderr)

    model, facts = train(args, tokens, heldout)
    args.out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    settings = args.out / "tokenizer_config.json"  # transformers 4 has no class of the name that transformers 5 writes
    settings.write_text(settings.read_text("utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast"), "utf-8")
    (args.out / "heldout.txt").write_text(heldout_text, "utf-8")

    measured = perplexity(model, windows(heldout.to(args.device)))
    bits_per_byte = math.log2(measured) * len(heldout) / len(heldout_text.encode())
    facts |= {"parameters": model.num_parameters(), "perplexity": measured, "bits_per_byte": bits_per_byte}
    print(json.dumps({name: round(value, 4) for name, value in facts.items()}))
    for prompt in PROMPTS:
        print(f"\n--- {prompt}\n{sample(model, tokenizer, prompt, seed=args.seed).text}")


if __name__ == "__main__":
    main()
