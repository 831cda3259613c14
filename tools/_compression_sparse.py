"""The rows of tools/compression for 2:4 sparsity: each method at once and fine-tuned, with and without permutation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import fxopt
from tools import digits

BATCHES = 8  # of calibration, of 64 images

Method = Callable[[nn.Module, digits.Digits, int], fxopt.PreparedModel]


def sparse(options: str) -> Method:
    """The model with 2:4 weights, by *options* of the pass, with training images as calibration data."""

    def prepare(model: nn.Module, data: digits.Digits, seed: int) -> fxopt.PreparedModel:
        order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[: BATCHES * 64]
        batches = [(data.images[part],) for part in order.split(64)]
        passes = f"sparsify-2-4{{{options}}}"
        example, shapes = (data.images[:64],), ({0: "batch"},)
        return fxopt.prepare(model, example, dynamic_shapes=shapes, passes=passes, calibration=batches)

    return prepare


_ROWS: dict[str, Method] = {
    "2:4, magnitude, order as it is": sparse("permute=false"),
    "2:4, magnitude": sparse(""),
    "2:4, magnitude, straight-through": sparse("straight_through=true"),
    "2:4, Wanda": sparse("method=wanda"),
    "2:4, SparseGPT, order as it is": sparse("method=sparsegpt,permute=false"),
    "2:4, SparseGPT": sparse("method=sparsegpt"),
}
METHODS: dict[str, dict[str, Method]] = {name: dict(_ROWS) for name in ("vit", "residual")}
