"""A graph of Dynamo, whose inputs are everything that it reads, as a module whose inputs are those of the user."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn


@dataclasses.dataclass(frozen=True)
class Roles:
    """The indices of a graph's inputs by role; ``sizes`` maps one to the tensor and dimension that it is read from."""

    weights: tuple[int, ...]
    sizes: Mapping[int, tuple[int, int]]
    numbers: tuple[int, ...]
    inputs: tuple[int, ...]

    @staticmethod
    def of(holders: Sequence[fx.Node], examples: Sequence[Any]) -> Roles:
        """The role of each placeholder."""
        weights, inputs, numbers, symbols = list[int](), list[int](), list[int](), list[int]()
        for i, (node, x) in enumerate(zip(holders, examples, strict=True)):
            if not isinstance(x, torch.Tensor):
                (symbols if isinstance(x, torch.SymInt) else numbers).append(i)
            elif getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False):
                numbers.append(i)
            elif _is_static(node, x):
                weights.append(i)
            else:
                inputs.append(i)
        sizes = {}
        for i in symbols:
            place = _place_of(examples[i], holders, inputs)
            if place is None:
                numbers.append(i)
            else:
                sizes[i] = place
        return Roles(tuple(weights), sizes, tuple(sorted(numbers)), tuple(inputs))


def _is_static(node: fx.Node, x: torch.Tensor) -> bool:
    marked = "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    return isinstance(x, nn.Parameter) or marked


def _place_of(size: torch.SymInt, holders: Sequence[fx.Node], inputs: Sequence[int]) -> tuple[int, int] | None:
    """The first input and dimension whose size is *size*, for every call."""
    for i in inputs:
        for dim, other in enumerate(holders[i].meta["example_value"].shape):
            if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                return i, dim
    return None


def _name_of(node: fx.Node, taken: set[str]) -> str:
    """The name a user would give to what *node* holds: ``layer1.0.conv1.weight``, ``x``."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None)
    text = name if isinstance(name, str) else str(node.target)
    words = [word for word in re.findall(r"\w+", text) if word not in ("L", "G", "self") and not word.startswith("_")]
    base = name = ".".join(words) or "x"
    while name in taken or any(name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in taken):
        name = f"{base}_{len(taken)}"
    taken.add(name)
    return name


def bind(module: fx.GraphModule, roles: Roles, args: Sequence[Any]) -> tuple[nn.Module, dict[str, int]]:
    """*module* with its weights and numbers bound to *args*, and which input each weight is, by name."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, copies))
    known = list(module.graph.find_nodes(op="placeholder"))
    holders = [copies[node] for node in known]
    taken = set[str]()
    names = {_name_of(known[i], taken): i for i in roles.weights}
    arguments = [_name_of(known[i], taken).replace(".", "_") for i in roles.inputs]
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for i, (tensor, dim) in roles.sizes.items():
            size = graph.call_function(torch.ops.aten.sym_size.int, (holders[tensor], dim))
            holders[i].replace_all_uses_with(size)
    for i in roles.numbers:
        _bind(holders[i], number(args[i]))
    for i in (*roles.numbers, *roles.sizes):
        graph.erase_node(holders[i])
    inner = fx.GraphModule(module, graph)
    order = [i for i in range(len(holders)) if i in roles.weights or i in roles.inputs]
    return _traced(inner, order, {i: (name, args[i]) for name, i in names.items()}, arguments), names


def _traced(
    graph: fx.GraphModule,
    order: Sequence[int],
    weights: Mapping[int, tuple[str, torch.Tensor]],
    arguments: Sequence[str],
) -> nn.Module:
    """*graph* as a module that runs it node by node, so that what is captured of it keeps the user's source lines.

    Args:
        graph: to be called with weights and inputs in *order*.
        order: the input of Dynamo's graph that each argument is.
        weights: names and values of some of these.
        arguments: names of the others.
    """
    casts = _autocasts()

    def forward(self: Any, *args: Any) -> Any:
        given = iter(args)
        values = [self.get_parameter_or_buffer(weights[i][0]) if i in weights else next(given) for i in order]
        with fx.traceback.preserve_node_meta(), _cast(casts, True):
            return fx.Interpreter(graph).run(*values)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in ("self", *arguments)]
    )
    made: nn.Module = type("Graph", (_Holder,), {"forward": forward})()
    for name, value in weights.values():
        *path, last = name.split(".")
        place: nn.Module = made
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
        if isinstance(value, nn.Parameter):
            place.register_parameter(last, value)
        else:
            place.register_buffer(last, value)
    return made


def _autocasts() -> list[tuple[str, torch.dtype]]:
    """The kinds of devices for which ``torch.autocast`` is on, and its dtypes."""
    return [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


@contextlib.contextmanager
def _cast(casts: Sequence[tuple[str, torch.dtype]], enabled: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind, dtype in casts:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield


def no_autocast() -> contextlib.AbstractContextManager[None]:
    """``torch.autocast`` off, so that passes and checks compute in the dtypes of the graph."""
    return _cast(_autocasts(), False)


class _Holder(nn.Module):
    def get_parameter_or_buffer(self, name: str) -> torch.Tensor:
        value: Any = functools.reduce(getattr, name.split("."), self)
        assert isinstance(value, torch.Tensor)
        return value


def _bind(node: fx.Node, value: Any) -> None:
    """Put a number in the place of *node*, and of what reads it from a tensor without dimensions."""
    for user in list(node.users):
        if user.op == "call_method" and user.target == "item":
            _bind(user, value)
            user.graph.erase_node(user)
            continue
        user.args = fx.node.map_arg(user.args, lambda one: value if one is node else one)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda one: value if one is node else one)


def open_dims(node: fx.Node) -> dict[int, Any] | None:
    """The dimensions that Dynamo keeps open, for torch.export."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return None
    return {d: torch.export.Dim.AUTO for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)} or None


def number(x: Any) -> Any:
    """The Python number in a tensor without dimensions; anything else as it is."""
    return x.item() if isinstance(x, torch.Tensor) else x
