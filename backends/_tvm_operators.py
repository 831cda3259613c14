"""Relax operators as stages: how convolutions, matrix products and norms are written for our kernels.

    conv2d(x[N,H,W,C], w[O,I,KH,KW])   →   pad(x), then Σ_k pad[n, h·s + kh, w·s + k // C, k % C] · packed[...]
    matmul(a[..., M, K], w[K, N])      →   Σ_k a[..., m, k] · packed[...]
    layer_norm(x, γ, β)                →   mean, then variance around it, then (x − mean)/√(var + ε)·γ + β

Constant weights are packed here, once, in the layout that _tvm_kernels describes. What is not listed in
:func:`operators` keeps TVM's own definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx, topi
from tvm.ir import GenericConst

from fxopt.backends import _tvm_kernels
from fxopt.backends._tvm_kernels import Tile
from fxopt.backends._tvm_loops import static
from fxopt.backends._tvm_target import Machine

Legalize = Callable[[Any, Any], Any]
_FUSED_AFTER = 4  # kOutEWiseFusable: what follows elementwise may join


def operators(machine: Machine) -> dict[str, Legalize]:
    """The legalizations that are ours, by the name of the Relax operator."""
    return {
        "relax.nn.conv2d": lambda bb, call: _conv2d(bb, call, machine),
        "relax.nn.conv1d": lambda bb, call: _conv1d(bb, call, machine),
        "relax.matmul": lambda bb, call: _matmul(bb, call, machine),
        "relax.nn.layer_norm": _layer_norm,
    }


def constant(expr: Any) -> np.ndarray[Any, Any] | None:
    """The value of a constant of the graph; None for anything else."""
    held = isinstance(expr, GenericConst) and isinstance(expr.value, tvm.runtime.Tensor)
    return np.from_dlpack(expr.value) if held else None


def pack(weights: np.ndarray[Any, Any], tile: Tile) -> np.ndarray[Any, Any]:
    """*weights* [K, N] as blocks of columns, each of K rows: [block][K][columns], flat; the last block is narrower."""
    depth, columns = weights.shape
    whole = columns // tile.columns * tile.columns
    parts = [weights[:, :whole].reshape(depth, -1, tile.columns).transpose(1, 0, 2).reshape(-1)]
    if whole < columns:
        width = -(-(columns - whole) // tile.lanes) * tile.lanes
        last = np.zeros((depth, width), weights.dtype)
        last[:, : columns - whole] = weights[:, whole:]
        parts.append(last.reshape(-1))
    return np.ascontiguousarray(np.concatenate(parts))


def _packed_at(tile: Tile, columns: int, depth: int) -> Callable[[Any, Any], Any]:
    """Where element (k, n) of packed weights lies, as an expression."""
    whole = columns // tile.columns
    narrow = -(-(columns % tile.columns) // tile.lanes) * tile.lanes

    def at(k: Any, n: Any) -> Any:
        block = tirx.FloorDiv(n, _i(tile.columns))
        if not narrow:
            width: Any = _i(tile.columns)
        elif whole == 0:
            width = _i(narrow)
        else:
            width = tirx.Select(tirx.LT(block, _i(whole)), _i(tile.columns), _i(narrow))
        return block * (tile.columns * depth) + k * width + tirx.FloorMod(n, _i(tile.columns))

    return at


def _i(value: int) -> Any:
    return tirx.IntImm("int64", value)


def _kernel(tile: Tile, *, flat: bool, packed: bool = True, lanewise: bool = False) -> dict[str, Any]:
    sizes = {"lanes": tile.lanes, "vectors": tile.vectors, "rows": tile.rows}
    how = {**sizes, "flat": int(flat), "packed": int(packed), "lanewise": int(lanewise)}
    return {"fxopt.kernel": how}


# Convolutions ---------------------------------------------------------------------------------------------------------


def _conv2d(bb: Any, call: Any, machine: Machine) -> Any:
    attrs, weights = call.attrs, constant(call.args[1])
    floats = str(call.args[0].ty.dtype) == "float32"
    if attrs.data_layout != "NHWC" or attrs.kernel_layout != "OIHW" or weights is None or not floats:
        return _stock(bb, call, "relax.nn.conv2d")
    conv = Conv(
        tuple(int(s) for s in attrs.strides), tuple(int(p) for p in attrs.padding),
        tuple(int(d) for d in attrs.dilation), int(attrs.groups), weights,
    )  # fmt: skip
    if any(static(s) is None for s in list(call.args[0].ty.shape)[1:]):
        return _stock(bb, call, "relax.nn.conv2d")
    return conv.emit(bb, call.args[0], machine)


def _conv1d(bb: Any, call: Any, machine: Machine) -> Any:
    return _stock(bb, call, "relax.nn.conv1d")


def _stock(bb: Any, call: Any, name: str) -> Any:
    """TVM's own definition of an operator."""
    return tvm.ir.Op.get(name).get_attr("FLegalize")(bb, call)


