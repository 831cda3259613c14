"""Expressions rewritten: index variables replaced, loads computed in place, functions as polynomials.

LLVM has no vector code for exp, tanh and erf, and would call the C library once for each lane. They are written out
here, exact to a few units in the last place of float32:
exp: Cephes' expf. erf: the rational function of Eigen's and XLA's ``erf``. tanh and sigmoid: from exp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.tirx import FloatImm, IntImm

from fxopt.backends._tvm_loops import Buffer, Expr, index

_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max, tirx.EQ,
    tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or,
    tirx.LShift, tirx.RShift, tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor,
)  # fmt: skip

OnLoad = Callable[[Buffer, list[Expr]], Expr]


class UnknownExpressionError(Exception):
    """An expression of a kind that is not known here."""


def rewrite(
    expr: Expr, variables: Mapping[Expr, Expr], on_load: OnLoad, guarded: Callable[[], Any] | None = None
) -> Expr:
    """*expr* with *variables* replaced, and each load by what *on_load* gives for its buffer and rewritten indices.

    Args:
        expr: what to rewrite.
        variables: the new expression for each index variable.
        on_load: called for each load.
        guarded: gives a context manager in which the branches of a condition are rewritten.

    Raises:
        UnknownExpressionError: there is a node of another kind in it.
    """

    def again(e: Expr) -> Expr:
        return rewrite(e, variables, on_load, guarded)

    if isinstance(expr, TensorLoad):
        return on_load(expr.source, [again(i) for i in expr.indices])
    if isinstance(expr, tirx.Var):
        if expr not in variables:
            return expr
        new = variables[expr]
        return new if new.ty == expr.ty else tirx.Cast(str(expr.ty.dtype), new)
    if isinstance(expr, IntImm | FloatImm):
        return expr
    if isinstance(expr, _BINARY):
        a, b = again(expr.a), again(expr.b)
        if isinstance(expr, tirx.EQ | tirx.NE) and str(a.ty.dtype) == "bool":  # vectors of which it compares as floats
            a, b = tirx.Cast("int8", a), tirx.Cast("int8", b)
        return extreme(type(expr), a, b) if isinstance(expr, tirx.Max | tirx.Min) else type(expr)(a, b)
    if isinstance(expr, tirx.Not | tirx.BitwiseNot):
        return type(expr)(again(expr.a))
    if isinstance(expr, tirx.Cast):
        return tirx.Cast(str(expr.ty.dtype), again(expr.value))
    if isinstance(expr, tirx.Select):
        return tirx.Select(again(expr.condition), again(expr.true_value), again(expr.false_value))
    if isinstance(expr, Call):
        return _call(expr, again, guarded)
    raise UnknownExpressionError(type(expr).__name__)


def _call(call: Any, again: Callable[[Expr], Expr], guarded: Callable[[], Any] | None) -> Expr:
    name = _name(call)
    if name == "tirx.if_then_else" and all(map(reads_in_place, call.args[1:])):
        return tirx.Select(*(again(a) for a in call.args))
    if name == "tirx.isnan" and str(call.args[0].ty.dtype) in _BITS:
        return _is_nan(again(call.args[0]))
    if name == "tirx.if_then_else" and guarded is not None:
        condition = again(call.args[0])
        with guarded():
            args = [condition, *(again(a) for a in call.args[1:])]
    else:
        args = [again(a) for a in call.args]
    written = _WRITTEN.get(name)
    if written is not None and str(call.ty.dtype) == "float32":
        return written(*args)
    return Call(call.op, args, call.attrs, call.ty_args, None, call.ty)


def _name(call: Any) -> str:
    return str(getattr(call.op, "name", ""))


def reads_in_place(expr: Expr) -> bool:
    """Whether *expr* reads where its result is, not beside it: then it may be computed although it is not asked for."""
    return all(isinstance(i, tirx.Var | IntImm) for _, indices in loads(expr) for i in indices)


def is_vector_code(expr: Expr) -> bool:
    """Whether *expr* becomes vector instructions; TVM takes statements with anything else apart into scalar loops."""
    found = True

    def look(e: Expr) -> None:
        nonlocal found
        if isinstance(e, Call):
            name = _name(e)
            branch = name == "tirx.if_then_else" and all(map(reads_in_place, e.args[1:]))
            found = found and (branch or name in _VECTOR or (name in _WRITTEN and str(e.ty.dtype) == "float32"))

    _walk(expr, look)
    return found


def loads(expr: Expr) -> list[tuple[Buffer, list[Expr]]]:
    """Buffer and indices of each load in *expr*.

    Raises:
        UnknownExpressionError: there is a node in it that is not known here.
    """
    found: list[tuple[Buffer, list[Expr]]] = []

    def note(buffer: Buffer, indices: list[Expr]) -> Expr:
        found.append((buffer, indices))
        return tirx.BufferLoad(buffer, indices)

    rewrite(expr, {}, note)
    return found


def depends(expr: Expr, variable: Expr) -> bool:
    """Whether *variable* occurs in the expression *expr*."""
    seen = False

    def look(e: Expr) -> None:
        nonlocal seen
        seen = seen or (isinstance(e, tirx.Var) and bool(e.same_as(variable)))

    _walk(expr, look)
    return seen


def _walk(expr: Expr, look: Callable[[Expr], None]) -> None:
    look(expr)
    if isinstance(expr, TensorLoad):
        parts = list(expr.indices)
    elif isinstance(expr, Call):
        parts = list(expr.args)
    elif isinstance(expr, tirx.Select):
        parts = [expr.condition, expr.true_value, expr.false_value]
    elif isinstance(expr, tirx.Cast):
        parts = [expr.value]
    elif isinstance(expr, _BINARY):
        parts = [expr.a, expr.b]
    else:
        parts = [expr.a] if isinstance(expr, tirx.Not | tirx.BitwiseNot) else []
    for part in parts:
        _walk(part, look)


def _f(value: float) -> Expr:
    return FloatImm("float32", value)


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Polynomial in *x*, the highest power first."""
    result = _f(coefficients[0])
    for c in coefficients[1:]:
        result = tirx.Add(tirx.Mul(result, x), _f(c))
    return result


