"""How each kind of op couples the axes of its inputs, and what axes its result has: convolutions, norms, reductions.

A rule gets the coupling, the node and its arguments by name, and returns the axes of the result, or None where it does
not understand this use of the op. Matrix products are in ``products``, ops that move
values in ``movement`` and ``selection``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxopt import ops
from fxopt.passes.prune_channels import movement, products, selection
from fxopt.passes.prune_channels.coupling import Axes, Coupling, Rule
from fxopt.passes.prune_channels.dims import Dim, Fixed, Product, atoms, freeze
from fxopt.passes.prune_channels.products import broadcast
from fxopt.passes.prune_channels.unification import split_product, split_sum, unify

_POINTWISE = {"add", "mul", "activation", "copy", "identity", "dropout"}
_SUMS = {"sum", "linalg_vector_norm"}  # zeros change nothing
_MIXES = {"mean", "var", "std", "var_mean"}


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for *node*, or None."""
    kind = ops.kind(node)
    if kind == "bits":
        return bits
    if ops.namespace(node) not in ("", "aten", "fxopt"):  # somebody's own op: its name says nothing
        return _OTHERS.get(f"{ops.namespace(node)}::{ops.packet(node)}")
    for rules in (_BY_PACKET, products.BY_PACKET, movement.BY_PACKET, selection.BY_PACKET):
        if ops.packet(node) in rules:
            return rules[ops.packet(node)]
    for rules in (_BY_KIND, products.BY_KIND, movement.BY_KIND, selection.BY_KIND):
        if kind in rules:
            return rules[kind]
    return pointwise if kind in _POINTWISE or ops.is_pointwise(node) else None


def pointwise(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """One element of each input for one of the result: sizes of 1 are broadcast."""
    return broadcast([c.of(n) for n in node.all_input_nodes if c.is_tensor(n)], node.name)


def cast(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """What it is; of another tensor only the dtype matters."""
    return c.of(node.args[0])


def bits(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Other numbers with the same bits; elements of another width are cut or merged."""
    same = node.meta["val"].dtype.itemsize == a["self"].meta["val"].dtype.itemsize
    return c.of(a["self"]) if same else None


def glu(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """One half of an axis gates the other."""
    x = c.of(a["self"])
    at = a["dim"] % len(x)
    halves = split_sum(x[at], [x[at].size // 2] * 2)
    if halves is None:
        return None
    unify(halves[0], halves[1], f"{node.name}: halves")
    return [*x[:at], halves[0], *x[at + 1 :]]


def prelu(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A slope for all, or one by channel."""
    x, weight = c.of(a["self"]), c.of(a["weight"])
    if weight and weight[0].size != 1:
        unify(x[1 if len(x) > 1 else 0], weight[0], f"{node.name}: slopes")
    return x


def conv(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Channels of input and weight, groups, and the filters as the channels of the result."""
    x, w = c.of(node.all_input_nodes[0]), c.of(a["weight"])
    at = len(x) - len(w) + 1  # of the channels: 0 without a batch
    groups = int(a["groups"])
    outside, inside = split_product(w[0], groups), split_product(x[at], groups)
    if outside is None or inside is None:
        return None
    unify(outside[0], inside[0], f"{node.name}: groups")
    unify(inside[1], w[1], f"{node.name}: input channels")
    if groups > 1:
        c.resize(node, groups=outside[0])
    return _finished(c, node, a, _convolved(c, node, a, x, at, w[0]))


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
    x, w = c.of(node.all_input_nodes[0]), c.of(a["weight"])
    unify(x[-1], w[-1], f"{node.name}: inputs")
    if len(w) == 1:
        return x[:-1]
    if a["bias"] is not None:
        unify(w[0], c.of(a["bias"])[0], f"{node.name}: bias")
    return _finished(c, node, a, [*x[:-1], w[0]])


def _finished(c: Coupling, node: fx.Node, a: dict[str, Any], y: Axes) -> Axes:
    """*y* plus what a fused op adds to it; its activation takes each element for itself."""
    return y if a.get("residual") is None else broadcast([y, c.of(a["residual"])], node.name)


def batch_norm(c: Coupling, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Everything it has is by channel, but for statistics that it takes of all positions; so is instance_norm."""
    x = c.of(a["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(a.get(name), fx.Node):
            unify(x[1], c.of(a[name])[0], f"{node.name}: {name}")
    if a.get("training", a.get("use_input_stats")) or not isinstance(a["running_mean"], fx.Node):
        for dim in x[2:] if ops.packet(node) == "instance_norm" else [x[0], *x[2:]]:
            _mix(dim)
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
    for dim in (parts[1], *x[2:]):
        _mix(dim)
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
    if packet == "linalg_vector_norm" and not (isinstance(a["ord"], (int, float)) and a["ord"] >= 0):
        return None
    left = [Fixed(1) if d in over else x[d] for d in range(len(x)) if a.get("keepdim") or d not in over]
    value = node.meta["val"]
    return [list(left) for _ in value] if isinstance(value, (tuple, list)) else left


_OTHERS: dict[str, Callable[..., Any]] = {"transformers::grouped_mm_fallback": products.grouped}
_BY_PACKET: dict[str, Callable[..., Any]] = {
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "instance_norm": batch_norm,
    "linalg_vector_norm": reduce,
    "glu": glu,
    "prelu": prelu,
    "_prelu_kernel": pointwise,
    "expand_as": pointwise,
    "copy": pointwise,
    "where": pointwise,
    "masked_fill": pointwise,
    "rsub": pointwise,
    **dict.fromkeys(
        "true_divide multiply divide subtract negative absolute floor_divide arctan arccos special_expit log_sigmoid "
        "greater greater_equal less less_equal not_equal fill".split(),
        pointwise,
    ),
}
_BY_KIND: dict[str, Callable[..., Any]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "linear": linear,
    "cast": cast,
    "batch_norm": batch_norm,
    "softmax": softmax,
    "embedding": embedding,
    "reduce": reduce,
}
