"""The integer kernel: four products of bytes in each lane of an accumulator, by the dot product of the machine.

    acc[row][lane] += Σ_{i<4} x[row, 4k + i] · w[4k + i, lane]          x: u8, four at once in every lane; w: s8

Weights lie packed as in _tvm_kernels, with the four bytes of a lane side by side: [block][K/4][columns][4]. x86 has
``vpdpbusd`` (VNNI) for that; before it ``vpmaddubsw`` and ``vpmaddwd``, which is right for weights of seven bits only.
ARM's ``sdot`` multiplies signed bytes: 128 is subtracted there, and Σ 128·w added again to the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from fxopt.backends._tvm_expressions import loads
from fxopt.backends._tvm_kernels import Kernel
from fxopt.backends._tvm_loops import Buffer, Expr, Stmt, index, product, static
from fxopt.backends._tvm_lowering import Point
from fxopt.backends._tvm_packing import GROUP


class DotKernel(Kernel):
    """A kernel of u8 rows and packed s8 columns with sums of int32."""

    def _reduce(self, step: Any) -> list[Stmt]:
        *outer, run = self.stage.reduced_extents
        groups = -(-(static(run) or 0) // GROUP)
        return self._nest([*outer, index(groups)], [], step)

    def _step(
        self, acc: Sequence[Sequence[Buffer]], at: Sequence[Sequence[Expr]], start: Expr,
        pieces: Sequence[tuple[int, int]], k: Sequence[Expr],
    ) -> list[Stmt]:  # fmt: skip
        lanes, width = self.tile.lanes, len(pieces) * self.tile.lanes
        *outer, run = self.stage.reduced_extents
        groups = -(-(static(run) or 0) // GROUP)
        depth = product([*outer, index(groups)])
        flat = index(0)
        for extent, i in zip([*outer, index(groups)], k, strict=True):
            flat = flat * index(extent) + i
        statements: list[Stmt] = []
        columns = []
        for j, (offset, _) in enumerate(pieces):
            columns.append(tirx.Var(f"w_{j}", f"int8x{lanes * GROUP}"))
            first = (start * depth + flat * width + offset) * GROUP
            bytes_ = tirx.BufferLoad(self.weights, [tirx.Ramp(first, index(1), lanes * GROUP)])
            statements.append(tirx.Bind(columns[j], bytes_))
        every = tirx.Ramp(index(0), index(1), lanes)
        for r, row in enumerate(acc):
            x = tirx.Var(f"x_{r}", "int32")
            statements.append(tirx.Bind(x, self._four(at[r], start, k)))
            for a, w in zip(row, columns, strict=True):
                total = _multiply_add(str(self.stage.kernel["dot"]), lanes, tirx.BufferLoad(a, [every]), x, w)
                statements.append(tirx.BufferStore(a, total, [every]))
        return statements

    @property
    def weights(self) -> Buffer:
        """The packed bytes."""
        return loads(self.right)[0][0]

    def _four(self, at: Sequence[Expr], start: Expr, k: Sequence[Expr]) -> Expr:
        """Four bytes of a row as one number."""
        *outer, group = k
        variables = dict(zip([*self.stage.axes, *self.stage.reduced], [*at, start, *outer, index(0)], strict=True))
        [(buffer, indices)] = loads(self.left)
        point = Point(self.lowering)
        view, first = self.lowering.flat_at(buffer, [point.value(i, variables) for i in indices])
        bytes_ = tirx.BufferLoad(view, [tirx.Ramp(first + group * GROUP, index(1), GROUP)])
        four = tirx.reinterpret("int32", bytes_)
        if self.stage.kernel["dot"] == "sdot":
            four = tirx.BitwiseXor(four, tirx.IntImm("int32", -0x7F7F7F80))  # 0x80 in each byte: u8 − 128 as s8
        return four


def _multiply_add(instruction: str, lanes: int, acc: Expr, x: Expr, w: Expr) -> Expr:
    """*acc* with the dot products of the bytes of *x* and *w* added."""
    count = lanes * GROUP
    bytes_ = tirx.reinterpret(f"int8x{count}", tirx.Broadcast(x, lanes))
    of = f"int32x{lanes}"
    if instruction == "vnni":
        return tirx.call_llvm_pure_intrin(of, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", acc, bytes_, w)
    if instruction == "sdot":
        return tirx.call_llvm_pure_intrin(of, "llvm.aarch64.neon.sdot", acc, bytes_, w)
    pairs, quads = _PAIRS[lanes]
    products = tirx.call_llvm_pure_intrin(f"int16x{count // 2}", pairs, bytes_, w)
    ones = tirx.Broadcast(tirx.IntImm("int16", 1), count // 2)
    return tirx.Add(acc, tirx.call_llvm_pure_intrin(of, quads, products, ones))


_PAIRS = {
    16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    4: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
}
