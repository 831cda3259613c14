"""The one kernel: a register tile of rows × columns that a loop over the reduction adds products to.

    for each block of columns, for each tile of rows:
        acc[rows][columns] = 0                                     registers
        for k: for row: for vector: acc[row][vector] += A(row, k) · W[block][k][vector]
        out[row][column] = epilogue(acc[row][column])

Convolutions (channels last), grouped and depthwise ones, and matrix products differ in the function A(row, k) alone,
which is the stage's own load. Constant weights lie packed: for each block of columns K rows of as many floats, the last
block as narrow as it is, rounded up to vectors. LLVM turns the product into fused multiply-adds with a broadcast.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.tirx import ForKind

from fxopt.backends._tvm_expressions import depends, loads, zero
from fxopt.backends._tvm_loops import (
    Buffer,
    Expr,
    Stmt,
    allocate,
    block,
    bound,
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
from fxopt.backends._tvm_tiles import Tile

_SMALL_WEIGHTS = 1 << 18  # bytes; up to here they stay in the second-level cache while all rows pass by


class Kernel:
    """One kernel in one function.

    Attributes:
        lowering: of the function.
        stage: what it computes: a sum of products, annotated with how.
        last: what it stores, which finishes *stage* elementwise or is *stage* itself.
        tile: sizes.
        left: operand that rows read.
        right: operand that columns read.
    """

    def __init__(self, lowering: Lowering, stage: Stage, last: Stage) -> None:
        self.lowering, self.stage, self.last = lowering, stage, last
        how = stage.kernel
        self.tile = Tile.read([int(how[n]) for n in ("lanes", "vectors", "rows", "unrolled")] + [str(how["outer"])])
        self.packed, self.lanewise = bool(how["packed"]), bool(how["lanewise"])
        self.dtype = str(stage.buffer.dtype)
        *outer, row = stage.extents[:-1]
        self.outer, self.rows = ([], product([*outer, row])) if how["flat"] else (list(outer), index(row))
        self.columns = stage.extents[-1]
        self.left, self.right = (stage.value.a, stage.value.b)

    def statements(self) -> list[Stmt]:
        """The loops over tiles, in parallel."""
        tiles, full_tiles, left_rows = _split(self.rows, self.tile.rows)
        blocks, full_blocks, left_columns = _split(self.columns, self.tile.columns)
        outer = product(self.outer)
        by_rows = self._by_rows()
        sizes = [outer, tiles, blocks] if by_rows else [blocks, outer, tiles]

        def task(number: Expr) -> list[Stmt]:
            bindings: list[Stmt] = []
            at = [bound(value, name, bindings) for value, name in zip(unravel(number, sizes), "otb", strict=True)]
            o, t, b = at if by_rows else (at[1], at[2], at[0])
            outer_at = unravel(o, self.outer) if self.outer else []
            outer_at = [bound(value, "o", bindings) for value in outer_at]

            def some(first: Expr, rows: int) -> Stmt:
                return _cases(
                    b, self.tile.columns, full_blocks, left_columns,
                    lambda start, columns: block(self._compute(outer_at, first, rows, start, columns)),
                )  # fmt: skip

            return [*bindings, _cases(t, self.tile.rows, full_tiles, left_rows, some)]

        return [parallel(product(sizes), task)]

    def _by_rows(self) -> bool:
        """Whether all weights pass by for each tile of rows."""
        if self.tile.outer:
            return self.tile.outer == "rows"
        size = static(product([*self.stage.reduced_extents, self.columns]))
        return size is not None and 4 * size <= _SMALL_WEIGHTS

    def _compute(self, outer: Sequence[Expr], first: Expr, rows: int, start: Expr, columns: int) -> list[Stmt]:
        """One tile: *rows* rows from *first*, and *columns* columns from *start*."""
        pieces = self._pieces(columns)
        acc = [[local(lanes, self.dtype, f"acc_{r}_{j}") for j, (_, lanes) in enumerate(pieces)] for r in range(rows)]
        statements: list[Stmt] = [allocate(a) for row in acc for a in row]
        first, start = bound(first, "row", statements), bound(start, "column", statements)
        at = [self._indices(outer, first, r) for r in range(rows)]
        for row in acc:
            for a, (_, lanes) in zip(row, pieces, strict=True):
                statements.append(vector(lanes, functools.partial(self._clear, a)))
        statements += self._reduce(lambda k: self._step(acc, at, start, pieces, k))
        for r in range(rows):
            for a, (offset, lanes) in zip(acc[r], pieces, strict=True):
                statements += self._finish(a, [*at[r], start + offset], min(lanes, columns - offset))
        return statements

    def _clear(self, a: Buffer, lane: Expr) -> list[Stmt]:
        return [store(a, zero(self.dtype), [lane])]

    def _pieces(self, columns: int) -> list[tuple[int, int]]:
        """Offset and lanes of the vectors of *columns* columns. Packed weights have zeros to fill up the last one."""
        if not self.packed or self.lanewise:
            return chunks(columns, self.tile.lanes)
        return [(offset, self.tile.lanes) for offset in range(0, columns, self.tile.lanes)]

    def _indices(self, outer: Sequence[Expr], first: Expr, r: int) -> list[Expr]:
        """All indices of the stage but the column, for row *first* + *r*."""
        row = first + r if r else first
        return self.lowering.row(row, self.stage.extents[:-1]) if self.stage.kernel["flat"] else [*outer, row]

    def _reduce(self, step: Callable[[Sequence[Expr]], list[Stmt]]) -> list[Stmt]:
        """Loops over the reduced axes around *step*; short ones of lanewise kernels are unrolled."""
        return self._nest(self.stage.reduced_extents, [], step)

    def _nest(
        self, left: Sequence[Expr], at: list[Expr], step: Callable[[Sequence[Expr]], list[Stmt]]
    ) -> list[Stmt]:  # fmt: skip
        if not left:
            return step(at)
        if self.lanewise:
            return [loop(left[0], lambda k: self._nest(left[1:], [*at, k], step), ForKind.UNROLLED, "k")]
        if len(left) > 1:
            return [loop(left[0], lambda k: self._nest(left[1:], [*at, k], step), name="k")]
        return self._turns(left[0], lambda k: step([*at, k]))

    def _turns(self, extent: Expr, step: Callable[[Expr], list[Stmt]]) -> list[Stmt]:
        """The innermost loop, with as many steps in a turn as the tile says, and what is left of them."""
        at_once, count = self.tile.unrolled, static(extent)
        if at_once == 1 or count is None or count < at_once:
            return [loop(extent, step, name="k")]

        def turn(k: Expr) -> list[Stmt]:
            return [statement for i in range(at_once) for statement in step(k * at_once + i)]

        done = count - count % at_once
        rest = [statement for i in range(done, count) for statement in step(index(i))]
        return [loop(index(count // at_once), turn, name="k"), *rest]

    def _step(
        self, acc: Sequence[Sequence[Buffer]], at: Sequence[Sequence[Expr]], start: Expr,
        pieces: Sequence[tuple[int, int]], k: Sequence[Expr],
    ) -> list[Stmt]:  # fmt: skip
        """One step of the reduction for all accumulators: each operand is read once."""
        width = -(-(pieces[-1][0] + pieces[-1][1]) // self.tile.lanes) * self.tile.lanes
        statements: list[Stmt] = []
        for lanes, same in itertools.groupby(range(len(pieces)), lambda j: pieces[j][1]):
            of_width = list(same)

            def add(lane: Expr, of_width: list[int] = of_width) -> list[Stmt]:
                made: list[Stmt] = []
                right = {j: tirx.Var(f"w_{j}", str(self.right.ty.dtype)) for j in of_width}
                for j, w in right.items():
                    made.append(tirx.Bind(w, self._right(at[0], start, pieces[j][0] + lane, width, k)))
                for r, row in enumerate(acc):
                    x = tirx.Var(f"x_{r}", str(self.left.ty.dtype))
                    if not self.lanewise:
                        made.append(tirx.Bind(x, self._operand(self.left, [*at[r], start], k)))
                    for j, w in right.items():
                        if self.lanewise:
                            x = self._operand(self.left, [*at[r], start + pieces[j][0] + lane], k)
                        made.append(store(row[j], load(row[j], [lane]) + x * w, [lane]))
                return made

            statements.append(vector(lanes, add))
        return statements

    def _right(self, at: Sequence[Expr], start: Expr, column: Expr, width: int, k: Sequence[Expr]) -> Expr:
        """The right operand for *column* of the block that starts at *start*."""
        if self.packed:
            return self._weight(start, width, column, k)
        return self._operand(self.right, [*at, start + column], k)

    def _operand(self, term: Expr, at: Sequence[Expr], k: Sequence[Expr]) -> Expr:
        variables = dict(zip([*self.stage.axes, *self.stage.reduced], [*at, *k], strict=True))
        return Point(self.lowering).value(term, variables)

    def _weight(self, start: Expr, width: int, column: Expr, k: Sequence[Expr]) -> Expr:
        """From the packed weights: blocks of K rows, each row *width* floats."""
        depth = product(self.stage.reduced_extents)
        flat = index(0)
        for extent, i in zip(self.stage.reduced_extents, k, strict=True):
            flat = flat * index(extent) + i
        weight = load(loads(self.right)[0][0], [start * depth + flat * width + column])
        return tirx.Cast(str(self.right.ty.dtype), weight) if isinstance(self.right, tirx.Cast) else weight

    def _finish(self, a: Buffer, at: Sequence[Expr], valid: int) -> list[Stmt]:
        """Store the first *valid* lanes of accumulator *a*, whose first is element *at*."""
        statements: list[Stmt] = []
        for offset, lanes in chunks(valid, self.tile.lanes):

            def body(lane: Expr, offset: int = offset) -> list[Stmt]:
                lane = lane + offset if offset else lane
                hooks = {self.stage.buffer: lambda _: load(a, [lane])}
                return finish(self.lowering, self.last, [*at[:-1], at[-1] + lane], hooks)

            statements.append(vector(lanes, body))
        return statements


def _split(extent: Expr, size: int) -> tuple[Expr, Expr, int | None]:
    """How many parts of *size* there are, how many of them are full, and the size of the last.

    That is None where it is known at run time: then what is left is taken one by one.
    """
    number = static(extent)
    if number is not None:
        return index(-(-number // size)), index(number // size), number % size
    full = tirx.FloorDiv(index(extent), index(size))
    if size == 1 or _is_multiple(extent, size):
        return full, full, 0
    return full + tirx.FloorMod(index(extent), index(size)), full, None


def _cases(part: Expr, size: int, full: Expr, left: int | None, body: Callable[[Expr, int], Stmt]) -> Stmt:
    """*body* of the start and size of part number *part*, as :func:`_split` counts them."""
    if left == 0:
        return body(part * size, size)
    rest = body(full * size + (part - full), 1) if left is None else body(full * size, left)
    if static(full) == 0:
        return rest
    return tirx.IfThenElse(tirx.LT(part, full), body(part * size, size), rest)


def _is_multiple(size: Expr, factor: int) -> bool:
    """Whether *size*, a product, has a constant factor that *factor* divides."""
    if isinstance(size, tirx.Mul):
        return _is_multiple(size.a, factor) or _is_multiple(size.b, factor)
    number = static(size)
    return number is not None and number % factor == 0


def reads_columns(stage: Stage) -> bool:
    """Whether the left operand of *stage* depends on its column, as in a depthwise convolution."""
    return depends(stage.value.a, stage.axes[-1])
