"""From what the user has (Module, ExportedProgram, GraphModule) to a :class:`Program`.

    model ──private eval copy, weights shared──▶ torch.export ──functionalize──▶ flat graph, tied weights merged

The user's object is never touched: the copy has its own ``training`` flags, buffers and Python attributes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxopt import dynamic, fast_path, ops, size_one, trials
from fxopt.errors import CaptureError, FxoptError, InputError
from fxopt.explain import explain
from fxopt.functionalize import functionalize
from fxopt.guards import annotate
from fxopt.memory import overlap, own_copy
from fxopt.program import Program
from fxopt.refusals import refuse_nan, refuse_unusable
from fxopt.signature import Signature, Writeback
from fxopt.twin import private_copy, run_eager

_STATE = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ}


@dataclasses.dataclass
class Captured:
    """A captured model together with what it answered on its example inputs.

    Attributes:
        program: the graph.
        model: the private eval copy that was captured; calling it does not disturb the user's object.
        inputs: flat example input leaves.
        reference: flat eager output leaves for them.
    """

    program: Program
    model: nn.Module
    inputs: list[Any]
    reference: list[Any]


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Captured:
    """Capture *model* for the given example inputs.

    Args:
        model: nn.Module (GraphModules included) or ExportedProgram. Not modified.
        args: positional example inputs.
        kwargs: keyword example inputs.
        dynamic_shapes: as ``torch.export.export`` takes it; a string stands for a ``Dim`` of that name.

    Raises:
        CaptureError: the model cannot be expressed as one graph; the message shows the user's source line.
        InputError: the model is of a wrong type or holds NaN, or the inputs do not fit it.
    """
    kwargs = dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        return _from_exported(model, args, kwargs)
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module, ExportedProgram or GraphModule, not {type(model).__name__}")
    refuse_unusable(model)
    twin = private_copy(model)
    refuse_nan(twin)
    reference = run_eager(twin, args, kwargs)
    args, kwargs = _distinct(args, kwargs)
    exported = _export(twin, args, kwargs, dynamic_shapes)
    return _finish(exported, twin, args, kwargs, reference, dynamic_shapes)


def _from_exported(model: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    if not args and not kwargs and model.example_inputs is not None:
        args, kwargs = model.example_inputs
    exported = copy.copy(model)
    exported._graph_module = copy.deepcopy(model.graph_module, {id(t): t for t in model.state_dict.values()})
    for own, theirs in zip(exported.graph.nodes, model.graph.nodes, strict=True):
        own.name = theirs.name  # a copy renames what shadows a builtin ("input"), the signature does not follow
    runner = private_copy(model.module())
    refuse_unusable(runner)
    refuse_nan(runner)
    return _finish(exported, runner, args, kwargs, run_eager(runner, args, kwargs))


def _finish(
    exported: ExportedProgram,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reference: list[Any],
    shapes: Any = None,
) -> Captured:
    try:
        with quiet_export():
            functional = functionalize(exported)
    except Exception as error:
        raise CaptureError(explain(error, model)) from error
    program = _to_program(functional, _forward_signature(model))
    if len(reference) != len(program.signature.outputs):
        raise CaptureError("the captured graph returns another structure than the model itself")
    dims = dynamic.user_dims(model, args, kwargs, shapes, program.signature.inputs)
    names = {symbol: dim.__name__ for symbol, dim in dims.items() if hasattr(dim, "__name__")}
    program.signature = annotate(program.signature, [*exported._guards_code, *functional._guards_code], names)
    fixed = {symbol for symbol, dim in dims.items() if (getattr(dim, "min", None) or 0) >= 2}
    inputs = program.signature.flatten(args, kwargs)
    reference, path = fast_path.same_path(program, model, inputs, reference)
    with path():
        program.signature = size_one.widen(program, model, inputs, fixed)
        if not any(ops.is_random(node) for node in program.graph.nodes):
            case = model, program.signature.in_spec, inputs, reference
            pinned, ordered = trials.pinned_layouts(*case), trials.is_ordered(*case)
            program.signature = dataclasses.replace(program.signature, layouts=pinned, ordered=ordered)
    return Captured(program, model, program.signature.bind(args, kwargs), reference)


def _forward_signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


_quiet_lock = threading.RLock()
_LOGGERS = (
    "torch.export", "torch._export", "torch.fx", "torch.fx.experimental.symbolic_shapes", "torch._dynamo",
    "torch._subclasses.fake_tensor",
)  # fmt: skip


@contextmanager
def quiet_export() -> Iterator[None]:
    """Silence what torch.export logs, warns and prints on its own: what matters of it is in our errors."""
    with _quiet_lock, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    shapes = dynamic.normalize(shapes)
    if shapes is not None:
        args, kwargs = dynamic.enlarge(model, args, kwargs, shapes)
    try:
        with torch.no_grad(), quiet_export():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except FxoptError:
        raise
    except Exception as error:
        raise CaptureError(explain(error, model)) from error


def _distinct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs, no two of them over the same memory: torch.export would take them for one, or fail."""
    seen: list[torch.Tensor] = []

    def own(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        shared = overlap([x, *seen], [0]) not in (None, (0, 0)) or any(x is y for y in seen)
        seen.append(own_copy(x) if shared else x)
        return seen[-1]

    return cast(tuple[tuple[Any, ...], dict[str, Any]], pytree.tree_map(own, (args, kwargs)))


def _to_program(exported: ExportedProgram, forward: inspect.Signature | None) -> Program:
    """Parameters become get_attr nodes (tied ones a single node); only user inputs stay placeholders."""
    graph, values, constants = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Any]()
    holders = list(exported.graph.find_nodes(op="placeholder"))
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    user = [n for n in holders if specs[n.name].kind not in _STATE]
    for node in user:
        values[node] = graph.node_copy(node)
    by_identity: dict[int, fx.Node] = {}
    owners: dict[str, str] = {}
    for node in holders:
        spec = specs[node.name]
        if spec.kind not in _STATE:
            continue
        name, value = str(spec.target), _constant(exported, str(spec.target))
        if id(value) not in by_identity:
            by_identity[id(value)] = graph.get_attr(name)
            by_identity[id(value)].meta = dict(node.meta)
            constants[name] = value.detach() if isinstance(value, torch.Tensor) else value
        values[node] = by_identity[id(value)]
        owners[name] = str(values[node].target)
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            constants[str(node.target)] = getattr(exported.graph_module, str(node.target))
        if node.op not in ("placeholder", "output"):
            values[node] = graph.node_copy(node, values.__getitem__)
    signature, results = _signature(exported, user, forward, owners)
    graph.output(tuple(values[r] if isinstance(r, fx.Node) else r for r in results))
    program = Program(graph, constants, signature)
    program.remove_dead()
    for back in signature.writebacks:  # the graph's own state: the model that it came from may go on running
        if back.constant is not None:
            constants[back.constant] = constants[back.constant].clone()
    return program


