"""The ONNX backend: a valid file with the user's names, a session that answers like the graph, clear errors."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
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
from fxopt.backend import Executable
from fxopt.backends import _onnx_file
from fxopt.backends.onnx import OnnxBackend, OnnxExecutable
from fxopt.capture import Captured, capture
from fxopt.fused import CONV, LINEAR
from fxopt.target import resolve_target
from tools import models

X86 = resolve_target("x86")


class ConvRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(F.relu(self.norm(self.conv(image))).mean((2, 3)))}


def lower(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    shapes: Any = None,
    backend: OnnxBackend | None = None,
    target: Any = X86,
) -> tuple[OnnxExecutable, Captured]:
    captured = capture(model.eval(), args, kwargs, shapes)
    executable = (backend or OnnxBackend()).lower(captured.program, target, captured.inputs)
    assert isinstance(executable, OnnxExecutable)
    return executable, captured


def assert_like_eager(executable: Executable, captured: Captured) -> None:
    outputs = executable(captured.inputs)
    assert len(outputs) == len(captured.reference)
    for actual, expected in zip(outputs, captured.reference, strict=True):
        if isinstance(expected, torch.Tensor):
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        else:
            assert type(actual) is type(expected)
            assert actual == expected


def saved(executable: Executable, folder: Path) -> onnx.ModelProto:
    path = folder / "model.onnx"
    executable.save(path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


def ops_of(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


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
    assert __file__.encode() not in proto.SerializeToString()
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


def test_large_models_keep_their_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_onnx_file, "SINGLE_FILE_LIMIT", 1000)
    executable, captured = lower(nn.Linear(64, 64), (torch.randn(3, 64),))
    path = tmp_path / "big.onnx"
    executable.save(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert (tmp_path / "big.onnx.data").stat().st_size >= 64 * 64 * 4
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [y] = session.run(None, {session.get_inputs()[0].name: captured.inputs[0].numpy()})
    np.testing.assert_allclose(y, captured.reference[0].numpy(), rtol=1e-4, atol=1e-5)


def test_weights_move_into_the_file_and_can_be_read_back() -> None:
    model = nn.Linear(64, 32).bfloat16()
    captured = capture(model.eval(), (torch.randn(3, 64).bfloat16(),))
    executable = OnnxBackend().lower(captured.program, resolve_target("arm"), captured.inputs)
    assert "weight" not in captured.program.constants
    assert torch.equal(executable.constant("weight"), model.weight)
    assert (executable.nbytes() or 0) > model.weight.nbytes
    with pytest.raises(KeyError):
        executable.constant("absent")


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable, _ = lower(nn.Linear(4, 4), (torch.randn(3, 4),))
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    monkeypatch.setattr(onnx, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(fxopt.ArtifactError, match="disk full"):
        executable.save(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_save_says_what_it_cannot_write(tmp_path: Path) -> None:
    executable, _ = lower(nn.Linear(4, 4), (torch.randn(3, 4),))
    with pytest.raises(fxopt.ArtifactError, match=r"write \.onnx files, not '\.pt2'"):
        executable.save(tmp_path / "model.pt2")
    with pytest.raises(fxopt.ArtifactError, match="cannot write"):
        executable.save(tmp_path / "absent" / "model.onnx")


def test_a_foreign_target_can_be_saved_but_not_called(tmp_path: Path) -> None:
    executable, captured = lower(nn.Linear(4, 4), (torch.randn(3, 4),), target=resolve_target("arm"))
    assert "Gemm" in ops_of(saved(executable, tmp_path))
    with pytest.raises(fxopt.BackendUnavailable, match=r"'arm'.*\.save"):
        executable(captured.inputs)


class Untranslatable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.special.bessel_j0(x)  # this line
        return result


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), start=1) if text in line)


def test_an_op_without_translation_is_named_with_its_line() -> None:
    with pytest.raises(fxopt.UnsupportedOp, match=f"special_bessel_j0.*test_onnx.py:{line_of('# this line')}"):
        lower(Untranslatable(), (torch.randn(3),))


def test_an_op_without_kernel_is_named_with_its_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).bfloat16()
    with pytest.raises(fxopt.UnsupportedOp, match=r"no bf16 kernel.*aten\.linear.*linear\.py:\d+ and 1 more"):
        lower(model, (torch.randn(2, 4).bfloat16(),))


class Unkernelled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cos() * 2  # no kernel


def test_what_onnxruntime_itself_refuses_is_located() -> None:
    with pytest.raises(fxopt.UnsupportedOp, match=f"onnxruntime.*aten.cos.*test_onnx.py:{line_of('# no kernel')}"):
        lower(Unkernelled(), (torch.randn(3).bfloat16(),))


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table(ids), x.flatten()


def test_bf16_that_is_only_moved_keeps_its_dtype() -> None:
    executable, captured = lower(Lookup().bfloat16(), (torch.tensor([1, 3]), torch.randn(2, 2).bfloat16()))
    assert_like_eager(executable, captured)


def test_fp16_runs() -> None:
    executable, captured = lower(nn.Linear(4, 4).half(), (torch.randn(2, 4).half(),))
    [actual] = executable(captured.inputs)
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual, captured.reference[0], rtol=1e-2, atol=1e-2)


class Counter(nn.Module):
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


class WritesInput(nn.Module):
    def forward(self, state: torch.Tensor) -> torch.Tensor:
        state += 1
        return state * 2


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs()


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (Counter(), torch.randn(2), "changes its buffer 'count'.*backend='torch'"),
        (WritesInput(), torch.randn(2), "changes its input 'state'"),
        (Noise(), torch.randn(2), "random numbers"),
        (Complex(), torch.randn(2, dtype=torch.complex64), "'x' is complex"),
    ],
)
def test_what_a_session_cannot_do_is_declined(model: nn.Module, inputs: torch.Tensor, reason: str) -> None:
    with pytest.raises(fxopt.UnsupportedOp, match=reason):
        lower(model, (inputs,))


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_opsets(opset: int, tmp_path: Path) -> None:
    backend = OnnxBackend(opset=opset)
    executable, captured = lower(nn.Sequential(nn.Linear(4, 4), nn.GELU()), (torch.randn(2, 4),), backend=backend)
    assert_like_eager(executable, captured)
    assert saved(executable, tmp_path).opset_import[0].version == opset


@pytest.mark.parametrize("options", [{"opset": 12}, {"threads": 0}, {"thread": 2}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(fxopt.SpecError, match=next(iter(options))):
        fxopt.compile(nn.ReLU(), example_inputs=(torch.randn(2),), backend="onnx", backend_options=options)


def test_threads_reach_the_session() -> None:
    executable, captured = lower(ConvRelu(), (torch.randn(2, 3, 8, 8),), backend=OnnxBackend(threads=1))
    assert executable._session.get_session_options().intra_op_num_threads == 1
    assert_like_eager(executable, captured)


def test_a_missing_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(fxopt.BackendUnavailable, match=r"pip install .*onnxruntime"):
        lower(nn.ReLU(), (torch.randn(2),))


class Clash(nn.Module):
    """A parameter, an input and an output of the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(600))

    def forward(self, weight: torch.Tensor, add: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight * self.weight + add, "mul": add - self.weight}


def test_equal_names_are_kept_apart(tmp_path: Path) -> None:
    executable, captured = lower(Clash(), (torch.randn(600), torch.randn(600)))
    assert_like_eager(executable, captured)
    graph = saved(executable, tmp_path).graph
    assert [i.name for i in graph.input] == ["weight", "add"]
    assert graph.output[1].name == "mul"


def test_the_users_names_of_dynamic_sizes_stand_in_the_file() -> None:
    program = capture(
        nn.Linear(4, 4).eval(), (torch.randn(1, 3, 4),), None, {"input": {0: "batch", 1: "tokens"}}
    ).program
    executable = OnnxBackend().lower(program, resolve_target("x86"), [torch.randn(1, 3, 4)])
    assert isinstance(executable, OnnxExecutable)
    assert executable._session.get_inputs()[0].shape == ["batch", "tokens", 4]
    assert executable._session.get_outputs()[0].shape == ["batch", "tokens", 4]
