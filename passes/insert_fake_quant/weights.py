"""The weights that ops read, by name."""

from __future__ import annotations

from torch import fx

from fxopt import ops
from fxopt.rewriter import Rewriter

_BY_HAND = ("matmul", "unknown")


def name(node: fx.Node) -> str:
    """Name of the constant that *node* has as its weight; "" where it is computed."""
    if ops.kind(node) in _BY_HAND:
        return next((str(n.target) for n in node.all_input_nodes if n.op == "get_attr"), "")
    weight = ops.arguments(node)["weight"]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""


def is_by_hand(rewriter: Rewriter, node: fx.Node) -> bool:
    """Whether *node* reads a weight without being a linear or conv: a matmul by hand, the experts of a mixture."""
    by_hand = ops.kind(node) in _BY_HAND and ops.namespace(node) != "quantized_decomposed"
    held = [rewriter.tensor(n) for n in node.all_input_nodes] if by_hand else []
    return any(t is not None and t.dim() > 1 and t.is_floating_point() for t in held)
