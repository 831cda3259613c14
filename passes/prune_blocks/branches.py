"""Which parts of a graph are residual branches that can go.

    x ─┬─ f ─ + ─ y          f: all that lies on the ways from x to the sum, with a conv or linear among it
       └──────┘

Nobody else reads what f computes inside; f reads x, constants, and what is made of inputs without any layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import fx

from fxopt import ops
from fxopt.rewriter import Rewriter

UNITS = ("conv", "conv_transpose", "linear")
LAYERS = (*UNITS, "batch_norm", "norm", "embedding", "matmul", "attention")


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch that can go.

    Attributes:
        total: the sum; ``x``: what remains of it.
        inside: the nodes between x and the sum.
        parameters: names of the constants that they read.
        name: of the module that holds the weights, as far as their names tell.
    """

    total: fx.Node
    x: fx.Node
    inside: frozenset[fx.Node]
    parameters: tuple[str, ...]
    name: str

    @property
    def result(self) -> fx.Node:
        """The sum, or the activation that alone reads it."""
        users = list(self.total.users)
        return users[0] if len(users) == 1 and ops.kind(users[0]) == "activation" else self.total

    @property
    def features(self) -> int:
        """The axis of the features: where the last layer of the branch has as many outputs."""
        last = next(node for node in reversed(self.total.graph.nodes) if node in self.inside and _is_unit(node))
        weight, shape = ops.arguments(last)["weight"].meta["val"], self.total.meta["val"].shape
        channels = weight.shape[1 if ops.kind(last) == "conv_transpose" else 0]
        axes = [axis for axis, size in enumerate(shape) if axis and size == channels]
        if not axes:
            return len(shape) - 1
        return axes[-1] if ops.kind(last) == "linear" else axes[0]


def find(rewriter: Rewriter) -> Iterator[Branch]:
    """The branches, in graph order; at other sums of what layers have made a reason is left."""
    laden, driven = _origins(rewriter)
    order = {node: i for i, node in enumerate(rewriter.nodes())}
    for total in rewriter.nodes():
        branch = _branch(total, order, laden, driven) if ops.kind(total) == "add" else None
        if isinstance(branch, str):
            rewriter.skip(total, branch)
        elif branch is not None:
            yield branch


def _is_unit(node: fx.Node) -> bool:
    return ops.kind(node) in UNITS


def _origins(rewriter: Rewriter) -> tuple[set[fx.Node], set[fx.Node]]:
    """The values that layers have made of inputs, and all that depend on an input; sizes are not values."""
    laden, driven = set[fx.Node](), set[fx.Node]()
    for node in rewriter.nodes():
        value = node.meta.get("val")
        if node.op == "placeholder" or not driven.isdisjoint(node.all_input_nodes):
            driven.add(node)
            made = ops.kind(node) in LAYERS or not laden.isdisjoint(node.all_input_nodes)
            if made and isinstance(value, (torch.Tensor, tuple, list)):
                laden.add(node)
    return laden, driven


def _branch(
    total: fx.Node, order: dict[fx.Node, int], laden: set[fx.Node], driven: set[fx.Node]
) -> Branch | str | None:
    """The residual branch of a sum, or why there is none; None where *total* is a sum of another kind."""
    sides = [side for side in total.args[:2] if isinstance(side, fx.Node)]
    if len(sides) != 2 or sides[0] is sides[1]:
        return None
    for x, end in (sides, sides[::-1]):
        inside = _between(x, end, order) if x in driven else set()
        if inside:
            return _checked(total, x, inside, laden) if any(map(_is_unit, inside)) else None
    return "neither side of the sum is made of the other" if laden.issuperset(sides) else None


def _checked(total: fx.Node, x: fx.Node, inside: set[fx.Node], laden: set[fx.Node]) -> Branch | str:
    a, b = x.meta["val"], total.meta["val"]
    if ops.arguments(total).get("alpha", 1) != 1 and total.args[0] is not x:
        return "the sum takes a multiple of what the branch is added to"
    if a.dtype != b.dtype or [str(size) for size in a.shape] != [str(size) for size in b.shape]:
        return "what the branch is added to has another shape or dtype"
    read = {source for node in inside for source in node.all_input_nodes} - inside - {x}
    others = sorted(source.name for source in read if source in laden)
    if others:
        return f"the branch reads {', '.join(others)} too"
    readers = sorted(user.name for node in inside for user in node.users if user not in inside and user is not total)
    if readers:
        return f"{readers[0]} reads what the branch computes inside"
    weights = _constants({source for node in inside if _is_unit(node) for source in node.all_input_nodes} & read)
    return Branch(total, x, frozenset(inside), tuple(_constants(read)), _common(weights) or total.name)


def _between(x: fx.Node, end: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """The nodes on the ways from *x* to *end*, which counts; none where no way leads there."""
    after, pending = set[fx.Node](), [x]
    while pending:
        for user in pending.pop().users:
            if user not in after and order[user] <= order[end]:
                after.add(user)
                pending.append(user)
    if end not in after:
        return set()
    inside, pending = {end}, [end]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in after and source not in inside:
                inside.add(source)
                pending.append(source)
    return inside


def _constants(nodes: set[fx.Node]) -> list[str]:
    """Names of the constants that *nodes* are, or are made of."""
    seen, pending = set(nodes), list(nodes)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return sorted(str(node.target) for node in seen if node.op == "get_attr")


def _common(names: list[str]) -> str:
    """The module that all *names* are in: layer1.0 for layer1.0.conv1.weight and layer1.0.bn1.bias."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(same[0] for same in itertools.takewhile(lambda same: len(set(same)) == 1, parts))
