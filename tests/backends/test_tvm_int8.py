"""Quantized models on TVM: integer kernels, with the instructions of the machine, that agree with onnxruntime's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.backends.onnx import OnnxBackend
from fxopt.backends.tvm import TvmBackend, TvmExecutable
from fxopt.target import Target, resolve_target
from tests.backends.int8_models import Quantizer, fused
from tests.backends.test_onnx_int8 import Block, Cnn

pytest.importorskip("tvm")


def quantized(model: nn.Module, *inputs: torch.Tensor, shapes: Any = None) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    program, flat = fused(model, inputs, shapes)
    return Quantizer(program, flat).run(), flat


def lower(program: Any, inputs: list[Any], target: Target) -> TvmExecutable:
    executable = TvmBackend().lower(program.copy(), target, inputs)
    assert isinstance(executable, TvmExecutable)
    return executable


def assembly(executable: TvmExecutable) -> str:
    library = executable._built.library.mod
    return "\n".join(str(part.inspect_source("asm")) for part in library.imports)


UNITS = {
    "3x3": (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 10)),
    "first": (nn.Conv2d(3, 40, 7, stride=2, padding=3), (1, 3, 33, 32)),
    "one channel": (nn.Conv2d(1, 8, 3), (1, 1, 9, 9)),
    "1x1": (nn.Conv2d(24, 20, 1), (2, 24, 9, 9)),
    "1x1 of odd channels": (nn.Conv2d(30, 17, 1), (2, 30, 5, 5)),
    "dilated": (nn.Conv2d(8, 8, 3, dilation=2, padding=(0, 2)), (1, 8, 12, 12)),
    "depthwise": (nn.Conv2d(24, 24, 3, padding=1, groups=24), (2, 24, 9, 9)),
    "grouped": (nn.Conv2d(32, 64, 3, padding=1, groups=4), (1, 32, 7, 7)),
    "groups of three": (nn.Conv2d(12, 12, 3, groups=4), (1, 12, 7, 7)),
    "linear": (nn.Linear(64, 33), (7, 64)),
    "linear of three dimensions": (nn.Linear(64, 100), (2, 5, 64)),
    "linear of odd size": (nn.Linear(63, 33), (7, 63)),
}


@pytest.mark.parametrize("name", UNITS)
def test_units_agree_with_onnxruntime_to_one_step(name: str) -> None:
    unit, shape = UNITS[name]
    torch.manual_seed(0)
    target = resolve_target("x86")
    program, inputs = quantized(nn.Sequential(unit, nn.ReLU()), torch.randn(shape))
    theirs = OnnxBackend().lower(program.copy(), target, inputs)(inputs)[0]
    ours = lower(program, inputs, target)(inputs)[0]
    step = float(theirs.unique().diff().min()) if theirs.unique().numel() > 1 else 1.0
    assert (ours - theirs).abs().max() <= 1.01 * step
    assert (ours == theirs).float().mean() > 0.98


@pytest.mark.parametrize("target", ["avx512-vnni", "avx512", "avx2", "cortex-a76", "cortex-a72"])
def test_the_instruction_of_the_machine(target: str) -> None:
    program, inputs = quantized(nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU()), torch.randn(1, 16, 9, 9))
    code = assembly(lower(program, inputs, resolve_target(target)))
    expected = {"avx512-vnni": "vpdpbusd", "avx512": "vpmaddubsw", "avx2": "vpmaddubsw", "cortex-a76": "sdot"}
    for instruction in ("vpdpbusd", "vpmaddubsw", "sdot"):
        assert bool(re.search(rf"\b{instruction}\b", code)) == (expected.get(target) == instruction)


@pytest.mark.parametrize("target", ["avx512", "avx2"])
def test_other_levels_of_x86_compute_the_same(target: str) -> None:
    machine = resolve_target(target)
    if not machine.runs_here:
        pytest.skip(f"this host is no {target}")
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3)
    with torch.no_grad():
        conv.weight.uniform_(-0.2, 0.2)
        conv.weight[:, 0::4], conv.weight[:, 1::4] = 0.5, 0.0  # no pair of products exceeds 16 bits
    program, inputs = quantized(conv, torch.randn(1, 16, 9, 9))
    ours, theirs = (lower(program, inputs, m)(inputs)[0] for m in (machine, resolve_target("x86")))
    torch.testing.assert_close(ours, theirs)


def compiled(model: nn.Module, x: torch.Tensor, options: str = "", **more: Any) -> Any:
    torch.manual_seed(0)
    data = [(torch.randn_like(x),) for _ in range(4)]
    spec = f"insert-fake-quant{{{options}}}"
    return fxopt.compile(model.eval(), example_inputs=(x,), passes=spec, calibration=data, backend="tvm", **more)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "activations=dynamic", "activations=none", "scheme=onnxruntime"])
@pytest.mark.parametrize("model", [Cnn, Block])
def test_models_stay_close_to_float(model: type[nn.Module], options: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16) if model is Cnn else torch.randn(2, 12, 64)
    own = model().eval()
    with torch.no_grad():
        expected = own(x)
    actual = compiled(own, x, options)(x)
    assert F.cosine_similarity(actual.flatten(), expected.flatten(), 0) > 0.99


def test_a_dynamic_batch() -> None:
    model, x = Cnn().eval(), torch.randn(2, 3, 16, 16)
    dynamic = compiled(model, x, dynamic_shapes={"x": {0: "batch"}})
    for size in (1, 5):
        y = torch.randn(size, 3, 16, 16)
        with torch.no_grad():
            assert F.cosine_similarity(dynamic(y).flatten(), model(y).flatten(), 0) > 0.99


def test_the_weights_are_a_quarter() -> None:
    model = nn.Sequential(nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Conv2d(256, 64, 3))
    program, inputs = quantized(model, torch.randn(1, 64, 9, 9))
    size = lower(program, inputs, resolve_target("x86")).nbytes()
    assert size < 0.26 * sum(p.numel() * 4 for p in model.parameters())
