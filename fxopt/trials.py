"""What no graph shows is tried at capture: the model must answer alike for inputs that only look different.

A model may answer by the strides of its inputs (``is_contiguous``, ``as_strided``), or by the order of the keys in a
dict. Almost none does, and those that do not take any strides and any order. Where one does, calls must have those of
the example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def pinned_layouts(
    model: nn.Module, in_spec: pytree.TreeSpec, inputs: Sequence[Any], reference: Sequence[Any]
) -> tuple[Layout | None, ...]:
    """The layout that each input must have, or () where *model* gives its *reference* answer for any."""
    for lay in (torch.Tensor.contiguous, _turned):
        other = [lay(x) if _many(x) else x for x in inputs]
        if all(x.stride() == y.stride() for x, y in zip(inputs, other, strict=True) if _many(x)):
            continue
        if _answers_otherwise(model, pytree.tree_unflatten(other, in_spec), reference):
            return tuple(layout(x) if _many(x) else None for x in inputs)
    return ()


def is_ordered(model: nn.Module, in_spec: pytree.TreeSpec, inputs: Sequence[Any], reference: Sequence[Any]) -> bool:
    """Whether *model* answers otherwise when the keys of its dicts and keywords come in reverse order."""
    if not _has_order(in_spec):
        return False
    return _answers_otherwise(model, _reversed(pytree.tree_unflatten(inputs, in_spec)), reference)


def _answers_otherwise(model: nn.Module, call: Any, reference: Sequence[Any]) -> bool:
    try:
        answered = run_eager(model, *call)
    except InputError:  # a view that these strides do not allow: that is an error in eager, no other answer
        return False
    if [_shape(x) for x in answered] != [_shape(x) for x in reference]:
        return True
    difference = verify.compare(reference, answered)
    return difference.error > _ROUNDING or difference.mismatched > _TIES


def _shape(value: Any) -> object:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)


def _has_order(spec: pytree.TreeSpec) -> bool:
    own = spec.type is not None and issubclass(spec.type, Mapping) and spec.num_children > 1
    return own or any(_has_order(child) for child in spec.children())


def _reversed(value: Any) -> Any:
    if type(value) is dict:
        return {key: _reversed(value[key]) for key in reversed(value)}
    return type(value)(_reversed(child) for child in value) if type(value) in (list, tuple) else value


def _many(x: Any) -> bool:
    """Whether *x* is a tensor that can lie in memory in more than one order."""
    return isinstance(x, torch.Tensor) and x.layout is torch.strided and sum(size > 1 for size in x.shape) > 1


def _turned(x: torch.Tensor) -> torch.Tensor:
    """The values of *x* in another order than the contiguous one: channels last in images, else dimensions reversed."""
    axes = (0, *range(2, x.dim()), 1) if x.dim() in (4, 5) else tuple(reversed(range(x.dim())))
    back = [axes.index(axis) for axis in range(x.dim())]
    return x.permute(axes).contiguous().permute(back)
