"""Convolutions as stages: x[N, H, W, C] and constant weights [O, I, KH, KW].

    pad(x), then Σ_k pad[n, h·s + kh, w·s + k // C, k % C] · packed[...]

Neighbours in a row of the image are neighbours in memory, so a row of the filter is one run over all of its channels.
Bytes (u8 · s8) are summed four at a time where the machine has an instruction for that; a run of another length is
filled up with zeros in the weights, and the image with columns behind which it may be read.
Depthwise convolutions of bytes are computed in float32, exactly: their sums are integers below 2²⁴.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, te, tirx, topi

from fxopt.backends._tvm_loops import static
from fxopt.backends._tvm_packing import GROUP, annotation, number, pack, pack_bytes, packed_at
from fxopt.backends._tvm_target import Machine
from fxopt.backends._tvm_tiles import Space
from fxopt.backends._tvm_workloads import Tiles, Workload

FUSED_AFTER = 4  # kOutEWiseFusable: what follows elementwise may join
_EXACT = 2**24 // (255 * 127)  # products of bytes whose sum float32 holds exactly


class Conv:
    """One convolution, for one machine."""

    def __init__(
        self, x: Any, weights: np.ndarray[Any, Any], strides: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], groups: int, machine: Machine, tiles: Tiles,
    ) -> None:  # fmt: skip
        self.x, self.weights, self.machine = x, weights, machine
        self.strides, self.padding, self.dilation, self.groups = strides, list(padding), dilation, groups
        self.workload = self._workload()
        self.outputs, self.inputs, self.kh, self.kw = weights.shape
        height, width = (int(s) for s in list(x.ty.shape)[1:3])
        top, left, bottom, right = self.padding
        self.height = (height + top + bottom - dilation[0] * (self.kh - 1) - 1) // strides[0] + 1
        self.width = (width + left + right - dilation[1] * (self.kw - 1) - 1) // strides[1] + 1
        self.bytes = weights.dtype == np.int8
        self.lanewise = self.inputs == 1 and groups == self.outputs > 1
        if self.lanewise and self.bytes and self.kh * self.kw > _EXACT:
            self.lanewise = False
        self.merged = dilation[1] == 1 and groups == 1
        self.run = self.kw * self.inputs if self.merged else self.inputs
        can = not self.lanewise and (groups == 1 or self.inputs % GROUP == 0)
        self.dot = machine.dot if self.bytes and can else ""
        self.flat = self.kh * self.kw == 1 and tuple(strides) == (1, 1) and not any(padding)
        if self.dot and self.run % GROUP:
            self.flat = False
            self.padding[3] += -(-(GROUP - 1) // int(x.ty.shape[3]))
        self.tile = tiles.of(self.workload, self._space())

    def emit(self, bb: Any) -> Any:
        """The convolution as a call of its stages; int32 for bytes."""
        name = "depthwise_conv2d" if self.lanewise else "conv2d"
        operands = [self.x, relax.const(self._packed())]
        if self.dot == "sdot":  # computes with x − 128
            sums = self.weights.astype(np.int64).sum((1, 2, 3)) * 128
            operands.append(relax.const(sums.astype(np.int32), "int32"))
        attrs = {"op_pattern": FUSED_AFTER}
        return bb.call_te(self._stages, *operands, primfunc_name_hint=name, primfunc_attrs=attrs)

    def _workload(self) -> Workload:
        sizes = {
            "x": tuple(static(size) for size in self.x.ty.shape),
            "weights": self.weights.shape,
            "strides": tuple(self.strides),
            "padding": tuple(self.padding),
            "dilation": tuple(self.dilation),
            "groups": (self.groups,),
        }
        return Workload("conv2d", str(self.weights.dtype), tuple(sizes.items()))

    def _space(self) -> Space:
        lanes, registers = self.machine.lanes, self.machine.registers
        if self.lanewise:
            return Space(self.width, self.outputs, lanes, registers, lanewise=True)
        columns = self.outputs // self.groups
        rows = self.height * self.width if self.flat else self.width
        if self.groups == 1:
            return Space(rows, columns, lanes, registers)
        while columns % lanes:
            lanes //= 2
        if lanes < 4:  # no machine has dot products of fewer lanes
            self.dot = ""
        return Space(rows, columns, lanes, registers, divides=True)

    def _packed(self) -> np.ndarray[Any, Any]:
        rows = self.weights.transpose(2, 3, 1, 0)  # [KH, KW, I, O]
        if self.dot:
            return pack_bytes(rows.reshape(-1, self.run, self.outputs), self.tile)
        rows = rows.reshape(-1, self.outputs)
        return pack(rows.astype(np.float32) if self.bytes and self.lanewise else rows, self.tile)

    def _stages(self, x: Any, packed: Any, *correction: Any) -> Any:
        if any(self.padding):
            top, left, bottom, right = self.padding
            x = topi.nn.pad(x, [0, top, left, 0], [0, bottom, right, 0], tirx.const(0, str(x.dtype)), name="padded")
        kernel = [te.reduce_axis((0, number(self.kh)), "kh")]
        if self.merged:
            kernel.append(te.reduce_axis((0, number(self.run)), "k"))
        else:
            kernel += [te.reduce_axis((0, number(self.kw)), "kw"), te.reduce_axis((0, number(self.run)), "ci")]
        group = GROUP if self.dot else 1
        run = -(-self.run // group) * group
        depth = self.kh * run if self.merged else self.kh * self.kw * run
        at = packed_at(self.tile, self.outputs, depth, group)
        computed = "float32" if not self.bytes or self.lanewise else "int32"

        def term(n: Any, h: Any, w: Any, c: Any) -> Any:
            place, k = self._source(h, w, c, [axis.var for axis in kernel], run)
            left, right = x[(n, *place)], packed[at(k, c)]
            if self.bytes:
                left = left.astype(computed)
                right = right if str(packed.dtype) == computed else right.astype(computed)
            return te.sum(left * right, axis=kernel)

        shape = (x.shape[0], number(self.height), number(self.width), number(self.outputs))
        how = annotation(self.tile, flat=self.flat, lanewise=self.lanewise, dot=self.dot)
        total = te.compute(shape, term, name="conv", attrs=how)
        if correction:
            total = te.compute(shape, lambda n, h, w, c: total[n, h, w, c] + correction[0][c], name="corrected")
        if self.bytes and self.lanewise:
            return te.compute(shape, lambda *i: total[i].astype("int32"), name="integers")
        return total

    def _source(self, h: Any, w: Any, c: Any, k: Sequence[Any], run: int) -> tuple[Sequence[Any], Any]:
        """Indices of the image, and of the row of the weights, at the point *k* of the filter."""
        (sh, sw), (dh, dw), inputs = self.strides, self.dilation, self.inputs
        if self.flat:
            return (h, w, k[1] if self.merged else k[2]), k[-1]
        if self.merged:
            kw, ci = (number(0), k[1])
            if self.kw > 1:
                kw, ci = tirx.FloorDiv(k[1], number(inputs)), tirx.FloorMod(k[1], number(inputs))
            row = k[0] * run + k[1]
        else:
            kw, ci = k[1], k[2]
            row = (k[0] * self.kw + k[1]) * run + k[2]
        if self.groups > 1:
            ci = tirx.FloorDiv(c, number(self.outputs // self.groups)) * inputs + ci
        return (h * sh + k[0] * dh, w * sw + kw * dw, ci), row
