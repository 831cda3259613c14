"""Whole residual branches go: layer pruning. Lossy.

    y = x + f(x)   →   y = x              relu(x + f(x))   →   relu(x)

A branch f is what lies between x and the sum. Its only way in is x: besides, f may read constants, and what is made of
inputs without any layer, such as an attention mask. Attention and MLP of a transformer layer are two branches. The
branch that does least goes first:

    similarity   1 − cos(x, y), the mean over calibration data and positions; y after the activation, where there is one
                 (Block Influence: Men et al., ShortGPT, arXiv:2403.03853, equation 1)
    l1           mean |w| of the weights and biases in f (Li et al., ICLR 2017, for whole branches); needs no data
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import operator
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import fx

from fxopt import ops
from fxopt.errors import SpecError
from fxopt.execute import evaluate
from fxopt.passbase import CLEANING, FINISHING, Pass, PassContext
from fxopt.passes.prune_blocks.branches import LAYERS, Branch, find
from fxopt.rewriter import Rewriter
from fxopt.rounds import REMOVED


@dataclasses.dataclass(frozen=True)
class Block:
    """What was decided of a branch.

    Attributes:
        name: of the module that holds its weights.
        score: what it does, by the criterion; the smallest goes first.
        removed: whether it went.
    """

    name: str
    score: float
    removed: bool


@dataclasses.dataclass(frozen=True)
class PruneBlocks(Pass):
    """Remove the residual branches that do least.

    A second run removes no more: *count* and *ratio* are what is gone in the end, of one round of ``fxopt.prepare``.

    Attributes:
        count: branches to remove; fewer where there are not as many.
        ratio: share of the branches to remove, instead of *count*.
        criterion: "similarity" (needs calibration data) or "l1".
        keep: shell patterns; branches with a parameter whose name fits stay.
    """

    name: ClassVar[str] = "prune-blocks"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = CLEANING
    runs_before: ClassVar[tuple[str, ...]] = ("prune-channels", "prune-weights", *FINISHING)
    count: int = 1
    ratio: float | None = None
    criterion: Literal["similarity", "l1"] = "similarity"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.require_at_least(1, "count")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise SpecError(f"prune-blocks: ratio must be from 0 to 1, not {self.ratio}")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Find, score, remove.

        Raises:
            PreconditionError: ``criterion=similarity``, and no calibration data.
        """
        output = rewriter.program.output
        gone_before = int(output.meta.get(REMOVED, 0))
        found = self._candidates(rewriter)
        share = self.count if self.ratio is None else round(self.ratio * (len(found) + gone_before))
        wanted = max(0, share - gone_before)
        scores = self._scores(rewriter, ctx, found) if found and wanted else {}
        ranked = sorted(scores, key=lambda branch: scores[branch])
        gone = _chosen(rewriter, ranked, wanted)
        for branch in gone:
            _remove(rewriter, branch)
        output.meta[REMOVED] = gone_before + len(gone)
        blocks = tuple(Block(branch.name, scores[branch], branch in gone) for branch in ranked)
        rewriter.details["blocks"] = blocks
        names = ", ".join(f"{block.name} ({block.score:.3g})" for block in blocks if block.removed)
        rewriter.note(f"removed {len(gone)} of {len(found)} residual branches" + (f": {names}" if names else ""))

    def _candidates(self, rewriter: Rewriter) -> list[Branch]:
        found = list(find(rewriter))
        names = {name for branch in found for name in branch.parameters}
        self.warn_of_unused(rewriter, self.keep, names)
        kept = [b for b in found if any(fnmatch.filter(b.parameters, pattern) for pattern in self.keep)]
        for branch in kept:
            rewriter.skip(branch.total, f"{branch.name} stays, as asked")
        return [branch for branch in found if branch not in kept]

    def _scores(self, rewriter: Rewriter, ctx: PassContext, found: list[Branch]) -> dict[Branch, float]:
        if self.criterion == "similarity":
            return _influence(rewriter, ctx.batches(self), found)
        return {branch: _magnitude(rewriter, branch) for branch in found}


def _magnitude(rewriter: Rewriter, branch: Branch) -> float:
    total, count = 0.0, 0
    for node in branch.inside:
        if ops.kind(node) in LAYERS:
            for key in ("weight", "bias"):
                value = rewriter.tensor(ops.arguments(node).get(key))
                if value is not None:
                    total, count = total + float(value.abs().double().sum()), count + value.numel()
    return total / max(1, count)


def _influence(rewriter: Rewriter, batches: Iterator[list[Any]], found: list[Branch]) -> dict[Branch, float]:
    """1 − cos(x, y) of each branch, the mean over all positions of all batches; x is the sum without it."""
    sums, counts = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0)
    ends = dict[fx.Node, list[Branch]]()
    for branch in found:
        ends.setdefault(branch.result, []).append(branch)
    last_read = {x: branch.result for branch in found for x in branch.others if isinstance(x, fx.Node)}
    for batch in batches:
        seen: dict[fx.Node, torch.Tensor] = {}

        def look(node: fx.Node, value: Any, seen: dict[fx.Node, torch.Tensor] = seen) -> None:
            for branch in ends.get(node, ()):
                rest = functools.reduce(operator.add, (seen.get(x, x) for x in branch.others))
                x, y = (t.detach().float().movedim(branch.features, -1) for t in (rest, value))
                away = 1 - F.cosine_similarity(x, y, dim=-1)
                away[(x == y).all(-1)] = 0  # zeros on both sides too
                sums[branch] += float(away.sum())
                counts[branch] += away.numel()
            for x in [x for x in seen if last_read[x] is node]:
                del seen[x]
            if node in last_read:
                seen[node] = value

        evaluate(rewriter.program, batch, observe=look)
    return {branch: sums[branch] / max(1, counts[branch]) for branch in found}


def _chosen(rewriter: Rewriter, ranked: list[Branch], wanted: int) -> list[Branch]:
    """The first *wanted* of *ranked* that are not inside of each other, and whose absence cuts no input off."""
    gone = list[Branch]()
    needed = _reached(rewriter, set())
    for branch in ranked:
        if len(gone) == wanted:
            break
        if any(branch.total in other.inside for other in gone):
            continue
        lost = needed - _reached(rewriter, {one.end for one in [*gone, branch]})
        if lost:
            names = ", ".join(sorted(node.name for node in lost))
            rewriter.skip(branch.total, f"without {branch.name} the outputs would not depend on the input {names}")
        else:
            gone.append(branch)
    return gone


def _reached(rewriter: Rewriter, without: set[fx.Node]) -> set[fx.Node]:
    """The inputs that the outputs depend on when the addends *without* are gone."""
    pending, seen = [rewriter.program.output], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(source for source in node.all_input_nodes if source not in without)
    return {node for node in seen if node.op == "placeholder"}


def _remove(rewriter: Rewriter, branch: Branch) -> None:
    """Let what is added to the branch take the place of the sum."""
    [total] = branch.end.users
    [x] = [side for side in total.all_input_nodes if side is not branch.end]
    lent_out = ops.lent_out(rewriter.program.graph)
    if total in lent_out and (x in lent_out or x.op == "placeholder"):  # the caller may write to what it gets
        x = rewriter.call(torch.ops.aten.clone.default, (x,), before=total)
    rewriter.replace(total, x)
