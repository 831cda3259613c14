"""Pooling with what AveragePool and MaxPool of ONNX do not know, or not as eager means it.

    avg_pool with a divisor        the mean, times window / divisor
    windows that leave the input   the mean over the input with zeros around it, divided by the mean over ones with
                                   zeros where eager does not count
    a ceil mode without effect     the floor mode: ONNX adds a window that begins in the padding on the right

Each function takes the arguments of its op. NotImplemented leaves a call to the exporter's own translation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Size = int | torch.SymInt


def avg_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Average pooling with a divisor of its own, or with windows that leave the padded input."""
    dims = len(kernel_size) if len(kernel_size) > 1 else len(x.shape) - 2
    kernel, pad = _each(kernel_size, dims), _each(padding, dims)
    step = _each(stride, dims) if stride else kernel
    beyond = _beyond(x.shape[-dims:], kernel, step, pad) if ceil_mode else [0] * dims
    if beyond is None or (divisor_override is None and (not ceil_mode or (any(beyond) and not any(pad)))):
        return NotImplemented
    pool: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    if divisor_override is None and not any(beyond):
        return pool(x, kernel, step, pad, False, count_include_pad)
    around = [n for p, more in zip(reversed(pad), reversed(beyond), strict=True) for n in (p, p + more)]

    def mean(x: Tensor, around: Sequence[int]) -> Any:
        return pool(F.pad(x, around) if any(around) else x, kernel, step)

    if divisor_override is not None:
        return mean(x, around) * (math.prod(kernel) / divisor_override)
    ones = x.new_ones((1, *(() if x.dim() == dims + 1 else (1,)), *x.shape[-dims:]))
    if not count_include_pad:
        return mean(x, around) / mean(ones, around)
    ones = F.pad(ones, [n for p in reversed(pad) for n in (p, p)], value=1.0)
    return mean(x, around) / mean(ones, [n for more in reversed(beyond) for n in (0, more)])


def max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    """Max pooling whose ceil mode adds no window: ONNX counts one that begins in the padding on the right, too."""
    dims = len(kernel_size) if len(kernel_size) > 1 else len(x.shape) - 2
    kernel, pad, apart = _each(kernel_size, dims), _each(padding, dims), _each(dilation, dims)
    step = _each(stride, dims) if stride else kernel
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, apart, strict=True)]
    if not ceil_mode or _beyond(x.shape[-dims:], reach, step, pad) != [0] * dims:
        return NotImplemented
    pool: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]
    return pool(x, kernel, step, pad, apart)


def _beyond(sizes: Sequence[Size], kernel: list[int], step: list[int], pad: list[int]) -> list[int] | None:
    """How far the last window of each dimension reaches past the padded input; None where sizes are not known."""
    beyond = []
    for size, k, s, p in zip(sizes, kernel, step, pad, strict=True):
        if not isinstance(size, int):
            return None
        last = -(-(size + 2 * p - k) // s)
        last -= last * s >= size + p  # a window that would begin in the padding on the right is none
        beyond.append(max(last * s + k - size - 2 * p, 0))
    return beyond


def _each(values: Sequence[int], dims: int) -> list[int]:
    return list(values) * dims if len(values) == 1 else list(values)
