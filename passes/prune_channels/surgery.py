"""A plan carried out: parameters are cut, sizes among arguments follow, and every shape is what the plan says."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import ops
from fxopt.errors import PassError
from fxopt.passes.prune_channels.coupling import Computed, Coupling, hint
from fxopt.passes.prune_channels.dims import Atom, Fixed, Product, Sum, kept
from fxopt.program import source_line
from fxopt.rewriter import Rewriter
from fxopt.rounds import CUT, KEPT

aten = torch.ops.aten


def cut(rewriter: Rewriter, coupling: Coupling, plan: dict[Atom, torch.Tensor]) -> None:
    """Rewrite the program of *coupling*, which is that of *rewriter*.

    Raises:
        PassError: a value does not come out in the shape that the plan gives it.
    """
    program = rewriter.program
    constants: dict[str, torch.Tensor] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        value = program.constants[str(node.target)]
        axes = coupling.axes[node]
        for axis, dim in enumerate(axes):
            index = kept(dim, plan)
            if len(index) < dim.size:
                value = value.index_select(axis, index.to(value.device))
                node.meta[CUT] = {*node.meta.get(CUT, ()), axis}
                before = node.meta.get(KEPT, {})
                node.meta[KEPT] = {**before, axis: before[axis][index] if axis in before else index}
                constants[str(node.target)] = value.contiguous()
    expected = {node: coupling.expected(node, plan) for node in program.graph.nodes if node.op == "call_function"}
    arguments = {}
    for node, sizes in coupling.sizes.items():
        changed = {name: _size(given, plan) for name, given in sizes.items()}
        if changed != {name: _size(given, {}) for name, given in sizes.items()} or changed.keys() & _ALWAYS:
            arguments[node] = {name: _computed(rewriter, node, given) for name, given in changed.items()}
            _retarget(node, arguments[node])
    rewriter.resize(constants, arguments)
    for node, shapes in expected.items():
        _compare(node, shapes)


_ALWAYS = {"scale", "squeezed"}  # what the dense model takes from sizes


def _size(given: Any, plan: dict[Atom, torch.Tensor]) -> Any:
    if isinstance(given, (list, tuple)):
        return [_size(one, plan) for one in given]
    if isinstance(given, Computed):
        whole, left = given.dim.size, len(kept(given.dim, plan))
        return given.node if left == whole else _Share(given.node, left, whole)
    return len(kept(given, plan)) if isinstance(given, (Atom, Fixed, Sum, Product)) else given


@dataclasses.dataclass(frozen=True)
class _Share:
    """*left* of every *whole* that *node* gives."""

    node: fx.Node
    left: int
    whole: int


def _computed(rewriter: Rewriter, user: fx.Node, given: Any) -> Any:
    """*given*, its shares as new calls before *user*."""
    if isinstance(given, list):
        return [_computed(rewriter, user, one) for one in given]
    if not isinstance(given, _Share):
        return given
    common = math.gcd(given.left, given.whole)
    size = given.node
    for compute, number in ((operator.floordiv, given.whole // common), (operator.mul, given.left // common)):
        size = rewriter.call(compute, (size, number), before=user) if number != 1 else size
    return size


def _retarget(node: fx.Node, changed: dict[str, Any]) -> None:
    """A split into equal parts becomes one into the parts that are left; a squeeze names its axes."""
    if "split_sizes" in changed and node.target is not aten.split_with_sizes.default:
        dim = ops.arguments(node)["dim"]
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], changed["split_sizes"], dim), {}
    if "squeezed" in changed:
        node.target = aten.squeeze.dims
        node.args, node.kwargs = (node.args[0], changed["squeezed"]), {}


def _compare(node: fx.Node, shapes: list[list[int]]) -> None:
    values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    for tensor, shape in zip(values, shapes, strict=False):
        found = [hint(size) for size in tensor.shape]
        if found != shape:
            raise PassError(f"{node.name} came out as {found}, planned were {shape} ({source_line(node)})")
