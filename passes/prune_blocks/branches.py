"""Which parts of a graph are residual branches that can go.

    x ─┬─ f ─ + ─ y          f: all that lies on the ways from x to the sum, with a conv or linear among it
       └──────┘              x + f(x) + g(x) has two branches; what both are made of, such as a norm, belongs to neither

Nobody else reads what f computes inside; f reads x, constants, and what is made of inputs without any layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

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
        total: the sum.
        end: what the branch adds to it; ``others``: what else is added, x among it.
        inside: the nodes between x and the sum that only the branch needs.
        parameters: names of the constants that they read.
        name: of the module that holds the weights, as far as their names tell.
    """

    total: fx.Node
    end: fx.Node
    others: tuple[Any, ...]
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
        if ops.kind(total) != "add" or _parent(total) is not None:
            continue
        for branch in _branches(total, order, laden, driven):
            if isinstance(branch, str):
                rewriter.skip(total, branch)
            else:
                yield branch


def _parent(total: fx.Node) -> fx.Node | None:
    """The sum that alone reads the sum *total*, so that both are one."""
    user = next(iter(total.users)) if len(total.users) == 1 else None
    if user is None or not _is_plain(user) or not _is_plain(total):
        return None
    return user if _kind(user) == _kind(total) else None


def _is_plain(node: fx.Node) -> bool:
    return ops.kind(node) == "add" and bool(node.kwargs.get("alpha", 1) == 1) and len(node.args) == 2


def _kind(node: fx.Node) -> tuple[object, list[str]]:
    """Dtype and sizes."""
    value = node.meta["val"]
    return value.dtype, [str(size) for size in value.shape]


def _addends(total: fx.Node) -> list[Any]:
    """What *total* adds up, through the sums that only it reads."""
    result = list[Any]()
    for side in total.args[:2]:
        inner = isinstance(side, fx.Node) and ops.kind(side) == "add" and _parent(side) is total
        result.extend(_addends(side) if inner else [side])  # type: ignore[arg-type]
    return result


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


def _branches(
    total: fx.Node, order: dict[fx.Node, int], laden: set[fx.Node], driven: set[fx.Node]
) -> Iterator[Branch | str]:
    """The residual branches of a sum, or why there are none; nothing where *total* is a sum of another kind."""
    addends = _addends(total)
    sides = [side for side in addends if isinstance(side, fx.Node)]
    if len(sides) < 2 or len(set(sides)) < len(sides):
        return
    made = {x: {end: _between(x, end, order) for end in sides if end is not x} for x in sides if x in driven}
    x = max(made, key=lambda x: sum(map(bool, made[x].values())), default=None)
    if x is None or not any(made[x].values()):
        if laden.issuperset(sides):
            yield "neither side of the sum is made of the other" if len(sides) == 2 else "no side of the sum is"
        return
    for end, between in made[x].items():
        elsewhere = set[fx.Node]().union(*(way for other, way in made[x].items() if other is not end))
        if any(map(_is_unit, between - elsewhere)):
            others = tuple(addend for addend in addends if addend is not end)
            yield _checked(total, x, end, others, between, elsewhere, laden)


def _checked(
    total: fx.Node,
    x: fx.Node,
    end: fx.Node,
    others: tuple[Any, ...],
    between: set[fx.Node],
    elsewhere: set[fx.Node],
    laden: set[fx.Node],
) -> Branch | str:
    """The branch from *x* to *end*, or why it has to stay; *elsewhere* are the nodes of the sum's other branches."""
    inside = between - elsewhere
    if ops.arguments(total).get("alpha", 1) != 1 and total.args[0] is not x:
        return "the sum takes a multiple of what the branch is added to"
    if _kind(x) != _kind(total):
        return "what the branch is added to has another shape or dtype"
    read = {source for node in inside for source in node.all_input_nodes} - inside - {x}
    foreign = {node for node in read if node in laden and node not in between}
    foreign |= {node for node in between & elsewhere if _is_unit(node)}
    if foreign:
        return f"the branch reads {', '.join(sorted(node.name for node in foreign))} too"
    known = between | elsewhere | _sums(total)
    readers = sorted(user.name for node in between for user in node.users if user not in known)
    if readers:
        return f"{readers[0]} reads what the branch computes inside"
    own = read - between
    weights = _constants({source for node in inside if _is_unit(node) for source in node.all_input_nodes} & own)
    return Branch(total, end, others, frozenset(inside), tuple(_constants(own)), _common(weights) or total.name)


def _sums(total: fx.Node) -> set[fx.Node]:
    """*total* and the sums that it is made of."""
    inner = [side for side in total.all_input_nodes if ops.kind(side) == "add" and _parent(side) is total]
    return {total}.union(*map(_sums, inner))


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
