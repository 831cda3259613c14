"""Quantized graphs in integers: what the ONNX file says in floats around each convolution and matrix product.

    conv2d(dequantize(x, sx, zx), dequantize(w, sw, 0))
        →   (conv2d_int32(x, w) − zx·Σw) · (sx·sw)        zeros of the padding are zx

The sum is exact; the rest is elementwise and joins the kernel, with bias, activation and the quantize that follows.
Weights are constants and symmetric, one scale for all or for each output channel; activations are u8 with one scale.
What is otherwise stays in float, and so do products over a number of bytes that is no multiple of four.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from fxopt.backends._tvm_packing import GROUP, constant

_FUSED_BEFORE_AND_AFTER = 0  # kElemWise


def integers(module: Any) -> Any:
    """*module* with integer convolutions and matrix products where it dequantizes their operands."""
    pass_ = _Integers(module)
    pass_.builder_.update_func(module.get_global_var("main"), pass_.visit_expr(module["main"]))
    return relax.transform.DeadCodeElimination()(pass_.builder_.get())


@mutator
class _Integers(PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        name = str(getattr(call.op, "name", ""))
        if name == "relax.nn.conv2d" and call.attrs.data_layout == "NHWC":
            return self._conv2d(call)
        return self._matmul(call) if name == "relax.matmul" else call

    def _bound(self, value: Any) -> Any:
        found = self.lookup_binding(value) if isinstance(value, relax.Var) else None
        return value if found is None else found

    def _activation(self, value: Any) -> tuple[Any, float, int] | None:
        """Bytes, scale and zero point of a dequantized u8 value."""
        source = self._bound(value)
        name = str(getattr(getattr(source, "op", None), "name", ""))
        if name == "relax.permute_dims":  # of the input image
            found = self._activation(source.args[0])
            if found is None:
                return None
            moved = self.builder_.emit(relax.op.permute_dims(found[0], source.attrs.axes))
            return moved, found[1], found[2]
        if name != "relax.dequantize":
            return None
        scale, zero = constant(source.args[1]), constant(source.args[2])
        if scale is None or zero is None or scale.size != 1 or zero.size != 1:
            return None
        if str(source.args[0].ty.dtype) != "uint8":
            return None
        return source.args[0], float(scale.reshape(())), int(zero.reshape(()))

    def _weight(self, value: Any, outputs: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
        """s8 values and scales by output of a dequantized constant, whose outputs are dimension *outputs*."""
        source = self._bound(value)
        name = str(getattr(getattr(source, "op", None), "name", ""))
        if name == "relax.permute_dims" and len(source.ty.shape) == 2:
            found = self._weight(source.args[0], 1 - outputs)
            return None if found is None else (found[0].T, found[1])
        if name != "relax.dequantize":
            return None
        values, scale, zero = (constant(argument) for argument in source.args)
        if values is None or scale is None or zero is None or values.dtype != np.int8 or zero.any():
            return None
        if scale.size != 1 and int(source.attrs.axis) % values.ndim != outputs % values.ndim:
            return None
        scales = np.broadcast_to(scale.reshape(-1), (values.shape[outputs],)).astype(np.float32)
        return values, scales

    def _conv2d(self, call: Any) -> Any:
        x, w, attrs = self._activation(call.args[0]), self._weight(call.args[1], 0), call.attrs
        if x is None or w is None:
            return call
        data, scale, zero = x
        values, scales = w
        top, left, bottom, right = (int(p) for p in attrs.padding)
        if top or left or bottom or right:
            data = relax.op.nn.pad(data, [0, 0, top, bottom, left, right, 0, 0], "constant", zero)
            data = self.builder_.emit(data)
        total = relax.op.nn.conv2d(
            data, relax.const(values, "int8"), attrs.strides, [0, 0, 0, 0], attrs.dilation, attrs.groups,
            "NHWC", "OIHW", "NHWC", "int32",
        )  # fmt: skip
        return self._scaled(total, zero * values.astype(np.int64).sum((1, 2, 3)), scale * scales)

    def _matmul(self, call: Any) -> Any:
        x, w = self._activation(call.args[0]), self._weight(call.args[1], 1)
        if x is None or w is None or w[0].ndim != 2 or w[0].shape[0] % GROUP:
            return call
        values, scales = w
        total = relax.op.matmul(x[0], relax.const(np.ascontiguousarray(values), "int8"), "int32")
        return self._scaled(total, x[2] * values.astype(np.int64).sum(0), x[1] * scales)

    def _scaled(self, total: Any, offset: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> Any:
        """(*total* − *offset*) · *scales*, both by channel, which is the last dimension."""
        total = self.builder_.emit(total)
        corrected = self.builder_.emit(relax.op.subtract(total, relax.const(offset.astype(np.int32), "int32")))
        floats = self.builder_.emit(relax.op.astype(corrected, "float32"))
        return relax.op.multiply(floats, relax.const(scales.astype(np.float32), "float32"))


def quantize(bb: Any, call: Any) -> Any:
    """``relax.quantize`` with ties to even and a product, where TVM rounds them away from zero and divides."""
    x, attrs = call.args[0], call.attrs
    scale, zero = constant(call.args[1]), constant(call.args[2])
    kind = str(attrs.out_dtype)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or kind not in ("uint8", "int8"):
        return relax.transform.legalize_ops.qdq._quantize(bb, call)
    factor, offset = 1.0 / float(scale.reshape(())), float(zero.reshape(()))
    low, high = (0.0, 255.0) if kind == "uint8" else (-128.0, 127.0)

    def element(value: Any) -> Any:
        rounded = tirx.nearbyint(value * tirx.const(factor, "float32")) + tirx.const(offset, "float32")
        clipped = tirx.max(tirx.min(rounded, tirx.const(high, "float32")), tirx.const(low, "float32"))
        return tirx.Cast(kind, tirx.Cast("int32", clipped))

    def stages(data: Any) -> Any:
        return te.compute(data.shape, lambda *i: element(data[i]), name="quantized")

    return bb.call_te(stages, x, primfunc_name_hint="quantize", primfunc_attrs={"op_pattern": _FUSED_BEFORE_AND_AFTER})
