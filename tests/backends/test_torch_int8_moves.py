"""int8 on the torch backend: values that only move, arithmetic between them, dynamic ranges, weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.backends.int8_models import add_dynamic, add_weight_only, fused
from tests.backends.int8_programs import CONVOLUTION, Conv, Linear, agree, check, image, small_models_too

__all__ = ["small_models_too"]


class Function(nn.Module):
    """A convolution, something that is done with its result, and another one."""

    def __init__(self, function: Any, channels: int = 8) -> None:
        super().__init__()
        self.a, self.c, self.b = Conv(activation="relu"), Conv(), Conv(channels=channels)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        y: torch.Tensor = self.b(self.function(self.a(x), self.c(x)))
        return y


@pytest.mark.parametrize(
    ("function", "channels"),
    [
        (lambda x, y: F.max_pool2d(x, 3, 2, 1), 8),
        (lambda x, y: F.max_pool2d(x, 2, ceil_mode=True), 8),
        (lambda x, y: x.view(2, 4, 28, 14), 4),
        (lambda x, y: x.reshape(2, 4, 28, 14), 4),
        (lambda x, y: x.permute(0, 1, 3, 2), 8),
        (lambda x, y: x.transpose(1, 2).reshape(2, 7, 16, 14)[:, :4], 4),
        (lambda x, y: x[:, 2:6], 4),
        (lambda x, y: torch.cat([x, y], 1), 16),
        (lambda x, y: torch.cat([*x.chunk(2, 1), *y.split([3, 5], 1)][1:], 1), 12),
        (lambda x, y: x.unbind(0)[1].unsqueeze(0), 8),
        (lambda x, y: F.pad(x, (1, 0, 0, 2)), 8),
        (lambda x, y: F.channel_shuffle(x, 4), 8),
        (lambda x, y: F.max_pool2d(y, 1).relu(), 8),
        (lambda x, y: F.relu6(F.max_pool2d(y, 1)), 8),
    ],
)
def test_moves_stay_integers(function: Any, channels: int) -> None:
    executable = check(Function(function, channels), image(), calls=CONVOLUTION, steps=3.01)
    assert executable.source.count("dequantize(") == 1, executable.source  # the output


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (lambda x, y: x + F.max_pool2d(y, 1), "= add("),
        (lambda x, y: torch.relu(x * 0.5 + y), ""),
        (lambda x, y: x + y[:, :1], "= add("),
        (lambda x, y: x * y, "= mul("),
        (lambda x, y: x * y.mean((2, 3), keepdim=True), "= mul("),
        (lambda x, y: F.hardswish(F.max_pool2d(y, 1)), "hardswish("),
        (lambda x, y: F.leaky_relu(F.max_pool2d(y, 1), 0.2), "leaky_relu("),
        (lambda x, y: torch.sigmoid(F.max_pool2d(y, 1)), ""),
        (lambda x, y: F.avg_pool2d(x, 2), ""),
        (lambda x, y: F.adaptive_avg_pool2d(x, 3), ""),
        (lambda x, y: torch.add(x, y, alpha=2), ""),
        (lambda x, y: x * x, ""),
        (lambda x, y: F.max_pool2d(x, 2, return_indices=True)[0], ""),
    ],
)
def test_arithmetic_between_integers(function: Any, calls: str) -> None:
    check(Function(function), image(), calls=calls, never="decomposed", steps=4)


def test_relu_of_a_sum() -> None:
    model = Function(lambda x, y: torch.relu(x + F.max_pool2d(y, 1)))
    executable = check(model, image(), calls="= add(", steps=4, relu=False)
    assert executable.source.count("dequantize(") == 1  # the output


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "elu"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("rows", [3, 200])
def test_dynamic_ranges(activation: str, dtype: torch.dtype, rows: int) -> None:
    for shift in (0.0, 5.0, -5.0):
        program, flat = fused(Linear(activation=activation), (image(rows, 64) + shift, image(rows, 48)))
        add_dynamic(program, dtype)
        executable = agree(program, flat, steps=50)
        assert ("linear_dynamic" if rows == 3 else "quantize_dynamic") in executable.source


def test_one_dynamic_range_for_several_linears() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Linear(), Linear(outputs=64)

        def forward(self, x: torch.Tensor) -> Any:
            y = torch.tanh(x)
            return self.a(y), self.b(y)

    program, flat = fused(Several(), (image(100, 64),))
    add_dynamic(program)
    assert agree(program, flat, steps=20).source.count("quantize_dynamic(") <= 2


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("size", [64, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_alone(rows: int, size: int, dtype: torch.dtype) -> None:
    program, flat = fused(
        Linear(size, size, "relu").to(dtype), (image(rows, size).to(dtype), image(rows, size).to(dtype))
    )
    add_weight_only(program)
    agree(program, flat, steps=1 if dtype == torch.float32 else 100)


def test_weights_alone_of_a_convolution() -> None:
    program, flat = fused(Conv(), (image(),))
    add_weight_only(program)
    agree(program, flat)
