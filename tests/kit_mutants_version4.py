"""Backends, each wrong in one way, of other kinds than those before: what a call leaves to the next one, what a shape or a number
that no case had makes of a kernel, and the operations that came with version 4."""

from collections.abc import Callable
from typing import Any

import torch
from kit_mutants import Mutant, mutant, right
from torch import Tensor

from bnbref import int8

MUTANTS: list[Mutant] = []
"""All of them."""

STEPS = ("optimizer_32bit", "optimizer_8bit")
Change = Callable[[Callable[..., Any], dict[str, Any]], Any]


def _add(name: str, wrong: str, change: Change, *operations: str) -> None:
    """A mutant whose functions are `change(right function, keyword arguments)`."""

    def function(op: str) -> Callable[..., Any]:
        return lambda **k: change(right(op), k)

    MUTANTS.append(mutant(name, wrong, **{op: function(op) for op in operations}))


def _given(**changed: Callable[[dict[str, Any]], Any]) -> Change:
    """The right result of other arguments."""
    return lambda f, k: f(**{**k, **{name: make(k) for name, make in changed.items()}})


def _made(name: str, change: Callable[[Tensor, dict[str, Any]], Tensor]) -> Change:
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
_add("float16-saturated", "what is beyond float16 is its largest number", _made("", _saturated), "dequantize_4bit")
_add("float16-results-flushed", "float16 results below 2^-14 are 0", _made("", _halves_flushed), "dequantize_blockwise")
_add("bfloat16-through-float16", "bfloat16 passes through float16", _through_float16("x"), "quantize_4bit")
_add("activations-through-float16", "bfloat16 activations pass through float16", _through_float16("a"), "gemm_4bit")
_add("rows-through-float16", "bfloat16 rows pass through float16", _through_float16("x"), "int8_quantize")
_add("gradient-scaled-in-16-bits", "a gradient of 16 bits is scaled in 16 bits", _scaled_in_its_dtype, *STEPS)
_add("sign-of-zero", "Lion's sign of 0 is 1", _zero_is_positive, *STEPS)
_add("sums-of-float16", "partial sums are float16", _sixteen_bit_parts, "gemm_4bit")


# ---- shapes ---------------------------------------------------------------------------------------------------------


