"""ONNX operators as Relax ones, where TVM's importer writes them in a form of its own, or not at all.

BatchNormalization: TVM divides by a square root for each element, and gives float32 for float16; ours multiplies and
adds.
Clip: TVM tests the bounds for NaN and writes loops; ours are two operators that layouts and fusion understand.
ReduceLogSumExp: TVM gives NaN where the largest element is infinite.
Max and Min: TVM stacks all tensors; ours go two by two.
Gather: TVM computes the size of an axis when the model runs; ours is known, or the axis is dynamic.
Resize: see _tvm_resize.
Slice: TVM compares the size of a dynamic axis with 2⁶³ when the model runs.
LayerNormalization: TVM has none for bfloat16.
DequantizeLinear: TVM knows no blocks; ours makes floats of constants, four bits are eight before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from fxopt.backends._tvm_resize import resize
from fxopt.backends._tvm_sizes import expand

_END = 2**31 - 1  # slices that go at least so far go to the end


def _batch_norm(bb: Any, inputs: Any, attrs: Any) -> Any:
    """γ·(x − μ)/√(σ² + ε) + β as x·s + b."""
    x, numbers = inputs[0], [_constant(value) for value in inputs[1:5]]
    if attrs.get("training_mode", 0) or any(n is None for n in numbers) or x.ty.ndim < 2:  # -1: a rank that is open
        return None
    dtype = str(x.ty.dtype)
    wide = "float64" if dtype == "float64" else "float32"
    gamma, beta, mean, variance = (n.astype(np.float64).reshape(-1, *[1] * (x.ty.ndim - 2)) for n in numbers)
    scale = gamma / np.sqrt(variance + float(attrs.get("epsilon", 1e-5)))
    s, b = (relax.const(n.astype(wide), wide) for n in (scale, beta - mean * scale))
    x = x if dtype == wide else bb.emit(relax.op.astype(x, wide))
    result = relax.op.add(bb.emit(relax.op.multiply(x, s)), b)
    return result if dtype == wide else relax.op.astype(bb.emit(result), dtype)


def _clip(bb: Any, inputs: Any, attrs: Any) -> Any:
    result = inputs[0]
    for bound, operator in zip((inputs[1], inputs[2]), (relax.op.maximum, relax.op.minimum), strict=True):
        if bound is None:
            continue
        value = _constant(bound)
        if value is None or np.isnan(value).any():
            return None
        result = bb.emit(operator(result, bound))
    return result


def _dequantize_blocks(bb: Any, inputs: Any, attrs: Any) -> Any:
    """Constant weights whose blocks have scales of their own, as floats."""
    weights, scale = _constant(inputs[0]), _constant(inputs[1])
    size, axis = int(attrs.get("block_size", 0)), int(attrs.get("axis", 1))
    if not size or weights is None or scale is None:
        return None
    zero = _constant(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else np.zeros_like(weights[:1, :1])

    def spread(blocks: Any) -> Any:
        return np.repeat(blocks, size, axis).take(range(weights.shape[axis]), axis) if blocks.size > 1 else blocks

    values = (weights.astype(np.int32) - spread(zero).astype(np.int32)) * spread(scale).astype(np.float32)
    return relax.const(values.astype(scale.dtype), str(scale.dtype))


def _of_several(operator: Any) -> Any:
    """Max and Min of tensors, two by two; TVM stacks them all."""

    def converted(bb: Any, inputs: Any, attrs: Any) -> Any:
        if not all(isinstance(value.ty, relax.TensorType) for value in inputs):
            return None
        result = inputs[0]
        for value in list(inputs)[1:]:
            result = bb.emit(operator(result, value))
        return result

    return converted


def _gather(bb: Any, inputs: Any, attrs: Any) -> Any:
    data, indices = inputs[0], inputs[1]
    if isinstance(data.ty, relax.ShapeType) or (isinstance(data, GenericConst) and isinstance(indices, GenericConst)):
        return None
    axis = int(attrs.get("axis", 0)) % len(data.ty.shape)
    size = data.ty.shape[axis]
    if not isinstance(size, tvm.tirx.IntImm) or not isinstance(indices.ty, relax.TensorType):
        return None
    dtype, known = str(indices.ty.dtype), _constant(indices)
    if known is not None:
        positions = relax.const(np.where(known < 0, known + int(size), known), dtype)
    else:
        wrapped = relax.op.add(indices, relax.const(int(size), dtype))
        positions = relax.op.where(relax.op.less(indices, relax.const(0, dtype)), wrapped, indices)
    return relax.op.take(data, bb.normalize(positions), axis, mode="clip")


def _layer_norm(bb: Any, inputs: Any, attrs: Any) -> Any:
    """Of bfloat16, in float32."""
    dtype, rank = str(getattr(inputs[0].ty, "dtype", "")), getattr(inputs[0].ty, "ndim", -1)
    if dtype != "bfloat16" or rank < 0:
        return None
    x, gamma, *rest = (None if value is None else bb.emit(relax.op.astype(value, "float32")) for value in inputs)
    beta = rest[0] if rest and rest[0] is not None else bb.emit(relax.op.zeros_like(gamma))
    axes = list(range(int(attrs.get("axis", -1)) % rank, rank))
    result = bb.emit(relax.op.nn.layer_norm(x, gamma, beta, axes, float(attrs.get("epsilon", 1e-5))))
    return relax.op.astype(result, dtype)


def _range(bb: Any, inputs: Any, attrs: Any) -> Any:
    """Integers up to a size, as many as the size says; TVM counts them when it runs."""
    known = [_constant(value) for value in inputs]
    ends = [
        int(k.reshape(())) if k is not None and k.dtype == np.int64 else v for k, v in zip(known, inputs, strict=True)
    ]
    sizes = all(isinstance(end, int) or tvm.ir.is_prim_expr(end) for end in ends)
    return relax.op.arange(*ends, dtype="int64") if sizes and not all(isinstance(end, int) for end in ends) else None


def _shape(bb: Any, inputs: Any, attrs: Any) -> Any:
    """The part of the shape that is asked for; TVM gives all of it."""
    shape = getattr(inputs[0].ty, "shape", None)
    if shape is None or not isinstance(inputs[0].ty, relax.TensorType):
        return None
    return relax.ShapeExpr(list(shape)[attrs.get("start", 0) : attrs.get("end")])


def _slice(bb: Any, inputs: Any, attrs: Any) -> Any:
    """Axes of which all is taken are left as they are; of a dynamic one TVM would take the shorter of it and of 2⁶³."""
    limits: list[Any] = [_constant(value) for value in inputs[1:]]
    if not isinstance(inputs[0].ty, relax.TensorType) or any(limit is None for limit in limits):
        return None
    count = len(limits[0])
    limits += [np.arange(count), np.ones(count, np.int64)][len(limits) - 2 :]
    starts, ends, _, steps = limits
    kept = np.flatnonzero((starts != 0) | (ends < _END) | (steps != 1))
    if not kept.size:
        return inputs[0]
    inputs[1:] = [relax.const(part[kept], "int64") for part in limits]
    return None


def _log_sum_exp(bb: Any, inputs: Any, attrs: Any) -> Any:
    """The log of Σ e^(x − m) + m, with m the largest x, or 0 where that is infinite."""
    x, given = inputs[0], _constant(inputs[1]) if len(inputs) > 1 else None
    axes = attrs.get("axes") if given is None else given.tolist()
    if not axes:
        return None
    largest = bb.emit(relax.op.max(x, axes, keepdims=True))
    nothing = relax.const(0, str(x.ty.dtype))
    largest = bb.emit(relax.op.where(bb.emit(relax.op.isinf(largest)), nothing, largest))
    total = bb.emit(relax.op.sum(bb.emit(relax.op.exp(bb.emit(relax.op.subtract(x, largest)))), axes, keepdims=True))
    result = relax.op.add(bb.emit(relax.op.log(total)), largest)
    return result if attrs.get("keepdims", 1) else relax.op.squeeze(bb.emit(result), axes)


def _matmul_integer(bb: Any, inputs: Any, attrs: Any) -> Any:
    """(a − za)·w = a·w − za·Σw, for bytes and constant, symmetric weights."""
    a, weights = inputs[0], _constant(inputs[1])
    zero = inputs[2] if len(inputs) > 2 else None
    symmetric = len(inputs) < 4 or inputs[3] is None or not np.any(_constant(inputs[3]))
    if weights is None or weights.dtype != np.int8 or not symmetric or str(a.ty.dtype) != "uint8":
        return None
    total = bb.emit(relax.op.matmul(a, inputs[1], "int32"))
    if zero is None:
        return total
    sums = relax.const(weights.astype(np.int32).sum(-2), "int32")
    return relax.op.subtract(total, bb.emit(relax.op.multiply(bb.emit(relax.op.astype(zero, "int32")), sums)))


def _constant(value: Any) -> Any:
    held = isinstance(value, GenericConst) and isinstance(value.value, tvm.runtime.Tensor)
    return value.value.numpy() if held else None


CONVERTERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "DequantizeLinear": _dequantize_blocks,
    "Expand": expand,
    "Gather": _gather,
    "LayerNormalization": _layer_norm,
    "MatMulInteger": _matmul_integer,
    "Max": _of_several(relax.op.maximum),
    "Min": _of_several(relax.op.minimum),
    "Range": _range,
    "ReduceLogSumExp": _log_sum_exp,
    "Resize": resize,
    "Shape": _shape,
    "Slice": _slice,
}
"""Each from the block builder, inputs and attributes; one that gives None leaves the operator to TVM."""
