"""A linear becomes two thin ones where that is smaller. Lossy.

    linear(x, W, b)   →   linear(linear(x, A), B, b)          W (m, n) ≈ B A,   A (r, n),  B (m, r),   r < m n / (m + n)

``decomposition`` finds the factors, plain or for the data that the layer reads; ``layers`` says which weights can be
factorised; ``ranks`` says how thin; ``surgery`` rewrites, with a remainder beside the factors where asked; ``trial``
measures; ``choice`` brings these together. An activation and a residual of a fused linear stay at the second one. A
weight that several linears share gets factors that they share. q, k and v get factors of their own, whose first halves
``merge-linears`` makes one of; listed before this pass it makes them one weight, which gets one pair of factors.

Where a weight is factorised only if that is faster, or a latency is the budget, the whole model is measured on the
engine that it is compiled for. Two thin matmuls can be slower than one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from fxopt import cost, progress
from fxopt.errors import InputError, SpecError
from fxopt.passbase import CLEANING, ROUNDING, Pass, PassContext
from fxopt.passes.low_rank_linear import choice, surgery, trial
from fxopt.passes.low_rank_linear import layers as linears
from fxopt.passes.low_rank_linear import ranks as rules
from fxopt.passes.low_rank_linear.decomposition import Directions, decompose
from fxopt.passes.low_rank_linear.layers import Layer
from fxopt.passes.low_rank_linear.ranks import LayerRank, Ranks
from fxopt.passes.low_rank_linear.trial import Trials
from fxopt.rewriter import Rewriter

__all__ = ["Directions", "LayerRank", "LowRankLinear", "decompose"]

_MOMENTS = 16  # one part of so many of the bytes of the model may go into second moments at once


@dataclasses.dataclass(frozen=True)
class LowRankLinear(Pass):
    """Factorise the weights of linears. A second run changes nothing: factors are known by their names.

    Of the options that say how thin, one is given; ``ratio=0.5`` without any.

    Attributes:
        rank: of every weight.
        ratio: share of the parameters to keep, of each weight or of all; see *scope*.
        energy: share of the squares of the singular values that each weight keeps.
        params: share of the model's parameters to keep; ranks are then found for all weights together.
        macs: likewise, of its multiply-accumulates.
        latency_ms: likewise, milliseconds on the engine compiled for, as measured on the example inputs.
        cosine: smallest cosine similarity of an output to the dense model, on calibration data kept back; as few
            parameters as that allows are kept.
        top1: likewise, the share of samples that stay in their class.
        scope: with *ratio*, "global" ranks the singular values of all weights together, see ``ranks``.
        method: "svd", or "whitened" for the least error of what the layer gives on calibration data.
        objective: "size", or "latency" to factorise only what makes the model faster, as measured.
        remainder: what makes up for the truncation: "int8" or "2:4" of W − B A; the model is smaller, not faster.
        overrides: "pattern=rank" or "pattern=ratio" for weights whose name fits the shell pattern; the last wins.
        keep: shell patterns; weights whose name fits stay whole.
        smallest: least number of inputs and of outputs of a weight that is factorised.
        multiple: ranks that are not given as such are a multiple of it; None for that of the target, or a
            smaller power of two where a weight has no ranks eight times as large.
        damping: of the second moments of the inputs, for ``method=whitened``; see ``decomposition``.
        samples: rows of calibration data that are looked at.
    """

    name: ClassVar[str] = "low-rank-linear"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = (
        *CLEANING,
        "prune-blocks",
        "prune-channels",
    )
    runs_before: ClassVar[tuple[str, ...]] = (
        "prune-weights",  # zeros do not survive a decomposition
        "sparsify-2-4",
        *ROUNDING,
    )
    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    params: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    cosine: float | None = None
    top1: float | None = None
    scope: Literal["layer", "global"] = "layer"
    method: Literal["svd", "whitened"] = "svd"
    objective: Literal["size", "latency"] = "size"
    remainder: surgery.Remainder = "none"
    overrides: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    smallest: int = 32
    multiple: int | None = None
    damping: float = 0.01
    samples: int = 512

    def __post_init__(self) -> None:
        trial.one_rule(self, choice.RULES)
        for text in self.overrides:
            rules.override(text, self.name)
        for name in ("ratio", "energy", "params", "macs", "cosine", "top1"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise SpecError(f"low-rank-linear: {name} is a share, above 0 and at most 1, not {value}")
        for name in ("rank", "latency_ms", "damping"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise SpecError(f"low-rank-linear: {name} must be above 0, and finite, not {getattr(self, name)}")
        if self.scope == "global" and trial.one_rule(self, choice.RULES) not in (None, "ratio"):
            raise SpecError("low-rank-linear: scope=global goes with ratio; budgets are global as they are")
        self.require_at_least(1, "smallest", "samples", *(["multiple"] if self.multiple is not None else []))

    @property
    def engine_specific(self) -> bool:  # type: ignore[override]
        """A latency is that of one engine."""
        return self.latency_ms is not None or self.objective == "latency"

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Find weights, decompose them, choose ranks, rewrite.

        Raises:
            PreconditionError: a budget cannot be reached; data is missing; nothing can be measured.
            InputError: what a layer reads on the calibration data is NaN or infinite.
        """
        again = linears.is_factorised(rewriter.program)
        joint = (
            trial.one_rule(self, choice.BUDGETS) is not None or self.scope == "global" or self.objective == "latency"
        )
        if again and joint:
            return  # the budget is a share of the dense model, and has been reached
        found = self._layers(rewriter)
        if not found:
            return
        directions = self._directions(rewriter, ctx, found)
        found = [layer for layer in found if layer.name in directions]

        def carry(other: Rewriter, ranks: Mapping[str, int]) -> None:
            constants = {str(n.target): n for n in other.program.graph.find_nodes(op="get_attr")}
            for layer in found:
                if layer.name in ranks:
                    users = tuple(constants[layer.name].users)
                    own = dataclasses.replace(layer, constant=constants[layer.name], users=users)
                    factors = directions[layer.name].factors(layer.weight, ranks[layer.name])
                    surgery.replace(other, own, *factors, self.remainder, training=ctx.training)

        trials = Trials(self, ctx, rewriter.program.copy(), carry)
        ranks = choice.Choice(self, rewriter, found, directions, trials, ctx.target.channel_multiple).ranks()
        if self.objective == "latency":
            ranks = trials.faster(rewriter, ranks)
        before = cost.macs(rewriter.program), rewriter.program.numel()
        carry(rewriter, ranks)
        rewriter.program.remove_dead()
        self._tell(rewriter, before, found, directions, ranks)
        if ranks:
            trials.note(rewriter, ranks, measure=self.engine_specific)

    def _layers(self, rewriter: Rewriter) -> list[Layer]:
        found = []
        for layer in linears.find(rewriter, self.keep, self.smallest):
            reason = surgery.refusal(self.remainder, layer.weight)
            if reason is None:
                found.append(layer)
            for user in layer.users if reason is not None else ():
                rewriter.skip(user, str(reason))
        patterns = [*self.keep, *(text.rpartition("=")[0] for text in self.overrides)]
        names = [str(node.target) for node in rewriter.program.graph.find_nodes(op="get_attr")]
        self.warn_of_unused(rewriter, patterns, names, "weight")
        return found

    def _directions(self, rewriter: Rewriter, ctx: PassContext, found: list[Layer]) -> dict[str, Directions]:
        """Of each weight as many as it may come to keep."""
        result: dict[str, Directions] = {}
        whitened = self.method == "whitened"
        batches = linears.learned_from(ctx.batches(self), self.samples) if whitened else []
        room = rewriter.program.nbytes() // _MOMENTS
        for group in linears.rounds(found, room) if whitened else [found]:
            moments = linears.moments(rewriter.program, group, batches) if whitened else {}
            for layer in group:
                progress.say(f"{self.name}: layer {len(result) + 1} of {len(found)}")
                read = list(dict.fromkeys(user.all_input_nodes[0] for user in layer.users))
                own = sum((moments[node] for node in read[1:]), start=moments[read[0]]) if whitened else None
                if own is not None and not bool(own.isfinite().all()):
                    raise InputError(f"calibration: what {layer.users[0].name} reads has squares that are not finite")
                if own is not None and float(own.trace()) <= 0:
                    for user in layer.users:
                        rewriter.skip(user, "what it reads is zero on the calibration data")
                    continue
                most = max(1, min(choice.limit(self, layer), choice.asked(self, layer) or layer.size))
                result[layer.name] = decompose(layer.weight, most, own, self.damping)
        return result

    def _tell(
        self,
        rewriter: Rewriter,
        before: tuple[int, int],
        found: list[Layer],
        directions: Mapping[str, Directions],
        ranks: Ranks,
    ) -> None:
        """Report each weight, and what the model has now of what it had *before*: MACs, parameters."""
        rewriter.details["low_rank"] = tuple(
            LayerRank(
                layer.name,
                tuple(layer.weight.shape),
                ranks.get(layer.name),
                directions[layer.name].kept(ranks[layer.name]) if layer.name in ranks else 1.0,
                (layer.size, rules.parameters([layer], ranks)),
            )
            for layer in found
        )
        after = cost.macs(rewriter.program), rewriter.program.numel()
        span = f" to ranks {min(ranks.values())} to {max(ranks.values())}" if ranks else ""
        rewriter.note(
            f"{len(ranks)} of {len(found)} weights factorised{span}: MACs × {after[0] / max(1, before[0]):.3f}, "
            f"parameters × {after[1] / max(1, before[1]):.3f}"
        )
