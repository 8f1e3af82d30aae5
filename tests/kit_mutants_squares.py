"""Wrong backends of the operations that came with version 4, each in one way: squares in 8 bits, and SOAP's refresh."""

from collections.abc import Callable
from typing import Any

import torch
from kit_mutants import Mutant, right
from kit_mutants_version4 import Change, adding, given, made
from torch import Tensor

MUTANTS: list[Mutant] = []
"""All of them."""

_add = adding(MUTANTS)


def _plainly(f: Callable[..., Any], k: dict[str, Any]) -> Any:
    """Squares by the nearest value, which may be 0."""
    return right("quantize_blockwise" if "x" in k else "optimizer_8bit")(**k)


def _never_zero(name: str) -> Change:
    """A square that is 0 has the code of the smallest value, too."""
    return made(name, lambda codes, k: codes.clamp(min=1))


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
_add("first-gradient-steps", "the first gradient decays p", given(
    p=lambda k: k["p"] if k["step"] else k["p"] * (1 - k["lr"] * k["weight_decay"])), "soap_refresh")  # fmt: skip
_add("first-gradient-counted", "the second gradient is stepped as the second",
     given(beta1=lambda k: k["beta1"] if k["step"] else k["beta1"] ** 2), "soap_refresh")  # fmt: skip
