"""Fake quantization that trains: the ops that mark it in a graph, and the modules that compute it.

    fxopt_training::fake_quantize(x, name, source)      in a prepared graph: the module called *name* does it
    fxopt_training::fake_quantized(x, scale, …)         in a graph on its way to an engine: x becomes such integers

Both give x itself when they are run, so that rewrites between preparing and compiling are verified in float; no pass
looks behind them. The modules round to the grid and let gradients through where x is in range (straight-through
estimator; Bengio et al., arXiv:1308.3432). With a learned step, the scale has a gradient as well (Esser et al., Learned
Step Size Quantization, ICLR 2020, equations 3 and 5).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from fxopt.errors import PreconditionError

_library = torch.library.Library("fxopt_training", "DEF")
_library.define("fake_quantize(Tensor x, str name, int source) -> Tensor")
_library.define(
    "fake_quantized(Tensor x, float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype) -> Tensor"
)


def _identity(x: torch.Tensor, *how: object) -> torch.Tensor:
    return x.clone()


for _name in ("fake_quantize", "fake_quantized"):
    _library.impl(_name, _identity, "CompositeImplicitAutograd")

FAKE_QUANTIZE = torch.ops.fxopt_training.fake_quantize.default
FAKE_QUANTIZED = torch.ops.fxopt_training.fake_quantized.default

_MOMENTUM = 0.01  # of the moving averages of ranges, as in PyTorch's observers

# How far a learned scale may go from the one that the range gives, downwards and upwards. At 8 bits its gradient is
# mostly rounding noise, and without bounds a large step size of the optimizer takes a channel to zero for good.
_NARROWEST, _WIDEST = 0.25, 2.0


class Grid(Protocol):
    """What integers there are, and the scale and zero point with which they stand for a range."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the integers."""

    @property
    def qmin(self) -> int:
        """Smallest integer."""

    @property
    def qmax(self) -> int:
        """Largest integer."""

    def parameters(self, low: float | torch.Tensor, high: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point for the range from *low* to *high*."""


class FakeQuantize(nn.Module):
    """What all fake quantization has: a grid, a scale that may be a parameter, and switches.

    Attributes:
        enabled: whether anything is rounded.
        frozen: whether the range of an activation stays as it is.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, grid: Grid, scale: torch.Tensor, zero_point: torch.Tensor, *, learnable: bool) -> None:
        super().__init__()
        self.grid = grid
        self.enabled = True
        self.frozen = False
        self.learnable = learnable
        if learnable:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def set(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Take another scale and zero point, in place; what backward has kept of the old ones is not disturbed."""
        self.scale.data.copy_(scale.reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))

    def _bounded(self, around: torch.Tensor, widest: float) -> torch.Tensor:
        """The learned scale, taken back to where it makes sense *around* that of the range."""
        self.scale.data.clamp_(around * _NARROWEST, around * widest)
        return self.scale

    def extra_repr(self) -> str:
        """Grid and switches, for ``print(module)``."""
        kind = "learned step" if self.learnable else "frozen" if self.frozen else "moving average"
        dtype = str(self.grid.dtype).removeprefix("torch.")
        return f"{dtype} [{self.grid.qmin}, {self.grid.qmax}], {kind}" + ("" if self.enabled else ", disabled")


class ActivationFakeQuantize(FakeQuantize):
    """One scale for a group of values: their ranges are observed in training, then all are rounded to one grid.

    Args:
        grid: integers of the values.
        sources: number of values that decide the range; the others of the group only repeat them.
        steps: training steps in which the range follows the data (moving averages of the extremes).
        learnable: learn the scale; the range is then observed in the first step alone, and only where none was given.
    """

    low: torch.Tensor
    high: torch.Tensor
    seen: torch.Tensor
    start: torch.Tensor

    def __init__(self, grid: Grid, sources: int, steps: int, *, learnable: bool) -> None:
        super().__init__(grid, torch.ones(1), torch.zeros(1, dtype=torch.int32), learnable=learnable)
        self.steps = 1 if learnable else steps
        self.register_buffer("low", torch.zeros(sources))
        self.register_buffer("high", torch.zeros(sources))
        self.register_buffer("seen", torch.zeros(sources, dtype=torch.int64))
        self.register_buffer("start", torch.ones(1))

    def calibrate(self, ranges: list[tuple[float, float]]) -> None:
        """Start from known ranges, one for each source."""
        self.low.copy_(torch.tensor([low for low, _ in ranges]))
        self.high.copy_(torch.tensor([high for _, high in ranges]))
        self.seen.fill_(1)
        self._settle()

    @property
    def calibrated(self) -> bool:
        """Whether a range is known."""
        return bool((self.seen > 0).any())

    @property
    def step(self) -> torch.Tensor:
        """The scale that it rounds with: a learned one within its bounds, wherever the optimizer has put it."""
        return self._bounded(self.start, _WIDEST) if self.learnable else self.scale

    def forward(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """*x* rounded to the grid; a *source* of -1 repeats values that have been."""
        if source < 0:
            return x
        if self.training and not self.frozen:
            self._observe(x, source)
        if not self.enabled:
            return x
        if not self.training and not self.calibrated:
            raise PreconditionError(
                "the ranges of activations are not known yet: give calibration= to fxopt.prepare, or train first "
                "(call train() and run a batch)"
            )
        low, high = self.grid.qmin, self.grid.qmax
        if not self.learnable:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, low, high)
        features = x[0].numel() if x.dim() > 1 else x.numel()
        factor = (max(features, 1) * high) ** -0.5
        scale, zero_point = self.step, self.zero_point.to(x.dtype)
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, low, high, factor)

    def _observe(self, x: torch.Tensor, source: int) -> None:
        with torch.no_grad():
            seen = int(self.seen[source])
            if seen == self.steps and self.learnable:
                # Processes that train together have seen other data each; buffers are those of the first one by now.
                self.scale.data.copy_(self.start)
                self.seen[source] += 1
            if seen >= self.steps or x.numel() == 0:
                return
            low, high = torch.aminmax(x.detach().float())
            if not bool(torch.isfinite(high - low)) or (low == 0 and high == 0):
                return  # such a batch says nothing of the range, and would stay in the moving average for good
            weight = max(_MOMENTUM, 1 / (seen + 1))  # a plain mean at first
            self.low[source].lerp_(low, weight)
            self.high[source].lerp_(high, weight)
            self.seen[source] += 1
            self._settle()

    def _settle(self) -> None:
        known = self.seen > 0
        scale, zero_point = self.grid.parameters(self.low[known].min(), self.high[known].max())
        self.set(scale, zero_point)
        self.start.fill_(scale)


class WeightFakeQuantize(FakeQuantize):
    """A weight rounded symmetrically, one scale for each output channel: the largest magnitude's, or a learned one.

    Args:
        grid: integers of the weight.
        weight: as it is now.
        axis: of the output channels.
        learnable: learn the scales, from those of the largest magnitudes on.
    """

    def __init__(self, grid: Grid, weight: torch.Tensor, axis: int, *, learnable: bool) -> None:
        self.axis = axis
        scale, zero_point = grid.parameters(*_extremes(weight, axis))
        super().__init__(grid, scale, zero_point.to(torch.int32), learnable=learnable)

    def forward(self, weight: torch.Tensor, source: int = 0) -> torch.Tensor:
        """*weight* rounded to the grid."""
        if not self.enabled:
            return weight
        low, high = self.grid.qmin, self.grid.qmax
        scale, zero_point = self.grid.parameters(*_extremes(weight, self.axis))
        if self.learnable:
            factor = (weight.numel() * high) ** -0.5
            scale, zero_point = self._bounded(scale, 1.0), self.zero_point.to(weight.dtype)  # no use beyond the range
            return torch._fake_quantize_learnable_per_channel_affine(
                weight, scale, zero_point, self.axis, low, high, factor
            )
        self.set(scale, zero_point)
        return torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero_point, self.axis, low, high)


def _extremes(weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    others = [d for d in range(weight.dim()) if d != axis]
    extent = weight.detach().float().abs().amax(dim=others)
    return -extent, extent
