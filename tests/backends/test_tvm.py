"""The TVM backend: right results from loops of ours, dynamic sizes, files that need nothing but TVM's runtime."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends.tvm import TvmBackend, TvmExecutable
from fxopt.capture import Captured, capture
from fxopt.target import resolve_target
from tools import models

pytest.importorskip("tvm")
X86 = resolve_target("x86")


class ConvRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(F.relu(self.conv(image)).mean((2, 3)))}


def lower(
    model: nn.Module, args: tuple[Any, ...], shapes: Any = None, backend: TvmBackend | None = None, target: Any = X86
) -> tuple[TvmExecutable, Captured]:
    captured = capture(model.eval(), args, None, shapes)
    executable = (backend or TvmBackend()).lower(captured.program, target, captured.inputs)
    assert isinstance(executable, TvmExecutable)
    return executable, captured


def check(model: nn.Module, *args: torch.Tensor) -> None:
    executable, captured = lower(model, args)
    for actual, expected in zip(executable(captured.inputs), captured.reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


CONVOLUTIONS = {
    "3x3": (nn.Conv2d(16, 24, 3, padding=1), 14),
    "first": (nn.Conv2d(3, 40, 7, stride=2, padding=3), 33),
    "1x1": (nn.Conv2d(24, 20, 1), 9),
    "1x1 strided": (nn.Conv2d(24, 48, 1, stride=2), 9),
    "dilated": (nn.Conv2d(8, 8, 3, dilation=2, padding=(0, 2)), 12),
    "depthwise": (nn.Conv2d(24, 24, 3, padding=1, groups=24), 15),
    "depthwise strided": (nn.Conv2d(40, 40, 5, stride=2, padding=2, groups=40), 15),
    "grouped": (nn.Conv2d(32, 64, 3, padding=1, groups=4), 7),
    "groups of three": (nn.Conv2d(12, 12, 3, groups=4), 7),
    "multiplier": (nn.Conv2d(8, 24, 3, groups=8), 7),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    conv, side = CONVOLUTIONS[name]
    torch.manual_seed(0)
    check(nn.Sequential(conv, nn.Hardswish()), torch.randn(2, conv.in_channels, side, side + 1))


@pytest.mark.parametrize("shape", [(1, 7), (3, 17, 33), (2, 2, 64, 48)])
@pytest.mark.parametrize("columns", [5, 16, 100])
def test_linears(shape: tuple[int, ...], columns: int) -> None:
    torch.manual_seed(0)
    check(nn.Sequential(nn.Linear(shape[-1], columns), nn.GELU()), torch.randn(shape))


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def test_products_of_two_activations() -> None:
    torch.manual_seed(0)
    check(Attention(), torch.randn(2, 3, 50, 32), torch.randn(2, 3, 37, 32), torch.randn(2, 3, 37, 21))


class Reductions(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = torch.softmax(x, -1), F.layer_norm(x, x.shape[2:]), x.mean(-1, keepdim=True) - x.amax(-1, keepdim=True)
        return *rows, torch.softmax(x, 1), x.sum((0, 1)), x.sum(), F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 2)


def test_reductions() -> None:
    torch.manual_seed(0)
    check(Reductions(), torch.randn(2, 5, 9, 37))


class Functions(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.exp(x), torch.tanh(x), torch.sigmoid(x), torch.erf(x), F.gelu(x), F.silu(x), torch.rsqrt(x.abs())


def test_functions_are_as_exact_as_float32() -> None:
    edges = torch.tensor(
        [0.0, -0.0, 1e-8, -1e-3, 0.624, 0.626, 9.9, 50.0, -50.0, 89.0, -104.0, float("inf"), -float("inf")]
    )
    x = torch.cat([edges, torch.linspace(-12, 12, 4003)])
    executable, captured = lower(Functions(), (x,))
    for actual, expected in zip(executable([x]), captured.reference, strict=True):
        there = ~expected.isnan()  # PyTorch's gelu of infinity is one
        torch.testing.assert_close(actual[there], expected[there], rtol=2e-6, atol=1e-6)
    assert all(y.isnan().all() for y in executable([torch.full_like(x, float("nan"))]))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 8, 8)])
def test_dynamic_batch(shape: tuple[int, ...]) -> None:
    model = ConvRelu()
    executable, _ = lower(model, (torch.randn(2, 3, 8, 8),), {"image": {0: "batch"}})
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(executable([x])[0], model(x)["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
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


def test_an_input_at_an_odd_address() -> None:
    executable, _ = lower(ConvRelu(), (torch.randn(1, 3, 8, 8),))
    memory = torch.randn(3 * 64 + 1)
    view = memory[1:].view(1, 3, 8, 8)
    torch.testing.assert_close(executable([view])[0], executable([view.clone()])[0])


def test_concurrent_calls() -> None:
    executable, _ = lower(ConvRelu(), (torch.randn(2, 3, 8, 8),), backend=TvmBackend(threads=2))
    images = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    expected = [executable([image])[0] for image in images]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(50) if not torch.equal(executable([images[i]])[0], expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


_RUN = """
import sys
sys.modules.update(torch=None, fxopt=None)
import numpy
x = numpy.load("x.npy")
{example}
numpy.save("y.npy", y)
assert not hasattr(tvm, "relax")
"""


@pytest.mark.slow
def test_a_saved_library_needs_only_the_runtime(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3)), torch.randn(1, 3, 12, 12)
    compiled = fxopt.compile(model, example_inputs=(x,), backend="tvm")
    compiled.save(tmp_path / "model.so")
    assert b".debug_" not in (tmp_path / "model.so").read_bytes()
    np.save(tmp_path / "x.npy", x.numpy())
    from fxopt.backends._tvm_build import Built

    [example] = re.findall(r"::\n\n(.*?)\n\n +Raises", Built.save.__doc__ or "", re.DOTALL)
    script = _RUN.format(example=textwrap.dedent(example))
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), compiled(x))
    with pytest.raises(fxopt.ArtifactError, match=r"\.so"):
        compiled.save(tmp_path / "model.onnx")


def test_a_foreign_target_compiles_and_says_that_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable, captured = lower(ConvRelu(), (torch.randn(1, 3, 8, 8),), target=resolve_target("cortex-a76"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fxopt.BackendUnavailable, match=r"TVM cannot run here.*model\.tar"):
        executable(captured.inputs)
    (tmp_path / "aarch64-linux-gnu-g++").touch(0o755)  # a linker
    with pytest.raises(fxopt.BackendUnavailable, match=r"TVM cannot run here.*model\.so"):
        executable(captured.inputs)


def test_nothing_but_a_mac_links_for_macs() -> None:
    from fxopt.backends._tvm_build import linker
    from fxopt.backends._tvm_target import machine

    triple = resolve_target("apple-m1").llvm["mtriple"]
    if triple.split("-")[0] == platform.machine():
        pytest.skip("this is one")
    with pytest.raises(fxopt.ArtifactError, match=rf"{triple} needs a Mac to link it: save a \.tar"):
        linker(machine(resolve_target("apple-m1")))


class Unsupported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum: torch.Tensor = torch.fft.rfft(x)
        return spectrum.abs()


def test_an_unsupported_op_is_named_with_its_line() -> None:
    with pytest.raises(fxopt.UnsupportedOp, match=r"test_tvm\.py:\d+"):
        lower(Unsupported(), (torch.randn(4, 8),))


@pytest.mark.parametrize("threads", [0, -1, 1.5])
def test_threads_must_be_a_count(threads: Any) -> None:
    with pytest.raises(fxopt.SpecError, match="threads"):
        TvmBackend(threads=threads)


def test_an_artifact_holds_the_library_and_the_weights_once(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 3)), torch.randn(1, 64, 12, 12)
    compiled = fxopt.compile(model, example_inputs=(x,), backend="tvm")
    compiled.save(tmp_path / "model.fxopt")
    size = sum(p.numel() * 4 for p in model.parameters())
    assert (tmp_path / "model.fxopt").stat().st_size < 1.1 * size + 100_000  # code and graph
    with pytest.raises(fxopt.ArtifactError, match="allow_code"):
        fxopt.load(tmp_path / "model.fxopt")
    loaded = fxopt.load(tmp_path / "model.fxopt", allow_code=True)
    assert torch.equal(loaded(x), compiled(x))
    loaded.save(tmp_path / "again.so")
    with pytest.raises(fxopt.ArtifactError, match="linked"):
        loaded.save(tmp_path / "again.tar")


def test_an_artifact_of_other_versions_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.backends import _tvm_build

    model, x = ConvRelu().eval(), torch.randn(1, 3, 8, 8)
    compiled = fxopt.compile(model, example_inputs=(x,), backend="tvm")
    compiled.save(tmp_path / "model.fxopt")
    monkeypatch.setattr(_tvm_build, "versions", lambda: "of another day")
    monkeypatch.setattr(_tvm_build, "rebuild", None)
    loaded = fxopt.load(tmp_path / "model.fxopt", allow_code=True)
    torch.testing.assert_close(loaded(x)["logits"], compiled(x)["logits"])


def test_a_library_for_another_machine_needs_its_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = resolve_target("cortex-a76")
    compiled = fxopt.compile(ConvRelu().eval(), example_inputs=(torch.randn(1, 3, 8, 8),), backend="tvm", target=target)
    compiled.save(tmp_path / "model.tar")
    assert (tmp_path / "model.params").is_file()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fxopt.ArtifactError, match=r"aarch64-linux-gnu-g\+\+.*\.tar"):
        compiled.save(tmp_path / "model.so")
    assert not (tmp_path / "model.so").exists()


class ShiftedWindows(nn.Module):
    """What Swin does around its attention: windows put together, rolled back, added to what came in."""

    def forward(self, windows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        image = windows.view(1, 2, 2, 4, 4, 64).transpose(2, 3).reshape(1, 8, 8, 64)
        return x + image.roll((2, 2), (1, 2)).view(1, 64, 64)


def test_indices_inside_of_conditions() -> None:
    check(ShiftedWindows(), torch.randn(4, 16, 64), torch.randn(1, 64, 64))
