"""What a conv or linear reads, as rows of the matrix that its weight is multiplied with, and sums over these.

    linear              row = the input                            (1, rows, inputs)
    conv, groups G      row = an im2col patch, channels innermost  (G, rows, kernel positions · C/G)

The order within a row is that of ``fxopt.sparsity.matrix``. Rows are made and summed piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fxopt import ops
from fxopt.passes.insert_fake_quant.layerwise import Layer

_PIECE = 2**22  # elements of the rows that are made at once, where one image has no more


def second_moments(layer: Layer) -> torch.Tensor:
    """Σ x xᵀ over all rows that *layer* reads: f64[groups, inputs, inputs]."""
    return sum(
        (rows.transpose(1, 2) @ rows for rows in _rows(layer, layer.noisy)), torch.zeros((), dtype=torch.float64)
    )


def cross_moments(layer: Layer) -> torch.Tensor:
    """Σ x₀ xᵀ, x₀ what *layer* reads in the dense model, x what it reads now: f64[groups, inputs, inputs]."""
    pairs = zip(_rows(layer, layer.exact), _rows(layer, layer.noisy), strict=True)
    return sum((x.transpose(1, 2) @ now for x, now in pairs), torch.zeros((), dtype=torch.float64))


def squares(layer: Layer) -> torch.Tensor:
    """Σ x² over all rows that *layer* reads: f64[groups, inputs]."""
    return sum((rows.square().sum(1) for rows in _rows(layer, layer.noisy)), torch.zeros((), dtype=torch.float64))


def count(layer: Layer) -> int:
    """How many rows *layer* reads."""
    weight = layer.weight.to("meta")
    return sum(layer.apply(x.to("meta"), weight, None).numel() for x in layer.noisy) // len(weight)


def groups_of(unit: fx.Node) -> int:
    """How many groups a conv has; a linear has one."""
    return int(ops.arguments(unit).get("groups", 1))


def _rows(layer: Layer, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Pieces of the rows that *batches* of inputs give, f64[groups, rows, inputs]."""
    for x in batches:
        x = x.detach()
        if ops.kind(layer.node) == "linear":
            flat = x.reshape(-1, x.shape[-1])
            for piece in flat.split(max(1, _PIECE // flat.shape[1])):
                yield piece.double()[None]
            continue
        kernel = layer.weight.shape[2:]
        images = x if x.dim() == len(kernel) + 2 else x[None]
        each = images[0].numel() * kernel.numel()
        for piece in images.split(max(1, _PIECE // max(1, each))):
            yield _patches(piece, kernel, ops.arguments(layer.node)).double()


def _patches(x: torch.Tensor, kernel: Sequence[int], a: dict[str, Any]) -> torch.Tensor:
    """im2col of x[N, C, …]: (groups, N · positions, kernel positions · C/G)."""
    dims, groups = len(kernel), int(a["groups"])
    stride, padding, dilation = (_each(a[name], dims) for name in ("stride", "padding", "dilation"))
    padded = F.pad(x, [p for size in reversed(padding) for p in (size, size)]).contiguous()
    spans = zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in spans]
    steps, channels = padded.stride(), x.shape[1] // groups
    windows = padded.as_strided(
        (groups, len(x), *out, *kernel, channels),
        (
            channels * steps[1],
            steps[0],
            *(t * s for t, s in zip(steps[2:], stride, strict=True)),
            *(t * d for t, d in zip(steps[2:], dilation, strict=True)),
            steps[1],
        ),
    )
    return windows.reshape(groups, len(x) * torch.Size(out).numel(), -1)


def _each(value: str | Sequence[int], dims: int) -> list[int]:
    """A number for each spatial axis; the one padding that is left as a word is none ("valid")."""
    if isinstance(value, str):
        return [0] * dims
    return list(value) * dims if len(value) == 1 else list(value)
