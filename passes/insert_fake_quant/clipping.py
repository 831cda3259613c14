"""Where to clip: the range of a histogram that is best by percentile, squared error or divergence.

All take a range of zero and both ends, and return low ≤ 0 ≤ high within the values seen. On a symmetric grid the
threshold is one for both signs; a side that has fewer values than it keeps its own end, so that the grid still sees
that there is nothing below zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.passes.insert_fake_quant.histogram import Histogram

# A range must beat the full one by so much: what uniform density inside the bins leaves uncertain.
_GAIN = 0.01
_OCTAVES = 10  # thresholds down to 2**-10 of the full range, about one bin
_REFINEMENTS = 5
_CANDIDATES = 120  # thresholds tried on one side for the divergence
_NOTHING = 1e-12  # probability that stands for zero, so that its logarithm is finite


def clipped(histogram: Histogram, threshold: float) -> tuple[float, float]:
    """The range seen, cut at ±threshold."""
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def percentile(histogram: Histogram, grid: Grid, p: float) -> tuple[float, float]:
    """The range outside of which lie (100 − p) % of all elements, zeros counted.

    Wu et al. 2020 (arXiv 2004.09602), "percentile": the p-th percentile of absolute values on a symmetric grid. On an
    asymmetric one, the p-th percentile of the values at the upper end and the (100 − p)-th at the lower one. Linear
    inside a bin; p = 100 is the exact range.
    """
    if p >= 100:
        return histogram.low, histogram.high
    outside = (1 - p / 100) * (float(histogram.counts.sum()) + histogram.zeros)
    if grid.symmetric:
        return clipped(histogram, _inner(histogram.folded(), outside) * histogram.width)
    negative, positive = (_inner(side, outside) * histogram.width for side in histogram.sides())
    return max(histogram.low, -negative), min(histogram.high, positive)


def _inner(outward: torch.Tensor, outside: float) -> float:
    """Distance from zero, in bins, beyond which *outside* elements lie."""
    sums = outward.cumsum(0)
    wanted = float(sums[-1]) - outside if len(sums) else 0.0
    if wanted <= 0:
        return 0.0
    i = min(int(torch.searchsorted(sums, wanted)), len(sums) - 1)
    missing = float(sums[i]) - wanted
    return i + 1 - missing / float(outward[i]) if outward[i] > 0 else float(i + 1)


def squared_error(histogram: Histogram, grid: Grid, lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
    """Σ (x − Q(x))² over the histogram for each range: rounding and clipping, with the scale the grid would have.

    Inside a bin the density is uniform, and the integral over it is exact: with k the integer that x is rounded to,
    kept within the grid, and s the scale,

        ∫₀ˣ (t − s·k(t))² dt = k·s³/12 + (x − s·k)³/3

    Zeros have no error. Args: *lows* and *highs* (candidates,). Returns: float64, (candidates,).
    """
    used = histogram.counts.nonzero().flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    edges = torch.arange(first, last + 1, dtype=torch.float64) + histogram.start
    # Bins at the ends hold values up to the exact ends only. Where those lie on an edge, a sliver of a bin.
    edges[0] = edges[0].clamp_min(min(histogram.low / histogram.width, float(edges[1]) - 1 / 64))
    edges[-1] = edges[-1].clamp_max(max(histogram.high / histogram.width, float(edges[-2]) + 1 / 64))
    density = histogram.counts[first:last] / edges.diff()
    scale, zero_point = (t[:, None] for t in grid.parameters(lows, highs))
    s = scale.double() / histogram.width
    k = (edges / s).round().clamp(grid.qmin - zero_point, grid.qmax - zero_point)
    integral = k * s**3 / 12 + (edges - k * s) ** 3 / 3
    return integral.diff(dim=1) @ density * histogram.width**2


def least_squares(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """The range with the least :func:`squared_error`, or the full one where none is better by 1 %.

    The criterion of Choukroun et al. 2019 (arXiv 1902.06822), and of Banner et al. 2019 (arXiv 1810.05723), whose sum
    of rounding and clipping noise is integrated here over the histogram instead of over a fitted density. Thresholds
    are 2^-x of the ends: x in steps of 1/2 over both ends at once, then steps halved around the best.
    """
    low, high = histogram.low, histogram.high
    if int((histogram.counts > 0).sum()) <= 1:
        return low, high  # one value, and perhaps zero: nothing to trade

    move_low, move_high = low < 0 and not grid.symmetric, high > 0 or grid.symmetric

    def best(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
        pairs = list(itertools.product(xs if move_low else [0.0], ys if move_high else [0.0]))
        return pairs[int(squared_error(histogram, grid, *_ends(histogram, grid, pairs)).argmin())]

    steps = [i / 2 for i in range(2 * _OCTAVES + 1)]
    x, y = best(steps, steps)
    for i in range(2, 2 + _REFINEMENTS):
        step = 2.0**-i
        x, y = best([x, max(0.0, x - step), x + step], [y, max(0.0, y - step), y + step])
    lows, highs = _ends(histogram, grid, [(0.0, 0.0), (x, y)])
    full, found = squared_error(histogram, grid, lows, highs).tolist()
    return (float(lows[1]), float(highs[1])) if found < (1 - _GAIN) * full else (low, high)


def _ends(histogram: Histogram, grid: Grid, pairs: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges 2^-x of the lower end and 2^-y of the upper one; on a symmetric grid y alone counts."""
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    low, high = histogram.low, histogram.high
    if grid.symmetric:
        threshold = max(-low, high) * 2.0**-y
        return (-threshold).clamp_min(low), threshold.clamp_max(high)
    return low * 2.0**-x, high * 2.0**-y