def _square_as_it_is(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    square = k["b"].shape[0] == k["b"].shape[1]
    return f(**{**k, "b": k["b"].t().contiguous() if square else k["b"]})


def _square_weight(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    n, columns = k["shape"]
    if n != columns:
        return f(**k)
    names = ("packed", "absmax", "blocksize", "quant_type", "shape")
    weight = right("dequantize_4bit")(dtype=torch.float32, **{name: k[name] for name in names})
    y = k["a"].float() @ weight
    return (y if k["bias"] is None else y + k["bias"]).to(k["a"].dtype)


def _bias_of_rows(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Where there are as many rows as outputs the bias is added to rows."""
    if k["bias"] is None or k["a"].shape[:-1] != k["bias"].shape:
        return f(**k)
    return (f(**{**k, "bias": None}).float() + k["bias"].float()[:, None]).to(k["a"].dtype)


def _sixteen_rows(y: Tensor, k: dict[str, Any]) -> Tensor:
    flat = y.view(-1, y.shape[-1])
    flat[16:] = 0
    return y


def _flat_beyond_matrices(y: Tensor, k: dict[str, Any]) -> Tensor:
    return y.flatten() if y.dim() > 2 else y


def _first_of_the_batch(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Outliers are looked for in the first matrix of a batch."""
    x, threshold = k["x"], k["threshold"]
    if x.dim() < 3 or threshold == 0:
        return f(**k)
    mask = (x[0].abs() >= threshold).any(0)
    codes, absmax, _ = int8.quantize(x.masked_fill(mask, 0), 0.0)
    return codes, absmax, mask.nonzero().view(-1)


_add("square-not-transposed", "b is transposed but where it is square", _square_as_it_is, "int8_matmul")
_add("square-weight-transposed", "a square weight is transposed", _square_weight, "gemm_4bit")
_add("bias-of-rows", "as many rows as outputs: the bias is added to rows", _bias_of_rows, "gemm_4bit")
_add("sixteen-rows", "rows beyond sixteen are left out", _made("", _sixteen_rows), "gemm_4bit")
_add("sixteen-rows-of-gradient", "rows beyond sixteen are left out", _made("", _sixteen_rows), "gemm_4bit_backward")
_add("three-dimensions-flat", "codes of more than two dimensions come back flat",
     _made("0", _flat_beyond_matrices), "quantize_blockwise")  # fmt: skip
_add("three-dimensions-decoded-flat", "a tensor of more than two dimensions comes back flat",
     _made("", _flat_beyond_matrices), "dequantize_blockwise")  # fmt: skip
_add("three-dimensions-stepped-flat", "a parameter of more than two dimensions comes back flat",
     _made("p", _flat_beyond_matrices), *STEPS)  # fmt: skip
_add(
    "outliers-of-the-first",
    "outliers are looked for in the first matrix of a batch",
    _first_of_the_batch,
    "int8_quantize",
)
_add("threshold-of-six", "whatever threshold is said, it is 6", _given(threshold=lambda k: 6.0 * (k["threshold"] > 0)),
     "int8_quantize")  # fmt: skip


def _of_64(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Scales of another blocksize are taken for those of 64, as far as there are any."""
    count = -(-torch.Size(k["shape"]).numel() // 64)
    name = "codes" if "codes" in k else "absmax"
    return f(**{**k, "blocksize": 64, name: k[name].repeat(2)[:count]})


def _memory_order(name: str) -> Change:
    """An argument is read in the order of its memory."""

    def read(f: Callable[..., Any], k: dict[str, Any]) -> Any:
        x = k[name]
        return f(**{**k, name: x if x.is_contiguous() else x.t().contiguous().view(x.shape)})

    return read


def _flat(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    made = f(**k)
    if isinstance(made, dict):
        return {name: x.flatten() for name, x in made.items()}
    return made.flatten() if isinstance(made, Tensor) else tuple(x.flatten() for x in made)


_add("product-of-blocks-of-64", "scales are taken for those of blocks of 64", _of_64, "gemm_4bit")
_add("gradient-of-blocks-of-64", "scales are taken for those of blocks of 64", _of_64, "gemm_4bit_backward")
_add("decoded-in-blocks-of-64", "nested scales are taken for those of blocks of 64", _of_64, "dequantize_4bit_nested")
_add(
    "activations-in-memory-order", "strides of activations are ignored", _memory_order("a"), "gemm_4bit", "int8_matmul"
)
_add("output-gradient-in-memory-order", "strides of the output's gradient are ignored", _memory_order("grad"),
     "gemm_4bit_backward", "int8_backward")  # fmt: skip
_add(
    "codes-in-memory-order",
    "strides of codes are ignored",
    _memory_order("codes"),
    "dequantize_blockwise",
    "int8_dequantize",
)
_add("weights-flat", "weights and corrections come back flat", _flat, "split_weight", "join_weight", "corrected_step")


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
_add("offset-of-seven-digits", "a file has seven digits of the offset", _made("state", _of_six_digits), "save_4bit")
_add("shape-of-matrices", "a file has no more than two dimensions", lambda f, k: f(**{**k, "x": k["x"].flatten(1)})
     if k["x"].dim() > 2 else f(**k), "save_4bit")  # fmt: skip


# ---- steps ----------------------------------------------------------------------------------------------------------

_add("adafactor-step-before", "the decay of the means is that of the step before",
     _given(step=lambda k: max(1, k["step"] - 1)), "adafactor")  # fmt: skip
_add("muon-8bit-rows", "blocks of the momentum begin anew at each row of a matrix", _made("momentum", lambda m, k: torch.cat(
    [right("quantize_blockwise")(row, k["values"], 256)[0] for row in k["values"][m.long()]]).view(m.shape)
    if m.numel() > 256 else m), "muon_8bit")  # fmt: skip
_add("soap-one-beta", "the bases' means are averaged by beta2", _given(beta3=lambda k: k["beta2"]), "soap")
_add("join-in-16-bits", "the sum of a weight and its correction is rounded to the weight's dtype",
     lambda f, k: f(**k).to(k["p"].dtype).float(), "join_weight")  # fmt: skip
_add(
    "released-at-half",
    "a step inside the backward pass has half the rate",
    _given(lr=lambda k: k["lr"] / 2),
    "released_step",
)


# ---- what came with version 4 ---------------------------------------------------------------------------------------


def _plainly(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Squares by the nearest value, which may be 0."""
    return right("quantize_blockwise" if "x" in k else "optimizer_8bit")(**k)


def _never_zero(name: str) -> Change:
    """A square that is 0 has the code of the smallest value, too."""
    return _made(name, lambda codes, k: codes.clamp(min=1))


def _lost(made: Any, k: dict[str, Any], name: str = "squares") -> Any:
    """Squares of a result by the nearest value: those of the smallest value may be 0."""
    codes = made[name]
    return {**made, name: torch.where(codes == 1, torch.zeros_like(codes), codes)}


def _momentum_in_bases(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Codes of the momentum are those of the momentum in the bases."""
    made = f(**k)
    m = k["values1"][made["momentum"].long()] * made["absmax1"].repeat_interleave(256)[: k["p"].numel()].view(
        k["p"].shape
    )
    codes, absmax = right("quantize_blockwise")(k["of_left"].t() @ m @ k["of_right"], k["values1"], 256)
    return {**made, "momentum": codes, "absmax1": absmax}


def _refreshed(basis: Callable[..., Tensor], moved: bool = True) -> Change:
    """SOAP with bases by `basis(mean, old basis)`; a first gradient's by LAPACK. moved: of the means after
    the step."""

    def step(f: Callable[..., Any], k: dict[str, Any]) -> Any:
        if not k["step"]:
            return f(**k)
        states = {name: k[name] for name in ("left", "right", "of_left", "of_right")}
        numbers = {n: x for n, x in k.items() if not isinstance(x, Tensor) and n != "step"}
        given = {name: k[name] for name in ("p", "g", "momentum", "squares", "step")}
        made = {**states, **right("soap")(**given, **states, **numbers)}
        for side in ("left", "right"):
            made[f"of_{side}"] = basis(made[side] if moved else k[side], k[f"of_{side}"])
        again = right("soap")(g=k["then"], step=k["step"] + 1, **made, **numbers)
        return {name: again[name] for name in ("p", "momentum", "left", "right")}

    return step


def _right_basis(mean: Tensor, old: Tensor) -> Tensor:
    power = mean @ old
    order = (old * power).sum(0).argsort(descending=True)
    new = torch.empty_like(old)
    new[:, order] = torch.linalg.qr(power[:, order])[0]
    return new


def _in_new_order(mean: Tensor, old: Tensor) -> Tensor:
    power = mean @ old
    return torch.linalg.qr(power[:, (old * power).sum(0).argsort(descending=True)])[0]


_add("squares-to-the-nearest", "a square is coded by the nearest value, which may be 0", _plainly, "quantize_squares",
     "optimizer_8bit_nonzero")  # fmt: skip
_add("zero-squares-lifted", "a square of 0 has the code of the smallest value", _never_zero("0"), "quantize_squares")
_add(
    "zero-states-lifted",
    "a state of 0 has the code of the smallest value",
    _never_zero("state2"),
    "optimizer_8bit_nonzero",
)
_add("averaged-squares-lost", "the smallest squares are 0", lambda f, k: _lost(f(**k), k), "schedule_free_8bit")
_add("rotated-squares-lost", "the smallest squares are 0", lambda f, k: _lost(f(**k), k), "soap_8bit")
_add("difference-before", "the difference is that of before the average moved", lambda f, k: {
    **f(**k), "absmax1": f(**k)["absmax1"] * (1 + 1 / k["step"])}, "schedule_free_8bit")  # fmt: skip
_add("momentum-in-bases", "the momentum is kept in the bases", _momentum_in_bases, "soap_8bit")
_add("refresh-in-new-order", "columns are sorted, and the squares are not", _refreshed(_in_new_order), "soap_refresh")
_add("refresh-unsorted", "columns are made orthogonal in the order in which they are",
     _refreshed(lambda mean, old: torch.linalg.qr(mean @ old)[0]), "soap_refresh")  # fmt: skip
_add("refresh-not-orthogonal", "columns are divided by their length alone",
     _refreshed(lambda mean, old: torch.nn.functional.normalize(mean @ old, dim=0)), "soap_refresh")  # fmt: skip
_add("refresh-twice", "two steps of power iteration", _refreshed(lambda mean, old: _right_basis(mean, _right_basis(mean, old))),
     "soap_refresh")  # fmt: skip
_add("refresh-of-old-means", "the bases are those of the means before the step", _refreshed(_right_basis, moved=False),
     "soap_refresh")  # fmt: skip
_add("refresh-skipped", "the bases are not refreshed", _refreshed(lambda mean, old: old), "soap_refresh")
_add("refresh-to-eigenvectors", "the bases are the eigenvectors, as LAPACK has them",
     _refreshed(lambda mean, old: torch.linalg.eigh(mean)[1]), "soap_refresh")  # fmt: skip
_add("first-gradient-steps", "the first gradient decays p", _given(
    p=lambda k: k["p"] if k["step"] else k["p"] * (1 - k["lr"] * k["weight_decay"])), "soap_refresh")  # fmt: skip
_add("first-gradient-counted", "the second gradient is stepped as the second",
     _given(beta1=lambda k: k["beta1"] if k["step"] else k["beta1"] ** 2), "soap_refresh")  # fmt: skip
