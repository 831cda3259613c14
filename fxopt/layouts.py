"""Models that answer by the strides of their inputs (``is_contiguous``, ``as_strided``), which no graph shows.

Almost no model does, and those that do not take inputs of any strides. So it is tried: the same values in another
order in memory must give the same answer. Where they do not, calls must have the strides of the example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt import verify
from fxopt.errors import InputError
from fxopt.memory import Layout, layout
from fxopt.twin import run_eager

# Kernels round otherwise in another memory order, and near-ties of an argmax fall either way: no other answer yet.
_ROUNDING = 1e-2
_TIES = 0.01


def pinned(
    model: nn.Module, in_spec: pytree.TreeSpec, inputs: Sequence[Any], reference: Sequence[Any]
) -> tuple[Layout | None, ...]:
    """The layout that each input must have, or () where *model* gives its *reference* answer for any."""
    if not any(_many(x) for x in inputs):
        return ()
    for lay in (torch.Tensor.contiguous, _turned):
        other = [lay(x) if _many(x) else x for x in inputs]
        if all(x.stride() == y.stride() for x, y in zip(inputs, other, strict=True) if _many(x)):
            continue
        try:
            answered = run_eager(model, *pytree.tree_unflatten(other, in_spec))
        except InputError:  # a view that these strides do not allow: that is an error in eager, no other answer
            continue
        difference = verify.compare(reference, answered) if len(answered) == len(reference) else None
        if difference is None or difference.error > _ROUNDING or difference.mismatched > _TIES:
            return tuple(layout(x) if _many(x) else None for x in inputs)
    return ()


def _many(x: Any) -> bool:
    """Whether *x* is a tensor that can lie in memory in more than one order."""
    return isinstance(x, torch.Tensor) and x.layout is torch.strided and sum(size > 1 for size in x.shape) > 1


def _turned(x: torch.Tensor) -> torch.Tensor:
    """The values of *x* in another order than the contiguous one: channels last in images, else dimensions reversed."""
    axes = (0, *range(2, x.dim()), 1) if x.dim() in (4, 5) else tuple(reversed(range(x.dim())))
    back = [axes.index(axis) for axis in range(x.dim())]
    return x.permute(axes).contiguous().permute(back)
