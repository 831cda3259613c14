"""Functions that int8 programs call: ATen's kernels for quantized tensors, over plain integer tensors.

Those kernels want a tensor that carries its scale. Making one around the same memory costs 3 µs; ``int_repr`` and its
like would copy. Every function gives new memory (``gives_new_memory``), laid out like its first argument.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_quantized = torch.ops.quantized
_add, _add_relu = _quantized.add.default._op, _quantized.add_relu.default._op
_mul, _max_pool2d = _quantized.mul.default._op, _quantized.max_pool2d.default._op
_hardswish, _leaky_relu = _quantized.hardswish.default._op, _quantized.leaky_relu.default._op
_quantize = torch.ops.aten.quantize_per_tensor.default._op
_KINDS = {torch.uint8: torch.quint8, torch.int8: torch.qint8}

Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


def _fresh(function: Function) -> Function:
    function.gives_new_memory = True  # type: ignore[attr-defined]
    return function


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


@_fresh
def quantize(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    """``quantize_per_tensor`` over the whole range of *dtype* (uint8 or int8), for *x* of any float dtype."""
    return integers(_quantize(x.float(), scale, zero_point, _KINDS[dtype]))


@_fresh
def dequantize(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """``dequantize_per_tensor`` to float32."""
    return with_scale(q, scale, zero_point).dequantize()


@_fresh
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


@_fresh
def add(a: torch.Tensor, sa: float, za: int, b: torch.Tensor, sb: float, zb: int, s: float, z: int) -> torch.Tensor:
    """A + b, each with its scale and zero point, the result with *s* and *z*. Broadcasts."""
    return integers(_add(with_scale(a, sa, za), with_scale(b, sb, zb), s, z))


@_fresh
def add_relu(
    a: torch.Tensor, sa: float, za: int, b: torch.Tensor, sb: float, zb: int, s: float, z: int
) -> torch.Tensor:
    """relu(a + b)."""
    return integers(_add_relu(with_scale(a, sa, za), with_scale(b, sb, zb), s, z))


@_fresh
def mul(a: torch.Tensor, sa: float, za: int, b: torch.Tensor, sb: float, zb: int, s: float, z: int) -> torch.Tensor:
    """A · b. Broadcasts."""
    return integers(_mul(with_scale(a, sa, za), with_scale(b, sb, zb), s, z))


@_fresh
def hardswish(q: torch.Tensor, sq: float, zq: int, s: float, z: int) -> torch.Tensor:
    """Hardswish of *q*, the result with *s* and *z*."""
    return integers(_hardswish(with_scale(q, sq, zq), s, z))


@_fresh
def leaky_relu(q: torch.Tensor, sq: float, zq: int, s: float, z: int, slope: float) -> torch.Tensor:
    """Leaky ReLU of *q*, the result with *s* and *z*."""
    return integers(_leaky_relu(with_scale(q, sq, zq), slope, False, s, z))
