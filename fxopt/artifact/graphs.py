"""A graph as JSON and back. A file names operators and holds no code.

    %3: conv2d(%0, %1, %2)  ↔  {"call": "aten.conv2d.default", "args": [{"node": 0}, {"node": 1}, {"node": 2}]}

Nodes are numbered in order. On reading, the value of each is inferred anew, so that shapes and dtypes are those that
the operators give, whatever the file says.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx

from fxopt import fused as _fused  # noqa: F401 - registers fxopt's own operators
from fxopt import ops
from fxopt.artifact.values import decode, encode
from fxopt.errors import ArtifactError
from fxopt.program import source_line

# Operators of these may be named by any file; those of other libraries only where the reader allows them.
_SPACES = ("aten", "fxopt", "quantized_decomposed", "torchvision", "higher_order")
# They read or write files, or are not what a captured graph has.
_REFUSED = ("from_file", "save", "_print")
_HIGHER_ORDER = ("cond", "while_loop", "map_impl", "scan", "associative_scan")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONSTANT = re.compile(r"[\w .:+\-/()\[\]=,@]+")  # no quote: they stand in the code that torch.fx makes of a graph

_PYTHON: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in (
        "getitem add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_ not_ abs lshift rshift index"
    ).split()},
    **{f"math.{name}": getattr(math, name) for name in "ceil floor trunc sqrt".split()},
    **{f"torch.{name}": getattr(torch, name) for name in "sym_max sym_min sym_not sym_ite sym_int sym_float".split()},
}  # fmt: skip
_NAMES = {id(function): name for name, function in _PYTHON.items()}


def encode_graph(graph: fx.Graph, constants: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The nodes of *graph* in order; graphs inside (branches, loops) stand where they are read.

    Raises:
        ArtifactError: an operator or argument cannot be written down; the message names the node and its line.
    """
    numbers: dict[fx.Node, int] = {}
    entries = []
    for node in graph.nodes:
        try:
            entry = _encode_node(node, numbers, constants)
        except ArtifactError as error:
            where = f" ({source_line(node)})" if source_line(node) else ""
            raise ArtifactError(f"{node.name}{where}: {error}") from error
        numbers[node] = len(numbers)
        entries.append(entry)
    return entries


def _encode_node(node: fx.Node, numbers: Mapping[fx.Node, int], constants: Mapping[str, Any]) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"input": node.name}
    if node.op == "output":
        return {"output": encode(node.args[0], numbers)}
    if node.op == "get_attr":
        value = constants.get(str(node.target))
        if isinstance(value, fx.GraphModule):
            inner = encode_graph(value.graph, dict(value.named_children()) | dict(value.named_buffers()))
            return {"graph": inner, "name": str(node.target)}
        if not _CONSTANT.fullmatch(str(node.target)):
            raise ArtifactError(f"an artifact cannot hold the name {node.target!r:.80} of a constant")
        return {"constant": str(node.target)}
    entry = {"call": _target_name(node.target), "args": encode(list(node.args), numbers), "name": node.name}
    if node.kwargs:
        entry["kwargs"] = {name: encode(value, numbers) for name, value in node.kwargs.items()}
    if node.meta.get(ops.TRAINED):
        entry["trained"] = True
    if line := source_line(node):
        path, _, number = line.rpartition(":")
        entry["line"] = [path.replace("\\", "/").rpartition("/")[2], int(number)]
    return entry


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in _HIGHER_ORDER:
        return f"higher_order.{target.name()}"
    if id(target) in _NAMES:
        return _NAMES[id(target)]
    raise ArtifactError(f"an artifact cannot hold a call of {target}")


