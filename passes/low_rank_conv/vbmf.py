"""The rank of a noisy matrix, without any threshold to choose: empirical variational Bayesian matrix factorization.

Y (l, m), l ≤ m, is a low-rank matrix plus noise of variance σ². Of its singular values those stay that are above

    √(m σ² (1 + τ) (1 + α / τ)),     α = l / m,   τ = 2.5129 √α

and σ² is where the variational free energy is least (Nakajima, Sugiyama, Babacan and Tomioka 2013, "Global analytic
solution of fully-observed variational Bayesian matrix factorization", JMLR 14, theorem 2 and section 5; Kim et al. 2016
choose the ranks of Tucker-2 by it).
"""

from __future__ import annotations

import math

import torch

_TAU = 2.5129
_POINTS, _REFINEMENTS = 64, 4


def rank(values: torch.Tensor, rows: int, columns: int) -> int:
    """The rank of a matrix (rows, columns) that has the singular *values*, f64, all of them; 0 if it is all noise."""
    short, long = sorted((rows, columns))
    squares = values.double().square().sort(descending=True).values
    total = float(squares.sum())
    if total == 0:
        return 0
    ratio = short / long
    tau = _TAU * math.sqrt(ratio)
    threshold = (1 + tau) * (1 + ratio / tau)
    most = max(0, min(math.ceil(short / (1 + ratio)) - 1, short - 1))
    upper = total / (short * long)
    lower = max(float(squares[most]) / (long * threshold), float(squares[most:].mean()) / long)
    noise = _least(squares, long, ratio, threshold, max(lower, upper * 1e-12), upper)
    return int((squares > long * noise * threshold).sum())


def _least(squares: torch.Tensor, long: int, ratio: float, threshold: float, low: float, high: float) -> float:
    """The variance between *low* and *high* with the least free energy: a grid, refined around its best point."""
    best = low
    for _ in range(_REFINEMENTS):
        grid = torch.logspace(math.log10(low), math.log10(max(high, low)), _POINTS, dtype=torch.float64)
        energies = torch.stack([_free_energy(squares / (long * noise), ratio, threshold) for noise in grid])
        at = int(energies.argmin())
        best = float(grid[at])
        low, high = float(grid[max(0, at - 1)]), float(grid[min(_POINTS - 1, at + 1)])
    return best


def _free_energy(x: torch.Tensor, ratio: float, threshold: float) -> torch.Tensor:
    """The free energy up to a constant, with *x* the squares over m σ²."""
    kept, left = x[x > threshold], x[x <= threshold]
    centred = kept - (1 + ratio)
    tau = (centred + (centred.square() - 4 * ratio).clamp(min=0).sqrt()) / 2
    noise = (left - left.clamp(min=torch.finfo(torch.float64).tiny).log()).sum()
    signal = (kept - tau + ((tau + 1) / kept).log() + ratio * (tau / ratio + 1).log()).sum()
    return noise + signal
