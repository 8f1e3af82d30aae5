"""What a rule may do with a symbol: each operation is a function that adds lines to a `Recording`.

All are correctly rounded, everywhere and however they are compiled: so the lines have the same bits on every path. Where torch
has a faster spelling with other bits (a quotient with a number is a product with its reciprocal on GPUs, and so is 3.0 / x
everywhere), the line is spelled otherwise.
"""

from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnbref.optim.symbols import Recording, Symbol

ALLOWED = "+ - * /, comparisons, & | ~, abs, sign, sqrt, square, where, minimum, maximum and clamp"


def _infix(sign: str, condition: bool = False) -> Callable[..., Any]:
    def apply(r: "Recording", x: Any, y: Any) -> "Symbol":
        # x / 3.0 is a product with a reciprocal on a GPU, 3.0 / x everywhere: two roundings.
        operand = r.tensor if sign == "/" else r.operand
        return r.add(f"{operand(x)} {sign} {operand(y)}", condition)

    return apply


def _logical(sign: str) -> Callable[..., Any]:
    return lambda r, x, y: r.add(f"{r.condition(x)} {sign} {r.condition(y)}", True)


def _where(r: "Recording", condition: Any, x: Any, y: Any) -> Any:
    return r.add(f"where({r.condition(condition)}, {r.tensor(x)}, {r.tensor(y)})")


def _extreme(sign: str) -> Callable[..., Any]:
    """x if it is on that side of y, equal to it, or NaN; else y. Written so, the same one of two zeros, and of two NaN, is
    returned by scalar code and by vectors."""

    def apply(r: "Recording", x: Any, y: Any) -> Any:
        a, b = r.operand(x), r.operand(y)
        return _where(r, r.add(f"({a} {sign}= {b}) | ({a} != {a})", True), x, y)

    return apply


_maximum, _minimum = _extreme(">"), _extreme("<")


def _clamp(r: "Recording", x: Any, min: Any = None, max: Any = None) -> Any:  # noqa: A002, torch's names
    x = x if min is None else _maximum(r, x, min)
    return x if max is None else _minimum(r, x, max)


def _power(r: "Recording", x: Any, exponent: Any) -> Any:
    if isinstance(exponent, Real) and exponent == 2:
        return _square(r, x)
    if isinstance(exponent, Real) and exponent == 0.5:
        return _sqrt(r, x)
    return r.refuse(f"uses the power {exponent!r}, not 2 or 0.5")


def _square(r: "Recording", x: Any) -> Any:
    return r.add("{0} * {0}".format(r.operand(x)))


def _sqrt(r: "Recording", x: Any) -> Any:
    return r.add(f"sqrt({r.operand(x)})")


def _whole(r: "Recording", step: Any, *args: Any, results: int = 1) -> Any:
    found = r.call(step, args, results)
    return found[0] if results == 1 else found


_add, _sub, _mul, _div = map(_infix, "+-*/")

OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div,
    **{name: _infix(sign, True) for name, sign in
       (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!="))},
    "logical_and": _logical("&"), "logical_or": _logical("|"),
    "logical_not": lambda r, x: r.add(f"~{r.condition(x)}", True),
    "neg": lambda r, x: r.add(f"-{r.operand(x)}"), "pos": lambda r, x: r.number(x) if x._condition else x,
    "abs": lambda r, x: r.add(f"{r.operand(x)}.abs()"),
    "sign": lambda r, x: r.add(f"{r.operand(x)}.sign()"),
    "sqrt": _sqrt, "square": _square, "pow": _power,
    "where": _where, "maximum": _maximum, "minimum": _minimum, "clamp": _clamp,
    "float": lambda r, x: r.number(x) if x._condition else x,
    "clone": lambda r, x: x,
    "zeros_like": lambda r, x: r.add(f"full_like({r.operand(x)}, 0.0)"),
    "ones_like": lambda r, x: r.add(f"full_like({r.operand(x)}, 1.0)"), "whole": _whole,
}  # fmt: skip
"""The operations that a rule may use on symbols, by their names as functions of torch or methods of a tensor."""
