"""Which axes of a graph belong together: every value gets an expression of atoms for each of its axes.

    conv(x[b, c, h, w], w[o, i, k, k])      i = c, the result has o
    add(x, y)                               the axes of x are those of y

One walk over the graph. The rule of an op (``rules``) unifies what has to shrink together, gives the axes of its
result, and says which of its arguments are sizes that follow (the groups of a convolution, the shape of a view). An op
without a rule freezes whatever it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxopt import ops
from fxopt.passes.prune_channels.dims import Atom, Dim, Fixed, atoms, freeze, kept, positions
from fxopt.program import Program, source_line

Axes: TypeAlias = list[Dim]
Rule: TypeAlias = Callable[["Coupling", fx.Node, dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Member:
    """An axis of a parameter that an atom occurs in.

    Attributes:
        constant: name of the parameter.
        axis: which of its axes.
        dim: what the axis is made of.
    """

    constant: str
    axis: int
    dim: Dim

    @property
    def key(self) -> str:
        """Parameter and axis as text."""
        return f"{self.constant}:{self.axis}"

    def index(self, atom: Atom) -> torch.Tensor:
        """Which index of *atom* each position of the axis belongs to, −1 for none: i64[size]."""
        return positions(self.dim, atom)


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """A size among arguments that the graph computes from the sizes of inputs.

    Attributes:
        node: what computes it.
        dim: what it has to be: *node* gives the size of all of it.
    """

    node: fx.Node
    dim: Dim


class Coupling:
    """The axes of every value of *program*, and the arguments that depend on them.

    Attributes:
        program: looked at only.
        axes: for each tensor its axes; for a node with several results a list of such.
        sizes: node → argument → the size, or the list of sizes, that it must be; entries that are no Dim stay.
    """

    def __init__(self, program: Program, rules: Callable[[fx.Node], Rule | None]) -> None:
        self.program = program
        self.axes: dict[fx.Node, Any] = {}
        self.sizes: dict[fx.Node, dict[str, Any]] = {}
        for node in program.graph.nodes:
            self._visit(node, rules)

    def _visit(self, node: fx.Node, rules: Callable[[fx.Node], Rule | None]) -> None:
        value = node.meta.get("val")
        if node.op == "output":
            for source in node.all_input_nodes:
                self.freeze(source, "an output of the model")
        elif node.op == "placeholder":
            self.axes[node] = self.fixed(value, "an input of the model")
        elif node.op == "get_attr":
            self.axes[node] = _constant(node, value) if isinstance(value, torch.Tensor) else []
            if str(node.target) in {back.constant for back in self.program.signature.writebacks}:
                self.freeze(node, "the model writes to it")
        elif ops.kind(node) != "assert":
            self.axes[node] = self._found(node, rules(node))

    def _found(self, node: fx.Node, rule: Rule | None) -> Any:
        """What *rule* says of a call; where it says nothing, what the call reads is frozen."""
        value = node.meta.get("val")
        try:
            found = None if rule is None or _is_data_dependent(node) else rule(self, node, _arguments(node))
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
            found = None  # an odd use of the op, which the rule does not know
        if found is not None and _sizes(found) == _sizes(self.fixed(value)):
            return found
        self.sizes.pop(node, None)
        where = source_line(node)
        reason = f"{ops.packet(node) or node.name} cannot be followed" + (f" ({where})" if where else "")
        for source in node.all_input_nodes:
            self.freeze(source, reason)
        for dim in _flat(found or []):
            freeze(dim, reason)
        return self.fixed(value, reason)

    def of(self, node: object) -> Axes:
        """The axes of a tensor; of a number, none."""
        return list(self.axes[node]) if isinstance(node, fx.Node) and self.is_tensor(node) else []

    @staticmethod
    def is_tensor(node: object) -> bool:
        """Whether *node* is one tensor."""
        return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)

    def freeze(self, node: fx.Node, reason: str) -> None:
        """Keep all of the value of *node*."""
        for dim in _flat(self.axes.get(node, [])):
            freeze(dim, reason)

    def resize(self, node: fx.Node, **sizes: Any) -> None:
        """Arguments of *node* that are to follow these sizes."""
        self.sizes.setdefault(node, {}).update(sizes)

    def fixed(self, value: Any, reason: str = "") -> Any:
        """Axes that stay, for a fake value."""
        if isinstance(value, torch.Tensor):
            return [Fixed(hint(n), reason, None if isinstance(n, int) else n.node.expr) for n in value.shape]
        return [self.fixed(part, reason) for part in value] if isinstance(value, (tuple, list)) else []

    def members(self) -> dict[Atom, list[Member]]:
        """For each atom that parameters hold, where."""
        found: dict[Atom, list[Member]] = {}
        for node in self.program.graph.find_nodes(op="get_attr"):
            value = self.program.constants[str(node.target)]
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            for axis, dim in enumerate(self.axes[node]):
                for atom in dict.fromkeys(atoms(dim)):
                    found.setdefault(atom, []).append(Member(str(node.target), axis, dim))
        return found

    def expected(self, node: fx.Node, plan: dict[Atom, torch.Tensor]) -> list[list[int]]:
        """Sizes of the tensors that *node* gives once *plan* is carried out."""
        axes = self.axes.get(node, [])
        several = bool(axes) and isinstance(axes[0], list)
        return [[len(kept(dim, plan)) for dim in one] for one in (axes if several else [axes])]


def hint(size: Any) -> int:
    """A size for the example inputs; for one that depends on values, any that no other size is likely to have."""
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    shapes, symbols = size.node.shape_env, size.node.expr.free_symbols
    return int(size.node.expr.xreplace({s: sympy.Integer(shapes.backed_var_to_val.get(s, _UNKNOWN)) for s in symbols}))


_UNKNOWN = 8191


def _is_data_dependent(node: fx.Node) -> bool:
    """Whether the call gives sizes that depend on values, not on sizes."""
    return bool(_unbacked(node) - {s for source in node.all_input_nodes for s in _unbacked(source)})


def _unbacked(node: fx.Node) -> set[Any]:
    values = pytree.tree_leaves(node.meta.get("val"))
    sizes = [n for v in values for n in (v.shape if isinstance(v, torch.Tensor) else [v])]
    symbols = {s for n in sizes if isinstance(n, torch.SymInt) for s in n.node.expr.free_symbols}
    return {s for s in symbols if free_unbacked_symbols(s)}


def _sizes(axes: Any) -> Any:
    return [_sizes(one) if isinstance(one, list) else one.size for one in axes]


def _constant(node: fx.Node, value: torch.Tensor) -> Axes:
    name = str(node.target)
    return [Atom(n, f"{name}:{i}") if n > 1 else Fixed(n) for i, n in enumerate(map(hint, value.shape))]


def _arguments(node: fx.Node) -> dict[str, Any]:
    return ops.arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}


def _flat(axes: Iterable[Any]) -> Iterator[Dim]:
    for one in axes:
        if isinstance(one, list):
            yield from _flat(one)
        else:
            yield one


def groups_of(members: Sequence[Member]) -> list[str]:
    """Names of the parameters of a group, each once."""
    return list(dict.fromkeys(member.constant for member in members))
