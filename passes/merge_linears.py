"""Linears over one input become one: q, k and v of an attention block in a single, larger matmul.

    q = linear(x, Wq, bq); k = linear(x, Wk, bk)   →   y = linear(x, [Wq; Wk], [bq; bk])
                                                       q = y[..., :n]; k = y[..., n:]

Row by row the arithmetic is the same. It pays because x is read once and one call replaces several; a linear that
already carries an activation or residual keeps it and stays alone. Weights with N:M sparsity are merged among
themselves: beside others they could not be stored packed.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import torch
from torch import fx

from fxopt import ops
from fxopt.passbase import Pass, PassContext
from fxopt.rewriter import Rewriter
from fxopt.sparse_packing import PATTERNS
from fxopt.sparsity import Pattern

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class MergeLinears(Pass):
    """Merge plain linears that read the same value.

    Attributes:
        limit: largest number of weight elements of a merged linear; beyond it the call is all arithmetic and a
            copy of the weights brings nothing.
    """

    name: ClassVar[str] = "merge-linears"
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize", "fuse-conv-bn-relu")
    limit: int = 2**25

    def run(self, rewriter: Rewriter, ctx: PassContext) -> None:
        """One walk over the values; each one's plain linear users are a candidate group."""
        for node in rewriter.nodes():
            if node._erased:
                continue
            users = [u for u in node.users if ops.packet(u) == "linear" and u.args[0] is node]
            if len(users) > 1:
                self._merge(sorted(users), rewriter)

    def _merge(self, users: list[fx.Node], rewriter: Rewriter) -> None:
        groups: dict[tuple[Pattern, ...], list[fx.Node]] = {}
        for user in users:
            reason = _refuse(user, rewriter)
            if reason is None:
                groups.setdefault(_patterns(_weight(user, rewriter)), []).append(user)
            else:
                rewriter.skip(user, reason)
        for group in groups.values():
            if len(group) > 1:
                self._merge_alike(group, rewriter)
            elif len(groups) > 1:
                rewriter.skip(group[0], "its weight and the others over this input are not all N:M sparse alike")

    def _merge_alike(self, group: list[fx.Node], rewriter: Rewriter) -> None:
        """Merge the linears of *group*, all of which can be."""
        weights = [_weight(u, rewriter) for u in group]
        if sum(w.numel() for w in weights) > self.limit:
            rewriter.skip(group[0], f"a merged weight would have over {self.limit:,} elements")
            return
        biases = [rewriter.tensor(u.args[2]) if len(u.args) > 2 else None for u in group]
        if any(b is not None for b in biases):
            filled = [b if b is not None else w.new_zeros(len(w)) for b, w in zip(biases, weights, strict=True)]
            bias = rewriter.constant(f"{group[0].args[1].target}.merged_bias", torch.cat(filled))  # type: ignore[union-attr]
        else:
            bias = None
        weight = rewriter.constant(f"{group[0].args[1].target}.merged", torch.cat(weights))  # type: ignore[union-attr]
        merged = rewriter.call(aten.linear.default, (group[0].args[0], weight, bias), before=group[0])
        ends = [0]
        for rows in weights:
            ends.append(ends[-1] + len(rows))
        cuts = [(merged, -1, start, end) for start, end in itertools.pairwise(ends)]
        slices = zip(cuts, group, strict=True)
        parts = [rewriter.call(aten.slice.Tensor, cut, before=group[0], origin=user) for cut, user in slices]
        for user, part in zip(group, parts, strict=True):
            rewriter.replace(user, part)


def _patterns(weight: torch.Tensor) -> tuple[Pattern, ...]:
    """What N:M sparsity *weight* can be packed by."""
    return tuple(pattern for pattern in PATTERNS if pattern.holds(weight))


def _weight(node: fx.Node, rewriter: Rewriter) -> torch.Tensor:
    value = rewriter.tensor(node.args[1])
    assert value is not None
    return value


def _refuse(node: fx.Node, rewriter: Rewriter) -> str | None:
    """Why a linear must stay alone, or None."""
    if ops.is_fused(node):
        return "it already carries an activation or residual"
    if any(constant is not None and rewriter.tensor(constant) is None for constant in node.args[1:]):
        return "its weight or bias is not constant"
    weight = node.args[1]
    if isinstance(weight, fx.Node) and len(weight.users) > 1:
        return "its weight is shared"
    if any(user.op == "output" for user in node.users):
        return "its value is an output of the model"
    if ops.layout_is_read(node):
        return "its strides are read (as_strided), and a slice has others"
    return None
