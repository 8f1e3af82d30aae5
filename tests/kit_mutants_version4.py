"""Backends, each wrong in one way, of other kinds than those before: what a call leaves to the next one, what a shape or a number
that no case had makes of a kernel."""

from collections.abc import Callable
from typing import Any

import torch
from kit_mutants import Mutant, mutant, right
from torch import Tensor

MUTANTS: list[Mutant] = []
"""All of them."""

STEPS = ("optimizer_32bit", "optimizer_8bit")
Change = Callable[[Callable[..., Any], dict[str, Any]], Any]


def adding(mutants: list[Mutant]) -> Callable[..., None]:
    """Adds to them a mutant whose functions are `change(right function, keyword arguments)`."""

    def add(name: str, wrong: str, change: Change, *operations: str) -> None:
        def function(op: str) -> Callable[..., Any]:
            return lambda **k: change(right(op), k)

        mutants.append(mutant(name, wrong, **{op: function(op) for op in operations}))

    return add


_add = adding(MUTANTS)


def given(**changed: Callable[[dict[str, Any]], Any]) -> Change:
    """The right result of other arguments."""
    return lambda f, k: f(**{**k, **{name: make(k) for name, make in changed.items()}})


def made(name: str, change: Callable[[Tensor, dict[str, Any]], Tensor]) -> Change:
    """The right results, but one of them: by its name, or by its place in a tuple."""

    def changed(f: Callable[..., Any], k: dict[str, Any]) -> Any:
        results = f(**k)
        if isinstance(results, Tensor):
            return change(results, k)
        if isinstance(results, tuple):
            return tuple(change(x, k) if str(i) == name else x for i, x in enumerate(results))
        return {key: change(x, k) if key == name else x for key, x in results.items()}

    return changed


# ---- what a call leaves to the next one -----------------------------------------------------------------------------


def _baked(*names: str) -> Change:
    """These arguments are those of the first call of its kind: shapes, and which optimizer."""
    first: dict[Any, dict[str, Any]] = {}

    def step(f: Callable[..., Any], k: dict[str, Any]) -> Any:
        kind = (k.get("optimizer"), *(x.shape for x in k.values() if isinstance(x, Tensor)))
        kept = first.setdefault(kind, {name: k[name] for name in names if k[name] is not None})
        return f(**{**k, **kept})

    return step


def _counts_itself() -> Change:
    """Counts the steps of an optimizer instead of being told."""
    count: dict[str, int] = {}

    def step(f: Callable[..., Any], k: dict[str, Any]) -> Any:
        count[k["optimizer"]] = count.get(k["optimizer"], 0) + 1
        return f(**{**k, "step": count[k["optimizer"]]})

    return step


def _kept_weight() -> Change:
    """A weight that is as large as one before is taken for it."""
    known: dict[Any, Tensor] = {}
    return lambda f, k: f(**{**k, "absmax": known.setdefault((k["shape"], k["blocksize"]), k["absmax"].clone())})


_add("rate-of-the-first-call", "the learning rate is that of the first call", _baked("lr"), *STEPS)
_add("codebook-of-the-first-call", "the codebook is that of the first call of a shape",
     _baked("values"), "quantize_blockwise")  # fmt: skip
_add("counts-itself", "steps are counted, whatever step is said", _counts_itself(), *STEPS)
_add("scales-of-the-first-call", "scales are those of the first weight of a shape", _kept_weight(), "dequantize_4bit")


# ---- numbers --------------------------------------------------------------------------------------------------------


def _towards_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.to(dtype)
    return torch.where(y.float().abs() > x.abs(), torch.nextafter(y, torch.zeros_like(y)), y)


