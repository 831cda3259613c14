"""The dense model with what a plan removes set to zero: what a pruned model must compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.passes.prune_channels.coupling import Coupling
from fxopt.passes.prune_channels.dims import Atom, kept
from fxopt.program import Program


def masked(program: Program, coupling: Coupling, plan: dict[Atom, torch.Tensor], inputs: Sequence[Any]) -> list[Any]:
    """Outputs of *program*; after every op, what the plan removes is zero."""
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            values[node] = program.constants[str(node.target)]
        elif node.op == "output":
            return list(fx.node.map_arg(node.args[0], values.__getitem__))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = _mask(node.target(*args, **kwargs), coupling.axes.get(node, []), plan)
    raise AssertionError("the graph has no output")


def _mask(value: Any, axes: list[Any], plan: dict[Atom, torch.Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        several = axes if axes and isinstance(axes[0], list) else [[]] * len(value)
        return [_mask(one, own, plan) for one, own in zip(value, several, strict=True)]
    if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
        return value
    for axis, dim in enumerate(axes):
        index = kept(dim, plan)
        if len(index) < value.shape[axis]:
            gone = torch.ones(value.shape[axis], dtype=torch.bool).index_fill_(0, index, False)
            value = value.index_fill(axis, gone.nonzero().flatten(), 0)  # 0 / 0 among them, too
    return value
