"""The mean error that quantization leaves in each output channel is taken up by the bias. Lossy, as what it corrects.

    conv(x', W', b)   →   conv(x', W', b + E[W x] − E[W' x'])        x, W in float; x', W' quantized

Rounding a weight is no noise around zero: for inputs that are mostly positive (after a relu) the error of a channel has
a mean, which later layers carry on. The expectations are means over calibration data and positions (Nagel et al. 2019,
"Data-Free Quantization", section 4.2 and appendix D, the empirical form), before residual and activation. Layers are
corrected in graph order, each with the inputs that it gets from the corrected layers before it, in one walk over the
data.

Where a pass before this one has moved weights on their grid, it has corrected the biases beside them itself, and those
are left alone: what the weights were in float is no longer in the graph.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from fxopt import progress
from fxopt.passbase import Pass, PassContext
from fxopt.passes.insert_fake_quant import layerwise, weight_grid
from fxopt.passes.insert_fake_quant.layerwise import Change, Layer
from fxopt.rewriter import Rewriter


@dataclasses.dataclass(frozen=True)
class BiasCorrection(Pass):
    """Correct the bias of each quantized conv and linear, or give it one.

    A second run changes nothing: a corrected bias is known by its name.

    Attributes:
        samples: rows of calibration data that are looked at; fewer where they do not fit in memory.
    """

    name: ClassVar[str] = "bias-correction"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = ("insert-fake-quant", "convert-fake-quant", "ada-round", "gptq")
    runs_before: ClassVar[tuple[str, ...]] = ("freeze-quantized-weights",)
    samples: int = 512

    def __post_init__(self) -> None:
        self.require_at_least(1, "samples")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One walk over the calibration data, then one edit for each layer.

        Raises:
            PreconditionError: there is no calibration data.
        """
        units = []
        for unit in weight_grid.fake_quantized_units(self, rewriter):
            reason = weight_grid.bias_reason(rewriter, unit)
            if reason is None:
                units.append(unit)
            else:
                rewriter.skip(unit, reason)
        if not units:
            return
        before = rewriter.program.copy()
        found: dict[fx.Node, Change] = {}

        def visit(layer: Layer) -> Change:
            progress.say(f"{self.name}: layer {len(found) + 1} of {len(units)}")
            shift = layer.shift(layer.rounded)
            bias = shift if layer.bias is None else layer.bias + shift
            found[layer.node] = Change(bias=bias.to(layer.weight.dtype))
            return found[layer.node]

        layerwise.Walk(rewriter.program, layerwise.batches(self, rewriter, ctx, self.samples), set(units)).run(visit)
        for unit, change in found.items():
            assert change.bias is not None
            weight_grid.move_bias(rewriter, unit, change.bias)
        layerwise.note_outputs(self, rewriter, ctx, before)
