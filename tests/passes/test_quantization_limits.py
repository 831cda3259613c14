"""insert-fake-quant where data or options leave nothing to go by: a reason, a warning or an error, never silence."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import SpecError, VerifyError

X = (torch.randn(2, 256, generator=torch.Generator().manual_seed(0)),)

FLOAT_FIRST = """
import torch, fxopt
from torch import nn
x = torch.randn(4, 256)
model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
fxopt.compile(model, example_inputs=(x,), backend="onnx")
fxopt.compile(model, example_inputs=(x,), backend="onnx", passes="insert-fake-quant", calibration=[(x,)] * 3)
"""


def compiled(model: nn.Module, options: str, inputs: Any = X, **more: Any) -> fxopt.CompiledModel:
    spec = f"insert-fake-quant{{{options}}}"
    return fxopt.compile(model.eval(), example_inputs=inputs, passes=spec, backend="onnx", **more)


@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
def test_a_vector_is_no_matrix(backend: str, activations: str) -> None:
    model, x = linears(), torch.randn(256)
    spec = f"insert-fake-quant{{activations={activations}}}"
    data = [(torch.randn(256),) for _ in range(4)]
    result = fxopt.compile(model, example_inputs=(x,), passes=spec, calibration=data, backend=backend)(x)
    assert result.shape == (10,)
    assert torch.nn.functional.cosine_similarity(result, model(x), 0) > 0.99


@pytest.mark.parametrize("columns", [33, 35, 77])
def test_openvino_and_groups_of_odd_size(columns: int) -> None:
    """Its kernel reads other memory; a group that is a whole row is right."""
    model, x = nn.Sequential(nn.Linear(columns, 64)).eval(), torch.randn(5, columns)

    def layer(options: str, backend: str = "openvino") -> Any:
        spec = f"insert-fake-quant{{activations=none,weights=int4{options}}}"
        compiled = fxopt.compile(model, example_inputs=(x,), passes=spec, backend=backend)
        assert torch.nn.functional.cosine_similarity(compiled(x).flatten(), model(x).flatten(), 0) > 0.98
        return compiled.report.quantization.layers[0]

    assert layer("").mode == "weight-only"
    assert "no even group" in layer(",group_size=32").reason
    assert layer(",group_size=32", "onnx").mode == "weight-only"
    with pytest.raises(fxopt.UnsupportedOp, match="odd size"):
        layer(",group_size=32,scheme=onnxruntime")


def test_int4_weights_come_back_from_the_file_as_they_went_in() -> None:
    spec = "insert-fake-quant{activations=none,weights=int4}"
    result = fxopt.compile(linears(), example_inputs=X, passes=spec, backend="onnx", verify=False)
    with torch.no_grad():
        [again] = result.graph(*X)
    assert torch.nn.functional.cosine_similarity(again.flatten(), result(*X).flatten(), 0) > 0.9999


@pytest.mark.parametrize("name", ["ada-round", "gptq", "bias-correction"])
def test_a_method_without_anything_quantized_says_so(name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} does nothing: no weight is quantized"):
        fxopt.compile(linears(), example_inputs=X, passes=name, backend="torch", calibration=[X] * 3)


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(64, 64), kind(64, 64, batch_first=True), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(self.inner(self.before(x).relu())[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_is_a_wall(kind: Any) -> None:
    torch.manual_seed(0)
    model, data = Recurrent(kind).eval(), [(torch.randn(4, 20, 64),) for _ in range(8)]
    for backend in ("torch", "onnx"):
        result = fxopt.compile(
            model, example_inputs=data[0], passes="insert-fake-quant", calibration=data, backend=backend
        )
        graph = result.graph.graph
        [layer] = [n for n in graph.nodes if n.op == "call_function" and "input" in str(n.target)]
        assert all("uint8" not in n.name and "dequantize" not in n.name for n in layer.all_input_nodes[1:])
        with torch.no_grad():
            assert (
                torch.nn.functional.cosine_similarity(result(*data[1]).flatten(), model(*data[1]).flatten(), 0) > 0.9998
            )


@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize(
    "options", ["", "activations=dynamic", "activations=none", "activations=none,weights=int4,group_size=32"]
)
def test_the_graph_of_a_quantized_model_runs(options: str, backend: str) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)), [(torch.randn(64, 128),)] * 3
    spec = f"insert-fake-quant{{{options}}}"
    result = fxopt.compile(model, example_inputs=data[0], passes=spec, calibration=data, backend=backend)
    [again] = result.graph(*data[0])
    assert torch.nn.functional.cosine_similarity(again.flatten(), result(*data[0]).flatten(), 0) > 0.9999


class Table(nn.Module):
    """One column of the table, which the output does not depend on, makes the others too small for int8."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(500, 64), nn.Linear(63, 10)
        with torch.no_grad():
            self.table.weight[:, 0] *= 1000

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.table(ids)[..., 1:].mean(1))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_tables_count_in_the_check_of_outputs(backend: str) -> None:
    torch.manual_seed(0)
    model, data = Table().eval(), [(torch.randint(0, 500, (8, 6)),) for _ in range(4)]

    def run(on_loss: str) -> Any:
        spec = f"insert-fake-quant{{on_loss={on_loss}}}"
        return fxopt.compile(model, example_inputs=data[0], passes=spec, calibration=data, backend=backend)

    with pytest.raises(VerifyError, match="lost more"):
        run("raise")
    result = run("repair")
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(result(*data[1]).flatten(), model(*data[1]).flatten(), 0) > 0.999
    assert any("put back" in layer.reason for layer in result.report.quantization.layers if layer.kind == "embedding")


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_batch_may_be_infinite_also_not_one_kept_back(bad: float, index: int) -> None:
    data = [(torch.randn(2, 256),) for _ in range(5)]
    data[index][0][0, 0] = bad
    with pytest.raises(fxopt.InputError, match="calibration: an input is not finite"):
        compiled(linears(), "", calibration=data)


