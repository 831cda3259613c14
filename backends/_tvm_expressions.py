"""Expressions rewritten: index variables replaced, loads computed in place, functions written out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.tirx import FloatImm, IntImm

from fxopt.backends._tvm_functions import BITS, WRITTEN, extreme, is_nan
from fxopt.backends._tvm_loops import Buffer, Expr, index, name_of, static

_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max, tirx.EQ,
    tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or,
    tirx.LShift, tirx.RShift, tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor,
)  # fmt: skip

_COMPARISONS = (tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE)

OnLoad = Callable[[Buffer, list[Expr]], Expr]
Guard = Callable[[], contextlib.AbstractContextManager[None]]


class UnknownExpressionError(Exception):
    """An expression of a kind that is not known here."""


def rewrite(
    expr: Expr,
    variables: Mapping[Expr, Expr],
    on_load: OnLoad,
    guarded: Guard = contextlib.nullcontext,
    decide: Callable[[Expr], Expr] | None = None,
) -> Expr:
    """*expr* with *variables* replaced, and each load by what *on_load* gives for its buffer and rewritten indices.

    Args:
        expr: what to rewrite.
        variables: the new expression for each index variable.
        on_load: called for each load.
        guarded: gives a context manager in which the branches of a condition are rewritten.
        decide: says what is left of a rewritten condition; where that is a constant just the one branch stays.

    Raises:
        UnknownExpressionError: there is a node of another kind in it.
    """

    def again(e: Expr) -> Expr:
        return rewrite(e, variables, on_load, guarded, decide)

    if isinstance(expr, TensorLoad):
        return on_load(expr.source, [again(i) for i in expr.indices])
    if isinstance(expr, tirx.Var):
        new = variables.get(expr, expr)
        return new if new.ty == expr.ty else tirx.Cast(str(expr.ty.dtype), new)
    if isinstance(expr, IntImm | FloatImm):
        return expr
    if isinstance(expr, _BINARY):
        return _binary(type(expr), again(expr.a), again(expr.b))
    if isinstance(expr, tirx.Not) and loads(expr.a):  # of data: TVM would make x ≥ y of it where it is ¬(x < y)
        return tirx.EQ(tirx.Cast("int8", again(expr.a)), IntImm("int8", 0))
    if isinstance(expr, tirx.Not | tirx.BitwiseNot):
        return type(expr)(again(expr.a))
    if isinstance(expr, tirx.Cast):
        return tirx.Cast(str(expr.ty.dtype), again(expr.value))
    if isinstance(expr, tirx.Select):
        return tirx.Select(again(expr.condition), again(expr.true_value), again(expr.false_value))
    if isinstance(expr, tirx.Let):
        value, variable = again(expr.value), tirx.Var(expr.var.name, str(expr.var.ty.dtype))
        return tirx.Let(
            variable, value, rewrite(expr.body, {**variables, expr.var: variable}, on_load, guarded, decide)
        )
    if isinstance(expr, Call):
        return _call(expr, again, guarded, decide)
    raise UnknownExpressionError(type(expr).__name__)


def _binary(kind: Any, a: Expr, b: Expr) -> Expr:
    dtype = str(a.ty.dtype)
    if kind in (tirx.Max, tirx.Min):
        return extreme(kind, a, b)
    if kind in (tirx.EQ, tirx.NE) and dtype == "bool":  # vectors of which it compares as floats
        return kind(tirx.Cast("int8", a), tirx.Cast("int8", b))
    if kind in _COMPARISONS and dtype in BITS and not isinstance(b, FloatImm):
        return kind(a, tirx.reinterpret(dtype, tirx.reinterpret(BITS[dtype][0], b)))  # else x = x would be true for NaN
    return kind(a, b)


def _call(call: Any, again: Callable[[Expr], Expr], guarded: Guard, decide: Callable[[Expr], Expr] | None) -> Expr:
    name = name_of(call)
    if name == "if_then_else":
        return _branch(call, again, guarded, decide)
    if name == "isnan" and str(call.args[0].ty.dtype) in BITS:
        return is_nan(again(call.args[0]))
    args = [again(a) for a in call.args]
    written = WRITTEN.get(name)
    if written is not None and str(call.ty.dtype) == "float32":
        return _once(args[0], written)
    return Call(call.op, args, call.attrs, call.ty_args, None, call.ty)


def _once(value: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """``function(value)``, which names its argument many times: else code would grow with each function inside."""
    if isinstance(value, tirx.Var | FloatImm):
        return function(value)
    variable = tirx.Var("x", str(value.ty.dtype))
    return tirx.Let(variable, value, function(variable))


def _branch(call: Any, again: Callable[[Expr], Expr], guarded: Guard, decide: Callable[[Expr], Expr] | None) -> Expr:
    condition = again(call.args[0])
    condition = condition if decide is None else decide(condition)
    known = static(condition)
    if known is not None:
        return again(call.args[1 if known else 2])
    if _is_choice(call):
        return tirx.Select(condition, *(again(a) for a in call.args[1:]))
    with guarded():
        return Call(call.op, [condition, *(again(a) for a in call.args[1:])], call.attrs, call.ty_args, None, call.ty)


def reads_in_place(expr: Expr) -> bool:
    """Whether *expr* reads where its result is, not beside it: then it may be computed although it is not asked for."""
    return all(isinstance(i, tirx.Var | IntImm) for _, indices in loads(expr) for i in indices)


def _is_choice(branch: Any) -> bool:
    """Whether both values of the if_then_else *branch* may be computed.

    Where an index decides, as in a padding, one of them may lie out of bounds; where data decide, either may be asked
    for at each index, so that both are there.
    """
    if not all(map(reads_in_place, branch.args[1:])):
        return False
    condition = rewrite(branch.args[0], {}, lambda buffer, _: zero(str(buffer.dtype)))
    return not any(map(loads, branch.args[1:])) or not _variables(condition)


def branches_on(expr: Expr, variable: Expr) -> bool:
    """Whether *variable* decides what *expr* reads, as in a concatenation or padding."""
    found = False

    def look(e: Expr) -> None:
        nonlocal found
        branch = isinstance(e, Call) and name_of(e) == "if_then_else" and not _is_choice(e)
        found = found or (branch and depends(e.args[0], variable))

    _walk(expr, look)
    return found


def is_vector_code(expr: Expr) -> bool:
    """Whether *expr* becomes vector instructions; TVM takes statements with anything else apart into scalar loops."""
    found = True

    def look(e: Expr) -> None:
        nonlocal found
        if isinstance(e, Call):
            name = name_of(e)
            choice = name == "if_then_else" and _is_choice(e)
            found = found and (choice or name in _VECTOR or (name in WRITTEN and str(e.ty.dtype) == "float32"))

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
    return any(bool(found.same_as(variable)) for found in _variables(expr))


def _variables(expr: Expr) -> list[Expr]:
    """Each variable in *expr*, as often as it is there."""
    found: list[Expr] = []
    _walk(expr, lambda e: found.append(e) if isinstance(e, tirx.Var) else None)
    return found


def weight(expr: Expr, of_load: Callable[[Buffer], int]) -> int:
    """About how often what *expr* reads stands in its code, with so much for each load of a buffer.

    A function that is written out names its argument some twenty times. That is bound to a variable, but LLVM's code
    generator in TVM puts what variables are bound to in their place, for its analysis of each of them.
    """
    if isinstance(expr, TensorLoad):
        return of_load(expr.source)
    inside = 1 + sum(weight(part, of_load) for part in _parts(expr))
    long = isinstance(expr, Call) and name_of(expr) in WRITTEN and name_of(expr) != "rsqrt"
    return 20 * inside if long else inside


def _walk(expr: Expr, look: Callable[[Expr], None]) -> None:
    look(expr)
    for part in _parts(expr):
        _walk(part, look)


def _parts(expr: Expr) -> list[Expr]:
    if isinstance(expr, TensorLoad):
        return list(expr.indices)
    if isinstance(expr, Call):
        return list(expr.args)
    if isinstance(expr, tirx.Select):
        return [expr.condition, expr.true_value, expr.false_value]
    if isinstance(expr, tirx.Let):
        return [expr.value, expr.body]
    if isinstance(expr, tirx.Cast):
        return [expr.value]
    if isinstance(expr, _BINARY):
        return [expr.a, expr.b]
    return [expr.a] if isinstance(expr, tirx.Not | tirx.BitwiseNot) else []


_VECTOR = {
    "sqrt", "floor", "ceil", "round", "nearbyint", "trunc", "fabs", "isnan",
    "reinterpret", "shift_left", "shift_right", "bitwise_and", "bitwise_or",
}  # fmt: skip
for _name_of in ("tirx.nearbyint", "tirx.isnan"):  # for LLVM they are, but TVM does not say so
    tvm.ir.register_op_attr(_name_of, "TVectorizable", True)


def zero(dtype: str) -> Expr:
    """0 of *dtype*."""
    return FloatImm(dtype, 0.0) if "float" in dtype else IntImm(dtype, 0)


def substitute(expr: Expr, variables: Mapping[Expr, Expr]) -> Expr:
    """*expr* with *variables* replaced."""
    return rewrite(expr, variables, lambda b, i: tirx.BufferLoad(b, [index(x) for x in i]))
