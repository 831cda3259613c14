"""Rules of ops that choose, repeat, resample or create values. See ``rules``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.passes.prune_channels.coupling import Axes, Coupling, hint
from fxopt.passes.prune_channels.dims import Atom, Dim, Fixed, Product, Sum, atoms, freeze, is_dynamic
from fxopt.passes.prune_channels.movement import follow_sizes
from fxopt.passes.prune_channels.products import broadcast
from fxopt.passes.prune_channels.unification import split_product, split_sum, unify


def take(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """A slice is a part; any other choice keeps the axis that it chooses from."""
    x, packet = c.of(node.args[0]), ops.packet(node)
    at = a["dim"] % len(x)
    if packet == "slice":
        return _slice(c, node, a, x, at)
    freeze(x[at], f"{node.name} chooses from it")
    if packet == "select":
        return [*x[:at], *x[at + 1 :]]
    return [*x[:at], *c.fixed(node.meta["val"])[at : at + 1], *x[at + 1 :]]


def gather(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Along one axis the index says what to take, along the others each index takes from its own."""
    x, chosen = c.of(a["self"]), c.of(a["index"])
    at = a["dim"] % len(x) if x else 0
    for d, (own, by) in enumerate(zip(x, chosen, strict=True)):
        if d == at:
            freeze(own, f"{node.name} chooses from it")
        else:  # fewer indices than there are values: only the first of these are read
            unify(own, by, f"{node.name} chooses from it")
    return chosen