def test_a_channel_that_calibration_never_saw_is_not_smoothed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight")[:, 4:8] /= 50
    data = [(torch.randn(32, 256),) for _ in range(4)]
    for (x,) in data:
        x[:, :4] = 0
        x[:, 4:8] *= 50  # others stand out
    spec = "smooth-quant,insert-fake-quant"
    result = fxopt.compile(model, example_inputs=data[0], passes=spec, calibration=data, backend="onnx")
    [record] = [one for one in result.report.passes if one.name == "smooth-quant"]
    assert record.edits
    factors = {name: value for name, value in result.graph.named_buffers() if "smoothing" in name}
    assert factors
    assert all(bool((value[:4] == 1).all()) for value in factors.values())
    few = fxopt.compile(model, example_inputs=(torch.randn(1, 256),), passes=spec, calibration=[data[0][0][:1]])
    [record] = [one for one in few.report.passes if one.name == "smooth-quant"]
    assert not record.edits
    assert any("too few" in note for note in record.notes)


class Pooled(nn.Module):
    """As the heads of vision transformers and mixers are, with a few gains that stand out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 100)
        with torch.no_grad():
            self.norm.weight[:3] *= 30

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("batch", [1, 8])
def test_openvino_and_factors_of_channels_before_a_matrix_is_quantized(batch: int) -> None:
    """It would read the ranges of other channels, or other memory."""
    torch.manual_seed(1)
    chain = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    with torch.no_grad():
        chain.get_parameter("0.bias")[:3] = 30
    for model, shape in ((Pooled().eval(), (batch, 4, 128)), (chain, (batch, 128))):
        data = [(torch.randn(shape),) for _ in range(32)]
        result = fxopt.compile(
            model, example_inputs=data[0], passes="insert-fake-quant", calibration=data, backend="openvino"
        )
        with torch.no_grad():
            assert (
                torch.nn.functional.cosine_similarity(result(*data[1]).flatten(), model(*data[1]).flatten(), 0) > 0.998
            )


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10, bias=False))


def test_int8_after_float_in_one_process() -> None:
    """In a process of its own: what an earlier test imports would hide it."""
    subprocess.run([sys.executable, "-c", FLOAT_FIRST], check=True, timeout=300)


def test_an_input_that_was_zero_throughout_is_not_quantized() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)

        def forward(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return torch.tanh(self.a(x) + self.b(h))

    torch.manual_seed(0)
    model, zeros = Cell(), torch.zeros(2, 256)
    data = [(torch.randn(2, 256), zeros) for _ in range(6)]
    result = compiled(model, "", (*X, zeros), calibration=data)
    reasons = {layer.path: layer.reason for layer in result.report.quantization.layers}
    assert "zero in all" in reasons["b"]
    assert reasons["a"] == ""
    h = torch.randn(2, 256)
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(result(*X, h).flatten(), model(*X, h).flatten(), 0) > 0.999


def test_weights_alone_are_checked_on_the_example_inputs() -> None:
    model = linears()
    with torch.no_grad():
        model.get_parameter("0.weight")[:, ::64] *= 300
        model.get_parameter("2.weight")[:, ::128] *= 200
    options = "activations=none,weights=int4,cosine=0.9999"
    with pytest.warns(UserWarning, match="lost more than cosine"):
        assert compiled(model, options).report.quantization.outputs
    with pytest.raises(VerifyError, match="lost more"):
        compiled(model, f"{options},on_loss=raise")


def test_inputs_without_a_divisor_stay_in_float() -> None:
    model = nn.Sequential(nn.Linear(256, 257), nn.ReLU(), nn.Linear(257, 16))
    layers = compiled(model, "activations=none,weights=int4").report.quantization.layers
    assert [layer.mode for layer in layers] == ["weight-only", "float"]
    assert "divides its 257 inputs" in layers[1].reason


@pytest.mark.parametrize("options", ["group_size=0", "group_size=-1", "cosine=2.0"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(SpecError):
        compiled(linears(), options, calibration=[X] * 3)


def test_overrides_that_fit_nothing_are_named() -> None:
    with pytest.warns(UserWarning, match="'clasifier.*' fits no conv"):
        compiled(linears(), "overrides=['clasifier*=float']", calibration=[X] * 3)


def test_a_model_of_another_dtype_is_said_not_to_be_quantized() -> None:
    with pytest.warns(UserWarning, match="nothing is quantized.*only float32"):
        compiled(linears().double(), "", (X[0].double(),), calibration=[(X[0].double(),)] * 3)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 0.0])
def test_a_training_batch_that_says_nothing_leaves_the_ranges(bad: float) -> None:
    prepared = fxopt.prepare(linears(), X)
    prepared(torch.full_like(X[0], bad) if bad == 0 else torch.where(X[0] > 2, bad, X[0]))
    for _ in range(8):
        prepared(*X)
    prepared.eval()
    with torch.no_grad():
        assert torch.isfinite(prepared(*X)).all()
        assert torch.nn.functional.cosine_similarity(prepared(*X).flatten(), linears()(*X).flatten(), 0) > 0.99


@pytest.mark.parametrize("size", [1e-6, 1e-9])
@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
def test_tiny_inputs_beside_biases_that_drown_them(backend: str, size: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    data = [(size * torch.randn(32, 128),) for _ in range(6)]
    result = fxopt.compile(model, example_inputs=data[0], passes="insert-fake-quant", calibration=data, backend=backend)
    torch.testing.assert_close(result(*data[1]), model(*data[1]), rtol=1e-2, atol=1e-2)
    [first, second] = result.report.quantization.layers
    assert second.mode == "static"
    assert ("beyond 32 bits" in first.reason) == (backend == "onnx")


def test_outputs_that_are_zero_are_compared_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU()).eval()
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(-100)
    data = [(torch.randn(32, 256),) for _ in range(6)]
    result = fxopt.compile(model, example_inputs=data[0], passes="insert-fake-quant", calibration=data, backend="torch")
    [output] = result.report.quantization.outputs
    assert output.cosine == 1


class ByHand(nn.Module):
    """Weights that no linear holds."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 64, 32) / 8)
        self.up = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.einsum("bi,eio->beo", self.up(x), self.experts)


def test_weights_that_are_no_linears_have_a_row_and_a_reason() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(64, 64),) for _ in range(4)]
    result = fxopt.compile(ByHand().eval(), example_inputs=data[0], passes="insert-fake-quant", calibration=data)
    rows = {layer.weight: layer for layer in result.report.quantization.layers}
    assert rows["experts"].mode == "float"
    assert "no int8 kernel" in rows["experts"].reason
    assert len(result.report.quantization.layers) == 2  # the linear's quantized weight is none of these
