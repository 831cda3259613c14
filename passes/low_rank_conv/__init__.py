"""A conv becomes two or three thin ones where that is smaller. Lossy.

    conv(x, W)   →   1×1 · core · 1×1       Tucker-2: fewer inputs and outputs, the stride and padding at the core
                 →   k×1 · 1×k              spatial: each takes the stride, padding and dilation of its direction
                 →   1×1 · 1×1              for a W that is 1×1, the stride at the first

``decomposition`` has the algebra and the papers, ``vbmf`` a rank that needs no threshold. Bias, activation and residual
stay at the last conv; zero padding commutes with the 1×1 before it, which has no bias. Grouped and depthwise convs are
left alone: each of their groups is a small matrix, with little rank to lose.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from fxopt import cost, progress
from fxopt.errors import SpecError
from fxopt.passbase import CLEANING, ROUNDING, Pass, PassContext
from fxopt.passes.low_rank_conv import convs
from fxopt.passes.low_rank_conv.convs import Conv
from fxopt.passes.low_rank_conv.decomposition import Ranks, for_energy, for_vbmf
from fxopt.passes.low_rank_linear import ranks as rules
from fxopt.passes.low_rank_linear import trial
from fxopt.passes.low_rank_linear.layers import is_factorised
from fxopt.passes.low_rank_linear.trial import Trials
from fxopt.rewriter import Rewriter

_BUDGETS = ("params", "macs", "latency_ms", "cosine", "top1")
_RULES = ("rank", "ratio", "energy", *_BUDGETS)


@dataclasses.dataclass(frozen=True)
class ConvRank:
    """What was decided of a weight.

    Attributes:
        name: of the weight; ``shape``: (outputs, inputs, *kernel).
        form: "pointwise", "spatial" or "tucker".
        ranks: one, or for tucker (of inputs, of outputs); None where it stays whole.
        parameters: (before, after).
    """

    name: str
    shape: tuple[int, ...]
    form: str
    ranks: Ranks | None
    parameters: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class LowRankConv(Pass):
    """Factorise the weights of convs. A second run changes nothing: factors are known by their names.

    Of the options that say how thin, one is given; ``ratio=0.5`` without any. A conv stays whole where the thin ones
    would not have fewer parameters, or not fewer multiply-accumulates.

    Attributes:
        rank: of every weight, for Tucker-2 of inputs and outputs alike; or "vbmf".
        ratio: share of the parameters of each weight to keep.
        energy: share of the squares of the singular values that each rank keeps.
        params: share of the model's parameters to keep; the ratio is then found. ``macs``: of its multiply-accumulates.
        latency_ms: likewise, milliseconds on the engine compiled for, as measured on the example inputs.
        cosine: smallest cosine similarity of an output to the dense model, on calibration data kept back; as few
            parameters as that allows are kept.
        top1: likewise, the share of samples that stay in their class.
        method: "tucker" or "spatial" (of two-dimensional kernels); 1×1 are factorised by SVD with both.
        objective: "size", or "latency" to factorise only what makes the model faster, as measured.
        overrides: "pattern=rank" or "pattern=ratio" for weights whose name fits the shell pattern; the last wins.
        keep: shell patterns; weights whose name fits stay whole.
        smallest: least number of input and output channels of a weight that is factorised.
        multiple: ranks that are not given as such are a multiple of it; None for that of the target, or a smaller
            power of two where a weight has no eight times as many channels.
    """

    name: ClassVar[str] = "low-rank-conv"
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
    rank: int | Literal["vbmf"] | None = None
    ratio: float | None = None
    energy: float | None = None
    params: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    cosine: float | None = None
    top1: float | None = None
    method: Literal["tucker", "spatial"] = "tucker"
    objective: Literal["size", "latency"] = "size"
    overrides: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    smallest: int = 16
    multiple: int | None = None

    def __post_init__(self) -> None:
        trial.one_rule(self, _RULES)
        for text in self.overrides:
            rules.override(text, self.name)
        for name in ("ratio", "energy", "params", "macs", "cosine", "top1"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise SpecError(f"low-rank-conv: {name} is a share, above 0 and at most 1, not {value}")
        if isinstance(self.rank, int) and self.rank < 1:
            raise SpecError(f"low-rank-conv: rank must be above 0, not {self.rank}")
        if self.latency_ms is not None and not 0 < self.latency_ms < math.inf:
            raise SpecError(f"low-rank-conv: latency_ms must be above 0, and finite, not {self.latency_ms}")
        self.require_at_least(1, "smallest", *(["multiple"] if self.multiple is not None else []))

    @property
    def engine_specific(self) -> bool:  # type: ignore[override]
        """A latency is that of one engine."""
        return self.latency_ms is not None or self.objective == "latency"

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Find weights, choose ranks, decompose, rewrite.

        Raises:
            PreconditionError: a budget cannot be reached; data is missing; nothing can be measured.
        """
        joint = trial.one_rule(self, _BUDGETS) is not None or self.objective == "latency"
        if joint and is_factorised(rewriter.program):
            return  # the budget is a share of the dense model, and has been reached
        found = convs.find(rewriter, self)
        patterns = [*self.keep, *(text.rpartition("=")[0] for text in self.overrides)]
        names = [str(node.target) for node in rewriter.program.graph.find_nodes(op="get_attr")]
        self.warn_of_unused(rewriter, patterns, names, "weight")
        if not found:
            return
        cached = convs.Thin(found)
        trials = Trials(self, ctx, rewriter.program.copy(), cached.carry)
        ranks = self._ranks(rewriter, ctx, found, trials)
        if self.objective == "latency":
            ranks = trials.faster(rewriter, ranks)
        before = cost.macs(rewriter.program), rewriter.program.numel()
        cached.carry(rewriter, ranks)
        rewriter.program.remove_dead()
        self._tell(rewriter, before, found, ranks)
        if ranks:
            trials.note(rewriter, ranks, measure=self.engine_specific)

    def _ranks(
        self, rewriter: Rewriter, ctx: PassContext, found: list[Conv], trials: Trials[Ranks]
    ) -> dict[str, Ranks]:
        """The ranks of each weight that is to be factorised; a reason is left at the others."""
        fixed, free = dict[str, Ranks](), list[Conv]()
        for one in found:
            progress.say(f"{self.name}: {one.name}")
            wanted = self._wanted(one, ctx.target.channel_multiple)
            if wanted is None:
                free.append(one)
            elif min(wanted) < 1:
                one.skip(rewriter, "VBMF finds nothing but noise in its weight")
            elif one.pays(wanted):
                fixed[one.name] = wanted
            else:
                one.skip(rewriter, one.loss(wanted))

        def choose(share: float) -> dict[str, Ranks]:
            given = {one.name: self._rounded(one, share, ctx.target.channel_multiple) for one in free}
            return {**fixed, **{one.name: given[one.name] for one in free if one.pays(given[one.name])}}

        if not free:
            return fixed
        chosen = choose(self._share(found, choose, trials))
        for one in free:
            if one.name not in chosen:
                one.skip(rewriter, "low rank does not pay within this budget")
        return chosen

    def _wanted(self, one: Conv, wide: int) -> Ranks | None:
        """The ranks of *one*, though they may not pay; None where they depend on the other convs."""
        own = rules.overridden(one.name, self.overrides, self.name)
        rank = self.rank if own is None else int(own) if own >= 1 else None
        if isinstance(rank, int):
            return one.capped((rank,) * (2 if one.form == "tucker" else 1))
        if own is not None:
            return self._rounded(one, own, wide)
        if rank == "vbmf":
            return for_vbmf(one.weight, one.form)
        if self.energy is not None:
            return for_energy(one.weight, one.form, self.energy)
        if trial.one_rule(self, _BUDGETS) is not None:
            return None
        return self._rounded(one, 0.5 if self.ratio is None else self.ratio, wide)

    def _rounded(self, one: Conv, ratio: float, wide: int) -> Ranks:
        """Ranks for *ratio* as multiples of what the target wants."""
        ranks, most = one.sizes.for_ratio(one.form, ratio), one.most
        multiples = [self.multiple or rules.fitting(wide, size) for size in most]
        return tuple(rules.rounded(r, m, size) for r, m, size in zip(ranks, multiples, most, strict=True))

    def _share(self, found: list[Conv], choose: convs.Choose, trials: Trials[Ranks]) -> float:
        """The ratio that the budget leaves."""
        program = trials.program
        if self.params is not None or self.macs is not None:
            what = "parameters" if self.params is not None else "macs"
            whole = program.numel() if self.params is not None else cost.macs(program)

            def counted(share: float) -> float:
                ranks = choose(share)
                saved = sum(getattr(one.sizes, what)(one.form, None) for one in found if one.name in ranks)
                now = sum(getattr(one.sizes, what)(one.form, ranks[one.name]) for one in found if one.name in ranks)
                return float((whole - saved + now) / max(1, whole))

            budget = self.params if self.params is not None else self.macs
            assert budget is not None
            return rules.largest(budget, counted, "params" if self.params is not None else "macs", rules.COUNTED)
        if self.latency_ms is not None:
            return rules.largest(self.latency_ms, lambda s: trials.latency(choose(s)), "latency_ms", rules.MEASURED)
        if self.cosine is not None:
            return rules.smallest(self.cosine, lambda s: trials.cosine(choose(s)), rules.MEASURED)
        assert self.top1 is not None
        return rules.smallest(self.top1, lambda s: trials.top1(choose(s)), rules.MEASURED)

    def _tell(self, rewriter: Rewriter, before: tuple[int, int], found: list[Conv], ranks: Mapping[str, Ranks]) -> None:
        rewriter.details["low_rank"] = tuple(
            ConvRank(
                one.name,
                tuple(one.weight.shape),
                one.form,
                ranks.get(one.name),
                (one.sizes.parameters(one.form, None), one.sizes.parameters(one.form, ranks.get(one.name))),
            )
            for one in found
        )
        after = cost.macs(rewriter.program), rewriter.program.numel()
        rewriter.note(
            f"{len(ranks)} of {len(found)} convs factorised: MACs × {after[0] / max(1, before[0]):.3f}, "
            f"parameters × {after[1] / max(1, before[1]):.3f}"
        )
