"""Layers with known singular values, and what low-rank-linear decided of them."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.passes.low_rank_linear import LayerRank, decompose
from fxopt.testing import Checked
from tests.passes.models import chain


def decaying(rows: int, columns: int, decay: float = 0.9) -> torch.Tensor:
    """A matrix with the singular values 1, decay, decay²…"""
    side = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, side, dtype=torch.float64)).Q for n in (rows, columns))
    product: torch.Tensor = (u * decay ** torch.arange(side)) @ v.T
    return product


def linear(rows: int, columns: int, decay: float = 0.9) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    layer.weight.data = decaying(rows, columns, decay).float()
    return layer


def mlp() -> nn.Module:
    return chain(linear(128, 64), nn.GELU(), linear(64, 128), nn.ReLU(), linear(64, 64))


def decided(checked: Checked) -> dict[str, LayerRank]:
    return {one.name: one for one in checked.record.details["low_rank"]}


def ranks(checked: Checked) -> dict[str, int | None]:
    return {name: one.rank for name, one in decided(checked).items()}


def product(weight: torch.Tensor, rank: int, moments: torch.Tensor | None = None, damping: float = 0.0) -> torch.Tensor:
    b, a = decompose(weight, rank, moments, damping).factors(weight, rank)
    return (b.double() @ a.double()).to(weight.dtype)
