"""ONNX for the quantized ops that torch's exporter has no translation for.

linear with dynamic activations   →   DynamicQuantizeLinear, MatMulInteger, Mul, Add     (one kernel in onnxruntime)
dequantize_per_channel_group      →   DequantizeLinear(axis=1, block_size=group), int4   (MatMulNBits in onnxruntime)
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxopt import ops
from fxopt.program import Program
from fxopt.rewriter import Rewriter

if TYPE_CHECKING:
    import onnx_ir
    from torch.onnx._internal.exporter._registration import ONNXRegistry

TRANSPOSED = "_t"  # after the name of a weight that lies so in the file
BLOCKS_OPSET = 21  # the first whose DequantizeLinear knows blocks and int4

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("dynamic_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor")


@torch.library.impl(_library, "dynamic_linear", "Meta")
def _dynamic_linear_shape(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def has_blocks(program: Program) -> bool:
    """Whether *program* holds weights with one scale for each group of inputs."""
    return any(ops.packet(node) == "dequantize_per_channel_group" for node in program.graph.nodes)


def register(registry: ONNXRegistry) -> None:
    """Add the translations to *registry*, once."""
    from fxopt import quantized

    if not registry.is_registered(quantized.DEQUANTIZE_GROUP):
        registry.register_op(torch.ops.fxopt.dynamic_linear.default, _dynamic_linear)
        registry.register_op(quantized.DEQUANTIZE_GROUP, _dequantize_group)


def _dynamic_linear(x: Any, weight: Any, scales: Any, bias: Any = None) -> Any:
    from onnxscript import opset18 as op

    q, scale, zero_point = op.DynamicQuantizeLinear(x)
    products = op.Cast(op.MatMulInteger(q, weight, zero_point), to=1)
    y = op.Mul(products, op.Mul(scale, scales))
    return y if bias is None else op.Add(y, bias)


def _dequantize_group(
    q: Any, scales: Any, zero_points: Any, qmin: int, qmax: int, dtype: int, group_size: int, output_dtype: int
) -> Any:
    from onnxscript import opset21 as op

    return op.DequantizeLinear(q, scales, axis=1, block_size=group_size)


def fuse_dynamic(program: Program) -> None:
    """Linears whose input is quantized at each call, and whose weight is int8, as one op each."""
    rewriter = Rewriter(program)
    for node in rewriter.nodes():
        if node.target is torch.ops.aten.linear.default:
            x, weight, bias = (ops.arguments(node)[key] for key in ("input", "weight", "bias"))
            source = _dynamic_source(x)
            if source is not None and ops.packet(weight) == "dequantize_per_channel":
                _fuse(rewriter, node, source, weight, bias)


def _fuse(rewriter: Rewriter, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    source = weight.args[0]
    q = rewriter.tensor(source)
    if q is None:
        return
    assert isinstance(source, fx.Node)
    if len(source.users) > 1:  # an embedding looks rows up: the file holds it once
        transposed = rewriter.call(torch.ops.aten.permute.default, (source, [1, 0]), before=node)
    else:
        transposed = rewriter.constant(f"{source.target}{TRANSPOSED}", q.t().contiguous())
    target = torch.ops.fxopt.dynamic_linear.default
    rewriter.replace(node, rewriter.call(target, (x, transposed, weight.args[1], bias), before=node))


def _dynamic_source(x: fx.Node) -> fx.Node | None:
    """The float value behind a value that is quantized to u8 with its own range; None for any other."""
    if ops.packet(x) != "dequantize_per_tensor" or not isinstance(x.args[1], fx.Node):
        return None
    quantize, scale = x.args[0], x.args[1]
    assert isinstance(quantize, fx.Node)
    chosen = scale.args[0] if scale.target is operator.getitem else None
    if ops.packet(quantize) != "quantize_per_tensor" or not isinstance(chosen, fx.Node):
        return None
    same = ops.packet(chosen) == "choose_qparams" and chosen.args[0] is quantize.args[0]
    return quantize.args[0] if same and x.args[-1] is torch.uint8 else None  # type: ignore[return-value]


def pack_blocks(model: onnx_ir.Model) -> set[str]:
    """Weights that are dequantized in blocks: int4 where four bits hold them, and laid out as a MatMul reads them.

    MatMul(x, Transpose(DQ(w[N, K], axis=1)))   →   MatMul(x, DQ(wᵀ[K, N], axis=0))

    Returns:
        The names of the initializers that are transposed now.
    """
    import ml_dtypes
    import onnx_ir as ir

    transposed = set[str]()
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or "block_size" not in node.attributes:
            continue
        weight, scale = node.inputs[:2]
        if weight is None or scale is None or weight.const_value is None or scale.const_value is None:
            continue
        arrays = [weight.const_value.numpy(), scale.const_value.numpy()]
        if _transpose_away(model, node):
            arrays = [np.ascontiguousarray(array.T) for array in arrays]
            node.attributes["axis"] = ir.AttrInt64("axis", 0)
            node.outputs[0].shape = ir.Shape(arrays[0].shape)
            transposed |= {str(weight.name), str(scale.name)}
        if weight.dtype == ir.DataType.INT8 and arrays[0].min(initial=0) >= -8 and arrays[0].max(initial=0) <= 7:
            arrays[0] = arrays[0].astype(ml_dtypes.int4)
        for value, array in zip((weight, scale), arrays, strict=True):
            value.const_value = ir.tensor(array, name=value.name)
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    return transposed


def _transpose_away(model: onnx_ir.Model, node: onnx_ir.Node) -> bool:
    """Remove the Transpose that alone reads *node*'s result; False where there is none."""
    import onnx_ir as ir

    users = [use.node for use in node.outputs[0].uses()]
    constants = all(value is None or len(value.uses()) == 1 for value in node.inputs[:2])
    if len(users) != 1 or users[0].op_type != "Transpose" or not constants:
        return False
    ir.convenience.replace_all_uses_with(users[0].outputs[0], node.outputs[0])
    model.graph.remove(users[0], safe=True)
    return True
