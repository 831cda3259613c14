"""Calls of mathematical functions in kernels, written out: TVM would call NVIDIA's library, which it does not have.

float32 by _tvm_device_functions, float16 through float32. What is unknown here is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from fxopt.backends._tvm_device_functions import FUNCTIONS
from fxopt.backends._tvm_loops import Expr, name_of

_HALF = ("float16", "bfloat16")
_ROUNDED = ("sqrt", "floor", "ceil", "round", "nearbyint", "trunc", "fabs")  # by instructions, of 32 and 64 bits


def write(call: Any) -> Any:
    """*call* written out, if it is a function of floats that is known here; vectors lane by lane."""
    name, dtype = name_of(call), _float(call)
    narrow = dtype in _HALF and name in _ROUNDED
    if not narrow and (name not in FUNCTIONS or dtype not in ("float32", *_HALF)):
        return call
    lanes = int(call.args[0].ty.dtype.lanes)
    own = str(call.ty.dtype).partition("x")[0]
    given = [tirx.Var(f"{name}_{i}", argument.ty) for i, argument in enumerate(call.args)]
    results = []
    for lane in range(lanes):
        values = [
            variable if lanes == 1 else tirx.Shuffle([variable], [tirx.IntImm("int32", lane)]) for variable in given
        ]
        results.append(_of_lane(name, values, own))
    value = results[0] if lanes == 1 else tirx.Shuffle(results, [tirx.IntImm("int32", lane) for lane in range(lanes)])
    for variable, argument in zip(given, call.args, strict=True):
        value = tirx.Let(variable, argument, value)
    return value


def _of_lane(name: str, values: Sequence[Expr], dtype: str) -> Expr:
    """Function *name* in float32, of scalars of any width; the result in *dtype*."""
    wide = [tirx.Var(f"{name}_{i}", "float32") for i in range(len(values))]
    function = FUNCTIONS.get(name) or getattr(tirx, "abs" if name == "fabs" else name)
    result = function(*wide)
    for variable, value in zip(wide, values, strict=True):
        result = tirx.Let(variable, tirx.Cast("float32", value), result)
    return result if str(result.ty.dtype) == dtype else tirx.Cast(dtype, result)


def _float(call: Any) -> str:
    """Dtype that *call* computes with."""
    return str(call.args[0].ty.dtype) if len(call.args) and hasattr(call.args[0].ty, "dtype") else ""
