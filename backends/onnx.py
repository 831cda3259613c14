"""ONNX as the product, onnxruntime as the engine.

    program ──export──▶ ONNX file ──InferenceSession──▶ OnnxExecutable        .save("model.onnx") writes the file

Tensors go in and come out without a copy. For a machine that this one is not, the file is all there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import torch
from torch.utils.dlpack import from_dlpack

from fxopt import ops
from fxopt.backend import Backend, Executable, check_threads
from fxopt.backends import _onnx_cuda
from fxopt.backends._onnx_executable import FileExecutable, runs_here
from fxopt.backends._onnx_export import export, of_dtype
from fxopt.backends._onnx_file import OnnxFile
from fxopt.backends._onnx_graph import all_nodes, located
from fxopt.errors import SpecError, UnsupportedOp
from fxopt.program import Program
from fxopt.target import Target

_PROVIDER = "CPUExecutionProvider"
_SLOWER = ["SkipLayerNormFusion"]  # its kernel takes six times as long as Add and LayerNormalization
_NO_BF16 = {"conv", "conv_transpose", "linear", "matmul", "attention", "activation", "norm", "batch_norm"}


class OnnxExecutable(FileExecutable):
    """A session of onnxruntime over an exported file. Calls may run side by side."""

    engine: ClassVar[str] = "onnxruntime"

    def __init__(self, file: OnnxFile, target: Target, session: Any, obstacle: str = "") -> None:
        """*session* is None where the target cannot run here, or something is missing for it."""
        super().__init__(file, target, runs_here=session is not None, obstacle=obstacle)
        self._session = session
        if session is not None:
            self._names = [output.name for output in session.get_outputs()]
            kinds = [value.type for value in (*session.get_inputs(), *session.get_outputs())]
            self._plain = not any(kind == "tensor(bfloat16)" or "float8" in kind for kind in kinds)

    def _run(self, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        if any(x.is_cuda for x in feed.values()):
            return _onnx_cuda.run(self._session, self._names, feed)
        if not self._plain:
            return self._run_values(feed)
        outputs = self._session.run(self._names, {name: x.numpy() for name, x in feed.items()})
        return [torch.from_numpy(y) for y in outputs]

    def _run_values(self, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The way for dtypes that numpy does not know (bfloat16, float8)."""
        values = {name: _ort_value(x) for name, x in feed.items()}
        outputs = self._session.run_with_ort_values(self._names, values)
        return [_from_ort_value(y) for y in outputs]


def _ort_value(x: torch.Tensor) -> Any:
    import onnxruntime
    from torch.onnx._internal.exporter._core import torch_dtype_to_onnx_dtype

    if x.dtype is not torch.bfloat16 and "float8" not in str(x.dtype):
        return onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
    bits = x.view(torch.uint16 if x.element_size() == 2 else torch.uint8).numpy()
    kind = torch_dtype_to_onnx_dtype(x.dtype)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(kind))


def _from_ort_value(y: Any) -> torch.Tensor:
    if y.data_type() == "tensor(bfloat16)" or "float8" in y.data_type():
        result: torch.Tensor = from_dlpack(y._get_c_value())
        return result
    return torch.from_numpy(y.numpy())


@dataclasses.dataclass(frozen=True)
class OnnxBackend(Backend):
    """Exports to ONNX and runs the file with onnxruntime, on the CPU or for target "cuda" on a GPU.

    Attributes:
        threads: threads for one call; None for as many as torch uses.
        opset: version of the ONNX operators, 18 to 23; None for 20, or 22 where something is bf16.
        provider: what of onnxruntime runs it for target "cuda": "cuda", or "tensorrt" and "cuda" for what that leaves.
    """

    name: ClassVar[str] = "onnx"
    requires: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    install: ClassVar[str] = "onnx onnxscript onnxruntime"
    threads: int | None = None
    opset: int | None = None
    provider: Literal["cuda", "tensorrt"] = "cuda"

    def __post_init__(self) -> None:
        check_threads(self.threads)
        if self.provider not in _onnx_cuda.PROVIDERS:
            raise SpecError(f"provider must be 'cuda' or 'tensorrt', not {self.provider!r}")

    def lower(self, program: Program, target: Target, inputs: Sequence[Any]) -> Executable:
        """The program as a session over an ONNX file; weights move from the program into the file.

        Raises:
            UnsupportedOp: an op has no ONNX translation or onnxruntime no kernel for it, or the model keeps state.
            BackendUnavailable: onnxruntime is not installed.
        """
        self.require()
        here = runs_here(target)
        if here:
            _refuse_bf16(program)
        file = export(program, self.opset, explicit=target.name == "cuda")
        return self._executable(file, target)

    def restore(self, folder: TemporaryDirectory[str], facts: Mapping[str, Any], target: Target) -> Executable:
        """The model of an artifact.

        Raises:
            ArtifactError: its file is not sound. UnsupportedOp: this onnxruntime cannot run it.
        """
        file = OnnxFile.restored(folder, facts)
        return self._executable(file, target)

    def _executable(self, file: OnnxFile, target: Target) -> OnnxExecutable:
        if target.name != "cuda" or not target.runs_here:
            return OnnxExecutable(file, target, self._session(file) if runs_here(target) else None)
        opened = _onnx_cuda.opened(file, self.provider, torch.cuda.current_device())
        executable = OnnxExecutable(file, target, opened.session, opened.obstacle)
        executable.notes = opened.notes
        return executable

    def _session(self, file: OnnxFile) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads or torch.get_num_threads()
        options.log_severity_level = 4  # what fails is raised
        try:
            return onnxruntime.InferenceSession(
                str(file.path), options, providers=[_PROVIDER], disabled_optimizers=_SLOWER
            )
        except Exception as error:
            raise UnsupportedOp(f"onnxruntime cannot run this model: {file.explain(error)}") from error


def _refuse_bf16(program: Program) -> None:
    """Say before exporting that the CPU provider can move bf16 values, but not compute with them."""
    nodes = [n for n in all_nodes(program) if ops.kind(n) in _NO_BF16 and of_dtype(n, torch.bfloat16)]
    if nodes:
        more = f" and {len(nodes) - 1} more ops" if len(nodes) > 1 else ""
        raise UnsupportedOp(
            f"onnxruntime has no bf16 kernel on the CPU for {located(nodes[0])}{more}: use backend='torch' or "
            "'openvino' for bf16"
        )