def least_divergence(histogram: Histogram, grid: Grid) -> tuple[float, float]:
    """The range whose quantized distribution diverges least from that of the values.

    Migacz, "8-bit inference with TensorRT", GTC 2017: for each threshold, P is the histogram with what lies beyond
    added to its last bin; Q is the histogram merged into as many groups as there are integers, each spread evenly over
    its bins that are not empty; the least KL(P‖Q) = Σ P·log(P/Q) wins. Exact zeros take no part, as they would outweigh
    all else after a relu.

    A symmetric grid looks at absolute values with half of the integers. An asymmetric one searches one end with the
    other held, in turn; after a relu there is only one.
    """
    if int((histogram.counts > 0).sum()) <= 1:
        return histogram.low, histogram.high
    levels = grid.qmax - grid.qmin + 1
    negative, positive = (_trimmed(side) for side in histogram.sides())
    if grid.symmetric:
        outward = _trimmed(histogram.folded())
        levels = levels if grid.qmin >= 0 and histogram.low == 0 else (levels + 1) // 2
        return clipped(histogram, _upper(outward, 0, levels, 0) * histogram.width)
    counts = torch.cat([negative.flip(0), positive])
    below, above = len(negative), len(positive)
    for _ in range(2 if below and above else 1):
        above = _upper(counts, len(negative) - below, levels, len(negative))
        below = _upper(counts.flip(0), len(positive) - above, levels, len(positive))
    return max(histogram.low, -below * histogram.width), min(histogram.high, above * histogram.width)


def _trimmed(outward: torch.Tensor) -> torch.Tensor:
    used = outward.nonzero()
    return outward[: int(used[-1]) + 1 if len(used) else 0]


def _upper(counts: torch.Tensor, begin: int, levels: int, zero: int) -> int:
    """How many bins above *zero* to keep, of those in *counts*, if bins below *begin* are cut off."""
    most = len(counts) - zero
    least = max(1, levels - (zero - begin))
    if most <= least:
        return most
    step = -(-(most - least) // _CANDIDATES)
    ends = torch.arange(most, least - 1, -step) + zero  # the widest first: it wins where they are equal
    return int(ends[divergence(counts, begin, ends, levels).argmin()]) - zero


def divergence(counts: torch.Tensor, begin: int, ends: torch.Tensor, levels: int) -> torch.Tensor:
    """KL(P‖Q) for the bins from *begin* up to each of *ends*: see :func:`least_divergence`."""
    bins = torch.arange(len(counts))
    last = ends[:, None] - 1
    kept = counts * ((bins >= begin) & (bins <= last))
    sums = counts.cumsum(0)
    p = kept.clone()
    p[:, begin] += counts[:begin].sum()
    p.scatter_add_(1, last, sums[-1] - sums[last])
    group = ((bins - begin) * levels // (ends - begin)[:, None]).clamp(0, levels - 1)
    zeros = torch.zeros(len(ends), levels, dtype=torch.float64)
    mass = zeros.scatter_add(1, group, kept)
    spread = zeros.scatter_add(1, group, (p > 0).double())
    q = torch.where(p > 0, (mass / spread.clamp_min(1)).gather(1, group), 0.0)
    p, q = (t / t.sum(1, keepdim=True).clamp_min(_NOTHING) for t in (p, q))
    return (p * (p.clamp_min(_NOTHING).log() - q.clamp_min(_NOTHING).log())).sum(1)