def decode_graph(entries: Any, constants: dict[str, Any], allowed: Collection[str]) -> fx.Graph:
    """The graph that :func:`encode_graph` wrote. Graphs inside are added to *constants*.

    Args:
        entries: the nodes.
        constants: what the file holds, by name; each is read by one node at most.
        allowed: operator libraries beyond PyTorch's own whose operators may be called.

    Raises:
        ArtifactError: it wrote no such thing, or an operator is unknown or refused.
    """
    graph, nodes = fx.Graph(), list[fx.Node]()
    for entry in entries:
        if nodes and nodes[-1].op == "output":
            raise ArtifactError("a graph goes on after its output")
        nodes.append(_decode_node(entry, graph, nodes, constants, allowed))
    if not nodes or nodes[-1].op != "output":
        raise ArtifactError("a graph has no output")
    return graph


def _decode_node(
    entry: Any, graph: fx.Graph, nodes: list[fx.Node], constants: dict[str, Any], allowed: Collection[str]
) -> fx.Node:
    if "input" in entry:
        if any(node.op != "placeholder" for node in nodes):
            raise ArtifactError("a graph has an input after something else")
        return graph.placeholder(_word(entry["input"]))
    if "output" in entry:
        output: fx.Node = graph.output(decode(entry["output"], nodes))
        return output
    if "constant" in entry:
        name = entry["constant"]
        if not isinstance(name, str) or not _CONSTANT.fullmatch(name):
            raise ArtifactError(f"a graph has no constant named {name!r:.80}")
        return graph.create_node("get_attr", name)
    if "graph" in entry:
        name, own = _word(entry["name"]), dict[str, Any]()
        if name in constants:
            raise ArtifactError(f"two constants are named {name!r:.80}")
        constants[name] = fx.GraphModule(own, decode_graph(entry["graph"], own, allowed))
        return graph.create_node("get_attr", name)
    kwargs = {_word(name): decode(value, nodes) for name, value in entry.get("kwargs", {}).items()}
    target = _resolve(entry["call"], allowed)
    node = graph.create_node("call_function", target, tuple(decode(entry["args"], nodes)), kwargs, _word(entry["name"]))
    if entry.get("trained") is True:
        node.meta[ops.TRAINED] = True
    if "line" in entry:
        path, number = entry["line"]
        if isinstance(path, str) and type(number) is int and not set(path) & set('"\n/\\'):
            node.meta["stack_trace"] = f'  File "{path}", line {number}, in forward'
    return node


def _resolve(name: Any, allowed: Collection[str]) -> Any:
    """The operator *name*.

    Raises:
        ArtifactError: it is unknown here, or may not be called by a file.
    """
    if name in _PYTHON:
        return _PYTHON[name]
    space, _, rest = name.partition(".")
    if space not in _SPACES and space not in allowed:
        raise ArtifactError(
            f"the model calls {name!r:.80}, an operator of the library {space!r:.40}: import that library and pass "
            f"allow_ops=[{space!r:.40}] where you trust it"
        )
    packet, _, overload = rest.partition(".")
    if not _WORD.fullmatch(space) or not _WORD.fullmatch(packet) or packet in _REFUSED:
        raise ArtifactError(f"an artifact may not call {name!r:.80}")
    if space == "quantized_decomposed":
        importlib.import_module("fxopt.quantized")  # registers them; not every model needs what that imports
    if space == "higher_order" and packet in _HIGHER_ORDER:
        return getattr(torch.ops.higher_order, packet)
    found = getattr(getattr(torch.ops, space), packet, None)
    found = getattr(found, overload, None) if _WORD.fullmatch(overload) else None
    if not isinstance(found, torch._ops.OpOverload):
        raise ArtifactError(
            f"there is no operator {name!r:.80} here: import the library that brings it, then load again"
        )
    if found._schema.is_mutable:
        raise ArtifactError(f"an artifact may not call {name!r:.80}, which writes to its arguments")
    return found


def _word(name: Any) -> str:
    if not isinstance(name, str) or not _WORD.fullmatch(name):
        raise ArtifactError(f"a graph has nothing named {name!r:.80}")
    return name
