"""Zeros around the input of a max pool, kept from an optimization of onnxruntime that would lose them.

    MaxPool(Pad(x))   →   MaxPool(Pad(x, axes=all))

onnxruntime merges a Pad of zeros into the pool that reads it, whose own padding is −∞: negative inputs then pool to
other values. It leaves a Pad that names its axes alone. Convolutions, for which zeros are right, keep theirs mergeable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def keep_apart(model: onnx_ir.Model) -> None:
    """Name all axes in each Pad that a MaxPool reads."""
    import numpy as np
    import onnx_ir as ir

    for node in list(model.graph.all_nodes()):
        if node.op_type != "Pad" or not any(user.op_type == "MaxPool" for user in node.outputs[0].consumers()):
            continue
        x = node.inputs[0]
        if len(node.inputs) > 3 or x is None or x.shape is None:
            continue
        axes = ir.tensor(np.arange(len(x.shape)), name=f"{node.outputs[0].name}_axes")
        value = ir.Value(
            name=axes.name, type=ir.TensorType(axes.dtype), shape=ir.Shape([len(x.shape)]), const_value=axes
        )
        model.graph.register_initializer(value)
        node.resize_inputs(4)
        node.replace_input_with(3, value)