def _clamp(x: Expr, low: float, high: float) -> Expr:
    return tirx.Min(tirx.Max(x, _f(low)), _f(high))


def extreme(kind: type[tirx.Max] | type[tirx.Min], a: Expr, b: Expr) -> Expr:
    """``kind(a, b)``, which is NaN where *a* or *b* is; TVM's own is *b* where the two cannot be compared."""
    dtype = str(a.ty.dtype)
    if dtype not in _BITS:
        return kind(a, b)
    if isinstance(a, FloatImm) or isinstance(b, FloatImm):
        return kind(b, a) if isinstance(b, FloatImm) else kind(a, b)
    name = "llvm.maximum" if kind is tirx.Max else "llvm.minimum"
    return tirx.call_llvm_pure_intrin(dtype, name, a, b)


_BITS = {
    "float16": ("int16", 0x7FFF, 0x7C00),
    "float32": ("int32", 0x7FFFFFFF, 0x7F800000),
    "float64": ("int64", (1 << 63) - 1, 0x7FF << 52),
}
"""Integers of the same size, their bits without the sign, and those of infinity; above them are NaNs."""


def _is_nan(x: Expr) -> Expr:
    """By the bits: TVM simplifies x ≠ x to false."""
    kind, but_sign, infinite = _BITS[str(x.ty.dtype)]
    bits = tirx.BitwiseAnd(tirx.reinterpret(kind, x), IntImm(kind, but_sign))
    return tirx.GT(bits, IntImm(kind, infinite))


def exp(x: Expr) -> Expr:
    """e^x: x = n·ln 2 + r, |r| ≤ ln 2 / 2, a polynomial for e^r, and n added to the exponent bits."""
    inside = _clamp(x, -87.33654, 88.72283)
    n = tirx.floor(tirx.Add(tirx.Mul(inside, _f(1.44269504088896341)), _f(0.5)))
    n = tirx.Min(n, _f(127.0))
    r = tirx.Sub(tirx.Sub(inside, tirx.Mul(n, _f(0.693359375))), tirx.Mul(n, _f(-2.12194440e-4)))
    p = _horner(r, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5))
    p = tirx.Add(tirx.Add(tirx.Mul(tirx.Mul(p, r), r), r), _f(1.0))
    bits = tirx.LShift(tirx.Add(tirx.Cast("int32", n), IntImm("int32", 127)), IntImm("int32", 23))
    value = tirx.Mul(p, tirx.reinterpret("float32", bits))
    value = tirx.Select(tirx.GT(x, _f(88.72283)), tirx.infinity("float32"), value)
    value = tirx.Select(tirx.LT(x, _f(-87.33654)), _f(0.0), value)
    return tirx.Select(_is_nan(x), x, value)


