"""A streaming histogram of bounded size that loses no mass when the range grows.

Bins lie on a lattice through zero: bin i holds the values in [i·w, (i+1)·w), and w is a power of two. Where the range
outgrows the bins, w doubles and bins 2j and 2j+1 become bin j; none is ever split, so counts stay exact, and the order
in which batches come does not matter:

    w = 1:   -2 | -1 | 0 | 1 | 2 | 3        w = 2:      -1    |   0    |   1

Exact zeros (what a relu cuts off, padding) have a count of their own.
"""

from __future__ import annotations

import math

import torch

BINS = 2048
# Elements of one tensor that are counted, at most: a larger one is sampled. Its smallest and largest value never are.
SAMPLE = 2**16
# Below 2 to this power, a bin would be narrower than float32 can tell.
_SMALLEST_EXPONENT = -120


class Histogram:
    """Counts of values over :data:`BINS` bins, at least half of which lie within the range seen.

    A value a thousand times larger than all others leaves these in one or two bins: a threshold between them is then
    known to within a bin width only.

    Attributes:
        low: smallest value seen, or 0 if that is more; exact. ``high``: largest, or 0 if that is less.
        exponent: bins are 2**exponent wide. ``start``: lattice index of the first bin; never more than 0.
        counts: float64, (BINS,): elements in each bin, zeros left out.
        zeros: elements that are exactly zero.
    """

    def __init__(self) -> None:
        self.low = self.high = self.zeros = 0.0
        self.exponent, self.start = _SMALLEST_EXPONENT, 0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self.exponent

    def add(self, values: torch.Tensor, low: float, high: float, weight: float = 1.0) -> None:
        """Count finite *values*.

        Args:
            values: one dimension, any floating dtype, at most 2**24 elements (as exactly as float32 counts).
            low: no value is smaller.
            high: no value is larger. The bins cover both ends.
            weight: how many elements each value stands for.
        """
        self._cover(low, high)
        # In units of a bin, so that no bound overflows. A power of two changes no mantissa.
        scaled = values.float() * 2.0**-self.exponent
        found = torch.histc(scaled, BINS, self.start, self.start + BINS).double().cpu()
        zeros = values.numel() - int(torch.count_nonzero(scaled))
        found[-self.start] -= zeros
        self.counts += found * weight
        self.zeros += zeros * weight

    def sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts of the negative and of the positive bins, each from zero outward."""
        return self.counts[: -self.start].flip(0), self.counts[-self.start :]

    def folded(self) -> torch.Tensor:
        """Counts of absolute values, from zero outward."""
        negative, positive = self.sides()
        total = torch.zeros(max(len(negative), len(positive)), dtype=torch.float64)
        total[: len(negative)] += negative
        total[: len(positive)] += positive
        return total

    def _cover(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = self.exponent
        extent = self.high - self.low
        if extent > 0:
            exponent = max(exponent, math.frexp(extent)[1] - BINS.bit_length())
        while self._bins(exponent) > BINS:
            exponent += 1
        start = math.floor(math.ldexp(self.low, -exponent))
        if (exponent, start) != (self.exponent, self.start):
            # Bins that fall outside the new window are empty: it covers every value seen.
            index = torch.arange(self.start, self.start + BINS) >> min(exponent - self.exponent, BINS.bit_length())
            place = (index - start).clamp(0, BINS - 1)
            self.counts = torch.zeros_like(self.counts).index_add_(0, place, self.counts)
            self.exponent, self.start = exponent, start

    def _bins(self, exponent: int) -> int:
        """Bins of width 2**exponent from the smallest to the largest value, the last with room at its end."""
        return math.floor(math.ldexp(self.high, -exponent)) + 1 - math.floor(math.ldexp(self.low, -exponent))


def sample_stride(shape: torch.Size) -> int:
    """Distance between counted elements of a tensor of *shape*: the least that leaves at most :data:`SAMPLE`.

    It shares no factor with any dimension, so that all channels, rows and columns get their turn.
    """
    stride = -(-math.prod(shape) // SAMPLE)
    while any(math.gcd(stride, size) > 1 for size in shape):
        stride += 1
    return stride
