"""Rules of ops that lay values out anew: shapes, orders, concatenations. See ``rules``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from fxopt import ops
from fxopt.passes.prune_channels.coupling import Axes, Computed, Coupling
from fxopt.passes.prune_channels.dims import (
    Atom,
    Dim,
    Fixed,
    Product,
    Sum,
    atoms,
    exact,
    factors,
    freeze,
    is_dynamic,
    resolve,
)
from fxopt.passes.prune_channels.unification import split_product, split_sum, unify

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


def reshape(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Factors in memory order stay in order: axes are split and merged where the new shape says so."""
    result = laid_out(c.of(node.args[0]), c.fixed(node.meta["val"]))
    return None if result is None or not follow_sizes(c, node, a, result) else result


def laid_out(x: Axes, shape: list[Fixed]) -> Axes | None:
    """The axes of a value with axes *x* in another *shape*; None where no axes of *x* make up those."""
    pending = [factor for factor in factors(Product(tuple(x))) if factor.size != 1]
    if any(dim.size == 0 for dim in shape):
        return None
    result = list[Dim]()
    for dim in shape:
        taken, left = list[Dim](), dim.size
        while left > 1:
            factor = resolve(pending.pop(0))
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
        result.append(Product(tuple(taken)))
    if pending:
        return None
    return _for_any_inputs(result, shape) if any(map(is_dynamic, [*x, *shape])) else result


def _for_any_inputs(found: Axes, shape: list[Fixed]) -> Axes | None:
    """*found*, cut from the axes in their order so that it fits *shape* for the example inputs, if it does for all."""
    result = [_measured(dim, wanted) for dim, wanted in zip(found, shape, strict=True)]
    sizes = [(exact(dim), exact(wanted)) for dim, wanted in zip(result, shape, strict=True)]
    sizes += zip(_runs(found), _runs(result), strict=True)
    return result if all(sympy.cancel(a - b) == 0 for a, b in sizes) else None


def _measured(dim: Dim, wanted: Fixed) -> Dim:
    """*dim*, its one fixed factor as large as it has to be for *wanted* with any inputs."""
    parts = factors(dim)
    fixed = [part for part in parts if isinstance(part, Fixed)]
    if len(fixed) != 1:
        return dim
    others = exact(Product(tuple(part for part in parts if part is not fixed[0])))
    size = sympy.cancel(sympy.sympify(exact(wanted)) / others)
    size = None if size == fixed[0].size else size
    return Product(tuple(Fixed(part.size, part.reason, size) if part is fixed[0] else part for part in parts))


def _runs(dims: Axes) -> list[Any]:
    """What is fixed before, between and after all others: that stays the same in another layout."""
    runs: list[Any] = [1]
    for factor in factors(Product(tuple(dims))):
        if isinstance(factor, Fixed):
            runs[-1] = runs[-1] * exact(factor)
        else:
            runs += [exact(factor), 1]
    return runs


def follow_sizes(c: Coupling, node: fx.Node, a: dict[str, Any], result: Axes) -> bool:
    """Let the sizes that the call is given follow *result*; False where one is computed in a way that cannot."""
    for name in ("size", "shape", "sizes"):
        given = a.get(name)
        if not isinstance(given, (list, tuple)):
            continue
        first = a["dim"] % len(c.of(node.args[0])) if ops.packet(node) == "unflatten" else 0
        sizes = list[Any]()
        for size, dim in zip(given, result[first : first + len(given)], strict=True):
            if isinstance(size, fx.Node) and any(atoms(dim)):
                if any(is_dynamic(part) for part in factors(dim) if not isinstance(part, Fixed)):
                    return False
                sizes.append(Computed(size, dim))
            else:
                sizes.append(dim if isinstance(size, int) and size > 0 else size)
        c.resize(node, **{name: sizes})
    return True