def _tanh(x: Expr) -> Expr:
    """Odd polynomial for small |x|, else ±(1 − 2/(e^2|x| + 1))."""
    size = tirx.Max(x, tirx.Sub(_f(0.0), x))
    e = exp(tirx.Mul(tirx.Min(size, _f(10.0)), _f(2.0)))
    large = tirx.Sub(_f(1.0), tirx.Div(_f(2.0), tirx.Add(e, _f(1.0))))
    squared = tirx.Mul(x, x)
    odd = _horner(
        squared, (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
    )
    small = tirx.Add(tirx.Mul(tirx.Mul(odd, squared), x), x)
    value = tirx.Select(tirx.LT(x, _f(0.0)), tirx.Sub(_f(0.0), large), large)
    value = tirx.Select(tirx.LT(size, _f(0.625)), small, value)
    return tirx.Select(_is_nan(x), x, value)


def _sinh(x: Expr) -> Expr:
    """(e^x − e^−x)/2; its series where the two cancel."""
    squared = tirx.Mul(x, x)
    series = _horner(squared, (2.7557319e-6, 1.9841270e-4, 8.3333333e-3, 0.16666667, 1.0))
    large = tirx.Mul(_f(0.5), tirx.Sub(exp(x), exp(tirx.Sub(_f(0.0), x))))
    return tirx.Select(tirx.LT(squared, _f(1.0)), tirx.Mul(x, series), large)


def _sigmoid(x: Expr) -> Expr:
    return tirx.Div(_f(1.0), tirx.Add(_f(1.0), exp(tirx.Sub(_f(0.0), x))))


def _erf(x: Expr) -> Expr:
    inside = _clamp(x, -4.0, 4.0)
    squared = tirx.Mul(inside, inside)
    above = _horner(
        squared,
        (
            -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
            -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
        ),
    )  # fmt: skip
    below = _horner(
        squared,
        (
            -1.45660718464996e-05,
            -2.13374055278905e-04,
            -1.68282697438203e-03,
            -7.37332916720468e-03,
            -1.42647390514189e-02,
        ),
    )
    return tirx.Select(_is_nan(x), x, tirx.Div(tirx.Mul(inside, above), below))


_WRITTEN: dict[str, Callable[..., Expr]] = {
    "tirx.exp": exp,
    "tirx.tanh": _tanh,
    "tirx.sigmoid": _sigmoid,
    "tirx.erf": _erf,
    "tirx.sinh": _sinh,
    "tirx.cosh": lambda x: tirx.Mul(_f(0.5), tirx.Add(exp(x), exp(tirx.Sub(_f(0.0), x)))),
    "tirx.rsqrt": lambda x: tirx.Div(_f(1.0), tirx.sqrt(x)),
}


_VECTOR = {
    "tirx.sqrt", "tirx.floor", "tirx.ceil", "tirx.round", "tirx.nearbyint", "tirx.trunc", "tirx.fabs", "tirx.isnan",
    "tirx.reinterpret", "tirx.shift_left", "tirx.shift_right", "tirx.bitwise_and", "tirx.bitwise_or",
}  # fmt: skip
for _name_of in ("tirx.nearbyint", "tirx.isnan"):  # for LLVM they are, but TVM does not say so
    tvm.ir.register_op_attr(_name_of, "TVectorizable", True)


def zero(dtype: str) -> Expr:
    """0 of *dtype*."""
    return FloatImm(dtype, 0.0) if "float" in dtype else IntImm(dtype, 0)


def substitute(expr: Expr, variables: Mapping[Expr, Expr]) -> Expr:
    """*expr* with *variables* replaced."""
    return rewrite(expr, variables, lambda b, i: tirx.BufferLoad(b, [index(x) for x in i]))
