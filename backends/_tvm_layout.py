"""Channels last: two-dimensional convolutions, and everything between them that does not care, from NCHW to NHWC.

    y = conv2d(x)  [N, C, H, W]   →   y' = conv2d(x', data_layout="NHWC"),  y = permute_dims(y')  where it is still read

A value is followed through elementwise operators, pooling, reductions, concatenation, slices and transpositions; it is
transposed back, once, for the first operator that reads it in the old layout. TVM's own ``ConvertLayout`` gives up, or
runs out of memory, on reshapes of attention and on tensors of five dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import Call, GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator

_TO_LAST = (0, 2, 3, 1)  # NHWC[i] = NCHW[_TO_LAST[i]]
_TO_FIRST = (0, 3, 1, 2)

_ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in (
        "add subtract multiply divide maximum minimum power where less less_equal greater greater_equal equal "
        "not_equal abs negative exp log sqrt rsqrt sigmoid tanh erf sin cos floor ceil round sign clip astype isnan "
        "square nn.relu nn.gelu nn.gelu_tanh nn.silu nn.leakyrelu nn.softplus nn.selu nn.relu6"
    ).split()
)
_POOLS = {f"relax.nn.{name}" for name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")}
_REDUCTIONS = {f"relax.{name}" for name in ("mean", "sum", "max", "min")}


def channels_last(module: Any) -> Any:
    """*module* with the convolutions of main, and what can follow them, in channels-last layout."""
    pass_ = _ChannelsLast(module)
    main = module["main"]
    if isinstance(main.body, relax.SeqExpr):
        pass_.builder_.update_func(module.get_global_var("main"), pass_.visit_expr(main))
    return relax.transform.DeadCodeElimination()(pass_.builder_.get())


@mutator
class _ChannelsLast(PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._last: dict[Any, Any] = {}  # for a variable of the old function its value in channels-last layout
        self._restored: set[Any] = set()

    def visit_var_binding_(self, binding: Any) -> None:
        value = binding.value
        made = self._converted(value) if isinstance(value, Call) else None
        if made is None and isinstance(value, relax.Var) and value in self._last:
            made = self._last[value]
        if made is not None:
            last = self.builder_.emit(made)
            self._last[binding.var] = last
            if not isinstance(binding.var, relax.DataflowVar):
                self._restore(binding.var, output=self.builder_.current_block_is_dataflow())
            return
        plain = self._plain(value) if isinstance(binding.var, relax.DataflowVar) else None
        if plain is None and isinstance(value, Call) and isinstance(binding.var, relax.DataflowVar):
            plain = self._conv1d(value)
        if plain is not None:
            self.set_var_remap(binding.var, plain if isinstance(plain, relax.Var) else self.builder_.emit(plain))
            return
        for variable in relax.analysis.free_vars(value):
            self._restore(variable)
        super().visit_var_binding_(binding)

    def visit_match_cast_(self, binding: Any) -> None:
        for variable in relax.analysis.free_vars(binding.value):
            self._restore(variable)
        super().visit_match_cast_(binding)

    def _restore(self, variable: Any, *, output: bool = False) -> None:
        """Have the value of *variable* in its own layout."""
        if variable not in self._last or variable in self._restored:
            return
        value = relax.op.permute_dims(self._last[variable], list(_TO_FIRST))
        made = self.builder_.emit_output(value) if output else self.builder_.emit(value)
        self.set_var_remap(variable, made)
        self._restored.add(variable)

    def _converted(self, call: Any) -> Any | None:
        """*call* in channels-last layout; None where it stays as it is."""
        name = str(getattr(call.op, "name", ""))
        if name == "relax.nn.conv2d" and call.args[1] not in self._last:
            weights = self.visit_expr(call.args[1])
            return _conv2d(call, self._value(call.args[0], transpose=True), weights)
        if name == "relax.concat":
            return self._concat(call)
        if not any(isinstance(argument, relax.Var) and argument in self._last for argument in call.args):
            return None
        if name in _ELEMENTWISE:
            return self._elementwise(call)
        if name in ("relax.quantize", "relax.dequantize"):
            return self._quantization(call, name)
        rule = _RULES.get(name)
        return rule(call, self._value(call.args[0])) if rule is not None else None

    def _concat(self, call: Any) -> Any | None:
        parts = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
        last = [isinstance(part, relax.Var) and part in self._last for part in parts]
        if not any(last) or (not all(last) and last.count(True) < 2) or any(map(_is_constant, parts)):
            return None
        axis = _TO_LAST.index(int(call.attrs.axis) % 4)
        return relax.op.concat([self._value(part, transpose=True) for part in parts], axis)

    def _plain(self, value: Any) -> Any | None:
        """*value* in its own layout, of an operand that needs no transposition for it; None for anything else."""
        name = str(getattr(value.op, "name", "")) if isinstance(value, Call) else ""
        if name not in ("relax.permute_dims", "relax.reshape") or value.args[0] not in self._last:
            return None
        x = self._last[value.args[0]]
        if name == "relax.permute_dims":
            axes = [_TO_LAST.index(int(axis) % 4) for axis in value.attrs.axes or (3, 2, 1, 0)]
            return x if axes == [0, 1, 2, 3] else relax.op.permute_dims(x, axes)
        sizes = list(x.ty.shape)[1:3]
        single = all(isinstance(size, tirx.IntImm) and int(size) == 1 for size in sizes)
        return relax.op.reshape(x, value.args[1]) if single else None

    def _conv1d(self, call: Any) -> Any | None:
        """A convolution of sequences as one of images of a single row; None for any other call."""
        attrs = call.attrs
        if str(getattr(call.op, "name", "")) != "relax.nn.conv1d" or not _is_constant(call.args[1]):
            return None
        if attrs.data_layout != "NCW" or attrs.kernel_layout != "OIW":
            return None
        emit, x, weights = self.builder_.emit, self.visit_expr(call.args[0]), call.args[1].value.numpy()
        image = emit(relax.op.expand_dims(emit(relax.op.permute_dims(x, [0, 2, 1])), [1]))
        left, right = (int(p) for p in attrs.padding)
        y = relax.op.nn.conv2d(
            image, relax.const(weights[:, :, None], str(weights.dtype)), [1, *attrs.strides], [0, left, 0, right],
            [1, *attrs.dilation], attrs.groups, "NHWC", "OIHW", "NHWC",
        )  # fmt: skip
        return relax.op.permute_dims(emit(relax.op.squeeze(emit(y), [1])), [0, 2, 1])

    def _value(self, argument: Any, *, transpose: bool = False) -> Any:
        """*argument* in channels-last layout, of which there is one unless *transpose*."""
        if isinstance(argument, relax.Var) and argument in self._last:
            return self._last[argument]
        assert transpose
        return self.builder_.emit(relax.op.permute_dims(self.visit_expr(argument), list(_TO_LAST)))

    def _elementwise(self, call: Any) -> Any | None:
        made = []
        for argument in call.args:
            rank = _rank(argument)
            if isinstance(argument, relax.Var) and argument in self._last:
                made.append(self._last[argument])
            elif rank is None or rank == 0:
                made.append(self.visit_expr(argument))
            elif _is_constant(argument):
                array = argument.value.numpy()
                full = array.reshape((1,) * (4 - array.ndim) + array.shape)
                made.append(relax.const(np.ascontiguousarray(full.transpose(_TO_LAST)), str(array.dtype)))
            elif rank == 4:
                made.append(self._value(argument, transpose=True))
            else:
                return None
        return Call(call.op, made, call.attrs, call.ty_args)

    def _quantization(self, call: Any, name: str) -> Any | None:
        operator = relax.op.quantize if name == "relax.quantize" else relax.op.dequantize
        if _rank(call.args[0]) != 4:
            return None
        axis = _TO_LAST.index(int(call.attrs.axis) % 4)
        return operator(self._value(call.args[0]), call.args[1], call.args[2], axis, str(call.attrs.out_dtype))


def _conv2d(call: Any, x: Any, weights: Any) -> Any:
    attrs = call.attrs
    return relax.op.nn.conv2d(
        x, weights, attrs.strides, attrs.padding, attrs.dilation, attrs.groups, "NHWC", "OIHW", "NHWC",
    )  # fmt: skip


def _pool(call: Any, x: Any) -> Any | None:
    attrs = call.attrs
    if attrs.layout != "NCHW":
        return None
    if call.op.name == "relax.nn.adaptive_avg_pool2d":
        return relax.op.nn.adaptive_avg_pool2d(x, attrs.output_size, "NHWC")
    operator = relax.op.nn.max_pool2d if call.op.name == "relax.nn.max_pool2d" else relax.op.nn.avg_pool2d
    return operator(
        x, attrs.pool_size, attrs.strides, attrs.padding, attrs.dilation, attrs.ceil_mode, attrs.count_include_pad,
        "NHWC",
    )  # fmt: skip


def _reduce(call: Any, x: Any) -> Any | None:
    axes = [int(axis) % 4 for axis in call.attrs.axis or []]
    if not axes or not call.attrs.keepdims:
        return None
    operator = getattr(relax.op, call.op.name.split(".")[-1])
    return operator(x, sorted(_TO_LAST.index(axis) for axis in axes), True)


def _slice(call: Any, x: Any) -> Any | None:
    if not isinstance(call.args[1], relax.Tuple):
        return None
    axes = [_TO_LAST.index(int(axis) % 4) for axis in call.args[1].fields]
    return relax.op.strided_slice(x, axes, *call.args[2:], assume_inbound=bool(call.attrs.assume_inbound))


def _pad(call: Any, x: Any) -> Any | None:
    widths = [int(width) for width in call.attrs.pad_width]
    pairs = [widths[2 * d : 2 * d + 2] for d in _TO_LAST]
    return relax.op.nn.pad(x, [w for pair in pairs for w in pair], call.attrs.pad_mode, call.attrs.pad_value)


_RULES: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "relax.nn.pad": _pad,
    "relax.strided_slice": _slice,
}


def _rank(value: Any) -> int | None:
    ty = value.ty
    return int(ty.ndim) if isinstance(ty, relax.TensorType) else None


def _is_constant(value: Any) -> bool:
    return isinstance(value, GenericConst) and isinstance(value.value, tvm.runtime.Tensor)
