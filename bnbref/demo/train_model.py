"""Train the demo model: a small Llama that writes Python documentation, from text that every CPython carries.

Nothing is downloaded: the language reference is in `pydoc_data.topics`, and the standard library documents itself.

    python -m bnbref.demo.train_model --out DIR --device cuda

The text differs a little between Python versions, so the held-out text is written beside the weights, and perplexity is
measured on that file. The corpus is small (3 MB, a million tokens): what limits the model is overfitting. Against that
stand dropout, weight decay, an average over the last steps, and the checkpoint chosen by held-out loss.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import math
import pkgutil
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: TID253 (a script)

END = "<|endoftext|>"  # between documents, in training and in heldout.txt
CONTEXT = 512
PROMPTS = ("Return a new", 'The "try" statement', "class collections.", "Raises ValueError if")

NOT_DOCUMENTATION = {"test", "tests", "idle_test", "site-packages", "__pycache__", "_bundled"}
NOT_IMPORTED = re.compile(r"_test|_xx|xx|_ctypes_test|_tkinter|antigravity|this")


# --------------------------------------------------------------------------------------------------------------- corpus


class Passage(NamedTuple):
    """A signature and its docstring, or a paragraph under no header: what is compared when duplicates are dropped."""

    header: str
    body: str


@dataclass(frozen=True)
class Document:
    """A topic of the reference, or everything that one module says about itself: the unit of the split.

    `comments` is prose from the same source file: trained on but never measured, since held-out text is documentation.
    """

    name: str
    passages: list[Passage]
    comments: list[Passage] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n\n".join("\n".join(filter(None, passage)) for passage in self.passages)

    @property
    def comment_text(self) -> str:
        return "\n\n".join(body for _, body in self.comments)


def topics() -> Iterator[Document]:
    """The language reference, short topics first: long ones contain them, and `deduplicate` keeps what comes first."""
    from pydoc_data.topics import topics as pages

    for name, text in sorted(pages.items(), key=lambda page: (len(page[1]), page[0])):
        yield Document(f"topic {name}", [Passage("", paragraph) for paragraph in re.split(r"\n\s*\n", text.strip())])


def source_modules(stdlib: Path) -> Iterator[Document]:
    """The docstrings of each source file under their signatures, read without importing anything."""
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if NOT_DOCUMENTATION & set(parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
            continue
        name = ".".join(parts).removesuffix(".__init__")
        yield Document(name, list(docstrings(tree, name)), list(comments(source)))


def docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[Passage]:
    """The docstring of the node, and those of what is defined in it."""
    match node:
        case ast.Module():
            header = f"module {name}"
        case ast.ClassDef():
            header = f"class {name}({', '.join(map(ast.unparse, node.bases))})".removesuffix("()")
        case _:
            header = f"{name}({ast.unparse(node.args)})"
    if docstring := ast.get_docstring(node):
        yield Passage(header, docstring.strip())
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(child, f"{name}.{child.name}")


def comments(source: str) -> Iterator[Passage]:
    """Blocks of two or more comment lines that read as prose rather than as code."""
    for block in re.findall(r"(?:^[ \t]*#[^\n]*\n){2,}", source, re.MULTILINE):
        text = re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE).strip()
        if (
            len(re.findall(r"[A-Za-z ,.']", text)) > 0.85 * len(text)
            and text.count(" ") >= 12
            and "Copyright" not in text
        ):
            yield Passage("", text)


def compiled_modules() -> Iterator[Document]:
    """The docstrings of modules written in C, which have no source file to read: these are imported."""
    dynamic = {module.name for module in pkgutil.iter_modules([f"{sysconfig.get_path('platstdlib')}/lib-dynload"])}
    for name in sorted(dynamic | set(sys.builtin_module_names)):
        if NOT_IMPORTED.match(name):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # built without the library it wraps
            continue
        members = [(name, module), *public_members(module, name)]
        members += [pair for path, value in members if inspect.isclass(value) for pair in public_members(value, path)]
        documented = [(path, value) for path, value in members if value.__doc__]
        passages = [
            Passage(signature(path, value), inspect.cleandoc(value.__doc__).strip()) for path, value in documented
        ]
        yield Document(f"C module {name}", passages)


def public_members(owner: Any, name: str) -> list[tuple[str, Any]]:
    """What an owner defines itself, without slots such as `__eq__`, whose docstrings are all alike."""

    def documented(value: Any) -> bool:
        return inspect.isclass(value) or inspect.isroutine(value) or inspect.isdatadescriptor(value)

    members = sorted(vars(owner).items())
    return [(f"{name}.{key}", value) for key, value in members if not key.startswith("_") and documented(value)]


def signature(name: str, value: Any) -> str:
    """The header of a value's docstring; many C functions keep their signature in the docstring itself."""
    if inspect.ismodule(value):
        return f"module {name}"
    prefix = "class " if inspect.isclass(value) else ""
    try:
        return f"{prefix}{name}{inspect.signature(value)}"
    except (TypeError, ValueError):
        return prefix + name


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop a passage whose letters were seen before: C modules repeat their Python twins, topics repeat each other."""
    seen: set[str] = set()

    def fresh(passage: Passage) -> bool:
        letters = re.sub(r"[\W\d_]", "", passage.body).lower()
        known = len(letters) >= 24 and letters in seen
        seen.add(letters)
        return not known

    for document in documents:
        yield Document(document.name, list(filter(fresh, document.passages)), list(filter(fresh, document.comments)))


def collect() -> list[Document]:
    """Every document of at least a short paragraph, in an order that depends on nothing but the Python version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everything = [*topics(), *source_modules(Path(sysconfig.get_path("stdlib"))), *compiled_modules()]
    return [document for document in deduplicate(everything) if len(document.text) >= 200]


