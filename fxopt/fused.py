"""Fused ops: a conv or linear together with the residual add and the activation that follow it.

    fxopt::conv2d(x, weight, bias, residual, stride, padding, dilation, groups, activation, activation_args)
        = activation(conv2d(x, weight, bias, ...) + residual)
    fxopt::linear(x, weight, bias, residual, activation, activation_args)
        = activation(linear(x, weight, bias) + residual)

They are CompositeImplicitAutograd: the graph shows the fusion, gradients flow through, and an exporter that does
not know them sees the plain ATen ops they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxopt.ops import ACTIVATIONS

_library = torch.library.Library("fxopt", "DEF")
_TAIL = "str activation, float[] activation_args) -> Tensor"


def _finish(y: torch.Tensor, residual: torch.Tensor | None, activation: str, args: Sequence[float]) -> torch.Tensor:
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y, *args)


def _conv(convolve: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str,
        activation_args: Sequence[float],
    ) -> torch.Tensor:
        y = convolve(x, weight, bias, stride, padding, dilation, groups)
        return _finish(y, residual, activation, activation_args)

    return run


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> torch.Tensor:
    return _finish(torch.ops.aten.linear.default(x, weight, bias), residual, activation, activation_args)


for _dims in (1, 2, 3):
    _library.define(
        f"conv{_dims}d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
        f"int[] dilation, int groups, {_TAIL}"
    )
    _implementation = _conv(getattr(torch.ops.aten, f"conv{_dims}d").default)
    _library.impl(f"conv{_dims}d", _implementation, "CompositeImplicitAutograd")
_library.define(f"linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {_TAIL}")
_library.impl("linear", _linear, "CompositeImplicitAutograd")

CONV = {dims: getattr(torch.ops.fxopt, f"conv{dims}d").default for dims in (1, 2, 3)}
LINEAR = torch.ops.fxopt.linear.default
