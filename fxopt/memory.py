"""How tensors lie in memory, and which of them share it: what is written to one of those shows in the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias

import torch

# The dimensions from the outermost to the innermost one in memory, or the strides of a tensor with gaps.
Layout: TypeAlias = tuple[str, tuple[int, ...]]


def overlap(values: Sequence[Any], written: Collection[int]) -> tuple[int, int] | None:
    """Indices of two *values* that share memory, the first of them among the *written* ones; None if there are none.

    Bounds alone are compared: views that interleave without touching count as sharing. A tensor that holds one
    element in several places, as ``expand`` makes them, shares memory with itself.
    """
    spans = [span(x) if isinstance(x, torch.Tensor) else None for x in values]
    for i in written:
        own = spans[i]
        if own is None:
            continue
        for j, other in enumerate(spans):
            if i != j and other is not None and own[0] < other[1] and other[0] < own[1]:
                return i, j
        if any(size > 1 and stride == 0 for size, stride in zip(values[i].shape, values[i].stride(), strict=True)):
            return i, i
    return None


def clusters(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The *tensors*, each once, those that share memory together."""
    groups, spans = list[list[torch.Tensor]](), list[tuple[int, int, torch.Tensor]]()
    for x in {id(x): x for x in tensors}.values():
        bounds = span(x)
        if bounds is None:
            groups.append([x])
        else:
            spans.append((*bounds, x))
    end = 0
    for first, last, x in sorted(spans, key=lambda entry: entry[:2]):
        if first >= end:
            groups.append([])
        groups[-1].append(x)
        end = max(end, last)
    return groups


def span(x: torch.Tensor) -> tuple[int, int] | None:
    """First address of a dense tensor, and the one after its last; None for a tensor without memory of its own."""
    if x.layout is not torch.strided or x.numel() == 0 or x.device.type == "meta":
        return None
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def own_copy(x: torch.Tensor) -> torch.Tensor:
    """A copy of *x* in memory of its own, with the strides that *x* has where it is dense or has gaps."""
    if x.layout is not torch.strided or x.is_quantized or 0 in x.stride():
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def layout(x: torch.Tensor) -> Layout:
    """The :data:`Layout` of a strided tensor."""
    strides = x.stride()
    order = tuple(sorted(range(x.dim()), key=lambda axis: (-strides[axis], axis)))
    return ("dense", order) if _is_dense(x, order) else ("strided", strides)


def fits(x: torch.Tensor, wanted: Layout) -> bool:
    """Whether *x* lies in memory as *wanted*; dimensions of size 1 do not count."""
    kind, numbers = wanted
    if kind == "dense":
        return _is_dense(x, numbers)
    return all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), numbers, strict=True))


def _is_dense(x: torch.Tensor, order: Sequence[int]) -> bool:
    expected = 1
    for axis in reversed(order):
        if x.shape[axis] != 1 and x.stride(axis) != expected:
            return False
        expected *= x.shape[axis]
    return True
