"""Arithmetic on sizes: what an ONNX graph computes of shapes, as expressions that hold while it is compiled.

    Concat(Reshape(Gather(Shape(x), 0), [1]), [12, 64])   →   [batch, 12, 64]

A scalar of the graph is an integer expression, a vector a ``ShapeExpr``. Where every size is known both are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst

from fxopt.backends._tvm_loops import static
from fxopt.backends._tvm_packing import constant

_LONGEST = 16  # elements; longer constants are no sizes

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": tirx.floordiv,
    "Mod": tirx.floormod,
    "Min": tirx.min,
    "Max": tirx.max,
}
_INTEGERS = (6, 7)  # int32 and int64 of ONNX
_TAKE_SIZES = set(
    "Reshape Resize ConstantOfShape Gather Slice Shape Expand Concat Squeeze Range Tile Unsqueeze".split()
)
_RESHAPES = {"Squeeze": 0, "Unsqueeze": 1}


def known(value: Any) -> Any:
    """*value*, a constant where it is a shape of known sizes."""
    if isinstance(value, relax.ShapeExpr) and all(isinstance(size, tirx.IntImm) for size in value.values):
        return relax.const(np.array([int(size) for size in value.values], np.int64), "int64")
    if tvm.ir.is_prim_expr(value) and isinstance(value, tirx.IntImm):
        return relax.const(np.array(int(value), np.int64), "int64")
    return value


def compute(operator: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any | None:
    """The result of *operator* on sizes; None where it is no arithmetic on sizes that is known here."""
    if not any(isinstance(value, relax.ShapeExpr) or tvm.ir.is_prim_expr(value) for value in inputs):
        return None
    sizes = [_sizes(value) for value in inputs]
    if any(size is None for size in sizes):
        return None
    made = _result(operator, [size for size in sizes if size is not None], attributes)
    if made is None:
        return None
    values, rank = made
    return known(relax.ShapeExpr(values) if rank else values[0])


def as_tensor(operator: str, value: Any) -> Any:
    """*value*; where it is a size and *operator* computes with tensors, the expression of a tensor that holds it."""
    if operator in _TAKE_SIZES:
        return value
    if isinstance(value, relax.ShapeExpr):
        return relax.op.shape_to_tensor(value)
    if tvm.ir.is_prim_expr(value):
        return relax.op.reshape(relax.op.shape_to_tensor(relax.ShapeExpr([_long(value)])), ())
    return value


def expand(bb: Any, inputs: Any, attrs: Any) -> Any:
    """Expand: a shape that is known is made a ``ShapeExpr``, where TVM takes sizes of the tensor that are open."""
    sizes, shape = list(inputs[0].ty.shape or ()), constant(inputs[1])
    if shape is not None and any(static(size) is None for size in sizes):
        counts = [1] * (len(sizes) - len(shape)) + [int(count) for count in shape]
        inputs[1] = relax.ShapeExpr([tirx.IntImm("int64", count) for count in counts])


_Sizes = tuple[list[Any], int]


def _result(operator: str, sizes: Sequence[_Sizes], attributes: Mapping[str, Any]) -> _Sizes | None:
    values, rank = sizes[0]
    if operator in _ARITHMETIC and len(sizes) == 2:
        other, other_rank = sizes[1]
        length = max(len(values), len(other))
        if len({len(values), len(other), 1} - {length}) > 1:
            return None
        pairs = zip(values * (length // len(values)), other * (length // len(other)), strict=True)
        return [_ARITHMETIC[operator](_long(a), _long(b)) for a, b in pairs], max(rank, other_rank)
    if operator == "Identity" or (operator == "Cast" and attributes.get("to") in _INTEGERS):
        return values, rank
    if operator in _RESHAPES:
        return (values, _RESHAPES[operator]) if len(values) == 1 else None
    if operator == "Reshape":
        shape = [int(size) for size in sizes[1][0] if isinstance(size, tirx.IntImm)]
        return (
            (values, len(shape)) if len(shape) == len(sizes[1][0]) <= 1 and shape in ([], [-1], [len(values)]) else None
        )
    if operator == "Slice":
        limits = [[static(at) for at in part] for part, _ in sizes[1:]]
        if any(at is None for part in limits for at in part) or len(limits) < 2:
            return None
        step = limits[3][0] if len(limits) > 3 else 1
        return values[limits[0][0] : limits[1][0] : step], 1
    if operator == "Concat":
        return [value for part, _ in sizes for value in part], 1
    if operator == "Gather" and all(isinstance(at, tirx.IntImm) for at in sizes[1][0]):
        return [values[int(at)] for at in sizes[1][0]], sizes[1][1]
    return None


def _long(value: Any) -> Any:
    return value if str(value.ty.dtype) == "int64" else tirx.Cast("int64", value)


def _sizes(value: Any) -> _Sizes | None:
    if isinstance(value, relax.ShapeExpr):
        return list(value.values), 1
    if tvm.ir.is_prim_expr(value):
        return [value], 0
    if isinstance(value, GenericConst) and isinstance(value.value, tvm.runtime.Tensor):
        held = value.value.numpy()
        if held.dtype.kind == "i" and held.ndim <= 1 and 0 < held.size <= _LONGEST:
            return [tirx.IntImm("int64", int(x)) for x in held.reshape(-1)], held.ndim
    return None
