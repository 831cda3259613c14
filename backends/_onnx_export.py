"""From a program to an ONNX file on disk.

    program ──prepare──▶ plain ATen ──torch.onnx──▶ ONNX graph ──clean up, name──▶ file

The stages are those of ``torch.onnx.export(dynamo=True)``, without its second capture, its re-tracing and the
rewrites that our own passes have done already. Weights go from the program's tensors straight into a file beside the
graph and are mapped into memory from there: no second copy of them is ever held, and no model is too big.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt import ops
from fxopt.backends import _onnx_graph as onnx_graph
from fxopt.backends import _onnx_int8, _onnx_pads, _onnx_quantized_ops
from fxopt.backends._onnx_bounds import Bound, index_bounds, merge
from fxopt.backends._onnx_file import EMBEDDED, Interface, OnnxFile
from fxopt.backends._onnx_graph import origin
from fxopt.errors import SpecError, UnsupportedOp
from fxopt.program import ORIGIN, Program
from fxopt.signature import Leaf

if TYPE_CHECKING:
    import onnx_ir

OPSETS = (18, 23)  # what torch's translations are written for
_OPSET, _BF16_OPSET = 20, 22  # 22 is the first in which Conv takes bf16
_LOCATED = "fxopt_located"  # in the metadata of an ONNX node; copied to what is put in its place
_export_lock = threading.Lock()  # the exporter keeps its current tracer in a global


def export(
    program: Program,
    opset: int | None = None,
    bounds: Mapping[int, Bound] | None = None,
    *,
    explicit: bool = False,
    for_openvino: bool = False,
) -> OnnxFile:
    """*program* as an ONNX file. Its graph is rewritten, and weights that are in the file leave its constants.

    Args:
        program: owned by this call.
        opset: version of the ONNX operators; None for 20, or 22 where something is bf16 and 21 where weights are
            quantized in groups.
        bounds: what integers the engine takes for an input, by its position among the flat ones.
        explicit: write quantization as TensorRT reads it: no integers but those that are quantized, biases in float,
            linears over all dimensions. Otherwise it is spelled as CPU engines find their kernels.
        for_openvino: leave the biases of quantized layers in float, as it adds them, and quantize no matrices.

    Raises:
        UnsupportedOp: the program mutates something, or an op has no translation; with its source line.
        SpecError: no such opset.
    """
    if opset is None:
        opset = _onnx_quantized_ops.BLOCKS_OPSET if _onnx_quantized_ops.has_blocks(program) else _OPSET
        opset = _BF16_OPSET if any(of_dtype(node, torch.bfloat16) for node in program.graph.nodes) else opset
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise SpecError(f"opset must be from {OPSETS[0]} to {OPSETS[1]}, not {opset}")
    _refuse(program)
    bounds = merge(index_bounds(program), bounds or {})
    with _export_lock, _quiet(), torch.no_grad():
        registry = onnx_graph.registry_for(opset)
        quantized = _onnx_int8.is_quantized(program)
        if quantized:
            _onnx_quantized_ops.register(registry)
        onnx_graph.prepare(program, registry)
        if quantized and not explicit:
            _onnx_int8.reshape(program, no_matrices=for_openvino)
        interface = _interface(program, bounds)
        model = _translate(program, registry)
        _clean(model, opset)
        if quantized and not explicit:
            _onnx_int8.match_kernels(model, float_biases=for_openvino)
        transposed = _onnx_quantized_ops.pack_blocks(model) if quantized else set()
        _onnx_pads.keep_apart(model)
        _name(model, program)
        file = OnnxFile(model, interface, *_unmark(model), transposed)
        _release(model, program)
    return file


def _release(model: onnx_ir.Model, program: Program) -> None:
    """Let go of the tensors that are in the file now. Graphs hold them in cycles, which may live for long.

    Complex numbers are pairs in the file, from which :meth:`OnnxFile.constant` could not tell what they were.
    """
    pairs = {name for name, tensor in program.tensors().items() if tensor.is_complex()}
    for name, value in model.graph.initializers.items():
        if name not in pairs and value.const_value is not None and value.const_value.nbytes >= EMBEDDED:
            program.constants.pop(name, None)
            value.const_value = None


def of_dtype(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the value of *node* is a tensor of *dtype*."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is dtype


def _refuse(program: Program) -> None:
    """What no ONNX session can do, whatever the ops. From here on, each node knows which one it has been made from."""
    for node in program.graph.nodes:
        node.meta.setdefault(ORIGIN, node.name)
    signature = program.signature
    for back in signature.writebacks:
        what = f"buffer {back.constant!r}" if back.constant else f"input {signature.inputs[back.input or 0].name!r}"
        raise UnsupportedOp(f"the model changes its {what}, and an ONNX session keeps no state: use backend='torch'")
    for leaf in (*signature.inputs, *signature.outputs):
        if leaf.dtype is not None and leaf.dtype.is_complex:
            raise UnsupportedOp(f"{leaf.name!r} is complex, and ONNX inputs and outputs are not")
    for name, tensor in program.tensors().items():
        if tensor.layout is not torch.strided:
            raise UnsupportedOp(f"{name!r} is a {tensor.layout} tensor, which ONNX does not know: use backend='torch'")
    draws = [n for n in onnx_graph.all_nodes(program) if ops.is_random(n) and ops.packet(n) not in onnx_graph.UNWRITTEN]
    if draws:
        lines = dict.fromkeys(onnx_graph.located(node) for node in draws)
        nodes = {origin(n): "it draws random numbers" for n in draws if n.graph is program.graph}
        raise UnsupportedOp(f"{', '.join(lines)} draws random numbers, which torch.manual_seed must govern", nodes)
    open_bins = [node for node in onnx_graph.all_nodes(program) if _pools_open_sizes(node)]
    if open_bins:
        lines = dict.fromkeys(onnx_graph.located(node) for node in open_bins)
        why = "pools a dimension of open size into several parts, and windows in ONNX have fixed sizes"
        nodes = {origin(n): why for n in open_bins if n.graph is program.graph}
        raise UnsupportedOp(f"{', '.join(lines)} {why}: use backend='torch'", nodes)
    if not any(isinstance(result, fx.Node) for result in program.output.args[0]):  # type: ignore[union-attr]
        raise UnsupportedOp("the model returns no tensor, so there is nothing for an ONNX session to compute")


def _pools_open_sizes(node: fx.Node) -> bool:
    """Whether *node* is adaptive pooling whose windows depend on a size that is open: the exporter would fix them."""
    if not ops.packet(node).startswith("adaptive_"):
        return False
    parts: Any = ops.arguments(node)["output_size"]
    source: Any = node.args[0]
    parts = [parts] if isinstance(parts, int) else list(parts)
    sizes = source.meta["val"].shape[-len(parts) :]
    return any(part != 1 for part in parts) and not all(isinstance(size, int) for size in sizes)


def _interface(program: Program, bounds: Mapping[int, Bound]) -> Interface:
    signature = program.signature
    results: Sequence[Any] = program.output.args[0]  # type: ignore[assignment]
    positions, computed = list[int | None](), 0
    for result in results:
        positions.append(computed if isinstance(result, fx.Node) else None)
        computed += isinstance(result, fx.Node)
    return Interface(
        tuple((i, leaf.name) for i, leaf in enumerate(signature.inputs) if leaf.is_tensor),
        tuple(positions),
        tuple(None if isinstance(result, fx.Node) else result for result in results),
        frozenset(i for i, r in enumerate(results) if isinstance(r, fx.Node) and not signature.outputs[i].is_tensor),
        {signature.inputs[i].name: bound for i, bound in bounds.items()},
    )


def _translate(program: Program, registry: Any) -> onnx_ir.Model:
    """The ONNX graph; each of its nodes is marked with the op of the program that it came from."""
    from torch.onnx._internal.exporter import _core, _fx_passes

    exported = onnx_graph.exported_program(program)
    try:
        _fx_passes.insert_type_promotion_nodes(exported.graph_module)
        model = _core._exported_program_to_onnx_program(exported, registry=registry).model
    except Exception as error:
        failed = [n for n in exported.graph.nodes if n.op == "call_function" and n.format_node() in str(error)]
        where = onnx_graph.located(failed[0]) if failed else "this graph"
        cause: BaseException = error
        while cause.__cause__ is not None and str(cause.__cause__):  # what the exporter says of it is for its authors
            cause = cause.__cause__
        reason = str(cause).splitlines()[0]
        nodes = {origin(node): f"ONNX cannot express it: {reason}" for node in failed[:1]}
        raise UnsupportedOp(f"ONNX cannot express {where}: {reason}", nodes) from error
    exported.state_dict.clear()
    for made in model.graph.all_nodes():
        if "node" in made.meta:
            made.metadata_props[_LOCATED] = onnx_graph.located(made.meta["node"])
            made.metadata_props[ORIGIN] = str(made.meta["node"].meta.get(ORIGIN, ""))
    return model


def _unmark(model: onnx_ir.Model) -> tuple[dict[str, str], dict[str, str]]:
    """For each node of the ONNX graph the op that it came from, and the name of that node; no other traces are left."""
    from torch.onnx._internal.exporter import _ir_passes

    marked = {str(n.name): dict(n.metadata_props) for n in model.graph.all_nodes()}
    for thing in (model, model.graph, *model.graph.all_nodes(), *_ir_passes._all_values(model)):
        thing.metadata_props.clear()
    located = {name: marks[_LOCATED] for name, marks in marked.items() if _LOCATED in marks}
    return located, {name: marks[ORIGIN] for name, marks in marked.items() if marks.get(ORIGIN)}


def _clean(model: onnx_ir.Model, opset: int) -> None:
    """Inline the exporter's helper functions, fold the shape arithmetic it leaves behind, drop what is unused."""
    from onnx_ir.passes import common
    from onnxscript import version_converter
    from onnxscript.optimizer import _constant_folding as folding

    if opset != OPSETS[0]:
        version_converter.convert_version(model, opset, fallback=True)
    for step in (
        common.InlinePass(),
        folding.FoldConstantsPass(shape_inference=False, input_size_limit=8192, output_size_limit=262_144),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.OutputFixPass(),
    ):
        step(model)


