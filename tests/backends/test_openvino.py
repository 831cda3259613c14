"""The OpenVINO backend: the precision that was asked for, results that belong to the caller, errors that point home."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends.openvino import OpenVinoBackend, OpenVinoExecutable
from fxopt.capture import Captured, capture
from fxopt.target import resolve_target
from tests.backends.engine_models import Function
from tools import models

pytest.importorskip("openvino")
X86 = resolve_target("x86")


class ConvRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(F.relu(self.conv(image)).mean((2, 3)))}


def lower(
    model: nn.Module, args: tuple[Any, ...], shapes: Any = None, backend: OpenVinoBackend | None = None
) -> tuple[OpenVinoExecutable, Captured]:
    captured = capture(model.eval(), args, None, shapes)
    executable = (backend or OpenVinoBackend()).lower(captured.program, X86, captured.inputs)
    assert isinstance(executable, OpenVinoExecutable)
    return executable, captured


def precision(executable: OpenVinoExecutable) -> str:
    hint: str = executable._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return hint


def test_fp32_stays_fp32(tmp_path: Path) -> None:
    executable, captured = lower(ConvRelu(), (torch.randn(2, 3, 8, 8),))
    assert precision(executable) == "f32"
    torch.testing.assert_close(executable(captured.inputs)[0], captured.reference[0], rtol=1e-4, atol=1e-5)
    executable.save(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [i.name for i in graph.input] == ["image"]
    assert executable.constant("conv.weight").shape == (8, 3, 3, 3) or "conv.weight" in captured.program.constants
    assert (executable.nbytes() or 0) > 0


def test_cast_precision_becomes_the_hint(tmp_path: Path) -> None:
    model, image = ConvRelu().eval(), torch.randn(2, 3, 8, 8)
    compiled = fxopt.compile(model, example_inputs=(image,), passes="cast-precision{dtype=bf16}", backend="openvino")
    logits, expected = compiled(image)["logits"], model(image)["logits"].detach()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=5e-2, atol=2e-2)
    compiled.save(tmp_path / "model.onnx")
    types = {value.data_type for value in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert onnx.TensorProto.BFLOAT16 not in types


@pytest.mark.parametrize("asked", ["f32", "bf16"])
def test_precision_can_be_asked_for(asked: Any) -> None:
    executable, captured = lower(
        ConvRelu(), (torch.randn(2, 3, 8, 8),), backend=OpenVinoBackend(precision=asked, threads=1)
    )
    assert precision(executable) in (asked, "f32")  # f32 on a machine without bf16
    assert executable._compiled.get_property("INFERENCE_NUM_THREADS") == 1
    torch.testing.assert_close(executable(captured.inputs)[0], captured.reference[0], rtol=5e-2, atol=2e-2)


def test_dynamic_sequence_of_a_transformer() -> None:
    model, (tokens,) = models.load("bert")
    shapes = {"input_ids": {0: "batch", 1: torch.export.Dim("tokens", max=512)}}
    executable, _ = lower(model, (tokens,), shapes)
    for shape in ((1, 16), (3, 7)):
        ids = torch.randint(0, 512, shape)
        with torch.no_grad():
            expected = model(ids)
        torch.testing.assert_close(executable([ids])[0], expected.last_hidden_state, rtol=1e-4, atol=1e-4)


class Mixed(nn.Module):
    def forward(self, x: torch.Tensor, ids: torch.Tensor, flag: bool) -> dict[str, Any]:
        y = x * 2
        values = {"y": y, "again": y, "x": x, "count": 3, "none": None, "flag": flag}
        return values | {"ids": ids + 1, "positive": y > 0, "small": ids.to(torch.int32), "sum": x.sum()}


def test_outputs_of_every_kind() -> None:
    executable, captured = lower(Mixed(), (torch.randn(2, 4), torch.tensor([1, 2, 200]), True))
    for actual, expected in zip(executable(captured.inputs), captured.reference, strict=True):
        assert type(actual) is type(expected)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(actual, expected)
        else:
            assert actual == expected


def test_results_survive_the_next_call() -> None:
    executable, captured = lower(ConvRelu(), (torch.randn(2, 3, 8, 8),))
    [first] = executable(captured.inputs)
    kept = first.clone()
    executable([torch.randn(2, 3, 8, 8)])
    assert torch.equal(first, kept)


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


def test_a_foreign_target_can_be_saved_but_not_called(tmp_path: Path) -> None:
    captured = capture(nn.Linear(4, 4).eval(), (torch.randn(3, 4),))
    executable = OpenVinoBackend().lower(captured.program, resolve_target("arm"), captured.inputs)
    executable.save(tmp_path / "model.onnx")
    with pytest.raises(fxopt.BackendUnavailable, match=r"'arm'.*\.save"):
        executable(captured.inputs)


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().exp().float()


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (Double(), torch.randn(2), r"computes float64 in float32: aten.*test_openvino\.py:\d+"),
        (nn.ReLU(), torch.randn(2).bfloat16(), "'input' is torch.bfloat16"),
    ],
)
def test_what_openvino_would_compute_otherwise_is_declined(model: nn.Module, inputs: torch.Tensor, reason: str) -> None:
    with pytest.raises(fxopt.UnsupportedOp, match=reason):
        lower(model, (inputs,))


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"threads": 0}, {"thread": 2}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(fxopt.SpecError, match=next(iter(options))):
        fxopt.compile(nn.ReLU(), example_inputs=(torch.randn(2),), backend="openvino", backend_options=options)


def test_a_missing_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(fxopt.BackendUnavailable, match=r"pip install .*openvino"):
        lower(nn.ReLU(), (torch.randn(2),))


def test_what_it_does_not_convert_is_named() -> None:
    model = Function(lambda x, i: x.gather(1, i))
    inputs = (torch.randn(2, 4, 4), torch.zeros(2, 1, 2, dtype=torch.int64))
    with pytest.raises(fxopt.UnsupportedOp, match="OpenVINO cannot run this model: it does not convert GatherElements"):
        fxopt.compile(model, example_inputs=inputs, backend="openvino")
