"""int8 on the torch backend: convolutions and linears with what is fused into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.execute import evaluate
from fxopt.ops import ACTIVATIONS
from tests.backends.int8_models import Quantizer, fused
from tests.backends.int8_programs import (
    BINARY,
    CONVOLUTION,
    Conv,
    Linear,
    _output_step,
    check,
    image,
    lower,
    small_models_too,
)

__all__ = ["small_models_too"]


LINEARS = "onednn_qlinear_pointwise"


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kernel", [1, 3])
def test_every_activation_on_a_convolution(activation: str, kernel: int) -> None:
    check(Conv(activation=activation, kernel=kernel, padding=kernel // 2), image(), calls="onednn_q")


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_on_a_linear(activation: str) -> None:
    check(Linear(activation=activation), image(3, 7, 64), calls=LINEARS)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("positive", [True, False])  # whether the zero point is 0
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"groups": 2},
        {"groups": 4},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"padding": 0},
        {"stride": 3, "padding": 2, "groups": 2, "dilation": 2},
        {"kernel": 1, "padding": 0},
    ],
)
def test_geometry(dims: int, options: dict[str, Any], positive: bool) -> None:
    x = image(2, 4, *{1: [40], 2: [14, 11], 3: [6, 7, 5]}[dims])
    check(Conv(dims, activation="relu", **options), x.abs() if positive else x, calls="onednn_q")


def test_uneven_geometry() -> None:
    check(Conv(stride=[1, 2], padding=[0, 2], dilation=[2, 1]), image(), calls=CONVOLUTION)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_asymmetric_padding(value: float) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Conv(padding=0, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(F.pad(x, (0, 1, 2, 0), value=value))
            return y

    check(Padded(), image(), calls=CONVOLUTION, never="aten_pad" if value == 0 else "")


def test_named_padding() -> None:
    check(nn.Conv2d(4, 8, 4, padding="valid"), image(), calls=CONVOLUTION)
    check(nn.Conv2d(4, 8, 4, padding="same"), image())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_falls_back(dims: int, groups: int) -> None:
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    check(kind(4, 6, 3, stride=2, padding=1, groups=groups), image(2, 4, *[7] * dims), never="decomposed")


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "elu"])
@pytest.mark.parametrize("quantized_residual", [True, False])
@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_residual(activation: str, quantized_residual: bool, outputs: bool, kernel: int) -> None:
    model = Conv(activation=activation, kernel=kernel, padding=kernel // 2)
    options: dict[str, Any] = {"residual": quantized_residual, "outputs": outputs}
    steps = 1.01 if outputs else 5
    check(model, image(), image(2, 8, 14, 14), calls="binary", steps=steps, **options)
    check(Linear(activation=activation), image(9, 64), image(9, 48), calls="binary", steps=steps, **options)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_residual_of_other_dimensions(dims: int, groups: int) -> None:
    sizes = [9] * dims
    check(Conv(dims, groups=groups, activation="relu"), image(2, 4, *sizes), image(2, 8, *sizes), calls="onednn_q")


def test_residual_of_a_grouped_convolution() -> None:
    check(Conv(groups=4, activation="relu"), image(), image(2, 8, 14, 14), calls=BINARY)


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (8, 1, 1), (1, 8, 14, 14), (14,)])
def test_broadcast_residual(shape: tuple[int, ...]) -> None:
    check(Conv(activation="relu"), image(), torch.randn(shape), calls=CONVOLUTION)


def test_residual_that_broadcasts_the_convolution() -> None:
    check(Conv(kernel=1, padding=0), image(1, 4, 1, 1), image(2, 8, 5, 5))
    check(Linear(), image(1, 64), image(5, 48))


@pytest.mark.parametrize("kernel", [1, 3])
def test_residual_used_twice(kernel: int) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: dict[str, Any] = {"kernel": kernel, "padding": kernel // 2, "channels": 8}
            self.layers = nn.ModuleList(Conv(activation="relu", **options) for _ in range(4))

        def forward(self, x: torch.Tensor) -> Any:
            a, b, c, d = self.layers
            r = a(x)
            y = b(r, r)
            z = c(y, r)
            return d(z, y), y

    executable = check(Twice(), image(2, 8, 14, 14).abs(), steps=2.01)
    assert executable.source.count("aten_clone") == 1, executable.source  # r lives on after its first use


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("activation", ["none", "relu", "hardtanh", "hardswish"])
def test_signed_and_narrow_integers(bits: int, dtype: torch.dtype, activation: str) -> None:
    model = nn.Sequential(Conv(activation=activation), Conv(channels=8, activation="relu"))
    check(model, image(), dtype=dtype, bits=bits, calls=CONVOLUTION, steps=2.01)
    check(Conv(activation="relu"), image(), image(2, 8, 14, 14), dtype=dtype, bits=bits, calls=BINARY)


def test_result_wanted_as_floats_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Conv(activation="relu"), Conv(channels=8)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            return self.b(y), y.exp()

    check(Both(), image(), calls=CONVOLUTION, steps=1.01)


def test_bfloat16() -> None:
    model = nn.Sequential(Conv(activation="relu"), Conv(channels=8, activation="gelu")).bfloat16()
    check(model, image().bfloat16(), calls=CONVOLUTION, steps=3)
    check(Linear().bfloat16(), image(5, 64).bfloat16(), calls=LINEARS, steps=3)


def test_single_pixels_single_channels_and_empty_batches() -> None:
    check(Conv(kernel=1, padding=0), image(1, 4, 1, 1), calls="onednn_q")
    check(Conv(channels=1, out=1), image(2, 1, 9, 9), calls="onednn_q")
    check(Linear(1, 1), image(1, 1), calls="onednn_q")


def test_unbatched_inputs_fall_back() -> None:
    check(nn.Conv2d(4, 8, 3), image(4, 9, 9), never="decomposed")
    check(nn.Linear(64, 5), image(64), never="decomposed")


def test_weight_used_twice_in_different_ways() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(F.conv2d(x, self.weight, padding=1), self.weight, padding=2, dilation=2)

    check(Tied(), image(), calls=CONVOLUTION, steps=2.01)


def test_dynamic_batch_and_sizes() -> None:
    model = nn.Sequential(Conv(activation="relu"), nn.MaxPool2d(2), Conv(channels=8, kernel=1, padding=0))
    batch, height = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("half", min=2, max=64)
    program, flat = fused(model, (image(3, 4, 12, 12),), ({0: batch, 2: 2 * height},))
    Quantizer(program, flat).run()
    copy = program.copy()
    executable = lower(program, flat)
    for shape in [(3, 4, 12, 12), (1, 4, 12, 12), (7, 4, 30, 12)]:
        x = flat[0].new_empty(shape).uniform_(-2, 2)
        [mine], [expected] = executable([x]), evaluate(copy, [x])
        assert (mine - expected).abs().max() <= 2.01 * _output_step(copy.output.all_input_nodes[0])
