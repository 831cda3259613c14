"""The grid on which a fake-quantized weight still moves, and the edits that move it and the bias beside it.

    conv(x, dequantize(quantize(@w, s)), @b)   →   conv(x, dequantize(quantize(@k·s, s)), @b + δ)      k integers

Between ``insert-fake-quant`` and ``freeze-quantized-weights`` weights are float constants. One that lies on the points
of its grid comes out of quantize and dequantize as it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import torch
from torch import fx

from fxopt import ops, quantized
from fxopt.notice import warn
from fxopt.passbase import Pass
from fxopt.passes.insert_fake_quant.layerwise import Change
from fxopt.rewriter import Rewriter

# How far from a grid point, in steps, float32 leaves a value that was computed to lie there.
_OFF_GRID = 1e-3
_CORRECTED = re.compile(r"_corrected(_\d+)?$")  # of a bias's name: it is not corrected again


@dataclasses.dataclass(frozen=True)
class WeightGrid:
    """The weight of one conv or linear, and the points that it is rounded to.

    Attributes:
        source: the node of the float constant; ``quantize`` the one that rounds it.
        weight: the float values.
        scale: the step at each element, in a shape that broadcasts to that of the weight.
        qmin: smallest integer; ``qmax``: largest.
    """

    source: fx.Node
    quantize: fx.Node
    weight: torch.Tensor
    scale: torch.Tensor
    qmin: int
    qmax: int

    def nearest(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """The grid points nearest to *values*, or to the weight."""
        given = self.weight if values is None else values
        return (given / self.scale).round().clamp(self.qmin, self.qmax) * self.scale

    @property
    def is_settled(self) -> bool:
        """Whether the weight lies on its grid already."""
        return bool(((self.weight - self.nearest()).abs() <= _OFF_GRID * self.scale).all())


def fake_quantized_units(one: Pass, rewriter: Rewriter) -> list[fx.Node]:
    """The convs and linears whose weight is quantized, in graph order; a warning where *one* has none to work on."""
    kinds = ("conv", "conv_transpose", "linear")
    units = [node for node in rewriter.nodes() if ops.kind(node) in kinds]
    found = [unit for unit in units if quantized.is_dequantize(ops.arguments(unit)["weight"])]
    if units and not found:
        text = f"{one.name} does nothing: no weight is quantized. Put insert-fake-quant before it"
        rewriter.note(text)
        warn(text)
    return found


def movable(one: Pass, rewriter: Rewriter, refusal: Callable[[fx.Node], str | None]) -> dict[fx.Node, WeightGrid]:
    """The units whose weight *one* may move on its grid and has not yet; others are left alone, for the reason."""
    grids = {}
    for unit in fake_quantized_units(one, rewriter):
        found = refusal(unit) or find(rewriter, unit)
        if isinstance(found, str):
            rewriter.skip(unit, found)
        elif not found.is_settled:
            grids[unit] = found
    return grids


def carry_out(rewriter: Rewriter, grids: Mapping[fx.Node, WeightGrid], changes: Mapping[fx.Node, Change]) -> None:
    """Move the weights, and the biases beside them."""
    for unit, change in changes.items():
        if change.weight is not None:
            move_weight(rewriter, grids[unit], change.weight)
        if change.bias is not None:
            move_bias(rewriter, unit, change.bias)


def find(rewriter: Rewriter, unit: fx.Node) -> WeightGrid | str:
    """The grid of *unit*'s weight, which is quantized; or why it cannot be moved."""
    restored = ops.arguments(unit)["weight"]
    q = restored.args[0]
    if not quantized.is_quantize(q):
        return "its weight is integers already"
    source = q.args[0]
    weight = rewriter.tensor(source)
    if weight is None:
        return "its weight is computed, not a constant"
    others = [user for user in restored.users if user is not unit]
    if others or len(q.users) > 1:
        return f"its weight is shared with {others[0].name if others else 'another op'}"
    how = quantized.parameters(q)
    scale = rewriter.tensor(how.scale) if isinstance(how.scale, fx.Node) else torch.tensor(how.scale)
    zero = rewriter.tensor(how.zero_point) if isinstance(how.zero_point, fx.Node) else how.zero_point
    if scale is None or zero is None or bool(torch.as_tensor(zero).any()):
        return "its weight is not quantized symmetrically"
    if how.axis is not None:
        scale = scale.reshape([-1 if d == how.axis else 1 for d in range(weight.dim())])
    elif scale.dim() == 2:
        scale = scale.repeat_interleave(ops.arguments(q)["group_size"], 1)
    return WeightGrid(source, q, weight.detach(), scale.detach().float(), how.qmin, how.qmax)


def bias_reason(rewriter: Rewriter, unit: fx.Node) -> str | None:
    """Why the bias of *unit* must stay as it is, or None."""
    bias = ops.arguments(unit).get("bias")
    if bias is None:
        return None
    if rewriter.tensor(bias) is None:
        return "its bias is computed, not a constant"
    return "its bias is corrected already" if _CORRECTED.search(str(bias.target)) else None


def move_weight(rewriter: Rewriter, grid: WeightGrid, weight: torch.Tensor) -> None:
    """Let the quantize of *grid* read *weight*; what else reads the old one goes on doing so."""
    new = rewriter.constant(f"{grid.source.target}_rounded", weight.to(grid.weight.dtype))
    rewriter.rewire(grid.quantize, grid.source, new)


def move_bias(rewriter: Rewriter, unit: fx.Node, bias: torch.Tensor) -> None:
    """Give *unit* the bias *bias*, marked as corrected."""
    a = ops.arguments(unit)
    old = a["bias"]
    new = rewriter.constant(f"{old.target if old is not None else f'{unit.name}_bias'}_corrected", bias)
    if old is not None:
        rewriter.rewire(unit, old, new)
        return
    assert callable(unit.target)
    again = rewriter.call(unit.target, tuple((a | {"bias": new}).values()), before=unit)
    rewriter.replace(unit, again)
