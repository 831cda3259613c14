"""Ranges that calibrators find, and their error."""

from __future__ import annotations

import pytest
import torch

from fxopt.passes.insert_fake_quant import observers
from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.passes.insert_fake_quant.histogram import Histogram

U8 = Grid(torch.uint8, symmetric=False, qmin=0, qmax=255)
U8_SYMMETRIC = Grid(torch.uint8, symmetric=True, qmin=0, qmax=255)
S8 = Grid(torch.int8, symmetric=True, qmin=-127, qmax=127)
S8_ASYMMETRIC = Grid(torch.int8, symmetric=False, qmin=-128, qmax=127)
GRIDS = [U8, U8_SYMMETRIC, S8, S8_ASYMMETRIC]
NAMES = list(observers.CALIBRATORS)
HISTOGRAMS = ["percentile", "mse", "entropy"]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=["u8", "u8-symmetric", "s8", "s8-asymmetric"])
every_name = pytest.mark.parametrize("name", NAMES)


def found(name: str, grid: Grid, *batches: torch.Tensor, **options: float) -> tuple[float, float]:
    observer = observers.create(name, **options)
    for batch in batches:
        observer.update(batch)
    low, high = observer.range(grid)
    assert low <= 0 <= high
    return low, high


def gaussian(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (40_000,), generator=torch.Generator().manual_seed(seed))


def uniform(low: float, high: float) -> torch.Tensor:
    return torch.rand(60_000, generator=torch.Generator().manual_seed(1)) * (high - low) + low


def histogram_of(*batches: torch.Tensor) -> Histogram:
    observer = observers.MSE()
    for batch in batches:
        observer.update(batch)
    return observer.histogram
