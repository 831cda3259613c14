"""Each weight learns whether to round up or down, so that its layer gives what it gave in float. Lossy.

    conv(x', nearest(W))   →   conv(x', s·(⌊W/s⌋ + h))        h ∈ {0, 1} for each weight

Nearest is the best rounding of a weight, not of a layer: errors of weights that act together can cancel. Nagel et al.
2020, "Up or Down? Adaptive Rounding for Post-Training Quantization": h is a rectified sigmoid of a free variable
(equation 23), learned with Adam on the squared error of the layer's output after its activation, from the inputs that
it gets once the layers before it are quantized (equation 25). A regulariser Σ 1 − |2h − 1|^β with an annealed β
(equation 24) drives h to 0 or 1.

What is learned from are positions sampled from the calibration data, with the patch of inputs that each of them reads.
One in five is kept to judge by: a layer keeps rounding to nearest where learning did not make it better there. The bias
beside a moved weight is corrected as by ``bias-correction``, which cannot do it later; learning counts on that, and has
no rounding spent on the mean of a channel.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import fx

from fxopt import ops, progress
from fxopt.errors import SpecError
from fxopt.passbase import Pass, PassContext
from fxopt.passes.insert_fake_quant import layerwise, weight_grid
from fxopt.passes.insert_fake_quant.layerwise import Change, Layer
from fxopt.passes.insert_fake_quant.samples import Samples
from fxopt.passes.insert_fake_quant.weight_grid import WeightGrid
from fxopt.rewriter import Rewriter

# Ends of the sigmoid before it is cut to [0, 1] (zeta and gamma of the paper).
_HIGH, _LOW = 1.1, -0.1
# Weight of the regulariser, against an output error of 1 for rounding to nearest (with less, weights are left halfway);
# its first and last exponent; the share of iterations without it.
_REGULARISER, _BETA, _WARM_UP = 10.0, (20.0, 2.0), 0.2


@dataclasses.dataclass(frozen=True)
class AdaRound(Pass):
    """Learn the rounding of the weights of convs and linears, one layer after the other.

    Deterministic on one machine with one number of threads. An interrupt (Ctrl-C) ends the learning; the layers that
    are done keep what they learned. A second run changes nothing: a weight on its grid is left alone, and layers that
    keep rounding to nearest have their weight set to the nearest points.

    Attributes:
        iterations: steps of Adam for each layer.
        batch: positions in each step.
        learning_rate: of Adam, for the variables under the sigmoid.
        samples: rows of calibration data that are looked at; fewer where they do not fit in memory.
        seed: of the sampling.
    """

    name: ClassVar[str] = "ada-round"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = ("insert-fake-quant", "convert-fake-quant", "gptq")
    runs_before: ClassVar[tuple[str, ...]] = ("freeze-quantized-weights",)
    iterations: int = 1000
    batch: int = 256
    learning_rate: float = 0.1
    samples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        self.require_at_least(1, "iterations", "batch", "samples")
        if self.learning_rate <= 0:
            raise SpecError(f"ada-round: learning_rate must be above 0, not {self.learning_rate}")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One walk over the calibration data, in which each layer is learned when its inputs are known.

        Raises:
            PreconditionError: there is no calibration data.
        """
        grids = weight_grid.movable(self, rewriter, _refusal)
        if not grids:
            return
        before = rewriter.program.copy()
        batches = layerwise.batches(self, rewriter, ctx, self.samples)
        found: dict[fx.Node, Change] = {}
        gains: list[float] = []

        def visit(layer: Layer) -> Change:
            title = f"{self.name}: layer {len(found) + 1} of {len(grids)}"
            change, gain = self._settle(layer, grids[layer.node], title)
            found[layer.node] = change
            gains.append(gain)
            if gain >= 1:
                rewriter.skip(layer.node, "no rounding was found that is better than to nearest")
            return change

        try:
            layerwise.Walk(rewriter.program, batches, grids).run(visit)
        except KeyboardInterrupt:
            rewriter.note(f"interrupted: {len(found)} of {len(grids)} layers have learned, the others round to nearest")
        weight_grid.carry_out(rewriter, grids, found)
        if found:
            mean = math.exp(sum(math.log(max(gain, 1e-9)) for gain in gains) / len(gains))
            rewriter.note(
                f"squared error of a layer: {mean:.2f} of that of rounding to nearest, on positions kept back"
            )
            layerwise.note_outputs(self, rewriter, ctx, before)

    def _settle(self, layer: Layer, grid: WeightGrid, title: str) -> tuple[Change, float]:
        """What *layer* is to have, and its squared error over that of rounding to nearest."""
        nearest = grid.nearest()
        known, judge = Samples.take(layer, self.seed)
        shift = layer.shift(nearest)
        start = shift if layer.bias is None else layer.bias + shift
        learned = self._learn(grid, known, start, title)
        moved, old = (judge.error(w, start + judge.shift(w, nearest)).item() for w in (learned, nearest))
        gain = moved / old if old > 0 else 1.0
        weight = learned if gain < 1 else nearest
        bias = None if layer.bias is None else (layer.bias + layer.shift(weight)).to(layer.weight.dtype)
        return Change(weight, bias), min(gain, 1.0)

    def _learn(self, grid: WeightGrid, known: Samples, bias: torch.Tensor, title: str) -> torch.Tensor:
        """The weight on its grid that gives the least error on *known*."""
        scale, below = grid.scale, (grid.weight / grid.scale).floor()
        rest = (grid.weight / scale - below).clamp(0.01, 0.99)
        variable = (-torch.log((_HIGH - _LOW) / (rest - _LOW) - 1)).requires_grad_(True)
        optimizer = torch.optim.Adam([variable], lr=self.learning_rate)
        generator = torch.Generator().manual_seed(self.seed)
        nearest, stays = grid.nearest(), grid.weight != 0  # what pruning has set to zero stays zero
        usual = known.error(nearest, bias).item() or 1.0
        for i in range(self.iterations):
            if i % 100 == 0:
                progress.say(f"{title}, step {i} of {self.iterations}")
            with torch.enable_grad():
                up = (torch.sigmoid(variable) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
                soft = (below + up).clamp(grid.qmin, grid.qmax) * scale * stays
                chosen = torch.randint(0, known.count, (min(self.batch, known.count),), generator=generator)
                loss = known.error(soft, bias + known.shift(soft, nearest), chosen) / usual
                done = (i / self.iterations - _WARM_UP) / (1 - _WARM_UP)
                if done > 0:
                    beta = _BETA[1] + (_BETA[0] - _BETA[1]) * 0.5 * (1 + math.cos(done * math.pi))
                    loss = loss + _REGULARISER * (1 - (2 * up - 1).abs() ** beta).mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        up = (variable.detach() >= 0).float()
        return (below + up).clamp(grid.qmin, grid.qmax) * scale * stays


def _refusal(unit: fx.Node) -> str | None:
    transposed = ops.kind(unit) == "conv_transpose"
    return "a transposed convolution keeps rounding to nearest" if transposed else None