def _name(model: onnx_ir.Model, program: Program) -> None:
    """Names of the user for inputs, outputs and dynamic sizes."""
    from onnx_ir.passes import common
    from torch.onnx._internal.exporter import _ir_passes

    signature = program.signature
    inputs = [leaf for leaf in signature.inputs if leaf.is_tensor]
    results: Sequence[Any] = program.output.args[0]  # type: ignore[assignment]
    outputs = [leaf for leaf, r in zip(signature.outputs, results, strict=True) if isinstance(r, fx.Node)]
    for values, leaves in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, leaf in zip(values, leaves, strict=True):
            value.name = leaf.name
    common.NameFixPass()(model)
    sizes: dict[str | onnx_ir.SymbolicDim, str] = {}
    sizes.update(_size_names(inputs))
    sizes.update({str(symbol): name for symbol, name in signature.dim_names.items()})
    _ir_passes.rename_axis(model, sizes)
    model.producer_name, model.producer_version = "fxopt", None


def _size_names(inputs: Sequence[Leaf]) -> Iterator[tuple[str, str]]:
    """A name for each dynamic size: of the first input that has it, and the dimension, as in ``tokens_dim_1``."""
    seen = set[str]()
    for leaf in inputs:
        for axis, size in enumerate(leaf.shape or ()):
            if not isinstance(size, int) and size.is_Symbol and str(size) not in seen:
                seen.add(str(size))
                yield str(size), f"{leaf.name}_dim_{axis}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's log lines and deprecation warnings: what matters of them is in our errors."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
