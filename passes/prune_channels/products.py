"""Rules of matrix products, einsum and attention. See ``rules``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxopt import ops
from fxopt.passes.prune_channels.coupling import Axes, Coupling
from fxopt.passes.prune_channels.dims import Dim, Fixed, freeze
from fxopt.passes.prune_channels.unification import split_product, unify


def broadcast(inputs: Sequence[Axes], name: str) -> Axes:
    """The axes of tensors that are broadcast together, unified."""
    rank = max((len(axes) for axes in inputs), default=0)
    result = list[Dim]()
    for i in range(-rank, 0):
        dims = [axes[i] for axes in inputs if len(axes) >= -i and axes[i].size != 1]
        for dim in dims[1:]:
            unify(dims[0], dim, f"{name} reads it beside something of another structure")
        result.append(dims[0] if dims else Fixed(1))
    return result


def matmul(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """x[..., n, k] · y[..., k, m]; the other axes are broadcast. A vector has no n, or no m."""
    first, second = [n for n in node.args if isinstance(n, fx.Node)][-2:]
    x, y = c.of(first), c.of(second)
    unify(x[-1], y[-2 if len(y) > 1 else 0], f"{node.name}: the axis that is summed")
    result = [*broadcast([x[:-2], y[:-2]], node.name), *x[-2:-1], *(y[-1:] if len(y) > 1 else [])]
    if ops.packet(node) in ("addmm", "baddbmm") and isinstance(node.args[0], fx.Node):
        return broadcast([result, c.of(node.args[0])], node.name)
    return result


def einsum(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Axes with one letter are one; sizes of 1 are broadcast. Dots stand for axes without a letter."""
    left, arrow, right = a["equation"].replace(" ", "").partition("->")
    if not arrow:  # then those that occur once, in alphabetical order
        letters = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(sorted(one for one in letters if letters.count(one) == 1))
    found: dict[Any, list[Dim]] = {}
    ranks = [0]
    for names, operand in zip(left.split(","), a["tensors"], strict=True):
        axes = c.of(operand)
        ranks.append(len(axes) - len(names.replace("...", "")))
        for letter, dim in zip(_letters(names, ranks[-1]), axes, strict=True):
            found.setdefault(letter, []).append(dim)
    shared = {letter: broadcast([[dim] for dim in dims], f"{node.name}: {letter}")[0] for letter, dims in found.items()}
    return [shared[letter] for letter in _letters(right, max(ranks))]


def _letters(names: str, dots: int) -> list[Any]:
    """Letters, and for each axis behind dots its place from the right."""
    before, _, after = names.partition("...")
    return [*before, *(range(-dots, 0) if "..." in names else []), *after]


def attention(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Heads go together, and so do the channels of a head in queries and keys; those of values are another matter."""
    q, k, v = (c.of(a[name]) for name in ("query", "key", "value"))
    unify(q[-1], k[-1], f"{node.name}: channels of queries and keys")
    unify(k[-2], v[-2], f"{node.name}: keys and values")
    batch = broadcast([k[:-2], v[:-2]], node.name)
    if a.get("enable_gqa") and q[-3].size != batch[-1].size:
        shared = split_product(q[-3], batch[-1].size)
        if shared is None:
            return None
        unify(shared[0], batch[-1], f"{node.name}: heads")
        batch = [*batch[:-1], q[-3]]
    batch = broadcast([q[:-2], batch], node.name)
    for dim in (q[-2], k[-2]):
        freeze(dim, f"{node.name} weighs it")
    mask = c.of(a["attn_mask"])
    broadcast([[*batch, q[-2], k[-2]], mask], node.name)
    if a["scale"] is None:
        c.resize(node, scale=q[-1].size ** -0.5)  # stays that of the dense model
    return [*batch, q[-2], v[-1]]


def grouped(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """x[rows, k] · w[expert, k, m], each row with the matrix of one expert, as in a mixture of experts."""
    x, weight = [n for n in node.args if isinstance(n, fx.Node)][:2]
    first, second = c.of(x), c.of(weight)
    if len(first) != 2 or len(second) != 3 or a.get("bias") is not None:
        return None
    unify(first[-1], second[1], f"{node.name}: the axis that is summed")
    for dim in (first[0], second[0]):
        freeze(dim, f"{node.name}: rows are of one expert each")
    return [first[0], second[2]]


BY_PACKET: dict[str, Callable[..., Any]] = {"einsum": einsum}
BY_KIND: dict[str, Callable[..., Any]] = {"matmul": matmul, "attention": attention}
