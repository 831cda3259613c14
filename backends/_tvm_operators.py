"""Relax operators as stages: how convolutions, matrix products and norms are written for our kernels.

    conv2d(x[N,H,W,C], w[O,I,KH,KW])   →   see _tvm_conv
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
from tvm import relax, te, tirx

from fxopt.backends._tvm_conv import FUSED_AFTER, Conv
from fxopt.backends._tvm_loops import static
from fxopt.backends._tvm_packing import GROUP, annotation, constant, number, pack, pack_bytes, packed_at
from fxopt.backends._tvm_target import Machine
from fxopt.backends._tvm_tiles import Space
from fxopt.backends._tvm_workloads import Tiles, Workload

Legalize = Callable[[Any, Any], Any]
_OPERANDS = {("float32", "float32"), ("uint8", "int8")}  # what the kernels multiply


def operators(machine: Machine, tiles: Tiles) -> dict[str, Legalize]:
    """The legalizations that are ours, by the name of the Relax operator."""
    return {
        "relax.nn.conv2d": lambda bb, call: _conv2d(bb, call, machine, tiles),
        "relax.matmul": lambda bb, call: _matmul(bb, call, machine, tiles),
        "relax.nn.layer_norm": _layer_norm,
        "relax.argmax": lambda bb, call: _place(bb, call, te.max),
        "relax.argmin": lambda bb, call: _place(bb, call, te.min),
    }


def _stock(bb: Any, call: Any) -> Any:
    """TVM's own definition of an operator."""
    return tvm.ir.Op.get(call.op.name).get_attr("FLegalize")(bb, call)


def _operands(call: Any) -> tuple[str, str]:
    return str(call.args[0].ty.dtype), str(call.args[1].ty.dtype)


def _conv2d(bb: Any, call: Any, machine: Machine, tiles: Tiles) -> Any:
    attrs, weights = call.attrs, constant(call.args[1])
    layouts = attrs.data_layout, attrs.kernel_layout
    sizes = list(call.args[0].ty.shape)[1:]
    if layouts != ("NHWC", "OIHW") or weights is None or _operands(call) not in _OPERANDS or None in map(static, sizes):
        return _stock(bb, call)
    strides, padding, dilation = ([int(i) for i in part] for part in (attrs.strides, attrs.padding, attrs.dilation))
    return Conv(call.args[0], weights, strides, padding, dilation, int(attrs.groups), machine, tiles).emit(bb)


def _matmul(bb: Any, call: Any, machine: Machine, tiles: Tiles) -> Any:
    a, b = call.args
    columns = static(b.ty.shape[-1]) if len(b.ty.shape) > 1 else None
    if len(a.ty.shape) < 2 or _operands(call) not in _OPERANDS or columns is None:
        return _stock(bb, call)
    weights = constant(b)
    if weights is not None and weights.ndim == 2:
        return linear(bb, a, weights, machine, tiles)
    if _operands(call) != ("float32", "float32"):
        return _stock(bb, call)
    return products(bb, a, b, machine, tiles)


def linear(bb: Any, a: Any, weights: np.ndarray[Any, Any], machine: Machine, tiles: Tiles) -> Any:
    """*a* [..., K] times constant *weights* [K, N] as a call of its stages; int32 for bytes."""
    depth, columns = weights.shape
    counts = [static(s) for s in list(a.ty.shape)[:-1]]
    rows = None if None in counts else int(np.prod([c for c in counts if c is not None]))
    integers = weights.dtype == np.int8
    workload = Workload("linear", str(weights.dtype), (("x", (rows, depth)), ("weights", (depth, columns))))
    tile = tiles.of(workload, Space(rows, columns, machine.lanes, machine.registers))
    dot = machine.dot if integers and depth % GROUP == 0 else ""
    at = packed_at(tile, columns, depth, GROUP if dot else 1)
    how = annotation(tile, flat=True, dot=dot)

    def stages(x: Any, packed: Any, *correction: Any) -> Any:
        k = te.reduce_axis((0, number(depth)), "k")
        shape = (*x.shape[:-1], number(columns))

        def term(*i: Any) -> Any:
            left, right = x[(*i[:-1], k.var)], packed[at(k.var, i[-1])]
            return te.sum(left.astype("int32") * right.astype("int32") if integers else left * right, axis=k)

        total = te.compute(shape, term, name="linear", attrs=how)
        if not correction:
            return total
        return te.compute(shape, lambda *i: total[i] + correction[0][i[-1]], name="corrected")

    packed = relax.const(pack_bytes(weights[None], tile) if dot else pack(weights, tile))
    operands = [a, packed]
    if dot == "sdot":  # computes with x − 128
        operands.append(relax.const((weights.astype(np.int64).sum(0) * 128).astype(np.int32), "int32"))
    return bb.call_te(stages, *operands, primfunc_name_hint="linear", primfunc_attrs={"op_pattern": FUSED_AFTER})


