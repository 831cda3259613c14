"""The one table that says what an op is. Passes and backends ask it; none of them lists overloads by hand.

What a schema or an ATen tag already says (mutation, aliasing, randomness, pointwise) is read from there. What it
cannot say stands in the tables below, by ATen packet name, so every overload of a packet is covered:

    kind        what the op computes, in the words a pass thinks in ("conv", "linear", "batch_norm", ...)
    activation  name and parameters of an op that can ride on a conv or linear ("hardtanh", (0.0, 6.0))
    precision   whether the op gains from low precision, must stay in fp32, follows its inputs, or reads their dtypes

An op that is in no table has kind "unknown": a wall that every pass leaves alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

Precision = Literal["low", "full", "follow", "same"]
Activation = tuple[str, tuple[float, ...]]
aten = torch.ops.aten

TRAINED = "fxopt_trained"  # in the meta of a quantize: training has adapted the model to its rounding

_KINDS = {
    "conv": "conv1d conv2d conv3d",
    "conv_transpose": "conv_transpose1d conv_transpose2d conv_transpose3d",
    "linear": "linear",
    "batch_norm": "batch_norm",
    "add": "add",
    "mul": "mul",
    "matmul": "matmul mm bmm addmm baddbmm einsum",
    "attention": "scaled_dot_product_attention",
    "dropout": "dropout feature_dropout alpha_dropout feature_alpha_dropout",
    "identity": "alias detach detach_ lift_fresh lift_fresh_copy",
    "copy": "clone contiguous",
    "cast": "to _to_copy type_as float",
    "shape": "view reshape flatten unflatten _unsafe_view squeeze unsqueeze expand view_as expand_as",
    "permute": "permute transpose t movedim swapaxes numpy_T mT",
    "select": "slice select narrow split split_with_sizes chunk unbind unsafe_chunk index_select gather index",
    "cat": "cat concat stack",
    "pad": "pad constant_pad_nd",
    "pool": "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    "norm": "layer_norm rms_norm group_norm instance_norm native_layer_norm native_group_norm",
    "softmax": "softmax log_softmax _softmax _log_softmax _safe_softmax",
    "reduce": "mean sum amax amin var std var_mean max min argmax argmin prod all any",
    "embedding": "embedding",
    "elementwise": "sub div neg abs sqrt minimum maximum clamp where masked_fill pixel_shuffle pixel_unshuffle "
    "channel_shuffle roll flip repeat repeat_interleave upsample_nearest2d upsample_bilinear2d "
    "upsample_bicubic2d interpolate",
    "assert": "_assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size",
}
_KIND_OF = {packet: kind for kind, packets in _KINDS.items() for packet in packets.split()}

# Kinds whose arithmetic is a big sum of products: they gain from bf16/fp16 inputs and accumulate in fp32 inside.
_LOW = {"conv", "conv_transpose", "linear", "matmul", "attention"}
# Kinds and packets that move or select values, or whose error does not grow in low precision.
_FOLLOW = {"add", "mul", "activation", "identity", "copy", "shape", "permute", "select", "cat", "pad", "pool"}
_FOLLOW_PACKETS = set(
    "neg abs minimum maximum clamp where masked_fill roll flip repeat repeat_interleave pixel_shuffle "
    "pixel_unshuffle channel_shuffle amax amin".split()
)


def _clamp(a: dict[str, Any]) -> Activation | None:
    low, high = a["min"], a["max"]
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return "hardtanh", (float(low), float(high))
    return ("relu", ()) if low == 0 and not isinstance(low, Node) and high is None else None


def _gelu(a: dict[str, Any]) -> Activation:
    return ("gelu", ()) if a["approximate"] == "none" else ("gelu_tanh", ())


def _elu(a: dict[str, Any]) -> Activation | None:
    return ("elu", (float(a["alpha"]),)) if a["scale"] == 1 and a["input_scale"] == 1 else None


# ATen packet → the activation it computes, from its arguments.
_ACTIVATION_OF: dict[str, Callable[[dict[str, Any]], Activation | None]] = {
    "relu": lambda a: ("relu", ()),
    "relu6": lambda a: ("hardtanh", (0.0, 6.0)),
    "hardtanh": lambda a: ("hardtanh", (float(a["min_val"]), float(a["max_val"]))),
    "clamp": _clamp,
    "clamp_min": lambda a: ("relu", ()) if a["min"] == 0 and not isinstance(a["min"], Node) else None,
    "hardswish": lambda a: ("hardswish", ()),
    "hardsigmoid": lambda a: ("hardsigmoid", ()),
    "silu": lambda a: ("silu", ()),
    "gelu": _gelu,
    "sigmoid": lambda a: ("sigmoid", ()),
    "tanh": lambda a: ("tanh", ()),
    "leaky_relu": lambda a: ("leaky_relu", (float(a["negative_slope"]),)),
    "elu": _elu,
    "mish": lambda a: ("mish", ()),
}

# Activation name → how to compute it. The reference semantics of the fused ops.
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "none": lambda x: x,
    "relu": aten.relu.default,
    "hardtanh": aten.hardtanh.default,
    "hardswish": aten.hardswish.default,
    "hardsigmoid": aten.hardsigmoid.default,
    "silu": aten.silu.default,
    "gelu": aten.gelu.default,
    "gelu_tanh": functools.partial(aten.gelu.default, approximate="tanh"),
    "sigmoid": aten.sigmoid.default,
    "tanh": aten.tanh.default,
    "leaky_relu": aten.leaky_relu.default,
    "elu": aten.elu.default,
    "mish": aten.mish.default,
}


def packet(node: Node) -> str:
    """Packet name of the op that *node* calls, without namespace: ``conv2d``; "" for anything but an OpOverload."""
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""


def namespace(node: Node) -> str:
    """Namespace of the op that *node* calls: ``aten``, ``fxopt``...; "" for anything but an OpOverload."""
    return node.target.namespace if isinstance(node.target, torch._ops.OpOverload) else ""


def kind(node: Node) -> str:
    """What *node* computes: a key of the table, "activation", "unknown", or the node's own ``op`` if not a call."""
    if node.op != "call_function":
        return node.op
    name = packet(node)
    if namespace(node) == "fxopt":
        return _FUSED_KINDS.get(name, "unknown")
    if node.target is aten.view.dtype:
        return "bits"
    if namespace(node) != "aten":
        return "getitem" if getattr(node.target, "__name__", "") == "getitem" else "unknown"
    if name in _ACTIVATION_OF and activation(node) is not None:
        return "activation"
    return _KIND_OF.get(name, "unknown" if not is_pointwise(node) else "elementwise")


