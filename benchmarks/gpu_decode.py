"""Decoding on a GPU: tokens/s of a model shaped like Llama-3-8B with random weights and a static cache.

    python benchmarks/gpu_decode.py [--layers 32] [--batch 1 8 32] [--tokens 32] [--out benchmarks/results]

eager: one kernel launch after the other, as `generate` runs. graph: the step as one CUDA graph. GB/s: the bytes of the
linear layers and of the output layer, all read once for each step, by the time of a step. The graph's logits are checked
against those of the eager step. Medians of interleaved rounds, timed with CUDA events.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnbref.nn

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, VOCABULARY = 4096, 32, 8, 128, 14336, 128256
Factory = Callable[[Tensor], nn.Module]


# ---- the model ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Llama's decoder layer for one new token, its keys and values written into a cache of fixed size."""

    def __init__(self, linear: Factory, batch: int, length: int, device: str) -> None:
        super().__init__()

        def layer(rows: int, columns: int) -> nn.Module:
            return linear(torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02)

        self.q, self.k, self.v = (layer(n * HEAD, HIDDEN) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.o, self.down = layer(HIDDEN, HEADS * HEAD), layer(HIDDEN, INNER)
        self.gate, self.up = layer(INNER, HIDDEN), layer(INNER, HIDDEN)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.resize(batch, length, device)

    def resize(self, batch: int, length: int, device: str) -> None:
        self.keys, self.values = (
            torch.zeros(batch, KV_HEADS, length, HEAD, device=device, dtype=torch.bfloat16) for _ in range(2)
        )

    def forward(self, x: Tensor, position: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (
            part(y).view(x.shape[0], 1, heads, HEAD).transpose(1, 2)
            for part, heads in ((self.q, HEADS), (self.k, KV_HEADS), (self.v, KV_HEADS))
        )
        self.keys.index_copy_(2, position, rotate(k, turn))
        self.values.index_copy_(2, position, v)
        y = F.scaled_dot_product_attention(rotate(q, turn), self.keys, self.values, mask, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(x.shape))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * turn[0] + torch.cat((-high, low), -1) * turn[1]


class Model(nn.Module):
    """Embedding, blocks, and an output layer in bfloat16: `step` writes the next tokens over the last ones."""

    def __init__(self, linear: Factory, layers: int, batch: int, length: int, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN, **options)
        self.blocks = nn.ModuleList(Block(linear, batch, length, device) for _ in range(layers))
        self.norm = nn.RMSNorm(HIDDEN, **options)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False, **options)
        angle = torch.outer(torch.arange(length), 500000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)).repeat(1, 2)
        self.cos, self.sin = (t.to(**options) for t in (angle.cos(), angle.sin()))
        self.reset(batch, length, device)

    def reset(self, batch: int, length: int, device: str) -> None:
        self.tokens = torch.ones(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)

    def step(self) -> Tensor:
        mask = (self.places <= self.position)[None, None, None]
        turn = self.cos[self.position], self.sin[self.position]
        x = self.embedding(self.tokens)
        for block in self.blocks:
            x = block(x, self.position, turn, mask)
        logits: Tensor = self.head(self.norm(x))
        self.tokens.copy_(logits.argmax(-1))
        self.position.add_(1)
        return logits


def linear_bytes(model: Model) -> int:
    """Of the weights that a step reads: codes and scales of quantized ones."""
    total = model.head.weight.nbytes
    for block in model.blocks:
        for layer in block.children():
            weight = getattr(layer, "weight", None)
            if weight is not None:
                state, row_scales = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
                total += weight.nbytes + sum(t.nbytes for t in (state and state.absmax, row_scales) if t is not None)
    return int(total)


# ---- the contenders -------------------------------------------------------------------------------------------------


def factories() -> dict[str, Factory]:
    def plain(weight: Tensor) -> nn.Module:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    def quantized(module: Any, params: Any, layer_options: Mapping[str, Any], **options: Any) -> Factory:
        def make(weight: Tensor) -> nn.Module:
            layer: nn.Module = module(weight.shape[1], weight.shape[0], bias=False, device="meta", **layer_options)
            layer.weight = params(weight.cpu(), requires_grad=False, **options)
            return layer.to(weight.device).eval()

        return make

    nf4 = {"quant_type": "nf4", "compress_statistics": False}
    int8 = {"has_fp16_weights": False}
    found = {"bf16": plain}
    for name, package in (("bnbref", bnbref.nn), ("bitsandbytes", bnb and bnb.nn)):
        if package is not None:
            in_four = {"compute_dtype": torch.bfloat16, **nf4}
            found[f"{name} nf4"] = quantized(package.Linear4bit, package.Params4bit, in_four, **nf4)
            in_eight = {"threshold": 0.0, **int8}
            found[f"{name} int8"] = quantized(package.Linear8bitLt, package.Int8Params, in_eight, **int8)
    return found


def capture(model: Model) -> Callable[[], Any]:
    """The step as a CUDA graph, after a check that its logits are those of the eager step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model.step()
        model.step()
        model.position.zero_()
        model.tokens.fill_(1)
        want = model.step()
        model.position.zero_()
        model.tokens.fill_(1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.step()
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(logits, want):
        difference = (logits - want).abs().max().item()
        raise SystemExit(f"the graph's logits differ from the eager step's by up to {difference}")
    return graph.replay


def milliseconds(runs: Mapping[str, Callable[[], Any]], tokens: int, rounds: int, before: Callable[[], None]) -> Any:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            before()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(tokens):
                run()
            end.record()
            torch.cuda.synchronize()
            if round_:  # the first one warms up
                times[name].append(start.elapsed_time(end) / tokens)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=512, help="of the cache")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    device = torch.cuda.get_device_name(0)
    rows: list[dict[str, Any]] = []
    result = {
        "command": "python benchmarks/gpu_decode.py",
        "machine": {**timing.machine(), "gpu": device, "cuda": torch.version.cuda},
        "layers": args.layers,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-decode-{device.lower().replace(' ', '-')}.json"
    with torch.no_grad():
        models = {name: Model(make, args.layers, 1, args.length, "cuda") for name, make in factories().items()}
        print(f"{device}, {args.layers} layers\n{'batch':>5s} {'':26s} {'ms':>8s} {'tokens/s':>9s} {'GB/s':>6s}")
        for batch in args.batch:
            runs: dict[str, Callable[[], Any]] = {}
            for name, model in models.items():
                model.reset(batch, args.length, "cuda")
                for block in model.blocks:
                    block.resize(batch, args.length, "cuda")
                runs[f"{name} eager"] = model.step
                if not name.startswith("bitsandbytes"):
                    runs[f"{name} graph"] = capture(model)

            def rewind() -> None:
                for model in models.values():
                    model.position.zero_()

            for what, ms in milliseconds(runs, args.tokens, args.rounds, rewind).items():
                size = linear_bytes(models[what.rsplit(" ", 1)[0]])
                row = {"batch": batch, "what": what, "ms": ms, "tokens/s": batch * 1e3 / ms, "GB/s": size / ms / 1e6}
                rows.append(row)
                print(f"{batch:5d} {what:26s} {ms:8.2f} {row['tokens/s']:9.1f} {row['GB/s']:6.0f}", flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
    print("saved", path)


if __name__ == "__main__":
    main()
