"""The smallest weights of convs and linears become zero. Lossy.

    conv(x, @w)   →   conv(x, @w ⊙ m)       m = 0 for the share *ratio* of the weights whose |w| is smallest, else 1

Also by blocks: the weight is seen as a matrix, output channels × everything else, cut into tiles of *block*, and a tile
goes as a whole, by the mean of |w| in it (Han et al., "Learning both Weights and Connections for Efficient Neural
Networks", NeurIPS 2015; for blocks, Narang et al., "Block-Sparse Recurrent Neural Networks", arXiv:1711.02782).

In a graph that is to be trained the zeros are held by masks (``fxopt.masks``), and ``PreparedModel.prune_weights`` may
raise the share in the course of training. Masks that are there already, those of ``torch.nn.utils.prune`` too, close
further and never open. Compiled, a pruned weight is an ordinary one with zeros in it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from typing import ClassVar, Literal

import torch
from torch import fx

from fxopt import masks, ops
from fxopt.errors import SpecError
from fxopt.masks import UNITS, Blocks, Held, Masked
from fxopt.passbase import CLEANING, FINISHING, Pass, PassContext
from fxopt.rewriter import Rewriter

_BLOCK = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclasses.dataclass(frozen=True)
class PruneWeights(Pass):
    """Magnitude pruning of single weights or of blocks.

    A second run changes nothing: what is that sparse already stays as it is. Of each weight one block stays at least.

    Attributes:
        ratio: share of the weights, or blocks, to set to zero; those that are zero count.
        block: rows x columns of what goes together, such as "4x1"; the rows are output channels.
        scope: "layer" for the ratio in each layer; "global" ranks all layers together.
        keep: shell patterns; weights whose name fits stay as they are.
    """

    name: ClassVar[str] = "prune-weights"
    exact: ClassVar[bool] = False
    runs_after: ClassVar[tuple[str, ...]] = (*CLEANING, "prune-blocks", "prune-channels")
    runs_before: ClassVar[tuple[str, ...]] = FINISHING
    ratio: float = 0.5
    block: str = "1x1"
    scope: Literal["layer", "global"] = "layer"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.require_share("ratio")
        if not _BLOCK.fullmatch(self.block):
            raise SpecError(f"prune-weights: block must be rows x columns, such as 4x1, not {self.block!r}")

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """Choose in all weights, then set to zero, and for training hold there."""
        found = {str(one.weight.target): one for one in self._candidates(rewriter)}
        weights = {name: one.value(rewriter) for name, one in found.items()}
        axes = {name: _channels(one.read) for name, one in found.items()}
        masked = Masked(axes, self._blocks(), self.scope == "global")
        kept = masked.kept(weights, self.ratio) if weights else {}
        pruned = {name: torch.where(kept[name], weight, 0) for name, weight in weights.items()}
        changed = {name: new for name, new in pruned.items() if not torch.equal(new, rewriter.program.constants[name])}
        if changed:
            rewriter.resize(changed, {})
        if ctx.training:
            names = {name: masks.hold(rewriter, one.weight, one.mask, kept[name]) for name, one in found.items()}
            rewriter.details["masks"] = dataclasses.replace(masked, masks=names)
        zeros = {name: int((value == 0).sum()) for name, value in pruned.items()}
        rewriter.details["sparsity"] = {name: zeros[name] / pruned[name].numel() for name in zeros}
        share = sum(zeros.values()) / max(1, sum(value.numel() for value in pruned.values()))
        rewriter.note(
            f"{share:.1%} of the weights of {len(pruned)} layers are zero. No engine here computes faster for zeros; "
            "the model is smaller only once it is compressed"
        )

    def _blocks(self) -> Blocks:
        rows, columns = self.block.split("x")
        return Blocks(int(rows), int(columns))

    def _candidates(self, rewriter: Rewriter) -> list[Held]:
        """The weights to prune, once each; a reason is left at the readers of others."""
        found = dict[fx.Node, Held]()
        names = set[str]()
        for unit in [node for node in rewriter.nodes() if ops.kind(node) in UNITS]:
            read = ops.arguments(unit)["weight"]
            one = Held.of(rewriter, read)
            if one.weight.op == "get_attr":
                names.add(str(one.weight.target))
            reason = self._refusal(rewriter, one)
            if reason is None:
                found[read] = one
            else:
                rewriter.skip(unit, reason)
        self.warn_of_unused(rewriter, self.keep, names, "weight")
        return list(found.values())

    def _refusal(self, rewriter: Rewriter, one: Held) -> str | None:
        tensor = rewriter.tensor(one.weight)
        if tensor is None or not tensor.is_floating_point() or not tensor.numel():
            return "its weight is not a constant of floating-point numbers"
        if any(fnmatch.fnmatchcase(str(one.weight.target), pattern) for pattern in self.keep):
            return "stays whole, as asked"
        shared = one.mask is not None and len(one.weight.users) + len(one.mask.users) > 2
        if shared or len({ops.kind(user) for user in one.read.users}) > 1 or not _only_as_weight(one.read):
            return "its weight is read by something else too"
        return None


def _only_as_weight(weight: fx.Node) -> bool:
    return all(ops.kind(user) in UNITS and ops.arguments(user)["weight"] is weight for user in weight.users)


def _channels(weight: fx.Node) -> int:
    """The axis of the output channels."""
    return 1 if any(ops.kind(user) == "conv_transpose" for user in weight.users) else 0
