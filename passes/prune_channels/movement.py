"""Rules of ops that compute nothing: they move, repeat or choose values. See ``rules``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.passes.prune_channels.coupling import Axes, Coupling, hint
from fxopt.passes.prune_channels.dims import (
    Atom,
    Dim,
    Fixed,
    Product,
    Sum,
    factors,
    freeze,
    resolve,
    split_product,
    split_sum,
    unify,
)

aten = torch.ops.aten
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


def reshape(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Factors in memory order stay in order: axes are split and merged where the new shape says so."""
    pending = [factor for factor in factors(Product(tuple(c.of(node.args[0])))) if factor.size != 1]
    shape = [hint(size) for size in node.meta["val"].shape]
    if 0 in shape:
        return None
    symbolic = any(not isinstance(size, int) for size in node.meta["val"].shape)
    result = list[Dim]()
    for size in shape:
        taken, left = list[Dim](), size
        while left > 1:
            factor = resolve(pending.pop(0))
            if factor.size > left and not isinstance(factor, Fixed) and symbolic:
                return None  # where it is cut depends on a size that may change
            if factor.size > left:
                parts = split_product(factor, left)
                if parts is None:
                    return None
                factor = parts[0]
                pending.insert(0, parts[1])
            if left % factor.size:
                return None
            taken.append(factor)
            left //= factor.size
        result.append(Product(tuple(taken)) if taken else Fixed(1))
    _resize_shape(c, node, a, result)
    return result


def _resize_shape(c: Coupling, node: fx.Node, a: dict[str, Any], result: Axes) -> None:
    for name in ("size", "shape", "sizes"):
        given = a.get(name)
        if not isinstance(given, (list, tuple)):
            continue
        first = a["dim"] % len(c.of(node.args[0])) if ops.packet(node) == "unflatten" else 0
        dims = result[first : first + len(given)]
        kept = (isinstance(size, int) and size > 0 for size in given)
        c.resize(node, **{name: [dim if own else size for own, dim, size in zip(kept, dims, given, strict=True)]})


