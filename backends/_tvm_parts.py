"""A program cut into parts, some for TVM and some for PyTorch, that run one after another.

    conv ─ relu ─ fft ─ abs ─ conv ─┬─ linear          part 0, TVM      conv, relu, conv_1
      └──────────────── conv_1 ─────┘                  part 1, PyTorch  fft, abs
                                                       part 2, TVM      conv_2, linear

Each node gets a level: that of the latest value it reads, or the next one where that is of the other engine. Even
levels are TVM's, odd ones PyTorch's, and a level is a part. So no two parts wait for each other, and there are as few
as the longest chain of changes between the engines asks for.

A border costs a call and a result in memory, so a part for TVM without a convolution or a matrix product is left to
PyTorch. What crosses the borders of TVM's parts are dense tensors of real numbers. Sizes, and what is computed of
constants alone (an int8 weight made float), cross none: each part that reads them computes them for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import dynamic, ops
from fxopt.program import ORIGIN, Program
from fxopt.signature import Signature


@dataclasses.dataclass(frozen=True)
class Part:
    """Some nodes of a program, which one engine runs at once.

    Attributes:
        whole: the program.
        nodes: of it, in order; sizes and constant expressions are not among them.
        on_torch: whether PyTorch runs it.
        reads: nodes of the whole that it takes as inputs.
        gives: those of its nodes that others read, or that are outputs.
    """

    whole: Program
    nodes: tuple[fx.Node, ...]
    on_torch: bool
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]

    def program(self) -> Program:
        """The part as a program, over the tensors of the whole."""
        graph, values, constants = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Any]()
        for node in self.reads:
            values[node] = graph.placeholder(node.name)
            values[node].meta = dict(node.meta)
        for node in self.all_nodes():
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta[ORIGIN] = node.name
            if node.op == "get_attr":
                constants[str(node.target)] = self.whole.constants[str(node.target)]
        graph.output(tuple(values[node] for node in self.gives))
        signature = Signature(
            pytree.tree_structure((tuple(self.reads), {})),
            pytree.tree_structure(tuple(self.gives)),
            tuple(dynamic.leaf(values[node].name, node.meta.get("val"), None) for node in self.reads),
            tuple(dynamic.leaf(node.name, node.meta.get("val"), None) for node in self.gives),
            ranges=self.whole.signature.ranges,
            dim_names=self.whole.signature.dim_names,
        )
        return Program(graph, constants, signature)

    def products(self) -> int:
        """How many of its nodes are sums of products: what TVM is worth a border for, and what it can tune."""
        return sum(ops.precision(node) == "low" for node in self.nodes)

    def all_nodes(self) -> list[fx.Node]:
        """Its nodes, and all that is computed or held in every part that reads it, in order."""
        inputs = set(self.reads)
        wanted, pending = set[fx.Node](), list(self.nodes)
        while pending:
            node = pending.pop()
            if node not in wanted and node not in inputs:
                wanted.add(node)
                pending += node.all_input_nodes
        return [node for node in self.whole.graph.nodes if node in wanted]


def split(program: Program, declined: Iterable[str], *, small: bool = False) -> tuple[list[Part], dict[str, str]]:
    """*program* in parts, in the order in which they run.

    Args:
        program: what to cut.
        declined: names of the nodes that TVM cannot take.
        small: give TVM the parts as well that are not worth their borders.

    Returns:
        The parts, and for each node that is on PyTorch since what it reads or gives cannot cross a border, why.
    """
    on_torch, strays = set(declined), dict[str, str]()
    while True:
        cut = _Cut(program, on_torch)
        found = cut.strays()
        parts = [] if small else [part for part in cut.parts if not part.on_torch and not part.products()]
        idle = {node.name for part in parts for node in part.nodes}
        if not found and not idle:
            return cut.parts, strays
        strays |= found
        on_torch = on_torch | found.keys() | idle


def part_of(program: Program, names: Iterable[str]) -> Part | None:
    """The nodes of *program* with these *names* as a part for TVM; None where nothing that they give could leave it."""
    chosen, cut = set(names), _Cut(program, set())
    part = cut.part([node for node in cut.order if node.name in chosen], on_torch=False)
    gives = tuple(node for node in part.gives if passes(node))
    return dataclasses.replace(part, gives=gives) if gives else None


def passes(node: fx.Node) -> bool:
    """Whether the value of *node* can be an input or an output of TVM: a dense tensor of real numbers."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_complex()


