"""An index in pieces, in each of which it is known what a concatenation or a padding reads.

    for c in range(64): y[c] = f(if_then_else(32 <= c, b[c - 32], a[c]))
        →   for c in range(32): y[c] = f(a[c])
            for c in range(32): y[c + 32] = f(b[c])

A condition that is not the same for all lanes of a vector would have the statement taken apart into scalar code, and
all that it computes with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tvm import ir, tirx
from tvm.sym import Analyzer, detect_linear_equation

from fxopt.backends._tvm_expressions import depends, rewrite
from fxopt.backends._tvm_loops import Buffer, Expr, index, static
from fxopt.backends._tvm_lowering import Lowering
from fxopt.backends._tvm_stages import Stage

MOST = 64
"""Pieces; code grows with them."""


def pieces(lowering: Lowering, root: Stage, position: int) -> list[tuple[int, int, Stage]]:
    """Start and end of each piece of index *position* of *root*, and *root* as it is there.

    None where that extent is only known when the code runs, where there is no condition on the index, or too many.
    """
    extent, axis = static(root.extents[position]), root.axes[position]
    found = sorted(b for b in _borders(lowering, root, axis) if extent is not None and 0 < b < extent)
    if extent is None or not found or len(found) >= MOST:
        return []
    ends = [*found, extent]
    return [
        (start, end, dataclasses.replace(root, value=_within(lowering, root, axis, start, end)))
        for start, end in zip([0, *found], ends, strict=True)
    ]


def _borders(lowering: Lowering, root: Stage, axis: Expr) -> set[int]:
    """Where conditions on *axis* change, of those that *root* and what is computed in place have."""
    found: set[int] = set()
    analyzer = Analyzer()

    def note(condition: Expr) -> Expr:
        plain = analyzer.simplify(condition)
        if isinstance(plain, tirx.And | tirx.Or):
            note(plain.a)
            note(plain.b)
        elif isinstance(plain, tirx.Not):
            note(plain.a)
        elif isinstance(plain, tirx.LT | tirx.LE | tirx.GT | tirx.GE) and depends(plain, axis):
            found.update(_border(plain, axis))
        return condition

    _inlined(lowering, root, note)
    return found


def _border(condition: Expr, axis: Expr) -> list[int]:
    """The first index for which *condition* is another than before; none where it is not ``axis + c < d``."""
    coefficients = detect_linear_equation(condition.a - condition.b, [axis])
    if len(coefficients) != 2:
        return []
    slope, rest = (static(Analyzer().simplify(c)) for c in coefficients)
    if slope not in (1, -1) or rest is None:
        return []
    # slope·axis + rest compared with 0: it is 0 at axis = −slope·rest
    zero = -slope * rest
    strict = isinstance(condition, tirx.LT | tirx.GT)
    rises = (slope == 1) == isinstance(condition, tirx.GT | tirx.GE)  # from false to true
    return [zero + 1 if strict == rises else zero]


def _within(lowering: Lowering, root: Stage, axis: Expr, start: int, end: int) -> Expr:
    """The value of *root* where its index *axis* is from *start* to *end*."""
    analyzer = Analyzer()
    analyzer.bind(axis, ir.Range(index(start), index(end)))
    return _inlined(lowering, root, analyzer.simplify)


def _inlined(lowering: Lowering, root: Stage, decide: Callable[[Expr], Expr]) -> Expr:
    """The value of *root* from stored tensors alone, with what *decide* leaves of conditions."""

    def on_load(buffer: Buffer, indices: list[Expr]) -> Expr:
        if lowering.is_stored(buffer):
            return tirx.BufferLoad(buffer, indices)
        stage = lowering.producer[buffer]
        return rewrite(stage.value, dict(zip(stage.axes, indices, strict=True)), on_load, decide=decide)

    return rewrite(root.value, {}, on_load, decide=decide)
