"""Short names for the statements and expressions of TVM's loop language (tirx) that our kernels are written in.

In TVM 0.27 a buffer is a variable with a buffer type, ``AllocBuffer`` and ``Bind`` are statements that hold for what
follows them in the same sequence, and indices are int64 until ``NarrowDataType`` makes them int32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx import ForKind

Expr = Any  # of tvm.ir; its classes are made at run time
Stmt = Any
Buffer = Any


def name_of(call: Any) -> str:
    """Of the operator that *call* calls, without its dialect: TVM has ``tirx.exp`` and ``prim.ceil``."""
    return str(getattr(call.op, "name", "")).rpartition(".")[2]


def index(value: int | Expr) -> Expr:
    """*value* as an int64 expression."""
    if isinstance(value, int):
        return tirx.IntImm("int64", value)
    return value if str(value.ty.dtype) == "int64" else tirx.Cast("int64", value)


def static(value: int | Expr) -> int | None:
    """*value* as a number, or None where it is only known when the code runs."""
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, tirx.IntImm) else None


def block(statements: Sequence[Stmt]) -> Stmt:
    """One statement of several, or of none."""
    if not statements:
        return tirx.Evaluate(tirx.IntImm("int32", 0))
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def loop(
    extent: int | Expr, body: Callable[[Expr], Sequence[Stmt]], kind: ForKind = ForKind.SERIAL, name: str = "i"
) -> Stmt:
    """``for name in range(extent): body(name)``; for an extent of one just the body."""
    if static(extent) == 1:
        return block(body(index(0)))
    variable = tirx.Var(name, "int64")
    return tirx.For(variable, index(0), index(extent), kind, block(body(variable)))


def vector(lanes: int, body: Callable[[Expr], Sequence[Stmt]]) -> Stmt:
    """*body* for all lanes of a vector at once."""
    return loop(lanes, body, ForKind.VECTORIZED, "lane")


def parallel(extent: int | Expr, body: Callable[[Expr], Sequence[Stmt]]) -> Stmt:
    """*body* for each task, on all threads."""
    return loop(extent, body, ForKind.PARALLEL, "task")


def local(lanes: int, dtype: str, name: str) -> Buffer:
    """A buffer that lives in registers: constant indices only."""
    return tirx.decl_buffer((lanes,), dtype, name, scope="local")


def allocate(buffer: Buffer) -> Stmt:
    """Memory for *buffer*: registers, or the stack, where it is :func:`local`."""
    if buffer.scope() != "local":
        return tirx.AllocBuffer(buffer)
    # TVM would take even a few bytes from the heap.
    return tirx.AllocBuffer(buffer, {"disable_lower_builtin": tirx.const(True, "bool")})


def load(buffer: Buffer, indices: Sequence[Expr]) -> Expr:
    """The element of *buffer* at *indices*."""
    return tirx.BufferLoad(buffer, [index(i) for i in indices])


def store(buffer: Buffer, value: Expr, indices: Sequence[Expr]) -> Stmt:
    """``buffer[indices] = value``."""
    return tirx.BufferStore(buffer, value, [index(i) for i in indices])


def bound(value: Expr, name: str, statements: list[Stmt]) -> Expr:
    """*value* as a variable, which *statements* then bind; as it is where it is one, or a number."""
    if isinstance(value, tirx.Var | tirx.IntImm):
        return value
    variable = tirx.Var(name, "int64")
    statements.append(tirx.Bind(variable, index(value)))
    return variable


def flat_view(buffer: Buffer, name: str) -> tuple[Buffer, Stmt]:
    """*buffer* as an array of one dimension, and the statement that declares it."""
    size = index(1)
    for extent in buffer.shape:
        size = size * index(extent)
    view = tirx.decl_buffer((size,), str(buffer.dtype), name, data=tirx.buffer.buffer_data(buffer))
    return view, tirx.DeclBuffer(view, data=tirx.buffer.buffer_data(buffer))


def unravel(flat: Expr, extents: Sequence[Expr]) -> list[Expr]:
    """Indices into a tensor of *extents* of its element number *flat*; the first is not bounded."""
    indices: list[Expr] = []
    for position, extent in reversed(list(enumerate(extents))):
        if position == 0:
            indices.append(flat)
        elif static(extent) == 1:
            indices.append(index(0))
        else:
            indices.append(tirx.FloorMod(flat, index(extent)))
            flat = tirx.FloorDiv(flat, index(extent))
    return indices[::-1]


def product(extents: Sequence[int | Expr]) -> Expr:
    """Product of *extents*, a constant where all of them are."""
    numbers = [static(e) for e in extents]
    constant = 1
    result: Expr = None
    for number, extent in zip(numbers, extents, strict=True):
        if number is not None:
            constant *= number
        else:
            result = index(extent) if result is None else result * index(extent)
    if result is None:
        return index(constant)
    return result if constant == 1 else result * index(constant)


def chunks(count: int, largest: int) -> list[tuple[int, int]]:
    """(start, lanes) of vectors that cover *count* elements below *largest*: powers of two, the widest first."""
    found, start = [], 0
    while start < count:
        lanes = largest
        while lanes > count - start:
            lanes //= 2
        found.append((start, lanes))
        start += lanes
    return found
