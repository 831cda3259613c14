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
import warnings
from typing import ClassVar, Literal

from fxopt.errors import SpecError
from fxopt.passbase import Pass, PassContext
from fxopt.passes.prune_channels import budget, criteria, surgery
from fxopt.passes.prune_channels.coupling import groups_of
from fxopt.passes.prune_channels.groups import Group, Groups, find_groups, nested
from fxopt.passes.prune_channels.plan import PruningPlan, choose
from fxopt.rewriter import Rewriter

__all__ = ["PruneChannels", "PruningPlan", "find_groups"]


@dataclasses.dataclass(frozen=True)
class PruneChannels(Pass):
    """Prune channels of convs and linears, attention heads and FFN widths.

    Attributes:
        ratio: share of channels to remove, of each group or of all.
        macs: share of the multiply-accumulates to keep; *ratio* is then found. Likewise ``params``, for parameters.
        criterion: how channels are ranked; see ``criteria``.
        scope: "group" removes *ratio* of each group; "global" ranks the channels of all groups together.
        multiple: channels that stay are a multiple of it, where a group has that many.
        keep: shell patterns; groups with a parameter whose name fits stay whole.
        nested: of channels within channels, such as those of a head within heads, which go: the "outer" ones, the
            "inner" ones, or "both".
        seed: for ``criterion=random``.
    """

    name: ClassVar[str] = "prune-channels"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize", "common-subexpressions", "fold-constants")
    runs_before: ClassVar[tuple[str, ...]] = (
        "fuse-conv-bn-relu",
        "merge-linears",
        "cross-layer-equalization",
        "smooth-quant",
        "insert-fake-quant",
        "cast-precision",
    )
    ratio: float = 0.5
    macs: float | None = None
    params: float | None = None
    criterion: Literal["l1", "l2", "bn-scale", "fpgm", "random"] = "l1"
    scope: Literal["group", "global"] = "group"
    multiple: int = 1
    keep: tuple[str, ...] = ()
    nested: Literal["outer", "inner", "both"] = "outer"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise SpecError(f"prune-channels: ratio must be at least 0 and below 1, not {self.ratio}")
        if self.macs is not None and self.params is not None:
            raise SpecError("prune-channels: give a budget of macs or of params, not both")
        for name in ("macs", "params"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise SpecError(f"prune-channels: {name} is the share to keep, above 0 and at most 1, not {value}")
        self.require_at_least(1, "multiple")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Find groups, choose, cut.

        Raises:
            PassError: a shape does not come out as planned. PreconditionError: a budget cannot be reached.
        """
        groups = find_groups(rewriter.program)
        self._say_what_is_off(rewriter, groups)
        dense = budget.macs(groups.coupling, {}), budget.parameters(groups.coupling, {})
        plan = self._plan(rewriter, groups, dense)
        indices = plan.resolve(groups)
        small = budget.macs(groups.coupling, indices), budget.parameters(groups.coupling, indices)
        if plan.groups:
            surgery.cut(rewriter, groups.coupling, indices)
        rewriter.details["pruning"] = plan
        rewriter.details["groups"] = groups
        rewriter.note(
            f"{len(plan.groups)} of {len(groups.all)} groups: MACs × {small[0] / max(1, dense[0]):.3f}, "
            f"parameters × {small[1] / max(1, dense[1]):.3f}"
        )

    def _plan(self, rewriter: Rewriter, groups: Groups, dense: tuple[int, int]) -> PruningPlan:
        chosen, constants = self._candidates(groups), rewriter.program.tensors()
        scored = {group.name: criteria.scores(group, constants, self.criterion, self.seed) for group in chosen}

        def plan(ratio: float) -> PruningPlan:
            return choose(chosen, scored, ratio, self.multiple, together=self.scope == "global")

        counts = {"macs": (budget.macs, dense[0]), "params": (budget.parameters, dense[1])}
        asked = [name for name in counts if getattr(self, name) is not None]
        if not asked:
            return plan(self.ratio)
        [name] = asked
        count, whole = counts[name]
        if any(surgery.CUT in n.meta for n in rewriter.program.graph.find_nodes(op="get_attr")):
            return PruningPlan(())  # the budget is a share of the dense model, and has been reached

        def share(ratio: float) -> float:
            return count(groups.coupling, plan(ratio).resolve(groups)) / max(1, whole)

        return plan(budget.solve(getattr(self, name), share, name))

    def _candidates(self, groups: Groups) -> list[Group]:
        around = nested(groups.prunable)
        inside = {atom for atom, outer in around.items() if outer}
        outside = {one for outer in around.values() for one in outer}
        parameters = groups.coupling.program.graph.find_nodes(op="get_attr")
        done = {str(node.target): node.meta.get(surgery.CUT, ()) for node in parameters}
        found = []
        for group in groups.prunable:
            if any(member.axis in done[member.constant] for member in group.members):
                continue
            if self.nested == "outer" and group.atom in inside:
                continue
            if self.nested == "inner" and group.atom in outside:
                continue
            if any(fnmatch.fnmatchcase(name, pattern) for name in groups_of(group.members) for pattern in self.keep):
                continue
            found.append(group)
        return found

    def _say_what_is_off(self, rewriter: Rewriter, groups: Groups) -> None:
        """Warn of patterns that fit no parameter of any group."""
        names = {name for group in groups.all for name in groups_of(group.members)}
        for pattern in self.keep:
            if not fnmatch.filter(names, pattern):
                text = f"prune-channels: keep: {pattern!r} fits no parameter, such as {min(names, default='')!r}"
                rewriter.note(text)
                warnings.warn(text, stacklevel=2)
