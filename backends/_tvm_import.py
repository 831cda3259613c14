"""An ONNX model as a Relax module: TVM's importer, with some operators of our own (_tvm_converters).

Sizes are computed while it is imported (_tvm_sizes), and an operator that TVM declines does not end the import: all of
them are listed, with the lines of the model that they come from.
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
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, _get_convert_map, get_info

from fxopt.backends._tvm_converters import CONVERTERS
from fxopt.backends._tvm_sizes import as_tensor, compute, known
from fxopt.errors import UnsupportedOp


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
        ours = CONVERTERS.get(op_name)
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
