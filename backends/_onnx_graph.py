"""The graph as torch's ONNX exporter wants it: plain ATen, nothing in it that has no ONNX translation.

    fxopt.conv2d(x, w, b, r, ..., "relu")   →   relu(conv2d(x, w, b, ...) + r)       engines fuse it their own way
    batch_norm(x, ...)                      →   _native_batch_norm_legit_no_training(x, ...)[0]
    an op without an ONNX translation       →   the ops it is made of
    an op whose translation is not accurate →   a formula of _onnx_stable
    a check (_assert_tensor_metadata, ...)  →   nothing

``torch.onnx.export`` re-traces the whole model for this. Here only the nodes that need it are touched, which takes a
fraction of the time and leaves every other node with its name and its source line.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from fxopt import ops
from fxopt.backends import _onnx_attention, _onnx_quantized_ops, _onnx_resize, _onnx_stable
from fxopt.backends._onnx_decompose import decompose, is_translated
from fxopt.errors import UnsupportedOp
from fxopt.program import ORIGIN, Program, source_line
from fxopt.rewriter import Rewriter

if TYPE_CHECKING:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

aten = torch.ops.aten
_STEPS = 3  # from a node that a pass has made to one of the user's
# Memory that holds anything until it is written to: zeros are as good, and there is nothing else in ONNX.
UNWRITTEN = {
    "empty": aten.zeros.default,
    "new_empty": aten.new_zeros.default,
    "empty_like": aten.zeros_like.default,
}


def located(node: fx.Node) -> str:
    """``aten.fft_fft.default at model.py:12``, for error messages. What a pass has made is where its readers are."""
    where = source_line(node) or _line_of_readers(node)
    what = f"the constant {node.target}" if node.op == "get_attr" else f"{node.target}"
    if where.startswith("<eval_with_key>"):  # no line of the user's is known for what torch.cond has captured
        return f"{what} in a branch or a loop"
    return what + (f" at {where}" if where else "")


def _line_of_readers(node: fx.Node) -> str:
    """The source line of the node that *node* is made for, or ""; a quantize is two steps before its convolution."""
    readers = dict.fromkeys(node.users)
    for _ in range(_STEPS):
        line = next(filter(None, map(source_line, readers)), "")
        if line:
            return line
        readers = dict.fromkeys(user for reader in readers for user in reader.users)
    return ""


def origin(node: fx.Node) -> str:
    """Name of the node of the program, as the backend was given it, that *node* is or has been made from."""
    return str(node.meta.get(ORIGIN, node.name))


def all_nodes(program: Program) -> Iterator[fx.Node]:
    """The nodes of *program*, and of the bodies of its higher-order ops (branches, loops)."""
    yield from program.graph.nodes
    for value in program.constants.values():
        if isinstance(value, fx.GraphModule):
            for module in _graph_modules(value):
                yield from module.graph.nodes


def _graph_modules(body: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in body.modules() if isinstance(module, fx.GraphModule)]


def prepare(program: Program, registry: ONNXRegistry) -> None:
    """Rewrite *program* in place, bodies of higher-order ops included, into ops that *registry* translates.

    Raises:
        UnsupportedOp: naming each op that has no translation, with its source line.
    """
    refused, callers = list[fx.Node](), list[fx.Node]()
    for name, body in program.constants.items():
        if isinstance(body, fx.GraphModule):
            program.constants[name] = own = copy.deepcopy(body)
            inside = list[fx.Node]()
            for module in _graph_modules(own):
                constants = dict(module.named_buffers(recurse=False))
                inside += _prepare(Program(module.graph, constants, program.signature), registry)
                held = module.graph.find_nodes(op="get_attr")
                inside += [n for n in held if not isinstance(getattr(module, str(n.target), None), fx.GraphModule)]
                module.recompile()
            readers = [node for node in program.graph.find_nodes(op="get_attr") if node.target == name]
            callers += [user for node in readers for user in node.users if inside]
            refused += inside
    own_nodes = _prepare(program, registry)
    if refused or own_nodes:
        lines = dict.fromkeys(located(node) for node in [*refused, *own_nodes])
        nodes = dict.fromkeys((origin(node) for node in [*callers, *own_nodes]), "ONNX has no translation for it")
        raise UnsupportedOp(f"ONNX has no translation for {', '.join(lines)}", nodes)


def _prepare(program: Program, registry: ONNXRegistry) -> list[fx.Node]:
    """Rewrite one graph; returns the nodes that have no translation."""
    rewriter, refused = Rewriter(program), list[fx.Node]()
    for node in rewriter.nodes():
        if ops.packet(node) == "conv3d" and ops.arguments(node)["bias"] is None:
            _without_bias(rewriter, node)
        if ops.kind(node) == "assert":
            program.graph.erase_node(node)
        elif ops.is_fused(node):
            rewriter.replace(node, _unfused(rewriter, node))
        elif node.target is aten.scaled_dot_product_attention.default:
            _onnx_attention.write(rewriter, node)
        elif ops.packet(node) in ("amax", "amin") and not ops.arguments(node)["dim"]:
            a = ops.arguments(node)
            node.args, node.kwargs = (a["self"], list(range(a["self"].meta["val"].dim())), a["keepdim"]), {}
        elif node.target is aten.batch_norm.default and not ops.arguments(node)["training"]:
            rewriter.replace(node, _inference_norm(rewriter, node))
        elif ops.namespace(node) == "aten" and ops.packet(node) in UNWRITTEN:
            _zeros(rewriter, node)
        elif node.target is aten.sym_numel.default:
            _product_of_sizes(rewriter, node)
        elif not decompose(rewriter, node, registry):
            refused.append(node)
    _onnx_quantized_ops.fuse_dynamic(program)
    program.remove_dead()
    return [node for node in program.graph.nodes if node in refused or not is_translated(node, registry)]


def _without_bias(rewriter: Rewriter, node: fx.Node) -> None:
    """Zeros as bias of a conv3d that has none: the exporter's own are of a wrong shape."""
    weight = ops.arguments(node)["weight"].meta["val"]
    zeros = rewriter.constant(f"{node.name}_bias", torch.zeros(weight.shape[0], dtype=weight.dtype))
    node.args = (*node.args[:2], zeros, *node.args[3:])


