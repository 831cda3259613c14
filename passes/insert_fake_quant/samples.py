"""Positions sampled from what a layer gives, with the inputs that each is computed from: a layer as a matrix product.

conv, groups G, kernel k:   z[p, g] = patch[g, p] · W[g]ᵀ       patch (G, P, C/G·k), W (G, O/G, C/G·k)
linear:                     the same with one group, and the input row for a patch
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch

from fxopt import ops
from fxopt.passes.insert_fake_quant.layerwise import Layer

# Positions of one layer, at most, and elements of all their patches.
_MOST_POSITIONS, _MOST_ELEMENTS = 8192, 2**24
_JUDGED = 5  # one in so many is kept to judge by


@dataclasses.dataclass(frozen=True)
class Samples:
    """Some positions of a layer.

    Attributes:
        layer: whose they are.
        patches: quantized inputs, (groups, positions, inputs of one output).
        target: what the layer gives in float, after residual and activation: (positions, channels).
        residual: quantized, (positions, channels), or None.
    """

    layer: Layer
    patches: torch.Tensor
    target: torch.Tensor
    residual: torch.Tensor | None

    @property
    def count(self) -> int:
        """Number of positions."""
        return len(self.target)

    @staticmethod
    def take(layer: Layer, seed: int) -> tuple[Samples, Samples]:
        """Positions to learn from, and others to judge by; the same ones for the same *seed*."""
        generator = torch.Generator().manual_seed(seed)
        groups = _groups(layer)
        inputs = math.prod(layer.weight.shape[1:])
        parts = [_positions_of(layer, i) for i in range(len(layer.exact))]
        total = sum(parts)
        most = min(total, _MOST_POSITIONS, max(_JUDGED, _MOST_ELEMENTS // (groups * inputs)))
        pieces = []
        for i, count in enumerate(parts):
            share = max(1, round(most * count / total))
            pieces.append(_piece(layer, i, torch.randperm(count, generator=generator)[:share]))
        patches = torch.cat([p.patches for p in pieces], 1)
        target = torch.cat([p.target for p in pieces])
        residual = (
            torch.cat([p.residual for p in pieces if p.residual is not None])
            if pieces[0].residual is not None
            else None
        )
        order = torch.randperm(len(target), generator=generator)
        cut = max(1, len(order) // _JUDGED)
        both = (order[cut:], order[:cut]) if len(order) > 1 else (order, order)
        learn, judge = (
            Samples(layer, patches[:, rows], target[rows], None if residual is None else residual[rows])
            for rows in both
        )
        return learn, judge

    def product(self, weight: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The layer with *weight*, without bias, residual and activation: (positions, channels)."""
        patches = self.patches if rows is None else self.patches[:, rows]
        groups = patches.shape[0]
        w = weight.reshape(groups, weight.shape[0] // groups, -1)
        return torch.bmm(patches, w.transpose(1, 2)).transpose(0, 1).flatten(1)

    def error(self, weight: torch.Tensor, bias: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Mean squared error of the layer with *weight* and *bias* at *rows*, or all positions."""
        residual = self.residual if self.residual is None or rows is None else self.residual[rows]
        target = self.target if rows is None else self.target[rows]
        return (self.layer.finish(self.product(weight, rows) + bias, residual) - target).square().mean()

    def shift(self, weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """How much smaller the mean of each channel is with *weight* than with *other*: what a bias makes up for."""
        off = (other - weight).reshape(len(self.mean), -1, self.mean.shape[1])
        return torch.bmm(off, self.mean[:, :, None]).flatten()

    @functools.cached_property
    def mean(self) -> torch.Tensor:
        """The mean patch, (groups, inputs of one output)."""
        return self.patches.mean(1)


def _groups(layer: Layer) -> int:
    return int(ops.arguments(layer.node).get("groups", 1))


def _last(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """*x* as (positions, channels)."""
    axis = layer.channel_axis
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def _positions_of(layer: Layer, batch: int) -> int:
    x = layer.exact[batch]
    if ops.kind(layer.node) == "linear":
        return x.numel() // x.shape[-1]
    sizes = _windows(layer, x)[0]
    return math.prod(sizes)


def _piece(layer: Layer, batch: int, chosen: torch.Tensor) -> Samples:
    """The positions *chosen* of one batch."""
    exact, noisy = layer.exact[batch], layer.noisy[batch]
    beside = None if layer.residuals is None else (layer.residuals[0][batch], layer.residuals[1][batch])
    wanted = layer.finish(layer.apply(exact, layer.weight, layer.bias), beside[0] if beside else None)
    target = _last(layer, wanted)[chosen]
    residual = _last(layer, beside[1].expand(wanted.shape))[chosen] if beside else None
    if ops.kind(layer.node) == "linear":
        return Samples(layer, noisy.reshape(-1, noisy.shape[-1])[chosen][None], target, residual)
    sizes, windows = _windows(layer, noisy)
    index = torch.unravel_index(chosen, sizes)
    groups = _groups(layer)
    patches = windows[index].reshape(len(chosen), groups, -1).transpose(0, 1)
    return Samples(layer, patches, target, residual)


def _windows(layer: Layer, x: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor]:
    """The sizes (batch, *output) of a conv on *x*, and a view of those sizes with (channels, *kernel) after them."""
    a, kernel = ops.arguments(layer.node), layer.weight.shape[2:]
    dims = len(kernel)
    x = x if x.dim() == dims + 2 else x[None]
    stride, padding, dilation = (_each(a[name], dims) for name in ("stride", "padding", "dilation"))
    pads = [p for size in reversed(padding) for p in (size, size)]
    padded = torch.nn.functional.pad(x, pads).contiguous()
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    steps = padded.stride()
    sizes = (len(padded), *out)
    moves = (steps[0], *(t * s for t, s in zip(steps[2:], stride, strict=True)))
    inside = (steps[1], *(t * d for t, d in zip(steps[2:], dilation, strict=True)))
    return sizes, padded.as_strided((*sizes, padded.shape[1], *kernel), (*moves, *inside))


def _each(value: Sequence[int], dims: int) -> list[int]:
    return list(value) * dims if len(value) == 1 else list(value)