def products(bb: Any, a: Any, b: Any, machine: Machine, tiles: Tiles) -> Any:
    """*a* [..., M, K] times *b* [..., K, N], both computed, as a call of its stages."""
    shapes = [tuple(static(size) for size in x.ty.shape) for x in (a, b)]
    workload = Workload("matmul", "float32", (("x", shapes[0]), ("y", shapes[1])))
    tile = tiles.of(workload, Space(shapes[0][-2], int(b.ty.shape[-1]), machine.lanes, machine.registers))
    stages = lambda x, y: _products(x, y, annotation(tile, flat=False, packed=False))  # noqa: E731
    return bb.call_te(stages, a, b, primfunc_name_hint="matmul", primfunc_attrs={"op_pattern": FUSED_AFTER})


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
        return t[(*(number(0) if static(s) == 1 else i for s, i in zip(t.shape, own, strict=False)), *inner)]

    def term(*at: Any) -> Any:
        *batch, m, n = at
        return te.sum(part(x, batch, m, k.var) * part(y, batch, k.var, n), axis=k)

    return te.compute((*outer, x.shape[-2], y.shape[-1]), term, name="products", attrs=how)


# Places of extremes ---------------------------------------------------------------------------------------------------


def _place(bb: Any, call: Any, reduce: Any) -> Any:
    """The first index of the maximum or minimum, or of the first NaN; TVM's own drops NaN."""
    x, attrs = call.args[0], call.attrs
    if attrs.axis is None or str(x.ty.dtype) not in ("float32", "float64"):
        return _stock(bb, call)
    axis = int(attrs.axis) % len(x.ty.shape)

    def stages(x: Any) -> Any:
        def at(i: Any, k: Any) -> tuple[Any, ...]:
            own = list(i)
            own[axis : axis + bool(attrs.keepdims)] = [k]
            return tuple(own)

        count = x.shape[axis]
        sizes = list(x.shape)
        sizes[axis : axis + 1] = [number(1)] if attrs.keepdims else []
        first, second = te.reduce_axis((0, count), "k"), te.reduce_axis((0, count), "k")
        extreme = te.compute(sizes, lambda *i: reduce(x[at(i, first.var)], axis=first), name="extreme")

        def place(*i: Any) -> Any:
            value = x[at(i, second.var)]
            here = tirx.any(value == extreme[i], tirx.isnan(value))
            return te.min(tirx.Select(here, second.var, count), axis=second)

        return te.compute(sizes, place, name="place")

    return bb.call_te(stages, x, primfunc_name_hint=call.op.name.removeprefix("relax."))


# Norms ----------------------------------------------------------------------------------------------------------------


def _layer_norm(bb: Any, call: Any) -> Any:
    x, attrs = call.args[0], call.attrs
    rank = len(x.ty.shape)
    axes = sorted(int(a) % rank for a in attrs.axes)
    floats = str(x.ty.dtype) in ("float32", "float64")
    if axes != list(range(rank - len(axes), rank)) or not (attrs.center and attrs.scale) or not floats:
        return _stock(bb, call)
    epsilon = float(attrs.epsilon)
    stages = lambda x, g, b: _normalized(x, g, b, rank - len(axes), epsilon)  # noqa: E731
    return bb.call_te(stages, *call.args, primfunc_name_hint="layer_norm", primfunc_attrs={"op_pattern": FUSED_AFTER})


def _normalized(x: Any, gamma: Any, beta: Any, kept: int, epsilon: float) -> Any:
    outer, inner = x.shape[:kept], x.shape[kept:]
    dtype = str(x.dtype)
    count = tirx.Cast(dtype, _product(inner))

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
    factor = te.compute(outer, lambda *i: te.rsqrt(squares[i] / count + tirx.const(epsilon, dtype)), name="factor")

    def result(*i: Any) -> Any:
        return (x[i] - mean[i[:kept]]) * factor[i[:kept]] * gamma[i[kept:]] + beta[i[kept:]]

    return te.compute(x.shape, result, name="normalized")


def _product(sizes: Sequence[Any]) -> Any:
    result = sizes[0]
    for size in sizes[1:]:
        result = result * size
    return result
