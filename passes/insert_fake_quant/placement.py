"""Which values become integers, so that whole chains stay integer and nothing is quantized for nobody.

    demand    an int8 kernel reads the value                      (walked from the outputs to the inputs)
    native    an int8 kernel can give the value                   (walked from the inputs to the outputs)

A value in demand is quantized once, where it is made. Where it comes from ops that only move integers (views, pools of
the maximum, concatenation), the demand goes on to their inputs and all of them share one scale, so that no kernel has
to rescale. Where an elementwise op between convolutions has an int8 kernel, it is quantized as well; between linears
it is not, since transformers carry outlier channels there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import fx

from fxopt import ops
from fxopt.passes.insert_fake_quant.scheme import Scheme
from fxopt.program import Program

Refuse = Callable[[fx.Node], str | None]
_CLAMPS = {"relu", "hardtanh"}


@dataclasses.dataclass
class Placement:
    """Where quantize and dequantize go.

    Attributes:
        units: convs and linears that compute in int8, in graph order.
        reads: for each op that computes in int8 or moves integers, the inputs that it reads as integers.
        quantized: values that become integers, each with the value that stands for its group (one scale a group).
        native: values that a kernel gives as integers; every reader of such a value reads them.
        skips: candidates left in float, with the reason.
    """

    units: list[fx.Node] = dataclasses.field(default_factory=list)
    reads: dict[fx.Node, list[fx.Node]] = dataclasses.field(default_factory=dict)
    quantized: dict[fx.Node, fx.Node] = dataclasses.field(default_factory=dict)
    native: set[fx.Node] = dataclasses.field(default_factory=set)
    skips: list[tuple[fx.Node, str]] = dataclasses.field(default_factory=list)

    def sources(self) -> set[fx.Node]:
        """Quantized values whose range decides that of their group: not those that only repeat others."""
        return {node for node in self.quantized if not _repeats(node, self)}


def place(graph: fx.Graph, scheme: Scheme, refuse: Refuse) -> Placement:
    """The placement of *scheme* on *graph*; *refuse* says why a conv or linear must stay in float, or None."""
    placement = Placement()
    nodes = list(graph.nodes)
    for node in nodes:
        if ops.kind(node) in ("conv", "conv_transpose", "linear"):
            reason = refuse(node)
            if reason is None:
                placement.units.append(node)
            else:
                placement.skips.append((node, reason))
    native = _Native(scheme, set(placement.units))
    for node in nodes:
        native.visit(node)
    placement.native = native.found
    _Demand(placement, native).walk(nodes)
    return placement


def role(node: fx.Node) -> str:
    """The word of :class:`Scheme` for what *node* computes; "" for what no scheme has a word for."""
    what, packet = ops.kind(node), ops.packet(node)
    if what == "pool":
        return "max_pool" if packet.startswith("max_pool") else "avg_pool" if "avg" in packet else ""
    if packet == "mean":
        return "avg_pool" if _is_spatial_mean(node) else ""
    if what == "activation":
        name = ops.activation(node)
        return name[0] if name is not None else ""
    return what


def carrier(node: fx.Node) -> fx.Node:
    """The op that makes *node*: the split behind one of its pieces, otherwise the node itself."""
    source = node.all_input_nodes[0] if ops.kind(node) == "getitem" else node
    return source if ops.kind(source) == "select" else node  # any other op of several results is a wall


def _is_spatial_mean(node: fx.Node) -> bool:
    a = ops.arguments(node)
    value = a["self"].meta["val"]
    dims = a.get("dim")
    return isinstance(dims, (list, tuple)) and value.dim() == 4 and {d % 4 for d in dims} == {2, 3}


def float_inputs(node: fx.Node) -> list[fx.Node]:
    """Inputs of *node* that are floating tensors; of a piece of a split, those of the split."""
    node = carrier(node)
    values = [(n, n.meta.get("val")) for n in node.all_input_nodes]
    return [n for n, v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


class _Native:
    """Which values an engine can give as integers, and which of those come from convolutions alone."""

    def __init__(self, scheme: Scheme, units: set[fx.Node]) -> None:
        self.scheme = scheme
        self.units = units
        self.found: set[fx.Node] = set()
        self.image: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        if node in self.units:
            self.found.add(node)
            if ops.kind(node) != "linear":
                self.image.add(node)
            return
        inputs = float_inputs(node)
        if node.op != "call_function" or not inputs or not _is_float(node):
            return
        image = all(n in self.image for n in inputs)
        if self.moves(node):
            native = any(n in self.found for n in inputs)
        else:
            native = image and (role(node) in self.scheme.elementwise or role(node) in _CLAMPS)
        if native:
            self.found.add(node)
        if native and image:
            self.image.add(node)

    def moves(self, node: fx.Node) -> bool:
        """Whether *node* hands integers on as they are."""
        return role(node) in self.scheme.moves and not ops.reads_layout(node) and bool(float_inputs(node))


class _Demand:
    """The walk from outputs to inputs."""

    def __init__(self, placement: Placement, native: _Native) -> None:
        self.placement = placement
        self.native = native
        self.scheme = native.scheme
        self.wanted: set[fx.Node] = set()
        from networkx.utils import UnionFind  # whoever loads an artifact imports this file, and not that library

        self.groups = UnionFind()

    def walk(self, nodes: list[fx.Node]) -> None:
        units = set(self.placement.units)
        for node in reversed(nodes):
            if node in units:
                self._unit(node)
            elif node in self.wanted and node in self.native.found:
                self._pass_on(node)
        first = dict[fx.Node, fx.Node]()  # of each group, in graph order
        for node in nodes:
            if node in self.wanted:
                self.placement.quantized[node] = first.setdefault(self.groups[node], node)

    def _unit(self, node: fx.Node) -> None:
        reads = [node.all_input_nodes[0]]
        if ops.kind(node) not in self.scheme.float_results and not self._is_covered(node):
            self.wanted.add(node)
        if ops.is_fused(node) and node in self.wanted:
            residual = ops.arguments(node)["residual"]
            if isinstance(residual, fx.Node) and residual in self.native.found:
                reads.append(residual)
        self._read(node, reads)

    def _is_covered(self, node: fx.Node) -> bool:
        """Whether a clamp follows that is quantized in place of *node*, which then is not."""
        users = list(node.users)
        return len(users) == 1 and role(users[0]) in _CLAMPS and users[0] in self.wanted

    def _pass_on(self, node: fx.Node) -> None:
        """The demand for *node* as a demand for what it is made from."""
        if role(node) in _CLAMPS:
            [source] = float_inputs(node)
            if len(source.users) == 1 and role(source) not in _CLAMPS and not self.native.moves(source):
                if source not in self.placement.units:
                    self._read(source, float_inputs(source))  # one kernel: add + relu
                return
            self._read(node, [source])
        elif self.native.moves(node):
            inputs = float_inputs(node)
            self._read(node, inputs)
            for source in inputs:
                self.groups.union(node, source)
        else:
            self._read(node, float_inputs(node))

    def _read(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        self.placement.reads[carrier(node)] = list(dict.fromkeys(inputs))
        self.wanted.update(inputs)


def _repeats(node: fx.Node, placement: Placement) -> bool:
    """Whether *node* only hands on integers of its group."""
    group, inputs = placement.quantized[node], placement.reads.get(carrier(node))
    return inputs is not None and all(placement.quantized.get(n) is group for n in inputs)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in value)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def readers(node: fx.Node, placement: Placement) -> Iterator[fx.Node]:
    """Users of *node* that are to read the dequantized value."""
    for user in node.users:
        if node in placement.native or node in placement.reads.get(user, ()):
            yield user


def returned(program: Program, placement: Placement, scheme: Scheme) -> dict[str, fx.Node]:
    """Names of outputs that a kernel gives as integers, each with the value whose range it is then clipped to."""
    found = dict[str, fx.Node]()
    for leaf, value in zip(program.signature.outputs, program.output.args[0], strict=True):  # type: ignore[arg-type]
        while isinstance(value, fx.Node) and value not in placement.quantized and role(value) in scheme.moves:
            sources = float_inputs(value)
            value = sources[0] if len(sources) == 1 else None
        if value in placement.native and value in placement.quantized:
            found[leaf.name] = value
    return found
