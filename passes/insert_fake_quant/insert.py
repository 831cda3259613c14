"""The edits: quantize and dequantize where the placement says, and around the weight of each unit.

    conv(x, @w)   →   conv(dequantize(quantize(x)), dequantize(quantize(@w)))

Weights stay float constants here, so that later passes may still move them on their grid; ``freeze-quantized-weights``
turns them into integers in the end.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxopt import fused, ops, quantized
from fxopt.passes.insert_fake_quant.grid import Grid
from fxopt.passes.insert_fake_quant.placement import Placement, readers
from fxopt.passes.insert_fake_quant.scheme import Scheme
from fxopt.rewriter import Rewriter

aten = torch.ops.aten
INT4 = Grid(torch.int8, symmetric=True, qmin=-8, qmax=7)


@dataclasses.dataclass(frozen=True)
class Range:
    """Smallest and largest value that one group of quantized values is to stand for."""

    low: float
    high: float

    def union(self, other: Range) -> Range:
        """The smallest range that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))


def activations(rewriter: Rewriter, placement: Placement, grid: Grid, ranges: Mapping[fx.Node, Range]) -> None:
    """Quantize the values of *placement*; *ranges* holds one for each group, by its representative."""
    pairs: dict[fx.Node, list[fx.Node]] = {}
    for value, group in placement.quantized.items():
        users = list(readers(value, placement))
        if users:
            scale, zero_point = grid.parameters(ranges[group].low, ranges[group].high)
            pairs[value] = users
            restored = _pair(rewriter, value, float(scale), int(zero_point), grid)
            for user in users:
                rewriter.rewire(user, value, restored)


def _pair(rewriter: Rewriter, value: fx.Node, scale: float, zero_point: int, grid: Grid) -> fx.Node:
    before = value.next if value.op == "call_function" else rewriter.first_call()
    how = (scale, zero_point, grid.qmin, grid.qmax, grid.dtype)
    q = rewriter.call(quantized.QUANTIZE, (value, *how), before=before, origin=value)
    return rewriter.call(quantized.DEQUANTIZE, (q, *how), before=before, origin=value)


def dynamic(rewriter: Rewriter, units: list[fx.Node], grid: Grid) -> None:
    """Quantize the input of each of *units* with the range that it has at each call."""
    made: dict[fx.Node, fx.Node] = {}
    for unit in units:
        x = unit.all_input_nodes[0]
        if x not in made:
            before = x.next if x.op == "call_function" else rewriter.first_call()
            ends = (grid.qmin, grid.qmax)
            chosen = rewriter.call(
                quantized.CHOOSE_QPARAMS,
                (x, *ends, torch.finfo(torch.float32).eps, grid.dtype),
                before=before,
                origin=x,
            )
            how = [rewriter.call(operator.getitem, (chosen, i), before=before, origin=x) for i in (0, 1)]
            args = (*how, *ends, grid.dtype)
            q = rewriter.call(quantized.QUANTIZE_TENSOR, (x, *args), before=before, origin=x)
            made[x] = rewriter.call(quantized.DEQUANTIZE_TENSOR, (q, *args), before=before, origin=x)
        rewriter.rewire(unit, x, made[x])


def weight(rewriter: Rewriter, unit: fx.Node, grid: Grid, *, per_channel: bool) -> None:
    """Fake-quantize the weight of *unit* symmetrically, one scale for each output channel or one for all."""
    node = ops.arguments(unit)["weight"]
    shared = next((u for u in node.users if quantized.is_quantize(u)), None)
    if shared is not None:  # a tied weight is quantized once
        restored = next(iter(shared.users))
        rewriter.rewire(unit, node, restored)
        return
    tensor = rewriter.tensor(node)
    assert tensor is not None
    axis = 1 if ops.kind(unit) == "conv_transpose" else 0
    values = tensor.detach().float()
    extent = (
        values.abs().amax(dim=[d for d in range(values.dim()) if d != axis]) if per_channel else values.abs().amax()
    )
    scale, zero_point = grid.parameters(-extent, extent)
    name = str(node.target)
    if not per_channel:
        how: tuple[object, ...] = (float(scale), int(zero_point), grid.qmin, grid.qmax, grid.dtype)
        q = rewriter.call(quantized.QUANTIZE, (node, *how), before=unit)
        restored = rewriter.call(quantized.DEQUANTIZE, (q, *how), before=unit)
    else:
        scales = rewriter.constant(f"{name}_scale", torch.as_tensor(scale, dtype=torch.float32))
        zeros = rewriter.constant(f"{name}_zero_point", torch.zeros(scales.meta["val"].shape, dtype=torch.int64))
        how = (scales, zeros, axis, grid.qmin, grid.qmax, grid.dtype)
        q = rewriter.call(quantized.QUANTIZE_CHANNEL, (node, *how), before=unit)
        restored = rewriter.call(quantized.DEQUANTIZE_CHANNEL, (q, *how), before=unit)
    rewriter.rewire(unit, node, restored)