_FUSED_KINDS = {"conv1d": "conv", "conv2d": "conv", "conv3d": "conv", "linear": "linear"}


def is_fused(node: Node) -> bool:
    """Whether *node* calls one of fxopt's own fused ops."""
    return namespace(node) == "fxopt"


def activation(node: Node) -> Activation | None:
    """Name and parameters of the activation that *node* computes, or None."""
    rule = _ACTIVATION_OF.get(packet(node)) if namespace(node) == "aten" else None
    return rule(arguments(node)) if rule else None


@functools.cache
def _parameters(target: torch._ops.OpOverload) -> tuple[tuple[str, Any, bool], ...]:
    return tuple((a.name, a.default_value, a.kwarg_only) for a in target._schema.arguments)


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of the op call by its schema name, defaults filled in."""
    bound = {}
    for i, (name, default, _) in enumerate(_parameters(node.target)):
        bound[name] = node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
    return bound


def set_argument(node: Node, name: str, value: Any) -> None:
    """Give the op call another value for the argument with this schema name; one that it does not have is let be."""
    for i, (known, _, kwarg_only) in enumerate(_parameters(node.target)):
        if known == name and i < len(node.args) and not kwarg_only:
            node.update_arg(i, value)
        elif known == name:
            node.update_kwarg(name, value)


def is_pointwise(node: Node) -> bool:
    """Whether ATen tags the op as pointwise."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def is_mutating(node: Node) -> bool:
    """Whether the op writes to one of its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


# Ops that return a view of (or the very) first argument although their schema does not say so.
_HIDDEN_ALIASES = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "reshape", "contiguous"}


def is_view(node: Node) -> bool:
    """Whether the result may share memory with an argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function" and kind(node) == "getitem"
    if any(r.alias_info is not None for r in target._schema.returns):
        return True
    return packet(node) in _HIDDEN_ALIASES or kind(node) in {"shape", "permute"}


def lent_out(graph: Graph) -> set[Node]:
    """Nodes whose memory the caller may come to hold: the outputs, and all that they may be views of."""
    held: set[Node] = set()
    for node in reversed(graph.nodes):
        if any(user.op == "output" or (user in held and is_view(user)) for user in node.users):
            held.add(node)
    return held


# Ops that read memory as it lies, not by index.
_READS_LAYOUT = {"as_strided", "as_strided_copy", "as_strided_scatter", "view_as_complex"}


def reads_layout(node: Node) -> bool:
    """Whether the result depends on the strides of the first argument, or the op refuses some of them."""
    return packet(node) in _READS_LAYOUT or (packet(node) == "view" and "dtype" in arguments(node))


def layout_is_read(node: Node) -> bool:
    """Whether a user of *node*, or of a view of it, depends on its strides."""
    return any(reads_layout(user) or (is_view(user) and layout_is_read(user)) for user in node.users)


def is_random(node: Node) -> bool:
    """Whether a second call may give another result."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return packet(node) in {"empty", "new_empty", "empty_like"}
    switches = ("train", "training", "dropout_p")
    flags = [v for k, v in arguments(node).items() if k in switches]
    return not flags or bool(flags[0])


def is_pure(node: Node) -> bool:
    """Whether the call depends on its arguments alone and leaves nothing behind but its result."""
    if getattr(node.target, "__module__", "") in {"_operator", "math"}:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or kind(node) == "assert":
        return False
    return not is_mutating(node) and not is_random(node)


def functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The out-of-place twin of an in-place overload (``relu_`` → ``relu``), or None."""
    space, name = target._schema.name.split("::")
    twin = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    overload = target._schema.overload_name or "default"
    found = getattr(twin, overload, None) if twin is not None else None
    return found if isinstance(found, torch._ops.OpOverload) and not found._schema.is_mutable else None


def precision(node: Node) -> Precision:
    """How the op behaves in low precision; "full" for arithmetic that is not known to be safe.

    "same": what the op computes may depend on the dtypes of its inputs (it reads their bits, takes its own dtype
    from one, or is unknown), so they must be those of capture.
    """
    what = kind(node)
    if what in ("assert", "bits", "unknown") or (what == "cast" and "other" in arguments(node)):
        return "same"
    if what in _LOW:
        return "low"
    return "follow" if what in _FOLLOW or packet(node) in _FOLLOW_PACKETS or what == "getitem" else "full"
