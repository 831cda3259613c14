"""From an ONNX file to a Relax module of fused functions with loops of ours.

from_onnx → constants folded → channels last → operators as stages → fused → scheduled → weights as parameters
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from fxopt.backends._tvm_int8 import integers, quantize
from fxopt.backends._tvm_layout import channels_last
from fxopt.backends._tvm_operators import operators
from fxopt.backends._tvm_packing import array, constant
from fxopt.backends._tvm_schedule import schedule
from fxopt.backends._tvm_target import Machine
from fxopt.backends._tvm_workloads import Tiles

EMBEDDED = 64  # numbers; constants up to here stay in the code


def optimize(module: Any, machine: Machine, tiles: Tiles) -> Any:
    """The imported *module* in the form that is compiled, its kernels of the sizes that *tiles* chooses."""
    module = channels_last(relax.transform.DeadCodeElimination()(fold(module)))
    module = integers(fold(relax.transform.CanonicalizeBindings()(module)))
    module = _each_function(module, {**_EVALUATE, "relax.dequantize": (3, _dequantize)})  # what is not multiplied so
    passes = [
        relax.transform.CanonicalizeBindings(),  # constants to where they are read
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps({**operators(machine, tiles), "relax.quantize": quantize}),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.DeadCodeElimination(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.RewriteDataflowReshape(),  # which wants functions without loops of ours
    ]
    return scheduled(tvm.transform.Sequential(passes)(module), machine)


def scheduled(module: Any, machine: Machine) -> Any:
    """*module* with loops of ours in every function that there is a rule for."""
    for variable, function in list(module.functions.items()):
        if isinstance(function, tirx.PrimFunc):
            made = schedule(function, machine.lanes)
            if made is not None:
                module.update_func(variable, made)
    return module


def fold(module: Any) -> Any:
    """Reshaped and transposed constants computed, and clamps that the importer wrote as loops back as operators."""
    return _each_function(module, _EVALUATE)


def _each_function(module: Any, rules: dict[str, Any]) -> Any:
    functions = [(v, f) for v, f in module.functions.items() if isinstance(f, relax.Function)]
    folder = _Fold(module, rules)
    for variable, function in functions:
        folder.builder_.update_func(variable, folder.visit_expr(function))
    return folder.builder_.get()


def _dequantize(call: Any, x: Any, scale: Any, zero: Any) -> Any:
    shape = [1] * x.ndim
    if scale.size > 1:
        shape[int(call.attrs.axis) % x.ndim] = scale.size
    elif zero.size > 1:
        return None
    zero = zero.reshape(shape) if zero.size > 1 else zero.reshape(())
    scale = scale.reshape(shape) if scale.size > 1 else scale.reshape(())
    return ((x.astype(np.int64) - zero.astype(np.int64)) * scale.astype(np.float64)).astype(np.float32)


@mutator
class _Fold(PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: Any, rules: dict[str, Any]) -> None:
        super().__init__(module)
        self._rules = rules

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        name = str(getattr(call.op, "name", ""))
        if name == "relax.call_tir":
            return self._extremum(call)
        evaluate = self._rules.get(name)
        if evaluate is None:
            return call
        values = [constant(self._known(argument)) for argument in call.args[: evaluate[0]]]
        if any(value is None for value in values):
            return call
        result = evaluate[1](call, *values)
        return call if result is None else relax.const(np.array(result, order="C"), str(result.dtype))

    def _known(self, value: Any) -> Any:
        bound = self.lookup_binding(value) if isinstance(value, relax.Var) else None
        return value if bound is None else bound

    def _extremum(self, call: Any) -> Any:
        """``call_tir(maximum, (x, c))``, which the importer makes of Clip, as an operator again."""
        function = self.builder_.get()[call.args[0]]
        operands = list(call.args[1].fields)
        hint = call.args[0].name_hint.rstrip("0123456789_")
        operator = {"maximum": relax.op.maximum, "minimum": relax.op.minimum}.get(hint)
        if operator is None or not isinstance(function, tirx.PrimFunc) or len(operands) != 2:
            return call
        return operator(*operands)


def _shape(call: Any) -> tuple[int, ...] | None:
    sizes = call.ty.shape
    return tuple(int(s) for s in sizes) if all(isinstance(s, tirx.IntImm) for s in sizes) else None


_EVALUATE: dict[str, Any] = {
    "relax.reshape": (1, lambda call, x: None if _shape(call) is None else x.reshape(_shape(call))),
    "relax.permute_dims": (
        1,
        lambda call, x: x.transpose([int(a) for a in call.attrs.axes] if call.attrs.axes else None),
    ),
    "relax.expand_dims": (1, lambda call, x: x.reshape(_shape(call))),
    "relax.dequantize": (3, lambda call, x, s, z: _dequantize(call, x, s, z) if x.dtype == np.int32 else None),
    "relax.squeeze": (1, lambda call, x: x.reshape(_shape(call))),
    "relax.add": (2, lambda call, x, y: x + y if x.size <= EMBEDDED else None),
    "relax.less": (2, lambda call, x, y: x < y if x.size <= EMBEDDED else None),
    "relax.where": (3, lambda call, c, x, y: np.where(c, x, y) if c.size <= EMBEDDED else None),
}


def lower() -> Any:
    """The pass that makes calls and memory of the virtual machine explicit: TVM's own, without what was done before."""
    return tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def lift_weights(module: Any) -> tuple[Any, list[Any]]:
    """*module* with the larger constants of main as parameters after its inputs, and their values."""
    lifter = _Lift(module)
    main = module["main"]
    lifter.builder_.update_func(module.get_global_var("main"), lifter.lift(main))
    return lifter.builder_.get(), lifter.values


@mutator
class _Lift(PyExprMutator):  # type: ignore[misc]
    def lift(self, main: Any) -> Any:
        self.values: list[Any] = []
        self.added: list[Any] = []
        self.seen: dict[int, Any] = {}
        body = self.visit_expr(main.body)
        made = relax.Function([*main.params, *self.added], body, main.ret_ty, main.is_pure, main.attrs)
        return made.with_attr("num_input", len(main.params))

    def visit_generic_const_(self, expr: Any) -> Any:
        value = expr.value
        if not isinstance(value, tvm.runtime.Tensor) or array(value).size <= EMBEDDED:
            return expr
        key = torch.utils.dlpack.from_dlpack(value).data_ptr()
        if key not in self.seen:
            self.seen[key] = relax.Var(f"weight_{len(self.values)}", expr.ty)
            self.values.append(value)
            self.added.append(self.seen[key])
        return self.seen[key]
