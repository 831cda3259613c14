"""Attention in plain ops, where the exporter's translation is not what eager computes, or there is none.

    softmax(q·kᵀ·scale + mask)·v

The exporter takes tensors of rank 4. It gives a query from which the mask hides every key NaN, or with a bool mask the
mean of all values; in eager that is zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.rewriter import Rewriter

aten = torch.ops.aten


def write(rewriter: Rewriter, node: fx.Node) -> None:
    """Put plain ops in the place of *node*, a ``scaled_dot_product_attention``, unless the exporter can take it.

    A constant mask that leaves each query a key is left to the exporter.
    """
    if ops.arguments(node)["enable_gqa"]:
        _share_heads(rewriter, node)
    a = ops.arguments(node)
    mask, query = a["attn_mask"], a["query"]
    if query.meta["val"].dim() == 4 and not _may_hide_every_key(rewriter, mask):
        return

    def call(target: Any, *args: Any) -> fx.Node:
        return rewriter.call(target, args, before=node)

    scale = a["scale"] if a["scale"] is not None else float(query.meta["val"].shape[-1]) ** -0.5
    scores = call(aten.matmul.default, call(aten.mul.Scalar, query, scale), call(aten.transpose.int, a["key"], -2, -1))
    hidden = None
    if a["is_causal"]:
        rows, columns = (call(aten.arange.default, _size(rewriter, node, scores, axis)) for axis in (-2, -1))
        hidden = call(aten.gt.Tensor, columns, call(aten.unsqueeze.default, rows, -1))
    elif mask is not None and mask.meta["val"].dtype is torch.bool:
        hidden = call(aten.logical_not.default, mask)
    elif mask is not None:
        scores = call(aten.add.Tensor, scores, mask)
    if hidden is not None:
        scores = call(aten.masked_fill.Scalar, scores, hidden, float("-inf"))
    elif mask is not None:
        hidden = call(aten.eq.Scalar, mask, float("-inf"))
    weights = call(aten.softmax.int, scores, -1)
    if hidden is not None and mask is not None:
        none = call(aten.logical_not.default, call(aten.any.dim, call(aten.logical_not.default, hidden), -1, True))
        weights = call(aten.masked_fill.Scalar, weights, none, 0.0)
    rewriter.replace(node, call(aten.matmul.default, weights, a["value"]))


def _may_hide_every_key(rewriter: Rewriter, mask: Any) -> bool:
    if not isinstance(mask, fx.Node):
        return False
    held = rewriter.tensor(mask)
    return held is None or not bool((held if held.dtype is torch.bool else held > float("-inf")).any(-1).all())


def _size(rewriter: Rewriter, node: fx.Node, x: fx.Node, axis: int) -> Any:
    """As a number, or as a node where it is dynamic."""
    size, rank = x.meta["val"].shape[axis], x.meta["val"].dim()
    return size if isinstance(size, int) else rewriter.call(aten.sym_size.int, (x, axis % rank), before=node)


def _share_heads(rewriter: Rewriter, node: fx.Node) -> None:
    """Repeat heads of keys and values that several heads of queries share.

    The exporter's translation has a scalar for the axes of its Unsqueeze, which are a vector in ONNX.
    """
    a = ops.arguments(node)
    query, key, value = a["query"], a["key"], a["value"]
    shared = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
    if shared > 1:
        repeat = aten.repeat_interleave.self_int
        key, value = (rewriter.call(repeat, (x, shared, -3), before=node) for x in (key, value))
    node.args = (query, key, value, a["attn_mask"], a["dropout_p"], a["is_causal"])
    node.kwargs = {"scale": a["scale"]}
