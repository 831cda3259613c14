"""OpenVINO as the engine, over the same ONNX file that the onnx backend makes.

    program ──widen──▶ fp32 graph ──export──▶ ONNX file ──compile_model(precision)──▶ OpenVinoExecutable

OpenVINO picks the precision of each operation itself, from one hint for the whole model. A program that computes in
bf16 is therefore handed over in fp32 (its weights rounded already) together with the hint bf16: that is as fast as
OpenVINO gets, while explicit casts are not even valid around an ONNX convolution before opset 22. Without a hint it
would silently use bf16 wherever the machine has it, so fp32 is asked for by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxopt import ops
from fxopt.backend import Backend, Executable, check_threads
from fxopt.backends._onnx_export import export, of_dtype
from fxopt.backends._onnx_file import OnnxFile
from fxopt.backends._onnx_graph import all_nodes, located
from fxopt.backends._onnx_int8 import is_quantized
from fxopt.errors import BackendUnavailable, FxoptError, SpecError, UnsupportedOp
from fxopt.program import Program
from fxopt.rewriter import Rewriter, fake_mode, infer
from fxopt.target import Target

aten = torch.ops.aten
_LOW, _WIDE = torch.bfloat16, torch.float32


class OpenVinoExecutable(Executable):
    """A model compiled by OpenVINO. Calls may run side by side, each with an infer request of its own."""

    def __init__(self, file: OnnxFile, compiled: Any, target: Target) -> None:
        """*compiled* is None where the target cannot run here."""
        self._file = file
        self._compiled = compiled
        self._target = target
        self._idle: list[Any] = []  # infer requests; append and pop are atomic

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat outputs for flat inputs.

        Raises:
            BackendUnavailable: compiled for a machine that this one is not.
            FxoptError: OpenVINO failed.
        """
        if self._compiled is None:
            raise BackendUnavailable(
                f"this model was compiled for target {self._target.name!r}, which OpenVINO cannot run here: "
                "save it with .save('model.onnx') and run that file there"
            )
        feed = [x.numpy() for x in self._file.interface.feed(inputs).values()]
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            request.infer(dict(enumerate(feed)), share_inputs=True)
            # The request writes its next results into the same memory.
            results = [torch.from_numpy(y.data.copy()) for y in request.output_tensors]
        except Exception as error:
            raise FxoptError(f"OpenVINO failed: {self._file.explain(error)}") from error
        self._idle.append(request)
        return self._file.interface.collect(results)

    def save(self, path: Path) -> None:
        """Write the .onnx file that OpenVINO was given; above 2 GB the weights go to ``path.data`` beside it.

        Raises:
            ArtifactError: another suffix, or the file cannot be written.
        """
        self._file.save(path)

    def constant(self, name: str) -> torch.Tensor:
        """The weight *name*, read from the file.

        Raises:
            KeyError: the file holds no such weight.
        """
        return self._file.constant(name)

    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._file.nbytes()


@dataclasses.dataclass(frozen=True)
class OpenVinoBackend(Backend):
    """Exports to ONNX and runs the file with OpenVINO on the CPU.

    int64 values are computed as int32 there, so those beyond 2^31 come out wrong. NaN does not survive every op (relu
    gives 0), and an index out of range gives some value where eager raises an error.

    Attributes:
        threads: threads for one call; None for as many as torch uses.
        precision: "f32" or "bf16" for the whole model; None for bf16 where the program computes in it, or is quantized
            and the target has bf16, else fp32.
    """

    name: ClassVar[str] = "openvino"
    requires: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript")
    install: ClassVar[str] = "'fxopt[openvino]'"
    threads: int | None = None
    precision: Literal["f32", "bf16"] | None = None

    def __post_init__(self) -> None:
        check_threads(self.threads)
        if self.precision not in ("f32", "bf16", None):
            raise SpecError(f"precision must be 'f32' or 'bf16', not {self.precision!r}")

    @property
    def exact(self) -> bool:
        """Not where bf16 was asked for: a program that is in bf16 itself is run as it says."""
        return self.precision != "bf16"

    def lower(self, program: Program, target: Target, inputs: Sequence[Any]) -> Executable:
        """The program as a compiled OpenVINO model; weights move from the program into an ONNX file.

        Raises:
            UnsupportedOp: ONNX or OpenVINO cannot express an op, or the model keeps state.
            BackendUnavailable: OpenVINO is not installed.
        """
        self.require()
        _refuse(program)
        low = _computes_low(program)
        # What a quantized model leaves in float has no use for more precision than its integers give it.
        fast = low or (is_quantized(program) and torch.bfloat16 in target.native_dtypes)
        if low:
            _widen(program)
        file = export(program)
        precision = self.precision or ("bf16" if fast else "f32")
        runs_here = target.runs_here and target.name != "cuda"
        return OpenVinoExecutable(file, self._compile(file, precision) if runs_here else None, target)

    def _compile(self, file: OnnxFile, precision: str) -> Any:
        import openvino

        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": self.threads or torch.get_num_threads(),
        }
        try:
            core = openvino.Core()
            return core.compile_model(core.read_model(str(file.path)), "CPU", options)
        except Exception as error:
            raise UnsupportedOp(f"OpenVINO cannot run this model: {file.explain(error)}") from error


# Shifts by more bits than there are, or of negative numbers; resizing with antialiasing.
_OTHERWISE = frozenset(
    "bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa".split()
)


def _refuse(program: Program) -> None:
    """What OpenVINO would take and compute otherwise than asked, or what its tensors cannot hold."""
    for leaf in (*program.signature.inputs, *program.signature.outputs):
        if leaf.dtype in (_LOW, torch.complex64, torch.complex128):
            raise UnsupportedOp(f"{leaf.name!r} is {leaf.dtype}, which cannot be passed to OpenVINO from Python")
    for node in all_nodes(program):
        if ops.packet(node) in _OTHERWISE:
            raise UnsupportedOp(f"OpenVINO computes {located(node)} otherwise than PyTorch: use another backend")
        if of_dtype(node, torch.float64):
            raise UnsupportedOp(f"OpenVINO computes float64 in float32: {located(node)}")
        if of_dtype(node, _LOW) and node.graph is not program.graph:
            raise UnsupportedOp(f"OpenVINO is given bf16 as fp32, which branches are not: {located(node)}")


def _computes_low(program: Program) -> bool:
    return any(of_dtype(node, _LOW) for node in program.graph.nodes)


def _widen(program: Program) -> None:
    """Every bf16 value of *program* as fp32, and the casts between the two gone."""
    rewriter, mode = Rewriter(program), fake_mode(program)
    for node in rewriter.nodes():
        if node.op == "get_attr" and of_dtype(node, _LOW):
            name = str(node.target)
            program.constants[name] = program.constants[name].to(_WIDE)
            node.meta["val"] = mode.from_tensor(program.constants[name], static_shapes=True)
        elif node.op == "call_function":
            node.args = tuple(_WIDE if a is _LOW else a for a in node.args)
            node.kwargs = {key: _WIDE if a is _LOW else a for key, a in node.kwargs.items()}
            if not isinstance(node.target, torch._ops.HigherOrderOperator):  # a branch has a graph, and no bf16
                node.meta["val"] = infer(node, mode)
            source = node.args[0] if node.args else None
            if ops.kind(node) == "cast" and isinstance(source, fx.Node) and of_dtype(source, node.meta["val"].dtype):
                rewriter.replace(node, source)