def _half_truncated(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    return _towards_zero(f(**{**k, "dtype": torch.float32}), k["dtype"]) if k["dtype"] == torch.float16 else f(**k)


def _saturated(y: Tensor, k: dict[str, Any]) -> Tensor:
    return y.clamp(-65504, 65504) if y.dtype == torch.float16 else y


def _halves_flushed(y: Tensor, k: dict[str, Any]) -> Tensor:
    return torch.where(y.abs() < 2.0**-14, torch.zeros_like(y), y) if y.dtype == torch.float16 else y


def _through_float16(*names: str) -> Change:
    """bfloat16 is made float16 on the way."""
    return lambda f, k: f(
        **{n: x.half().to(x.dtype) if n in names and x.dtype == torch.bfloat16 else x for n, x in k.items()}
    )


def _scaled_in_its_dtype(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    return f(**{**k, "g": (k["g"].float() * k["gnorm_scale"]).to(k["g"].dtype), "gnorm_scale": 1.0})


def _zero_is_positive(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Lion's sign of 0 is 1."""
    made = f(**k)
    if k["optimizer"] != "lion":
        return made
    still = k["beta1"] * k["state1"] + (1 - k["beta1"]) * k["g"].float() * k["gnorm_scale"] == 0
    return {**made, "p": torch.where(still, made["p"] - k["lr"], made["p"])}


def _sixteen_bit_parts(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Partial sums of 32 products are float16."""
    a = k["a"]
    if a.dtype != torch.float16:
        return f(**k)
    weight = right("dequantize_4bit")(packed=k["packed"], absmax=k["absmax"], blocksize=k["blocksize"],
                                      quant_type=k["quant_type"], shape=k["shape"], dtype=torch.float32)  # fmt: skip
    parts = zip(a.float().split(32, -1), weight.split(32, -1), strict=True)
    total = torch.zeros(()).half()
    for x, w in parts:
        total = total + (x @ w.t()).half()
    return total if k["bias"] is None else total + k["bias"]


_add("float16-truncated", "float16 is rounded towards zero", _half_truncated, "dequantize_4bit", "dequantize_blockwise")
_add("float16-saturated", "what is beyond float16 is its largest number", made("", _saturated), "dequantize_4bit")
_add("float16-results-flushed", "float16 results below 2^-14 are 0", made("", _halves_flushed), "dequantize_blockwise")
_add("bfloat16-through-float16", "bfloat16 passes through float16", _through_float16("x"), "quantize_4bit")
_add("activations-through-float16", "bfloat16 activations pass through float16", _through_float16("a"), "gemm_4bit")
_add("rows-through-float16", "bfloat16 rows pass through float16", _through_float16("x"), "int8_quantize")
_add("gradient-scaled-in-16-bits", "a gradient of 16 bits is scaled in 16 bits", _scaled_in_its_dtype, *STEPS)
_add("sign-of-zero", "Lion's sign of 0 is 1", _zero_is_positive, *STEPS)
_add("sums-of-float16", "partial sums are float16", _sixteen_bit_parts, "gemm_4bit")


# ---- nested scales and files ----------------------------------------------------------------------------------------


def _renamed(old: bytes, new: bytes) -> Callable[[Tensor, dict[str, Any]], Tensor]:
    """The bytes of a state with something replaced."""
    return lambda state, _: torch.tensor(list(bytes(state.tolist()).replace(old, new)), dtype=torch.uint8)


def _of_six_digits(state: Tensor, k: dict[str, Any]) -> Tensor:
    head, mark, rest = bytes(state.tolist()).partition(b'"nested_offset": ')
    return state if not mark else torch.tensor(list(head + mark + b"%.7g}" % float(rest[:-1])), dtype=torch.uint8)


def _blocks_of_64(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    return f(**{**k, "blocksize": 64})


_add("nested-blocks-of-64", "doubly quantized blocks are of 64", _blocks_of_64, "quantize_4bit_nested")
_add("file-of-blocks-of-64", "a file says blocks of 64", lambda f, k: {
    **f(**k), "state": _renamed(b'"blocksize": %d' % k["blocksize"], b'"blocksize": 64')(f(**k)["state"], k)},
    "save_4bit")  # fmt: skip
_add("offset-of-seven-digits", "a file has seven digits of the offset", made("state", _of_six_digits), "save_4bit")
_add("shape-of-matrices", "a file has no more than two dimensions", lambda f, k: f(**{**k, "x": k["x"].flatten(1)})
     if k["x"].dim() > 2 else f(**k), "save_4bit")  # fmt: skip


# ---- steps ----------------------------------------------------------------------------------------------------------

_add("adafactor-step-before", "the decay of the means is that of the step before",
     given(step=lambda k: max(1, k["step"] - 1)), "adafactor")  # fmt: skip
_add("muon-8bit-rows", "blocks of the momentum begin anew at each row of a matrix", made("momentum", lambda m, k: torch.cat(
    [right("quantize_blockwise")(row, k["values"], 256)[0] for row in k["values"][m.long()]]).view(m.shape)
    if m.numel() > 256 else m), "muon_8bit")  # fmt: skip
_add("soap-one-beta", "the bases' means are averaged by beta2", given(beta3=lambda k: k["beta2"]), "soap")
_add("join-in-16-bits", "the sum of a weight and its correction is rounded to the weight's dtype",
     lambda f, k: f(**k).to(k["p"].dtype).float(), "join_weight")  # fmt: skip
_add(
    "released-at-half",
    "a step inside the backward pass has half the rate",
    given(lr=lambda k: k["lr"] / 2),
    "released_step",
)