def _constant(exported: ExportedProgram, name: str) -> Any:
    return exported.state_dict[name] if name in exported.state_dict else exported.constants[name]


def _signature(
    exported: ExportedProgram, user: list[fx.Node], forward: inspect.Signature | None, owners: Mapping[str, str]
) -> tuple[Signature, list[Any]]:
    (flat,) = exported.graph.output_node().args
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    results, extra, writebacks = [], [], []
    for value, spec in zip(flat, exported.graph_signature.output_specs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            results.append(value)
        elif spec.kind is OutputKind.BUFFER_MUTATION:
            extra.append(value)
            writebacks.append(Writeback(constant=owners[str(spec.target)]))
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            extra.append(value)
            writebacks.append(Writeback(input=[n.name for n in user].index(str(spec.target))))
        else:
            raise CaptureError(f"the model has an output of kind {spec.kind.name}, which fxopt does not know")
    values = {s.arg.name: getattr(s.arg, "value", None) for s in exported.graph_signature.input_specs}
    for node in user:
        if isinstance(node.meta.get("val"), torch.SymInt):
            raise InputError(
                f"dynamic_shapes keeps the number {node.name!r} open, and only sizes of tensors can be: leave it out, "
                "and the model is captured for its value; or let the model take it as a tensor"
            )
    inputs = [dynamic.leaf(n.name, n.meta.get("val"), values[n.name]) for n in user]
    fakes = [r.meta.get("val") if isinstance(r, fx.Node) else None for r in results]
    names = dynamic.output_names(out_spec)
    outputs = [dynamic.leaf(*leaf) for leaf in zip(names, fakes, results, strict=True)]
    ranges = dynamic.ranges(exported)
    signature = Signature(in_spec, out_spec, tuple(inputs), tuple(outputs), forward, ranges, tuple(writebacks))
    return signature, results + extra
