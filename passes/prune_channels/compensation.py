"""What removed channels contribute although nothing excites them goes into the bias of what reads them.

    linear(x, W, b), x_c removed   →   linear(x', W', b + Σ_c W[:, c] · m_c)

Without calibration data m_c is the value of the channel when the weights that make it are zero: its bias and the shift
of its batch norm, through the activation (Ye et al., "Rethinking the smaller-norm-less-informative assumption in
channel pruning", ICLR 2018, section 4.2). With calibration data it is the mean of the channel, which keeps the mean of
what reads it. At a border that is padded with zeros the constant is not quite one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.execute import evaluate
from fxopt.passbase import Pass, PassContext
from fxopt.passes.prune_channels.coupling import Coupling
from fxopt.passes.prune_channels.dims import Atom, atoms, kept
from fxopt.rewriter import Rewriter

_UNITS = ("conv", "linear")


def find(
    one: Pass, ctx: PassContext, coupling: Coupling, plan: Mapping[Atom, torch.Tensor]
) -> dict[fx.Node, torch.Tensor]:
    """For each conv and linear that reads removed channels, what its bias gains: f32[outputs that stay]."""
    indices = dict(plan)
    units = [
        unit for unit in coupling.program.graph.nodes if ops.kind(unit) in _UNITS and _reads(coupling, unit, indices)
    ]
    means = _means(one, ctx, coupling, indices, {unit.all_input_nodes[0] for unit in units})
    shifts = {}
    for unit in units:
        a, x = ops.arguments(unit), unit.all_input_nodes[0]
        weight = coupling.program.constants[str(a["weight"].target)].detach().double()
        mean = means[x].clone()
        mean[kept(_channels(coupling, unit), indices)] = 0
        groups = a.get("groups", 1)
        weight = weight.flatten(2).sum(2) if weight.dim() > 2 else weight  # outputs × inputs of a group
        by_group = weight.reshape(groups, -1, weight.shape[1]) @ mean.reshape(groups, weight.shape[1], 1)
        outputs = kept(coupling.axes[a["weight"]][0], indices)
        shifts[unit] = by_group.flatten()[outputs].float()
    return shifts


def add(rewriter: Rewriter, shifts: Mapping[fx.Node, torch.Tensor]) -> None:
    """Give the units these larger biases, or biases at all."""
    for unit, shift in shifts.items():
        a = ops.arguments(unit)
        old = a["bias"]
        value = None if old is None else rewriter.tensor(old)
        if old is not None and value is None:
            rewriter.skip(unit, "its bias is computed, so that removed channels are not made up for")
            continue
        total = shift.to(a["weight"].meta["val"].dtype) + (0 if value is None else value.detach())
        name = old.target if old is not None else f"{str(a['weight'].target).removesuffix('.weight')}.bias"
        new = rewriter.constant(f"{name}_compensated", total)
        assert callable(unit.target)
        rewriter.replace(unit, rewriter.call(unit.target, tuple((a | {"bias": new}).values()), before=unit))


def _reads(coupling: Coupling, unit: fx.Node, plan: dict[Atom, torch.Tensor]) -> bool:
    a = ops.arguments(unit)
    constant = isinstance(a["weight"], fx.Node) and a["weight"].op == "get_attr"
    if not constant or ops.is_fused(unit):
        return False
    dim = _channels(coupling, unit)
    return bool(len(kept(dim, plan)) < dim.size)


def _channels(coupling: Coupling, unit: fx.Node) -> Any:
    """The axis of the input that the weight is multiplied with."""
    axes = coupling.of(unit.all_input_nodes[0])
    spatial = unit.all_input_nodes[1].meta["val"].dim() - 2
    return axes[-1] if ops.kind(unit) == "linear" else axes[-1 - spatial]


def _means(
    one: Pass, ctx: PassContext, coupling: Coupling, plan: dict[Atom, torch.Tensor], wanted: set[fx.Node]
) -> dict[fx.Node, torch.Tensor]:
    """The mean of each channel of the values *wanted*: f64[channels]."""
    sums: dict[fx.Node, torch.Tensor] = {}
    counts = dict.fromkeys(wanted, 0)
    axes = {node: _axis(coupling, node) for node in wanted}

    def look(node: fx.Node, value: Any) -> None:
        if node in wanted:
            rows = value.detach().double().movedim(axes[node], 0).flatten(1)
            sums[node] = sums.get(node, 0) + rows.sum(1)
            counts[node] += rows.shape[1]

    if ctx.calibration is None:
        evaluate(coupling.program, ctx.inputs, constants=_unexcited(coupling, plan), observe=look)
    else:
        for leaves in ctx.batches(one):
            evaluate(coupling.program, leaves, observe=look)
    return {node: total / max(1, counts[node]) for node, total in sums.items()}


def _axis(coupling: Coupling, value: fx.Node) -> int:
    """The axis of the channels in *value*, which a unit reads."""
    unit = next(user for user in value.users if ops.kind(user) in _UNITS and user.all_input_nodes[0] is value)
    rank: int = value.meta["val"].dim()
    return rank - 1 if ops.kind(unit) == "linear" else rank + 1 - int(unit.all_input_nodes[1].meta["val"].dim())


def _unexcited(coupling: Coupling, plan: dict[Atom, torch.Tensor]) -> dict[str, Any]:
    """The constants, with zeros for the weights that make removed channels."""
    constants = dict(coupling.program.constants)
    for unit in coupling.program.graph.nodes:
        weight = ops.arguments(unit).get("weight") if ops.kind(unit) in (*_UNITS, "conv_transpose") else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            axis = 1 if ops.kind(unit) == "conv_transpose" else 0
            dim = coupling.axes[weight][axis]
            if set(atoms(dim)) & set(atoms(_channels(coupling, unit))):
                continue  # a depthwise convolution hands its channels on
            stays = torch.zeros(dim.size, dtype=torch.bool)
            stays[kept(dim, plan)] = True
            value = constants[str(weight.target)].detach()
            shape = [-1 if d == axis else 1 for d in range(value.dim())]
            constants[str(weight.target)] = value * stays.reshape(shape)
    return constants
