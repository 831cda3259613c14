"""From the options of the pass to a rank for each weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fxopt import cost
from fxopt.passes.low_rank_linear import ranks as rules
from fxopt.passes.low_rank_linear import surgery, trial
from fxopt.passes.low_rank_linear.decomposition import Directions
from fxopt.passes.low_rank_linear.layers import Layer
from fxopt.passes.low_rank_linear.ranks import Ranks
from fxopt.passes.low_rank_linear.trial import Trials
from fxopt.rewriter import Rewriter

if TYPE_CHECKING:
    from fxopt.passes.low_rank_linear import LowRankLinear

BUDGETS = ("params", "macs", "latency_ms", "cosine", "top1")
RULES = ("rank", "ratio", "energy", *BUDGETS)


def limit(one: LowRankLinear, layer: Layer) -> int:
    """The largest rank at which the factors, and the remainder, are smaller than the weight."""
    if one.remainder == "none":
        return layer.limit
    return int((1 - surgery.stored(one.remainder, layer.weight)) * layer.size - 1) // layer.step


def asked(one: LowRankLinear, layer: Layer) -> int | None:
    """The rank that the options of *one* name for *layer* without looking at its singular values, if they do."""
    own = rules.overridden(layer.name, one.overrides, one.name)
    if own is not None:
        return int(own) if own >= 1 else rules.of_ratio(layer, own)
    if one.rank is not None:
        return one.rank
    if trial.one_rule(one, RULES) in (None, "ratio") and one.scope == "layer":
        return rules.of_ratio(layer, 0.5 if one.ratio is None else one.ratio)
    return None


@dataclasses.dataclass
class Choice:
    """The choice of ranks for the *layers* of a program.

    Attributes:
        one: the pass.
        directions: of each weight, by name.
        wide: of which ranks that are not given as such are a multiple, where they are large enough, on the target.
    """

    one: LowRankLinear
    rewriter: Rewriter
    layers: Sequence[Layer]
    directions: Mapping[str, Directions]
    trials: Trials[int]
    wide: int

    def ranks(self) -> Ranks:
        """The rank of each weight that is to be factorised; a reason is left at the others.

        Raises:
            PreconditionError: a budget cannot be reached; data is missing; nothing can be measured.
        """
        fixed: Ranks = {}
        free = []
        for layer in self.layers:
            wanted = self._wanted(layer)
            if wanted is None:
                free.append(layer)
                continue
            rank, most = min(wanted, self.directions[layer.name].rank), limit(self.one, layer)
            if rank <= most and (wanted <= most or rank < most):
                fixed[layer.name] = rank
            else:
                self._skip(layer)
        if not free:
            return fixed
        limits = {layer.name: limit(self.one, layer) for layer in free}
        multiples = {layer.name: self._multiple(layer) for layer in free}
        choose = rules.together(free, self.directions, limits, multiples)
        chosen = choose(self._share(lambda share: {**fixed, **choose(share)}))
        for layer in free:
            if layer.name not in chosen:
                self._skip(layer)
        return {**fixed, **chosen}

    def _wanted(self, layer: Layer) -> int | None:
        """The rank of *layer*, though it may be too large to pay; None where it depends on other layers."""
        most, rank = limit(self.one, layer), asked(self.one, layer)
        if rank is not None:
            own = rules.overridden(layer.name, self.one.overrides, self.one.name)
            as_given = own >= 1 if own is not None else self.one.rank is not None
            return rank if as_given else rules.rounded(rank, self._multiple(layer), most)
        if self.one.energy is None:
            return None
        needed = self.directions[layer.name].rank_for(self.one.energy)
        multiple = self._multiple(layer)
        return most + 1 if needed is None or needed > most else min(-(-needed // multiple) * multiple, most)

    def _multiple(self, layer: Layer) -> int:
        return self.one.multiple or rules.fitting(self.wide, limit(self.one, layer))

    def _skip(self, layer: Layer) -> None:
        for user in layer.users:
            most = limit(self.one, layer)
            self.rewriter.skip(user, f"low rank does not pay: two factors are smaller up to rank {most}, it needs more")

    def _share(self, ranks: Callable[[float], Ranks]) -> float:
        """The share of the parameters that the budget leaves, where *ranks* is a function of it."""
        one, program = self.one, self.trials.program
        if one.scope == "global":
            return 0.5 if one.ratio is None else one.ratio
        if one.params is not None:
            rest = program.numel() - sum(layer.size for layer in self.layers)
            whole = program.numel()
            return rules.largest(
                one.params, lambda s: (rest + rules.parameters(self.layers, ranks(s))) / whole, "params", rules.COUNTED
            )
        if one.macs is not None:
            dense = cost.macs(program)
            rest = dense - rules.macs(self.layers, {})
            return rules.largest(
                one.macs, lambda s: (rest + rules.macs(self.layers, ranks(s))) / dense, "macs", rules.COUNTED
            )
        if one.latency_ms is not None:
            return rules.largest(one.latency_ms, lambda s: self.trials.latency(ranks(s)), "latency_ms", rules.MEASURED)
        if one.cosine is not None:
            return rules.smallest(one.cosine, lambda s: self.trials.cosine(ranks(s)), rules.MEASURED)
        assert one.top1 is not None
        return rules.smallest(one.top1, lambda s: self.trials.top1(ranks(s)), rules.MEASURED)
