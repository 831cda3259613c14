"""Quantized graphs in the form that onnxruntime's integer kernels are matched from.

    linear(dequantize(q[B, T, K]), w, b)   →   reshape(linear(dequantize(reshape(q, [-1, K])), w, b), [B, T, N])
    Conv(DQ(x), DQ(w), bias)               →   Conv(DQ(x), DQ(w), DQ(int32(bias / (sx·sw)), sx·sw))
    ReduceMean(DQ(x), [2, 3])              →   GlobalAveragePool(DQ(x))

A matrix product of two dimensions becomes a Gemm, for which there is an integer kernel that may leave its result in
float; the reshapes move no data. The bias is added to the integer accumulator, so its scale is that of a product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxopt import ops
from fxopt.program import Program
from fxopt.rewriter import Rewriter

if TYPE_CHECKING:
    import onnx_ir

aten = torch.ops.aten
_LARGEST = 2**31 - 1


def is_quantized(program: Program) -> bool:
    """Whether *program* holds quantize or dequantize ops."""
    return any(ops.namespace(node) == "quantized_decomposed" for node in program.graph.nodes)


def reshape(program: Program, *, no_matrices: bool) -> None:
    """Quantize and multiply in the shapes that an engine has kernels for; see below."""
    if no_matrices:
        lift_matrices(program)
    flatten_linears(program)


def flatten_linears(program: Program) -> None:
    """Let every linear of a statically quantized value, whatever its rank, run on a matrix."""
    rewriter = Rewriter(program)
    for node in rewriter.nodes():
        x = node.args[0] if node.target is aten.linear.default else None
        if isinstance(x, fx.Node) and _is_static(x) and x.meta["val"].dim() != 2:
            shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
            if shape.count(-1) <= 1:
                _flatten(rewriter, node, x, shape)


def lift_matrices(program: Program) -> None:
    """Let matrices be quantized as tensors of three dimensions.

    quantize(x[N, C])   →   reshape(quantize(reshape(x, [1, N, C])), [N, C])

    For OpenVINO: it turns a factor for each channel before the quantize into a range for each channel, also from
    behind a mean, and then reads the wrong ones for a matrix, or other memory.
    """
    rewriter = Rewriter(program)
    for node in rewriter.nodes():
        x = node.args[0] if node.op == "call_function" and node.args else None
        static = ops.namespace(node) == "quantized_decomposed" and ops.packet(node) == "quantize_per_tensor"
        if static and isinstance(x, fx.Node) and x.op != "get_attr" and x.meta["val"].dim() == 2:
            assert isinstance(node.target, torch._ops.OpOverload)
            columns = x.meta["val"].shape[1]
            if not isinstance(columns, int):
                continue
            lifted = rewriter.call(aten.reshape.default, (x, [1, -1, columns]), before=node)
            q = rewriter.call(node.target, (lifted, *node.args[1:]), before=node)
            rewriter.replace(node, rewriter.call(aten.reshape.default, (q, [-1, columns]), before=node))


def _flatten(rewriter: Rewriter, node: fx.Node, x: fx.Node, shape: list[int]) -> None:
    q, *how = x.args
    assert isinstance(q, fx.Node)
    assert isinstance(x.target, torch._ops.OpOverload)
    matrix = rewriter.call(aten.reshape.default, (q, [-1, x.meta["val"].shape[-1]]), before=node)
    matrix = rewriter.call(x.target, (matrix, *how), before=node)
    y = rewriter.call(aten.linear.default, (matrix, *node.args[1:]), before=node)
    rewriter.replace(node, rewriter.call(aten.reshape.default, (y, shape), before=node))


def _is_static(x: fx.Node) -> bool:
    """Whether *x* is dequantized with a scale that is a number."""
    dequantized = ops.namespace(x) == "quantized_decomposed" and ops.packet(x) == "dequantize_per_tensor"
    return dequantized and not isinstance(x.args[1], fx.Node)


def match_kernels(model: onnx_ir.Model, *, float_biases: bool) -> None:
    """Quantize the biases of integer convolutions and Gemms, and spell pooling over whole images as such."""
    for node in list(model.graph):
        if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2:
            if not float_biases:
                _quantize_bias(model, node)
        elif node.op_type == "ReduceMean":
            _pool(model, node)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():  # a bias in float, of which there are integers now
            del model.graph.initializers[name]


def _quantize_bias(model: onnx_ir.Model, node: onnx_ir.Node) -> None:
    import onnx_ir as ir

    scales = [_scale(value) for value in node.inputs[:2]]
    bias = node.inputs[2]
    values = _constant(bias)
    if scales[0] is None or scales[1] is None or values is None or bias is None:
        return
    scale = (scales[0].astype(np.float64) * scales[1]).reshape(-1)
    scale = np.broadcast_to(scale, values.shape).astype(np.float32)
    integers = np.rint(values.astype(np.float64) / scale)
    if not np.isfinite(integers).all() or np.abs(integers).max(initial=0) > _LARGEST:
        return
    name = f"{bias.name}_{node.outputs[0].name}"
    operands = [
        _initializer(model, ir.tensor(array, name=f"{name}_{suffix}"))
        for suffix, array in (("int32", integers.astype(np.int32)), ("scale", scale))
    ]
    restored = ir.node("DequantizeLinear", operands, attributes={"axis": 0})
    restored.outputs[0].name = f"{name}_dequantized"
    restored.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    restored.outputs[0].shape = ir.Shape(values.shape)
    model.graph.insert_before(node, restored)
    node.replace_input_with(2, restored.outputs[0])


def _initializer(model: onnx_ir.Model, tensor: Any) -> onnx_ir.Value:
    import onnx_ir as ir

    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _scale(value: onnx_ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The scale with which *value* was dequantized, or None if it was not."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    return _constant(producer.inputs[1])


def _constant(value: onnx_ir.Value | None) -> np.ndarray[Any, Any] | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _pool(model: onnx_ir.Model, node: onnx_ir.Node) -> None:
    import onnx_ir as ir

    x, axes = node.inputs[0], _constant(node.inputs[1]) if len(node.inputs) > 1 else None
    keeps = node.attributes.get_int("keepdims", 1)
    if x is None or _scale(x) is None or x.shape is None or len(x.shape) != 4 or axes is None or not keeps:
        return
    if sorted(int(axis) % 4 for axis in axes.reshape(-1)) != [2, 3]:
        return
    pool = ir.node("GlobalAveragePool", [x])
    out, new = node.outputs[0], pool.outputs[0]
    new.type, new.shape, name = out.type, out.shape, out.name
    model.graph.insert_before(node, pool)
    ir.convenience.replace_all_uses_with(out, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    new.name = name
