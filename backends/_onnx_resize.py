"""Interpolation by a scale that is not the quotient of the sizes, where the exporter's translation drops the scale.

upsample_linear1d(x, scale_factor=1.7)                   7 elements → 11, at places 1/1.7 apart and not 7/11
_upsample_bilinear2d_aa(x, scale_factor=(0.4, 0.4))      likewise, with antialiasing
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

aten = torch.ops.aten
_ANTIALIASED = {"antialias": 1, "exclude_outside": 1}  # torch leaves out what would be beyond the border


_LINEAR = {"mode": "linear"}
_BILINEAR = {"mode": "linear", **_ANTIALIASED}
_BICUBIC = {"mode": "cubic", "cubic_coeff_a": -0.5, **_ANTIALIASED}  # torch has -0.75 without antialiasing


def register(registry: ONNXRegistry) -> None:
    """Add the translations to *registry*."""
    registry.register_op(aten.upsample_linear1d.vec, _by_factors(_LINEAR))
    registry.register_op(aten._upsample_bilinear2d_aa.vec, _by_factors(_BILINEAR))
    registry.register_op(aten._upsample_bicubic2d_aa.vec, _by_factors(_BICUBIC))
    registry.register_op(aten.upsample_linear1d.default, _of_lines)
    registry.register_op(aten._upsample_bilinear2d_aa.default, _of_images(_BILINEAR))
    registry.register_op(aten._upsample_bicubic2d_aa.default, _of_images(_BICUBIC))


def _by_factors(how: dict[str, Any]) -> Callable[..., Any]:
    def translated(x: Any, output_size: Any, align_corners: bool, scale_factors: Sequence[float] | None = None) -> Any:
        return _resized(x, output_size, align_corners, scale_factors or [None], how)

    return translated


def _of_lines(x: Any, output_size: Any, align_corners: bool, scales: float | None = None) -> Any:
    return _resized(x, output_size, align_corners, [scales], _LINEAR)


def _of_images(how: dict[str, Any]) -> Callable[..., Any]:
    def translated(
        x: Any, output_size: Any, align_corners: bool, scales_h: float | None = None, scales_w: float | None = None
    ) -> Any:
        return _resized(x, output_size, align_corners, [scales_h, scales_w], how)

    return translated


def _resized(x: Any, size: Any, align_corners: bool, scales: Sequence[float | None], how: dict[str, Any]) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    if align_corners and "antialias" in how:
        raise ValueError("its Resize has no antialiasing between aligned corners as torch computes it")
    how = {**how, "coordinate_transformation_mode": "align_corners" if align_corners else "half_pixel"}
    if None not in scales:
        factors = op.Constant(value_floats=[1.0, 1.0, *(scale for scale in scales if scale is not None)])
        return op.Resize(x, None, factors, None, **how)
    sizes = op.Concat(op.Shape(x, start=0, end=2), op.Cast(size, to=7), axis=0)  # int64
    return op.Resize(x, None, None, sizes, **how)
