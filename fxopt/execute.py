"""Run a program node by node: the reference semantics that passes are verified against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.program import Program

# Op → an equal function that runs faster; filled by the modules that bring such ops.
FASTER: dict[Any, Callable[..., Any]] = {}


def last_users(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the nodes whose value is needed for the last time there."""
    seen: set[fx.Node] = set()
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        result[node] = fresh
    return result


def evaluate(
    program: Program,
    inputs: Sequence[Any],
    *,
    constants: Mapping[str, Any] | None = None,
    observe: Callable[[fx.Node, Any], None] | None = None,
    grad: bool = False,
) -> list[Any]:
    """Flat outputs (writebacks included) of *program* on flat *inputs*.

    Args:
        program: what to run.
        inputs: one value for each placeholder.
        constants: replaces ``program.constants`` where given.
        observe: called with each node and its value.
        grad: record gradients, where *constants* require them.

    Raises:
        RuntimeError: an op failed; the message names the node.
    """
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    held = program.constants if constants is None else constants
    dying = last_users(program.graph)
    with torch.set_grad_enabled(grad):
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                values[node] = held[str(node.target)]
            elif node.op == "output":
                return list(fx.node.map_arg(node.args[0], values.__getitem__))
            else:
                values[node] = _call(node, values)
            if observe is not None:
                observe(node, values[node])
            for dead in dying[node]:
                del values[dead]
    raise RuntimeError("the graph has no output node")


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    assert callable(node.target)
    try:
        return FASTER.get(node.target, node.target)(*args, **kwargs)
    except Exception as error:
        raise RuntimeError(f"{node.name} = {node.target} failed: {error}") from error
