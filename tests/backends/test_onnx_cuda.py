"""onnxruntime on GPUs: which providers are asked for, and that it never runs on the CPU without a word.

Without a GPU, a stub stands for onnxruntime's session: what it is told and says is a GPU's, what it computes the CPU's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fxopt

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
_Session = onnxruntime.InferenceSession


class Node:
    def __init__(self, op_type: str) -> None:
        self.op_type, self.name = op_type, ""


class Part:
    def __init__(self, ep_name: str, *ops: str) -> None:
        self.ep_name, self._ops = ep_name, ops

    def get_nodes(self) -> list[Node]:
        return [Node(op) for op in self._ops]


class Session:
    """A session whose providers are those of the class."""

    loads: ClassVar[list[str]] = [TENSORRT, CUDA, CPU]
    parts: ClassVar[list[Part]] = []
    asked: ClassVar[list[Any]] = []

    def __init__(self, path: str, options: Any, providers: list[Any], **_: Any) -> None:
        Session.asked = providers
        self._own = _Session(path, providers=[CPU])
        self.falls_back = True

    def get_providers(self) -> list[str]:
        asked = [one if isinstance(one, str) else one[0] for one in self.asked]
        return [one for one in self.loads if one in [*asked, CPU]]

    def disable_fallback(self) -> None:
        self.falls_back = False

    def get_provider_graph_assignment_info(self) -> list[Part]:
        return self.parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU and onnxruntime-gpu were here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def compiled(model: nn.Module, passes: str | None = None, **options: Any) -> fxopt.CompiledModel:
    data = [(X,)] if passes and "insert" in passes else None
    return fxopt.compile(
        model, target="sm_80", backend="onnx", example_inputs=(X,), passes=passes, calibration=data,
        backend_options=options,
    )  # fmt: skip


@NO_GPU
@pytest.mark.usefixtures("gpu")
def test_the_cuda_provider_runs_it() -> None:
    model = compiled(mlp())
    torch.testing.assert_close(model(X), mlp()(X))
    assert Session.asked == [(CUDA, {"device_id": "0"})]
    assert model.report.notes == (f"{CUDA} of onnxruntime",)


@NO_GPU
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("passes", "precision"),
    [
        (None, {}),
        ("cast-precision{dtype=fp16}", {"trt_fp16_enable": "True"}),
        ("insert-fake-quant", {"trt_int8_enable": "True"}),
    ],
)
def test_tensorrt_leaves_the_rest_to_the_cuda_provider(passes: str | None, precision: dict[str, str]) -> None:
    compiled(mlp(), passes, provider="tensorrt")
    assert Session.asked == [(TENSORRT, {"device_id": "0", **precision}), (CUDA, {"device_id": "0"})]


@NO_GPU
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("provider", "wanted"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_a_provider_that_cannot_be_loaded_is_no_reason_to_run_on_the_cpu(
    provider: str, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Session, "loads", [CUDA, CPU] if provider == "tensorrt" else [CPU])
    model = compiled(mlp(), provider=provider)
    model.save(tmp_path / "m.onnx")
    with pytest.raises(fxopt.BackendUnavailable, match=rf"could not load {wanted} and would run on .*m\w+\.onnx"):
        model(X)


@NO_GPU
@pytest.mark.usefixtures("gpu")
def test_nodes_on_the_cpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "parts", [Part(CUDA, "Gemm"), Part(CPU, "Shape"), Part(CPU, "NonZero", "NonZero")])
    assert compiled(mlp()).report.notes == (f"{CUDA} of onnxruntime", "on the CPU: NonZero")


@NO_GPU
@pytest.mark.usefixtures("gpu")
def test_without_onnxruntime_gpu_there_is_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    model = compiled(mlp())
    model.save(tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    with pytest.raises(fxopt.BackendUnavailable, match=f"no {CUDA} here .pip install onnxruntime-gpu."):
        model(X)
    model.save(tmp_path / "m.fxopt")
    with pytest.raises(fxopt.BackendUnavailable, match=f"no {CUDA} here"):
        fxopt.load(tmp_path / "m.fxopt")(X)


@NO_GPU
def test_without_a_gpu_that_is_said_first() -> None:
    with pytest.raises(fxopt.BackendUnavailable, match="no CUDA device is here"):
        compiled(mlp(), provider="tensorrt")(X)


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(fxopt.FxoptError, match="provider must be 'cuda' or 'tensorrt'"):
        compiled(mlp(), provider="rocm")


@NO_GPU
def test_int8_is_symmetric_as_tensorrt_wants_it(tmp_path: Path) -> None:
    compiled(mlp(), "insert-fake-quant").save(tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(nodes) > 4
    for node in nodes:
        zero = values[node.input[2]]
        assert zero.dtype == "int8"
        assert not zero.any()


@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="no onnxruntime-gpu")
@GPU
def test_a_gpu_computes_the_same() -> None:
    model = compiled(mlp())
    torch.testing.assert_close(model(X), mlp()(X), rtol=1e-3, atol=1e-3)
    on_gpu = fxopt.compile(mlp().cuda(), target="cuda", backend="onnx", example_inputs=(X.cuda(),))
    result = on_gpu(X.cuda())
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), mlp()(X), rtol=1e-3, atol=1e-3)
