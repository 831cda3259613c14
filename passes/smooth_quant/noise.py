"""What the channels of a value do on calibration data, and what rounding to int8 then costs: see the pass."""

from __future__ import annotations

import dataclasses

import torch

_MOST_ROWS = 256


class Profile:
    """Streaming facts of a value, f64[C] each: lowest and highest of each half of the rows, and the mean square."""

    def __init__(self, channels: int) -> None:
        self.low, self.high = torch.zeros(2, channels).double(), torch.zeros(2, channels).double()
        self.power = torch.zeros(channels).double()
        self.rows = 0

    def add(self, value: torch.Tensor, axis: int) -> None:
        """More rows of *value*, channels in *axis* (from the end). NaN and infinity stay in the extremes."""
        others = [d for d in range(value.dim()) if d != value.dim() + axis]
        along = max(others, key=lambda d: value.shape[d] > 1, default=None)
        parts = value.unsqueeze(0).unbind() if along is None else value.tensor_split(2, along)
        for half, part in enumerate(parts, start=self.rows):
            half %= 2  # a batch of one row goes to either half in turn
            if part.numel():
                low, high = (part.amin(others), part.amax(others)) if others else (part, part)
                self.low[half] = torch.minimum(self.low[half], low.double())
                self.high[half] = torch.maximum(self.high[half], high.double())
        rows = value.numel() // value.shape[axis]
        self.rows += rows
        square = value.square().mean(others) if others else value.square()
        self.power += (square.double() - self.power) * rows / self.rows

    @property
    def is_finite(self) -> bool:
        """Whether all values so far were finite."""
        return bool((self.low.isfinite() & self.high.isfinite()).all())

    @property
    def extents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Largest magnitude of each channel in each half."""
        first, second = torch.maximum(self.high, -self.low)
        return first, second


@dataclasses.dataclass(frozen=True)
class Weight:
    """Magnitudes of a weight.

    Attributes:
        largest: over outputs and the places of a kernel, f64[inputs of all groups].
        rows: the same of single outputs, f32[some outputs of a group, inputs of all groups]: evenly spaced ones, since
            of a thousand rows a quarter tells as much of their sum.
        of_rows: how many outputs each of *rows* stands for.
        squares: sum over outputs and places, f64[inputs of all groups].
        places: of a kernel.
    """

    largest: torch.Tensor
    rows: torch.Tensor
    of_rows: float
    squares: torch.Tensor
    places: int

    @staticmethod
    def of(weight: torch.Tensor, groups: int) -> Weight:
        """Of f[outputs, inputs of a group, *kernel]."""
        size = weight.detach().float().abs().reshape(groups, len(weight) // groups, weight.shape[1], -1)
        squares = size.square().sum((1, 3), dtype=torch.float64).flatten()
        every = -(-size.shape[1] // _MOST_ROWS)
        rows = size[:, ::every].amax(3).transpose(0, 1).flatten(1)
        return Weight(size.amax((1, 3)).flatten().double(), rows, size.shape[1] / len(rows), squares, size.shape[3])


def factors(extent: torch.Tensor, weights: list[Weight], alpha: float) -> torch.Tensor:
    """Equation 4 with a geometric mean of 1, f64[C]."""
    largest = torch.stack([weight.largest for weight in weights]).amax(0)
    scale = extent.clamp_min(1e-5) ** alpha / largest.clamp_min(1e-5) ** (1 - alpha)
    seen = extent > 0
    if not bool(seen.any()):
        return torch.ones_like(scale)
    scale = (scale / scale[seen].log().mean().exp()).clamp(1e-4, 1e4)
    return scale.where(seen, 1.0)  # what a channel does that was always zero is not known


def power(seen: Profile, weights: list[Weight], alpha: float | None) -> float:
    """Power of the error in one row of outputs, by the formula of the pass; *alpha* None for s = 1."""
    total = 0.0
    for fit, held in ((0, 1), (1, 0)):
        extent = seen.extents[fit]
        scale = torch.ones_like(extent) if alpha is None else factors(extent, weights, alpha)
        low, high = float((seen.low[fit] / scale).amin()), float((seen.high[fit] / scale).amax())
        beyond = (seen.high[held] / scale - high).clamp_min(0) + (low - seen.low[held] / scale).clamp_min(0)
        error = ((high - low) / 255) ** 2 / 12 + beyond.square() / max(seen.rows, 1)
        mean_squares = float((seen.power / scale.square()).sum())
        for weight in weights:
            steps = (weight.rows * scale.float()).amax(1) / 127
            total += float((weight.squares * scale.square() * error).sum())
            total += float(steps.square().sum()) / 12 * mean_squares * weight.places * weight.of_rows
    return total
