"""Observers: what range of floats the integers of a value are to stand for, found batch by batch.

    observer = create("mse");  for each batch: observer.update(x);  low, high = observer.range(grid)

The state of an observer has one size, whatever it has seen. A tensor is read once for its exact smallest and largest
value; a histogram counts at most ``histogram.SAMPLE`` of its elements, at a fixed stride in memory order, the first one
later by one at each update. There is no randomness: the same batches give the same range.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch

from fxopt.errors import InputError, SpecError, near_miss
from fxopt.passes.insert_fake_quant import clipping
from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.passes.insert_fake_quant.histogram import Histogram, sample_stride

_LARGEST = torch.finfo(torch.float32).max


class Observer(abc.ABC):
    """Sees a value on each batch, then says its range."""

    def update(self, x: torch.Tensor) -> None:
        """Look at the value of one batch.

        Args:
            x: any shape, strides, device and real dtype; an empty one counts for nothing.

        Raises:
            InputError: an element is NaN, infinite, or beyond float32. What the observer knew is unchanged.
        """
        if not x.numel():
            return
        flat = _flat(x.detach())
        low, high = (float(end) for end in torch.aminmax(flat))
        if not -_LARGEST <= low <= high <= _LARGEST:
            raise InputError(_not_finite(flat))
        self._observe(flat, x.shape, low, high)

    @abc.abstractmethod
    def range(self, grid: Grid) -> tuple[float, float]:
        """The range for *grid*: low ≤ 0 ≤ high, within what was seen; (0, 0) if that was nothing."""

    @abc.abstractmethod
    def _observe(self, flat: torch.Tensor, shape: torch.Size, low: float, high: float) -> None:
        """Take in the elements *flat*, in memory order, of a finite tensor of *shape*; none lies outside low…high."""


class MinMax(Observer):
    """The smallest and the largest value of all batches, both exact: nothing is clipped.

    Krishnamoorthi 2018 (arXiv 1806.08342).
    """

    def __init__(self) -> None:
        self._low = self._high = 0.0

    def range(self, grid: Grid) -> tuple[float, float]:
        """The extremes, with zero."""
        return self._low, self._high

    def _observe(self, flat: torch.Tensor, shape: torch.Size, low: float, high: float) -> None:
        self._low, self._high = min(self._low, low), max(self._high, high)


class MovingAverage(Observer):
    """Exponential moving averages of each batch's smallest and largest value.

        m ← m + max(momentum, 1/n) · (extreme of the n-th batch − m)

    Jacob et al. 2018 (CVPR), section 3.1. The first 1/momentum batches have their plain mean: calibration is short, and
    an average that starts at the first batch would hardly leave it.

    Attributes:
        momentum: weight of a new batch once there are many, in (0, 1].
    """

    def __init__(self, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise SpecError(f"moving-average: momentum must be in (0, 1], not {momentum}")
        self.momentum = momentum
        self._low = self._high = 0.0
        self._updates = 0

    def range(self, grid: Grid) -> tuple[float, float]:
        """The averages, with zero."""
        return min(self._low, 0.0), max(self._high, 0.0)

    def _observe(self, flat: torch.Tensor, shape: torch.Size, low: float, high: float) -> None:
        self._updates += 1
        weight = max(self.momentum, 1 / self._updates)
        self._low += weight * (low - self._low)
        self._high += weight * (high - self._high)


class HistogramObserver(Observer):
    """Base of those that read their range off a histogram.

    Attributes:
        histogram: of all values seen.
    """

    def __init__(self) -> None:
        self.histogram = Histogram()
        self._updates = 0

    def _observe(self, flat: torch.Tensor, shape: torch.Size, low: float, high: float) -> None:
        stride = sample_stride(shape)
        sample = flat[self._updates % stride :: stride]
        self._updates += 1
        self.histogram.add(sample, low, high, weight=flat.numel() / sample.numel())

    def range(self, grid: Grid) -> tuple[float, float]:
        """The range that the method finds best; all of it where only zeros were seen."""
        return self._clip(grid) if self.histogram.counts.any() else (self.histogram.low, self.histogram.high)

    @abc.abstractmethod
    def _clip(self, grid: Grid) -> tuple[float, float]: ...


class Percentile(HistogramObserver):
    """Leaves (100 − p) % of the elements outside: see :func:`.clipping.percentile`.

    Attributes:
        p: percentile, in (50, 100].
    """

    def __init__(self, p: float = 99.99) -> None:
        if not 50 < p <= 100:
            raise SpecError(f"percentile: p must be in (50, 100], not {p}")
        super().__init__()
        self.p = p

    def _clip(self, grid: Grid) -> tuple[float, float]:
        return clipping.percentile(self.histogram, grid, self.p)


class MSE(HistogramObserver):
    """Least squared error of quantization: see :func:`.clipping.least_squares`."""

    def _clip(self, grid: Grid) -> tuple[float, float]:
        return clipping.least_squares(self.histogram, grid)


class Entropy(HistogramObserver):
    """Least Kullback-Leibler divergence, TensorRT's calibration: see :func:`.clipping.least_divergence`."""

    def _clip(self, grid: Grid) -> tuple[float, float]:
        return clipping.least_divergence(self.histogram, grid)


CALIBRATORS: Mapping[str, type[Observer]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
}


def create(name: str, **options: float) -> Observer:
    """The observer called *name*.

    Raises:
        SpecError: no such observer, no such option, or a value that it cannot have.
    """
    if name not in CALIBRATORS:
        raise SpecError(f"unknown calibrator {name!r}.{near_miss(name, CALIBRATORS)}")
    try:
        return CALIBRATORS[name](**options)
    except TypeError as error:
        raise SpecError(f"calibrator {name!r}: {error}") from error


def _flat(x: torch.Tensor) -> torch.Tensor:
    """All elements in memory order, without a copy if *x* is dense; aminmax is many times faster on these."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    flat = x.permute(order).reshape(-1)
    return flat if flat.is_floating_point() else flat.float()


def _not_finite(flat: torch.Tensor) -> str:
    nans = int(flat.isnan().sum())
    large = int((flat.abs() > _LARGEST).sum())
    found = [f"{n} are {what}" for n, what in ((nans, "NaN"), (large, "infinite or beyond float32")) if n]
    return f"of {flat.numel()} values, {' and '.join(found)}"