def group_of(weight: torch.Tensor, group_size: int, multiple: int) -> int:
    """Inputs in a group: *group_size*, or the next smaller number that divides them all and is one of *multiple*.

    1 where there is none. A group that is the whole row may have any size.
    """
    columns = weight.shape[1]
    sizes = range(min(group_size, columns), 1, -1)
    return next((s for s in sizes if columns % s == 0 and (s == columns or s % multiple == 0)), 1)


def grouped_weight(rewriter: Rewriter, unit: fx.Node, size: int) -> None:
    """Fake-quantize the weight of a linear to int4, one scale for each *size* inputs of one output."""
    node = ops.arguments(unit)["weight"]
    tensor = rewriter.tensor(node)
    assert tensor is not None
    extent = tensor.detach().float().reshape(len(tensor), -1, size).abs().amax(-1)
    scale = rewriter.constant(f"{node.target}_scale", INT4.parameters(-extent, extent)[0].float())
    zeros = rewriter.constant(f"{node.target}_zero_point", torch.zeros(extent.shape, dtype=torch.int64))
    how = (scale, zeros, INT4.qmin, INT4.qmax, INT4.dtype, size)
    q = rewriter.call(quantized.QUANTIZE_GROUP, (node, *how), before=unit)
    restored = rewriter.call(quantized.DEQUANTIZE_GROUP, (q, *how, torch.float32), before=unit)
    rewriter.rewire(unit, node, restored)


def split_units(rewriter: Rewriter, scheme: Scheme) -> None:
    """Fused ops taken apart where the engine of *scheme* has no such int8 kernel.

    conv(x, residual=r, "hardswish")   →   hardswish(add(conv(x), r))
    conv(x, "silu")                    →   mul(y, sigmoid(y)), y = conv(x)         where both have int8 kernels
    """
    for unit in [n for n in rewriter.nodes() if ops.is_fused(n) and ops.kind(n) not in scheme.float_results]:
        a = ops.arguments(unit)
        apart = scheme.residual == "separate" and a["residual"] is not None
        name = a["activation"]
        if not apart and (name == "none" or name in scheme.fused_activations):
            continue
        bare = _replaced(rewriter, unit, residual=None if apart else a["residual"], activation=("none", ()))
        y = rewriter.call(aten.add.Tensor, (bare, a["residual"]), before=unit) if apart else bare
        if name != "none":
            in_parts = name == "silu" and {"sigmoid", "mul"} <= scheme.elementwise
            y = _silu(rewriter, y, unit) if in_parts else _activate(rewriter, y, name, a["activation_args"], unit)
        rewriter.replace(unit, y)


def _replaced(rewriter: Rewriter, unit: fx.Node, **changes: object) -> fx.Node:
    """*unit* again with another residual and activation."""
    a = ops.arguments(unit) | {"residual": changes["residual"]}
    a["activation"], a["activation_args"] = changes["activation"]  # type: ignore[misc]
    target = fused.LINEAR if ops.kind(unit) == "linear" else unit.target
    return rewriter.call(target, tuple(a.values()), before=unit)  # type: ignore[arg-type]


def _silu(rewriter: Rewriter, y: fx.Node, before: fx.Node) -> fx.Node:
    """For an engine that has int8 kernels for what it is made of: y · sigmoid(y)."""
    gate = rewriter.call(aten.sigmoid.default, (y,), before=before)
    return rewriter.call(aten.mul.Tensor, (y, gate), before=before)


def _activate(rewriter: Rewriter, y: fx.Node, name: str, args: Sequence[float], before: fx.Node) -> fx.Node:
    compute = ops.ACTIVATIONS[name]
    if isinstance(compute, functools.partial):
        return rewriter.call(compute.func, (y, *args), compute.keywords, before=before)
    return rewriter.call(compute, (y, *args), before=before)
