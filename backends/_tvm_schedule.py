"""Loop nests for fused functions: the schedule rule set.

    kernel (convolution, matrix product)   →  _tvm_kernels, finished elementwise in registers
    reduction over the last index          →  a row a task: vector accumulators, then their lanes
    reduction over others (pooling)        →  vectors along the last index, the reduction inside
    softmax, layer norm                    →  all of their stages for one row, then the next row
    elementwise, pad, transposition        →  vectors along the last index, all others in parallel

A function that is none of these (sorting, scattering) is left as TVM made it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from fxopt.backends import _tvm_reductions
from fxopt.backends._tvm_dot import DotKernel
from fxopt.backends._tvm_expressions import UnknownExpressionError
from fxopt.backends._tvm_kernels import Kernel
from fxopt.backends._tvm_loops import (
    Expr,
    Stmt,
    allocate,
    block,
    bound,
    chunks,
    index,
    loop,
    parallel,
    product,
    static,
    unravel,
    vector,
)
from fxopt.backends._tvm_lowering import Lowering, finish
from fxopt.backends._tvm_pieces import pieces
from fxopt.backends._tvm_reductions import FEW, tasks
from fxopt.backends._tvm_stages import Stage, stages


def schedule(function: Any, lanes: int) -> Any | None:
    """*function* with loops of ours, or None where there is no rule for it.

    Args:
        function: a PrimFunc of stages.
        lanes: floats in a vector of the target.
    """
    found = stages(function)
    if found is None or not all(stage.is_plain for stage in found):
        return None
    try:
        body = _Schedule(Lowering(function, found), lanes).body()
    except UnknownExpressionError:
        return None
    made = tirx.PrimFunc(function.params, body, function.ret_type, function.attrs)
    return made.without_attr("s_tir").with_attr("tirx.is_scheduled", True)


class _Schedule:
    def __init__(self, lowering: Lowering, lanes: int) -> None:
        self.lowering, self.lanes = lowering, lanes

    def body(self) -> Stmt:
        lowering = self.lowering
        lasts = {stage.buffer: lowering.fuse(stage) for stage in lowering.stages if stage.combine is not None}
        finishing = {last.buffer for buffer, last in lasts.items() if not last.buffer.same_as(buffer)}
        jobs = [
            (stage, lasts.get(stage.buffer, stage))
            for stage in lowering.stages
            if stage.combine is not None or (lowering.is_stored(stage.buffer) and stage.buffer not in finishing)
        ]
        shared = self._shared_rows(jobs)
        if shared:
            held, statements = [], self._rows(jobs, shared)
        else:
            held = [last.buffer for _, last in jobs if last.buffer not in lowering.outputs]
            statements = [statement for stage, last in jobs for statement in self._job(stage, last, [])]
        views = [declared for _, declared in lowering.views.values()]
        return block([*map(allocate, held), *views, *statements])

    def _job(self, stage: Stage, last: Stage, prefix: Sequence[Expr]) -> list[Stmt]:
        if stage.kernel:
            kernel = DotKernel if stage.kernel["dot"] else Kernel
            return kernel(self.lowering, stage, last).statements()
        if stage.combine is None:
            return self._elementwise(stage, prefix)
        return _tvm_reductions.emit(self.lowering, stage, last, prefix, self.lanes)

    def _shared_rows(self, jobs: Sequence[tuple[Stage, Stage]]) -> int:
        """How many leading indices all jobs share, if one is a reduction; then they are done row by row."""
        if len(jobs) < 2 or any(stage.kernel for stage, _ in jobs):
            return 0
        if not any(stage.combine is not None for stage, _ in jobs):
            return 0
        inside = {last.buffer for _, last in jobs}
        shared = min(len(stage.axes) for stage, _ in jobs)
        first = jobs[0][0]
        for stage, last in jobs:
            for d in range(shared):
                if static(stage.extents[d]) is None and not stage.extents[d].same_as(first.extents[d]):
                    shared = d
                    break
                if static(stage.extents[d]) != static(first.extents[d]):
                    shared = d
                    break
            roots = [stage] if stage is last else [stage, last]
            for root in roots:
                for buffer, reads in self.lowering.sources(root).items():
                    if buffer in inside:
                        for at in reads:
                            shared = min(shared, _prefix(at, root.axes))
        return shared

    def _rows(self, jobs: Sequence[tuple[Stage, Stage]], shared: int) -> list[Stmt]:
        extents = jobs[0][0].extents[:shared]

        def row(number: Expr) -> list[Stmt]:
            prefix = unravel(number, extents)
            statements: list[Stmt] = []
            for _, last in jobs:
                if last.buffer in self.lowering.outputs:
                    continue
                left = list(last.extents[shared:]) or [index(1)]
                held = tirx.decl_buffer(left, str(last.buffer.dtype), last.name)
                self.lowering.places[last.buffer] = (held, shared)
                statements.append(allocate(held))
            for stage, last in jobs:
                statements += self._job(stage, last, prefix)
            return statements

        rest = max(
            (product([*s.extents[shared:], *s.reduced_extents]) for s, _ in jobs), key=lambda e: static(e) or FEW
        )
        return [tasks(product(extents), rest, row)]

    # Elementwise -----------------------------------------------------------------------------------------------------

    def _elementwise(self, stage: Stage, prefix: Sequence[Expr]) -> list[Stmt]:
        """Vectors along the last index; a short last index is taken together with those before it."""
        extents = list(stage.extents[len(prefix) :])
        inner = 0
        while inner < len(extents) and (inner == 0 or (static(product(extents[-inner:])) or self.lanes) < self.lanes):
            inner += 1
        if not extents:
            return finish(self.lowering, stage, list(prefix), {})
        outer, last = extents[: len(extents) - inner], extents[len(extents) - inner :]

        def row(number: Expr) -> list[Stmt]:
            bindings: list[Stmt] = []
            number = bound(number, "row", bindings)
            at = [*prefix, *(self.lowering.row(number, outer) if outer else [])]

            def along(part: Stage, first: int, extent: Expr) -> list[Stmt]:
                def element(i: Expr) -> list[Stmt]:
                    return finish(self.lowering, part, [*at, *unravel(i + first if first else i, last)], {})

                return self._along(extent, element)

            inside = static(product(last[1:]))
            parts = pieces(self.lowering, stage, -inner) if inside else []
            if not inside or not parts:
                return [*bindings, *along(stage, 0, product(last))]
            each = [(part, start * inside, index((end - start) * inside)) for start, end, part in parts]
            return [*bindings, *(s for part in each for s in along(*part))]

        if prefix:
            return [loop(product(outer), row)]
        if not outer:
            return self._flat(stage, extents)
        return [tasks(product(outer), product(last), row)]

    def _flat(self, stage: Stage, extents: Sequence[Expr]) -> list[Stmt]:
        """A single long row, in pieces."""
        total, piece = product(extents), 4096
        count = static(total)
        if count is None or count % piece or count <= FEW:
            return self._along(total, lambda i: finish(self.lowering, stage, unravel(i, extents), {}))

        def part(number: Expr) -> list[Stmt]:
            first = number * piece
            store_at = lambda i: finish(self.lowering, stage, unravel(first + i, extents), {})  # noqa: E731
            return self._along(index(piece), store_at)

        return [parallel(index(count // piece), part)]

    def _along(self, extent: Expr, body: Callable[[Expr], list[Stmt]]) -> list[Stmt]:
        """*body* for each index below *extent*, in vectors, and one by one for what is left."""
        lanes, count = self.lanes, static(extent)
        full = index(count // lanes) if count is not None else tirx.FloorDiv(extent, index(lanes))
        statements: list[Stmt] = []
        if static(full) != 0:
            statements.append(loop(full, lambda n: [vector(lanes, lambda v: body(n * lanes + v))], name="n"))
        if count is None:
            done = full * lanes
            statements.append(loop(extent - done, lambda n: body(done + n), name="n"))
        else:
            done = count - count % lanes
            for offset, width in chunks(count % lanes, lanes):
                statements.append(vector(width, functools.partial(_after, body, done + offset)))
        return statements


def _after(body: Callable[[Expr], list[Stmt]], start: int, lane: Expr) -> list[Stmt]:
    return body(index(start) + lane)


def _prefix(indices: Sequence[Expr], axes: Sequence[Expr]) -> int:
    """How many leading *indices* are just *axes*."""
    count = 0
    for i, axis in zip(indices, axes, strict=False):
        if not i.same_as(axis):
            break
        count += 1
    return count
