"""Which weights can have the pattern, and the reasons for all others."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

from torch import fx

from fxopt import masks, ops
from fxopt.masks import UNITS, Held
from fxopt.passbase import Pass
from fxopt.rewriter import Rewriter
from fxopt.sparsity import N_OF_M, Pattern


@dataclasses.dataclass(frozen=True)
class Candidate(Held):
    """A weight that is to have the pattern.

    Attributes:
        units: the convs or linears that have it.
    """

    units: tuple[fx.Node, ...] = ()

    @property
    def name(self) -> str:
        """Of the constant."""
        return str(self.weight.target)


def find(rewriter: Rewriter, who: Pass, pattern: Pattern, keep: Sequence[str], *, one_reader: bool) -> list[Candidate]:
    """The weights of convs and linears, each once; a reason is left at the readers of others.

    Args:
        rewriter: of the program.
        who: the pass, for warnings.
        pattern: to have.
        keep: shell patterns of weights that stay as they are; there is a warning for one that fits none.
        one_reader: leave weights alone that several layers read.
    """
    found, names = list[Candidate](), set[str]()
    for read in dict.fromkeys(ops.arguments(node)["weight"] for node in rewriter.nodes() if ops.kind(node) in UNITS):
        weight, mask = masks.parts(rewriter, read) or (read, None)
        units = tuple(user for user in read.users if ops.kind(user) in UNITS)
        if weight.op == "get_attr":
            names.add(str(weight.target))
        reason = _refusal(rewriter, units, read, weight, mask, pattern, keep)
        if reason is None and one_reader and len(units) > 1:
            reason = "its weight is read by several layers, whose inputs differ: method=magnitude can take it"
        if reason is None:
            found.append(Candidate(read, weight, mask, units))
            continue
        for unit in units:
            rewriter.skip(unit, reason)
    who.warn_of_unused(rewriter, keep, names, "weight")
    return found


def _refusal(
    rewriter: Rewriter,
    units: Sequence[fx.Node],
    read: fx.Node,
    weight: fx.Node,
    mask: fx.Node | None,
    pattern: Pattern,
    keep: Sequence[str],
) -> str | None:
    if read.target is N_OF_M:
        return "is held by a pattern already"
    if weight.op == "call_function":
        return "its weight is not a constant but computed"
    value = rewriter.tensor(weight)
    if value is None or not value.is_floating_point() or not value.numel():
        return "its weight is not a constant of floating-point numbers"
    if any(fnmatch.fnmatchcase(str(weight.target), text) for text in keep):
        return "stays whole, as asked"
    others = [user.name for user in read.users if user not in units or ops.arguments(user)["weight"] is not read]
    if mask is not None:
        others += [user.name for user in {**weight.users, **mask.users} if user is not read]
    if others:
        return f"its weight is read by something else too ({', '.join(others)}), which zeros would change as well"
    if any(ops.kind(unit) == "conv_transpose" for unit in units):
        return "a transposed convolution: no engine computes these from such weights"
    if any(ops.arguments(unit).get("groups", 1) > 1 for unit in units) and value.shape[1] == 1:
        return "a depthwise convolution: each output reads one channel"
    if not pattern.fits(value):
        return f"its {value.shape[-1 if value.dim() == 1 else 1]} inputs are no multiple of {pattern.m}"
    return None
