"""ONNX's Resize where TVM's importer is wrong, as sums of a few elements with weights, one axis after the other.

    y[o] = Σ_k weights[k, o] · x[places[k, o]]        the tables are made here, for sizes that are known

TVM takes a scale for the quotient of the sizes, which it is not where they are rounded (7·1.7 → 11), and knows no
antialiasing and no sizes that are computed from those of other tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm_ffi
from tvm import relax, te

from fxopt.backends._tvm_loops import static
from fxopt.backends._tvm_packing import constant, number

Array = np.ndarray[Any, Any]
_RADIUS = {"nearest": 0, "linear": 1, "cubic": 2}  # how far from its place a value has weight, in elements
_ROUNDED: dict[str, Callable[[Array], Array]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda at: np.ceil(at - 0.5),
    "round_prefer_ceil": lambda at: np.floor(at + 0.5),
}
_WIDER = {"float16": "float32", "bfloat16": "float32"}  # what sums are computed in


def resize(bb: Any, inputs: Any, attrs: Any) -> Any:
    """The resized tensor; None where TVM's own importer is right.

    Raises:
        ValueError: it is neither; with the reason.
    """
    x, how = inputs[0], _How.of(attrs)
    scales, sizes = [inputs[i] if len(inputs) > i else None for i in (2, 3)]
    axes = _axes(list(x.ty.shape), scales, sizes)
    if not axes:
        return x
    if any(static(one.size) is None or static(one.count) is None for one in axes):
        return _open(x, axes, how)
    if not isinstance(sizes, relax.ShapeExpr) and all(one.is_exact(how) for one in axes):
        return None
    dtype = str(x.ty.dtype)
    if how.mode != "nearest" and "float" not in dtype:
        raise ValueError(f"it interpolates between elements of {dtype}")
    y = bb.emit(relax.op.astype(x, _WIDER[dtype])) if dtype in _WIDER else x
    for one in axes:
        y = _along(bb, y, one.axis, *_taps(int(one.size), int(one.count), one.scale, how))
    return bb.emit(relax.op.astype(y, dtype)) if dtype in _WIDER else y


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis that gets another size: *count* for *size*, by the scale *given*; 0 where that is their quotient."""

    axis: int
    size: Any
    count: Any
    given: float = 0.0

    @property
    def scale(self) -> float:
        return self.given or int(self.count) / int(self.size)

    def is_exact(self, how: _How) -> bool:
        """Whether TVM's importer is right."""
        if how.antialias or (how.coordinates == "align_corners" and int(self.count) == 1):
            return False
        return not self.given or int(self.count) == int(self.size) * self.given


@dataclasses.dataclass(frozen=True)
class _How:
    """The attributes of the operator."""

    mode: str
    coordinates: str
    rounding: str
    cubic: float
    inside: bool
    antialias: bool

    @staticmethod
    def of(attrs: Any) -> _How:
        def text(name: str, otherwise: str) -> str:
            value = attrs.get(name, otherwise)
            return value.decode("ascii") if isinstance(value, bytes) else str(value)

        return _How(
            text("mode", "nearest"),
            text("coordinate_transformation_mode", "half_pixel"),
            text("nearest_mode", "round_prefer_floor"),
            float(attrs.get("cubic_coeff_a", -0.75)),
            bool(attrs.get("exclude_outside", 0)),
            bool(attrs.get("antialias", 0)),
        )

    def weight(self, distance: Array) -> Array:
        """Of elements at these distances from the place of a result."""
        d, a = abs(distance), self.cubic
        if self.mode == "linear":
            return np.where(d <= 1, 1 - d, 0)
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((d - 5) * d + 8) * d * a - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0))


