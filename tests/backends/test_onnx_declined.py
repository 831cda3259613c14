"""The onnx backend: what is saved where, and what is declined with the op and its line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends import _onnx_file
from fxopt.backends.onnx import OnnxBackend, OnnxExecutable
from fxopt.capture import capture
from fxopt.target import resolve_target
from tests.backends.onnx_models import ConvRelu, assert_like_eager, lower, ops_of, saved


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
    with pytest.raises(fxopt.UnsupportedOp, match=f"special_bessel_j0.*test_onnx_declined.py:{line_of('# this line')}"):
        lower(Untranslatable(), (torch.randn(3),))


def test_an_op_without_kernel_is_named_with_its_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).bfloat16()
    with pytest.raises(fxopt.UnsupportedOp, match=r"no bf16 kernel.*aten\.linear.*linear\.py:\d+ and 1 more"):
        lower(model, (torch.randn(2, 4).bfloat16(),))


class Unkernelled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cos() * 2  # no kernel


def test_what_onnxruntime_itself_refuses_is_located() -> None:
    with pytest.raises(
        fxopt.UnsupportedOp, match=f"onnxruntime.*aten.cos.*test_onnx_declined.py:{line_of('# no kernel')}"
    ):
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
