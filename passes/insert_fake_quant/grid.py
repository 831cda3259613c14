"""What integers there are, and the scale and zero point with which they stand for a range of floats."""

from __future__ import annotations

import dataclasses
import math

import torch

# Below this a scale is no normal float32 number, or its inverse none.
_SMALLEST = 2.0**-100


@dataclasses.dataclass(frozen=True)
class Grid:
    """The integers of a quantized value.

    Attributes:
        dtype: torch.uint8 or torch.int8.
        symmetric: zero stands in the middle (or, for unsigned values that are never negative, at the lower end).
        qmin: smallest integer; ``qmax``: largest.
    """

    dtype: torch.dtype
    symmetric: bool
    qmin: int
    qmax: int

    def parameters(self, low: float | torch.Tensor, high: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (float32) and zero point (int64) so that low…high and zero are within qmin…qmax.

        Both ends are within exactly, not to half a step: they are often the most frequent values, as the background of
        an image or what an activation is cut to. And the zero point is even, for values right between two integers,
        which data of few levels have: then it is the same integer that engines take which round x / scale, and those
        which round x / scale + zero_point, both to even.

        Args:
            low: smallest value, a number or one for each channel.
            high: largest value, likewise.
        """
        smallest = torch.as_tensor(low, dtype=torch.float64).clamp_max(0)
        largest = torch.as_tensor(high, dtype=torch.float64).clamp_min(0)
        if self.symmetric:
            extent = torch.maximum(-smallest, largest)
            scale = extent / min(self.qmax, -self.qmin) if self.qmin < 0 else extent / (self.qmax // 2)
            zero = torch.full_like(extent, 0.0 if self.qmin < 0 else (self.qmin + self.qmax + 1) // 2)
            if self.qmin >= 0:
                positive = smallest == 0
                scale = torch.where(positive, extent / self.qmax, scale)
                zero = torch.where(positive, float(self.qmin), zero)
        else:
            scale, zero = self._asymmetric(smallest, largest)
        scale = torch.where(scale < _SMALLEST, 1.0, scale)
        return scale.float(), zero.long()

    def _asymmetric(self, smallest: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The even zero point below or above the exact one, whichever needs the smaller scale."""
        count = self.qmax - self.qmin
        odd = self.qmin % 2  # so many steps from qmin is the first even integer
        exact = -smallest * count / (largest - smallest).clamp_min(_SMALLEST)
        below = ((exact - odd) / 2).floor() * 2 + odd
        found = []
        for steps in (below, below + 2):  # from qmin to zero
            down, up = -smallest / steps, largest / (count - steps)  # 0 / 0 where nothing is needed on that side
            scale = torch.maximum(down.nan_to_num(0.0), up.nan_to_num(0.0))
            found.append((scale.where((steps >= 0) & (steps <= count), math.inf), steps))
        better = found[0][0] <= found[1][0]
        scale, steps = (torch.where(better, a, b) for a, b in zip(*found, strict=True))
        return scale, self.qmin + steps
