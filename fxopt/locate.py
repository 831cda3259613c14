"""Where two computations part: the first node whose value is another one, for messages about failed checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import verify
from fxopt.backend import Executable
from fxopt.execute import evaluate
from fxopt.program import Program, source_line

_PATIENCE = 30.0  # seconds


def first_change(before: Program, after: Program, inputs: Sequence[Any]) -> str:
    """The first node of *after* whose value is another than that of the node of its name in *before*, in words.

    "" where no node that both have differs. Nodes that a pass made are named as what it reads.
    """
    known: dict[str, Any] = {}
    parted: list[fx.Node] = []

    def remember(node: fx.Node, value: Any) -> None:
        if node.op == "call_function":
            known[node.name] = value

    def compare(node: fx.Node, value: Any) -> None:
        if not parted and node.name in known and not verify.compare(_flat(known[node.name]), _flat(value)).within:
            parted.append(node)

    try:
        evaluate(before, inputs, observe=remember)
        evaluate(after, inputs, observe=compare)
    except (RuntimeError, ValueError):  # they have no value to compare
        return ""
    if not parted:
        return ""
    new = [one.name for one in parted[0].all_input_nodes if one.op == "call_function" and one.name not in known]
    return _place(parted[0]) + (f", which reads {', '.join(new)}, made by this pass" if new else "")


def first_stray(
    program: Program, lower: Callable[[Program], Executable], inputs: Sequence[Any], tolerance: float
) -> str:
    """The first node of *program* that an engine computes otherwise, in words; found by halving, "" where none is.

    Args:
        program: with all its constants.
        lower: makes an executable of a program, which it may consume.
        inputs: flat example inputs.
        tolerance: relative to the range of a value.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and _is_float(node)]
    low, high, end = 0, len(nodes) - 1, time.monotonic() + _PATIENCE
    found = None
    while low <= high and time.monotonic() < end:
        middle = (low + high) // 2
        if _strays(program, nodes[middle].name, lower, inputs, tolerance):
            found, high = nodes[middle], middle - 1
        else:
            low = middle + 1
    return _place(found) if found is not None else ""


def _strays(
    program: Program, name: str, lower: Callable[[Program], Executable], inputs: Sequence[Any], tolerance: float
) -> bool:
    """Whether the engine gives another value for the node *name*, where the graph ends there."""
    cut = program.copy()
    node = next(node for node in cut.graph.nodes if node.name == name)
    cut.output.args = ((node,),)
    cut.signature = _ending(program, node)
    cut.remove_dead()
    expected = evaluate(cut, inputs)
    try:
        return verify.compare(expected, lower(cut)(list(inputs))).error > tolerance
    except Exception:  # noqa: BLE001 - an engine may refuse a part of what it takes as a whole
        return False


def _ending(program: Program, node: fx.Node) -> Any:
    import dataclasses

    from torch.utils import _pytree as pytree

    from fxopt import dynamic

    leaf = dynamic.leaf("output", node.meta["val"], None)
    spec = pytree.tree_flatten((torch.empty(0),))[1]
    return dataclasses.replace(program.signature, outputs=(leaf,), out_spec=spec, writebacks=())


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _place(node: fx.Node) -> str:
    line = source_line(node)
    return f"{node.name} ({node.target}{f', {line}' if line else ''})"
