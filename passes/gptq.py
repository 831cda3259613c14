"""The error of each rounded weight of a linear is made up for by the weights that are still to be rounded. Lossy.

    linear(x', nearest(W))   →   linear(x', Q)        Q on the same grid, ‖W x' − Q x'‖ least, column by column

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1:
with H = Σ x' x'ᵀ over the calibration data and U the upper Cholesky factor of H⁻¹, column j is rounded, and the columns
k after it move by −(w_j − q_j)/U_jj · U_jk. In blocks, so that most of it is matrix products. With ``act_order`` the
columns whose inputs are largest are rounded first, while all others can still make up for them.

The scales are those that insert-fake-quant chose, one for each row or each group of a row: int8 and int4 alike. x' is
what the layer reads once the layers before it are quantized. A linear keeps rounding to nearest where that is better.
What pruning has set to zero stays zero, and the others make up for that (Frantar and Alistarh 2023, "SparseGPT").
Beside a moved weight an existing bias is corrected as by ``bias-correction``, which cannot do it later.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from fxopt import ops, progress
from fxopt.errors import SpecError
from fxopt.passbase import Pass, PassContext
from fxopt.passes.insert_fake_quant import layerwise, weight_grid
from fxopt.passes.insert_fake_quant.layerwise import Change, Layer
from fxopt.passes.insert_fake_quant.weight_grid import WeightGrid
from fxopt.rewriter import Rewriter
from fxopt.second_order import inverse_factor


@dataclasses.dataclass(frozen=True)
class Gptq(Pass):
    """Round the weights of linears with respect to what they read.

    A second run changes nothing: a weight on its grid is left alone, and linears that keep rounding to nearest have
    their weight set to the nearest points.

    Attributes:
        damping: added to the diagonal of H, as a fraction of its mean.
        act_order: round the columns with the largest inputs first.
        block: columns after which the rest is brought up to date.
        samples: rows of calibration data that are looked at; fewer where they do not fit in memory.
    """

    name: ClassVar[str] = "gptq"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = ("insert-fake-quant", "convert-fake-quant")
    runs_before: ClassVar[tuple[str, ...]] = ("freeze-quantized-weights",)
    damping: float = 0.01
    act_order: bool = True
    block: int = 128
    samples: int = 512

    def __post_init__(self) -> None:
        self.require_at_least(1, "block", "samples")
        if self.damping <= 0:
            raise SpecError(f"gptq: damping must be above 0, not {self.damping}")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One walk over the calibration data, in which each linear is rounded when its inputs are known.

        Raises:
            PreconditionError: there is no calibration data.
        """
        grids = weight_grid.movable(self, rewriter, _refusal)
        if not grids:
            return
        before = rewriter.program.copy()
        found: dict[fx.Node, Change] = {}

        def visit(layer: Layer) -> Change:
            progress.say(f"{self.name}: layer {len(found) + 1} of {len(grids)}")
            grid, hessian = grids[layer.node], second_moments(layer)
            weight, nearest = self._round(grid, hessian), grid.nearest()
            if weight is None or _error(weight, grid, hessian) >= _error(nearest, grid, hessian):
                rewriter.skip(layer.node, "no rounding was found that is better than to nearest")
                weight = nearest
            bias = None if layer.bias is None else (layer.bias + layer.shift(weight)).to(layer.weight.dtype)
            found[layer.node] = Change(weight, bias)
            return found[layer.node]

        layerwise.Walk(rewriter.program, layerwise.batches(self, rewriter, ctx, self.samples), grids).run(visit)
        weight_grid.carry_out(rewriter, grids, found)
        layerwise.note_outputs(self, rewriter, ctx, before)

    def _round(self, grid: WeightGrid, hessian: torch.Tensor) -> torch.Tensor | None:
        """The weight on its grid, or None where *hessian* cannot be inverted."""
        order = hessian.diagonal().argsort(descending=True, stable=True)
        order = order if self.act_order else torch.arange(len(order))
        weight = grid.weight.double()[:, order]
        scale = grid.scale.double().expand(grid.weight.shape)[:, order]
        factor = inverse_factor(hessian[order][:, order], self.damping)
        if factor is None:
            return None
        result, pruned = torch.empty_like(weight), weight == 0  # which take no part, as in SparseGPT
        for start in range(0, weight.shape[1], self.block):
            end = min(start + self.block, weight.shape[1])
            errors = torch.empty(len(weight), end - start, dtype=weight.dtype)
            for j in range(start, end):
                q = (weight[:, j] / scale[:, j]).round().clamp(grid.qmin, grid.qmax)
                q[pruned[:, j]] = 0
                result[:, j] = q
                errors[:, j - start] = (weight[:, j] - q * scale[:, j]) / factor[j, j]
                weight[:, j:end] -= errors[:, j - start, None] * factor[j, j:end]
            weight[:, end:] -= errors @ factor[start:end, end:]
        integers = torch.empty_like(result)
        integers[:, order] = result
        return integers.float() * grid.scale


def _refusal(unit: fx.Node) -> str | None:
    return None if ops.kind(unit) == "linear" else "gptq is for linears; ada-round takes convolutions too"


def second_moments(layer: Layer) -> torch.Tensor:
    """Σ x xᵀ over all rows that *layer* reads, quantized: float64, (inputs, inputs)."""
    size = layer.weight.shape[1]
    total = torch.zeros(size, size, dtype=torch.float64)
    for x in layer.noisy:
        rows = x.detach().reshape(-1, size).double()
        total.addmm_(rows.T, rows)
    return total


def _error(weight: torch.Tensor, grid: WeightGrid, hessian: torch.Tensor) -> float:
    """Σ ‖(W − Q) x‖² over all rows."""
    off = (grid.weight - weight).double()
    return float(((off @ hessian) * off).sum())
