"""Convolutions and linears on oneDNN: what it computes, and what is left to ATen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.fused import CONV
from fxopt.ops import ACTIVATIONS
from tests.backends.torch_models import BIG, Conv, Function, Linear, check, image

# What oneDNN computes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_on_a_convolution(activation: str, dtype: torch.dtype) -> None:
    check(Conv(activation=activation).to(dtype), image(dtype=dtype), calls="mkldnn__convolution_pointwise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation_on_a_linear(activation: str, dtype: torch.dtype) -> None:
    check(Linear(activation=activation).to(dtype), torch.randn(3, 7, 600).to(dtype), calls="mkldnn__linear_pointwise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "elu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_residual(activation: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    residual = image(2, 8, BIG, BIG, dtype=dtype).to(memory_format=layout)
    model = Conv(activation=activation).to(dtype)
    check(model, image(dtype=dtype), residual, calls="convolution_pointwise_binary", never="pointwise__binary")
    check(Linear(activation=activation).to(dtype), image(9, 600, dtype=dtype), image(9, 500, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (8, 1, 1), (1, 8, 28, 28), (28,)])
def test_broadcast_residual(shape: tuple[int, ...]) -> None:
    check(Conv(activation="relu"), image(), torch.randn(shape), never="binary")
    check(Linear(activation="relu"), torch.randn(28, 600), torch.randn(3, 28, 500), never="binary")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pixel_residual_of_ambiguous_layout(dtype: torch.dtype) -> None:
    model = Conv(activation="relu", padding=1, channels=64, out=128).to(dtype)
    check(model, image(2, 64, 1, 1, dtype=dtype), image(2, 128, 1, 1, dtype=dtype))
    one_channel = Conv(activation="relu", channels=64, out=1).to(dtype)
    check(one_channel, image(2, 64, BIG, BIG, dtype=dtype), image(2, 1, BIG, BIG, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"groups": 4},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"padding": 0},
        {"stride": 3, "padding": 2, "groups": 2, "dilation": 2},
    ],
)
def test_geometry(dims: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    x = image(2, 4, *{1: [400], 2: [BIG, 20], 3: [9, 10, 11]}[dims], dtype=dtype)
    model = Conv(dims, **options, activation="relu").to(dtype)
    check(model, x, calls="mkldnn__convolution_pointwise")
    residual = torch.randn_like(model(x))
    fusible = options.get("groups", 1) == 1
    check(model, x, residual, calls="mkldnn__convolution_pointwise_binary" if fusible else "aten_add__Tensor")


def test_uneven_geometry() -> None:
    check(Conv(stride=[1, 2], padding=[0, 2], dilation=[2, 1]), image(), calls="mkldnn__convolution")


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(padding: str) -> None:
    check(nn.Conv2d(4, 8, 4, padding=padding), image())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_convolution(dims: int, groups: int, dtype: torch.dtype) -> None:
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    model = kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups).to(dtype)
    calls = "mkldnn__convolution_transpose" if dims > 1 else "aten_conv_transpose1d"
    executable = check(model, image(2, 4, *[9] * dims, dtype=dtype), calls=calls)
    assert torch.equal(executable.constant("weight"), model.weight)


def test_convolution_of_one_pixel_is_a_linear() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1)

        def forward(self, x: torch.Tensor) -> Any:
            s = F.adaptive_avg_pool2d(x, 1)
            spatial = ([1, 1], [0, 0], [1, 1], 1)
            s = CONV[2](s, self.down.weight, self.down.bias, None, *spatial, "relu", [])
            return x * CONV[2](s, self.up.weight, self.up.bias, None, *spatial, "sigmoid", [])

    executable = check(Squeeze(), image(2, 64, 9, 9), calls="aten_linear", never="convolution")
    assert executable.source.count("aten_permute(") == 2  # before the first and after the last, not between


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 8, 1, 1), (2, 8, BIG, BIG)])
@pytest.mark.parametrize("side", [1, BIG])
def test_pixelwise_residual(side: int, shape: tuple[int, ...]) -> None:
    model = Conv(padding=0, activation="relu")
    model.weight = nn.Parameter(torch.randn(8, 4, 1, 1))
    check(model, image(2, 4, side, side), torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"groups": 2}])
def test_convolution_of_single_pixels(options: dict[str, Any], layout: torch.memory_format, dtype: torch.dtype) -> None:
    last = nn.Conv2d(32, 48, 1)
    model = nn.Sequential(nn.Conv2d(32, 32, 1, **options), last, nn.ReLU()).to(dtype)
    x = image(2, 32, 40, 31, dtype=dtype).to(memory_format=layout)
    executable = check(model, x, calls="mkldnn__linear_pointwise")
    assert torch.equal(executable.constant("1.weight"), last.weight)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_one_pixel_of_many_channels(rows: int, bias: bool) -> None:
    check(nn.Conv2d(700, 800, 1, bias=bias), image(rows, 700, 1, 1), calls="mkldnn__linear_pointwise")


@pytest.mark.parametrize("shape", [(600,), (1, 600), (2, 3, 4, 600), (0, 600), (2, 0, 600)])
def test_linear_of_any_rank(shape: tuple[int, ...]) -> None:
    check(Linear(activation="relu"), torch.randn(shape))


def test_small_linear_and_convolution_stay_with_aten() -> None:
    check(Linear(8, 8, activation="relu"), torch.randn(2, 8), calls="aten_linear", never="mkldnn")
    check(Conv(activation="silu"), image(1, 4, 8, 8), image(1, 8, 8, 8), calls="aten_conv2d", never="mkldnn")


def test_strided_and_expanded_inputs() -> None:
    wide = torch.randn(2, 4, BIG, 2 * BIG)
    check(Conv(), wide[..., ::2])
    check(Conv(), torch.randn(1, 4, 1, 1).expand(2, 4, BIG, BIG))
    check(Linear(), torch.randn(600, 9).t())


# What it leaves to ATen.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    check(Conv(activation="relu").to(dtype), image(dtype=dtype), never="mkldnn")
    check(Linear().to(dtype), image(9, 600, dtype=dtype), never="mkldnn")
    residual = image(2, 8, BIG, BIG, dtype=dtype)
    check(Conv(activation="gelu").to(dtype), image(dtype=dtype), residual, never="mkldnn")


def test_complex_and_integers() -> None:
    check(Function(lambda x, c: (x * c).real, torch.randn(4, dtype=torch.complex64)), torch.randn(3, 4))
    check(Function(lambda x, c: (x + c) // 3, torch.arange(4)), torch.arange(12).reshape(3, 4))


def test_unbatched_and_empty_images() -> None:
    check(Conv(), image(4, BIG, BIG), never="mkldnn")
    check(Conv(activation="relu"), image(0, 4, BIG, BIG))


def test_computed_weights() -> None:
    check(Function(lambda x, w: F.conv2d(x, w * 2), torch.randn(8, 4, 3, 3)), image(), never="mkldnn")
    check(Function(lambda x, w: F.linear(x, w), torch.randn(600)), torch.randn(5, 600), never="mkldnn")
    check(Function(F.conv2d), image(), torch.randn(8, 4, 3, 3), never="mkldnn")
