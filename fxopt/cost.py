"""What a graph costs on paper: multiply-accumulates of its convs, linears and matmuls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.program import Program


def macs(program: Program) -> int:
    """Multiply-accumulate operations of one run on the captured sizes (dynamic sizes at their example value)."""
    return sum(node_macs(node) for node in program.graph.nodes if node.op == "call_function")


def node_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one node; 0 for anything but conv, linear, matmul (einsum apart) and attention."""
    what = ops.kind(node)
    if what not in ("conv", "conv_transpose", "linear", "matmul", "attention") or ops.packet(node) == "einsum":
        return 0
    out = _shape(node)
    if what == "attention":
        query, key = _shape(node.args[0]), _shape(node.args[1])
        return 2 * math.prod(query) * key[-2]
    if what == "matmul":
        a = _shape(node.args[1 if ops.packet(node) in ("addmm", "baddbmm") else 0])
        return math.prod(out) * a[-1]
    weight = _shape(node.args[1])
    if what == "conv_transpose":
        return math.prod(_shape(node.args[0])) * math.prod(weight[1:])
    return math.prod(out) * math.prod(weight[1:])


def _shape(node: Any) -> list[int]:
    value = node.meta["val"]
    return [_hint(d) for d in value.shape] if isinstance(value, torch.Tensor) else []


def _hint(dim: Any) -> int:
    return dim if isinstance(dim, int) else int(dim.node.hint or 1)
