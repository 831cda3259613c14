"""The ratio that reaches a budget: sizes are counted from the plan, without cutting anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt import cost
from fxopt.errors import PreconditionError
from fxopt.passes.prune_channels.coupling import Coupling
from fxopt.passes.prune_channels.dims import Atom

_MOST = 0.98  # of the channels of a group
_STEPS = 12


def macs(coupling: Coupling, plan: dict[Atom, torch.Tensor]) -> int:
    """Multiply-accumulates of one run once *plan* is carried out."""

    def shape(node: Any) -> list[int]:
        sizes = coupling.expected(node, plan) if isinstance(node, fx.Node) else [[]]
        return sizes[0] if len(sizes) == 1 else []

    return cost.macs(coupling.program, shape)


def parameters(coupling: Coupling, plan: dict[Atom, torch.Tensor]) -> int:
    """Elements of all floating constants once *plan* is carried out."""
    total = 0
    for node in coupling.program.graph.find_nodes(op="get_attr"):
        value = coupling.program.constants[str(node.target)]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            total += math.prod(coupling.expected(node, plan)[0])
    return total


def solve(budget: float, share: Callable[[float], float], what: str) -> float:
    """The smallest ratio for which *share* (of what the dense model has) is at most *budget*, by bisection.

    Raises:
        PreconditionError: even with nearly everything removed it is more.
    """
    least = share(_MOST)
    if least > budget:
        raise PreconditionError(
            f"{what}={budget} cannot be reached: what may be removed leaves {least:.3f}. Lower multiple, or keep fewer "
            "groups"
        )
    low, high = 0.0, _MOST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if share(middle) <= budget:
            high = middle
        else:
            low = middle
    return high
