"""OpenVINO as the engine, over the same ONNX file that the onnx backend makes.

    program ──widen──▶ fp32 graph ──export──▶ ONNX file ──compile_model(precision)──▶ OpenVinoExecutable

OpenVINO picks the precision of each operation itself, from one hint for the whole model. A program that computes in
bf16 is therefore handed over in fp32 (its weights rounded already) together with the hint bf16: that is as fast as
OpenVINO gets, while explicit casts are not even valid around an ONNX convolution before opset 22. Without a hint it
would silently use bf16 wherever the machine has it, so fp32 is asked for by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxopt import ops
from fxopt.backend import Backend, Executable, Payload, check_threads
from fxopt.backends._onnx_executable import FileExecutable, runs_here
from fxopt.backends._onnx_export import export, of_dtype
from fxopt.backends._onnx_file import OnnxFile
from fxopt.backends._onnx_graph import all_nodes, located
from fxopt.backends._onnx_int8 import is_quantized
from fxopt.backends._openvino_integers import integer_bounds
from fxopt.errors import ArtifactError, SpecError, UnsupportedOp
from fxopt.program import Program
from fxopt.rewriter import Rewriter, fake_mode, infer
from fxopt.target import Target

aten = torch.ops.aten
_LOW, _WIDE = torch.bfloat16, torch.float32


class OpenVinoExecutable(FileExecutable):
    """A model compiled by OpenVINO. Calls may run side by side, each with an infer request of its own."""

    engine: ClassVar[str] = "OpenVINO"

    def __init__(self, file: OnnxFile, target: Target, compiled: Any, precision: str) -> None:
        """*compiled* is None where the target cannot run here."""
        super().__init__(file, target, runs_here=compiled is not None)
        self._compiled = compiled
        self._precision = precision
        self._idle: list[Any] = []  # infer requests; append and pop are atomic

    def payload(self) -> Payload:
        """The file, how to call it, and the precision that OpenVINO was told."""
        plain = super().payload()
        return dataclasses.replace(plain, facts={**plain.facts, "precision": self._precision})

    def _run(self, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        request.infer(dict(enumerate(x.numpy() for x in feed.values())), share_inputs=True)
        # The request writes its next results into the same memory.
        results = [torch.from_numpy(y.data.copy()) for y in request.output_tensors]
        self._idle.append(request)
        return results


@dataclasses.dataclass(frozen=True)
class OpenVinoBackend(Backend):
    """Exports to ONNX and runs the file with OpenVINO on the CPU.

    NaN does not survive every op there (relu gives 0). An index out of range that the model computes itself gives some
    value, where eager raises an error; one in an input is refused, and so are integers that do not fit 32 bits.

    Attributes:
        threads: threads for one call; None for as many as torch uses.
        precision: "f32" or "bf16" for the whole model; None for bf16 where the program computes in it, or was quantized
            after training and the target has bf16, else fp32.
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
        bounds = integer_bounds(program)
        low = _computes_low(program)
        # What quantization leaves in float has no use for more precision than its integers give it, unless training has
        # adapted to them: then the engine computes what was trained.
        rounded = is_quantized(program) and not any(node.meta.get(ops.TRAINED) for node in program.graph.nodes)
        fast = low or (rounded and torch.bfloat16 in target.native_dtypes)
        if low:
            _widen(program)
        file = export(program, bounds=bounds, for_openvino=True)  # the same kernels, and nothing is rounded
        precision = self.precision or ("bf16" if fast else "f32")
        return self._executable(file, target, precision)

    def restore(self, folder: TemporaryDirectory[str], facts: Mapping[str, Any], target: Target) -> Executable:
        """The model of an artifact.

        Raises:
            ArtifactError: its file is not sound. UnsupportedOp: this OpenVINO cannot run it.
        """
        if facts["precision"] not in ("f32", "bf16"):
            raise ArtifactError(f"OpenVINO has no precision {facts['precision']!r:.40}")
        return self._executable(OnnxFile.restored(folder, facts), target, facts["precision"])

    def _executable(self, file: OnnxFile, target: Target, precision: str) -> Executable:
        return OpenVinoExecutable(
            file, target, self._compile(file, precision) if runs_here(target) else None, precision
        )

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


# Shifts by more bits than there are, or of negative numbers; resizing with antialiasing; Fourier transforms that are
# one-sided, inverse or of several dimensions.
_OTHERWISE = frozenset(
    "bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "_fft_r2c _fft_c2c _fft_c2r fft_rfft fft_rfft2 fft_rfftn fft_irfft fft_irfft2 fft_irfftn fft_ifft fft_fft2 "
    "fft_fftn fft_ifft2 fft_ifftn fft_hfft fft_hfft2 fft_hfftn fft_ihfft fft_ihfft2 fft_ihfftn".split()
)


def _refuse(program: Program) -> None:
    """What OpenVINO would take and compute otherwise than asked, or what its tensors cannot hold."""
    for leaf in (*program.signature.inputs, *program.signature.outputs):
        if leaf.dtype in (_LOW, torch.complex64, torch.complex128):
            raise UnsupportedOp(f"{leaf.name!r} is {leaf.dtype}, which cannot be passed to OpenVINO from Python")
    for node in all_nodes(program):
        if ops.packet(node) == "dequantize_per_channel_group" and _has_odd_groups(node):
            raise UnsupportedOp(
                f"OpenVINO reads weights in several groups of odd size wrongly: {located(node)}. Let insert-fake-quant "
                "choose the scheme (scheme=auto)"
            )
        if ops.packet(node) in _OTHERWISE or (ops.packet(node) == "fft_fft" and _is_complex(node.args[0])):
            raise UnsupportedOp(f"OpenVINO computes {located(node)} otherwise than PyTorch: use another backend")
        if of_dtype(node, torch.float64):
            raise UnsupportedOp(f"OpenVINO computes float64 in float32: {located(node)}")
        if of_dtype(node, _LOW) and node.graph is not program.graph:
            raise UnsupportedOp(f"OpenVINO is given bf16 as fp32, which branches are not: {located(node)}")


def _has_odd_groups(dequantize: fx.Node) -> bool:
    a = ops.arguments(dequantize)
    size = int(a["group_size"])
    return size % 2 == 1 and int(a["input"].meta["val"].shape[-1]) > size


def _is_complex(node: Any) -> bool:
    return isinstance(node, fx.Node) and bool(node.meta["val"].is_complex())


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
