"""Remove channels, and whatever belongs to them, from a graph that nobody has prepared for it. Lossy.

    conv1 → bn → relu → conv2     fewer filters in conv1, fewer statistics in bn, fewer input channels in conv2

``dims`` is the language: axes as expressions over atoms. ``coupling`` walks the graph once, and the ``rules`` of its
ops say what has to shrink together; the atoms that are left are the ``groups``. ``criteria`` score the channels, a
``plan`` says which stay, ``surgery`` cuts parameters and sizes and compares every shape with the plan.

What remains computes what the dense model does with the removed channels set to zero behind norm and activation,
except where a norm or mean goes over channels.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable
from typing import ClassVar, Literal

from fxopt import registry
from fxopt.errors import SpecError
from fxopt.passbase import CLEANING, FINISHING, Pass, PassContext
from fxopt.passes.prune_channels import budget, compensation, criteria, evidence, surgery
from fxopt.passes.prune_channels.coupling import groups_of
from fxopt.passes.prune_channels.criteria import Channels
from fxopt.passes.prune_channels.groups import Group, Groups, find_groups, nested
from fxopt.passes.prune_channels.plan import PruningPlan, choose, fitting
from fxopt.passes.prune_channels.rounds import batch_norm_l1, group_lasso, per_round
from fxopt.program import Program
from fxopt.rewriter import Rewriter
from fxopt.rounds import CUT

__all__ = ["Channels", "PruneChannels", "PruningPlan", "batch_norm_l1", "find_groups", "group_lasso", "per_round"]

_LATER = ("fuse-conv-bn-relu", "merge-linears")  # change the latency of what is measured
_MEASUREMENTS = 8


@dataclasses.dataclass(frozen=True)
class PruneChannels(Pass):
    """Prune channels of convs and linears, attention heads and FFN widths.

    Attributes:
        ratio: share of channels to remove, of each group or of all.
        ratios: "pattern=ratio" for groups with a parameter whose name fits the shell pattern; the last that fits wins.
        macs: share of the multiply-accumulates to keep; *ratio* is then found. Likewise ``params``, for parameters.
        latency_ms: milliseconds on the engine compiled for, as measured on the example inputs; *ratio* is then found.
        plan: path of a plan that ``PruningPlan.save`` wrote, or from Python the plan; it alone decides what goes.
        criterion: how channels are ranked; see ``criteria``. Data-driven ones look at calibration data, "taylor" also
            at the loss; "bn-scale" leaves groups without a batch norm whole.
        score: a function from :class:`Channels` to f64[size], in place of *criterion*; from Python only.
        aggregate: what is made of the scores that the parameters of a group give.
        normalize: what makes groups comparable, for ``scope=global``; "none" leaves the scores of parameters alone too.
        scope: "group" removes *ratio* of each group; "global" ranks the channels of all groups together.
        multiple: channels that stay are a multiple of it, where a group has that many. None for that of the target,
            or a smaller power of two for a group that does not have eight times as many.
        keep: shell patterns; groups with a parameter whose name fits stay whole.
        nested: of channels within channels, such as those of a head within heads, which go: the "outer" ones, the
            "inner" ones, or "both".
        compensate: add what removed channels contribute when nothing excites them, or on average over the calibration
            data, to the biases of what reads them; see ``compensation``.
        seed: for ``criterion=random``.
    """

    name: ClassVar[str] = "prune-channels"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = CLEANING
    runs_before: ClassVar[tuple[str, ...]] = FINISHING
    ratio: float = 0.5
    ratios: tuple[str, ...] = ()
    macs: float | None = None
    params: float | None = None
    latency_ms: float | None = None
    plan: str | PruningPlan | None = None
    criterion: Literal["l1", "l2", "bn-scale", "fpgm", "random", "activation", "taylor"] = "l1"
    score: Callable[[Channels], object] | None = None
    aggregate: Literal["sum", "mean", "max"] = "sum"
    normalize: Literal["mean", "max", "lamp", "none"] = "mean"
    scope: Literal["group", "global"] = "group"
    multiple: int | None = None
    keep: tuple[str, ...] = ()
    nested: Literal["outer", "inner", "both"] = "outer"
    compensate: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.require_share("ratio")
        for text in self.ratios:
            _ratio_of(text)
        given = self._goals()
        if given and self.ratio != PruneChannels.ratio:
            given.append("ratio")
        if len(given) > 1:
            raise SpecError(f"prune-channels: give one of {' and '.join(given)}, not both")
        for name in ("macs", "params"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise SpecError(f"prune-channels: {name} is the share to keep, above 0 and at most 1, not {value}")
        if self.latency_ms is not None and not 0 < self.latency_ms < math.inf:
            raise SpecError(f"prune-channels: latency_ms must be above 0, not {self.latency_ms}")
        if self.multiple is not None:
            self.require_at_least(1, "multiple")

    def _goals(self) -> list[str]:
        """The options that say how much goes, in place of the ratio."""
        return [name for name in ("macs", "params", "latency_ms", "plan") if getattr(self, name) is not None]

    @property
    def engine_specific(self) -> bool:  # type: ignore[override]
        """A latency is that of one engine."""
        return self.latency_ms is not None

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Find groups, choose, cut.

        Raises:
            PassError: a shape does not come out as planned.
            PreconditionError: a budget cannot be reached; the plan is of another model; data or a loss are missing.
        """
        groups = find_groups(rewriter.program)
        names = {name for group in groups.all for name in groups_of(group.members)}
        self.warn_of_unused(rewriter, [*self.keep, *(text.rpartition("=")[0] for text in self.ratios)], names)
        dense = budget.macs(groups.coupling, {}), budget.parameters(groups.coupling, {})
        plan = self._plan(rewriter, ctx, groups, dense)
        indices = plan.resolve(groups)
        small = budget.macs(groups.coupling, indices), budget.parameters(groups.coupling, indices)
        if not plan.groups and self.ratio and not self._goals() and not _is_cut(rewriter.program):
            rewriter.note(self._why_nothing(groups))
        if plan.groups:
            shifts = compensation.find(self, ctx, groups.coupling, indices) if self.compensate else {}
            surgery.cut(rewriter, groups.coupling, indices)
            compensation.add(rewriter, shifts)
        rewriter.details["pruning"] = plan
        rewriter.details["groups"] = groups
        rewriter.note(
            f"{len(plan.groups)} of {len(groups.all)} groups: MACs × {small[0] / max(1, dense[0]):.3f}, "
            f"parameters × {small[1] / max(1, dense[1]):.3f}"
        )

    def _plan(self, rewriter: Rewriter, ctx: PassContext, groups: Groups, dense: tuple[int, int]) -> PruningPlan:
        budgets = {"macs": (budget.macs, dense[0]), "params": (budget.parameters, dense[1])}
        asked = next((name for name in budgets if getattr(self, name) is not None), None)
        if self._goals() and _is_cut(rewriter.program):
            return PruningPlan(())  # the budget is a share of the dense model, and has been reached
        if self.plan is not None:
            return self.plan if isinstance(self.plan, PruningPlan) else PruningPlan.load(self.plan)
        plan = self._ranking(rewriter, ctx, groups)
        if asked is not None:
            count, whole = budgets[asked]

            def share(trial: PruningPlan) -> float:
                return count(groups.coupling, trial.resolve(groups)) / max(1, whole)

            return budget.solve(getattr(self, asked), plan, share, asked)
        if self.latency_ms is not None:

            def latency(ratio: float) -> float:
                return self._latency(ctx, rewriter.program, plan(ratio))

            return plan(budget.bisect(self.latency_ms, latency, "latency_ms", _MEASUREMENTS)[1])
        return plan(self.ratio)

    def _ranking(self, rewriter: Rewriter, ctx: PassContext, groups: Groups) -> Callable[[float], PruningPlan]:
        """The plan as a function of the ratio."""
        chosen = self._candidates(groups)
        if self.criterion == "bn-scale" and self.score is None:
            scaled = criteria.read_by_batch_norms(groups.coupling.program, "weight")
            without = [group for group in chosen if scaled.isdisjoint(groups_of(group.members))]
            chosen = [group for group in chosen if group not in without]
            if without:
                rewriter.note(f"{len(without)} groups stay whole: criterion=bn-scale, and no batch norm reads them")
        measure = evidence.MEASURES.get(self.criterion) if self.score is None else None
        found = measure(self, ctx, groups.coupling, chosen) if measure is not None else {}
        scored = {}
        for group in chosen:
            channels = criteria.channels_of(group, groups.coupling.program, found.get(group.name, {}))
            if self.score is not None:
                value = criteria.checked(self.score(channels.copied()), channels)
            else:
                raw = self.normalize == "none"
                value = criteria.scores(channels, self.criterion, self.aggregate, seed=self.seed, raw=raw)
            scored[group.name] = criteria.NORMALIZE[self.normalize](value) if self.scope == "global" else value
        wanted = ctx.target.channel_multiple if self.multiple is None else self.multiple
        multiples = {g.name: fitting(wanted, g) if self.multiple is None else wanted for g in chosen}
        ratios = {g.name: ratio for g in chosen if (ratio := self._own_ratio(g)) is not None}
        together = self.scope == "global"
        return lambda ratio: choose(chosen, scored, ratio, multiples, together=together, ratios=ratios)

    def _why_nothing(self, groups: Groups) -> str:
        if not self._candidates(groups):
            return "no group can lose channels; the table in details['groups'] of this record says why"
        return f"no group loses channels: ratio is too small for their sizes, or multiple={self.multiple} too large"

    def _own_ratio(self, group: Group) -> float | None:
        fitting_ones = [text for text in self.ratios if _fits(group, text.rpartition("=")[0])]
        return _ratio_of(fitting_ones[-1]) if fitting_ones else None

    def _latency(self, ctx: PassContext, program: Program, plan: PruningPlan) -> float:
        """Milliseconds of *program* with *plan* carried out, and with what later passes make faster."""
        ctx.require_measuring("latency_ms", "give macs or params")
        assert ctx.latency is not None
        trial = program.copy()
        groups = find_groups(trial)
        if plan.groups:
            surgery.cut(Rewriter(trial), groups.coupling, plan.resolve(groups))
        for name in _LATER:
            registry.find_pass(name)().run(Rewriter(trial), ctx)
            trial.remove_dead()
        return ctx.latency(trial)

    def _candidates(self, groups: Groups) -> list[Group]:
        around = nested(groups.prunable)
        inside = {atom for atom, outer in around.items() if outer}
        outside = {one for outer in around.values() for one in outer}
        parameters = groups.coupling.program.graph.find_nodes(op="get_attr")
        done = {str(node.target): node.meta.get(CUT, ()) for node in parameters}
        found = []
        for group in groups.prunable:
            if any(member.axis in done[member.constant] for member in group.members):
                continue
            if self.nested == "outer" and group.atom in inside:
                continue
            if self.nested == "inner" and group.atom in outside:
                continue
            if not any(_fits(group, pattern) for pattern in self.keep):
                found.append(group)
        return found


def _fits(group: Group, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in groups_of(group.members))


def _is_cut(program: Program) -> bool:
    """Whether channels have gone already, in this round."""
    return any(CUT in node.meta for node in program.graph.find_nodes(op="get_attr"))


def _ratio_of(text: str) -> float:
    """The ratio in "pattern=ratio"."""
    _, found, number = text.rpartition("=")
    try:
        ratio = float(number)
    except ValueError:
        ratio = -1.0
    if not found or not 0 <= ratio < 1:
        raise SpecError(f"prune-channels: ratios: {text!r} must read pattern=ratio, at least 0 and below 1")
    return ratio
