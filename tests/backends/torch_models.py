"""What the tests of the PyTorch backend share: small models, and a check of the lowered one against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxopt import verify
from fxopt.backends.torch import TorchBackend, TorchExecutable
from fxopt.capture import capture
from fxopt.execute import evaluate
from fxopt.fused import CONV, LINEAR
from fxopt.program import Program
from fxopt.target import resolve_target

Tensors = tuple[torch.Tensor, ...]
PARAMETERS = {"hardtanh": [-0.5, 0.5], "leaky_relu": [0.1], "elu": [0.7]}
BIG = 28  # side of images for which a convolution is worth a oneDNN call


def program_of(model: nn.Module, inputs: Tensors, dynamic_shapes: Any = None) -> tuple[Program, list[Any]]:
    captured = capture(model, inputs, dynamic_shapes=dynamic_shapes)
    return captured.program, captured.inputs


def lower(model: nn.Module, inputs: Tensors, dynamic_shapes: Any = None, target: str = "x86") -> TorchExecutable:
    program, flat = program_of(model, inputs, dynamic_shapes)
    executable = TorchBackend().lower(program, resolve_target(target), flat)
    assert isinstance(executable, TorchExecutable)
    return executable


def strides(x: torch.Tensor) -> list[int]:
    """Strides that matter: of dimensions with more than one element, where there are elements at all."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


def check(model: nn.Module, *inputs: torch.Tensor, calls: str = "", never: str = "") -> TorchExecutable:
    """The lowered model against the reference: values, strides, inputs left alone; *calls* is in its source."""
    program, flat = program_of(model, inputs)
    reference = evaluate(program, flat)
    executable = TorchBackend().lower(program, resolve_target("x86"), flat)
    assert isinstance(executable, TorchExecutable)
    for _ in range(2):
        before = [x.clone() for x in flat]
        outputs = executable(flat)
        assert verify.compare(reference, outputs).within, executable.source
        for mine, eager in zip(outputs, reference, strict=True):
            assert strides(mine) == strides(eager), executable.source
            assert not mine.requires_grad
            assert not mine.is_inference()
        for x, old in zip(flat, before, strict=True):
            assert torch.equal(x, old)
    assert calls in executable.source, executable.source
    assert not never or never not in executable.source, executable.source
    return executable


class Conv(nn.Module):
    """One fused convolution with everything it may carry."""

    def __init__(self, dims: int = 2, out: int = 8, channels: int = 4, groups: int = 1, **options: Any) -> None:
        super().__init__()
        self.dims, self.groups = dims, groups
        self.activation = options.pop("activation", "none")
        self.parameters_ = PARAMETERS.get(self.activation, [])
        self.spatial = {"stride": 1, "padding": 1, "dilation": 1} | options
        self.weight = nn.Parameter(torch.randn(out, channels // groups, *[3] * dims))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        stride, padding, dilation = ([v] * self.dims if isinstance(v, int) else v for v in self.spatial.values())
        tail = (stride, padding, dilation, self.groups, self.activation, self.parameters_)
        y: torch.Tensor = CONV[self.dims](x, self.weight, self.bias, residual, *tail)
        return y


class Linear(nn.Module):
    """One fused linear."""

    def __init__(self, inputs: int = 600, outputs: int = 500, activation: str = "none") -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, outputs)
        self.activation = activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        tail = (residual, self.activation, PARAMETERS.get(self.activation, []))
        y: torch.Tensor = LINEAR(x, self.inner.weight, self.inner.bias, *tail)
        return y


class Function(nn.Module):
    """A model with one constant tensor, from a function of it and the inputs."""

    def __init__(self, function: Callable[..., Any], *constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.count = len(constants)
        for i, value in enumerate(constants):
            self.register_buffer(f"c{i}", value)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *(getattr(self, f"c{i}") for i in range(self.count)))


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, BIG, BIG))).to(dtype)


class Views(nn.Module):
    """A convolution whose channels_last result meets ops that were captured for a contiguous one."""

    def __init__(self, after: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(4, 8, 3), after

    def forward(self, x: torch.Tensor) -> Any:
        return self.after(self.conv(x))


class Counter(nn.Module):
    count: torch.Tensor
    last: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each call exchanges the two buffers and counts in one of them."""
        last, count = self.last.clone(), self.count.clone()
        self.count.copy_(last + x)
        self.last.copy_(count)
        return self.count * 2, last
