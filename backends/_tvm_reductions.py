"""Reductions: sums, maxima and minima over some indices.

over the last index    for each row: acc[lanes] ⊕= x[row, k·lanes ...], then the lanes
over other indices     for each vector of the last index: acc[lanes] ⊕= x[..., k, ..., lanes]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx import ForKind

from fxopt.backends._tvm_expressions import depends, loads
from fxopt.backends._tvm_functions import extreme
from fxopt.backends._tvm_loops import (
    Expr,
    Stmt,
    allocate,
    block,
    chunks,
    index,
    load,
    local,
    loop,
    parallel,
    product,
    static,
    store,
    unravel,
    vector,
)
from fxopt.backends._tvm_lowering import Lowering, Point, finish
from fxopt.backends._tvm_stages import Stage

FEW = 1 << 14  # element operations; fewer are done by one thread


def tasks(count: Expr, work: Expr, body: Callable[[Expr], Sequence[Stmt]]) -> Stmt:
    """*body* for each of *count* tasks of *work* operations, in parallel where that pays."""
    total = static(product([count, work]))
    return loop(count, body) if total is not None and total <= FEW else parallel(count, body)


def emit(lowering: Lowering, stage: Stage, last: Stage, prefix: Sequence[Expr], lanes: int) -> list[Stmt]:
    """Statements that compute *stage* for the leading indices *prefix*, and store *last*, which finishes it."""
    return _Reduction(lowering, stage, last, lanes).statements(prefix)


class _Reduction:
    def __init__(self, lowering: Lowering, stage: Stage, last: Stage, lanes: int) -> None:
        self.lowering, self.stage, self.last, self.lanes = lowering, stage, last, lanes

    def statements(self, prefix: Sequence[Expr]) -> list[Stmt]:
        stage = self.stage
        extents = list(stage.extents[len(prefix) :])
        along_last = not extents or _reduces_last_index(stage)
        outer = extents if along_last else extents[:-1]

        def row(number: Expr) -> list[Stmt]:
            at = [*prefix, *(unravel(number, outer) if outer else [])]
            return self._lanes_reduced(at) if along_last else self._columns_reduced(at)

        if prefix:
            return [loop(product(outer), row)] if outer else row(index(0))
        if not outer:
            return row(index(0))
        return [tasks(product(outer), product([*stage.reduced_extents, *extents[len(outer) :]]), row)]

    def _term(self, at: Sequence[Expr], k: Sequence[Expr]) -> tuple[list[Stmt], Expr]:
        stage, point = self.stage, Point(self.lowering)
        value = point.value(stage.value, dict(zip([*stage.axes, *stage.reduced], [*at, *k], strict=True)))
        return point.statements, value

    def _combined(self, a: Expr, b: Expr) -> Expr:
        combine = self.stage.combine
        return combine(a, b) if combine is tirx.Add else extreme(combine, a, b)

    def _columns_reduced(self, at: Sequence[Expr]) -> list[Stmt]:
        """Vectors of results, each lane with a reduction of its own."""
        stage, last, dtype = self.stage, self.last, str(self.stage.buffer.dtype)

        def columns(lanes: int, first: Expr) -> list[Stmt]:
            acc = local(lanes, dtype, "acc")

            def add(k: Sequence[Expr], lane: Expr) -> list[Stmt]:
                bound, value = self._term([*at, first + lane], k)
                return [*bound, store(acc, self._combined(load(acc, [lane]), value), [lane])]

            def done(lane: Expr) -> list[Stmt]:
                hooks = {stage.buffer: lambda _: load(acc, [lane])}
                return finish(self.lowering, last, [*at, first + lane], hooks)

            return [
                allocate(acc),
                vector(lanes, lambda v: [store(acc, stage.init, [v])]),
                *_nest(stage.reduced_extents, lambda k: [vector(lanes, lambda v: add(k, v))]),
                vector(lanes, done),
            ]

        extent, lanes = stage.extents[-1], self.lanes
        count = static(extent)
        full = index(count // lanes) if count is not None else tirx.FloorDiv(index(extent), index(lanes))
        statements = [loop(full, lambda n: columns(lanes, n * lanes), name="n")] if static(full) != 0 else []
        if count is None:
            statements.append(loop(index(extent) - full * lanes, lambda n: columns(1, full * lanes + n), name="n"))
        else:
            done = count - count % lanes
            for offset, width in chunks(count % lanes, lanes):
                statements.append(block(columns(width, index(done + offset))))
        return statements

    def _lanes_reduced(self, at: Sequence[Expr]) -> list[Stmt]:
        """One result: its terms in the lanes of a vector, which are combined in the end."""
        stage, lanes, dtype = self.stage, self.lanes, str(self.stage.buffer.dtype)
        acc, result = local(lanes, dtype, "acc"), local(1, dtype, "result")
        extent = stage.reduced_extents[-1]
        full, rest = _divide(extent, lanes)

        def add(into: Any, slot: Expr, k: Sequence[Expr]) -> list[Stmt]:
            bound, value = self._term(at, k)
            return [*bound, store(into, self._combined(load(into, [slot]), value), [slot])]

        def inner(k: Sequence[Expr]) -> list[Stmt]:
            body = lambda n: [vector(lanes, lambda v: add(acc, v, [*k, n * lanes + v]))]  # noqa: E731
            statements = [loop(full, body, name="n")] if static(full) != 0 else []
            if static(rest) != 0:
                statements.append(loop(rest, lambda n: add(result, index(0), [*k, full * lanes + n]), name="n"))
            return statements

        def combined(v: Expr) -> Expr:
            return self._combined(load(result, [index(0)]), load(acc, [v]))

        hooks = {stage.buffer: lambda _: load(result, [index(0)])}
        return [
            allocate(acc),
            allocate(result),
            store(result, stage.init, [index(0)]),
            vector(lanes, lambda v: [store(acc, stage.init, [v])]),
            *_nest(stage.reduced_extents[:-1], inner),
            loop(lanes, lambda v: [store(result, combined(v), [index(0)])], ForKind.UNROLLED, "lane"),
            *finish(self.lowering, self.last, list(at), hooks),
        ]


def _nest(extents: Sequence[Expr], body: Callable[[Sequence[Expr]], list[Stmt]]) -> list[Stmt]:
    """*body* inside loops over *extents*."""

    def inside(left: Sequence[Expr], at: list[Expr]) -> list[Stmt]:
        return [loop(left[0], lambda k: inside(left[1:], [*at, k]), name="k")] if left else body(at)

    return inside(extents, [])


def _divide(extent: Expr, size: int) -> tuple[Expr, Expr]:
    """How often *size* goes into *extent*, and what is left."""
    number = static(extent)
    if number is not None:
        return index(number // size), index(number % size)
    full = tirx.FloorDiv(index(extent), index(size))
    return full, index(extent) - full * size


def _reduces_last_index(stage: Stage) -> bool:
    """Whether the terms of a result lie side by side in memory, and results do not."""
    inner, column = stage.reduced[-1], stage.axes[-1]
    for _, indices in loads(stage.value):
        if indices and depends(indices[-1], inner) and not depends(indices[-1], column):
            return True
    return False
