"""A node becomes the ops it is made of: by a formula of ``_onnx_stable``, or where ONNX has no translation for it.

    rms_norm(x, [n], w)   →   x·rsqrt(mean(x²) + eps)·w        from torch's own decompositions, or its composite kernels

The op is traced on the fake values of its inputs, so sizes stay symbolic, and each new node has the source line of
the old one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.backends import _onnx_half, _onnx_stable
from fxopt.errors import PassError
from fxopt.rewriter import Rewriter, fake_mode

if TYPE_CHECKING:
    from torch.onnx._internal.exporter._registration import ONNXRegistry


def decompose(rewriter: Rewriter, node: fx.Node, registry: ONNXRegistry) -> bool:
    """Put the ops that *node* is made of in its place, if it has a formula or no translation.

    Returns:
        Whether what stands there now can be exported. A node whose formula does not apply to it cannot: its own
        translation is what the formula is there to avoid.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return True  # nothing to be made of; what has no translation is found later
    formula = _onnx_stable.FORMULAS.get(node.target) or _onnx_half.FORMULAS.get(node.target)
    registered = registry.is_registered(node.target)
    if formula is None and registered:
        return True
    try:
        body = _traced(rewriter, node, registry, formula)
        if body is None:
            body = None if registered else _traced(rewriter, node, registry, None)
    except Exception:  # noqa: BLE001 - whatever it is, the node is reported as unsupported with its source line
        return False
    if body is None:
        return registered
    if not all(is_translated(inner, registry) for inner in body.graph.nodes):
        return False
    try:
        _inline(rewriter, node, body)
    except PassError:  # the traced values are not quite those of the graph: complex ones are conjugated by a flag
        return False
    return True


def is_translated(node: fx.Node, registry: ONNXRegistry) -> bool:
    """Whether *registry* has a translation for what *node* calls."""
    from torch.onnx._internal.exporter._dispatching import dispatch

    if node.op != "call_function" or node.target is operator.getitem:
        return True
    return dispatch(node, registry)[0] is not None


def _traced(
    rewriter: Rewriter, node: fx.Node, registry: ONNXRegistry, formula: Callable[..., Any] | None
) -> fx.GraphModule | None:
    """*node* as a graph of its inputs, by *formula* or by the op itself; None where the formula leaves it be."""
    from torch.fx.experimental.proxy_tensor import make_fx

    flat, tree = pytree.tree_flatten((node.args, node.kwargs))
    left = False

    def call(*values: Any) -> Any:
        nonlocal left
        feed = iter(values)
        args, kwargs = pytree.tree_unflatten([next(feed) if isinstance(x, fx.Node) else x for x in flat], tree)
        compute = formula or node.target
        assert callable(compute)
        result = compute(*args, **kwargs)
        left = result is NotImplemented
        return () if left else result

    with fake_mode(rewriter.program), torch.no_grad():
        # ONNX tensors have no strides: a decomposition that asks for them is to see plain contiguous ones.
        values = [_contiguous(x.meta["val"]) for x in flat if isinstance(x, fx.Node)]
        body = make_fx(call, decomposition_table=dict(_decompositions(registry)))(*values)
        if any(_mutates(inner) for inner in body.graph.nodes):
            body = make_fx(torch.func.functionalize(body))(*values)
    return None if left else body


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _inline(rewriter: Rewriter, node: fx.Node, body: fx.GraphModule) -> None:
    flat = pytree.tree_leaves((node.args, node.kwargs))
    inputs = [x for x in flat if isinstance(x, fx.Node)]
    made: dict[fx.Node, fx.Node] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for inner in body.graph.nodes:
        if inner.op == "get_attr":
            made[inner] = rewriter.constant(f"{node.name}_{inner.target}", getattr(body, str(inner.target)))
        elif inner.op == "call_function":
            args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), made.__getitem__)
            made[inner] = rewriter.call(inner.target, args, kwargs, before=node)
    _substitute(rewriter, node, fx.node.map_arg(body.graph.output_node().args[0], made.__getitem__))


def _contiguous(value: Any) -> Any:
    same = torch.contiguous_format
    return torch.empty_like(value, memory_format=same) if isinstance(value, torch.Tensor) else value


def _substitute(rewriter: Rewriter, node: fx.Node, result: Any) -> None:
    """Let users of *node* read *result*: a node, or one for each of its outputs."""
    if isinstance(result, fx.Node):
        rewriter.replace(node, result)
        return
    for item in list(node.users):
        rewriter.replace(item, result[item.args[1]])
    rewriter.erase(node)


@functools.lru_cache(maxsize=2)
def _decompositions(registry: ONNXRegistry) -> Mapping[Any, Callable[..., Any]]:
    from torch.onnx._internal.exporter import _decomp

    translated = set(_decomp.get_onnx_implemented_overloads(registry))
    return _decomp.create_onnx_friendly_decomposition_table(translated) | _onnx_stable.FORMULAS | _onnx_half.FORMULAS
