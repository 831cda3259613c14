"""How each kind of op couples the axes of its inputs, and what axes its result has: convolutions, norms, products.

A rule gets the coupling, the node and its arguments by name, and returns the axes of the result, or None where it does
not understand this use of the op. Ops that move values are in ``movement``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fxopt import ops
from fxopt.passes.prune_channels import movement
from fxopt.passes.prune_channels.coupling import Axes, Coupling, Rule
from fxopt.passes.prune_channels.dims import Dim, Fixed, Product, atoms, freeze, split_product, unify

_POINTWISE = {"add", "mul", "activation", "copy", "cast", "identity", "dropout"}
_SUMS = {"sum"}
_MIXES = {"mean", "var", "std", "var_mean", "linalg_vector_norm"}


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for *node*, or None."""
    packet, kind = ops.packet(node), ops.kind(node)
    found = _BY_PACKET.get(packet) or movement.BY_PACKET.get(packet) or _BY_KIND.get(kind) or movement.BY_KIND.get(kind)
    if found is None and (kind in _POINTWISE or ops.is_pointwise(node)):
        return pointwise
    return found


def pointwise(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """One element of each input for one of the result: sizes of 1 are broadcast."""
    return broadcast([c.of(n) for n in node.all_input_nodes if c.is_tensor(n)], node.name)


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


def conv(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Channels of input and weight, groups, and the filters as the channels of the result."""
    x, w = c.of(a["input"]), c.of(a["weight"])
    at = len(x) - len(w) + 1  # of the channels: 0 without a batch
    groups = int(a["groups"])
    outside, inside = split_product(w[0], groups), split_product(x[at], groups)
    if outside is None or inside is None:
        return None
    unify(outside[0], inside[0], f"{node.name}: groups")
    unify(inside[1], w[1], f"{node.name}: input channels")
    if groups > 1:
        c.resize(node, groups=outside[0])
    return _convolved(c, node, a, x, at, w[0])


def conv_transpose(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """As a convolution, with the weight's first two axes exchanged."""
    x, w = c.of(a["input"]), c.of(a["weight"])
    at = len(x) - len(w) + 1
    inside = split_product(w[0], int(a["groups"]))
    if inside is None:
        return None
    unify(w[0], x[at], f"{node.name}: input channels")
    if a["groups"] > 1:
        c.resize(node, groups=inside[0])
    return _convolved(c, node, a, x, at, Product((inside[0], w[1])))


def _convolved(c: Coupling, node: fx.Node, a: dict[str, Any], x: Axes, at: int, out: Dim) -> Axes:
    if a["bias"] is not None:
        unify(out, c.of(a["bias"])[0], f"{node.name}: bias")
    for dim in x[at + 1 :]:
        freeze(dim, f"{node.name} slides over it")
    for dim in c.of(a["weight"])[2:]:
        freeze(dim, "the kernel of a convolution")
    return [*x[:at], out, *c.fixed(node.meta["val"])[at + 1 :]]


def linear(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """y[..., o] = x[..., i] · w[o, i]."""
    x, w = c.of(a["input"]), c.of(a["weight"])
    unify(x[-1], w[-1], f"{node.name}: inputs")
    if len(w) == 1:
        return x[:-1]
    if a["bias"] is not None:
        unify(w[0], c.of(a["bias"])[0], f"{node.name}: bias")
    return [*x[:-1], w[0]]


def batch_norm(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Everything it has is by channel; so is instance_norm."""
    x = c.of(a["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(a.get(name), fx.Node):
            unify(x[1], c.of(a[name])[0], f"{node.name}: {name}")
    return x


def layer_norm(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Statistics over the last axes: what goes there changes the rest."""
    x, count = c.of(a["input"]), len(a["normalized_shape"])
    for dim in x[-count:]:
        _mix(dim)
    for name in ("weight", "bias"):
        if isinstance(a.get(name), fx.Node):
            for dim, other in zip(x[-count:], c.of(a[name]), strict=True):
                unify(dim, other, f"{node.name}: {name}")
    c.resize(node, normalized_shape=x[-count:])
    return x


def group_norm(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Statistics over the channels of a group; a group as a whole can go."""
    x = c.of(a["input"])
    for name in ("weight", "bias"):
        if isinstance(a.get(name), fx.Node):
            unify(x[1], c.of(a[name])[0], f"{node.name}: {name}")
    parts = split_product(x[1], int(a["num_groups"]))
    if parts is None:
        return None
    _mix(parts[1])
    c.resize(node, num_groups=parts[0])
    return x


def _mix(dim: Dim) -> None:
    for atom in atoms(dim):
        atom.mixed = True


def softmax(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """What it goes over stays."""
    x = c.of(a["self"])
    freeze(x[a["dim"]], f"{node.name} is a distribution over it")
    return x


def matmul(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """x[..., n, k] · y[..., k, m]; the other axes are broadcast."""
    first, second = [n for n in node.args if isinstance(n, fx.Node)][-2:]
    x, y = c.of(first), c.of(second)
    if len(x) < 2 or len(y) < 2:
        return None
    unify(x[-1], y[-2], f"{node.name}: the axis that is summed")
    result = [*broadcast([x[:-2], y[:-2]], node.name), x[-2], y[-1]]
    if ops.packet(node) in ("addmm", "baddbmm") and isinstance(node.args[0], fx.Node):
        return broadcast([result, c.of(node.args[0])], node.name)
    return result


def einsum(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Axes with one letter are one."""
    text = a["equation"].replace(" ", "")
    left, _, right = text.partition("->")
    if "." in text or "->" not in text:
        return None
    letters: dict[str, Dim] = {}
    for names, operand in zip(left.split(","), a["tensors"], strict=True):
        for letter, dim in zip(names, c.of(operand), strict=True):
            unify(letters.setdefault(letter, dim), dim, f"{node.name}: axis {letter}")
    return [letters[letter] for letter in right]


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


def embedding(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Any row may be looked up."""
    rows, channels = c.of(a["weight"])
    freeze(rows, "rows of an embedding")
    return [*c.of(a["indices"]), channels]


def reduce(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Any:
    """A sum forgets what goes; a mean over channels changes; of anything else the axis stays."""
    if isinstance(a.get("other"), fx.Node):  # max and min of two tensors
        return pointwise(c, node, a)
    x, packet = c.of(a["self"]), ops.packet(node)
    given = a.get("dim")
    dims = range(len(x)) if given is None or given == [] else [given] if isinstance(given, int) else given
    over = {d % len(x) for d in dims} if x else set()
    for d in over:
        if packet in _MIXES:
            _mix(x[d])
        elif packet not in _SUMS:
            freeze(x[d], f"{node.name} reads all of it")
    left = [Fixed(1) if d in over else x[d] for d in range(len(x)) if a.get("keepdim") or d not in over]
    value = node.meta["val"]
    return [list(left) for _ in value] if isinstance(value, (tuple, list)) else left


_BY_PACKET: dict[str, Callable[..., Any]] = {
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "instance_norm": batch_norm,
    "einsum": einsum,
    "linalg_vector_norm": reduce,
}
_BY_KIND: dict[str, Callable[..., Any]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "linear": linear,
    "batch_norm": batch_norm,
    "softmax": softmax,
    "matmul": matmul,
    "attention": attention,
    "embedding": embedding,
    "reduce": reduce,
}
