"""Quantized models on onnxruntime and OpenVINO: integer kernels, seen in the graphs that the engines run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import fxopt


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.a = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.max_pool2d(self.stem(x).relu(), 2)
        x = F.relu6(self.depthwise(x))
        x = (self.a(x) + x).relu()
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.norm2, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def compiled(model: nn.Module, x: torch.Tensor, options: str = "", backend: str = "onnx", **more: Any) -> Any:
    torch.manual_seed(0)
    data = [(torch.randn_like(x),) for _ in range(4)]
    spec = f"insert-fake-quant{{{options}}}"
    return fxopt.compile(model.eval(), example_inputs=(x,), passes=spec, calibration=data, backend=backend, **more)


def kernels(model: Any, folder: Path) -> Counter[str]:
    """Ops of the graph that onnxruntime makes of the saved file."""
    model.save(folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), 0))


def test_every_convolution_and_linear_of_a_cnn_is_integer(tmp_path: Path) -> None:
    model, x = Cnn(), torch.randn(2, 3, 32, 32)
    found = kernels(compiled(model, x), tmp_path)
    assert found["QLinearConv"] == 3
    assert found["QGemm"] == found["QLinearAdd"] == found["QLinearGlobalAveragePool"] == 1
    assert found["QuantizeLinear"] == 1, "the input is quantized, then everything stays integer"
    assert not {"Conv", "FusedConv", "Gemm", "DequantizeLinear"} & set(found)


def test_every_linear_of_a_transformer_block_is_integer(tmp_path: Path) -> None:
    found = kernels(compiled(Block(), torch.randn(2, 8, 64)), tmp_path)
    assert found["QGemm"] == 4
    assert not {"Gemm", "FusedGemm", "DequantizeLinear"} & set(found)


def test_dynamic_linears_are_one_kernel_each(tmp_path: Path) -> None:
    model, x = Block(), torch.randn(2, 8, 64)
    result = compiled(model, x, "activations=dynamic")
    found = kernels(result, tmp_path)
    assert found["DynamicQuantizeMatMul"] == 4
    assert not {"Gemm", "DynamicQuantizeLinear"} & set(found)
    with torch.no_grad():
        assert cosine(result(3 * x), model(3 * x)) > 0.999


def test_int4_weights_take_half_a_byte(tmp_path: Path) -> None:
    model, x = Block(), torch.randn(2, 8, 64)
    result = compiled(model, x, "activations=none,weights=int4,group_size=32")
    found = kernels(result, tmp_path)
    assert found["MatMulNBits"] == 4
    weights = sum(m.weight.numel() for m in (model.qkv, model.out, model.up, model.down))
    file = onnx.load(tmp_path / "model.onnx")
    packed = [t for t in file.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert sum(len(t.raw_data) for t in packed) == weights // 2
    with torch.no_grad():
        assert cosine(result(x), model(x)) > 0.99


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize("options", ["", "activations=dynamic", "activations=none"])
def test_engines_agree_with_the_float_model(backend: str, options: str) -> None:
    for model, x in ((Cnn(), torch.randn(2, 3, 32, 32)), (Block(), torch.randn(2, 8, 64))):
        with torch.no_grad():
            assert cosine(compiled(model, x, options, backend)(x), model(x)) > 0.997


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_a_dynamic_batch(backend: str) -> None:
    model, x = Cnn(), torch.randn(4, 3, 32, 32)
    result = compiled(model, x, backend=backend, dynamic_shapes={"x": {0: "batch"}})
    y = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        assert cosine(result(y), model(y)) > 0.997


def test_the_file_is_about_a_quarter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    compiled(model, torch.randn(4, 256)).save(tmp_path / "m.onnx")
    floats = sum(p.numel() * 4 for p in model.parameters())
    assert (tmp_path / "m.onnx").stat().st_size <= 0.27 * floats


class Tied(nn.Module):
    """Embedding and classifier share a table, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(4000, 128), nn.LayerNorm(128)
        self.inner = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))
        self.head = nn.Linear(128, 4000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embedding(ids)
        return self.head(self.norm(x + self.inner(x)))


@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
def test_a_tied_table_is_stored_once(activations: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = Tied().eval(), tmp_path / "m.onnx"
    data = [(torch.randint(0, 4000, (1, 16)),) for _ in range(4)]
    sizes = []
    for spec in ("", f"insert-fake-quant{{activations={activations}}}"):
        result = fxopt.compile(model, example_inputs=data[0], passes=spec, calibration=data, backend="onnx")
        result.save(path)
        sizes.append(path.stat().st_size)
        graph = onnx.load(path).graph
        read = {name for node in graph.node for name in node.input}
        assert {one.name for one in graph.initializer} <= read, "nothing dead is stored"
        assert cosine(result(*data[1]), model(*data[1])) > 0.999
    assert sizes[1] <= 0.27 * sizes[0]


def test_openvino_runs_every_convolution_in_integers() -> None:
    pytest.importorskip("openvino")
    result = compiled(Cnn(), torch.randn(2, 3, 32, 32), backend="openvino")
    runtime = result._current("test").executable._compiled.get_runtime_model()
    kinds = [
        (op.get_rt_info()["layerType"].astype(str), op.get_rt_info()["runtimePrecision"].astype(str))
        for op in runtime.get_ops()
    ]
    heavy = [precision for kind, precision in kinds if kind in ("Convolution", "FullyConnected")]
    assert len(heavy) == 4
    assert set(heavy) == {"u8"}


def test_biases_are_integers_where_the_kernel_adds_them_so(tmp_path: Path) -> None:
    model, x = Cnn(), torch.randn(2, 3, 32, 32)
    found = {}
    for backend in ("onnx", "openvino"):
        compiled(model, x, backend=backend).save(tmp_path / f"{backend}.onnx")
        stored = onnx.load(tmp_path / f"{backend}.onnx").graph.initializer
        found[backend] = [one.name for one in stored if one.data_type == onnx.TensorProto.INT32]
    assert len(found["onnx"]) == 4
    assert not found["openvino"]


def test_cuda_gets_what_tensorrt_reads(tmp_path: Path) -> None:
    """Its rules for explicit quantization: int8, zero points of 0, weights by channel, floats for biases."""
    model = compiled(Cnn(), torch.randn(2, 3, 16, 16), target="cuda")
    model.save(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert constants[node.input[2]].dtype == "int8"
            assert not constants[node.input[2]].any()
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            x, weight, *bias = node.input
            assert made[x].op_type == made[weight].op_type == "DequantizeLinear"
            assert constants[made[weight].input[1]].shape == (len(constants[made[weight].input[0]]),)
            assert all(constants[name].dtype == "float32" for name in bias)
    [add] = [node for node in graph.node if node.op_type == "Add"]
    assert sorted(made[name].op_type for name in add.input) == ["Conv", "DequantizeLinear"]


def beyond_calibration(kind: Any, options: str, backend: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A quantized model, inputs in the range of its calibration data that give more than any of them, and that result.

    One convolution hands on what it reads; in the other, of *kind*, each product is positive for these inputs.
    """
    torch.manual_seed(0)
    conv, last = (nn.Conv3d if kind is nn.Conv3d else nn.Conv2d)(16, 16, 1, bias=False), kind(16, 4, 1)
    nn.init.dirac_(conv.weight)
    model = nn.Sequential(conv, nn.ReLU(), last).eval()
    sizes = (5,) * (conv.weight.dim() - 2)
    data = [(torch.rand(2, 16, *sizes),) for _ in range(4)]
    column = last.weight[:, 0] if kind is nn.ConvTranspose2d else last.weight[0]
    x = (column > 0).float().view(1, 16, *([1] * len(sizes))).expand(2, 16, *sizes).detach().contiguous()
    spec = f"insert-fake-quant{{{options}}}"
    result = fxopt.compile(model, example_inputs=data[0], passes=spec, calibration=data, backend=backend)
    with torch.no_grad():
        return result, x, model(x)


KEEPS = [
    ("torch", nn.Conv3d, ""),
    ("openvino", nn.Conv3d, ""),
    ("openvino", nn.ConvTranspose2d, ""),
    ("onnx", nn.Conv3d, "overrides=['2=float']"),
]


@pytest.mark.parametrize(("backend", "kind", "options"), KEEPS)
def test_an_output_beyond_the_calibration_data_is_not_clipped(backend: str, kind: Any, options: str) -> None:
    result, x, expected = beyond_calibration(kind, options, backend)
    assert (result(x) - expected).abs().max() < 0.02 * expected.abs().max()
    assert not clipped(result)


def clipped(result: Any) -> list[str]:
    """What the report says of outputs that are."""
    return [note for one in result.report.passes for note in one.notes if "is clipped" in note]


def test_the_report_says_where_an_output_is_clipped() -> None:
    """A convolution of onnxruntime gives integers only, also behind a view."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    x = torch.randn(2, 3, 4, 4)
    [note] = clipped(compiled(model, x))
    assert note.startswith("output 'output' is clipped to what calibration saw, -")
    assert not clipped(compiled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softplus()), x))


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose2d])
def test_onnxruntime_computes_what_the_file_says(kind: Any, tmp_path: Path) -> None:
    """Also where its integer kernel has to clip an output, as the quantize in the file does."""
    result, x, expected = beyond_calibration(kind, "", "onnx")
    result.save(tmp_path / "m.onnx")
    file = ReferenceEvaluator(str(tmp_path / "m.onnx"))
    [said] = file.run(None, {file.input_names[0]: x.numpy()})
    assert (result(x) - torch.from_numpy(said)).abs().max() < 0.01 * expected.abs().max()
