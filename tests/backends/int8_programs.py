"""What tests of the torch backend's int8 share: small quantized programs, against their reference evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt.backends import _torch_int8_worth
from fxopt.backends.torch import TorchBackend, TorchExecutable
from fxopt.execute import evaluate
from fxopt.fused import CONV, LINEAR
from fxopt.program import Program
from fxopt.quantized import QUANTIZE, parameters
from fxopt.target import resolve_target
from tests.backends.int8_models import Quantizer, fused

CONVOLUTION, BINARY = "onednn_qconv_pointwise(", "onednn_qconv2d_pointwise_binary("

PARAMETERS = {"hardtanh": [-0.5, 0.5], "leaky_relu": [0.1], "elu": [0.7]}


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is imported, layers run in int8 that are too small to be worth it."""
    monkeypatch.setattr(_torch_int8_worth, "_TINY", 0)


def lower(program: Program, flat: list[Any]) -> TorchExecutable:
    executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    assert isinstance(executable, TorchExecutable)
    return executable


def agree(program: Program, flat: list[Any], steps: float = 1.01) -> TorchExecutable:
    """Lower *program*, and compare with its reference evaluation, in quantization steps of the outputs."""
    reference = evaluate(program, flat)
    scales = [_output_step(value) for value in program.output.args[0]]  # type: ignore[union-attr]
    executable = lower(program, flat)
    for _ in range(2):
        before = [x.clone() for x in flat]
        for mine, expected, scale in zip(executable(flat), reference, scales, strict=True):
            assert mine.dtype == expected.dtype
            assert mine.shape == expected.shape
            assert mine.stride() == expected.stride() or 1 in mine.shape or not mine.numel(), executable.source
            error = (mine.float() - expected.float()).abs().max() if mine.numel() else torch.zeros(())
            assert error <= steps * scale, f"{error / scale} steps\n{executable.source}"
        assert all(torch.equal(x, old) for x, old in zip(flat, before, strict=True))
    return executable


def _output_step(node: Any) -> float:
    for source in node.all_input_nodes:
        if source.target is QUANTIZE:
            return float(parameters(source).scale)  # type: ignore[arg-type]
    return 1e-3


def check(
    model: nn.Module,
    *inputs: torch.Tensor,
    calls: str = "",
    never: str = "",
    steps: float = 1.01,
    dynamic_shapes: Any = None,
    dtype: torch.dtype = torch.uint8,
    bits: int = 8,
    **options: bool,
) -> TorchExecutable:
    """Quantize *model* by its inputs, lower it, and compare."""
    program, flat = fused(model, inputs, dynamic_shapes)
    Quantizer(program, flat, dtype, bits).run(**options)
    executable = agree(program, flat, steps)
    assert calls in executable.source, executable.source
    assert not never or never not in executable.source, executable.source
    return executable


class Conv(nn.Module):
    """One fused convolution with everything it may carry."""

    def __init__(self, dims: int = 2, out: int = 8, channels: int = 4, groups: int = 1, **options: Any) -> None:
        super().__init__()
        self.dims, self.groups = dims, groups
        self.activation = options.pop("activation", "none")
        kernel = options.pop("kernel", 3)
        self.parameters_ = PARAMETERS.get(self.activation, [])
        bias = options.pop("bias", True)
        self.spatial = {"stride": 1, "padding": 1, "dilation": 1} | options
        self.weight = nn.Parameter(torch.randn(out, channels // groups, *[kernel] * dims) / 4)
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        stride, padding, dilation = ([v] * self.dims if isinstance(v, int) else v for v in self.spatial.values())
        tail = (stride, padding, dilation, self.groups, self.activation, self.parameters_)
        y: torch.Tensor = CONV[self.dims](x, self.weight, self.bias, residual, *tail)
        return y


class Linear(nn.Module):
    """One fused linear."""

    def __init__(self, inputs: int = 64, outputs: int = 48, activation: str = "none", bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, outputs, bias)
        self.activation = activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        tail = (residual, self.activation, PARAMETERS.get(self.activation, []))
        y: torch.Tensor = LINEAR(x, self.inner.weight, self.inner.bias, *tail)
        return y


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, 14, 14)))