class Conv:
    """A convolution of a tensor [N, H, W, C] with constant weights [O, I, KH, KW]."""

    def __init__(
        self, strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
        weights: np.ndarray[Any, Any],
    ) -> None:  # fmt: skip
        self.strides, self.padding, self.dilation, self.groups = strides, padding, dilation, groups
        self.weights = weights
        self.outputs, self.inputs, self.kh, self.kw = weights.shape

    def emit(self, bb: Any, x: Any, machine: Machine) -> Any:
        """The convolution of *x* as a call of its stages."""
        height, width = (int(s) for s in list(x.ty.shape)[1:3])
        top, left, bottom, right = self.padding
        self.height = (height + top + bottom - self.dilation[0] * (self.kh - 1) - 1) // self.strides[0] + 1
        self.width = (width + left + right - self.dilation[1] * (self.kw - 1) - 1) // self.strides[1] + 1
        name = "depthwise_conv2d" if self.inputs == 1 and self.groups == self.outputs > 1 else "conv2d"
        if name == "depthwise_conv2d":
            tile = Tile(machine.lanes, 1, min(self.width, machine.registers // 2 - 2))
            lanewise = True
        else:
            tile, lanewise = self._tile(machine), False
        flat = self.kh * self.kw == 1 and tuple(self.strides) == (1, 1)
        depth = self.kh * self.kw * self.inputs
        rows = self.weights.transpose(2, 3, 1, 0).reshape(depth, self.outputs)
        at = _packed_at(tile, self.outputs, depth)
        stages = lambda a, w: self._stages(a, w, at, _kernel(tile, flat=flat, lanewise=lanewise))  # noqa: E731
        packed = relax.const(pack(rows, tile))
        return bb.call_te(stages, x, packed, primfunc_name_hint=name, primfunc_attrs={"op_pattern": _FUSED_AFTER})

    def _tile(self, machine: Machine) -> Tile:
        columns, lanes = self.outputs // self.groups, machine.lanes
        flat = self.kh * self.kw == 1 and tuple(self.strides) == (1, 1)
        rows = self.height * self.width if flat else self.width
        if self.groups == 1:
            return _tvm_kernels.choose(rows, columns, lanes, machine.registers)
        while columns % lanes:  # a block of columns must not reach into the next group
            lanes //= 2
        tile = _tvm_kernels.choose(rows, columns, lanes, machine.registers)
        vectors = max(v for v in range(1, tile.vectors + 1) if columns % (v * lanes) == 0)
        return Tile(lanes, vectors, tile.rows)

    def _stages(self, x: Any, packed: Any, at: Callable[[Any, Any], Any], how: dict[str, Any]) -> Any:
        top, left, bottom, right = self.padding
        if any(self.padding):
            x = topi.nn.pad(x, [0, top, left, 0], [0, bottom, right, 0], 0.0, name="padded")
        (sh, sw), (dh, dw) = self.strides, self.dilation
        inputs, outputs = self.inputs, self.outputs // self.groups
        merged = dw == 1 and self.groups == 1  # neighbours in a row of the image are neighbours in memory
        flat = bool(how["fxopt.kernel"]["flat"])
        kernel = [te.reduce_axis((0, _i(self.kh)), "kh")]
        if merged:
            kernel.append(te.reduce_axis((0, _i(self.kw * inputs)), "k"))
        else:
            kernel += [te.reduce_axis((0, _i(self.kw)), "kw"), te.reduce_axis((0, _i(inputs)), "ci")]

        def term(n: Any, h: Any, w: Any, c: Any) -> Any:
            kh = kernel[0].var
            if flat:
                return te.sum(x[n, h, w, kernel[1].var] * packed[at(kernel[1].var, c)], axis=kernel)
            if merged:
                k = kernel[1].var
                kw, ci = (tirx.FloorDiv(k, _i(inputs)), tirx.FloorMod(k, _i(inputs))) if self.kw > 1 else (_i(0), k)
                depth = kh * (self.kw * inputs) + k
            else:
                kw, ci = kernel[1].var, kernel[2].var
                depth = (kh * self.kw + kw) * inputs + ci
            group = tirx.FloorDiv(c, _i(outputs)) * inputs if self.groups > 1 else _i(0)
            value = x[n, h * sh + kh * dh, w * sw + kw * dw, group + ci]
            return te.sum(value * packed[at(depth, c)], axis=kernel)

        shape = (x.shape[0], _i(self.height), _i(self.width), _i(self.outputs))
        return te.compute(shape, term, name="conv", attrs=how)


# Matrix products ------------------------------------------------------------------------------------------------------


def _matmul(bb: Any, call: Any, machine: Machine) -> Any:
    a, b = call.args
    ranks = len(a.ty.shape), len(b.ty.shape)
    columns = static(b.ty.shape[-1])
    if min(ranks) < 2 or str(a.ty.dtype) != "float32" or str(b.ty.dtype) != "float32" or columns is None:
        return _stock(bb, call, "relax.matmul")
    weights = constant(b)
    if weights is not None and weights.ndim == 2:
        return _linear(bb, a, weights, machine)
    tile = _tvm_kernels.choose(static(a.ty.shape[-2]), columns, machine.lanes, machine.registers)
    stages = lambda x, y: _products(x, y, _kernel(tile, flat=False, packed=False))  # noqa: E731
    attrs = {"op_pattern": _FUSED_AFTER}
    return bb.call_te(stages, a, b, primfunc_name_hint="matmul", primfunc_attrs=attrs)


def _linear(bb: Any, a: Any, weights: np.ndarray[Any, Any], machine: Machine) -> Any:
    depth, columns = weights.shape
    counts = [static(s) for s in list(a.ty.shape)[:-1]]
    rows = None if None in counts else int(np.prod([c for c in counts if c is not None]))
    tile = _tvm_kernels.choose(rows, columns, machine.lanes, machine.registers)
    at = _packed_at(tile, columns, depth)

    def stages(x: Any, packed: Any) -> Any:
        k = te.reduce_axis((0, _i(depth)), "k")
        shape = (*x.shape[:-1], _i(columns))
        term = lambda *i: te.sum(x[(*i[:-1], k.var)] * packed[at(k.var, i[-1])], axis=k)  # noqa: E731
        return te.compute(shape, term, name="linear", attrs=_kernel(tile, flat=True))

    packed = relax.const(pack(weights, tile))
    return bb.call_te(stages, a, packed, primfunc_name_hint="linear", primfunc_attrs={"op_pattern": _FUSED_AFTER})


def _products(x: Any, y: Any, how: dict[str, Any]) -> Any:
    """Products of the last two dimensions; those before them broadcast."""
    k = te.reduce_axis((0, x.shape[-1]), "k")
    rank = max(len(x.shape), len(y.shape))
    outer = []
    for d in range(rank - 2, 0, -1):
        sizes = [t.shape[-2 - d] for t in (x, y) if len(t.shape) >= 2 + d]
        outer.append(next((s for s in sizes if static(s) != 1), sizes[0]))

    def part(t: Any, at: Sequence[Any], *inner: Any) -> Any:
        own = at[len(at) - (len(t.shape) - 2) :] if len(t.shape) > 2 else []
        return t[(*(_i(0) if static(s) == 1 else i for s, i in zip(t.shape, own, strict=False)), *inner)]

    def term(*at: Any) -> Any:
        *batch, m, n = at
        return te.sum(part(x, batch, m, k.var) * part(y, batch, k.var, n), axis=k)

    return te.compute((*outer, x.shape[-2], y.shape[-1]), term, name="products", attrs=how)


# Norms ----------------------------------------------------------------------------------------------------------------


def _layer_norm(bb: Any, call: Any) -> Any:
    x, attrs = call.args[0], call.attrs
    rank = len(x.ty.shape)
    axes = sorted(int(a) % rank for a in attrs.axes)
    floats = str(x.ty.dtype) == "float32"
    if axes != list(range(rank - len(axes), rank)) or not (attrs.center and attrs.scale) or not floats:
        return _stock(bb, call, "relax.nn.layer_norm")
    epsilon = float(attrs.epsilon)
    stages = lambda x, g, b: _normalized(x, g, b, rank - len(axes), epsilon)  # noqa: E731
    return bb.call_te(stages, *call.args, primfunc_name_hint="layer_norm", primfunc_attrs={"op_pattern": _FUSED_AFTER})


def _normalized(x: Any, gamma: Any, beta: Any, kept: int, epsilon: float) -> Any:
    outer, inner = x.shape[:kept], x.shape[kept:]
    count = tirx.Cast("float32", _product(inner))

    def axes() -> list[Any]:
        return [te.reduce_axis((0, s), f"k{d}") for d, s in enumerate(inner)]

    first, second = axes(), axes()

    def at(i: Any, ks: list[Any]) -> tuple[Any, ...]:
        return (*i, *(k.var for k in ks))

    total = te.compute(outer, lambda *i: te.sum(x[at(i, first)], axis=first), name="total")
    mean = te.compute(outer, lambda *i: total[i] / count, name="mean")
    squares = te.compute(
        outer,
        lambda *i: te.sum((x[at(i, second)] - mean[i]) * (x[at(i, second)] - mean[i]), axis=second),
        name="squares",
    )
    factor = te.compute(outer, lambda *i: te.rsqrt(squares[i] / count + tirx.const(epsilon, "float32")), name="factor")

    def result(*i: Any) -> Any:
        return (x[i] - mean[i[:kept]]) * factor[i[:kept]] * gamma[i[kept:]] + beta[i[kept:]]

    return te.compute(x.shape, result, name="normalized")


def _product(sizes: Sequence[Any]) -> Any:
    result = sizes[0]
    for size in sizes[1:]:
        result = result * size
    return result
