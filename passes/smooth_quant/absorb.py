"""Where a factor for each channel goes for free: into constants of the ops that make the value.

    walk(value)     to its producers, through ops f with f(s·x) = s·f(x), until every path ends in a sink
    sink            a norm's gain, a linear's or conv's rows, a constant of a product or sum: it takes the factor

The factor is followed as an *index*: integers that broadcast to the value, each the channel whose factor applies there,
or −1 where none does (the other pieces of a split). Views and permutations act on the index as on the value. A value
that something else reads as well ends the walk with nothing: nobody but the readers may see the factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from fxopt import ops
from fxopt.rewriter import Rewriter

_HOMOGENEOUS = ("none", "relu", "leaky_relu")
_LARGEST_INDEX = 1 << 22
_SAME = ("identity", "copy", "dropout")  # and activations that are homogeneous


@dataclasses.dataclass
class Sink:
    """*node* gives what the factor is wanted on, and can be told to: *index* broadcasts to its value."""

    node: fx.Node
    index: torch.Tensor


def sinks(rewriter: Rewriter, value: fx.Node, users: set[fx.Node], axis: int) -> list[Sink] | None:
    """Ops that can multiply *value*, which *users* alone may read, by a factor for each channel of *axis*; or None."""
    shape = [1] * value.meta["val"].dim()
    shape[axis] = -1
    found = _find(rewriter, value, torch.arange(value.meta["val"].shape[axis]).reshape(shape), users)
    return found and _merged(found)


def _merged(found: list[Sink]) -> list[Sink]:
    """Each node once: pieces of one split may have led to it by several paths, which share no entry."""
    merged: dict[fx.Node, Sink] = {}
    for sink in found:
        known = merged.get(sink.node)
        index = sink.index if known is None else sink.index.where(known.index < 0, known.index)
        merged[sink.node] = Sink(sink.node, index)
    return list(merged.values())


def scale(rewriter: Rewriter, sink: Sink, factor: torch.Tensor) -> None:
    """Let *sink* multiply what it gives by *factor*, f64[C]."""
    node, spread = sink.node, torch.cat([factor.double(), torch.ones(1, dtype=torch.float64)])[sink.index]
    if node.op == "get_attr":
        for user in list(node.users):
            rewriter.rewire(user, node, _scaled(rewriter, node, spread))
        return
    a = ops.arguments(node)
    for name, factors in _targets(node, spread).items():
        if isinstance(a.get(name), fx.Node):
            rewriter.rewire(node, a[name], _scaled(rewriter, a[name], factors))
        elif name == "weight":  # a norm without a gain
            shape = list(a.get("normalized_shape") or node.meta["val"].shape[1:2])
            gain = factors.expand(shape).to(node.meta["val"].dtype).contiguous()
            ops.set_argument(node, name, rewriter.constant(f"{node.name}_weight", gain))


def _scaled(rewriter: Rewriter, constant: fx.Node, factors: torch.Tensor) -> fx.Node:
    held = rewriter.tensor(constant)
    assert held is not None
    return rewriter.constant(f"{constant.target}_divided", (held.detach().double() * factors).to(held.dtype))


def _targets(node: fx.Node, spread: torch.Tensor) -> dict[str, torch.Tensor]:
    """By what each constant argument of the sink *node* is multiplied, if its value is by *spread*."""
    kind = ops.kind(node)
    if kind in ("linear", "conv"):
        rows = spread.flatten()
        weight = ops.arguments(node)["weight"].meta["val"]
        return {"weight": rows.reshape(-1, *[1] * (weight.dim() - 1)), "bias": rows}
    if "normalized_shape" in ops.arguments(node):
        spread = spread.reshape(spread.shape[-len(ops.arguments(node)["normalized_shape"]) :])
    else:
        spread = spread.flatten()
    return {"weight": spread, "bias": spread}


def _find(rewriter: Rewriter, value: fx.Node, index: torch.Tensor, users: set[fx.Node]) -> list[Sink] | None:
    if set(value.users) != users or not value.meta["val"].is_floating_point():
        return None
    if index.numel() > _LARGEST_INDEX or ops.is_random(value):
        return None
    if value.op == "get_attr":
        held = rewriter.tensor(value)
        fits = held is not None and torch.broadcast_shapes(held.shape, index.shape) == held.shape
        return [Sink(value, index)] if fits else None
    if _is_sink(rewriter, value, index):
        residual = ops.arguments(value).get("residual")
        added = [] if residual is None else _find(rewriter, residual, index, {value})
        return None if added is None else [Sink(value, index), *added]
    paths = _back(value, index)
    if not paths:
        return None
    # of a product one factor is enough; of a sum or concatenation every part
    found = (_find(rewriter, source, at, {_consumer(value)}) for source, at in paths)
    if ops.kind(value) == "mul":
        return next((one for one in found if one is not None), None)
    parts = list(found)
    return None if None in parts else [sink for part in parts if part is not None for sink in part]


def _consumer(value: fx.Node) -> fx.Node:
    """What reads the input that the walk goes on to: the split for one of its pieces."""
    return value.all_input_nodes[0] if ops.kind(value) == "getitem" else value


def _is_sink(rewriter: Rewriter, node: fx.Node, index: torch.Tensor) -> bool:
    kind = ops.kind(node)
    if kind not in ("linear", "conv", "norm", "batch_norm") or not isinstance(node.meta["val"], torch.Tensor):
        return False
    a = ops.arguments(node)
    parameters = [a[name] for name in ("weight", "bias") if isinstance(a.get(name), fx.Node)]
    if any(rewriter.tensor(one) is None or len(one.users) > 1 for one in parameters) or "weight" not in a:
        return False
    varies = [axis for axis, size in enumerate(index.shape) if size > 1]
    rank = index.dim()
    if kind in ("linear", "conv"):
        axis = rank - 1 if kind == "linear" else rank + 1 - a["weight"].meta["val"].dim()
        return a.get("activation", "none") in _HOMOGENEOUS and varies == [axis]
    if "normalized_shape" in a:
        return all(axis >= rank - len(a["normalized_shape"]) for axis in varies)
    return varies == [1] and (bool(parameters) or kind == "norm")


_Paths = list[tuple[fx.Node, torch.Tensor]]


def _back(node: fx.Node, index: torch.Tensor) -> _Paths:
    """Inputs that can take the factor in place of *node*, each with its index: all of them, of a product any."""
    kind, packet = ops.kind(node), ops.packet(node)
    if node.op != "call_function" or not node.all_input_nodes:
        return []
    source = node.all_input_nodes[0]
    activation = ops.activation(node)
    if kind in ("mul", "add", "cat"):
        return _combined(node, index)
    if kind == "attention" or packet in ("matmul", "bmm", "mm"):
        return _product(node, index)
    if kind == "getitem":
        return _piece(source, source.all_input_nodes[0], index, node.args[1]) if _splits(source) else []
    if len(node.all_input_nodes) != 1:
        return []
    if kind == "pool" or packet.startswith("upsample"):
        places = index.shape[-int(packet[-2]) :]  # max_pool1d, upsample_nearest2d
        return [(source, index)] if max(places) == 1 else []
    if kind in _SAME or (activation is not None and activation[0] in _HOMOGENEOUS):
        return [(source, index)]
    if kind == "permute":
        return [(source, _unpermuted(node, index))]
    if kind == "shape":
        return _viewed(node, source, index)
    if packet in ("slice", "select", "narrow"):
        return _piece(node, source, index)
    if packet in ("mean", "sum"):
        return [(source, _unreduced(node, source, index))]
    exact = packet in ("div", "neg") and ops.arguments(node).get("rounding_mode") is None
    return [(source, index)] if exact and node.args[0] is source else []


def _splits(node: fx.Node) -> bool:
    """Whether *node* gives pieces of its one input, each read through a getitem of its own."""
    pieces = [user.args[1] for user in node.users]
    return ops.kind(node) == "select" and len(set(pieces)) == len(pieces) and len(node.all_input_nodes) == 1


def _combined(node: fx.Node, index: torch.Tensor) -> _Paths:
    """The operands of a product, a sum or a concatenation."""
    cat = ops.kind(node) == "cat"
    a = ops.arguments(node)
    operands = list(a["tensors"]) if cat else [a["self"], a["other"]]
    nodes = [one for one in operands if isinstance(one, fx.Node)]
    if len(set(nodes)) < (len(nodes) if ops.kind(node) == "mul" else len(operands)):
        return []  # a number that is added is no part of the factor; x · x has it twice
    if not cat:
        fitted = [(one, _fitted(index, one.meta["val"])) for one in nodes]
        held = [(one, at) for one, at in fitted if at is not None]
        return held if ops.kind(node) == "mul" or len(held) == len(nodes) else []
    axis = int(a["dim"])
    if ops.packet(node) == "stack":
        return []
    if index.shape[axis] == 1:
        return [(one, index) for one in nodes]
    sizes = [one.meta["val"].shape[axis] for one in nodes]
    return list(zip(nodes, index.split(sizes, axis), strict=True)) if index.shape[axis] == sum(sizes) else []


def _fitted(index: torch.Tensor, operand: torch.Tensor) -> torch.Tensor | None:
    """*index* for an operand that broadcasts to its axes; None where one entry would need several factors."""
    extra = index.dim() - operand.dim()
    if max(index.shape[:extra], default=1) > 1:
        return None
    index = index.reshape(index.shape[extra:])
    fits = all(at == 1 or at == size for at, size in zip(index.shape, operand.shape, strict=True))
    return index if fits else None


def _product(node: fx.Node, index: torch.Tensor) -> _Paths:
    """The values of an attention, or the second factor of a matmul."""
    a = ops.arguments(node)
    attention = ops.kind(node) == "attention"
    names = ["query", "key", "value"] if attention else ["self", "other" if "other" in a else "mat2"]
    *others, source = (a[name] for name in names)
    if index.dim() < 2 or index.shape[-2] != 1 or source.meta["val"].dim() != index.dim() or source in others:
        return []
    at = _fitted(index, source.meta["val"])
    return [] if at is None else [(source, at)]


def _unpermuted(node: fx.Node, index: torch.Tensor) -> torch.Tensor:
    """The index before a permutation, whichever op writes it: seen on a tensor whose sizes are all different."""
    before = torch.empty(*range(1, index.dim() + 1), device="meta")
    assert callable(node.target)
    after = node.target(before, *node.args[1:], **node.kwargs)
    return index.permute([list(after.shape).index(size) for size in before.shape])


def _unreduced(node: fx.Node, source: fx.Node, index: torch.Tensor) -> torch.Tensor:
    """The index before a mean or sum over some axes."""
    rank = source.meta["val"].dim()
    dims = ops.arguments(node).get("dim")
    dims = range(rank) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims
    if index.dim() < rank:
        for axis in sorted(d % rank for d in dims):
            index = index.unsqueeze(axis)
    return index


def _viewed(node: fx.Node, source: fx.Node, index: torch.Tensor) -> _Paths:
    """Through a view: axes that are viewed together with one where the factor varies are written out."""
    before, after = list(source.meta["val"].shape), list(node.meta["val"].shape)
    if ops.packet(node) in ("expand", "expand_as"):
        at = _fitted(index, source.meta["val"])
        return [] if at is None else [(source, at)]
    wide, narrow = list[int](), list[int]()
    for old, new in _blocks(before, after):
        varies = any(index.shape[axis] > 1 for axis in new)
        sizes = [after[axis] for axis in new], [before[axis] for axis in old]
        if varies and not all(isinstance(size, int) for part in sizes for size in part):
            return []
        wide += sizes[0] if varies else [1] * len(new)
        narrow += sizes[1] if varies else [1] * len(old)
    spread = index.expand(wide).reshape(narrow)
    for axis in range(spread.dim()):
        first = spread.narrow(axis, 0, 1)
        spread = first if bool((spread == first).all()) else spread
    return [(source, spread)]


def _blocks(before: list[Any], after: list[Any]) -> Iterator[tuple[range, range]]:
    """Runs of axes with the same number of elements before and after a view, as short as can be told."""
    i = j = 0
    while i < len(before) or j < len(after):
        start, p, q = (i, j), 1, 1
        while (i, j) == start or not statically_known_true(p == q):
            if i < len(before) and not statically_known_true(p > q):
                p, i = p * before[i], i + 1
            elif j < len(after):
                q, j = q * after[j], j + 1
            elif i < len(before):
                p, i = p * before[i], i + 1
            else:
                break  # sizes that cannot be compared: one run to the end
        yield range(start[0], i), range(start[1], j)


def _piece(node: fx.Node, source: fx.Node, index: torch.Tensor, piece: Any = None) -> _Paths:
    """Through a slice, or one piece of a split: nothing happens to the rest."""
    a = ops.arguments(node)
    rank = source.meta["val"].dim()
    axis = int(a.get("dim", 0)) % rank
    size = source.meta["val"].shape[axis]
    static = all(not isinstance(n, fx.Node) for n in pytree.tree_leaves((node.args[1:], node.kwargs)))
    if not isinstance(size, int) or not static:
        return []
    positions = torch.arange(size).reshape([-1 if k == axis else 1 for k in range(rank)])
    assert callable(node.target)
    picked = node.target(positions, *node.args[1:], **node.kwargs)
    picked = picked if piece is None else picked[piece]
    part = index if picked.dim() == rank else index.unsqueeze(axis)
    if piece is None and part.shape[axis] == 1:
        return [(source, part)]  # nobody reads the rest
    spread = part.expand([picked.numel() if k == axis else n for k, n in enumerate(part.shape)])
    full = torch.full([size if k == axis else n for k, n in enumerate(part.shape)], -1)
    return [(source, full.index_copy(axis, picked.flatten(), spread))]
