"""Which rank each weight gets: by a rule for each, or so that all together keep within a budget.

For all together the directions of all weights are ranked by what they contribute for what they cost,

    σ_i² / Σ_j σ_j² / (m + n)          the share of the weight's (whitened: of its outputs') energy, for each parameter

and the best are kept. A weight whose factors would be no smaller stays whole.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fxopt.errors import PreconditionError, SpecError
from fxopt.passes.low_rank_linear.decomposition import Directions
from fxopt.passes.low_rank_linear.layers import Layer

Ranks = dict[str, int]
"""By name of the weight; one that is not here stays whole."""

LEAST = 0.02  # of the parameters, for searches
COUNTED, MEASURED = 20, 8  # steps of a search


@dataclasses.dataclass(frozen=True)
class LayerRank:
    """What was decided of a weight.

    Attributes:
        name: of the weight; ``shape``: (outputs, inputs).
        rank: None where it stays whole.
        energy: share of the squares of the singular values that is kept (whitened: of those of the outputs).
        parameters: (before, after), the remainder aside.
    """

    name: str
    shape: tuple[int, ...]
    rank: int | None
    energy: float
    parameters: tuple[int, int]


def override(text: str, who: str) -> tuple[str, float]:
    """Pattern and number of "pattern=rank" or "pattern=ratio": a whole number is a rank, one below 1 a ratio.

    Raises:
        SpecError: it is neither.
    """
    pattern, found, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not found or not 0 < value < math.inf or (value >= 1 and value != int(value)):
        raise SpecError(f"{who}: overrides: {text!r} must read pattern=rank, or pattern=ratio with a ratio below 1")
    return pattern, value


def overridden(name: str, overrides: Sequence[str], who: str) -> float | None:
    """The number of the last of *overrides* that fits *name*, or None."""
    numbers = (override(text, who) for text in overrides)
    return next((n for pattern, n in reversed(list(numbers)) if fnmatch.fnmatchcase(name, pattern)), None)


def fitting(multiple: int, most: int) -> int:
    """*multiple*, or a smaller power of two where *most* is not eight times as much: steps would be coarse."""
    while multiple > 1 and 8 * multiple > most:
        multiple = 1 << (multiple - 1).bit_length() - 1
    return multiple


def rounded(rank: int, multiple: int, most: int) -> int:
    """*rank* as a multiple of *multiple*, the next below if there is one; at most *most* where that is less."""
    return min(max(multiple, rank // multiple * multiple), max(1, most))


def of_ratio(layer: Layer, ratio: float) -> int:
    """The rank at which the factors of *layer* have *ratio* of its parameters."""
    return max(1, int(ratio * layer.size) // layer.step)


def together(
    layers: Sequence[Layer],
    directions: Mapping[str, Directions],
    limits: Mapping[str, int],
    multiples: Mapping[str, int],
) -> Callable[[float], Ranks]:
    """Ranks of all *layers* as a function of the share of their parameters to keep, at most."""
    worth, owner = [], []
    for index, layer in enumerate(layers):
        found = directions[layer.name]
        values = found.values[: found.rank].square() / (found.total or 1.0) / layer.step
        worth.append(values)
        owner.append(torch.full((len(values),), index))
    order = torch.cat(worth).argsort(descending=True, stable=True)
    owners = torch.cat(owner)[order]

    def best(taken: int) -> Ranks:
        counts = torch.bincount(owners[:taken], minlength=len(layers)).tolist()
        ranks = {}
        for layer, count in zip(layers, counts, strict=True):
            if count < limits[layer.name]:
                rank = rounded(max(1, count), multiples[layer.name], limits[layer.name])
                ranks[layer.name] = min(rank, directions[layer.name].rank)
        return ranks

    def choose(share: float) -> Ranks:
        budget, low, high = share * sum(layer.size for layer in layers), 0, len(owners) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if parameters(layers, best(middle)) <= budget else (low, middle)
        return best(low)

    return choose


def parameters(layers: Sequence[Layer], ranks: Mapping[str, int]) -> int:
    """Parameters of *layers* at *ranks*."""
    return sum(ranks[one.name] * one.step if one.name in ranks else one.size for one in layers)


def macs(layers: Sequence[Layer], ranks: Mapping[str, int]) -> int:
    """Multiply-accumulates of *layers* at *ranks*."""
    return sum((ranks[one.name] * one.step if one.name in ranks else one.size) * one.rows for one in layers)


def largest(budget: float, measure: Callable[[float], float], what: str, steps: int) -> float:
    """The largest share of parameters, of those tried by bisection, for which *measure* is at most *budget*.

    Raises:
        PreconditionError: it is more even for the smallest.
    """
    if measure(1.0) <= budget:
        return 1.0
    least = measure(LEAST)
    if least > budget:
        raise PreconditionError(
            f"{what}={budget} cannot be reached: with {LEAST:.0%} of the parameters that can be factorised it is "
            f"{least:.3f}. Raise it, keep fewer layers whole, or lower smallest or multiple"
        )
    low, high = LEAST, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) <= budget else (low, middle)
    return low


def smallest(budget: float, measure: Callable[[float], float], steps: int) -> float:
    """The smallest share of parameters, of those tried by bisection, for which *measure* is at least *budget*."""
    low, high = LEAST, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if measure(middle) >= budget else (middle, high)
    return high