def _unfused(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """The plain ops that the fused op *node* stands for."""
    a = ops.arguments(node)
    plain = getattr(aten, ops.packet(node)).default
    window = [a[key] for key in ("stride", "padding", "dilation", "groups") if key in a]
    y = rewriter.call(plain, (a["x"], a["weight"], a["bias"], *window), before=node)
    if a["residual"] is not None:
        y = rewriter.call(aten.add.Tensor, (y, a["residual"]), before=node)
    if a["activation"] == "none":
        return y
    compute = ops.ACTIVATIONS[a["activation"]]
    options: dict[str, Any] = {}
    if isinstance(compute, functools.partial):
        compute, options = compute.func, dict(compute.keywords)  # type: ignore[attr-defined]
    return rewriter.call(compute, (y, *a["activation_args"]), options, before=node)


def _zeros(rewriter: Rewriter, node: fx.Node) -> None:
    a, dtype = ops.arguments(node), {"dtype": node.meta["val"].dtype}
    sizes = [a["self"]] if "self" in a else []
    sizes += [a["size"]] if "size" in a else []
    rewriter.replace(node, rewriter.call(UNWRITTEN[ops.packet(node)], sizes, dtype, before=node))


def _product_of_sizes(rewriter: Rewriter, node: fx.Node) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    sizes = [rewriter.call(aten.sym_size.int, (x, axis), before=node) for axis in range(x.meta["val"].dim())]
    rewriter.replace(node, functools.reduce(lambda a, b: rewriter.call(operator.mul, (a, b), before=node), sizes))


def _inference_norm(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    a = ops.arguments(node)
    keys = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
    target = aten._native_batch_norm_legit_no_training.default
    whole = rewriter.call(target, [a[key] for key in keys], before=node)
    return rewriter.call(operator.getitem, (whole, 0), before=node)


@functools.lru_cache(maxsize=2)
def registry_for(opset: int) -> ONNXRegistry:
    """The exporter's table of translations. Building it takes half a second, once."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    import fxopt.quantized  # noqa: F401  the table has translations for its ops only if they exist by now

    registry = ONNXRegistry.from_torchlib(opset_version=opset)
    _onnx_stable.register(registry)
    _onnx_resize.register(registry)
    return registry


def exported_program(program: Program) -> ExportedProgram:
    """*program* as the ExportedProgram that the exporter reads: weights are placeholders, outputs nodes only.

    Each placeholder of a weight has the name of its constant as target. Outputs that are no tensors are left out,
    unless they are sizes.
    """
    from torch._export.verifier import TrainingIRVerifier, Verifier
    from torch.utils._sympy.value_ranges import ValueRanges

    graph, values, inputs = fx.Graph(), dict[fx.Node, fx.Node](), list[InputSpec]()
    for node in program.graph.find_nodes(op="get_attr"):
        if isinstance(program.constants[str(node.target)], torch.Tensor):
            values[node] = graph.placeholder(f"constant_{len(inputs)}")
            values[node].meta = dict(node.meta)
            inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(values[node].name), str(node.target), True))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.node_copy(node)
            inputs.append(InputSpec(InputKind.USER_INPUT, _input(values[node]), None))
        elif node.op != "output" and node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    results = [values[r] for r in program.output.args[0] if isinstance(r, fx.Node)]  # type: ignore[union-attr]
    graph.output(tuple(results))
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _output(node), None) for node in results]
    bodies = {name: value for name, value in program.constants.items() if not isinstance(value, torch.Tensor)}
    tree = pytree.tree_structure((tuple(program.placeholders), {}))
    call = ModuleCallEntry("", ModuleCallSignature([], [], tree, pytree.tree_structure(tuple(results))))
    ranges = {symbol: ValueRanges(*ends) for symbol, ends in program.signature.ranges.items()}
    signature = ExportGraphSignature(inputs, outputs)
    checks: list[type[Verifier]] = [TrainingIRVerifier]  # pre-dispatch ops are right here
    return ExportedProgram(bodies, graph, signature, program.tensors(), ranges, [call], verifiers=checks)


def _input(node: fx.Node) -> TensorArgument | ConstantArgument:
    value = node.meta.get("val")
    return TensorArgument(node.name) if isinstance(value, torch.Tensor) else ConstantArgument(node.name, value)


def _output(node: fx.Node) -> TensorArgument | SymIntArgument:
    tensor = isinstance(node.meta.get("val"), torch.Tensor)
    return TensorArgument(node.name) if tensor else SymIntArgument(node.name)