class _Cut:
    """A program cut in two kinds of parts, given what PyTorch computes.

    Attributes:
        order: the nodes that are in parts, in order.
        parts: in order.
    """

    def __init__(self, program: Program, on_torch: set[str]) -> None:
        self.program = program
        self._on_torch = on_torch
        self._results = set(program.output.all_input_nodes)
        self._state = {back.constant for back in program.signature.writebacks if back.constant is not None}
        self._find_free()
        self._leaders: dict[fx.Node, fx.Node] = {}
        self.order = [n for n in program.graph.nodes if n.op == "call_function" and n not in self._free]
        for node in self.order:
            self._leaders[node] = self._leaders[node.args[0]] if ops.kind(node) == "getitem" else node
        self._on_torch = {self._leaders[node].name for node in self.order if node.name in on_torch}
        self._levels = self._find_levels()
        self.order = [node for node in self.order if node in self._levels]
        numbers = sorted(set(self._levels.values()))
        groups = {number: [node for node in self.order if self._levels[node] == number] for number in numbers}
        self.parts = [self.part(nodes, on_torch=bool(number % 2)) for number, nodes in groups.items()]

    def _find_free(self) -> None:
        """Sizes, and what is computed of constants alone."""
        self._free, fixed = set[fx.Node](), set[fx.Node]()
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and str(node.target) not in self._state:
                fixed.add(node)
            if node.op != "call_function" or node.name in self._on_torch or node in self._results:
                continue
            inputs = node.all_input_nodes
            if ops.is_pure(node) and all(value in fixed for value in inputs):
                fixed.add(node)
                self._free.add(node)
            elif _is_number(node) and all(passes(value) or value in self._free for value in inputs):
                self._free.add(node)

    def _find_levels(self) -> dict[fx.Node, int]:
        """For each node the number of its part. Calls that leave traces, or draw numbers, stay in their order."""
        levels, last = dict[fx.Node, int](), 0
        for node in self.order:
            leader = self._leaders[node]
            if leader is not node:
                levels[node] = levels[leader]
                continue
            before = [levels[value] for value in self.sources(node) if value in levels]
            if ops.kind(node) == "assert":  # kept where it checks what PyTorch computes; TVM's parts check nothing
                if before and all(level % 2 for level in before):
                    levels[node] = max(before)
                continue
            lowest = max([*before, 0] if ops.is_pure(node) else [*before, last])
            levels[node] = lowest + (lowest % 2 != (node.name in self._on_torch))
            last = last if ops.is_pure(node) else levels[node]
        return levels

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of *node*, and for those that every part computes for itself the inputs of these."""
        found, pending = dict[fx.Node, None](), list(node.all_input_nodes)
        while pending:
            value = pending.pop()
            if value in self._free:
                pending += value.all_input_nodes
            elif value.op != "get_attr" or str(value.target) in self._state:
                found[value] = None
        return list(found)

    def part(self, nodes: Sequence[fx.Node], *, on_torch: bool) -> Part:
        """The part of these *nodes*."""
        inside = set(nodes)
        reads = {value for node in nodes for value in self.sources(node)} - inside
        outside = {value for node in self.order if node not in inside for value in self.sources(node)} | self._results
        whole = self.program.graph.nodes
        ordered = tuple(node for node in whole if node in reads)
        return Part(self.program, tuple(nodes), on_torch, ordered, tuple(n for n in nodes if n in outside))

    def strays(self) -> dict[str, str]:
        """Nodes of TVM's parts that read or give what cannot cross their borders, and what that is."""
        found = dict[str, str]()
        for part in self.parts:
            if part.on_torch:
                continue
            stuck = {value for value in part.reads if not passes(value)}
            for node in part.nodes:
                bad = [value for value in self.sources(node) if value in stuck]
                if bad:
                    found[node.name] = f"it reads {_described(bad[0])} that TVM cannot be given"
                elif node in part.gives and not passes(node):
                    found[node.name] = f"it gives {_described(node)} that TVM cannot return"
        return found


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _described(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return "a number" if _is_number(node) else "a value"
    return "complex numbers" if value.is_complex() else "a sparse tensor"
