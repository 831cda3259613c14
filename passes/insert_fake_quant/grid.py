"""What integers there are, and the scale and zero point with which they stand for a range of floats."""

from __future__ import annotations

import dataclasses

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
            scale = (largest - smallest) / (self.qmax - self.qmin)
            zero = (self.qmin - smallest / scale.clamp_min(_SMALLEST)).round().clamp(self.qmin, self.qmax)
        scale = torch.where(scale < _SMALLEST, 1.0, scale)
        return scale.float(), zero.long()
