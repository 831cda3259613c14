"""Sizes of the kernels (_tvm_kernels): the rule that chooses them without measuring, and what may be chosen instead."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

KERNELS = 1  # what is measured of one version of the kernels says nothing of another: raise it when their loops change
_MOST_ROWS = 14
_MOST_VECTORS = 4
_UNROLLED = (1, 2, 4)
_ORDERS: tuple[Literal["rows", "columns"], ...] = ("rows", "columns")


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of a kernel.

    Attributes:
        lanes: floats of a vector.
        vectors: vectors of a block of columns.
        rows: rows of a tile.
        unrolled: steps of the reduction in one turn of its innermost loop.
        outer: what the outermost loop goes over. With "rows" all weights pass by for each tile of rows; with "columns"
            all rows for each block of columns; with "" the kernel chooses by the size of the weights.
    """

    lanes: int
    vectors: int
    rows: int
    unrolled: int = 1
    outer: Literal["", "rows", "columns"] = ""

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.lanes * self.vectors

    @staticmethod
    def read(said: Any) -> Tile:
        """The tile whose fields are listed in *said*, which may come from anyone.

        Raises:
            ValueError: it is none.
        """
        match said:
            case [int(lanes), int(vectors), int(rows), int(unrolled), "" | "rows" | "columns" as outer]:
                return Tile(lanes, vectors, rows, unrolled, outer)
        raise ValueError(f"{said!r:.80} is no tile")


@dataclasses.dataclass(frozen=True)
class Space:
    """The tiles of one kernel.

    Attributes:
        rows: of the matrix that it computes; None where only a call tells, then they are taken to be many.
        columns: likewise; of one group.
        lanes: floats of a vector.
        registers: vector registers of the machine.
        divides: a block of columns must not reach over the last, since the next group begins there.
        lanewise: each column reads an operand of its own, as in a depthwise convolution.
    """

    rows: int | None
    columns: int
    lanes: int
    registers: int
    divides: bool = False
    lanewise: bool = False

    def rule(self) -> Tile:
        """The tile that should need the least time, without measuring any."""
        if self.lanewise:
            return Tile(self.lanes, 1, min(self.rows or _MOST_ROWS, self.registers // 2 - 2))
        return min(self._sizes(), key=self.cost)

    def tiles(self) -> list[Tile]:
        """All that there are, the most promising first."""
        sizes = sorted(self._sizes(), key=self.cost)
        changes = list(itertools.product(_ORDERS, _UNROLLED))
        return [dataclasses.replace(size, outer=o, unrolled=u) for size in sizes for o, u in changes]

    def _sizes(self) -> Iterator[Tile]:
        for vectors in range(1, min(_MOST_VECTORS, -(-self.columns // self.lanes)) + 1):
            if self.divides and self.columns % (vectors * self.lanes):
                continue
            for rows in range(1, min(_MOST_ROWS, self.rows or _MOST_ROWS) + 1):
                if rows * vectors + vectors <= self.registers:  # accumulators, and the weights of one step
                    yield Tile(self.lanes, vectors, rows)

    def cost(self, tile: Tile) -> float:
        """In multiply-adds of vectors.

        A step of the reduction costs one for each vector of the tile, at least as many as its latency hides, and the
        loads of the weights; partial tiles at the edges cost what they compute.
        """
        whole, rest = divmod(self.columns, tile.columns)
        widths = [tile.vectors] * whole + ([-(-rest // tile.lanes)] if rest else [])
        count = self.rows if self.rows is not None else 16 * tile.rows
        full, left = divmod(count, tile.rows)

        def step(h: int, v: int) -> float:
            return max(h * v, 8, v * 2) + 0.5 * v + 0.05 * h

        total = sum(full * step(tile.rows, v) + (step(left, v) if left else 0) for v in widths)
        return total / (1 if self.rows is not None else count)