def split(documents: list[Document], budget: int) -> tuple[list[Document], list[Document]]:
    """Train and held-out documents: the hash of the name decides, so the choice follows neither content nor order.

    Documents of 1 to 12 KB are taken in the order of their hashes up to `budget` characters. Then a held-out passage
    goes if half of its runs of eight words occur in training: what was copied and edited is not held out.
    """
    heldout: dict[str, Document] = {}
    size = 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        length = len(document.text)
        if 1_000 <= length <= 12_000 and size + length <= budget:
            heldout[document.name] = document
            size += length
    train = [document for document in documents if document.name not in heldout]
    known = {run for document in train for text in (document.text, document.comment_text) for run in runs(text)}

    def unseen(passage: Passage) -> bool:
        own = runs(passage.body)
        return len(own & known) <= 0.5 * len(own)

    cleaned = [Document(document.name, list(filter(unseen, document.passages))) for document in heldout.values()]
    return train, [document for document in cleaned if len(document.text) >= 200]


def runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    """Every run of `length` consecutive words.

    >>> sorted(runs("Return a new list.", length=3))
    [('a', 'new', 'list'), ('return', 'a', 'new')]
    """
    words = re.findall(r"[a-z]+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


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


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Token ids of a text of any length, `[tokens]` int64."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


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


@torch.inference_mode()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """exp of the mean loss over consecutive windows of 512 tokens, in the dtype that the model has.

    A window's first token is not predicted, nor is what remains after the last whole window.
    """
    model.eval()
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [next_token_loss(model, batch) * len(batch) for batch in torch.split(windows, 16)]
    return math.exp(torch.stack(losses).sum().item() / len(windows))


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each token but a window's first, `[windows, length]` -> scalar, summed in float32."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


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
            now = perplexity(candidate, heldout)
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


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """The prompt and a continuation."""
    torch.manual_seed(seed)
    ids = encode(tokenizer, prompt)[None].to(model.device)
    output = model.generate(ids, max_new_tokens=90, do_sample=True, temperature=0.7, top_k=40, repetition_penalty=1.15)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


# -------------------------------------------------------------------------------------------------------------- command


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The defaults are the model in `bnbref/demo/model`."""
    parser = argparse.ArgumentParser(
        prog="python -m bnbref.demo.train_model", description=(__doc__ or "").split("\n")[0]
    )
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


def documents(path: Path | None) -> list[Document]:
    """The corpus of this Python, or the one in the file, so that another Python version can train the same model."""
    if path is not None and path.exists():
        records = map(json.loads, path.read_text("utf-8").splitlines())
        return [
            Document(name, [Passage(*p) for p in passages], [Passage(*p) for p in notes])
            for name, passages, notes in records
        ]
    found = collect()
    if path is not None:
        path.write_text("".join(json.dumps(list(asdict(document).values())) + "\n" for document in found), "utf-8")
    return found


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

    measured = perplexity(model, heldout.to(args.device))
    bits_per_byte = math.log2(measured) * len(heldout) / len(heldout_text.encode())
    facts |= {"parameters": model.num_parameters(), "perplexity": measured, "bits_per_byte": bits_per_byte}
    print(json.dumps({name: round(value, 4) for name, value in facts.items()}))
    for prompt in PROMPTS:
        print(f"\n--- {prompt}\n{sample(model, tokenizer, prompt, args.seed)}")


if __name__ == "__main__":
    main()