def _axes(shape: list[Any], scales: Any, sizes: Any) -> list[_Axis]:
    """The axes that are resized, by *scales* or to *sizes*."""
    if sizes is not None:
        held = constant(sizes)
        if held is None and not isinstance(sizes, relax.ShapeExpr):
            raise ValueError("its size is known only when the model runs")
        counts = [number(int(n)) for n in held] if held is not None else list(sizes.values)
        pairs = enumerate(zip(shape, counts, strict=True))
        return [_Axis(axis, old, new) for axis, (old, new) in pairs if not tvm_ffi.structural_equal(old, new)]
    held = constant(scales)
    if held is None:
        raise ValueError("its scales are known only when the model runs")
    factors = [float(str(factor)) for factor in held]  # 1.7 and not its nearest float32: its inverse rounds otherwise
    resized = [(axis, shape[axis], factor) for axis, factor in enumerate(factors) if factor != 1]
    if all(static(size) is not None for _, size, _ in resized):
        return [_Axis(axis, size, number(math.floor(int(size) * factor)), factor) for axis, size, factor in resized]
    if not all(factor.is_integer() for factor in factors):
        raise ValueError("a scale that is no whole number needs sizes that are known")
    return [_Axis(axis, size, size * int(factor), factor) for axis, size, factor in resized]


def _open(x: Any, axes: list[_Axis], how: _How) -> Any:
    """*x* of sizes that are open, resized by TVM."""
    if how.antialias:
        raise ValueError("antialiasing needs sizes that are known")
    if len(x.ty.shape) != 4 or any(one.axis < 2 for one in axes):
        raise ValueError("sizes that are open can be resized in images only")
    counts = {one.axis: one.count for one in axes}
    return relax.op.image.resize2d(
        x,
        size=relax.ShapeExpr([counts.get(axis, x.ty.shape[axis]) for axis in (2, 3)]),
        layout="NCHW",
        method={"nearest": "nearest_neighbor"}.get(how.mode, how.mode),
        coordinate_transformation_mode=how.coordinates,
        rounding_method=how.rounding,
        cubic_alpha=how.cubic,
        cubic_exclude=how.inside,
    )


def _taps(size: int, count: int, scale: float, how: _How) -> tuple[Array, Array]:
    """Which of *size* elements each of *count* results is made of, and with which weights: both [taps, count]."""
    real: Any = np.float32 if how.mode == "nearest" else np.float64  # torch decides in float32 what is nearest
    step, results = real(1 / scale), np.arange(count, dtype=real)
    at: Array
    if how.coordinates == "align_corners":
        at = results * real((size - 1) / max(count - 1, 1))
    elif how.coordinates == "asymmetric":
        at = results * step
    elif how.coordinates == "half_pixel" or (how.coordinates == "pytorch_half_pixel" and count > 1):
        at = (results + real(0.5)) * step - real(0.5)
    elif how.coordinates == "pytorch_half_pixel":
        at = results
    else:
        raise ValueError(f"coordinates {how.coordinates!r} are not known here")
    if how.mode == "nearest":
        places = _ROUNDED[how.rounding](at).astype(np.int64)[None]
        return places.clip(0, size - 1), np.ones(places.shape)
    stretch = max(1.0, 1 / scale) if how.antialias else 1.0  # a result covers so many elements
    radius = _RADIUS[how.mode] * stretch
    places = np.floor(at - radius).astype(np.int64) + 1 + np.arange(2 * math.ceil(radius))[:, None]
    weights = how.weight((places - at) / stretch)
    if how.inside:
        weights = np.where((places >= 0) & (places < size), weights, 0)
    if how.inside or how.antialias:
        weights = weights / weights.sum(0)
    return places.clip(0, size - 1), weights


def _along(bb: Any, x: Any, axis: int, places: Array, weights: Array) -> Any:
    """Sums of *weights* times the elements at *places* of *axis*; both are [taps, count]."""
    taps, count = places.shape

    def compute(x: Any, places: Any, weights: Any) -> Any:
        k = te.reduce_axis((0, number(taps)), "k")

        def element(*i: Any) -> Any:
            at = [*i[:axis], places[k.var, i[axis]], *i[axis + 1 :]]
            return te.sum(x[tuple(at)] * weights[k.var, i[axis]], axis=k)

        return te.compute([*x.shape[:axis], number(count), *x.shape[axis + 1 :]], element, name="resized")

    dtype = str(x.ty.dtype)
    tables = relax.const(places, "int64"), relax.const(weights.astype(dtype), dtype)
    return bb.emit_te(compute, x, *tables, primfunc_name_hint="resize")
