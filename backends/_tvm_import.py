"""An ONNX model as a Relax module: TVM's importer, with the operators that it writes in a form of its own replaced.

Clip: TVM tests the bounds for NaN and writes loops; ours are two operators that layouts and fusion understand.
Gather: TVM computes the size of an axis when the model runs; ours is known, or the axis is dynamic.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map

from fxopt.backends._tvm_sizes import as_tensor, compute, known
from fxopt.errors import UnsupportedOp


def from_onnx(model: Any, origins: Mapping[str, str]) -> Any:
    """The Relax module of the ONNX *model*; its function main takes the graph's inputs.

    Args:
        model: a ModelProto.
        origins: "op at file:line" for each node name, for messages.

    Raises:
        UnsupportedOp: operators that TVM does not import; each with its source line.
    """
    importable = {*_get_convert_map(), "If", "Constant"}
    origins = _all_origins(model.graph, origins)
    missing = [node for node in model.graph.node if node.op_type not in importable]
    if missing:
        where = dict.fromkeys(f"{node.op_type} ({origins.get(node.name, node.name)})" for node in missing)
        raise UnsupportedOp(f"TVM has no importer for {'; '.join(where)}: use another backend")
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    importer = _Importer(origins)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importer.from_onnx(model.graph, opset)
    except _Declined as declined:
        raise UnsupportedOp(str(declined)) from declined.__cause__


def _all_origins(graph: Any, origins: Mapping[str, str]) -> dict[str, str]:
    """*origins*, and for nodes that the exporter put into the place of one the origin of what reads their result."""
    found = dict(origins)
    readers: dict[str, str] = {}
    for node in reversed(graph.node):
        reader = next((readers[name] for name in node.output if name in readers), None)
        if node.name not in found and reader is not None:
            found[node.name] = reader
        if node.name in found:
            readers.update(dict.fromkeys(node.input, found[node.name]))
    return found


class _Declined(BaseException):
    """An operator that TVM does not import as it is here."""


class _Importer(ONNXGraphImporter):  # type: ignore[misc]
    def __init__(self, origins: Mapping[str, str]) -> None:
        super().__init__(None, "float32", sanitize=True)
        self._origins = origins

    def _parse_array(self, tensor_proto: Any) -> Any:
        import onnx

        return tvm.runtime.tensor(np.array(onnx.numpy_helper.to_array(tensor_proto), order="C"))

    def _construct_nodes(self, graph: Any) -> None:
        """Each node of *graph*: arithmetic on sizes here, all else by TVM."""
        for node in graph.node:
            inputs = [self._nodes[name] for name in node.input if name]
            made = compute(node.op_type, inputs, self._parse_attr(node.attribute)) if inputs else None
            if made is None:
                for name in filter(None, node.input):
                    tensor = as_tensor(node.op_type, self._nodes[name])
                    if tensor is not self._nodes[name]:
                        self._nodes[name] = self.bb.emit(tensor)
                super()._construct_nodes(_OneNode((node,)))
                made = self._nodes.get(node.output[0])
            self._nodes[node.output[0]] = known(made)

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
        ours = {
            "Clip": _clip,
            "Gather": _gather,
            "MatMulInteger": _matmul_integer,
            "Shape": _shape,
            "Range": _range,
        }.get(op_name)
        made = ours(self.bb, inputs, attrs) if ours is not None else None
        if made is not None:
            return self.bb.normalize(made)
        try:
            return super()._convert_operator(op_name, inputs, attrs, opset)
        except Exception as error:
            name = str(attrs.get("tvm_custom", {}).get("name", op_name))
            reason = str(error).strip().splitlines()
            where = self._origins.get(name, name)
            raise _Declined(f"TVM cannot import {op_name} ({where}): {reason[-1] if reason else error}") from error


@dataclasses.dataclass(frozen=True)
class _OneNode:
    """A graph of one node."""

    node: tuple[Any, ...]


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