def view_as(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """In the shape of another, whatever that is by then."""
    other = c.of(a["other"])
    result = laid_out(c.of(a["self"]), c.fixed(node.meta["val"]))
    for dim, wanted in zip(result or [], other, strict=True):
        unify(dim, wanted, f"{node.name} views it as something of another structure")
    return result


def squeeze(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Axes of size 1 go. Those that may come to have size 1 do not: the call is then given the dims."""
    x = c.of(node.args[0])
    given = a.get("dim", range(len(x)))
    dims = {d % len(x) for d in ([given] if isinstance(given, int) else given)} if x else set()
    gone = sorted(d for d in dims if x[d].size == 1 and not is_dynamic(x[d]))
    if any(any(atoms(x[d])) for d in dims):
        c.resize(node, squeezed=gone)
    return [dim for d, dim in enumerate(x) if d not in gone]


def expand(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Sizes of 1 are repeated; how often may change."""
    x, shape = c.of(node.args[0]), c.fixed(node.meta["val"])
    x = [Fixed(1)] * (len(shape) - len(x)) + x
    result = list[Dim]()
    for dim, wanted in zip(x, shape, strict=True):
        if dim.size == 1 and wanted.size > 1 and not is_dynamic(dim):
            result.append(_repeated(wanted, node.name))
        else:
            result.append(dim if dim.size == wanted.size else wanted)
    return result if follow_sizes(c, node, a, result) else None


def _repeated(wanted: Fixed, name: str) -> Dim:
    """An axis along which all is the same: any of it can go, but not what depends on the inputs, as in 4·batch."""
    if not is_dynamic(wanted):
        return Atom(wanted.size, name)
    count, rest = sympy.sympify(wanted.exact).as_coeff_Mul()
    if not count.is_Integer or count <= 1 or wanted.size % int(count):
        return wanted
    return Product((Fixed(wanted.size // int(count), wanted.reason, rest), Atom(int(count), name)))


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
    if not any(atoms(x[at])):
        return [[*x[:at], c.fixed(value)[at], *x[at + 1 :]] for value in values]
    sizes = [value.shape[at] for value in values]
    if is_dynamic(x[at]) or not all(isinstance(size, int) for size in sizes):
        return None
    parts = split_sum(x[at], sizes)
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


def unfold(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """im2col: (n, c, h, w) → (n, c·k·k, positions); col2im: back."""
    x, out = c.of(node.args[0]), c.fixed(node.meta["val"])
    if ops.packet(node) == "im2col":
        freeze(Product(tuple(x[-2:])), f"{node.name} slides over it")
        return [*x[:-3], Product((x[-3], Fixed(out[-2].size // x[-3].size))), out[-1]]
    freeze(x[-1], f"{node.name} lays it out in space")
    parts = split_product(x[-2], out[-3].size)
    if parts is None:
        return None
    freeze(parts[1], f"{node.name} lays it out in space")
    return [*x[:-2], parts[0], *out[-2:]]


def windows(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Tensor.unfold: windows along an axis, which become the last one."""
    x, out = c.of(node.args[0]), c.fixed(node.meta["val"])
    at = a["dimension"] % len(x)
    freeze(x[at], f"{node.name} slides over it")
    return [*x[:at], out[at], *x[at + 1 :], out[-1]]


_EACH: dict[Callable[..., Any], str] = {
    reshape: "view reshape flatten unflatten _unsafe_view unsqueeze",
    view_as: "view_as reshape_as",
    squeeze: "squeeze",
    expand: "expand broadcast_to",
    permute: "permute transpose t movedim swapaxes numpy_T mT",
    split: "split split_with_sizes chunk unbind unsafe_chunk unsafe_split tensor_split",
    pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    channel_shuffle: "channel_shuffle native_channel_shuffle",
    unfold: "im2col col2im",
    windows: "unfold",
}
BY_PACKET = {packet: rule for rule, packets in _EACH.items() for packet in packets.split()}
BY_KIND: dict[str, Callable[..., Any]] = {"cat": cat, "getitem": getitem}
