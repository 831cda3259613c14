"""An ONNX model as a Relax module: TVM's importer, with the operators that it writes in a form of its own replaced.

Clip: TVM tests the bounds for NaN and writes loops; ours are two operators that layouts and fusion understand.
Gather: TVM computes the size of an axis when the model runs; ours is known, or the axis is dynamic.
Resize: see _tvm_resize.
Slice: TVM compares the size of a dynamic axis with 2⁶³ when the model runs.
LayerNormalization: TVM has none for bfloat16.
DequantizeLinear: TVM knows no blocks; ours makes floats of constants, four bits are eight before that.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map, get_info

from fxopt.backends._tvm_resize import resize
from fxopt.backends._tvm_sizes import as_tensor, compute, expand, known
from fxopt.errors import UnsupportedOp

_END = 2**31 - 1  # slices that go at least so far go to the end


def from_onnx(model: Any, origins: Mapping[str, str]) -> Any:
    """The Relax module of the ONNX *model*; its function main takes the graph's inputs.

    Args:
        model: a ModelProto.
        origins: "op at file:line" for each node name, for messages.

    Raises:
        UnsupportedOp: operators that TVM does not import: each with its source line, and by its name in *model*.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    importer = _Importer(origins_of_all(model.graph, origins))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importer.from_onnx(model.graph, opset)
    declined = importer.declined
    if declined:
        lines = dict.fromkeys(f"{one.why} ({one.where})" for one in declined.values())
        nodes = {name: one.why for name, one in declined.items()}
        raise UnsupportedOp("; ".join(lines), nodes) from next(iter(declined.values())).__cause__
    return module


def origins_of_all(graph: Any, origins: Mapping[str, str]) -> dict[str, str]:
    """*origins* by node name, and for nodes that have none the origin of what reads their result."""
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
    """An operator that TVM does not import as it is here: why, and where it stands."""

    def __init__(self, why: str, where: str) -> None:
        super().__init__(why, where)
        self.why, self.where = why, where


class _Importer(ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer, which goes on after an operator that it does not import.

    Attributes:
        declined: what it does not import, by node name.
    """

    def __init__(self, origins: Mapping[str, str]) -> None:
        super().__init__(None, "float32", sanitize=True)
        self._origins = origins
        self.declined: dict[str, _Declined] = {}

    def _parse_array(self, tensor_proto: Any) -> Any:
        import onnx

        array = np.array(onnx.numpy_helper.to_array(tensor_proto), order="C")
        return tvm.runtime.tensor(array.astype(np.int8) if array.dtype.name == "int4" else array)

    def _parse_graph_input(self, graph: Any) -> None:
        """Sizes of inputs such as ``2*width``, where no input has ``width``, are sizes of their own."""
        named = [dim for value in graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param]
        plain = {dim.dim_param for dim in named if dim.dim_param.isidentifier()}
        own: dict[str, str] = {}
        for dim in named:
            terms = re.fullmatch(r"(\w+) ?(?:[-+*]|//) ?(\w+)", dim.dim_param)  # more than that TVM would misread
            known = terms and all(term in plain or term.isdigit() for term in terms.groups())
            if not known and dim.dim_param not in plain:
                own.setdefault(dim.dim_param, f"fxopt_size_{len(own)}")
        for value in (*graph.input, *graph.value_info, *graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in own:
                    dim.dim_param = own[dim.dim_param]
        super()._parse_graph_input(graph)

    def _check_for_unsupported_ops(self, graph: Any) -> None:
        """Each is met where it stands."""

    def _construct_nodes(self, graph: Any) -> None:
        """Each node of *graph*. Where one is declined, what reads it is read for more that would be."""
        types = {value.name: value for value in (*graph.value_info, *graph.output)}
        for node in graph.node:
            if not all(name in self._nodes for name in node.input if name):
                continue
            try:
                self._construct_node(node)
            except _Declined as declined:
                self.declined[node.name] = declined
                self._stand_in(graph, [types[name] for name in node.output if name in types])
        if self.declined:
            self._nodes.update({value.name: relax.const(0.0) for value in graph.output})

    def _construct_node(self, node: Any) -> None:
        """Arithmetic on sizes here, all else by TVM."""
        inputs = [self._nodes[name] for name in node.input if name]
        made = compute(node.op_type, inputs, self._parse_attr(node.attribute)) if inputs else None
        if made is None:
            for name in filter(None, node.input):
                tensor = as_tensor(node.op_type, self._nodes[name])
                if tensor is not self._nodes[name]:
                    self._nodes[name] = self.bb.emit(tensor)
            try:
                super()._construct_nodes(_OneNode((node,)))
            except Exception as error:
                raise self._declined(node.op_type, node.name, error) from error
            made = self._nodes.get(node.output[0])
        self._nodes[node.output[0]] = known(made)

    def _stand_in(self, graph: Any, values: Sequence[Any]) -> None:
        """Variables of the types that *values* of *graph* have, where these are known."""
        sizes: dict[str, Any] = {}
        for value in graph.input:
            named = zip(value.type.tensor_type.shape.dim, self._nodes[value.name].ty.shape or (), strict=False)
            sizes.update({dim.dim_param: size for dim, size in named if dim.dim_param})
        for value in values:
            name, shape, dtype, _, sizes = get_info(value, sizes)
            if shape is not None:
                self._nodes[name] = relax.Var("stand_in", relax.TensorType(shape, dtype))

    def _declined(self, operator: str, name: str, error: Exception) -> _Declined:
        where = self._origins.get(name, name)
        if operator not in _get_convert_map():
            return _Declined(f"TVM has no importer for {operator}", where)
        reason = str(error).strip().splitlines()
        return _Declined(f"TVM cannot import {operator}: {reason[-1] if reason else type(error).__name__}", where)

    def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
        ours = {
            "Clip": _clip,
            "DequantizeLinear": _dequantize_blocks,
            "Expand": expand,
            "Gather": _gather,
            "LayerNormalization": _layer_norm,
            "MatMulInteger": _matmul_integer,
            "Max": _of_several(relax.op.maximum),
            "Min": _of_several(relax.op.minimum),
            "Shape": _shape,
            "Slice": _slice,
            "Range": _range,
            "Resize": resize,
        }.get(op_name)
        try:
            made = ours(self.bb, inputs, attrs) if ours is not None else None
            if made is not None:
                return self.bb.normalize(made)
            return super()._convert_operator(op_name, inputs, attrs, opset)
        except Exception as error:
            raise self._declined(op_name, str(attrs.get("tvm_custom", {}).get("name", op_name)), error) from error


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
