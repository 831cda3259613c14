"""Which integers an input may hold, found in the graph and checked at each call.

    embedding(table[512, 64], ids)   →   ids within 0 and 511

Eager raises an error for an index outside of what it reads; an engine counts a negative one from the end, or reads
some value. An index that the model computes itself is not checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from fxopt import ops
from fxopt.backends._onnx_graph import located
from fxopt.errors import InputError
from fxopt.program import Program

# The values go through these as they are, all of them.
_MOVES = {"shape", "permute", "identity", "copy", "cast"}
_ALONG_DIM = set("gather index_select scatter scatter_add scatter_reduce index_add index_copy index_fill".split())


@dataclasses.dataclass(frozen=True)
class Bound:
    """The lowest and the highest integer that an input may hold.

    Attributes:
        reason: the end of the sentence "input 'ids' holds 600, but ...".
    """

    low: int
    high: int
    reason: str

    def check(self, name: str, values: torch.Tensor) -> None:
        """That *values* are within.

        Raises:
            InputError: they are not.
        """
        if values.numel() == 0:
            return
        low, high = (int(extreme) for extreme in torch.aminmax(values))
        if low < self.low or high > self.high:
            raise InputError(f"input {name!r} holds {low if low < self.low else high}, but {self.reason}")

    def within(self, other: Bound | None) -> Bound:
        """The integers that both allow, with the reason of the narrower one."""
        if other is None:
            return self
        reason = self.reason if self.high - self.low <= other.high - other.low else other.reason
        return Bound(max(self.low, other.low), min(self.high, other.high), reason)


def merge(*several: Mapping[int, Bound]) -> dict[int, Bound]:
    """For each input that any of *several* bounds, what all of them allow."""
    merged = dict[int, Bound]()
    for bounds in several:
        for position, bound in bounds.items():
            merged[position] = bound.within(merged.get(position))
    return merged


def index_bounds(program: Program) -> dict[int, Bound]:
    """For each input, by its position among the flat ones, that is an index itself: which ones there are."""
    positions = {node: i for i, node in enumerate(program.placeholders)}
    bounds = dict[int, Bound]()
    for node in program.graph.nodes:
        for index, size, lowest in _reads(node):
            source = _source(index)
            if source in positions and isinstance(size, int):
                bound = Bound(lowest, size - 1, f"{located(node)} takes {lowest} to {size - 1}")
                bounds = merge(bounds, {positions[source]: bound})
    return bounds


def _reads(node: fx.Node) -> Iterator[tuple[fx.Node, int | torch.SymInt, int]]:
    """Each index tensor of *node*, how many places it chooses from, and the lowest index."""
    packet = ops.packet(node)
    if packet not in {"embedding", "index"} | _ALONG_DIM or ops.namespace(node) != "aten":
        return
    a = ops.arguments(node)
    if packet == "embedding":
        yield a["indices"], a["weight"].meta["val"].shape[0], 0
        return
    sizes = a["self"].meta["val"].shape
    if packet in _ALONG_DIM and len(sizes):
        yield a["index"], sizes[a["dim"]], 0
    for size, index in zip(sizes, a.get("indices", ()), strict=False):
        if isinstance(index, fx.Node) and index.meta["val"].dtype in (torch.bool, torch.uint8):
            return  # a mask, which may stand for several dimensions
        if isinstance(index, fx.Node) and isinstance(size, int):
            yield index, size, -size


def _source(node: fx.Node) -> fx.Node:
    """Where the integers of *node* come from unchanged."""
    while node.op == "call_function" and ops.kind(node) in _MOVES:
        source = node.args[0]
        if not isinstance(source, fx.Node) or not is_integer(source):
            break
        node = source
    return node


def is_integer(node: fx.Node) -> bool:
    """Whether *node* is a tensor of integers, booleans not among them."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
        return False
    return not value.dtype.is_floating_point and not value.dtype.is_complex
