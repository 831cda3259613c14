"""The onnx backend: readable files, like eager for every kind of input and output."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends.onnx import OnnxBackend
from fxopt.capture import capture
from fxopt.fused import CONV, LINEAR
from tests.backends.onnx_models import X86, ConvRelu, assert_like_eager, lower, ops_of, saved
from tools import models


def test_names_are_the_users(tmp_path: Path) -> None:
    executable, captured = lower(ConvRelu(), (torch.randn(2, 3, 8, 8),))
    assert_like_eager(executable, captured)
    graph = saved(executable, tmp_path).graph
    assert [i.name for i in graph.input] == ["image"]
    assert [o.name for o in graph.output] == ["logits"]
    assert {"conv.weight", "head.weight", "norm.running_mean"} <= {i.name for i in graph.initializer}


def test_file_runs_in_a_plain_session_and_tells_nothing_of_this_machine(tmp_path: Path) -> None:
    executable, captured = lower(ConvRelu(), (torch.randn(2, 3, 8, 8),))
    proto = saved(executable, tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {"image": captured.inputs[0].numpy()})
    np.testing.assert_allclose(logits, captured.reference[0].numpy(), rtol=1e-4, atol=1e-5)
    assert {domain.domain for domain in proto.opset_import} == {""}
    assert not proto.functions
    assert str(Path(__file__).parent).encode() not in proto.SerializeToString()
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, linear = self.conv, self.linear
        window = ([1, 1], [1, 1], [1, 1], 1)
        y = CONV[2](x, conv.weight, conv.bias, None, *window, "relu", [])
        y = CONV[2](y, conv.weight, conv.bias, x, *window, "hardtanh", [0.0, 6.0])
        result: torch.Tensor = LINEAR(y.mean((2, 3)), linear.weight, linear.bias, None, "gelu_tanh", [])
        return result


def test_fused_ops_become_plain_ones_that_the_engine_fuses(tmp_path: Path) -> None:
    executable, captured = lower(Fused(), (torch.randn(1, 4, 8, 8),))
    assert_like_eager(executable, captured)
    proto = saved(executable, tmp_path)
    assert {node.domain for node in proto.graph.node} == {""}
    assert ops_of(proto) == ["Conv", "Relu", "Conv", "Add", "Clip", "ReduceMean", "Gemm", "Gelu"]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    assert "Relu" not in ops_of(optimized)
    assert "FusedConv" in ops_of(optimized)


class Unregistered(nn.Module):
    """Ops that the exporter has no translation for, but decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.channel_shuffle(self.up(x), 2)
        pooled = F.adaptive_avg_pool2d(y, (3, 3))
        rows = F.adaptive_avg_pool1d(x.flatten(2).transpose(1, 2), 1)
        return y, pooled, rows, x.to(torch.float64)


def test_ops_without_translation_are_decomposed() -> None:
    executable, captured = lower(Unregistered(), (torch.randn(1, 8, 7, 7),))
    assert_like_eager(executable, captured)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_attention() -> None:
    executable, captured = lower(Attention(), (torch.randn(2, 4, 6, 8),))
    assert_like_eager(executable, captured)


def test_dynamic_batch_keeps_a_readable_name(tmp_path: Path) -> None:
    executable, _ = lower(ConvRelu(), (torch.randn(2, 3, 8, 8),), shapes={"image": {0: "batch"}})
    for batch in (1, 5):
        image = torch.randn(batch, 3, 8, 8)
        [logits] = executable([image])
        assert logits.shape == (batch, 5)
    graph = saved(executable, tmp_path).graph
    size = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert size == "batch"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == size


def test_dynamic_sequence_of_a_transformer() -> None:
    model, (tokens,) = models.load("bert")
    captured = capture(model, (tokens,), None, {"input_ids": {0: "batch", 1: torch.export.Dim("tokens", max=512)}})
    executable = OnnxBackend().lower(captured.program, X86, captured.inputs)
    for shape in ((1, 16), (3, 7)):
        ids = torch.randint(0, 512, shape)
        with torch.no_grad():
            expected = model(ids)
        first, pooled = executable([ids])
        torch.testing.assert_close(first, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-4, atol=1e-4)


class Mixed(nn.Module):
    """Outputs of every kind: integers, booleans, constants, the input itself, the same value twice, a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, flag: bool, nothing: None = None) -> dict[str, Any]:
        y = x * self.scale
        values = {"y": y, "again": y, "x": x, "scale": self.scale, "count": 3, "none": nothing, "flag": flag}
        return values | {"ids": ids + 1, "positive": y > 0, "double": x.double().sum(), "small": ids.to(torch.uint8)}


def test_outputs_of_every_kind(tmp_path: Path) -> None:
    args = (torch.randn(2, 4), torch.tensor([1, 2, 2**40]), True)
    executable, captured = lower(Mixed(), args)
    assert_like_eager(executable, captured)
    inputs = [i.name for i in saved(executable, tmp_path).graph.input]
    assert inputs == ["x", "ids"]


def test_results_belong_to_the_caller() -> None:
    executable, captured = lower(Mixed(), (torch.randn(2, 4), torch.tensor([1, 2]), True))
    for result in executable(captured.inputs):
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            result.zero_()
    assert_like_eager(executable, captured)


def test_compiled_model_returns_the_users_structure() -> None:
    args = (torch.randn(2, 4), torch.tensor([1, 2]), True)
    model = Mixed().eval()
    compiled = fxopt.compile(model, example_inputs=args, backend="onnx")
    actual, expected = compiled(*args), model(*args)
    assert list(actual) == list(expected)
    assert actual["none"] is None
    assert actual["count"] == 3
    torch.testing.assert_close(compiled.graph(*args)[0], expected["y"])


class Sized(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x * 2, x.shape[0]


def test_a_dynamic_size_can_be_an_output() -> None:
    executable, _ = lower(Sized(), (torch.randn(3, 2),), shapes={"x": {0: "n"}})
    doubled, size = executable([torch.ones(7, 2)])
    assert doubled.shape == (7, 2)
    assert type(size) is int
    assert size == 7


@pytest.mark.parametrize("layout", ["transposed", "expanded", "requires_grad"])
def test_any_memory_layout_goes_in(layout: str) -> None:
    executable, _ = lower(Attention(), (torch.randn(2, 4, 6, 8),))
    x = torch.randn(2, 4, 6, 8)
    odd = {
        "transposed": torch.randn(2, 4, 8, 6).transpose(2, 3),
        "expanded": torch.randn(1, 4, 6, 8).expand(2, 4, 6, 8),
        "requires_grad": x.requires_grad_(),
    }[layout]
    [actual] = executable([odd])
    torch.testing.assert_close(actual, Attention()(odd).detach(), rtol=1e-4, atol=1e-5)


def test_concurrent_calls() -> None:
    executable, _ = lower(ConvRelu(), (torch.randn(2, 3, 8, 8),))
    images = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    expected = [executable([image])[0] for image in images]
    wrong: list[int] = []

    def call(index: int) -> None:
        results = [executable([images[index]])[0] for _ in range(20)]
        wrong.extend(index for result in results if not torch.equal(result, expected[index]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
