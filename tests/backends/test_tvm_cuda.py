"""Target "cuda" on the tvm backend: PTX, which numpy executes where there is no GPU; files; what is declined."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.dlpack import from_dlpack

import fxopt
from fxopt.capture import Captured, capture
from fxopt.target import resolve_target

tvm = pytest.importorskip("tvm")
from fxopt.backends import _tvm_ptx  # noqa: E402
from tests.backends import ptx  # noqa: E402
from tests.backends.emulated_gpu import EmulatedBackend, EmulatedExecutable  # noqa: E402

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8)
    head = nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10), nn.LayerNorm(10), nn.Softmax(-1)
    return nn.Sequential(*layers, *head).eval()


def emulated(model: nn.Module, *args: torch.Tensor, shapes: Any = None) -> tuple[EmulatedExecutable, Captured]:
    captured = capture(model.eval(), args, None, shapes)
    executable = EmulatedBackend().lower(captured.program, resolve_target("cuda"), captured.inputs)
    assert isinstance(executable, EmulatedExecutable)
    return executable, captured


def check(model: nn.Module, *args: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> EmulatedExecutable:
    executable, captured = emulated(model, *args)
    for actual, expected in zip(executable(captured.inputs), captured.reference, strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    return executable


# --- what the kernels compute


def test_a_network() -> None:
    executable = check(cnn(), torch.randn(2, 3, 10, 10))
    for kernel in ptx.kernels(executable.ptx).values():  # each has threads, of which a block holds as many
        assert 1 < np.prod(kernel.threads) <= 1024
        assert sum(size for _, size in kernel.shared.values()) <= 48 * 1024


@pytest.mark.slow
def test_dynamic_batch() -> None:
    model = cnn()
    executable, _ = emulated(model, torch.randn(2, 3, 10, 10), shapes=({0: "batch"},))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 10, 10)
        torch.testing.assert_close(executable([x])[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_float16_sums_in_float32() -> None:
    torch.manual_seed(0)
    x, w = torch.rand(2, 3000).half(), torch.rand(3000, 4).half()
    check(Apply(lambda x, w: (x @ w, x.mean(-1), torch.softmax(x, -1))), x, w, rtol=2e-3, atol=1e-6)


@pytest.mark.slow
def test_a_network_in_float16() -> None:
    check(cnn().half(), torch.randn(2, 3, 10, 10).half(), rtol=1e-2, atol=2e-3)


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log, "log2": torch.log2,
    "log10": torch.log10, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan, "asin": torch.asin, "acos": torch.acos,
    "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh, "asinh": torch.asinh,
    "acosh": lambda x: torch.acosh(x.abs() + 1), "atanh": lambda x: torch.atanh(x / 20), "sigmoid": torch.sigmoid,
    "erf": torch.erf, "silu": F.silu, "rsqrt": lambda x: torch.rsqrt(x.abs()), "sqrt": torch.sqrt,
    "power": lambda x: x.abs() ** 1.7, "cube": lambda x: x**3, "base": lambda x: torch.pow(torch.tensor(2.0), x),
    "fmod": lambda x: torch.fmod(x, 1.3), "floor": torch.floor, "ceil": torch.ceil, "round": torch.round,
    "isnan": torch.isnan, "isinf": torch.isinf, "sign": torch.sign, "softplus": F.softplus,
}  # fmt: skip


def test_functions_are_as_exact_as_float32() -> None:
    edges = [0.0, -0.0, 1e-8, -1e-3, 0.625, 1.0, -1.0, 9.9, 50.0, -50.0, 89.0, -104.0, 1e-40, 1e5, -12345.678]
    x = torch.cat([torch.tensor([*edges, float("inf"), -float("inf"), float("nan")]), torch.linspace(-12, 12, 240)])
    executable, captured = emulated(Apply(lambda x: tuple(f(x) for f in FUNCTIONS.values())), x)
    for name, actual, expected in zip(FUNCTIONS, executable([x]), captured.reference, strict=True):
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        close = (actual.float() - expected.float()).abs() <= 2e-6 * expected.float().abs() + 1e-6
        assert (same | close).all(), (name, x[~(same | close)], actual[~(same | close)], expected[~(same | close)])


def test_functions_of_float16() -> None:
    x = torch.linspace(-4, 4, 65).half()
    check(Apply(lambda x: (torch.exp(x), torch.sqrt(x.abs()), torch.floor(x), torch.tanh(x))), x, rtol=2e-3, atol=1e-3)


def test_reductions_across_the_threads_of_a_block() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 300)
    check(Apply(lambda x: (x.sum(-1), x.mean((1, 2)), x.amax(1), torch.softmax(x, 1), x.argmax(-1))), x)


@pytest.mark.parametrize("rows", [1, 70])
def test_products(rows: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(65, 33), nn.ReLU(), nn.Linear(33, 5))
    check(model, torch.randn(rows, 65))


def test_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    check(Apply(F.scaled_dot_product_attention), q, k, v)


def test_int8_is_computed_from_rounded_values() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 24)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    how: dict[str, Any] = {"passes": "insert-fake-quant", "calibration": [(x,)], "example_inputs": (x,)}
    compiled = fxopt.compile(model, target="cuda", backend="tvm", **how)
    assert any("int8 is computed in float32" in note for note in compiled.report.notes)
    on_numpy = fxopt.compile(model, backend=EmulatedBackend(), **how)
    torch.testing.assert_close(on_numpy(x), fxopt.compile(model, backend="onnx", **how)(x), rtol=0, atol=2e-2)


DECLINED = "state|LSTM|GRU|Loop|bf16|2:4|DFT|complex|COO|fp64|int4|from the values|empty|embedding bag|fourier|while"
NOT_EMULATED = ["reduce: order"]  # sorting takes scratch memory of the GPU through TVM's runtime


@pytest.mark.slow
def test_conformance() -> None:
    names = [case.name for case in fxopt.conformance.cases() if case.name not in NOT_EMULATED]
    outcomes = fxopt.conformance.run(EmulatedBackend(), only=names)
    assert not outcomes.failures
    declined = [one.case for one in outcomes if one.verdict == "declined"]
    assert all(re.search(DECLINED, name) for name in declined), declined


# --- the PTX, and the machine that executes it here


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_kernels_are_for_the_target(arch: str) -> None:
    captured = capture(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)).eval(), (torch.randn(3, 8),), None, None)
    text = EmulatedBackend(arch).lower(captured.program, resolve_target("cuda"), captured.inputs).ptx  # type: ignore[attr-defined]
    kernels = text.count(".visible .entry")
    assert f".target {arch}" in text
    assert kernels > 1
    assert text.count(".maxntid") == kernels
    assert not re.search(r"\.extern|\bcall\b|__nv_\w+f\b", text)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas")
def test_an_assembler_takes_them(tmp_path: Path) -> None:
    (tmp_path / "m.ptx").write_text(emulated(cnn(), torch.randn(1, 3, 10, 10))[0].ptx)
    for arch in ("sm_80", "sm_90"):
        subprocess.run(["ptxas", "-arch", arch, "m.ptx", "-o", "m.cubin"], cwd=tmp_path, check=True)


def test_a_barrier_that_is_missing_is_seen() -> None:
    executable, captured = emulated(Apply(lambda x, y: x @ y), torch.randn(20, 40), torch.randn(40, 20))
    executable(captured.inputs)
    for kernel, _ in executable._kernels.values():
        kernel.code = [(g, s, "mov.b32" if op == "bar.sync" else op, ["%r0", "0"] if op == "bar.sync" else a)
                       for g, s, op, a in kernel.code]  # fmt: skip
    with pytest.raises(fxopt.FxoptError, match="RaceError"):
        executable(captured.inputs)


def test_what_tvm_calls_back_is_as_it_was() -> None:
    before = tvm.get_global_func(_tvm_ptx._LIBRARY)
    emulated(nn.ReLU(), torch.randn(3))
    assert tvm.get_global_func(_tvm_ptx._LIBRARY).same_as(before)


# --- the backend, without a GPU


@NO_GPU
@pytest.mark.parametrize("passes", [None, "cast-precision{dtype=fp16}"])
def test_everything_compiles_and_a_call_says_what_is_missing(passes: str | None, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 10, 10)
    compiled = fxopt.compile(cnn(), target="cuda", backend="tvm", example_inputs=(x,), passes=passes)
    compiled.save(tmp_path / "m.fxopt")
    for model in (compiled, fxopt.load(tmp_path / "m.fxopt")):
        with pytest.raises(fxopt.BackendUnavailable, match=r"target 'cuda'.*TVM.*no CUDA device is here.*model\.so"):
            model(x)


@NO_GPU
def test_a_runtime_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    compiled = fxopt.compile(nn.ReLU(), target="sm_80", backend="tvm", example_inputs=(torch.randn(3),))
    with pytest.raises(fxopt.BackendUnavailable, match="TVM's CUDA runtime cannot be loaded"):
        compiled(torch.randn(3))


def test_files_hold_host_code_kernels_and_plain_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))
    compiled = fxopt.compile(model, target="sm_90", backend="tvm", example_inputs=(torch.randn(2, 64),))
    for name in ("m.so", "m.tar"):
        compiled.save(tmp_path / name)
        assert len((tmp_path / name).read_bytes()) > 10_000
    assert b".target sm_90" in (tmp_path / "m.so").read_bytes()
    stored = tvm.runtime.load_param_dict_from_file(str(tmp_path / "m.params"))
    shapes = {tuple(value.shape) for value in stored.values()}
    assert {(64, 48), (48, 16)} <= shapes


def test_bf16_is_declined() -> None:
    with pytest.raises(fxopt.UnsupportedOp, match="TVM has no bf16 on a GPU: take fp16"):
        fxopt.compile(
            nn.Linear(8, 8), target="cuda", backend="tvm", example_inputs=(torch.randn(2, 8),),
            passes="cast-precision{dtype=bf16}",
        )  # fmt: skip


def test_functions_of_float64_are_declined_with_their_line() -> None:
    x = torch.randn(2, 8).double()
    with pytest.raises(fxopt.UnsupportedOp, match=r"aten\.exp.*test_tvm_cuda\.py.*no code for 'exp' of float64"):
        fxopt.compile(Apply(torch.exp), target="cuda", backend="tvm", example_inputs=(x,))


@pytest.mark.parametrize("options", [{"mixed": True}, {"tune": {"trials": 8}}])
def test_options_for_cpus_are_declined(options: dict[str, Any]) -> None:
    with pytest.raises(fxopt.UnsupportedOp, match=r"no option .* for target 'cuda'"):
        fxopt.compile(
            nn.Linear(8, 8), target="cuda", backend="tvm", example_inputs=(torch.randn(2, 8),), backend_options=options
        )


# --- with a GPU


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gpu_computes_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = cnn(), torch.randn(4, 3, 10, 10)
    passes = "cast-precision{dtype=fp16}" if dtype is torch.float16 else None
    compiled = fxopt.compile(model, target="cuda", backend="tvm", example_inputs=(x,), passes=passes)
    tolerance = 1e-4 if passes is None else 1e-2
    torch.testing.assert_close(compiled(x), model(x), rtol=tolerance, atol=tolerance)
    compiled.save(tmp_path / "m.so")
    device = tvm.cuda()
    main = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(tmp_path / "m.so")), device)["main"]
    stored = tvm.runtime.load_param_dict_from_file(str(tmp_path / "m.params"))
    there = [stored[str(i)].copyto(device) for i in range(len(stored))]
    result = from_dlpack(main(tvm.runtime.from_dlpack(x.to(dtype).cuda()), *there))
    torch.testing.assert_close(result.cpu().float(), model(x), rtol=tolerance, atol=tolerance)


@GPU
def test_tensors_of_the_gpu_stay_there() -> None:
    model, x = cnn().cuda(), torch.randn(4, 3, 10, 10, device="cuda")
    compiled = fxopt.compile(model, target="cuda", backend="tvm", example_inputs=(x,))
    result = compiled(x)
    assert result.is_cuda
    torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-4)
