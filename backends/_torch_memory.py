"""Which values share memory, and which may be overwritten: results written over an argument that dies there.

    y = add(a, b)      →   y = add_(a, b)          a is a result of this program, nothing else refers to its memory,
    y = conv(x) + a    →   y = conv_(a, x)         and this is its last use

The aliasing of an op is read from its schema. An op made of other ops (CompositeImplicitAutograd) may hide a view that
its schema does not mention (``reshape``, ``to``, ``einsum``), and an op from outside ATen may do anything: both count
as aliases of all their arguments unless known better.
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt import ops
from fxopt.program import Program

_CONV = torch.ops.mkldnn._convolution_pointwise.binary
_CONV_INPLACE = torch.ops.mkldnn._convolution_pointwise_.binary
_FRESH_KINDS = {"conv", "conv_transpose", "linear", "batch_norm", "norm", "softmax", "attention", "pool", "activation"}
_FRESH_NAMESPACES = {"mkldnn", "onednn", "quantized_decomposed"}


def may_alias(node: fx.Node) -> bool:
    """Whether the result of a call may share memory with an argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not getattr(target, "gives_new_memory", False)
    if ops.namespace(node) in _FRESH_NAMESPACES:
        return target._schema.is_mutable
    if ops.kind(node) == "cast" and _casts(node):
        return False
    if ops.is_view(node):
        return True
    if ops.namespace(node) not in ("aten", "fxopt"):
        return True
    hidden = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return hidden and ops.kind(node) not in _FRESH_KINDS


def _casts(node: fx.Node) -> bool:
    """Whether a cast surely gives another dtype than it takes, hence new memory."""
    before = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    after = node.meta.get("val")
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype != after.dtype


class Aliases:
    """The memory behind each value of a graph, built up in graph order.

    A *root* is a node that brings new memory into the program: an input, a constant, or a call with a fresh result.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._last = {node: max((self._order[u] for u in node.users), default=i) for node, i in self._order.items()}

    def add(self, node: fx.Node, over: fx.Node | None = None) -> None:
        """Take in the next node; *over* is the argument that it overwrites."""
        if over is not None:
            roots = self.roots[over]
        elif node.op == "call_function" and may_alias(node):
            roots = frozenset[fx.Node]().union(*(self.roots[n] for n in node.all_input_nodes)) or frozenset({node})
        else:
            roots = frozenset({node})
        self.roots[node] = roots
        for root in roots:
            self._members.setdefault(root, []).append(node)

    def is_free(self, value: fx.Node, at: fx.Node) -> bool:
        """Whether *at* may overwrite its argument *value*: the program's own memory that nobody reads any more."""
        if sum(argument is value for argument in _flat_arguments(at)) != 1 or not _is_whole(value):
            return False
        now = self._order[at]
        for root in self.roots[value]:
            if root.op != "call_function":
                return False
            for member in self._members[root]:
                if self._last[member] > now or (member is not value and at in member.users):
                    return False
        return True


def reuse_memory(program: Program) -> int:
    """Let ops write over arguments that die there; returns how many do."""
    aliases = Aliases(program.graph)
    count = 0
    for node in program.graph.nodes:
        over = _overwritten(node, aliases) if node.op == "call_function" else None
        aliases.add(node, over)
        if over is not None:
            _make_inplace(node, over)
            count += 1
    return count


def _overwritten(node: fx.Node, aliases: Aliases) -> fx.Node | None:
    for value in _candidates(node):
        if _same_tensor(value, node) and aliases.is_free(value, node):
            return value
    return None


def _candidates(node: fx.Node) -> list[fx.Node]:
    """Arguments that *node* could write its result to, the preferred one first."""
    if node.target is _CONV:
        other = node.args[1]
        return [other] if isinstance(other, fx.Node) else []
    if not node.args or not isinstance(node.args[0], fx.Node) or _inplace_twin(node) is None:
        return []
    candidates = [node.args[0]]
    if ops.packet(node) in ("add", "mul") and not node.kwargs and isinstance(node.args[1], fx.Node):
        candidates.append(node.args[1])
    return candidates


def _make_inplace(node: fx.Node, over: fx.Node) -> None:
    if node.target is _CONV:
        x, other, *rest = node.args
        node.target, node.args = _CONV_INPLACE, (other, x, *rest)
        return
    if node.args[0] is not over:
        node.args = (over, node.args[0], *node.args[2:])
    node.target = _inplace_twin(node)  # type: ignore[assignment]


def _inplace_twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """``aten.relu_`` for ``aten.relu``; None where there is none, or where it is no pointwise op."""
    if ops.namespace(node) != "aten" or not (ops.is_pointwise(node) or ops.kind(node) in ("activation", "add", "mul")):
        return None
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    packet = getattr(torch.ops.aten, f"{ops.packet(node)}_", None)
    twin = getattr(packet, target._overloadname, None) if packet is not None else None
    if not isinstance(twin, torch._ops.OpOverload):
        return None
    same = [a.name for a in twin._schema.arguments] == [a.name for a in target._schema.arguments]
    return twin if same else None


def _flat_arguments(node: fx.Node) -> list[object]:
    flat: list[object] = []
    fx.node.map_arg((node.args, node.kwargs), flat.append)
    return flat


def _is_whole(value: fx.Node) -> bool:
    """Whether no two elements of *value* share memory: no ``expand`` between it and its roots."""
    while value.op == "call_function" and may_alias(value):
        if ops.packet(value).startswith("expand") or ops.kind(value) not in ("shape", "permute", "copy", "identity"):
            return ops.is_mutating(value)
        (value, *_) = value.all_input_nodes
    return True


def _same_tensor(a: fx.Node, b: fx.Node) -> bool:
    """Whether both values have the same shape, dtype and device for all inputs."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    return same_sizes(x, y) and x.dtype == y.dtype and x.device == y.device and x.layout == y.layout


def same_sizes(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether the shapes are equal whatever the dynamic sizes are; asks no SymInt to decide."""
    if x.dim() != y.dim():
        return False
    return all(_expression(a) == _expression(b) for a, b in zip(x.shape, y.shape, strict=True))


def _expression(size: int | torch.SymInt) -> object:
    return size if isinstance(size, int) else size.node.expr
