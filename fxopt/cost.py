"""What a graph costs on paper: multiply-accumulates of its convs, linears and matmuls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from fxopt import ops
from fxopt.program import Program

Shape: TypeAlias = Callable[[Any], list[int]]


def shape_of(node: Any) -> list[int]:
    """Sizes of the tensor that *node* gives, dynamic ones at their example value; [] for anything else."""
    value = node.meta["val"]
    return [_hint(d) for d in value.shape] if isinstance(value, torch.Tensor) else []


def macs(program: Program, shape: Shape = shape_of) -> int:
    """Multiply-accumulate operations of one run on the captured sizes, or on those that *shape* gives for each node."""
    return sum(node_macs(node, shape) for node in program.graph.nodes if node.op == "call_function")


def node_macs(node: fx.Node, shape: Shape = shape_of) -> int:
    """Multiply-accumulates of one node; 0 for anything but conv, linear, matmul (einsum apart) and attention."""
    what = ops.kind(node)
    if what not in ("conv", "conv_transpose", "linear", "matmul", "attention") or ops.packet(node) == "einsum":
        return 0
    out = shape(node)
    if what == "attention":
        query, key = shape(node.args[0]), shape(node.args[1])
        return 2 * math.prod(query) * key[-2]
    if what == "matmul":
        a = shape(node.args[1 if ops.packet(node) in ("addmm", "baddbmm") else 0])
        return math.prod(out) * a[-1]
    weight = shape(node.args[1])
    if what == "conv_transpose":
        return math.prod(shape(node.args[0])) * math.prod(weight[1:])
    return math.prod(out) * math.prod(weight[1:])


def _hint(dim: Any) -> int:
    return dim if isinstance(dim, int) else int(dim.node.hint or 1)
