"""Functions that int8 programs call: ATen's kernels for quantized tensors, over plain integer tensors.

Those kernels want a tensor that carries its scale. Making one around the same memory costs 3 µs; ``int_repr`` and its
like would copy. Every function gives new memory (``gives_new_memory``), laid out like its first argument.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

_quantized = torch.ops.quantized
_add, _mul = _quantized.add.default._op, _quantized.mul.default._op
_max_pool2d = _quantized.max_pool2d.default._op
_hardswish, _leaky_relu = _quantized.hardswish.default._op, _quantized.leaky_relu.default._op
_quantize = torch.ops.aten.quantize_per_tensor.default._op
_linear_dynamic, _qlinear = _quantized.linear_dynamic.default._op, torch.ops.onednn.qlinear_pointwise.default._op
_KINDS = {torch.uint8: torch.quint8, torch.int8: torch.qint8}

# 16 bits as 256 · (high − 128) + (low − 128): the largest value that keeps both bytes in range, and what zero is.
_PLANE_STEPS, _PLANE_ZERO = 32512.0, 32896

Function = TypeVar("Function", bound=Callable[..., Any])


def fresh(function: Function) -> Function:
    """Mark *function* as one whose result shares no memory with its arguments."""
    function.gives_new_memory = True  # type: ignore[attr-defined]
    return function


class PackedLinear:
    """A linear's weight and bias in the form of ATen's own int8 linears.

    Attributes:
        packed: that form.
        nbytes: bytes of the weight in it.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        """*values*: int8, [out, in]; *scales*: one for each output."""
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)
        self.packed = _quantized.linear_prepack(weight, bias)
        self.nbytes = values.numel()

    def unpacked(self) -> torch.Tensor:
        """The integers."""
        values: torch.Tensor = _quantized.linear_unpack(self.packed)[0].int_repr()
        return values


def with_scale(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """The integers *q* as a quantized tensor over the same memory."""
    shell = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=_KINDS[q.dtype])
    return shell.set_(q.untyped_storage(), q.storage_offset(), q.shape, q.stride())


def integers(x: torch.Tensor) -> torch.Tensor:
    """The integers of a quantized tensor, over the same memory."""
    dtype = torch.uint8 if x.dtype is torch.quint8 else torch.int8
    return torch.empty(0, dtype=dtype).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


with warnings.catch_warnings():
    # PyTorch warns once in a process that tensors with a scale will go one day.
    warnings.simplefilter("ignore")
    with_scale(torch.zeros(1, dtype=torch.uint8), 1.0, 0)


@fresh
def quantize(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    """``quantize_per_tensor`` over the whole range of *dtype* (uint8 or int8), for *x* of any float dtype."""
    return integers(_quantize(x.float(), scale, zero_point, _KINDS[dtype]))


@fresh
def quantize_dynamic(x: torch.Tensor, low: int, high: int, eps: float) -> tuple[torch.Tensor, float, int]:
    """*x* over its own range: uint8 integers from *low* to *high*, scale and zero point, as ``choose_qparams``."""
    x = x.float()
    smallest, largest = torch.aminmax(x)
    bottom, top = min(smallest.item(), 0.0), max(largest.item(), 0.0)
    scale = max((top - bottom) / (high - low), eps)
    if not math.isfinite(scale):
        return torch.zeros_like(x, dtype=torch.uint8), math.nan, 0
    zero_point = min(max(low - round(bottom / scale), low), high)
    q = integers(_quantize(x, scale, zero_point, torch.quint8))
    return (q if (low, high) == (0, 255) else q.clamp_(low, high)), scale, zero_point


@fresh
def linear_dynamic(x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
    """A linear over *x* quantized to the whole of uint8 over its own range; float32."""
    return _linear_dynamic(x.float(), weight.packed, False)  # type: ignore[no-any-return]


@fresh
def linear_by_planes(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """A linear of float activations, each row held in 16 bits, by an int8 *weight* packed for oneDNN; float32."""
    steps = _PLANE_STEPS / x.float().abs().amax(-1, keepdim=True).clamp_min_(1e-30)
    wide = (x * steps).round_().add_(_PLANE_ZERO).to(torch.uint16)
    planes = wide.view(torch.uint8).unflatten(-1, (-1, 2)).movedim(-1, 0).contiguous()
    y = _qlinear(planes, 1.0, 128, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", (), "")
    return torch.add(y[0], y[1], alpha=256.0).div_(steps)


@fresh
def dequantize(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """``dequantize_per_tensor`` to float32."""
    return with_scale(q, scale, zero_point).dequantize()


@fresh
def max_pool2d(
    q: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    """``aten.max_pool2d`` of integers, which ATen itself refuses."""
    return integers(_max_pool2d(with_scale(q, 1.0, 0), kernel_size, stride, padding, dilation, ceil_mode))


@fresh
def add(a: torch.Tensor, sa: float, za: int, b: torch.Tensor, sb: float, zb: int, s: float, z: int) -> torch.Tensor:
    """A + b, each with its scale and zero point, the result with *s* and *z*. Broadcasts."""
    return integers(_add(with_scale(a, sa, za), with_scale(b, sb, zb), s, z))


@fresh
def mul(a: torch.Tensor, sa: float, za: int, b: torch.Tensor, sb: float, zb: int, s: float, z: int) -> torch.Tensor:
    """A · b. Broadcasts."""
    return integers(_mul(with_scale(a, sa, za), with_scale(b, sb, zb), s, z))


@fresh
def hardswish(q: torch.Tensor, sq: float, zq: int, s: float, z: int) -> torch.Tensor:
    """Hardswish of *q*, the result with *s* and *z*."""
    return integers(_hardswish(with_scale(q, sq, zq), s, z))


@fresh
def leaky_relu(q: torch.Tensor, sq: float, zq: int, s: float, z: int, slope: float) -> torch.Tensor:
    """Leaky ReLU of *q*, the result with *s* and *z*."""
    return integers(_leaky_relu(with_scale(q, sq, zq), slope, False, s, z))