def expand(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Sizes of 1 are repeated; how often may change."""
    x, shape = c.of(node.args[0]), [hint(size) for size in node.meta["val"].shape]
    x = [Fixed(1)] * (len(shape) - len(x)) + x
    sizes = node.meta["val"].shape
    result = [
        Atom(n, node.name) if dim.size == 1 and n > 1 and isinstance(size, int) else Fixed(n) if dim.size != n else dim
        for dim, n, size in zip(x, shape, sizes, strict=True)
    ]
    _resize_shape(c, node, a, result)
    return result


def permute(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """The order is read off what the op does with axes of different sizes."""
    x = c.of(node.args[0])
    assert callable(node.target)
    moved = node.target(torch.empty(_PRIMES[: len(x)], device="meta"), *node.args[1:], **node.kwargs)
    return [x[_PRIMES.index(size)] for size in moved.shape]


def cat(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """One after the other along an axis; the others are shared. A stack makes an axis of its own."""
    inputs = [c.of(x) for x in a["tensors"]]
    inputs = [x for x in inputs if len(x) == max(map(len, inputs))]  # torch lets empty vectors pass
    stack = ops.packet(node) == "stack"
    at = a["dim"] % (len(inputs[0]) + stack)
    result = list[Dim]()
    for d in range(len(inputs[0])):
        if d == at and not stack:
            result.append(Sum(tuple(x[d] for x in inputs)))
            continue
        for other in inputs[1:]:
            unify(inputs[0][d], other[d], f"{node.name} lines it up with something of another structure")
        result.append(inputs[0][d])
    return [*result[:at], Fixed(len(inputs)), *result[at:]] if stack else result


def split(c: Coupling, node: fx.Node, a: dict[str, Any]) -> list[Axes] | None:
    """Parts of an axis."""
    x, values = c.of(node.args[0]), node.meta["val"]
    at = a["dim"] % len(x)
    if ops.packet(node) == "unbind":
        freeze(x[at], f"{node.name} takes it apart")
        return [[*x[:at], *x[at + 1 :]] for _ in values]
    parts = split_sum(x[at], [hint(value.shape[at]) for value in values])
    if parts is None:
        return None
    c.resize(node, split_sizes=parts)
    return [[*x[:at], part, *x[at + 1 :]] for part in parts]


def getitem(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """One of several results."""
    source, index = node.args
    found = c.axes.get(source)  # type: ignore[arg-type]
    if not isinstance(index, int) or not found or not isinstance(found[0], list):
        return None
    return list(found[index])


def take(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """A slice is a part; any other choice keeps the axis that it chooses from."""
    x, packet = c.of(node.args[0]), ops.packet(node)
    at = a["dim"] % len(x)
    if packet == "slice" and a["step"] == 1:
        return _slice(c, node, a, x, at)
    freeze(x[at], f"{node.name} chooses from it")
    if packet == "select":
        return [*x[:at], *x[at + 1 :]]
    if packet == "gather":
        for dim in [*x, *c.of(a["index"])]:
            freeze(dim, f"{node.name} chooses from it")
        return list(c.fixed(node.meta["val"]))
    return [*x[:at], *c.fixed(node.meta["val"])[at : at + 1], *x[at + 1 :]]


def _slice(c: Coupling, node: fx.Node, a: dict[str, Any], x: Axes, at: int) -> Axes | None:
    whole, size = x[at].size, hint(node.meta["val"].shape[at])
    if size == whole and isinstance(node.meta["val"].shape[at], int):
        return x
    if size == 0:
        return [*x[:at], Fixed(0), *x[at + 1 :]]
    given = a["start"]
    if not (given is None or isinstance(given, int)) or not isinstance(node.meta["val"].shape[at], int):
        freeze(x[at], f"{node.name} cuts it at a place that is computed")
        return [*x[:at], Fixed(size), *x[at + 1 :]]
    start = min(whole, (given or 0) + (whole if (given or 0) < 0 else 0))
    sizes = [n for n in (start, size, whole - start - size) if n]
    parts = split_sum(x[at], sizes)
    if parts is None:
        freeze(x[at], f"{node.name} cuts across its structure")
        return [*x[:at], Fixed(size), *x[at + 1 :]]
    part = parts[1 if start else 0]
    if not isinstance(resolve(x[at]), Fixed):
        before = parts[0] if start else Fixed(0)
        c.resize(node, start=before, end=Sum((before, part)))
    return [*x[:at], part, *x[at + 1 :]]


def index(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """One index tensor in place of an axis, the others whole."""
    x, chosen = c.of(a["self"]), [(i, one) for i, one in enumerate(a["indices"]) if one is not None]
    for i, _ in chosen:
        freeze(x[i], f"{node.name} chooses from it")
    if len(chosen) != 1 or not c.is_tensor(chosen[0][1]) or chosen[0][1].meta["val"].dtype is torch.bool:
        return None
    at, by = chosen[0]
    return [*x[:at], *c.of(by), *x[at + 1 :]]


def pool(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Any:
    """Positions are pooled, channels are not."""
    x, count = c.of(node.args[0]), int(ops.packet(node)[-2])
    freeze(Product(tuple(x[-count:])), f"{node.name} pools it")
    value = node.meta["val"]
    one = value[0] if isinstance(value, (tuple, list)) else value
    result = [*x[:-count], *c.fixed(one)[-count:]]
    return [list(result) for _ in value] if isinstance(value, (tuple, list)) else result


def resample(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Batch and channels stay."""
    x = c.of(node.args[0])
    freeze(Product(tuple(x[2:])), f"{node.name} resamples it")
    return [*x[:2], *c.fixed(node.meta["val"])[2:]]


def pixel_shuffle(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """(c·r·r, h, w) → (c, h·r, w·r), or back."""
    x, out = c.of(node.args[0]), c.fixed(node.meta["val"])
    freeze(Product(tuple(x[-2:])), f"{node.name} lays it out anew")
    if ops.packet(node) == "pixel_unshuffle":
        return [*x[:-3], Product((x[-3], Fixed(out[-3].size // x[-3].size))), *out[-2:]]
    parts = split_product(x[-3], out[-3].size)
    if parts is None:
        return None
    freeze(parts[1], f"{node.name} lays it out in space")
    return [*x[:-3], parts[0], *out[-2:]]


def channel_shuffle(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """g·c → c·g."""
    x = c.of(node.args[0])
    parts = split_product(x[1], int(a["groups"]))
    if parts is None:
        return None
    c.resize(node, groups=parts[0])
    return [x[0], Product((parts[1], parts[0])), *x[2:]]


def along(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """What is done along some axes needs all of these: flip, roll, cumsum."""
    x = c.of(node.args[0])
    given = a.get("dims", a.get("dim"))
    dims = [given] if isinstance(given, int) else given or range(len(x))
    for d in dims:
        freeze(x[d], f"{node.name} goes along it")
    return x


def pad(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Axes that get a border stay."""
    x, out = c.of(node.args[0]), c.fixed(node.meta["val"])
    border = {len(x) - 1 - i // 2 for i, size in enumerate(a["pad"]) if not isinstance(size, int) or size}
    for d in border:
        freeze(x[d], f"{node.name} puts a border around it")
    return [out[d] if d in border else x[d] for d in range(len(x))]


def repeat(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """All of an axis several times."""
    out = c.fixed(node.meta["val"])
    x = [Fixed(1)] * (len(out) - len(c.of(node.args[0]))) + c.of(node.args[0])
    return [Product((Fixed(o.size // d.size), d)) for d, o in zip(x, out, strict=True)]


def repeat_interleave(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Each index of an axis several times."""
    x = c.of(node.args[0])
    if not isinstance(a.get("repeats"), int) or not isinstance(a.get("dim"), int):
        return None
    return [Product((d, Fixed(a["repeats"]))) if i == a["dim"] % len(x) else d for i, d in enumerate(x)]


def triangle(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Rows and columns have their places."""
    x = c.of(node.args[0])
    for dim in x[-2:]:
        freeze(dim, f"{node.name} keeps a triangle")
    return x


def create(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """A tensor of one value has any size."""
    if node.all_input_nodes and any(c.is_tensor(n) for n in node.all_input_nodes):
        like = node.args[0]
        return c.of(like) if ops.packet(node).endswith("_like") else None
    result: Axes = [
        Atom(size, node.name) if isinstance(size, int) and size > 1 else Fixed(hint(size))
        for size in node.meta["val"].shape
    ]
    if isinstance(a.get("size"), (list, tuple)) and math.prod(dim.size for dim in result) > 1:
        _resize_shape(c, node, a, result)
        return result
    return list(c.fixed(node.meta["val"]))


_SHAPES = "view reshape flatten unflatten _unsafe_view squeeze unsqueeze"
_EACH: dict[Callable[..., Any], str] = {
    reshape: _SHAPES,
    expand: "expand",
    permute: "permute transpose t movedim swapaxes numpy_T mT",
    split: "split split_with_sizes chunk unbind unsafe_chunk",
    take: "slice select index_select gather",
    index: "index",
    resample: "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_nearest1d upsample_linear1d",
    pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    channel_shuffle: "channel_shuffle native_channel_shuffle",
    along: "roll flip cumsum cumprod",
    pad: "pad constant_pad_nd",
    repeat: "repeat",
    repeat_interleave: "repeat_interleave",
    triangle: "tril triu",
    create: "zeros ones full zeros_like ones_like full_like empty_like arange",
}
BY_PACKET = {packet: rule for rule, packets in _EACH.items() for packet in packets.split()}
BY_KIND: dict[str, Callable[..., Any]] = {"cat": cat, "pool": pool, "getitem": getitem}
