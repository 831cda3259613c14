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
from fxopt.passes.prune_channels.plan import PruningPlan

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


def solve(
    budget: float, plan: Callable[[float], PruningPlan], share: Callable[[PruningPlan], float], what: str
) -> PruningPlan:
    """The plan that removes least, of those whose *share* of the dense model is at most *budget*.

    Bisection over the ratio, and then over how many groups take the next smaller one: where channels go in large steps,
    the budget would be wasted otherwise.

    Raises:
        PreconditionError: even with nearly everything removed it is more.
    """
    low, high = bisect(budget, lambda ratio: share(plan(ratio)), what, _STEPS)
    less, more = plan(low), plan(high)
    names = [group.name for group in more.groups]
    inside, outside = 0, len(names) + 1  # of the groups, as many take less
    while outside - inside > 1:
        middle = (inside + outside) // 2
        if share(more.mixed(less, names[:middle])) <= budget:
            inside = middle
        else:
            outside = middle
    return more.mixed(less, names[:inside])


def bisect(budget: float, share: Callable[[float], float], what: str, steps: int) -> tuple[float, float]:
    """Two ratios near each other, the second within the *budget* as counted or measured, the first not (or both 0).

    Raises:
        PreconditionError: even with nearly everything removed it is more.
    """
    if share(0.0) <= budget:
        return 0.0, 0.0
    least = share(_MOST)
    if least > budget:
        raise PreconditionError(
            f"{what}={budget} cannot be reached: what may be removed leaves {least:.3f}. Lower multiple, or keep fewer "
            "groups"
        )
    low, high = 0.0, _MOST
    for _ in range(steps):
        middle = (low + high) / 2
        if share(middle) <= budget:
            high = middle
        else:
            low = middle
    return low, high
