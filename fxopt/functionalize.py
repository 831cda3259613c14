"""Make an exported graph functional: no op writes to its inputs, what the model mutates becomes an extra output.

    y = relu_(x)           →   y = relu(x), later readers of x read y          (the common case, done here)
    x[:, 0] = 0; buf += 1  →   select_scatter(...), add(buf, 1) as writeback   (the general case, done by AOTAutograd)

The short way is taken only when nothing else can see the mutated memory: the mutated value is a fresh result (not an
input, not a view) and no view of it was taken before. Everything else goes through
``ExportedProgram.run_decompositions({})``, which re-traces the model with torch's own functionalization.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._guards import detect_fake_mode

from fxopt import ops

aten = torch.ops.aten


def functionalize(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An ExportedProgram with a functional graph; *exported* itself is left as it is."""
    mutating = [n for n in exported.graph.nodes if ops.is_mutating(n)]
    if mutating and not all(_is_local(n) for n in mutating):
        functional: torch.export.ExportedProgram = exported.run_decompositions({})
        _restore_batch_norm(functional.graph)
        return functional
    for node in mutating:
        _replace(node)
    return exported


def _is_local(node: fx.Node) -> bool:
    """Whether the in-place op has a functional twin and nothing but later readers of its result sees the write."""
    if _writes_nothing(node):
        return True
    if ops.functional(node.target) is None or not isinstance(node.args[0], fx.Node):  # type: ignore[arg-type]
        return False
    written = node.args[0]
    fresh = ops.is_mutating(written) or (not ops.is_view(written) and ops.is_pure(written))
    if written.op != "call_function" or not fresh or ops.kind(written) == "getitem":
        return False
    earlier = [user for user in written.users if user is not node and user < node]
    return not any(ops.is_view(user) or ops.is_mutating(user) for user in earlier) and _keeps_type(node)


def _keeps_type(node: fx.Node) -> bool:
    """Whether the functional twin gives the dtype and shape of the written tensor (``gt_`` and promotion do not)."""
    twin = ops.functional(node.target)  # type: ignore[arg-type]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = detect_fake_mode(args)
    if twin is None or mode is None:
        return False
    with mode, torch.no_grad():
        value = twin(*args, **kwargs)
    written = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype == written.dtype and value.shape == written.shape


def _writes_nothing(node: fx.Node) -> bool:
    """``detach_`` changes autograd state only, ``dropout_`` nothing at all outside training."""
    name = ops.packet(node)
    return name == "detach_" or (name.endswith("dropout_") and not ops.is_random(node))


def _replace(node: fx.Node) -> None:
    written = node.args[0]
    assert isinstance(written, fx.Node)
    if _writes_nothing(node):
        if ops.packet(node).endswith("dropout_"):  # a graph that is trained next wants it
            node.target = ops.functional(node.target)  # type: ignore[arg-type,assignment]
            return
        node.replace_all_uses_with(written)
        node.graph.erase_node(node)
        return
    node.target = ops.functional(node.target)  # type: ignore[arg-type,assignment]
    for user in list(written.users):
        if node < user:
            user.replace_input_with(written, node)


def _restore_batch_norm(graph: fx.Graph) -> None:
    """``_native_batch_norm_legit_no_training`` → ``batch_norm(training=False)``, the one form that passes know."""
    for node in graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        if any(u.target is not operator.getitem or u.args[1] != 0 for u in node.users):
            continue
        x, weight, bias, mean, var, momentum, eps = node.args
        for item in list(node.users):
            with graph.inserting_before(item):
                args = (x, weight, bias, mean, var, False, momentum, eps, True)
                new = graph.call_function(aten.batch_norm.default, args)
            new.meta = dict(item.meta)
            item.replace_all_uses_with(new)
            graph.erase_node(item)
        graph.erase_node(node)