def scatter(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Written into at some places of one axis, at all of the others."""
    x, src = c.of(a["self"]), c.of(a["src"])
    at = a["dim"] % len(x)
    freeze(x[at], f"{node.name} writes into it")
    if ops.packet(node) == "select_scatter":
        src.insert(at, x[at])
    for own, other in zip([*x[:at], *x[at + 1 :]], [*src[:at], *src[at + 1 :]], strict=True):
        unify(own, other, f"{node.name} writes something of another structure into it")
    freeze(src[at], f"{node.name} writes it somewhere")
    return x


def _slice(c: Coupling, node: fx.Node, a: dict[str, Any], x: Axes, at: int) -> Axes | None:
    out = c.fixed(node.meta["val"])[at]
    whole, size = x[at].size, out.size
    if not any(atoms(x[at])):
        return [*x[:at], out, *x[at + 1 :]]
    start, end = a["start"] or 0, a["end"]
    if not isinstance(start, int) or isinstance(end, fx.Node) or is_dynamic(x[at]):
        freeze(x[at], f"{node.name} cuts it at a place that is computed")
        return [*x[:at], out, *x[at + 1 :]]
    start = min(whole, start + (whole if start < 0 else 0))
    if a["step"] != 1:
        return _every(c, node, a, x, at, max(start, 0))
    if size in (0, whole):
        return [*x[:at], x[at] if size else Fixed(0), *x[at + 1 :]]
    start = max(start, 0)
    parts = split_sum(x[at], [n for n in (start, size, whole - start - size) if n])
    if parts is None:
        freeze(x[at], f"{node.name} cuts across its structure")
        return [*x[:at], out, *x[at + 1 :]]
    part, before = parts[1 if start else 0], parts[0] if start else Fixed(0)
    c.resize(node, start=before, end=Sum((before, part)))
    return [*x[:at], part, *x[at + 1 :]]


def narrow(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """A slice by its start and length."""
    x, at = c.of(node.args[0]), a["dim"] % len(c.of(node.args[0]))
    if not isinstance(a["start"], int) or not isinstance(a["length"], int) or is_dynamic(x[at]):
        return None
    whole, length = x[at].size, a["length"]
    start = a["start"] + (whole if a["start"] < 0 else 0)
    parts = split_sum(x[at], [n for n in (start, length, whole - start - length) if n])
    if parts is None or not length:
        return None
    part, before = parts[1 if start else 0], parts[0] if start else Fixed(0)
    c.resize(node, start=before, length=part)
    return [*x[:at], part, *x[at + 1 :]]


def meshgrid(c: Coupling, node: fx.Node, a: dict[str, Any]) -> list[Axes]:
    """Each vector along an axis of its own, repeated along those of the others."""
    dims = [(c.of(vector) or [Fixed(1)])[0] for vector in a["tensors"]]
    if a.get("indexing") == "xy":
        dims[:2] = dims[1::-1]
    return [list(dims) for _ in dims]


def _every(c: Coupling, node: fx.Node, a: dict[str, Any], x: Axes, at: int, start: int) -> Axes:
    """x[start::step] has one of each *step* neighbours: those go together."""
    out, step = c.fixed(node.meta["val"])[at], a["step"]
    parts = split_product(x[at], out.size) if start < step and out.size * step == x[at].size else None
    if parts is None:
        freeze(x[at], f"{node.name} cuts across its structure")
        return [*x[:at], out, *x[at + 1 :]]
    freeze(parts[1], f"{node.name} chooses from it")
    c.resize(node, start=start, end=x[at])
    return [*x[:at], parts[0], *x[at + 1 :]]


def index(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Index tensors in place of axes, the others whole."""
    x = c.of(a["self"])
    chosen = {i: one for i, one in enumerate(a["indices"]) if one is not None}
    for i in chosen:
        freeze(x[i], f"{node.name} chooses from it")
    if any(one.meta["val"].dtype in (torch.bool, torch.uint8) for one in chosen.values()):
        return None
    by = broadcast([c.of(one) for one in chosen.values()], node.name)
    first, last = min(chosen), max(chosen)
    first = first if last - first == len(chosen) - 1 else 0  # apart from each other: in front
    rest = [dim for i, dim in enumerate(x) if i not in chosen]
    return [*rest[:first], *by, *rest[first:]]


def pool(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Any:
    """Positions are pooled, channels are not."""
    x, count = c.of(node.args[0]), next(int(letter) for letter in ops.packet(node) if letter.isdigit())
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


def sample(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """grid_sampler: batch and channels stay, the grid says where to look."""
    x, grid = c.of(a["input"]), c.of(a["grid"])
    for dim in [x[0], *x[2:], *grid]:
        freeze(dim, f"{node.name} resamples it")
    return [*x[:2], *c.fixed(node.meta["val"])[2:]]


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
    given = list(a["repeats"] if "repeats" in a else a["dims"])
    result = list[Dim]()
    for d, o, n in zip(x, out, [1] * (len(out) - len(given)) + given, strict=True):
        count = n.meta["val"] if isinstance(n, fx.Node) else n
        if isinstance(count, int):
            result.append(Product((Fixed(count), d)))
        elif isinstance(count, torch.SymInt) and not is_dynamic(d):
            result.append(Product((Fixed(hint(count), "", count.node.expr), d)))
        else:
            freeze(d, f"{node.name} repeats it as often as is computed")
            result.append(o)
    return result


def repeat_interleave(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Each index of an axis several times."""
    x = c.of(node.args[0])
    if not isinstance(a.get("repeats"), int) or not isinstance(a.get("dim"), int):
        return None
    at = a["dim"] % len(x)
    result = [*x[:at], Product((x[at], Fixed(a["repeats"]))), *x[at + 1 :]]
    if isinstance(a["output_size"], int):
        c.resize(node, output_size=result[at])
    return result if a["output_size"] is None or isinstance(a["output_size"], int) else None


def triangle(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Rows and columns have their places."""
    x = c.of(node.args[0])
    for dim in x[-2:]:
        freeze(dim, f"{node.name} keeps a triangle")
    return x


def size(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """What is computed from a size is no size of an axis any more."""
    freeze(c.of(a["self"])[a["dim"]], f"{node.name} is computed with")
    return []


def create(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """A tensor of one value has any size."""
    if ops.packet(node).endswith("_like") or ops.packet(node) == "zero":
        return c.of(node.args[0])
    shape = c.fixed(node.meta["val"])
    result: Axes = [Atom(d.size, node.name) if d.size > 1 and not is_dynamic(d) else d for d in shape]
    value = a.get("fill_value")
    if isinstance(value, fx.Node) or not isinstance(a.get("size"), (list, tuple)) or 0 in [d.size for d in shape]:
        return list(shape)
    return result if math.prod(d.size for d in shape) > 1 and follow_sizes(c, node, a, result) else list(shape)


_EACH: dict[Callable[..., Any], str] = {
    take: "slice select index_select",
    narrow: "narrow",
    meshgrid: "meshgrid",
    gather: "gather",
    scatter: "slice_scatter select_scatter",
    index: "index",
    resample: "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d",
    sample: "grid_sampler grid_sampler_2d grid_sampler_3d",
    along: "roll flip cumsum cumprod",
    pool: "max_pool2d_with_indices max_pool3d_with_indices",
    pad: "pad constant_pad_nd",
    repeat: "repeat tile",
    repeat_interleave: "repeat_interleave",
    triangle: "tril triu",
    size: "sym_size",
    create: "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "arange zero",
}
BY_PACKET = {packet: rule for rule, packets in _EACH.items() for packet in packets.split()}
BY_KIND: dict[str, Callable[..., Any]] = {"pool": pool}
